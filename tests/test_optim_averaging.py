"""SNT-ASGD and both versions of NT-ASGD against literal masked dense loops and closed forms."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.optim import ASGD, SNTASGD, LeakingASGD
from refimpl.weights import carry
from refimpl.weights.support import Support

SHAPE = (3, 4)
LR = 0.25
STEPS = 8

Turn = tuple[int, np.ndarray, np.ndarray, np.ndarray]


def life(seed: int, exchange_every: int, dtype: type) -> Iterator[Turn]:
    """Yield step, dense gradient, mask during the step, and what was dropped and regrown just before."""
    rng = np.random.default_rng(seed)
    mask = rng.random(SHAPE) < 0.5
    for step in range(1, STEPS + 1):
        regrown = np.zeros(SHAPE, bool)
        if step > 1 and (step - 1) % exchange_every == 0:
            new = rng.random(SHAPE) < 0.5
            regrown = mask & new & (rng.random(SHAPE) < 0.5)
            mask = new
        yield step, rng.standard_normal(SHAPE).astype(dtype), mask, regrown


def start(seed: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(seed + 1).standard_normal(SHAPE).astype(dtype)


def exchange(support: Support, mask: np.ndarray, regrown: np.ndarray) -> carry.Exchange:
    old = support.mask()
    return carry.Exchange.of(support, np.flatnonzero((old & ~mask) | regrown), np.flatnonzero((mask & ~old) | regrown))


lives = given(seed=st.integers(0, 10**6), every=st.integers(1, 4), dtype=st.sampled_from([np.float32, np.float64]))


@lives
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_snt_asgd_is_the_masked_loop(decay: float, seed: int, every: int, dtype: type) -> None:
    """A dense loop with ages, which are set to 0 wherever the mask is 0 during a step: the same bits.

    The loop never hears of entries that were dropped and regrown at once, so they continue.
    """
    optimizer = SNTASGD(weight_decay=decay)
    w = start(seed, dtype)
    ax, age = np.zeros_like(w), np.zeros(SHAPE, int)
    for step, grad, mask, regrown in life(seed, every, dtype):
        if step == 1:
            support = Support.from_mask(mask)
            values = w[mask]
            slots = optimizer.init(values)
        change = exchange(support, mask, regrown)
        support, values = change.new, change.carry(values)
        slots = {name: change.carry(slot, optimizer.carry_rules[name]) for name, slot in slots.items()}
        optimizer.update(values, grad[mask], slots, lr=LR, step=step)

        w *= mask
        age = np.where(mask, age + 1, 0)
        w = w - dtype(LR) * (grad + dtype(decay) * w)
        for i in np.ndindex(SHAPE):
            mu = dtype(1) if age[i] <= 2 else dtype(1) / dtype(age[i] - 1)
            ax[i] = w[i] if mu == 1 else ax[i] + mu * (w[i] - ax[i])
        ax, w = ax * mask, w * mask

        dense_average = np.zeros_like(w)
        dense_average[mask] = optimizer.averaged(values, slots)
        assert np.array_equal(values, w[mask])
        assert np.array_equal(dense_average, ax)
        assert np.array_equal(slots["age"], age[mask])
        assert slots["age"].dtype == np.int32


@lives
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("first", ["skip", "include"])
@pytest.mark.parametrize("regrow", ["keep", "reset"])
def test_snt_asgd_closed_form(first: str, regrow: str, seed: int, every: int, dtype: type) -> None:
    """The mean over the iterates since the entry was last grown.

    A recursive mean of at most 8 numbers rounds three times in each step, by half a unit of the largest.
    """
    optimizer = SNTASGD(first_iterate=first, regrown=regrow)  # type: ignore[arg-type]
    initial = start(seed, dtype)
    history: dict[int, list[float]] = {}
    for step, grad, mask, regrown in life(seed, every, dtype):
        if step == 1:
            support = Support.from_mask(mask)
            values = initial[mask]
            slots = optimizer.init(values)
        change = exchange(support, mask, regrown)
        support, values = change.new, change.carry(values)
        slots = {name: change.carry(slot, optimizer.carry_rules[name]) for name, slot in slots.items()}
        ends = ~mask | (regrown if regrow == "reset" else np.zeros(SHAPE, bool))
        for flat in np.flatnonzero(ends):
            history.pop(int(flat), None)
        optimizer.update(values, grad[mask], slots, lr=LR, step=step)
        for flat, value in zip(support.flat, values, strict=True):
            history.setdefault(int(flat), []).append(float(value))
        for flat, average in zip(support.flat, optimizer.averaged(values, slots), strict=True):
            iterates = history[int(flat)]
            counted = iterates[1:] if first == "skip" and len(iterates) > 1 else iterates
            bound = 3 * STEPS * float(np.finfo(dtype).eps) * max(map(abs, iterates))
            assert abs(average - np.mean(counted)) <= bound


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([np.float32, np.float64]),
    decay=st.sampled_from([0, 0.1]),
)
@settings(deadline=None, max_examples=30)
def test_snt_asgd_on_a_dense_array_is_asgd(seed: int, dtype: type, decay: float) -> None:
    ours, asgd = SNTASGD(weight_decay=decay), ASGD(t0=0, lambd=0, weight_decay=decay)
    a, b = start(seed, dtype), start(seed, dtype)
    a_slots, b_slots = ours.init(a), asgd.init(b)
    for step, grad, _, _ in life(seed, 1, dtype):
        ours.update(a, grad, a_slots, lr=LR, step=step)
        asgd.update(b, grad, b_slots, lr=LR, step=step)
        assert np.array_equal(a, b)
        assert np.array_equal(ours.averaged(a, a_slots), asgd.averaged(b, b_slots))


@pytest.mark.parametrize("first", ["skip", "include"])
def test_an_average_begins_with_the_weight_alone(first: str) -> None:
    """Whatever stood in the slot of an entry of age 0, not even a rounding error of it is left."""
    optimizer = SNTASGD(first_iterate=first)  # type: ignore[arg-type]
    values = np.array([0.1, 0.2, 0.3])
    slots = {"average": np.array([1e16, 1e300, np.nan]), "age": np.zeros(3, np.int32)}
    optimizer.update(values, np.ones(3), slots, lr=LR, step=9)
    assert np.array_equal(slots["average"], values)


def masked_loop(optimizer: ASGD, w: np.ndarray, ax: np.ndarray, grad: np.ndarray, step: int) -> None:
    """The step of torch.optim.ASGD on whole arrays, symbol by symbol."""
    eta = LR / (1 + optimizer.lambd * LR * (step - 1)) ** optimizer.alpha
    mu = 1 / max(1, step - 1 - optimizer.t0)
    g = grad + optimizer.weight_decay * w if optimizer.weight_decay else grad
    w *= 1 - optimizer.lambd * eta
    w -= eta * g
    ax[...] = w if mu == 1 else ax + mu * (w - ax)


@lives
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("options", [{}, {"t0": 2.0, "lambd": 0.1, "weight_decay": 0.02}], ids=["nt-asgd", "asgd"])
def test_leaking_average_is_the_masked_loop(options: dict[str, float], seed: int, every: int, dtype: type) -> None:
    """Dense step, then the mask on the weights alone: the averages leak, to the same bits."""
    optimizer = LeakingASGD(**options)
    w = start(seed, dtype)
    ax = np.zeros_like(w)
    for step, grad, mask, regrown in life(seed, every, dtype):
        if step == 1:
            support = Support.from_mask(mask)
            values = w[mask]
            slots = optimizer.init(values, support)
        change = exchange(support, mask, regrown)
        support, values = change.new, change.carry(values)
        kept = grad.copy()
        optimizer.update(values, grad[mask], slots, lr=LR, step=step, support=support, dense_grad=grad)
        w *= mask
        masked_loop(optimizer.on_dense_arrays, w, ax, grad, step)
        w *= mask
        assert np.array_equal(values, w[mask])
        assert np.array_equal(optimizer.averaged(values, slots), ax)
        assert np.array_equal(grad, kept)
        assert slots["average"].dtype == dtype
    assert (ax[~mask] != 0).all(), "the averaged network is dense"


@lives
@settings(deadline=None, max_examples=60)
def test_masked_average_is_the_masked_loop(seed: int, every: int, dtype: type) -> None:
    """Dense step, then the mask on weights and averages: ASGD over aligned arrays, with zeros averaged in."""
    optimizer = ASGD(t0=0, lambd=0)
    w = start(seed, dtype)
    ax = np.zeros_like(w)
    for step, grad, mask, regrown in life(seed, every, dtype):
        if step == 1:
            support = Support.from_mask(mask)
            values = w[mask]
            slots = optimizer.init(values)
        change = exchange(support, mask, regrown)
        support, values = change.new, change.carry(values)
        slots = {name: change.carry(slot, optimizer.carry_rules[name]) for name, slot in slots.items()}
        optimizer.update(values, grad[mask], slots, lr=LR, step=step)
        w *= mask
        ax *= mask
        masked_loop(optimizer, w, ax, grad, step)
        w *= mask
        ax *= mask
        assert np.array_equal(values, w[mask])
        assert np.array_equal(optimizer.averaged(values, slots), ax[mask])


def test_a_leak_is_the_mean_of_the_masked_steps() -> None:
    """Outside a support that never moves, the average after step K is the mean of −η g over steps 2, …, K."""
    rng = np.random.default_rng(3)
    support = Support.from_mask(np.array([[True, False]]))
    values, optimizer = np.array([1.0]), LeakingASGD()
    slots = optimizer.init(values, support)
    grads = rng.standard_normal((6, 1, 2))
    for step, grad in enumerate(grads, start=1):
        optimizer.update(values, grad[:, 0], slots, lr=LR, step=step, support=support, dense_grad=grad)
    assert slots["average"][0, 1] == pytest.approx(np.mean(-LR * grads[1:, 0, 1]), rel=1e-14)


def test_a_leaking_average_needs_the_dense_gradient() -> None:
    support = Support.from_mask(np.array([[True, False]]))
    values, optimizer = np.array([1.0]), LeakingASGD()
    slots = optimizer.init(values, support)
    with pytest.raises(ValueError, match=r"the weight's shape \(1, 2\)"):
        optimizer.update(values, values, slots, lr=LR, step=1, support=support, dense_grad=values)
    assert optimizer.needs_dense_gradient
    assert not ASGD().needs_dense_gradient
