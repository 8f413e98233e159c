"""The dense twin of a run with dense phases: which one is kept, how it resumes, and what training it on comes to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twin_cases import DATA, EPOCHS, STEPS, Stop, config_of, numbers, trained

from refimpl.models.classifier import Classifier
from refimpl.training import checkpoint, finetune, loop, twin
from refimpl.training.loop import Run
from refimpl.training.metrics import read_metrics
from refimpl.training.report import report, scores_of
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import resume, start
from refimpl.weights import SparseWeight

pytestmark = pytest.mark.usefixtures("own_folder")

TIMES = ("seconds", "images_per_second")
DENSE_EPOCHS = (1, 3, 4)
"""Counted from 1, as records count them."""


def epochs_of(path: Path | str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(Path(path) / "metrics.jsonl") if r["kind"] == "epoch"]


def everything(path: Path) -> dict[str, Any]:
    """Return what a run left: the bytes of its three models, and its records without times."""
    folder = RunFolder.open(path)
    latest = folder.checkpoints()[-1]
    files = {p.name: p.read_bytes() for p in (folder.best_path, folder.best_dense_path) if p.is_file()}
    arrays, meta = checkpoint.load(latest)
    meta = {key: value for key, value in meta.items() if key != "metrics_length"}  # times have any number of digits
    arrays_left = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(path / "metrics.jsonl")]
    return {"files": files, "arrays": arrays_left, "meta": meta, "records": records, "name": latest.name}


# --- resuming -----------------------------------------------------------------------------------------------


UP_AND_DOWN = ("lr=0.4", "schedule=epoch-cosine", "warmup_epochs=4")
"""With these the last dense epoch is not the best one."""


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("norm-mlp", ("augment=true", "flip=false", "label_smoothing=0.1")),
        ("small-conv", ("augment=true",)),
        ("norm-mlp", UP_AND_DOWN),
    ],
)
def test_a_run_resumes_bit_for_bit_in_every_phase(model: str, more: tuple[str, ...]) -> None:
    """Stopped in the middle and at the end of each epoch: warm-up, compressed, dense, last dense, final."""
    config = config_of("checkpoint_every=2", *more, model=model)
    trained(config, Path("straight"))
    run = start(config, "stopped", DATA)
    for step in [3, 6, 8, 12, 15, 18, 21, 24, 25, 30, 33]:
        run.train(Stop(step))
        assert run.state.step == step
        run.close()
        run = resume("stopped", corpus=DATA)
    run.train()
    run.close()
    assert everything(Path("stopped")) == everything(Path("straight"))
    kinds = [all(d == 1 for d in r["density"].values()) for r in epochs_of("straight")]
    assert [k + 1 for k, dense in enumerate(kinds) if dense] == list(DENSE_EPOCHS)


# --- which twin is kept -------------------------------------------------------------------------------------


def check_twin(path: Path) -> None:
    """The twin is the dense model with the lowest validation loss, whole, and as it was evaluated."""
    folder = RunFolder.open(path)
    found = folder.best_dense()
    dense = {r["epoch"]: r["valid_loss"] for r in epochs_of(path) if r["epoch"] in DENSE_EPOCHS}
    epoch = min(dense, key=lambda e: dense[e])
    assert (found.meta["epoch"], found.meta["step"]) == (epoch, epoch * STEPS)
    params, slots = checkpoint.unpack_params(found.arrays)
    assert not any(isinstance(w, SparseWeight) for w in params.values()), "a twin is dense"
    assert all(slots[name] for name in params), "the optimizer's state is in it"
    run = Run(folder.config, DATA)
    seen = twin.params_of(found)
    assert seen.keys() == params.keys() | run.state.carried.keys()
    assert scores_of(run.task, seen).valid == found.meta["valid"]
    assert found.meta["valid"]["loss"] == dense[epoch]
    assert int(seen["norms.0.num_batches_tracked"]) == epoch * STEPS


@pytest.mark.parametrize("more", [(), UP_AND_DOWN])
def test_the_best_dense_model_is_kept_beside_the_sparse_one(more: tuple[str, ...]) -> None:
    run = trained(config_of(*more), Path("run"))
    check_twin(Path("run"))
    sparse = checkpoint.unpack_params(RunFolder.open("run").best().arrays)[0]
    assert isinstance(sparse["layers.0.weight"], SparseWeight)
    final = {r["epoch"]: r["valid_loss"] for r in epochs_of("run") if r["epoch"] > 4}
    assert run.state.best == min(final.values())


def after_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Run.next_epoch
    late: list[Any] = []
    monkeypatch.setattr(Run, "_save_best_dense", lambda run, evaluated, scores: late.append((evaluated, scores)))

    def next_epoch(run: Run, loss: float, *, fires: bool) -> Any:
        exchanges = original(run, loss, fires=fires)
        for _, scores in late:
            arrays, meta = checkpoint.pack_params(run.state.params, run.state.slots), {"valid": scores}
            assert run.folder is not None
            arrays |= {f"buffers/{name}": a for name, a in run.state.carried.items()}
            run.folder.save_best_dense(run.state.step, arrays, {**meta, "epoch": run.state.epoch})
        late.clear()
        return exchanges

    monkeypatch.setattr(Run, "next_epoch", next_epoch)


def any_epoch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.methods.acdc.ACDC.dense_twin", lambda method, step: not method.settled(step))


def the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Run._save_best_dense

    def save(run: Run, evaluated: Any, scores: Any) -> None:
        original(run, evaluated, scores)
        run.state.best_dense = float("inf")

    monkeypatch.setattr(Run, "_save_best_dense", save)


def the_wrong_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "next_epoch", lambda self, carried: self.begin(1, np.float32))


def no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(state: Any, method: Any, evaluated: Any) -> Any:
        arrays, meta = pack.original(state, method, evaluated)  # type: ignore[attr-defined]
        return {name: a for name, a in arrays.items() if "/slot/" not in name}, meta

    pack.original = twin.pack  # type: ignore[attr-defined]
    monkeypatch.setattr(loop.twin, "pack", pack)


@pytest.mark.parametrize("plant", [after_the_exchange, any_epoch_counts, the_last_one, the_wrong_buffers, no_slots])
def test_twins_of_another_kind_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    more = UP_AND_DOWN if plant is the_last_one else ()
    with pytest.raises((AssertionError, ValueError, KeyError)):  # noqa: PT012
        trained(config_of(*more), Path("run"))
        check_twin(Path("run"))


def test_a_twin_is_evaluated_as_its_optimizer_and_method_show_it() -> None:
    """Powerpropagation trains φ and shows w, averaging trains one model and shows another: the twin has both."""
    trained(config_of("power=2", "optimizer=asgd", "momentum=0", "nesterov=false", "t0=2"), Path("run"))
    found = RunFolder.open("run").best_dense()
    seen, stored = twin.params_of(found), checkpoint.unpack_params(found.arrays)[0]
    assert not np.array_equal(np.asarray(seen["layers.0.weight"]), np.asarray(stored["layers.0.weight"]))
    run = Run(RunFolder.open("run").config, DATA)
    assert scores_of(run.task, seen).valid == found.meta["valid"]


def test_methods_without_dense_phases_leave_no_twin() -> None:
    for method in ("dense", "gmp", "rigl", "set"):
        trained(config_of(f"method={method}", "epochs=2", "interval=3"), Path(method))
        assert not RunFolder.open(method).best_dense_path.exists()
    trained(config_of("sparsity=0"), Path("acdc"))
    assert not RunFolder.open("acdc").best_dense_path.exists(), "where nothing is sparse, the best model is dense"


# --- training it on -----------------------------------------------------------------------------------------


def fine_tuned(source: str, into: str, observer: loop.Observer | None = None) -> Run:
    run = finetune.begin(source, into, corpus=DATA)
    try:
        run.train(observer)
    finally:
        run.close()
    return run


def check_from_the_warm_up(*more: str, model: str = "norm-mlp") -> None:
    """In the warm-up AC/DC is dense training, so its twin, trained on, is the dense run: to the last bit."""
    config = config_of("compress=[3]", 'decompress="auto"', *more, model=model)
    trained(config, Path("acdc"))
    trained(finetune.dense(config), Path("dense"))
    own = fine_tuned("acdc", "tuned")
    assert own.state.step == EPOCHS * STEPS
    found, expected = (checkpoint.load(RunFolder.open(p).checkpoints()[-1]) for p in ("tuned", "dense"))
    assert found[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        assert array.tobytes() == found[0][name].tobytes(), name
    assert found[1]["state"] == expected[1]["state"]
    first = epochs_of("tuned")[0]["epoch"]
    keys = ("epoch", "step", "train_loss", "valid_loss", "valid_accuracy", "lr", "flops")
    for mine, theirs in zip(epochs_of("tuned"), epochs_of("dense")[first - 1 :], strict=True):
        assert {k: mine[k] for k in keys} == {k: theirs[k] for k in keys}
    best = [RunFolder.open(p).best() for p in ("tuned", "dense")]
    assert all(best[0].arrays[name].tobytes() == array.tobytes() for name, array in best[1].arrays.items())
    assert best[0].meta["valid_loss"] == best[1].meta["valid_loss"]


@pytest.mark.parametrize("model", ["norm-mlp", "small-conv"])
def test_a_twin_of_the_warm_up_becomes_the_dense_run(model: str) -> None:
    check_from_the_warm_up(model=model)


def test_a_twin_of_the_warm_up_becomes_the_dense_run_by_adam() -> None:
    check_from_the_warm_up("optimizer=adam", "momentum=0", "nesterov=false", "lr=0.01", "schedule=constant")


def test_a_twin_goes_on_as_a_longer_dense_phase_would() -> None:
    """Of two runs that differ in the length of their last dense phase: the twin of the shorter one, an epoch on."""
    shorter = config_of("compress=[1, 3]")
    trained(shorter, Path("shorter"))
    trained(config_of(), Path("longer"))
    twins = [RunFolder.open(p).best_dense() for p in ("shorter", "longer")]
    assert [t.meta["epoch"] for t in twins] == [3, 4], "the losses fall from epoch to epoch"
    run = fine_tuned("shorter", "tuned", Stop(4 * STEPS))
    assert run.state.epoch == 4
    found = checkpoint.load(RunFolder.open("tuned").checkpoints()[-1])[0]
    assert numbers(found) == numbers(twins[1].arrays)


def a_fresh_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = finetune.take_up

    def take_up(run: Run, found: Any) -> None:
        original(run, found)
        run.trainer.fresh_slots()

    monkeypatch.setattr(finetune, "take_up", take_up)


def the_learning_rate_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    original = finetune.take_up

    def take_up(run: Run, found: Any) -> None:
        original(run, found)
        run.state.origin_step = run.state.step

    monkeypatch.setattr(finetune, "take_up", take_up)


def the_data_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    original = finetune.take_up

    def take_up(run: Run, found: Any) -> None:
        original(run, found)
        run.state.origin_epoch = run.state.epoch

    monkeypatch.setattr(finetune, "take_up", take_up)


def fresh_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = finetune.take_up

    def take_up(run: Run, found: Any) -> None:
        fresh = run.state.carried
        original(run, found)
        run.state.carried = fresh

    monkeypatch.setattr(finetune, "take_up", take_up)


def the_same_epoch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = finetune.take_up

    def take_up(run: Run, found: Any) -> None:
        original(run, found)
        run.state.epoch -= 1
        run.state.step -= STEPS

    monkeypatch.setattr(finetune, "take_up", take_up)


PLANTS = (
    a_fresh_optimizer, the_learning_rate_from_the_start, the_data_from_the_start, fresh_buffers, the_same_epoch_again,
)  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_fine_tuning_of_another_kind_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check_from_the_warm_up()


def test_fine_tuning_resumes_and_leaves_its_source_alone() -> None:
    trained(config_of(), Path("acdc"))
    before = {p: p.read_bytes() for p in sorted(Path("acdc").rglob("*")) if p.is_file()}
    fine_tuned("acdc", "straight")
    run = finetune.begin("acdc", "stopped", corpus=DATA)
    for step in (26, 30, 33):
        run.train(Stop(step))
        run.close()
        run = resume("stopped", corpus=DATA)
    run.train()
    run.close()
    assert everything(Path("stopped")) == everything(Path("straight"))
    assert before == {p: p.read_bytes() for p in sorted(Path("acdc").rglob("*")) if p.is_file()}
    assert RunFolder.open("stopped").facts["origin"] == {"run": "acdc", "step": 24, "epoch": 4}


def test_the_twin_is_the_best_model_until_training_finds_a_better_one() -> None:
    trained(config_of(), Path("acdc"))
    run = finetune.begin("acdc", corpus=DATA)
    assert run.folder is not None
    assert run.folder.path == Path("acdc-finetuned-1")
    source, best = RunFolder.open("acdc").best_dense(), run.folder.best()
    assert best.meta["valid_loss"] == source.meta["valid"]["loss"] == run.state.best
    assert (best.meta["step"], best.meta["epoch"]) == (24, 4)
    found = report(run, repeats=0)
    assert found.scores.valid == source.meta["valid"]
    assert found.twin is None
    assert found.origin == {"run": "acdc", "step": 24, "epoch": 4}
    assert "trained on from the dense twin of acdc, of epoch 4" in found.text()
    json.dumps(found.to_dict())
    run.close()
    again = finetune.begin("acdc", corpus=DATA)
    assert again.folder is not None
    assert again.folder.path == Path("acdc-finetuned-2")
    again.close()


def test_the_report_shows_both_models() -> None:
    run = start(config_of(), "acdc", DATA)
    run.train()
    found = report(run, repeats=0)
    run.close()
    assert found.twin is not None
    assert (found.twin.density, found.twin.epoch, found.twin.step) == (1.0, 4, 24)
    params = twin.params_of(RunFolder.open("acdc").best_dense())
    assert found.twin.scores == scores_of(run.task, params)
    assert found.twin.scores != found.scores
    test = found.twin.scores.test["accuracy"]
    assert f"test accuracy {test:.4f} (its dense twin, of epoch 4, density 1)" in found.text()


# --- what can be wrong --------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_a_run_without_a_twin_cannot_be_fine_tuned() -> None:
    trained(config_of("method=gmp", "epochs=1", "interval=3"), Path("gmp"))
    with pytest.raises(FileNotFoundError, match="has no dense twin; give a run of acdc") as caught:
        finetune.begin("gmp", "tuned", corpus=DATA)
    assert "gmp" in one_line(caught.value)
    assert not Path("tuned").exists()
    with pytest.raises(FileNotFoundError, match="is not a run"):
        finetune.begin("nowhere", "tuned", corpus=DATA)


def test_nothing_is_touched_by_a_fine_tuning_that_fails_its_checks() -> None:
    trained(config_of(), Path("acdc"))
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        finetune.begin("acdc", "other", corpus=DATA)
    with pytest.raises(ValueError, match=r"a fine-tuning cannot change optimizer\.lr") as caught:
        finetune.begin("acdc", "tuned", changes=["lr=1"], corpus=DATA)
    one_line(caught.value)
    path = RunFolder.open("acdc").best_dense_path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        finetune.begin("acdc", "tuned", corpus=DATA)
    assert not Path("tuned").exists()


def test_a_fine_tuning_that_was_killed_at_its_birth_does_not_begin_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(config_of(), Path("acdc"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_as_it_is", lambda run, best, loss: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune.begin("acdc", "tuned", corpus=DATA)
    with pytest.raises(ValueError, match="'acdc' and was stopped before it had that; remove it") as caught:
        resume("tuned", corpus=DATA)
    one_line(caught.value)
