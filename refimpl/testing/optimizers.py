"""The laws of optimizers over aligned arrays, to run against ours and other people's.

A *scenario* is a short life of one weight: steps with arbitrary gradients, and between them exchanges of the
support in which entries are kept, dropped, grown, and dropped and grown again. Every law is checked along it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refimpl.optim.base import Optimizer, Regrown, Slots
from refimpl.weights.carry import CarryRule, Exchange
from refimpl.weights.support import Support

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("refimpl.testing needs Hypothesis; install it with: pip install 'refimpl[test]'") from error

MakeOptimizer = Callable[[], Optimizer]


class ClosedForm(Protocol):
    """What one entry should have become, written from its history and not step by step."""

    def __call__(self, start: float, grads: np.ndarray, *, lr: float, born: int) -> tuple[float, float]:
        """Return the entry's value, and the number that it is evaluated with.

        Parameters
        ----------
        start : float
            Its value before the first of these steps.
        grads : ndarray of float64, shape (age,)
            Its gradients in all its steps so far, at least one.
        lr : float
            The learning rate, the same in all steps.
        born : int
            The optimizer's step in which it took the first of them: 1 for an entry that was there at the
            start.
        """
        ...


@dataclass(frozen=True)
class Turn:
    """One step, and the exchange before it: the mask to move to, and what was dropped and regrown in it."""

    grad: np.ndarray
    mask: np.ndarray
    regrown: np.ndarray


@dataclass(frozen=True)
class Scenario:
    """A short life of one weight; dense arrays, of which the optimizer gets the stored entries."""

    start: np.ndarray
    mask: np.ndarray
    turns: tuple[Turn, ...]
    lr: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of all arrays."""
        return self.start.dtype


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Draw a scenario. Numbers are multiples of 1/32 between −4 and 4, so zeros and ties are common."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    size = shape[0] * shape[1]

    def numbers() -> np.ndarray:
        raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.int8)
        return (raw.reshape(shape) / 32).astype(dtype)

    def bits() -> np.ndarray:
        number = draw(st.integers(0, 2**size - 1))
        return np.array([number >> i & 1 for i in range(size)], bool).reshape(shape)

    start, mask, turns = numbers(), bits(), []
    now = mask
    for _ in range(draw(st.integers(1, 7))):
        regrown = np.zeros(shape, bool)
        if draw(st.booleans()):
            new = bits()
            regrown = bits() & now & new
            now = new
        turns.append(Turn(numbers(), now, regrown))
    return Scenario(start, mask, tuple(turns), draw(st.sampled_from([0.1, 0.5])))


def check_optimizer(
    make_optimizer: MakeOptimizer,
    *,
    closed_form: ClosedForm | None = None,
    regrown: Regrown = "keep",
    decays: bool = False,
    max_examples: int = 50,
    shrink: bool = True,
) -> None:
    """Check an optimizer against the laws, over scenarios drawn by Hypothesis.

    1. *In place.* The same arrays hold the result, in the same types and shapes; the gradient is not touched;
    every slot has a
       carry rule.
    2. *Sparse is masked dense.* From a common state, the stored entries end with the same bits as in dense
    arrays whose other
       entries have gradient 0. Across exchanges too: what was dropped is gone, and what was grown has the
       rule's number.
    3. *No order.* Permuting the entries permutes the result. 4. *No secrets.* A new optimizer object that is
    given the slots goes on with the same bits, as a resumed run does. 5. *Rest.* With learning rate 0 no
    value moves. From fresh slots, and unless the optimizer ``decays``, gradients of 0 move
       none either, the numbers to evaluate with stay the weights, and a first step goes against its gradient.
    6. *Closed form*, if one is given: every entry that is there at the end is what its history since its
    birth says (float64).

    Parameters
    ----------
    make_optimizer : callable
        Returns a new optimizer; all that it returns are alike.
    closed_form : ClosedForm, optional
        What an entry should have become. An entry is born at the start, when it grows, and, with
        ``regrown="reset"``, when it is dropped and grown again; it is then a life of its own.
    regrown : {"keep", "reset"}
        What the optimizer is expected to do with entries that were dropped and grown again.
    decays : bool
        Whether weights shrink without a gradient.
    max_examples : int
        Number of scenarios.
    shrink : bool
        Whether to look for the smallest scenario that breaks the law, or to fail at once.

    Raises
    ------
    AssertionError
        If a law is broken; it names the law.
    ValueError
        If the optimizer needs a dense gradient: those are rules about what is not stored, and have no common
        laws.
    """
    if make_optimizer().needs_dense_gradient:
        raise ValueError("this optimizer needs the dense gradient; check_optimizer takes those over aligned arrays")

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(scenarios())
    def laws(scenario: Scenario) -> None:
        _follow(make_optimizer, scenario, closed_form, regrown)
        _rest(make_optimizer, scenario, decays)

    laws()


