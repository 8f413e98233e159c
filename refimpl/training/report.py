"""What a finished run came to: perplexity or accuracy, sparsity, operations and time, as data and as text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refimpl.kernels import threads
from refimpl.methods import BaseMethod, Dense
from refimpl.training import checkpoint, flop_account, flops, twin
from refimpl.training.config import Config
from refimpl.training.loop import Run
from refimpl.training.run_folder import RunFolder
from refimpl.training.state import State
from refimpl.training.task import Data, Scores, Task, make_task
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, Weight, support_of

REPEATS = 5
BUDGET = 6.0
"""Seconds after which no further pair of steps is measured."""


def shown(measure: str, value: float) -> str:
    """Return a score as reports write it."""
    return f"{value:.4f}" if measure == "accuracy" else f"{value:.2f}"


@dataclass(frozen=True)
class TensorReport:
    """One weight that sparse methods may act on.

    Attributes
    ----------
    shape : tuple of int
    nnz, size : int
        Entries that the forward pass uses, and entries of the dense weight.
    gates : dict of str to float
        Density of each named block of rows; empty for a weight without blocks.
    """

    shape: tuple[int, ...]
    nnz: int
    size: int
    gates: dict[str, float]

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that are absent."""
        return 1 - self.nnz / self.size


@dataclass(frozen=True)
class TwinReport:
    """The dense twin of a run's sparse model.

    Attributes
    ----------
    step, epoch : int
        When it was there: training steps and epochs done.
    scores : Scores
    nnz, size : int
        Entries of prunable weights that it stores, and all of them.
    """

    step: int
    epoch: int
    scores: Scores
    nnz: int
    size: int

    @property
    def density(self) -> float:
        """Fraction of the entries of prunable weights that are stored."""
        return self.nnz / self.size


@dataclass(frozen=True)
class Report:
    """The end of a run.

    Attributes
    ----------
    method : str
        Name of the method of sparse training.
    steps, total_steps, samples : int
        Training steps done and planned, and samples trained on.
    unit : str
        What the samples are: ``"tokens"``, ``"images"``.
    measure : str
        The score that is shown: ``"perplexity"``, ``"accuracy"``.
    scores : Scores
        Of the best checkpoint (over both phases of an averaging optimizer), or of the present state in a run without
        one.
    tensors : dict of str to TensorReport
        The prunable weights of that model.
    flops_training : float
        Operations executed, as a fraction of what dense training executes on the same tokens.
    flops_published : float
        The same fraction as the literature counts it, step by step; see `refimpl.training.published`.
    flops_formula : str
        The formula that this is.
    flops_inference : float
        Operations of inference as a fraction of the dense model's.
    flops_terms : dict of str to float
        Operations executed, by what they were for; the keys are those of `refimpl.training.flops.TERMS`.
    step_seconds : dict of str to float
        Median time of a training step of this model, by ``"sparse"`` and ``"dense"``; the second alone for dense
        training.
    twin : TwinReport or None
        The dense model that the run leaves beside the sparse one, if it does.
    origin : dict or None
        Of a run that began with the dense twin of another: that run, and the step and epoch of the twin.
    """

    method: str
    steps: int
    total_steps: int
    samples: int
    unit: str
    measure: str
    scores: Scores
    tensors: dict[str, TensorReport]
    flops_training: float
    flops_published: float
    flops_formula: str
    flops_inference: float
    flops_terms: dict[str, float]
    step_seconds: dict[str, float]
    twin: TwinReport | None = None
    origin: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries that JSON can hold."""
        return asdict(self)

    def text(self) -> str:
        """Return the report as people read it."""
        return "\n".join([*_score_lines(self), "", *_tensor_lines(self), "", *_cost_lines(self)])


def report(run: Run, *, repeats: int = REPEATS) -> Report:
    """Evaluate a run's best model, count its operations and time a few of its steps.

    Parameters
    ----------
    run : Run
        Trained for at least one step; its state is left as it is.
    repeats : int
        Steps of each kind to measure; 0 measures nothing.
    """
    trainer, specs = run.trainer, run.trainer.specs
    params = best_params(run)
    used = trainer.used()
    dense = {name: specs[name].size for name in used}
    training = flop_account.fractions(run.state.flops, specs)
    return Report(
        method=trainer.method.name,
        steps=run.state.step,
        total_steps=run.total_steps,
        samples=run.task.samples(run.state.step),
        unit=run.task.unit,
        measure=run.task.measure,
        scores=scores_of(run.task, params, run.config.training.threads),
        tensors=tensor_reports(specs, params),
        flops_training=training["executed"],
        flops_published=training["published"],
        flops_formula=trainer.counter.formula.text,
        flops_inference=flops.forward(specs, used) / flops.forward(specs, dense),
        flops_terms=dict(run.state.flops["executed"]),
        step_seconds=step_seconds(run, repeats) if repeats else {},
        twin=None if run.folder is None else twin_report(run.folder, run.task, run.config.training.threads),
        origin=None if run.folder is None else run.folder.facts.get("origin"),
    )


def twin_report(folder: RunFolder, task: Task, count: int = 0) -> TwinReport | None:
    """Return what the dense twin in a run's folder is worth; None if it holds none."""
    if not folder.best_dense_path.is_file():
        return None
    found = folder.best_dense()
    params = twin.params_of(found)
    tensors = tensor_reports(task.model.specs(), params).values()
    return TwinReport(
        step=found.meta["step"],
        epoch=found.meta["epoch"],
        scores=scores_of(task, params, count),
        nnz=sum(t.nnz for t in tensors),
        size=sum(t.size for t in tensors),
    )


