"""Laws of whole runs: what happens in what order, what is conserved, what is evaluated and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import kernels
from refimpl.kernels import threads
from refimpl.optim import LeakingASGD
from refimpl.testing.language_model import loss_and_grads
from refimpl.testing.training import dense, tiny_config, tiny_corpus
from refimpl.training import checkpoint, evaluate, language, loop
from refimpl.training.config import Config
from refimpl.training.loop import Observer, Run
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import RunFolder
from refimpl.training.state import pack
from refimpl.training.trainer import NonFiniteLossError, StepResult
from refimpl.weights import SparseWeight, values_of

CORPUS = tiny_corpus()
STEPS_PER_EPOCH = 13
SNT = {"name": "snt-asgd", "lr": 8.0, "nonmono": 0, "clip": 0.5}  # averaging begins within three epochs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = threads.get()
    yield
    threads.set_count(before)


def open_run(path: Path, config: Config, kind: type[Run] = Run) -> Run:
    """Return a run in a new folder."""
    return kind(config, CORPUS, RunFolder.create(path, config, {"sha256": CORPUS.sha256}))


# --- the end of an epoch ---


class ExchangeFirst(Run):
    """A planted mistake: connections are exchanged before the epoch is judged."""

    def _end_epoch(self, observer: Observer) -> None:
        self.trainer._exchange(self.state.step, None)
        super()._end_epoch(observer)


class BeforeTheEnd(Observer):
    """Evaluates, after each step, what would be evaluated if the epoch ended there."""

    def __init__(self) -> None:
        self.loss = float("nan")

    def stepped(self, run: Run, result: StepResult) -> None:
        """Evaluate."""
        params = run.trainer.evaluated()
        self.loss = evaluate.mean_loss(run.trainer.model, params, run.corpus.valid, run.config.data.eval_batch_size)

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Compare with the epoch's own validation."""
        assert record["valid_loss"] == self.loss