def _follow(
    make_optimizer: MakeOptimizer, scenario: Scenario, closed_form: ClosedForm | None, regrown: Regrown
) -> None:
    """Take every step four times: sparse, masked dense, permuted, and with a new object; compare each."""
    optimizer = make_optimizer()
    support = Support.from_mask(scenario.mask)
    values = scenario.start.reshape(-1)[support.flat]
    slots = optimizer.init(values)
    _check_slots(optimizer, values, slots)
    masked = _MaskedDense(make_optimizer(), scenario)
    lives = _Lives(scenario, regrown)
    for step, turn in enumerate(scenario.turns, start=1):
        support, values, slots = _exchange(optimizer, support, values, slots, turn)
        masked.exchange(turn)
        lives.exchange(turn, step)
        grad = turn.grad.reshape(-1)[support.flat]

        order = np.random.default_rng(step).permutation(support.nnz)
        shuffled = {name: slot[order] for name, slot in slots.items()}
        shuffled_values = values[order]
        make_optimizer().update(shuffled_values, grad[order], shuffled, lr=scenario.lr, step=step)
        resumed, resumed_values = {name: slot.copy() for name, slot in slots.items()}, values.copy()
        make_optimizer().update(resumed_values, grad.copy(), resumed, lr=scenario.lr, step=step)

        _update_in_place(optimizer, values, grad, slots, scenario.lr, step)
        masked.update(turn, scenario.lr, step)

        _same("a new object goes on with the same bits", resumed_values, values, resumed, slots)
        permuted = {name: slot[order] for name, slot in slots.items()}
        _same("a permutation permutes the result", shuffled_values, values[order], shuffled, permuted)
        _same("sparse is masked dense", values, *masked.on(support, slots))
        lives.record(turn, support, values)
    if closed_form is not None and scenario.dtype == np.float64:
        lives.compare(closed_form, support, values, optimizer.averaged(values, slots))


def _exchange(
    optimizer: Optimizer, support: Support, values: np.ndarray, slots: Slots, turn: Turn
) -> tuple[Support, np.ndarray, Slots]:
    """Carry the stored entries across the exchange of a turn; values that are regrown keep their number."""
    old, dropped_and_grown = support.mask(), turn.regrown
    dropped = np.flatnonzero((old & ~turn.mask) | dropped_and_grown)
    grown = np.flatnonzero((turn.mask & ~old) | dropped_and_grown)
    exchange = Exchange.of(support, dropped, grown)
    rules = optimizer.carry_rules
    carried = {name: exchange.carry(slot, rules[name]) for name, slot in slots.items()}
    return exchange.new, exchange.carry(values), carried


class _MaskedDense:
    """The same weight as a dense array with a mask; after each step and exchange, the rest is wiped.

    What a wiped slot holds is the carry rule's number for grown entries: they find it when they grow.
    """

    def __init__(self, optimizer: Optimizer, scenario: Scenario) -> None:
        self.optimizer, self.mask = optimizer, scenario.mask
        self.values = np.where(scenario.mask, scenario.start, 0).astype(scenario.dtype)
        self.slots = optimizer.init(self.values)
        self.wipe(~self.mask)

    def wipe(self, where: np.ndarray, rules: Mapping[str, CarryRule] | None = None) -> None:
        for name, rule in (self.optimizer.carry_rules if rules is None else rules).items():
            self.slots[name][where] = rule.grown

    def exchange(self, turn: Turn) -> None:
        rules = self.optimizer.carry_rules
        self.wipe(~turn.mask)
        self.wipe(turn.regrown, {name: rule for name, rule in rules.items() if rule.regrown == "reset"})
        self.mask = turn.mask
        self.values[~self.mask] = 0

    def update(self, turn: Turn, lr: float, step: int) -> None:
        grad = np.where(self.mask, turn.grad, 0).astype(self.values.dtype)
        self.optimizer.update(self.values, grad, self.slots, lr=lr, step=step)
        self.values[~self.mask] = 0
        self.wipe(~self.mask)

    def on(self, support: Support, slots: Slots) -> tuple[np.ndarray, Slots, Slots]:
        aligned = {name: slot.reshape(-1)[support.flat] for name, slot in self.slots.items()}
        return self.values.reshape(-1)[support.flat], slots, aligned


