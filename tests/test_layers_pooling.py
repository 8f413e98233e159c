"""Pooling: the laws of every layer, torch, ties and corners, planted mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.layers import pooling
from refimpl.layers.padded import Padded, image_of
from refimpl.testing.kernels import poison_pool
from refimpl.testing.layers import Layer, check_layer

SIZES: dict[str, Any] = {
    "channels": [1, 2],
    "image": [(3, 3), (4, 5), (3, 6)],
    "kernel": [1, 2, 3, (2, 3), (3, 1)],
    "stride": [None, 1, 2, (3, 2), 4],
    "padding": [0, "half", "asymmetric"],
    "batch": [1, 2],
}


def padding_of(kernel: Any, padding: Any) -> Any:
    """Return the padding of that kind: none, all that is allowed, or that only before or after."""
    if padding == 0:
        return 0
    most = tuple(k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    return most if padding == "half" else ((0, most[0]), (most[1], 0))


def apart(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw numbers at least 1/2 apart, so that no difference quotient changes which is the greatest."""
    return rng.permutation(int(np.prod(shape))).reshape(shape) / 2 - 10.0


def forward_of(kind: str, **options: Any) -> Callable[..., Any]:
    if kind == "max":
        return lambda x: pooling.max_forward(x, **options)
    return lambda x: pooling.average_forward(x, count_include_pad=kind == "average", **options)


def backward_of(kind: str) -> Callable[..., np.ndarray]:
    return pooling.max_backward if kind == "max" else pooling.average_backward


KINDS = ["max", "average", "average of pixels"]


def maker(kind: str, backward: Callable[..., Any] | None = None) -> Callable[..., Layer]:
    def make(
        rng: np.random.Generator, *, channels: int, image: Any, kernel: Any, stride: Any, padding: Any, batch: int
    ) -> Layer:
        forward = forward_of(kind, kernel=kernel, stride=stride, padding=padding_of(kernel, padding))
        back = backward or backward_of(kind)
        return Layer(
            lambda p, x: forward(x),
            lambda dy, cache, grads, dx: back(dy, cache),
            {},
            (apart(rng, (channels, *image, batch)),),
            optional_dx=False,
            complex_step=kind != "max",
        )

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_pooling(kind: str) -> None:
    check_layer(maker(kind), SIZES, max_examples=30)


def make_global(rng: np.random.Generator, *, channels: int, image: Any, batch: int) -> Layer:
    return Layer(
        lambda p, x: pooling.global_average_forward(x),
        lambda dy, cache, grads, dx: pooling.global_average_backward(dy, cache),
        {},
        (rng.standard_normal((channels, *image, batch)),),
        optional_dx=False,
        complex_step=True,
    )


def test_global_average() -> None:
    check_layer(make_global, {"channels": [1, 3], "image": [(1, 1), (2, 3)], "batch": [1, 2]})


def test_a_global_average_is_one_window() -> None:
    x, dy = np.random.default_rng(0).integers(-9, 10, (2, 3, 2, 4, 5)).astype(float)
    y, shape = pooling.global_average_forward(x)
    windowed, cache = pooling.average_forward(x, (2, 4))
    assert y.shape == (3, 5)
    np.testing.assert_array_equal(y, windowed[:, 0, 0])  # integers over 8: exact
    dx = pooling.global_average_backward(dy[:, 0, 0], shape)
    np.testing.assert_array_equal(dx, pooling.average_backward(dy[:, :1, :1], cache))


