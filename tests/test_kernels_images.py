"""The kernels on images: batch norm within what rounding explains, maxima to the bit, margins, threads, errors."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_cases import EPS, Case, cases, check_backward, check_forward, framed, inner

from refimpl import kernels
from refimpl.kernels import cpu, images, spec_images, threads
from refimpl.kernels.cpu import batch_norm as norm_kernels
from refimpl.kernels.cpu import pooling as pooling_kernels
from refimpl.layers.padded import Padded
from refimpl.rng import generator
from refimpl.testing.bounds import gamma, unit_roundoff


@settings(max_examples=60, deadline=None)
@given(cases())
def test_batch_norm_forward(case: Case) -> None:
    for module in (norm_kernels, spec_images):
        check_forward(module, case)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_batch_norm_backward(case: Case) -> None:
    for module in (norm_kernels, spec_images):
        check_backward(module, case)


@pytest.mark.parametrize("one", range(5))
@pytest.mark.parametrize("rectify", [False, True])
def test_one_array_alone_has_a_margin(one: int, rectify: bool) -> None:
    """Rows are taken together only where no array has a margin between them."""
    margins = tuple(int(k == one) for k in range(5))
    case = Case((2, 3, 4, 5), np.float64, margins[0], margins[1:], add=True, rectify=rectify)
    check_forward(norm_kernels, case)
    check_backward(norm_kernels, case)


def test_an_outlier_that_the_sums_begin_from_costs_no_digits() -> None:
    """The first number is the only one that is not nearly 0: the worst pivot there is."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        x = rng.standard_normal((1, 8, 8, 32)).astype(dtype) * dtype(1e-3)
        x[0, 0, 0, 0] = 1e4
        mean, var = norm_kernels.batch_norm(Padded(x, 0), *np.ones((2, 1), dtype), EPS, Padded(np.empty_like(x), 0))
        exact = x.astype(np.longdouble)
        mu = exact.mean()
        sigma2 = np.square(exact - mu).mean()
        # The second pass begins from the mean: 14 times 12 + n roundings, of the type and of float64.
        allowed = 14 * (gamma(12, dtype) + gamma(x.size, np.float64))
        assert abs(var[0] - sigma2) <= allowed * sigma2
        assert abs(mean[0] - mu) <= allowed * np.sqrt(sigma2)


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_sums_of_float32_are_as_good_as_sums_in_float64(offset: float) -> None:
    """They err by no more than rounding the mean to float32 would, and the variance twice, whatever the length."""
    u = unit_roundoff(np.float32)
    for shape in [(8, 2, 2, 7), (8, 32, 32, 32)]:
        x = (generator(0, "x").standard_normal(shape) + offset).astype(np.float32)
        mean, var = norm_kernels.batch_norm(
            Padded(x, 0), *np.ones((2, 8), np.float32), EPS, Padded(np.empty_like(x), 0)
        )
        exact = x.astype(np.float64)
        assert (np.abs(mean - exact.mean((1, 2, 3))) <= u * exact.std((1, 2, 3))).all()
        assert (np.abs(var / exact.var((1, 2, 3)) - 1) <= 2 * u).all()


# --- maxima


def windows_of(case: Case, kernel: Any, stride: Any, before: Any, after: Any) -> tuple[int, ...]:
    sizes = zip(case.shape[1:3], kernel, stride, before, after, strict=True)
    return tuple((n + p + q - k) // s + 1 for n, k, s, p, q in sizes)


@settings(max_examples=60, deadline=None)
@given(
    cases(), st.sampled_from([(1, 1), (2, 2), (3, 3), (2, 3), (3, 1)]),
    st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 4)]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@example(Case((2, 7, 7, 20)), (3, 3), (1, 1), True, True, False)
