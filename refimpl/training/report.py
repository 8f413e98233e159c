"""What a finished run came to: perplexity, sparsity, operations and time, as data and as text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refimpl.datasets import Corpus
from refimpl.kernels import threads
from refimpl.methods import BaseMethod, Dense
from refimpl.models.language_model import LanguageModel
from refimpl.training import checkpoint, flops
from refimpl.training.config import Config
from refimpl.training.evaluate import mean_loss, perplexity
from refimpl.training.loop import Run
from refimpl.training.state import State
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, Weight, support_of, values_of

REPEATS = 5
BUDGET = 6.0
"""Seconds after which no further pair of steps is measured."""


@dataclass(frozen=True)
class Perplexity:
    """What a model reaches on the two texts that it was not trained on."""

    valid: float
    test: float


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
class Report:
    """The end of a run.

    Attributes
    ----------
    method : str
        Name of the method of sparse training.
    steps, total_steps, tokens : int
        Training steps done and planned, and tokens trained on.
    perplexity : Perplexity
        Of the best checkpoint (over both phases of an averaging optimizer), or of the present state in a run without
        one.
    tensors : dict of str to TensorReport
        The prunable weights of that model.
    flops_training : float
        Operations executed, as a fraction of what dense training executes on the same tokens.
    flops_published : float
        The same fraction by the literature's formula for one step, at the final densities.
    flops_inference : float
        Operations of inference as a fraction of the dense model's.
    step_seconds : dict of str to float
        Median time of a training step of this model, by ``"sparse"`` and ``"dense"``; the second alone for dense
        training.
    """

    method: str
    steps: int
    total_steps: int
    tokens: int
    perplexity: Perplexity
    tensors: dict[str, TensorReport]
    flops_training: float
    flops_published: float
    flops_inference: float
    step_seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries that JSON can hold."""
        return asdict(self)

    def text(self) -> str:
        """Return the report as people read it."""
        return "\n".join([*_perplexity_lines(self), "", *_tensor_lines(self), "", *_cost_lines(self)])


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
    used, graded = trainer.used(), trainer.graded()
    dense = {name: specs[name].size for name in used}
    tokens = tokens_trained(run)
    whole = flops.step(specs, dense, dense, tokens)
    interval = run.config.method.interval
    published = flops.published_step(specs, trainer.method.name, used, graded, interval)
    return Report(
        method=trainer.method.name,
        steps=run.state.step,
        total_steps=run.total_steps,
        tokens=tokens,
        perplexity=evaluate(run.config, trainer.model, params, run.corpus),
        tensors=tensor_reports(specs, params),
        flops_training=run.state.flops / whole if whole else float("nan"),
        flops_published=published / flops.published_step(specs, "dense", dense, dense),
        flops_inference=flops.forward(specs, used) / flops.forward(specs, dense),
        step_seconds=step_seconds(run, repeats) if repeats else {},
    )


def evaluate(config: Config, model: LanguageModel, params: Params, corpus: Corpus) -> Perplexity:
    """Return the perplexities of a model on the validation and the test text of a corpus."""
    if config.training.threads:
        threads.set_count(config.training.threads)
    with threads.one_blas_thread():
        valid, test = (
            perplexity(mean_loss(model, params, text, config.data.eval_batch_size))
            for text in (corpus.valid, corpus.test)
        )
    return Perplexity(valid, test)


def best_params(run: Run) -> Params:
    """Return the parameters of the best checkpoint, or the present ones in a run that keeps none."""
    if run.folder is not None and run.folder.best_path.is_file():
        return checkpoint.unpack_params(run.folder.best().arrays)[0]
    return run.trainer.evaluated()


def tokens_trained(run: Run) -> int:
    """Return how many tokens all steps of a run were trained on, those before a resume included."""
    rows, batch = run.windows.rows.shape
    epochs, left = divmod(run.state.step, run.steps_per_epoch)
    return (epochs * (rows - 1) + min(left * run.windows.bptt, rows - 1)) * batch


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
    rivals = {"dense": _rival(trainer, Dense(), {name: _dense(weight) for name, weight in seen.items()})}
    if any(isinstance(weight, SparseWeight) for weight in seen.values()):
        copies = {name: _copy(weight) for name, weight in run.state.params.items()}
        rivals = {"sparse": _rival(trainer, _Frozen(trainer.method), copies), **rivals}
    inputs, targets = run.windows[0]
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


def _rival(trainer: Trainer, method: BaseMethod, params: Params) -> Trainer:
    """Return a trainer that takes the same steps on other parameters, and moves nothing: its learning rate is 0."""
    batch = trainer.state.carried[0].h.shape[1]
    dtype = values_of(params["decoder.bias"]).dtype
    state = State(params, {}, trainer.model.zero_states(batch, dtype))
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


def _perplexity_lines(r: Report) -> list[str]:
    return [
        f"validation perplexity {r.perplexity.valid:.2f}, test perplexity {r.perplexity.test:.2f} "
        f"(best checkpoint; {r.method}, {r.steps:,} of {r.total_steps:,} steps, {r.tokens:,} tokens)"
    ]


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
        f"  training   {r.flops_training:.3f} executed, {r.flops_published:.3f} by the published formula",
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