def check_against_torch(
    kind: str, seed: int, *, channels: int, image: Any, kernel: Any, stride: Any, padding: Any, batch: int,
    ties: bool, forward: Any = None, backward: Any = None,
) -> None:  # fmt: skip
    """Compare; torch pads both ends alike, so what is padded at one end alone is cut out of its result."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 1, (channels, *image, batch)).astype(float) if ties else apart(rng, (channels, *image, batch))
    pad = padding_of(kernel, padding)
    y, cache = (forward or forward_of)(kind, kernel=kernel, stride=stride, padding=pad)(x)
    dy = rng.standard_normal(y.shape)
    dx = (backward or backward_of(kind))(dy, cache)
    x_torch = torch.tensor(np.moveaxis(x, -1, 0).copy(), requires_grad=True)
    if kind == "max":
        out = torch.nn.functional.max_pool2d(x_torch, kernel, stride, pad)
    else:
        out = torch.nn.functional.avg_pool2d(x_torch, kernel, stride, pad, count_include_pad=kind == "average")
    out.backward(torch.tensor(np.moveaxis(dy, -1, 0).copy()))
    # Sums of at most 9 numbers below 64: 16 roundings.
    bound = 16 * 64 * np.finfo(float).eps
    np.testing.assert_allclose(np.moveaxis(y, -1, 0), out.detach().numpy(), rtol=0, atol=bound)
    np.testing.assert_allclose(np.moveaxis(dx, -1, 0), x_torch.grad.numpy(), rtol=0, atol=bound)


SYMMETRIC = {**SIZES, "padding": [0, "half"]}


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SYMMETRIC.items()}),
    st.booleans(),
)
def test_pooling_of_torch(kind: str, seed: int, sizes: dict[str, Any], ties: bool) -> None:
    check_against_torch(kind, seed, ties=ties, **sizes)


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SIZES.items()}),
)
def test_pooling_by_loops(kind: str, seed: int, sizes: dict[str, Any]) -> None:
    """Window by window, with ties: each window's slice of the padded image by itself."""
    rng = np.random.default_rng(seed)
    kernel, pad = sizes["kernel"], padding_of(sizes["kernel"], sizes["padding"])
    k = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    s = k if sizes["stride"] is None else np.broadcast_to(sizes["stride"], 2)
    both = tuple(p if isinstance(p, tuple) else (p, p) for p in (pad if isinstance(pad, tuple) else (pad, pad)))
    x = rng.integers(-3, 1, (sizes["channels"], *sizes["image"], sizes["batch"])).astype(float)
    y, cache = forward_of(kind, kernel=kernel, stride=sizes["stride"], padding=pad)(x)
    dy = rng.integers(-4, 5, y.shape).astype(float)
    dx = backward_of(kind)(dy, cache)
    widths = ((0, 0), *both, (0, 0))
    xp = np.pad(x, widths, constant_values=np.nan)
    assert y.shape[1:3] == tuple((n - a) // b + 1 for n, a, b in zip(xp.shape[1:3], k, s, strict=True))
    expected_dx = np.zeros_like(xp)
    for c, h, v, b in np.ndindex(y.shape):
        at = (c, slice(h * s[0], h * s[0] + k[0]), slice(v * s[1], v * s[1] + k[1]), b)
        window = xp[at]
        if kind == "max":
            assert y[c, h, v, b] == np.nanmax(window)
            first = np.unravel_index(np.nanargmax(window), window.shape)
            expected_dx[at][first] += dy[c, h, v, b]
        else:
            n = np.isfinite(window).sum() if kind != "average" else window.size
            assert y[c, h, v, b] == np.nansum(window) / n
            expected_dx[at] += dy[c, h, v, b] / n
    inner = expected_dx[:, both[0][0] : xp.shape[1] - both[0][1], both[1][0] : xp.shape[2] - both[1][1]]
    # At most 9 windows see a pixel.
    np.testing.assert_allclose(dx, inner, rtol=0, atol=0 if kind == "max" else 9 * 9 * 4 * np.finfo(float).eps)


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SIZES.items()}),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(kernels.TIERS),
)
def test_margins(kind: str, seed: int, sizes: dict[str, Any], around: int, margin: int, tier: str) -> None:
    """The bits do not depend on margins, nor on the tier; the margin of what is read holds no zeros here."""
    rng = np.random.default_rng(seed)
    own = dict(sizes)
    x = rng.standard_normal((own.pop("channels"), *own.pop("image"), own.pop("batch")))
    own["padding"] = padding_of(own["kernel"], own["padding"])

    def in_margin(a: np.ndarray) -> Padded:
        whole = np.full((len(a), a.shape[1] + 2 * around, a.shape[2] + 2 * around, a.shape[3]), np.nan)
        Padded(whole, around).image[...] = a
        return Padded(whole, around)

    with kernels.use("spec"):
        y, cache = forward_of(kind, **own)(x)
        dy = rng.standard_normal(y.shape)
        dx = backward_of(kind)(dy, cache)
    outputs = {"margin": margin} if kind == "max" else {}
    poison_pool()
    with kernels.use(tier):
        y_too, cache = forward_of(kind, **own, **outputs)(in_margin(x))
        dx_too = backward_of(kind)(in_margin(dy), cache, **outputs)
    for got, expected in ((y_too, y), (dx_too, dx)):
        assert isinstance(got, Padded) == bool(outputs.get("margin"))
        np.testing.assert_array_equal(image_of(got), expected)
        if isinstance(got, Padded):
            got.image[...] = 0
            assert not got.whole.any()


def test_a_global_average_reads_no_margin() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    inside = Padded(np.full((2, 5, 6, 5), np.nan), 1)
    inside.image[...] = x
    got, wanted = (pooling.global_average_forward(a) for a in (inside, x))
    np.testing.assert_array_equal(got[0], wanted[0])
    assert got[1] == wanted[1] == x.shape