def events_of(path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Run] = Run) -> list[str]:
    """Return what three epochs do after their last step, in order."""
    run = open_run(path, tiny_config(method={"name": "selfish"}, optimizer=SNT, training={"epochs": 3}), kind)
    events: list[str] = []
    method, folder = run.trainer.method, run.folder
    assert folder is not None

    def recorded(owner: Any, name: str, event: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    recorded(language, "mean_loss", "validate")
    recorded(loop, "triggered", "trigger")
    recorded(method, "exchange", "exchange")
    recorded(folder, "save_best", "best")
    recorded(folder, "save", "checkpoint")
    run.train()
    run.close()
    return events


def test_the_end_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate, keep the best, decide the trigger, exchange, checkpoint; no exchange where the trigger fires."""
    events = events_of(tmp_path / "run", monkeypatch)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    expected: list[str] = []
    best = float("inf")
    for record in records:
        improved = record["valid_loss"] < best
        best = min(best, record["valid_loss"])
        expected += ["validate", *["best"] * improved, *["trigger"] * (not record["averaging"])]
        expected += [*["exchange"] * (not record["trigger"]), "checkpoint"]
    assert events == expected
    assert [bool(record["exchanged"]) for record in records] == [not record["trigger"] for record in records]
    assert any(record["trigger"] for record in records)


def test_catches_an_exchange_before_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert events_of(tmp_path / "run", monkeypatch, ExchangeFirst)[:2] == ["exchange", "validate"]
    config = tiny_config(method={"name": "selfish"})
    Run(config, CORPUS).train(BeforeTheEnd())
    with pytest.raises(AssertionError):
        ExchangeFirst(config, CORPUS).train(BeforeTheEnd())


@pytest.mark.parametrize("choice", ["skip", "exchange"])
def test_the_epoch_in_which_averaging_starts(choice: str, tmp_path: Path) -> None:
    method = {"name": "selfish", "convention": {"trigger_epoch": choice}}
    run = open_run(tmp_path / "run", tiny_config(method=method, optimizer=SNT, training={"epochs": 3}))
    run.train()
    run.close()
    (fired,) = (r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r.get("trigger"))
    assert bool(fired["exchanged"]) == (choice == "exchange")


class Triggers(Observer):
    """Looks at the state in which averaging begins."""

    seen = False

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Averages and counters begin with the weights."""
        if record["trigger"]:
            self.seen = True
            assert run.state.updates == 0
            for name, weight in run.state.params.items():
                assert np.array_equal(run.state.slots[name]["average"], values_of(weight))


def test_averaging_starts_afresh() -> None:
    watching = Triggers()
    Run(tiny_config(method={"name": "selfish"}, optimizer=SNT, training={"epochs": 3}), CORPUS).train(watching)
    assert watching.seen


# --- what methods conserve ---


@pytest.mark.parametrize(("pool", "moves"), [("matrix", True), ("gate", False)])
def test_selfish_keeps_the_count_and_moves_it_between_gates(pool: str, moves: bool) -> None:
    method = {"name": "selfish", "drop_fraction_floor": 0.2, "convention": {"pool": pool}}
    run = Run(tiny_config(method=method, training={"epochs": 4}), CORPUS)
    counts = {name: w.nnz for name, w in run.state.params.items() if isinstance(w, SparseWeight)}
    assert counts == {name: round(0.4 * run.trainer.specs[name].size) for name in counts}
    supports = {name: run.state.params[name].support for name in counts}  # type: ignore[union-attr]
    gates = [run.gate_densities()]

    class Watch(Observer):
        def stepped(self, run: Run, result: StepResult) -> None:
            assert {name: run.state.params[name].nnz for name in counts} == counts  # type: ignore[union-attr]

        def evaluated(self, run: Run, record: dict[str, Any]) -> None:
            self.stepped(run, None)  # type: ignore[arg-type]
            assert all(n["dropped"] == n["grown"] for n in record["exchanged"].values())
            gates.append(run.gate_densities())

    run.train(Watch())
    assert len(gates) == 5
    assert all(run.state.params[name].support != supports[name] for name in counts)  # type: ignore[union-attr]
    assert all((gates[k] != gates[k + 1]) == moves for k in range(4))
    for epoch in gates:
        for name, densities in epoch.items():
            of_all = np.mean(list(densities.values()))
            assert of_all * run.trainer.specs[name].size == pytest.approx(counts[name], rel=1e-12)


@pytest.mark.parametrize("optimizer", [SNT, {"name": "adam", "lr": 0.02}])
@pytest.mark.parametrize("method", ["set", "selfish", "rigl"])
def test_a_drop_fraction_of_0_is_static_training(method: str, optimizer: dict[str, Any]) -> None:
    """Bit for bit; RigL's exchange must then leave its step to the optimizer."""
    after = {"convention": {"exchange_step": "after"}, "interval": 2}
    still = {"name": method, "drop_fraction": 0.0, "drop_fraction_floor": 0.0, **after}
    held = []
    for table in (still, {"name": "static"}):
        run = Run(tiny_config(method=table, optimizer=optimizer, training={"epochs": 3}), CORPUS)
        run.train()
        held.append(pack(run.state, run.trainer.method)[0])
    assert held[0].keys() == held[1].keys()
    assert not [name for name in held[0] if held[0][name].tobytes() != held[1][name].tobytes()]


class OutsideB(Observer):
    """Checks that a step leaves what Top-KAST does not train exactly as it was, in values and slots."""

    def __init__(self) -> None:
        self.before: dict[str, list[np.ndarray]] = {}
        self.outside: dict[str, np.ndarray] = {}
        self.renewed = 0

    def started(self, run: Run) -> None:
        """Remember the first state."""
        run.trainer.method.view(run.state.params)
        self.remember(run)

    def stepped(self, run: Run, result: StepResult) -> None:
        """Compare with the state before; B was that of before, too."""
        for name, outside in self.outside.items():
            for now, before in zip(self.arrays(run, name), self.before[name], strict=True):
                assert np.array_equal(now[outside], before[outside]), name
                moved = now[~outside] != before[~outside]
                assert moved.mean() > 0.5 or name == "encoder.weight", name
        old = self.outside
        self.remember(run)
        self.renewed += any((old[name] != self.outside[name]).any() for name in old)

    def arrays(self, run: Run, name: str) -> list[np.ndarray]:
        """Return values and slots."""
        return [values_of(run.state.params[name]), *run.state.slots[name].values()]

    def remember(self, run: Run) -> None:
        """Copy the state, and note what is outside B."""
        self.outside = {}
        for name, spec in run.trainer.specs.items():
            if spec.prunable:
                support = run.trainer.method.gradient_support(name, run.state.params)
                assert support is not None
                self.outside[name] = ~support.mask()
                self.before[name] = [array.copy() for array in self.arrays(run, name)]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01, "clip": 0.25},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        {"name": "asgd", "t0": 1.0, "lambd": 0.01},
    ],
)
def test_topkast_touches_nothing_outside_b(optimizer: dict[str, Any]) -> None:
    watching = OutsideB()
    method = {"name": "topkast", "sparsity": 0.6, "backward_sparsity": 0.3, "refresh": 3}
    Run(tiny_config(method=method, optimizer=optimizer), CORPUS).train(watching)
    assert watching.renewed > 3