def evaluate(config: Config, params: Params, corpus: Data) -> Scores:
    """Return what the parameters of a run's model are worth on the validation and the test part of its data.

    Raises
    ------
    ValueError
        If the data are not of the configuration's task, or too few.
    """
    return scores_of(make_task(config, corpus), params, config.training.threads)


def scores_of(task: Task, params: Params, count: int = 0) -> Scores:
    """Return the scores on both parts, reckoned by ``count`` threads (0: as many as are set)."""
    if count:
        threads.set_count(count)
    with threads.one_blas_thread():
        return Scores(task.evaluate(params, "valid"), task.evaluate(params, "test"))


def best_params(run: Run) -> Params:
    """Return the parameters of the best checkpoint, or the present ones in a run that keeps none."""
    if run.folder is not None and run.folder.best_path.is_file():
        return checkpoint.unpack_params(run.folder.best().arrays)[0]
    return run.trainer.evaluated()


def tensor_reports(specs: Mapping[str, ParamSpec], params: Params) -> dict[str, TensorReport]:
    """Describe the prunable weights."""
    found = {}
    for name, spec in specs.items():
        if spec.prunable:
            support = support_of(params[name])
            counts, columns = support.row_counts, support.matrix_shape[1]
            gates = {gate: float(counts[rows].mean() / columns) for gate, rows in spec.blocks.items()}
            found[name] = TensorReport(spec.shape, support.nnz, spec.size, gates)
    return found


def step_seconds(run: Run, repeats: int = REPEATS) -> dict[str, float]:
    """Measure training steps of a run's model, sparse and dense in turn, on copies of its parameters.

    Exchanges are not among them. The first step of each kind, which may compile kernels, is not measured.

    Returns
    -------
    dict of str to float
        Median seconds by ``"sparse"`` and ``"dense"``; the second alone if nothing is sparse.
    """
    trainer = run.trainer
    seen = trainer.method.view(run.state.params)
    rivals = {"dense": _rival(run, Dense(), {name: _dense(weight) for name, weight in seen.items()})}
    if any(isinstance(weight, SparseWeight) for weight in seen.values()):
        copies = {name: _copy(weight) for name, weight in run.state.params.items()}
        rivals = {"sparse": _rival(run, _Frozen(trainer.method), copies), **rivals}
    inputs, targets = run.task.batches(0)[0]
    if run.config.training.threads:
        threads.set_count(run.config.training.threads)
    taken: dict[str, list[float]] = {kind: [] for kind in rivals}
    with threads.one_blas_thread():
        for rival in rivals.values():
            rival.step(inputs, targets)
        begun = time.perf_counter()
        for _ in range(repeats):
            for kind, rival in rivals.items():
                start = time.perf_counter()
                rival.step(inputs, targets)
                taken[kind].append(time.perf_counter() - start)
            if time.perf_counter() - begun > BUDGET:
                break
    return {kind: statistics.median(seconds) for kind, seconds in taken.items()}