def test_of_equal_pixels_the_first_gets_the_gradient() -> None:
    y, cache = pooling.max_forward(np.zeros((1, 2, 2, 1)), 2)
    assert y.item() == 0
    assert pooling.max_backward(np.ones((1, 1, 1, 1)), cache).reshape(-1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_corners_of_the_maximum(value: float) -> None:
    """Where all pixels are minus infinity the gradient is not lost in the padding; NaN is seen."""
    x = np.full((1, 3, 3, 1), value)
    y, cache = pooling.max_forward(x, 3, stride=1, padding=1)
    np.testing.assert_array_equal(y, x)
    dx = pooling.max_backward(np.ones(y.shape), cache)
    assert dx.sum() == y.size
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    x[0, 1, 1] = value
    y, _ = pooling.max_forward(x, 2, stride=1)
    expected = [max(w) for w in ([0, 1, 3], [1, 2, 5], [3, 6, 7], [5, 7, 8])] if value < 0 else [value] * 4
    np.testing.assert_array_equal(y.reshape(-1), expected)


def test_no_gradient_is_lost_in_the_padding_of_a_wide_kernel() -> None:
    x = np.full((2, 5, 6, 1), -np.inf)
    for padding in ((1, 1), ((1, 0), (0, 1)), ((0, 1), (1, 1))):
        y, cache = pooling.max_forward(x, (2, 3), stride=(2, 1), padding=padding)
        assert pooling.max_backward(np.ones(y.shape), cache).sum() == y.size


@pytest.mark.parametrize("pool", [pooling.max_forward, pooling.average_forward])
@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((1, 3, 3, 1), {"kernel": 4}, "kernel is 4 x 4 and the padded image 3 x 3 pixels"),
        ((1, 3, 3), {"kernel": 2}, r"got an array of shape \(1, 3, 3\); give images as"),
        ((1, 3, 3, 1), {"kernel": 2, "padding": 2}, "padding is 2 and the kernel 2; pooling takes at most half"),
        ((1, 3, 3, 1), {"kernel": 2, "padding": ((0, 2), 0)}, "pooling takes at most half"),
        ((1, 3, 3, 1), {"kernel": 0}, "kernel is 0; give a whole number from 1"),
        ((1, 3, 3, 1), {"kernel": 2, "stride": 0}, "stride is 0"),
    ],
)
def test_what_does_not_fit(pool: Callable[..., Any], shape: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pool(np.ones(shape), **options)


def test_a_global_average_of_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="give images as"):
        pooling.global_average_forward(np.ones((2, 3)))


# --- planted mistakes -----------------------------------------------------------------------------------------

OVERLAPPING: dict[str, Any] = {
    "channels": 2, "image": (4, 5), "kernel": 3, "stride": 1, "padding": "half", "batch": 2,
}  # fmt: skip


def shared_among_equals(dy: np.ndarray, cache: Any) -> np.ndarray:
    """Send all of dy to every pixel of the window."""
    counts = np.ones((*dy.shape[1:3], 1))
    return pooling.average_backward(dy, pooling.AverageCache(counts, cache.shape, cache.windows))


def not_divided(dy: np.ndarray, cache: Any) -> np.ndarray:
    return pooling.average_backward(dy, cache._replace(counts=np.ones_like(cache.counts)))


def last_window_only(dy: np.ndarray, cache: Any) -> np.ndarray:
    """Assign where windows overlap, instead of adding."""
    windows = cache.windows
    every = windows.whole(cache.shape[1:3])
    out = windows.zeros(cache.shape, dy.dtype)
    for i, j in windows.taps:
        windows.tap(out, i, j, *every)[...] = dy / cache.counts
    return windows.crop(out).copy()


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [("max", shared_among_equals), ("average", not_divided), ("average", last_window_only)],
)
def test_mistakes_in_backward(kind: str, mistake: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"gradient of input 0 is .* along a random direction"):
        check_layer(maker(kind, mistake), {k: [v] for k, v in OVERLAPPING.items()}, max_examples=3, shrink=False)


def last_of_equals(kind: str, **options: Any) -> Callable[..., Any]:
    def forward(x: np.ndarray) -> Any:
        y, cache = pooling.max_forward(x, **options)
        windows = cache.windows
        padded = windows.pad(x, -np.inf)
        for k, (i, j) in enumerate(windows.taps):
            cache.chosen[windows.tap(padded, i, j, *windows.whole(x.shape[1:3])) == y] = k
        return y, cache

    return forward


def padding_of_zeros(kind: str, **options: Any) -> Callable[..., Any]:
    def forward(x: np.ndarray) -> Any:
        y, cache = pooling.max_forward(x, **options)
        windows = cache.windows
        seen = windows.pad(np.zeros(x.shape), 1.0)
        touched = sum(windows.tap(seen, i, j, *windows.whole(x.shape[1:3])) for i, j in windows.taps)
        return np.where(touched > 0, np.maximum(y, 0), y), cache

    return forward


def other_count(kind: str, **options: Any) -> Callable[..., Any]:
    return forward_of("average" if kind != "average" else "average of pixels", **options)


def test_the_layers_themselves_agree_with_torch() -> None:
    for kind in KINDS:
        for ties in (True, False):
            check_against_torch(kind, 0, ties=ties, **OVERLAPPING)


@pytest.mark.parametrize(
    ("kind", "mistake", "ties"),
    [
        ("max", last_of_equals, True), ("max", padding_of_zeros, True), ("average", other_count, False),
        ("average of pixels", other_count, False),
    ],
)  # fmt: skip
def test_mistakes_that_torch_shows(kind: str, mistake: Callable[..., Any], ties: bool) -> None:
    with pytest.raises(AssertionError):
        check_against_torch(kind, 0, ties=ties, forward=mistake, **OVERLAPPING)
