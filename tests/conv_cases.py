"""Convolutions to check, and their definition by loops."""

from typing import Any

import numpy as np

from refimpl.layers import conv2d, windows
from refimpl.testing.layers import Layer
from refimpl.weights import Params, SparseWeight, Support

SIZES: dict[str, Any] = {
    "groups": [1, 2, 3],
    "channels": [(1, 1), (2, 1), (1, 2), (2, 3)],  # outputs and inputs of each group
    "kernel": [(1, 1), (1, 3), (2, 2), (3, 2)],
    "stride": [1, 2, (1, 3)],
    "padding": [0, 1, (1, 0), ((0, 1), (2, 0))],
    "extra": [(0, 0), (1, 2), (2, 3)],  # pixels beyond the least that the kernel fits on
    "batch": [1, 2],
    "bias": [True, False],
    "block": [1, 30, 1 << 20],
    "small": [0, 1 << 16],  # dense weights with this many entries go without columns
}


def sides(padding: Any) -> tuple[tuple[int, int], ...]:
    """Return ((top, bottom), (left, right)), written out a second time."""
    both = padding if isinstance(padding, tuple) else (padding, padding)
    return tuple(side if isinstance(side, tuple) else (side, side) for side in both)


def draw(
    rng: np.random.Generator, groups: int, channels: Any, kernel: Any, padding: Any, extra: Any, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a weight and images on which its kernel fits."""
    outputs, inputs = channels
    image = [max(1, k - sum(p)) + e for k, p, e in zip(kernel, sides(padding), extra, strict=True)]
    return rng.standard_normal((outputs * groups, inputs, *kernel)), rng.standard_normal(
        (inputs * groups, *image, batch)
    )


def make_conv(
    rng: np.random.Generator, *, groups: int, channels: Any, kernel: Any, stride: Any, padding: Any, extra: Any,
    batch: int, bias: bool, block: int, small: int,
) -> Layer:  # fmt: skip
    windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES = block, small
    w, x = draw(rng, groups, channels, kernel, padding, extra, batch)
    params: Params = {"w": w}
    if bias:
        params["b"] = rng.standard_normal(len(w))
    name = "b" if bias else None
    return Layer(
        lambda p, x: conv2d.forward(p, "w", name, x, stride=stride, padding=padding, groups=groups),
        lambda dy, cache, grads, dx: conv2d.backward(dy, cache, grads, input_gradient=dx),
        params,
        (x,),
        sparse=("w",),
        complex_step=True,
    )


def by_loops(w: np.ndarray, x: np.ndarray, dy: Any, *, stride: Any, padding: Any, groups: int) -> tuple[Any, Any, Any]:
    """Return y, and dx and dw if there is a dy, one product at a time."""
    s = stride if isinstance(stride, tuple) else (stride, stride)
    xp = np.pad(x, ((0, 0), *sides(padding), (0, 0)))
    outputs, inputs, kh, kw = w.shape
    size = (xp.shape[1] - kh) // s[0] + 1, (xp.shape[2] - kw) // s[1] + 1
    y, dw, dxp = np.zeros((outputs, *size, x.shape[3])), np.zeros_like(w), np.zeros_like(xp)
    for o, h, v in np.ndindex(outputs, *size):
        first = o // (outputs // groups) * inputs
        for c, i, j in np.ndindex(inputs, kh, kw):
            at = first + c, h * s[0] + i, v * s[1] + j
            y[o, h, v] += w[o, c, i, j] * xp[at]
            if dy is not None:
                dw[o, c, i, j] += dy[o, h, v] @ xp[at]
                dxp[at] += w[o, c, i, j] * dy[o, h, v]
    (top, bottom), (left, right) = sides(padding)
    return y, dxp[:, top : xp.shape[1] - bottom, left : xp.shape[2] - right], dw


def check_by_loops(seed: int, **sizes: Any) -> None:
    """Compare with the loops on small integers: every sum is exact, so there is no bound."""
    windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES = sizes["block"], sizes["small"]
    rng = np.random.default_rng(seed)
    shape = {key: sizes[key] for key in ("groups", "channels", "kernel", "padding", "extra", "batch")}
    w, x = draw(rng, **shape)
    w, x = rng.integers(-4, 5, w.shape).astype(float), rng.integers(-4, 5, x.shape).astype(float)
    w[0] = 0  # an empty row
    options = {key: sizes[key] for key in ("stride", "padding", "groups")}
    b = rng.integers(-4, 5, len(w)).astype(float)
    support = Support.from_mask(w > 0)
    for weight in (w, SparseWeight.from_dense(w, support)):
        dense = weight.dense() if isinstance(weight, SparseWeight) else weight
        params: Params = {"w": weight, "b": b}
        y, cache = conv2d.forward(params, "w", "b", x, **options)
        dy = rng.integers(-4, 5, y.shape).astype(float)
        grads: dict[str, Any] = {}
        dx = conv2d.backward(dy, cache, grads)
        y_loops, dx_loops, dw_loops = by_loops(dense, x, dy, **options)
        np.testing.assert_array_equal(y, y_loops + b[:, None, None, None])
        np.testing.assert_array_equal(dx, dx_loops)
        np.testing.assert_array_equal(grads["w"].dense(), dw_loops)
        np.testing.assert_array_equal(grads["w"].on(support), dw_loops[w > 0])
        np.testing.assert_array_equal(grads["b"], dy.sum((1, 2, 3)))