def test_maxima_to_the_bit(case: Case, kernel: Any, stride: Any, first: bool, last: bool, corners: bool) -> None:
    """Of ties, NaN and infinities too; and gradients that add up in one order."""
    before, after = (tuple(k // 2 * on for k in kernel) for on in (first, last))
    counts = windows_of(case, kernel, stride, before, after)
    if min(counts) < 1:
        return
    rng = generator(case.seed, "ties")
    x = rng.integers(-2, 3, case.shape).astype(case.dtype)
    if corners:
        x[rng.random(x.shape) < 0.3] = rng.choice([np.nan, -np.inf, np.inf, -0.0])
    shape = (case.shape[0], *counts, case.shape[3])
    dy = generator(case.seed, "dy").standard_normal(shape).astype(case.dtype)
    results = []
    for module in (spec_images, pooling_kernels):
        out, dx = framed(np.full(shape, np.nan, case.dtype), case.margin), case.out()
        chosen = np.full(shape, 254, np.uint8)
        module.max_pool(framed(x, case.around[0]), out, chosen, kernel, stride, before)
        module.max_pool_backward(framed(dy, case.around[1]), chosen, dx, kernel, stride, before)
        results.append((inner(out).tobytes(), chosen.tobytes(), np.abs(inner(dx)).tobytes()))
    assert results[0] == results[1]


# --- threads, and what is asked of the tiers


@pytest.fixture
def _shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu.plan, "WORTH_SHARING", 1e3)
    before = threads.get()
    yield
    threads.set_count(before)


@pytest.mark.usefixtures("_shared")
def test_the_same_bits_for_any_number_of_threads() -> None:
    case = Case((11, 7, 9, 20), np.float32, 1, add=True, rectify=True)
    x, dy, more = (framed(a, 1) for a in (case.x, case.numbers("dy"), case.numbers("more")))
    ones = np.ones(11, np.float32)
    results = []
    for count in (1, 2, 3):
        threads.set_count(count)
        out, dx, back, added = case.out(), case.out(), case.out(), framed(case.x, 0)
        mean, var = images.batch_norm(x, ones, ones, EPS, out, add=more, rectify=True)
        scale = images.scale_of(var, EPS, np.float32)
        sums = images.batch_norm_backward(
            dy, x, out, mean.astype(np.float32), scale, ones, dx, moving=True, added=added
        )
        pooled, chosen = Padded(np.empty((11, 3, 4, 20), np.float32), 0), np.empty((11, 3, 4, 20), np.uint8)
        images.max_pool(x, pooled, chosen, (2, 2), (2, 2), (0, 0))
        images.max_pool_backward(pooled, chosen, back, (2, 2), (2, 2), (0, 0))
        written = (mean, var, out.whole, dx.whole, added.whole, *sums, pooled.whole, chosen, back.whole)
        results.append([a.tobytes() for a in written])
    assert results[0] == results[1] == results[2]


def test_the_tiers_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module in (spec_images, norm_kernels):
        original = module.batch_norm
        monkeypatch.setattr(
            module, "batch_norm", lambda *a, m=module, f=original, **named: (seen.append(m), f(*a, **named))[1]
        )
    x, ones = np.ones((2, 3, 3, 4)), np.ones(2)
    for name, expected in (("cpu", norm_kernels), ("spec", spec_images)):
        with kernels.use(name):
            images.batch_norm(Padded(x, 0), ones, ones, EPS, Padded(np.empty_like(x), 0))
        assert seen.pop() is expected
    with kernels.use("cpu"):  # complex numbers, and several types at once, go by the definition
        images.batch_norm(Padded(x.astype(complex), 0), ones, ones, EPS, Padded(np.empty(x.shape, complex), 0))
        images.batch_norm(Padded(x.astype(np.float32), 0), ones, ones, EPS, Padded(np.empty_like(x), 0))
    assert seen == [spec_images, spec_images]


X, ONES = Padded(np.ones((2, 3, 3, 4)), 0), np.ones(2)
SMALL, CHOSEN = Padded(np.ones((2, 2, 2, 4)), 0), np.zeros((2, 2, 2, 4), np.uint8)


def normalise(x: Padded = X, gamma: np.ndarray = ONES, out: Any = None, **options: Any) -> Any:
    return images.batch_norm(x, gamma, ONES, EPS, Padded(np.empty_like(X.whole), 0) if out is None else out, **options)


def pool(
    x: Padded = X, out: Padded = SMALL, chosen: np.ndarray = CHOSEN, kernel: Any = (2, 2), stride: Any = (1, 1),
    before: Any = (0, 0),
) -> None:  # fmt: skip
    images.max_pool(x, out, chosen, kernel, stride, before)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: normalise(out=Padded(np.empty((2, 3, 3, 5)), 0)),
            r"shape \(2, 3, 3, 5\) for images of shape \(2, 3, 3, 4",
        ),
        (lambda: normalise(out=Padded(np.empty((2, 3, 3, 4)), 1)), r"be contiguous, of shape \(2, 5, 5, 4\)"),
        (lambda: normalise(out=Padded(np.empty((2, 3, 3, 8))[..., ::2], 0)), "must be contiguous"),
        (lambda: normalise(add=SMALL), r"shape \(2, 2, 2, 4\) for images of shape \(2, 3, 3, 4\)"),
        (lambda: normalise(gamma=np.ones(3)), r"shape \(3,\); images of 2 channels take \(2,\)"),
        (lambda: normalise(statistics=(ONES, np.ones(1))), "images of 2 channels"),
        (lambda: normalise(x=Padded(np.ones((2, 3)), 0)), r"shape \(2, 3\); images are"),
        (
            lambda: images.batch_norm_backward(SMALL, X, None, ONES, ONES, ONES, None, moving=True),
            "for images of shape",
        ),
        (
            lambda: images.batch_norm_backward(X, X, None, ONES, ONES, ONES, None, moving=True, added=X),
            "without the output; give both or neither",
        ),
        (lambda: pool(stride=(2, 3)), "have no windows"),
        (lambda: pool(before=(2, 0)), "have no windows"),
        (lambda: pool(x=Padded(X.whole[1:], 0)), "have no windows"),
        (lambda: pool(chosen=CHOSEN.astype(int)), "unsigned type"),
        (lambda: pool(kernel=(16, 16)), "unsigned type"),
        (lambda: pool(out=X), "for images of shape"),
        (lambda: images.max_pool_backward(X, CHOSEN, X, (2, 2), (1, 1), (0, 0)), "for images of shape"),
    ],
)
def test_what_does_not_fit(call: Callable[[], Any], match: str) -> None:
    """Compiled code would write into foreign memory."""
    with pytest.raises(ValueError, match=match):
        call()
