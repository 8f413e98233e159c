"""The laws of whole runs: what every method keeps, whatever it does, in a training of some epochs.

`check_run` trains the model of `refimpl.testing.quadratic` with the real trainer and looks at the three sets after each
step; `check_method` (`refimpl.testing.methods`) looks at single exchanges.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from refimpl.methods.base import Method
from refimpl.methods.dense import Dense
from refimpl.optim import SGD, Adam, Optimizer
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.training.state import pack, unpack
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, support_of, values_of

EPOCHS, STEPS = 4, 6
"""Length of a checked run: epochs, and steps in each."""

MakeRun = Callable[[float, int, int], Any]
"""``(density, steps of the run, steps of an epoch) -> a new method``."""

Kind = Literal["static", "pruning", "dynamic", "hidden", "free"]

Counts = Callable[[Mapping[str, ParamSpec], float], int]
"""``(specs, density) -> entries of A over all prunable tensors``, once the method has settled."""


def check_run(
    make: MakeRun,
    kind: Kind,
    *,
    counts: Counts | None = None,
    density: float = 0.4,
    learns: bool = True,
    dense_at_one: bool = True,
    optimizers: tuple[Optimizer, ...] = (SGD(0.9), Adam()),
    epochs: int = EPOCHS,
) -> None:
    """Check a method's behaviour in whole runs.

    The laws: a run repeats to the bit, and so does one that is resumed at any step; the model sees its own parameters
    and no others; A ⊆ S, and what is remembered is aligned with S; the counts are those that are stated; supports move
    as the kind says; the loss falls; at density 1 the run is dense training, to the bit.

    Parameters
    ----------
    make : callable
        ``(density, steps of the run, steps of an epoch) -> a new method``.
    kind : {"static", "pruning", "dynamic", "hidden", "free"}
        S is chosen before training and stays; S shrinks; S moves; everything is stored and A moves; nothing is said.
    counts : callable, optional
        ``(specs, density) -> entries of A`` over all prunable tensors, required after each step from which
        ``method.settled`` answers yes; None asks for none.
    density : float
        Of the checked run.
    learns : bool
        Whether the loss must fall from the first step to the end.
    dense_at_one : bool
        Whether density 1 must be dense training.
    optimizers : tuple of Optimizer
        Each has a run of its own.
    epochs : int

    Raises
    ------
    AssertionError
        If a law is broken; the message says which.
    """
    steps = epochs * STEPS
    for optimizer in optimizers:
        watch = _Watch(kind, counts, density)
        straight = _run(make(density, steps, STEPS), optimizer, steps, watch)
        model: Any = straight.model
        if learns:
            first = trainer_of(make(density, steps, STEPS), optimizer=optimizer)
            before, after = model.loss(first.method.view(first.state.params)), model.loss(straight.evaluated())
            assert after < before, f"the loss rose from {before} to {after}"
        for at in (0, 1, STEPS, 2 * STEPS + 3):
            _check_resumed(make, density, steps, optimizer, at, straight)
        if dense_at_one:
            sparse, dense = (_run(m, optimizer, steps) for m in (make(1.0, steps, STEPS), Dense()))
            _check_same(
                _pictures(sparse.method.view(sparse.state.params)), _pictures(dense.state.params),
                "at density 1 the run is not dense training",
            )  # fmt: skip


class _Watch:
    """Looks at a trainer after each step."""

    def __init__(self, kind: Kind, counts: Counts | None, density: float) -> None:
        self.kind, self.counts, self.density = kind, counts, density
        self.specs = QuadraticModel().specs()
        self.before: dict[str, Any] = {}

    def __call__(self, trainer: Trainer) -> None:
        state, method = trainer.state, trainer.method
        seen = method.view(state.params)
        assert seen.keys() == self.specs.keys(), "the view has other parameters than the model"
        used = 0
        for name, spec in self.specs.items():
            weight, stored = state.params[name], support_of(state.params[name])
            forward = support_of(seen[name])
            assert forward in stored, f"the forward set of {name} is not within what is stored"
            assert np.isfinite(values_of(weight)).all(), f"{name} has values that are not finite"
            for slot, array in state.slots[name].items():
                assert array.shape == values_of(weight).shape, f"the slot {slot} of {name} is not aligned"
            if not spec.prunable:
                assert not isinstance(weight, SparseWeight), f"{name} is not prunable and yet sparse"
                continue
            used += forward.nnz
            self._moved(name, stored, forward)
        if self.counts and method.settled(state.step) and state.window:
            stated = self.counts(self.specs, self.density)
            assert used == stated, f"after step {state.step} {used} entries are used; {stated} are stated"

    def _moved(self, name: str, stored: Any, forward: Any) -> None:
        if self.kind == "hidden":
            assert stored.nnz == stored.size, f"{name} is not stored whole"
        elif self.kind != "free":
            assert forward.nnz == stored.nnz, f"the forward set of {name} is not what is stored"
        last = self.before.get(name)
        if last is not None and self.kind == "static":
            assert stored == last, f"the support of {name} moved"
        if last is not None and self.kind == "pruning":
            assert stored in last, f"the support of {name} gained entries"
        self.before[name] = stored


def _run(method: Method, optimizer: Optimizer, steps: int, watch: Callable[[Trainer], None] | None = None) -> Trainer:
    trainer = trainer_of(method, optimizer=optimizer, steps_per_epoch=STEPS)
    train(trainer, steps, watch)
    return trainer


def _check_resumed(make: MakeRun, density: float, steps: int, optimizer: Optimizer, at: int, straight: Trainer) -> None:
    """Stop at a step, write everything down as a checkpoint does, and go on in another trainer."""
    trainer = trainer_of(make(density, steps, STEPS), optimizer=optimizer, steps_per_epoch=STEPS)
    train(trainer, at)
    arrays, meta = pack(trainer.state, trainer.method)
    arrays, meta = copy.deepcopy(arrays), json.loads(json.dumps(meta))
    other = trainer_of(make(density, steps, STEPS), optimizer=optimizer, steps_per_epoch=STEPS)
    unpack(other.state, other.method, arrays, meta)
    train(other, steps - at)
    what = f"a run resumed after step {at} is another"
    _check_same(_pictures(other.state.params), _pictures(straight.state.params), what)
    _check_same(_pictures(other.evaluated()), _pictures(straight.evaluated()), what)


def _pictures(params: Params) -> dict[str, np.ndarray]:
    return {name: w.dense() if isinstance(w, SparseWeight) else w for name, w in params.items()}


def _check_same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], what: str) -> None:
    assert a.keys() == b.keys(), what
    for name in a:
        assert np.array_equal(a[name], b[name]), f"{what}: {name} differs"