class _Lives:
    """The history of every entry since its birth."""

    def __init__(self, scenario: Scenario, regrown: Regrown) -> None:
        self.lr, self.regrown = scenario.lr, regrown
        self.start = np.where(scenario.mask, scenario.start, 0).astype(np.float64)
        self.born = np.ones(scenario.mask.shape, int)
        self.grads = np.empty((0, *scenario.mask.shape))
        self.mask, self.now = scenario.mask, self.start

    def exchange(self, turn: Turn, step: int) -> None:
        new = turn.mask & ~self.mask
        if self.regrown == "reset":
            new = new | turn.regrown
        value = np.where(turn.regrown, self.now, 0.0)
        self.start = np.where(new, value, self.start)
        self.born = np.where(new, step, self.born)
        self.mask = turn.mask

    def record(self, turn: Turn, support: Support, values: np.ndarray) -> None:
        self.grads = np.concatenate([self.grads, turn.grad[None].astype(np.float64)])
        self.now = np.zeros(self.mask.shape)
        self.now.reshape(-1)[support.flat] = values

    def compare(self, closed_form: ClosedForm, support: Support, values: np.ndarray, evaluated: np.ndarray) -> None:
        """Compare the entries that are there at the end.

        A value is a sum of at most 8 terms, and an average of at most 7 of those. The terms are of size 4 at
        most, or, with Adam, quotients whose rounding error is 1/sqrt(1 - beta2) (about 32) times that of a
        moment. With some ten roundings at 1.1e-16 in each, 1e-12 times the size is ten times what may happen.
        """
        for at, flat in enumerate(support.flat):
            place = np.unravel_index(flat, self.mask.shape)
            born = int(self.born[place])
            grads = self.grads[(slice(born - 1, None), *place)]
            expected = closed_form(float(self.start[place]), grads, lr=self.lr, born=born)
            got = (float(values[at]), float(evaluated[at]))
            for what, a, b in zip(("value", "number to evaluate with"), got, expected, strict=True):
                close = abs(a - b) <= 1e-12 * max(4.0, abs(b))
                assert close, f"closed form: the {what} of an entry born in step {born} is {a!r}, not {b!r}"


def _rest(make_optimizer: MakeOptimizer, scenario: Scenario, decays: bool) -> None:
    """Check that nothing moves without a reason."""
    optimizer, values = make_optimizer(), scenario.start.copy()
    slots = optimizer.init(values)
    for step, turn in enumerate(scenario.turns, start=1):
        optimizer.update(values, turn.grad, slots, lr=0.0, step=step)
        assert np.array_equal(values, scenario.start), "rest: with learning rate 0 no value moves"
    if decays:
        return
    slots = optimizer.init(values)
    for step in range(1, len(scenario.turns) + 1):
        optimizer.update(values, np.zeros_like(values), slots, lr=scenario.lr, step=step)
        assert np.array_equal(values, scenario.start), "rest: gradients of 0 move no value"
        evaluated = optimizer.averaged(values, slots)
        assert np.array_equal(evaluated, scenario.start), "rest: the average of a constant is the constant"
    slots, grad = optimizer.init(values), scenario.turns[0].grad
    optimizer.update(values, grad, slots, lr=scenario.lr, step=1)
    downhill = np.array_equal(np.sign(values - scenario.start), -np.sign(grad))
    assert downhill, "rest: from fresh slots, a first step goes against its gradient"


def _check_slots(optimizer: Optimizer, values: np.ndarray, slots: Slots) -> None:
    assert set(optimizer.carry_rules) == set(slots), "in place: every slot has a carry rule, and every rule a slot"
    for name, slot in slots.items():
        assert slot.shape == values.shape, f"in place: slot {name} has one number for each value"
        kept = slot.dtype == values.dtype or slot.dtype.kind in "iu"
        assert kept, f"in place: slot {name} is {slot.dtype} for {values.dtype} values"
        assert not np.may_share_memory(slot, values), f"in place: slot {name} has memory of its own"


def _update_in_place(
    optimizer: Optimizer, values: np.ndarray, grad: np.ndarray, slots: Slots, lr: float, step: int
) -> None:
    before = dict(slots)
    types = {name: slot.dtype for name, slot in slots.items()}
    kept = grad.copy()
    optimizer.update(values, grad, slots, lr=lr, step=step)
    assert np.array_equal(grad, kept), "in place: the gradient is only read"
    same = before.keys() == slots.keys() and all(slots[name] is before[name] for name in before)
    assert same, "in place: the slots are the arrays that were given"
    assert all(slots[name].dtype == types[name] for name in slots), "in place: slots keep their types"
    evaluated = optimizer.averaged(values, slots)
    aligned = evaluated.shape == values.shape and evaluated.dtype == values.dtype
    assert aligned, "in place: the numbers to evaluate with are like the values"


def _same(law: str, a: np.ndarray, b: np.ndarray, a_slots: Slots, b_slots: Slots) -> None:
    assert np.array_equal(a, b), f"{law}: the values are {a} and {b}"
    for name in a_slots:
        assert np.array_equal(a_slots[name], b_slots[name]), (
            f"{law}: slot {name} is {a_slots[name]} and {b_slots[name]}"
        )
