"""Running statistics in a run: carried through epochs, evaluated with, kept in checkpoints, exported and imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twin_cases import DATA, EPOCHS, STEPS, config_of, trained

from refimpl.interchange import Format, export_params, import_params
from refimpl.models.base import Carried
from refimpl.models.classifier import Classifier
from refimpl.models.norm_mlp import NormMLP
from refimpl.training import twin
from refimpl.training.loop import Run
from refimpl.training.report import report, scores_of
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import resume, start
from refimpl.training.state import pack, unpack
from refimpl.training.trainer import NonFiniteLossError, Trainer
from refimpl.weights import SparseWeight, values_of

pytestmark = pytest.mark.usefixtures("own_folder")

MEAN, VAR, COUNT = "norms.0.running_mean", "norms.0.running_var", "norms.0.num_batches_tracked"
EPS = float(np.finfo(float).eps)


def whole(weight: Any) -> np.ndarray:
    return weight.dense() if isinstance(weight, SparseWeight) else weight


def check_statistics(method: str) -> None:
    """Follow the first batch norm by its definition, over all epochs and exchanges of a run in float64."""
    run = Run(config_of("dtype=float64", f"method={method}", "interval=3", "pattern="), DATA)
    mean, var = np.zeros(8), np.ones(8)
    for step in range(1, EPOCHS * STEPS + 1):
        x, labels = run.batches[run.state.window]
        seen = run.trainer.method.view(run.state.params)
        before = {name: array.copy() for name, array in run.state.carried.items()}
        held = run.state.carried
        z = whole(seen["layers.0.weight"]) @ x.reshape(-1, x.shape[-1])
        n = z.shape[1]
        mean, var = 0.9 * mean + 0.1 * z.mean(1), 0.9 * var + 0.1 * z.var(1) * n / (n - 1)
        run.trainer.step(x, labels)
        assert all(np.array_equal(held[name], array) for name, array in before.items()), "what was carried was changed"
        found = run.state.carried
        # 36 batches, each adding some roundings of sums over 30 numbers and 7 columns, of size 10 at most
        np.testing.assert_allclose(found[MEAN], mean, rtol=0, atol=1e4 * EPS)
        np.testing.assert_allclose(found[VAR], var, rtol=1e4 * EPS)
        assert int(found[COUNT]) == step
        if run.state.window == STEPS:
            run.next_epoch(1.0, fires=False)


@pytest.mark.parametrize("method", ["dense", "acdc", "rigl", "topkast"])
def test_running_statistics_are_those_of_the_definition(method: str) -> None:
    check_statistics(method)


def begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "next_epoch", lambda self, carried: self.begin(1, np.float64))


def never_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def step(self: Trainer, inputs: Any, targets: Any) -> Any:
        carried = self.state.carried
        result = original(self, inputs, targets)
        self.state.carried = carried
        return result

    monkeypatch.setattr(Trainer, "step", step)


def changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classifier.loss_and_grads

    def loss_and_grads(self: Classifier, params: Any, x: Any, y: Any, carried: Carried, draws: Any = None) -> Any:
        loss, grads, buffers = original(self, params, x, y, carried, draws)
        for name, array in buffers.items():
            carried[name][...] = array
        return loss, grads, carried

    monkeypatch.setattr(Classifier, "loss_and_grads", loss_and_grads)


@pytest.mark.parametrize("plant", [begun_anew, never_taken_up, changed_in_place])
def test_statistics_of_another_kind_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_statistics("acdc")


# --- who sees them ------------------------------------------------------------------------------------------


def test_evaluation_reads_the_running_statistics_and_leaves_them() -> None:
    run = Run(config_of("epochs=1", "method=static", "dtype=float64"), DATA)
    run.train()
    before = {name: array.tobytes() for name, array in run.state.carried.items()}
    params = run.trainer.evaluated()
    assert list(params) == [*run.state.params, *run.state.carried]
    scores = scores_of(run.task, params)
    assert {name: array.tobytes() for name, array in run.state.carried.items()} == before
    other = {**params, MEAN: values_of(params[MEAN]) + 1}
    assert scores_of(run.task, other) != scores
    model, x = Classifier(run.task.model.network), DATA.standardised(DATA.test.pixels, np.float64)  # type: ignore[attr-defined]
    one = np.concatenate([model.logits(params, x[..., [k]]) for k in range(9)], axis=-1)
    # Sums over at most 30 products of numbers of order 10, in three layers.
    assert np.abs(one - model.logits(params, x)).max() < 1e4 * EPS, "in evaluation no image knows of the others"


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_methods_that_look_before_training_see_the_first_buffers_and_leave_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = NormMLP.loss_and_grads

    def loss_and_grads(self: NormMLP, params: Any, x: Any, labels: Any, draws: Any = None) -> Any:
        seen.append(int(params[COUNT]))
        return original(self, params, x, labels, draws)

    monkeypatch.setattr(NormMLP, "loss_and_grads", loss_and_grads)
    run = Run(config_of(f"method={method}"), DATA)
    assert seen
    assert not any(seen)
    assert int(run.state.carried[COUNT]) == 0
    assert any(isinstance(w, SparseWeight) for w in run.state.params.values())


def test_a_step_that_fails_leaves_the_buffers_as_they_were() -> None:
    run = Run(config_of(), DATA)
    for k in range(3):
        run.trainer.step(*run.batches[k])
    before = {name: array.tobytes() for name, array in run.state.carried.items()}
    values_of(run.state.params["layers.2.bias"])[0] = np.inf
    with pytest.raises(NonFiniteLossError, match=r"layers\.2\.bias"):
        run.trainer.step(*run.batches[3])
    assert {name: array.tobytes() for name, array in run.state.carried.items()} == before
    assert run.state.step == 3


def test_the_report_times_steps_without_moving_them() -> None:
    run = start(config_of("epochs=2", "method=static"), "run", DATA)
    run.train()
    before = {name: array.tobytes() for name, array in run.state.carried.items()}
    report(run, repeats=1)
    run.close()
    assert {name: array.tobytes() for name, array in run.state.carried.items()} == before


# --- files --------------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_buffers() -> None:
    config = config_of("epochs=2", "compress=[1]", 'decompress="auto"')
    run = Run(config, DATA)
    run.train()
    arrays, meta = pack(run.state, run.trainer.method)
    other = Run(config, DATA)
    unpack(other.state, other.trainer.method, arrays, {**meta, "state": dict(meta["state"])})
    assert {k: a.tobytes() for k, a in other.state.carried.items()} == {
        k: a.tobytes() for k, a in run.state.carried.items()
    }
    assert other.state.carried[COUNT].shape == ()
    assert other.state.params.keys() == run.state.params.keys(), "a buffer is no parameter"


def test_the_best_model_has_the_buffers_of_its_own_epoch() -> None:
    trained(config_of("method=dense", "lr=0.6", "schedule=constant"), Path("run"))
    best = RunFolder.open("run").best()
    assert best.meta["step"] < EPOCHS * STEPS, "the case is to have its best epoch before the last"
    params = twin.params_of(best)
    assert int(np.asarray(params[COUNT])) == best.meta["step"]
    run = Run(RunFolder.open("run").config, DATA)
    assert scores_of(run.task, params).valid["loss"] == best.meta["valid_loss"]


@pytest.mark.parametrize("to", ["npz", "scipy", "torch"])
def test_exported_models_come_back_with_their_buffers(to: Format) -> None:
    if to == "torch":
        pytest.importorskip("torch")
    trained(config_of(), Path("run"))
    params = twin.params_of(RunFolder.open("run").best())
    path = export_params(params, "model.npz" if to == "npz" else "model", to)
    found = import_params(path).params
    assert found.keys() == params.keys()
    for name, weight in params.items():
        assert values_of(found[name]).dtype == values_of(weight).dtype, name
        assert values_of(found[name]).shape == values_of(weight).shape, name
        assert values_of(found[name]).tobytes() == values_of(weight).tobytes(), name
    run = start(config_of("method=static"), "again", DATA, params=found)
    assert run.state.best == RunFolder.open("run").best().meta["valid_loss"]
    assert {k: a.tobytes() for k, a in run.state.carried.items()} == {
        k: np.asarray(params[k]).tobytes() for k in run.state.carried
    }
    run.close()
    again = resume("again", corpus=DATA)
    assert int(again.state.carried[COUNT]) == RunFolder.open("run").best().meta["step"]
    again.close()


def test_torch_takes_the_exported_buffers() -> None:
    torch = pytest.importorskip("torch")
    trained(config_of("method=dense", "epochs=2"), Path("run"))
    params = twin.params_of(RunFolder.open("run").best())
    export_params(params, "model.pt", "torch")
    state = torch.load("model.pt", weights_only=True)["state_dict"]
    norm = torch.nn.BatchNorm1d(8)
    norm.load_state_dict({k.removeprefix("norms.0."): v for k, v in state.items() if k.startswith("norms.0.")})
    assert norm.num_batches_tracked.shape == ()
    assert norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop(MEAN), "the weights lack 'norms.0.running_mean'"),
        (lambda p: p.update({MEAN: np.zeros(3, np.float32)}), r"has shape \(3,\) and the model's has \(8,\)"),
        (lambda p: p.update({VAR: np.ones(8)}), "is float64 and the run is float32; set dtype=float64"),
        (lambda p: p.update({COUNT: np.array(1.0)}), "is float64 and the model's is int64"),
        (lambda p: p.update({"norms.9.running_mean": np.zeros(1)}), "which the model does not have"),
    ],
)
def test_buffers_that_do_not_fit(change: Callable[[dict[str, Any]], None], says: str) -> None:
    run = Run(config_of(), DATA)
    params = run.trainer.evaluated()
    change(params)
    with pytest.raises(ValueError, match=says) as caught:
        start(config_of(), "new", DATA, params=params)
    assert "\n" not in str(caught.value)
    assert not Path("new").exists()


def test_counts_alone_are_whole_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", **{"w": np.ones((2, 2), np.float32), "w.count": np.array([1, 2])})
    with pytest.raises(ValueError, match=r"w\.count .* is int64; give float32 or float64"):
        import_params(tmp_path / "odd.npz")
