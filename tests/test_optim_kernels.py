"""The compiled optimizer steps and norm have the bits of the NumPy rules; scaling is multiplying before."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.kernels import cpu, rules, threads
from refimpl.kernels.rules import LANES
from refimpl.optim import LeakingASGD, Slots, make_optimizer, squared_norm
from refimpl.weights import Support

DTYPES: list[Any] = [np.float32, np.float64]
SIZES = [0, 1, 3, 17, 64, 1000]
LARGE = 70_001  # cut into chunks for several threads
SGD_OPTIONS: list[dict[str, Any]] = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "first": first}
    for momentum, dampening, nesterov, decay, first in itertools.product(
        [0, 0.9], [0, 0.3], [False, True], [0, 0.02], [False, True]
    )
    if not nesterov or (momentum and not dampening)
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": decay, "decoupled": decoupled, "eps_inside": inside, "step": step}
    for decay, decoupled, inside, step in itertools.product([0, 0.02], [False, True], [False, True], [1, 7])
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = threads.get()
    with np.errstate(all="ignore"):
        yield
    threads.set_count(before)


def numbers(rng: np.random.Generator, size: int, dtype: Any) -> np.ndarray:
    """Draw numbers of all magnitudes: subnormal ones, zeros of both signs, infinities and NaN among them."""
    x = (rng.standard_normal(size) * 10.0 ** rng.uniform(-4, 4, size)).astype(dtype)
    subnormal = rng.integers(-9999, 9999, size).astype(dtype) * np.finfo(dtype).smallest_subnormal
    x = np.where(rng.random(size) < 0.2, subnormal, x)
    corners = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype), size)
    return np.where(rng.random(size) < 0.1, corners, x)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare to the bit, but for which NaN it is."""
    numbers = ~np.isnan(a)
    return (
        a.dtype == b.dtype
        and np.array_equal(a, b, equal_nan=True)
        and np.array_equal(np.signbit(a[numbers]), np.signbit(b[numbers]))
    )


def compare(step: str, arrays: list[np.ndarray | None], options: dict[str, Any]) -> None:
    mine = [None if a is None else a.copy() for a in arrays]
    theirs = [None if a is None else a.copy() for a in arrays]
    getattr(cpu, step)(*mine, **options)
    getattr(rules, step)(*theirs, **options)
    for name, a, b in zip("wgbv", mine, theirs):
        if a is not None and b is not None:
            assert same_bits(a, b), f"{step}: {name} has other bits with {options}"


@given(
    st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from(SGD_OPTIONS), st.sampled_from([1.0, 0.37, 0.0]),
    st.floats(1e-6, 10), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=150)
def test_sgd(size: int, dtype: Any, options: dict[str, Any], scale: float, lr: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, g, b = (numbers(rng, size, dtype) for _ in range(3))
    compare("sgd_step", [w, g, b if options["momentum"] else None], options | {"scale": scale, "lr": lr})


@given(
    st.sampled_from(SIZES), st.sampled_from(DTYPES), st.sampled_from(ADAM_OPTIONS), st.sampled_from([1.0, 0.37, 0.0]),
    st.floats(1e-6, 10), st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)]), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=150)