class _Frozen(BaseMethod):
    """The three sets of a method as they are, exchanged no more."""

    def __init__(self, method: BaseMethod) -> None:
        super().__init__(method.conventions)
        self.view = method.view  # type: ignore[method-assign]
        self.gradient_support = method.gradient_support  # type: ignore[method-assign]
        self.update_support = method.update_support  # type: ignore[method-assign]
        self.pull = method.pull  # type: ignore[method-assign]


def _rival(run: Run, method: BaseMethod, params: Params) -> Trainer:
    """Return a trainer that takes the same steps on other parameters, and moves nothing: its learning rate is 0."""
    trainer, config = run.trainer, run.config
    carried = trainer.model.begin(config.training.batch_size, np.dtype(config.dtype))
    state = State(params, {}, carried)
    rival = Trainer(
        trainer.model, method, trainer.optimizer, lambda step, epoch: 0.0, state, clip=trainer.clip, seed=trainer.seed
    )
    rival.fresh_slots()
    return rival


def _copy(weight: Weight) -> Weight:
    return SparseWeight(weight.support, weight.values.copy()) if isinstance(weight, SparseWeight) else weight.copy()


def _dense(weight: Weight) -> np.ndarray:
    return weight.dense() if isinstance(weight, SparseWeight) else weight.copy()


# --- text ---------------------------------------------------------------------------------------------------


def _score_lines(r: Report) -> list[str]:
    lines = [
        f"{_scores(r.measure, r.scores)} "
        f"(best checkpoint; {r.method}, {r.steps:,} of {r.total_steps:,} steps, {r.samples:,} {r.unit})"
    ]
    if r.twin is not None:
        of = f"its dense twin, of epoch {r.twin.epoch}, density {r.twin.density:g}"
        lines.append(f"{_scores(r.measure, r.twin.scores)} ({of})")
    if r.origin is not None:
        lines.append(f"trained on from the dense twin of {r.origin['run']}, of epoch {r.origin['epoch']}")
    return lines


def _scores(measure: str, scores: Scores) -> str:
    valid, test = (shown(measure, part[measure]) for part in (scores.valid, scores.test))
    return f"validation {measure} {valid}, test {measure} {test}"


def _tensor_lines(r: Report) -> list[str]:
    width = max(len("all of these"), *map(len, r.tensors))
    gates = next((list(t.gates) for t in r.tensors.values() if t.gates), [])
    head = f"{'weight':<{width}}  {'shape':>13}  {'stored':>10}  {'sparsity':>8}"
    lines = [head + ("   density of gate " + "".join(f"{gate:>7}" for gate in gates) if gates else "")]
    for name, t in r.tensors.items():
        shape = " x ".join(map(str, t.shape))
        line = f"{name:<{width}}  {shape:>13}  {t.nnz:>10,}  {t.sparsity:>8.4f}"
        lines.append(line + (" " * 19 + "".join(f"{t.gates[gate]:>7.3f}" for gate in gates) if t.gates else ""))
    nnz, size = (sum(getattr(t, key) for t in r.tensors.values()) for key in ("nnz", "size"))
    return [*lines, f"{'all of these':<{width}}  {'':>13}  {nnz:>10,}  {1 - nnz / size:>8.4f}"]


def _cost_lines(r: Report) -> list[str]:
    lines = [
        "operations as a fraction of dense (biases, nonlinearities and the optimizer are not counted):",
        f"  training   {r.flops_training:.3f} executed, {r.flops_published:.3f} as published: {r.flops_formula}",
        f"  inference  {r.flops_inference:.3f}",
    ]
    if r.step_seconds:
        milliseconds = {kind: f"{1000 * seconds:.1f} ms" for kind, seconds in r.step_seconds.items()}
        if "sparse" in milliseconds:
            ratio = r.step_seconds["sparse"] / r.step_seconds["dense"]
            lines.append(
                f"a training step of this model, measured now: sparse {milliseconds['sparse']}, "
                f"dense {milliseconds['dense']}, ratio {ratio:.2f}"
            )
        else:
            lines.append(f"a training step of this model, measured now: {milliseconds['dense']}")
    return lines
