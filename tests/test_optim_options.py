"""Clipping, schedules, the trigger, and what is said about wrong options."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refimpl.methods.schedule import Cosine as DropCosine
from refimpl.optim import (
    ASGD,
    OPTIMIZERS,
    SGD,
    SNTASGD,
    Adam,
    Constant,
    Cosine,
    EpochDecay,
    LeakingASGD,
    LinearWarmup,
    NonMonotonicTrigger,
    StepDecay,
    clip_scale,
    global_norm,
    make_optimizer,
    squared_norm,
    triggered,
)
from refimpl.optim.clipping import LANES


@given(
    size=st.integers(0, 3 * LANES + 5),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-18, 1.0, 1e18]),
)
@settings(deadline=None, max_examples=40)
def test_squared_norm(size: int, seed: int, dtype: type, scale: float) -> None:
    """Against an exact sum of the rounded squares: a lane adds at most 4, and lanes are folded 13 times."""
    x: np.ndarray = (np.random.default_rng(seed).standard_normal(size) * scale).astype(dtype)
    exact = math.fsum(float(v) * float(v) for v in x)
    assert abs(squared_norm(x) - exact) <= 18 * np.finfo(np.float64).eps * exact
    assert squared_norm(x) == squared_norm(x.reshape(1, -1))


def test_squared_norm_in_float32_loses_no_digits() -> None:
    ones = np.full(2**24 + 64, 1.0, np.float32)  # a float32 sum stops at 2**24
    assert squared_norm(ones) == ones.size


@given(st.lists(st.floats(0, 1e300), max_size=8), st.randoms())
def test_global_norm_has_no_order(sq_norms: list[float], random: "object") -> None:
    shuffled = list(sq_norms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert global_norm(sq_norms) == global_norm(shuffled)
    assert global_norm(sq_norms) == pytest.approx(math.hypot(*map(math.sqrt, sq_norms)), rel=1e-15 * 8)


def test_norms_that_are_not_finite_stay_so() -> None:
    assert squared_norm(np.array([1.0, np.nan])) != squared_norm(np.array([1.0, np.nan]))
    assert squared_norm(np.array([1e200])) == math.inf
    assert global_norm([1e308, 1e308]) == math.inf
    assert global_norm([]) == 0
    assert math.isnan(global_norm([1.0, math.nan]))
    assert clip_scale(math.inf, 1.0) == 0
    assert math.isnan(clip_scale(math.nan, 1.0))


@given(norm=st.floats(0, 1e6), max_norm=st.floats(1e-3, 1e3))
def test_clip_scale(norm: float, max_norm: float) -> None:
    scale = clip_scale(norm, max_norm)
    assert scale == min(1.0, max_norm / (norm + 1e-6))
    assert norm * scale <= max_norm


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_clip_scale_needs_a_threshold(max_norm: float) -> None:
    with pytest.raises(ValueError, match="give a number above 0"):
        clip_scale(1.0, max_norm)


def naive(history: list[float], loss: float, n: int) -> bool:
    """Some epoch that is at least n + 1 epochs old was better than this one."""
    this = len(history)
    return any(this - epoch >= n + 1 and old < loss for epoch, old in enumerate(history))


losses = st.lists(st.sampled_from([1.0, 2.0, 3.0, math.inf, math.nan]), max_size=10)


@given(losses, st.sampled_from([1.0, 1.5, 2.5, 4.0, math.inf, math.nan]), st.integers(0, 6))
def test_trigger(history: list[float], loss: float, n: int) -> None:
    assert triggered(history, loss, n) is naive(history, loss, n)
    assert NonMonotonicTrigger(n)(history, loss) is naive(history, loss, n)


def first_trigger(losses: list[float], n: int) -> int | None:
    trigger = NonMonotonicTrigger(n)
    for epoch, loss in enumerate(losses, start=1):
        if trigger(losses[: epoch - 1], loss):
            return epoch
    return None


@pytest.mark.parametrize(
    ("losses", "n", "epoch"),
    [
        ([1, 2, 2, 2, 2, 2, 2, 2], 5, 7),  # the earliest: n + 2
        ([1, 1, 1, 1, 1, 1, 1, 1, 1], 5, None),  # equal is not worse
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 5, None),
        ([5, 4, 3, 4, 4, 4, 4, 4, 4, 4], 5, 9),  # 3 in epoch 3 counts from epoch 9 on
        ([5, 4, 3, 2.9, 2.9, 2.9, 2.9, 3.5, 3.5], 5, 9),
        ([1, 2], 0, 2),
        ([1, 2, 2], 1, 3),
        ([math.nan] * 9, 5, None),
        ([1, 2, 2, 2, 2, 2, math.nan, 2], 5, 8),  # a NaN never triggers, the next epoch may
        ([math.nan, 1, 2, 2, 2, 2, 2, 2], 5, 8),
        ([1, 2, 2, 2, 2, 2, math.inf], 5, 7),
        ([], 5, None),
    ],
)
def test_trigger_by_hand(losses: list[float], n: int, epoch: int | None) -> None:
    assert first_trigger(losses, n) == epoch


def test_schedules_by_hand() -> None:
    assert [Constant(3)(t) for t in (0, 9)] == [3, 3]
    assert [StepDecay(8, 0.5, (2, 3))(t) for t in range(5)] == [8, 8, 4, 2, 2]
    assert [EpochDecay(8, 0.5, 2)(e) for e in range(5)] == [8, 8, 8, 4, 2]
    assert [LinearWarmup(3, Constant(8))(t) for t in range(5)] == [2, 4, 6, 8, 8]
    assert [LinearWarmup(1, StepDecay(8, 0.5, (1,)))(t) for t in range(4)] == [4, 8, 4, 4]
    cosine = Cosine(1.0, 0.2, 4)
    assert [cosine(t) for t in (0, 4, 5, 400)] == [1.0, 0.2, 0.2, 0.2]
    assert cosine(2) == pytest.approx(0.6, rel=1e-15)
    assert Cosine(1.0, 0.2, 4, past="rise")(8) == 1.0


@given(steps=st.integers(1, 200), t=st.integers(0, 500), past=st.sampled_from(["hold", "rise"]))
@settings(deadline=None)
@example(steps=1, t=1, past="rise")
def test_the_forms_of_the_cosine_agree(steps: int, t: int, past: str) -> None:
    """Up to rounding while it falls; past the floor the recursion starts from what rounding left there.

    Its first number there is (1 − cos(π/T)) / 2 of the range, which then grows by up to T² times, and an
    error of the floor grows with it: T² units of rounding.
    """
    closed = DropCosine(0.8, steps, 0.005, past=past)  # type: ignore[arg-type]
    recursive = DropCosine(0.8, steps, 0.005, "recursive", past)  # type: ignore[arg-type]
    amplified = steps**2 if past == "rise" and t > steps else 1
    assert recursive(t) == pytest.approx(closed(t), rel=0, abs=2e-14 * max(1, amplified))
    assert closed(t) == Cosine(0.8, 0.005, steps, past=past)(t)  # type: ignore[arg-type]
    assert 0.004 < recursive(min(t, steps)) <= 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepDecay(1, math.nan, (1,)), "gamma is nan"),
        (lambda: StepDecay(1, 0.5, (1.5,)), "each of milestones is 1.5"),  # type: ignore[arg-type]
        (lambda: EpochDecay(1, 0.5, -1), "start is -1"),
        (lambda: Cosine(1, 0, 0), "steps is 0"),
        (lambda: Cosine(1, 0, 5, past="up"), "past is 'up'; give 'hold' or 'rise'"),  # type: ignore[arg-type]
        (lambda: DropCosine(1.5, 5), "from 0 to 1"),
        (lambda: DropCosine(0.5, 5, form="open"), "form of the drop fraction is 'open'"),  # type: ignore[arg-type]
        (lambda: NonMonotonicTrigger(-1), "n is -1"),
        (lambda: triggered([1.0], 1.0, -1), "interval is -1"),
        (lambda: SGD(momentum=-0.1), "momentum is -0.1; give a finite number of at least 0"),
        (lambda: SGD(dampening=1), "of at least 0 and below 1"),
        (lambda: SGD(momentum=math.inf), "momentum is inf"),
        (lambda: SGD(nesterov=True), "Nesterov's form was asked for with momentum 0"),
        (lambda: SGD(momentum=0.9, dampening=0.1, nesterov=True), "a dampening of 0"),
        (lambda: SGD(regrown="forbid"), "regrown is 'forbid'; give 'keep' or 'reset'"),  # type: ignore[arg-type]
        (lambda: Adam(betas=(0.9, 1.0)), "each of betas is 1.0"),
        (lambda: Adam(betas=0.9), "give two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(eps=0), "eps is 0; give a finite number above 0"),
        (lambda: Adam(eps_placement="outside"), "give 'torch' or 'inside-correction'"),  # type: ignore[arg-type]
        (lambda: ASGD(t0=-1), "t0 is -1"),
        (lambda: LeakingASGD(alpha=-1), "alpha is -1"),
        (lambda: SNTASGD(first_iterate="drop"), "give 'skip' or 'include'"),  # type: ignore[arg-type]
        (lambda: SNTASGD(weight_decay="1e-6"), "weight_decay is '1e-6'"),  # type: ignore[arg-type]
        (lambda: make_optimizer("sdg"), "no optimizer 'sdg' .did you mean 'sgd'.*snt-asgd"),
        (lambda: make_optimizer("zzz"), "no optimizer 'zzz'; the names are sgd"),
        (lambda: make_optimizer("sgd", momentun=0.9), "no option 'momentun' .did you mean 'momentum'"),
        (lambda: make_optimizer("sgd", lr=0.1), "sgd has no option 'lr'"),
        (lambda: make_optimizer("sgd", momentum=True), "momentum is True"),
    ],
)
def test_errors(make: "object", message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_make_optimizer() -> None:
    assert make_optimizer("sgd", momentum=0.9) == SGD(momentum=0.9)
    assert make_optimizer("adam", betas=[0.8, 0.9]) == Adam((0.8, 0.9))
    assert make_optimizer("adamw") == Adam(weight_decay=0.01, decoupled=True)
    assert make_optimizer("adamw", weight_decay=0.1) == Adam(weight_decay=0.1, decoupled=True)
    assert make_optimizer("nt-asgd", weight_decay=0.1) == ASGD(t0=0, lambd=0, weight_decay=0.1)
    assert make_optimizer("nt-asgd-leaking").needs_dense_gradient
    for name in OPTIMIZERS:
        hash(make_optimizer(name))


def test_arrays_that_do_not_belong_together() -> None:
    values, optimizer = np.zeros(3), SGD(momentum=0.9)
    slots = optimizer.init(values)
    cases: list[tuple[np.ndarray, int, str]] = [
        (np.zeros(1), 1, r"shapes \(3,\), \(1,\)"),
        (np.zeros(3, np.float32), 1, "values are float64 and the gradient float32"),
        (np.zeros(3), 0, "the step is 0"),
    ]
    for grad, step, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.update(values, grad, slots, lr=0.1, step=step)


def test_nothing_stored_is_nothing_to_do() -> None:
    for name in ("sgd", "adam", "asgd", "snt-asgd"):
        optimizer, values = make_optimizer(name), np.zeros(0)
        assert not isinstance(optimizer, LeakingASGD)
        slots = optimizer.init(values)
        optimizer.update(values, values.copy(), slots, lr=0.1, step=1)
        assert optimizer.averaged(values, slots).shape == (0,)