def test_adam(
    size: int, dtype: Any, options: dict[str, Any], scale: float, lr: float, betas: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w, g, m, v = (numbers(rng, size, dtype) for _ in range(4))
    compare("adam_step", [w, g, m, abs(v)], options | {"scale": scale, "lr": lr, "betas": betas, "eps": 1e-8})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_arrays_on_several_threads(count: int) -> None:
    threads.set_count(count)
    rng = np.random.default_rng(1)
    w, g, m, v = (numbers(rng, LARGE, np.float32) for _ in range(4))
    more = {"scale": 0.37, "lr": 0.1}
    compare("sgd_step", [w, g, m], SGD_OPTIONS[-1] | more)
    compare("sgd_step", [w, g, None], SGD_OPTIONS[0] | more)
    compare("adam_step", [w, g, m, abs(v)], ADAM_OPTIONS[0] | more | {"betas": (0.9, 0.999), "eps": 1e-8})
    g = g[np.isfinite(g)]
    assert cpu.squared_norm(g) == rules.squared_norm(g)


def test_other_layouts() -> None:
    """Several axes, no axis, strides, and types that are not compiled."""
    rng = np.random.default_rng(2)
    options = SGD_OPTIONS[-1] | {"scale": 0.5, "lr": 0.1}
    arrays = [rng.standard_normal((6, 8)) for _ in range(3)]
    for cut in (
        lambda a: a,
        lambda a: a.T,
        lambda a: a[:, 3],
        lambda a: a[1:, ::2],
        lambda a: a[:0],
        lambda a: a[0, 0],
    ):
        views = [np.asarray(cut(a)) for a in arrays]
        compare("sgd_step", list(views), options)
        mine = [a.copy() for a in arrays]
        cpu.sgd_step(*(np.asarray(cut(a)) for a in mine), **options)
        if views[0].ndim:
            compare("sgd_step", [cut(a) for a in mine], options)
            assert not np.array_equal(cut(mine[0]), cut(arrays[0])) or not views[0].size, "a view is updated in place"
        assert cpu.squared_norm(views[0]) == rules.squared_norm(views[0])
    compare("sgd_step", [a.astype(np.longdouble) for a in arrays], options)
    assert cpu.squared_norm(arrays[0].astype(np.float16)) == rules.squared_norm(arrays[0].astype(np.float16))
    assert cpu.squared_norm(arrays[0].astype(">f8")) == rules.squared_norm(arrays[0])


@given(
    st.one_of(st.integers(0, 70), st.sampled_from([LANES - 1, LANES, LANES + 1, 2 * LANES + 1, 3 * LANES - 1])),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_squared_norm(size: int, dtype: Any, seed: int) -> None:
    """Numbers of mixed magnitudes, so that another order would round otherwise."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 3, size)).astype(dtype)
    assert cpu.squared_norm(x) == rules.squared_norm(x)


def test_norms_that_are_not_finite() -> None:
    for tier in kernels.TIERS:
        with kernels.use(tier):
            assert squared_norm(np.array([1e200, 1])) == np.inf
            assert np.isnan(squared_norm(np.array([np.nan, 1], np.float32)))
            assert np.isnan(squared_norm(np.array([np.nan, np.inf])))


@pytest.mark.parametrize("tier", kernels.TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "asgd", "nt-asgd", "snt-asgd"])
def test_scale_is_multiplying_before(name: str, dtype: Any, tier: str) -> None:
    """To the bit, over steps, with contiguous and other arrays; the gradient is only read."""
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01} if name == "sgd" else {}
    optimizer = make_optimizer(name, **options)
    assert not isinstance(optimizer, LeakingASGD)
    rng = np.random.default_rng(3)
    scale = np.float64(0.3)  # a NumPy scalar must not promote float32
    with kernels.use(tier):
        for view in (lambda a: a, lambda a: a.T):
            start, grads = view(rng.standard_normal((40, 5)).astype(dtype)), rng.standard_normal((4, 40, 5))
            lives: list[tuple[np.ndarray, Slots]] = []
            for inside in (True, False):
                values = start.copy(order="K")
                slots = optimizer.init(values)
                for step, whole in enumerate(grads.astype(dtype), start=1):
                    grad = view(whole)
                    kept = grad.copy()
                    if inside:
                        optimizer.update(values, grad, slots, lr=0.1, step=step, scale=scale)
                    else:
                        optimizer.update(values, grad * dtype(scale), slots, lr=0.1, step=step)
                    assert np.array_equal(grad, kept)
                lives.append((values, slots))
            (a, a_slots), (b, b_slots) = lives
            assert same_bits(a, b)
            assert a.dtype == dtype
            assert all(np.array_equal(a_slots[slot], b_slots[slot]) for slot in a_slots)


def test_a_leaking_average_scales_both_gradients() -> None:
    rng = np.random.default_rng(4)
    support, optimizer = Support.from_mask(rng.random((5, 6)) < 0.5), LeakingASGD()
    dense = rng.standard_normal((5, 6)).astype(np.float32)
    results = []
    for scale, given_dense in ((0.3, dense), (1.0, dense * np.float32(0.3))):
        values = np.ones(support.nnz, np.float32)
        slots = optimizer.init(values, support)
        for step in (1, 2, 3):
            stored = given_dense.reshape(-1)[support.flat]
            optimizer.update(
                values, stored, slots, lr=0.1, step=step, support=support, dense_grad=given_dense, scale=scale
            )
        results.append((values, slots["average"]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tier", kernels.TIERS)
def test_arrays_that_do_not_fit(tier: str) -> None:
    """Compiled code never sees them."""
    w, options = np.zeros(3), SGD_OPTIONS[-1] | {"scale": 1.0, "lr": 0.1}
    adam = {**ADAM_OPTIONS[0], "scale": 1.0, "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}
    with kernels.use(tier):
        with pytest.raises(ValueError, match=r"shapes \(3,\), \(2,\), \(3,\)"):
            kernels.sgd_step(w, w[:2], w, **options)
        with pytest.raises(ValueError, match=r"shapes \(3,\), \(3,\), \(2,\)"):
            kernels.sgd_step(w, w, w[:2], **options)
        with pytest.raises(ValueError, match="values are float64 and the gradient float32"):
            kernels.adam_step(w, w.astype(np.float32), w, w, **adam)
        with pytest.raises(ValueError, match=r"\(4,\); give arrays with one entry for each value"):
            kernels.adam_step(w, w, w, np.zeros(4), **adam)