# --- what is evaluated and kept ---


def test_a_leaking_average_is_evaluated_dense() -> None:
    """The step-by-step comparison with the literal masked loop is `Shadow`'s; here is what a run does with it."""
    seen: list[tuple[float, float]] = []

    class Watch(Observer):
        def stepped(self, run: Run, result: StepResult) -> None:
            if run.state.averaging:
                assert isinstance(run.trainer.optimizer, LeakingASGD)
                name = "rnn.weight_hh_l0"
                evaluated, weight = run.trainer.evaluated()[name], run.state.params[name]
                assert isinstance(evaluated, np.ndarray)
                assert isinstance(weight, SparseWeight)
                seen.append((np.mean(evaluated != 0), weight.density))

    run = Run(
        tiny_config(
            method={"name": "selfish"}, optimizer={**SNT, "name": "nt-asgd", "leak": True}, training={"epochs": 3}
        ),
        CORPUS,
    )
    run.train(Watch())
    assert seen
    assert all(evaluated > 0.95 and stored < 0.41 for evaluated, stored in seen)


@pytest.mark.parametrize("optimizer", ["snt-asgd", "nt-asgd"])
def test_the_best_network_is_the_one_that_was_evaluated(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[tuple[float, dict[str, np.ndarray], bool]] = []
    config = tiny_config(method={"name": "selfish"}, optimizer={**SNT, "name": optimizer}, training={"epochs": 4})
    run = open_run(tmp_path / "run", config)
    inner = language.mean_loss

    def mean_loss(model: Any, params: Any, *rest: Any) -> float:
        loss = inner(model, params, *rest)
        trained = {name: dense(w) for name, w in run.state.params.items()}
        differs = run.state.averaging and all((dense(w) != trained[name]).any() for name, w in params.items())
        evaluated.append((loss, {name: dense(w) for name, w in params.items()}, differs))
        return loss

    monkeypatch.setattr(language, "mean_loss", mean_loss)
    run.train()
    run.close()
    best = RunFolder.open(tmp_path / "run").best()
    kept, slots = checkpoint.unpack_params(best.arrays)
    loss, params, averaged = min(evaluated, key=lambda entry: entry[0])
    assert best.meta["valid_loss"] == loss == run.state.best
    assert averaged, "the best network of this run is an average, and no iterate"
    assert not any(slots.values())
    for name, weight in kept.items():
        assert np.array_equal(dense(weight), params[name])


def test_evaluation_reads_the_text_with_carried_state() -> None:
    """The loss is that of one window over the whole text, computed by the witness, within its bound."""
    config = tiny_config(method={"name": "static"}, model={"dropout_output": 0.5}, data={"eval_batch_size": 1})
    run = Run(config, CORPUS)
    run.train()
    params = run.trainer.evaluated()
    tokens = CORPUS.valid[:, None]
    rest = [(np.zeros((8, 1)), np.zeros((8, 1)))] * 2
    done = loss_and_grads({name: dense(w) for name, w in params.items()}, tokens[:-1], tokens[1:], rest)
    assert len(tokens) > evaluate.WINDOW
    loss = evaluate.mean_loss(run.trainer.model, params, CORPUS.valid, 1)
    assert abs(loss - done.loss.value) <= 2 * done.loss.error


# --- clipping ---


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_the_dense_norm_is_at_least_that_of_the_support(sparsity: float) -> None:
    norms = {}
    for convention in ("support", "dense"):
        method = {"name": "static", "sparsity": sparsity, "convention": {"clip_norm": convention}}
        run = Run(tiny_config(method=method, optimizer={"clip": 0.1}), CORPUS)
        params = {name: dense(w) for name, w in run.state.params.items()}
        done = loss_and_grads(params, *run.batches[0], run.state.carried)
        norms[convention] = run.trainer.step(*run.batches[0]).grad_norm
        sq, bound = 0.0, 0.0
        for name, g in done.grads.items():
            weight = run.state.params[name]
            counts = weight.support.mask() if convention == "support" and isinstance(weight, SparseWeight) else ...
            sq += (g.value[counts] ** 2).sum()
            bound += (g.error[counts] ** 2).sum()
        entries = sum(g.value.size for g in done.grads.values())
        allowed = 2 * np.sqrt(bound) + 2 * (entries + 2) * 2.0**-53 * np.sqrt(sq)  # triangle inequality; the sums
        assert abs(norms[convention] - np.sqrt(sq)) <= allowed
    if sparsity:
        assert norms["dense"] > norms["support"]
    else:
        assert norms["dense"] == pytest.approx(norms["support"], rel=1e-12)


# --- how far a run goes, and what it says ---


@pytest.mark.parametrize(("asked", "steps", "epochs"), [(1, 1, 1), (13, 13, 1), (14, 14, 2), (0, 26, 2), (999, 26, 2)])
def test_max_steps(asked: int, steps: int, epochs: int, tmp_path: Path) -> None:
    """A run that ends within an epoch still validates it and leaves a checkpoint."""
    run = open_run(tmp_path / "run", tiny_config(training={"max_steps": asked}))
    assert run.train() == "finished"
    run.close()
    assert run.steps_per_epoch == STEPS_PER_EPOCH
    assert run.state.step == run.total_steps == steps
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    assert [r["step"] for r in records] == [*[STEPS_PER_EPOCH] * (epochs - 1), steps]
    assert RunFolder.open(tmp_path / "run").checkpoints()[-1].stem == f"step-{steps:08d}"


def test_the_recorded_learning_rate_is_that_of_the_step(tmp_path: Path) -> None:
    schedule = {"lr": 1.0, "schedule": "step-decay", "decay": 0.5, "decay_steps": 20}
    run = open_run(tmp_path / "run", tiny_config(optimizer=schedule))
    run.train()
    run.close()
    records = {r["step"]: r["lr"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert records == {13: 1.0, 20: 1.0, 26: 0.5}  # step 21 is the first at half the rate


def test_a_text_with_nothing_to_predict_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="eval_batch_size"):
        Run(tiny_config(data={"eval_batch_size": 60}), CORPUS)  # 90 tokens: one row


@pytest.mark.parametrize("tier", kernels.TIERS)
def test_a_weight_that_is_nan_stops_the_run(tier: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", tiny_config(method={"name": "static"}))
    values_of(run.state.params["rnn.weight_hh_l1"])[3] = np.nan
    before = {name: a.tobytes() for name, a in pack(run.state, run.trainer.method)[0].items()}
    try:
        with (
            kernels.use(tier),
            pytest.raises(NonFiniteLossError, match=r"at step 1: rnn\.weight_hh_l1 was the first tensor"),
        ):
            run.train()
    finally:
        run.close()
    arrays, meta = checkpoint.load(tmp_path / "run" / "checkpoints" / "not-finite.npz")
    assert {name: a.tobytes() for name, a in arrays.items()} == before
    assert meta["state"]["step"] == 0
