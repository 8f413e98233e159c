"""The operations of a run, counted without training: a walk through its steps and the sets that they would use.

Counts that follow from the configuration are computed (:mod:`refimpl.training.planned_sizes`). Where the weights decide
them, as where all tensors are pruned under one threshold, the method's own exchanges are run on the initial weights
until its density is reached, and with gradients of zero. What only training can decide stays as it is at the start, and
:attr:`Forecast.notes` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.methods.base import BaseMethod
from refimpl.methods.phases import Phase, Phases
from refimpl.models.base import Model
from refimpl.training import flop_account, flops, planned_sizes
from refimpl.training.build import make_method
from refimpl.training.config import Config
from refimpl.training.flop_account import FlopAccount, StepCounter
from refimpl.training.planned_sizes import Sizes, Visit
from refimpl.training.published import Formula, formula_of
from refimpl.training.task import Data
from refimpl.training.workload import Workload, workload_of
from refimpl.weights import Params, SparseWeight, Support, values_of
from refimpl.weights.gradient import BLOCK_ENTRIES


@dataclass(frozen=True)
class Forecast:
    """The operations of a run that was not trained.

    Attributes
    ----------
    formula : Formula
        The published way of counting.
    specs : dict of str to ParamSpec
        The linear maps.
    first, last : Sizes
        The sizes of A and B at the start and at the end.
    epochs : list of FlopAccount
        One for each epoch; the passes before training are in the first.
    notes : list of str
        What could not be known.
    others : dict of str to ParamSpec
        The parameters that are no linear maps: biases, and what belongs to normalisation.
    visits : list of Visit
        The sizes that the steps used, and on how many samples; equal steps of an epoch are one.
    phases : tuple of Phase
        Of a method that alternates, in order.
    """

    formula: Formula
    specs: flops.Specs
    first: Sizes
    last: Sizes
    epochs: list[FlopAccount]
    notes: list[str]
    others: flops.Specs = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    phases: tuple[Phase, ...] = ()

    @property
    def total(self) -> FlopAccount:
        """The account of the whole run."""
        whole = flop_account.new_account()
        for epoch in self.epochs:
            for kind, terms in epoch.items():
                flops.add(whole[kind], terms)
        return whole

    @property
    def dense(self) -> float:
        """Operations of inference on one sample with the dense model, f_D."""
        return flops.forward(self.specs, {name: spec.size for name, spec in self.specs.items()})

    @property
    def sparse(self) -> float:
        """The same with the model of the last step, f_S."""
        return flops.forward(self.specs, self.last.used)


def planned(
    model: Model, method: BaseMethod, workload: Workload, *, seed: int = 0, dtype: Any = np.float32
) -> Forecast:
    """Count the operations of a run.

    Parameters
    ----------
    model : Model
    method : BaseMethod
        In the state in which it was made; it is changed.
    workload : Workload
    seed, dtype
        Of the initial weights, where they are needed.
    """
    every = model.specs()
    specs = {name: every[name] for name in flops.multiplied(every)}
    found = _planned(model, method, workload, specs, seed, dtype)
    return replace(found, others={name: spec for name, spec in every.items() if name not in specs})


def _planned(
    model: Model, method: BaseMethod, workload: Workload, specs: flops.Specs, seed: int, dtype: Any
) -> Forecast:
    known = _Known.of(model, method, specs)
    if known is not None:
        return _walk(method, known, workload, specs)
    try:
        return _walk(method, _Walked(model, method, seed, dtype), workload, specs)
    except ValueError:  # such as of a tensor that initial weights would leave empty, and trained ones need not
        known = _Known.of(model, method, specs, alike=True)
        if known is None or not planned_sizes.ranks_across_tensors(method):
            raise
        found = _walk(method, known, workload, specs)
        return replace(found, notes=[EMPTIED if note == RANKED else note for note in found.notes])


def _walk(method: BaseMethod, sizes: _Known | _Walked, workload: Workload, specs: flops.Specs) -> Forecast:
    formula, first = formula_of(method), sizes.now()
    counter = StepCounter(formula, specs)
    epochs: list[FlopAccount] = []
    visits: list[Visit] = []
    for steps in _epochs(workload):
        batches = _Batches(Counter())
        account = flop_account.new_account()
        if not epochs:
            flop_account.add_scoring(account, _scoring(method, specs, workload.samples[0]))
        for number, samples in steps:
            if batches.add(method, number, sizes, samples, workload.clips):
                sizes.exchange(number)
        visits += batches.enter(account, counter)
        epochs.append(account)
        if method.exchange_due(step=number, epoch_end=True):
            sizes.exchange(number)
    phases = getattr(method, "phases", None)
    found = phases.within(len(epochs)) if isinstance(phases, Phases) else []
    return Forecast(formula, specs, first, sizes.now(), epochs, _notes(method), visits=visits, phases=tuple(found))


def planned_run(
    config: Config, data: Data | None = None, *, vocabulary: int | None = None, tokens: int | None = None
) -> Forecast:
    """Count the operations of the run of a configuration.

    Parameters
    ----------
    config : Config
    data : Corpus or Images, optional
        By default those that the configuration names, unless a vocabulary is given. Of a published data set the size is
        known without them.
    vocabulary, tokens : int, optional
        In place of a text: how many words it has, and how long its training part is.

    Raises
    ------
    ValueError, FileNotFoundError
        If the data are not there or too short, or the configuration's method does not fit the model.
    """
    model, work, notes = workload_of(config, data, vocabulary=vocabulary, tokens=tokens)
    method = make_method(config, work.steps, len(work.samples))
    found = planned(model, method, work, seed=config.seed, dtype=np.dtype(config.dtype))
    if config.optimizer.name == "nt-asgd" and config.optimizer.leak:
        notes.append("when averaging starts is not known beforehand, and the averages that leak are not counted")
    return replace(found, notes=[*notes, *found.notes])


def _epochs(workload: Workload) -> Iterator[list[tuple[int, int]]]:
    """Yield for each epoch the numbers and the samples of its steps."""
    each = len(workload.samples)
    for start in range(0, workload.steps, each):
        stop = min(start + each, workload.steps)
        yield [(number + 1, workload.samples[number - start]) for number in range(start, stop)]


class _Batches:
    """Steps of one kind are counted, and entered into an account together."""

    def __init__(self, counted: Counter[Any]) -> None:
        self.counted = counted
        self.kinds: dict[Any, tuple[Sizes, dict[str, list[str]]]] = {}

    def add(self, method: BaseMethod, number: int, sizes: _Known | _Walked, samples: int, clips: bool) -> bool:
        """Count a step; tell whether an exchange is due after it."""
        now = sizes.now()
        due = method.exchange_due(step=number, epoch_end=False)
        kind = (id(now), samples, due, method.needs_gradient(number), method.replaces_step(number))
        if kind not in self.kinds:  # on these whole_gradients depends, and there are few
            names = list(now.used)
            whole = flops.whole_gradients(method, number, names, sizes.sparse(), clips=clips, leaks=False)
            self.kinds[kind] = (now, whole)
        self.counted[kind] += 1
        return due

    def enter(self, account: FlopAccount, counter: StepCounter) -> list[Visit]:
        """Enter all into an account, and return what they were."""
        visits = []
        for kind, times in self.counted.items():
            sizes, whole = self.kinds[kind]
            counter.add(account, *sizes, kind[1], whole, times=times)
            visits.append(Visit(sizes, "growth" in whole, kind[1] * times))
        return visits


class _Known:
    """Sizes that follow from the configuration."""

    def __init__(self, at: planned_sizes.SizesAt, specs: flops.Specs) -> None:
        self.at = at
        self.specs = specs
        self.sizes = at(0)

    @classmethod
    def of(cls, model: Model, method: BaseMethod, specs: flops.Specs, *, alike: bool = False) -> _Known | None:
        planned_sizes.prepare(method, model.specs())
        at = planned_sizes.sizes_of(method, specs, alike=alike)
        return None if at is None else cls(at, specs)

    def now(self) -> Sizes:
        return self.sizes

    def sparse(self) -> list[str]:
        return [name for name, count in self.sizes.graded.items() if count < self.specs[name].size]

    def exchange(self, number: int) -> None:
        renewed = self.at(number)
        if renewed != self.sizes:
            self.sizes = renewed


class _Walked:
    """Sizes of sets that the method makes from the initial weights."""

    def __init__(self, model: Model, method: BaseMethod, seed: int, dtype: Any) -> None:
        self.method, self.seed = method, seed
        self.specs = model.specs()
        drawn = model.init(seed, dtype, method.supports(self.specs, seed=seed))
        self.params: Params = method.start(drawn, self.specs, None, seed=seed)
        self._measure()

    def now(self) -> Sizes:
        return self.sizes

    def sparse(self) -> list[str]:
        return [name for name in self.sizes.used if isinstance(self.params[name], SparseWeight)]

    def exchange(self, number: int) -> None:
        method = self.method
        if method.settled(number - 1):
            return
        gradients = {name: _Nothing(self.specs[name].shape) for name in self.sizes.used}
        exchanges = method.exchange(self.params, step=number, seed=self.seed, gradients=gradients)
        for name, exchange in exchanges.items():
            values = method.values_after(name, self.params[name], exchange, step=number, seed=self.seed)
            whole = exchange.new.nnz == exchange.new.size
            self.params[name] = values.reshape(exchange.new.shape) if whole else SparseWeight(exchange.new, values)
        self._measure()  # going back to earlier weights changes no size

    def _measure(self) -> None:
        seen, names = self.method.view(self.params), flops.multiplied(self.specs)
        graded = {}
        for name in names:
            support = self.method.gradient_support(name, self.params)
            graded[name] = values_of(self.params[name]).size if support is None else support.nnz
        self.sizes = Sizes({name: values_of(seen[name]).size for name in names}, graded)


class _Nothing:
    """A gradient of zeros, a promise that holds nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def on(self, support: Support) -> np.ndarray:
        return np.zeros(support.nnz)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        columns = int(np.prod(self.shape[1:]))
        rows = max(1, BLOCK_ENTRIES // columns)
        for start in range(0, self.shape[0], rows):
            part = slice(start, min(start + rows, self.shape[0]))
            yield part, np.zeros((part.stop - start, columns))

    def dense(self) -> np.ndarray:
        return np.zeros(self.shape)


def _scoring(given: BaseMethod, specs: flops.Specs, samples: int) -> flops.Terms:
    """Return what the passes before training take; SynFlow's rounds at the densities of the allocation."""
    method: Any = getattr(given, "inner", given)
    whole = {name: spec.size for name, spec in specs.items()}
    if method.name in GRADIENTS:
        return {"scoring": GRADIENTS[method.name] * flops.step(specs, whole, whole, samples)}
    if method.name != "synflow":
        return {}
    rounds, spent = method.rounds, 0.0
    final = planned_sizes.BY_METHOD["synflow"](method, specs)
    for k in range(rounds):
        counts = {name: round(size * (final(0).used[name] / size) ** (k / rounds)) for name, size in whole.items()}
        spent += flops.step(specs, counts, counts, flops.flow_samples(specs))
    return {"scoring": spent}


GRADIENTS = {"snip": 1, "grasp": 3}
"""Gradients of the whole model that a method asks for before training."""


RANKED = "weights of several tensors are ranked together, here the initial ones: trained ones share otherwise"
EMPTIED = (
    "weights of several tensors are ranked together; here, as the initial ones would leave one empty, all share alike"
)


def _notes(method: BaseMethod) -> list[str]:
    """Say which sizes the configuration does not decide, once the method knows the model."""
    method = getattr(method, "inner", method)
    notes = []
    if method.name in planned_sizes.STARTS_GLOBALLY and getattr(method, "scope", "") == "global":
        notes.append("gradients before training decide how the tensors share the density; here the allocation does")
    if method.name in planned_sizes.LEARNED or getattr(method, "form", "") == "soft":
        notes.append("the sizes are learned; here they stay as they are at the start")
    elif planned_sizes.moves_between_tensors(method):
        notes.append("entries move between tensors as training goes; here each keeps those it starts with")
    elif planned_sizes.ranks_across_tensors(method):
        notes.append(RANKED)
    if getattr(method.conventions, "initial_count", "exact") == "bernoulli":
        notes.append("entries are drawn one by one; here each tensor has as many as are expected")
    return notes
