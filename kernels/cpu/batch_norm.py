"""Batch normalisation of images, channel by channel, each by one thread.

The floor is memory traffic: forward reads the input and writes the output, backward reads the gradient, the input and a
rectifier's output and writes a gradient. Everything comes from far away once: a channel is gone through twice, and the
second time it is near. Sums are formed in float64; the conversions hide behind the loads.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl.kernels.cpu.plan import chunk_count
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.stretches import Stretch, Values, Walk, clear_margin, element_of, first_pixel, number_at
from refimpl.kernels.cpu.vector import fma
from refimpl.kernels.spec_images import Images

PLAIN, STORED, AGAIN = 0, 1, 2
"""What a gradient passed on its way here: no rectifier; one whose output is there; one whose output was nothing but the
normalised input, which is computed again because that is nearer than it is."""

_FLOPS_EACH = 32.0  # of one number, counted as its memory traffic costs


@intrinsic
def moments(typingctx, starts, steps, rows, length, pivot):  # type: ignore[no-untyped-def]
    """Return the sums of ``x - pivot`` and of its square."""
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        starts, steps, rows, length, pivot = arguments
        walk = Walk(b, element_of(signature.args[4]), starts, steps, 1, rows, length)

        def body(at: Stretch, sums: Values) -> Values:
            d = b.fsub(at.load(0), at.splat(pivot))
            return [b.fadd(sums[0], d), fma(b, d, d, sums[1])]

        return context.make_tuple(b, signature.return_type, walk(body, 2))

    return types.UniTuple(types.float64, 2)(starts, steps, n, n, pivot), generate


@intrinsic(prefer_literal=True)
def write_normalised(typingctx, starts, steps, rows, length, mean, slope, beta, add, rectify):  # type: ignore[no-untyped-def]
    """``out = slope * (x - mean) + beta``, plus ``more`` if ``add``, and 0 below 0 if ``rectify``; x, out, more."""
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        starts, steps, rows, length, mean, slope, beta, _, _ = arguments
        walk = Walk(b, element_of(signature.args[4]), starts, steps, 3, rows, length)

        def body(at: Stretch, sums: Values) -> Values:
            y = fma(b, b.fsub(at.load(0), at.splat(mean)), at.splat(slope), at.splat(beta))
            if add.literal_value:
                y = b.fadd(y, at.load(2))
            at.store(at.rectified(y, y) if rectify.literal_value else y, 1)
            return []

        walk(body)
        return context.get_dummy_value()

    return types.void(starts, steps, n, n, mean, mean, mean, add, rectify), generate


def _unrectified(at: Stretch, how: int, y: ir.Value) -> ir.Value:
    """Return dy, or 0 where the output was 0 or below: as it stands in memory, or as it is computed again."""
    g = at.load(0)
    return g if how == PLAIN else at.rectified(at.load(2) if how == STORED else y, g)


@intrinsic(prefer_literal=True)
def gradient_sums(typingctx, starts, steps, rows, length, mean, slope, beta, how, keep):  # type: ignore[no-untyped-def]
    """Return the sums of g and of ``g * (x - mean)``, and write g to ``added`` if ``keep``; dy, x, y, added.

    g is dy, or 0 where y is 0 or below; ``how`` that is known is one of the three numbers above.
    """
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        starts, steps, rows, length, mean, slope, beta, _, _ = arguments
        walk = Walk(b, element_of(signature.args[4]), starts, steps, 4, rows, length)

        def body(at: Stretch, sums: Values) -> Values:
            centred = b.fsub(at.load(1), at.splat(mean))
            g = _unrectified(at, how.literal_value, fma(b, centred, at.splat(slope), at.splat(beta)))
            if keep.literal_value:
                at.store(g, 3)
            return [b.fadd(sums[0], g), fma(b, g, centred, sums[1])]

        return context.make_tuple(b, signature.return_type, walk(body, 2))

    return types.UniTuple(types.float64, 2)(starts, steps, n, n, mean, mean, mean, how, keep), generate


@intrinsic(prefer_literal=True)
def write_gradient(typingctx, starts, steps, rows, length, mean, slope, beta, shift, tilt, how):  # type: ignore[no-untyped-def]
    """``dx = slope * (g - shift - tilt * (x - mean))``, g as above; dy, x, y, dx."""
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        starts, steps, rows, length, mean, slope, beta, shift, tilt, _ = arguments
        walk = Walk(b, element_of(signature.args[4]), starts, steps, 4, rows, length)
        opposite = b.fneg(tilt)

        def body(at: Stretch, sums: Values) -> Values:
            centred = b.fsub(at.load(1), at.splat(mean))
            g = _unrectified(at, how.literal_value, fma(b, centred, at.splat(slope), at.splat(beta)))
            moved = fma(b, centred, at.splat(opposite), b.fsub(g, at.splat(shift)))
            at.store(b.fmul(moved, at.splat(slope)), 3)
            return []

        walk(body)
        return context.get_dummy_value()

    return types.void(starts, steps, n, n, mean, mean, mean, mean, mean, how), generate


@kernel
def normalise(x, mx, out, mo, more, mm, gamma, beta, eps, given, statistics, add, rectify):  # type: ignore[no-untyped-def]
    """Write y: images with their margins x, out, and more, which is added if ``add``.

    statistics (2, C): mean and variance, ``given`` or to be written.
    """
    number = gamma.dtype.type
    rows, length = x.shape[1] - 2 * mx, (x.shape[2] - 2 * mx) * x.shape[3]
    count = rows * length
    if mx == 0 and mo == 0 and mm == 0:
        rows, length = 1, count
    steps = (x.strides[1], out.strides[1], more.strides[1])
    x_start, out_start, more_start = first_pixel(x, mx), first_pixel(out, mo), first_pixel(more, mm)
    for c in prange(gamma.size):
        starts = (x_start + c * x.strides[0], out_start + c * out.strides[0], more_start + c * more.strides[0])
        if not given:
            pivot = number_at(gamma[c], starts[0])
            for _ in range(2):
                first, second = moments(starts, steps, rows, length, pivot)
                shift = first / count
                variance = second / count - shift * shift
                statistics[0, c] = np.float64(pivot) + shift
                statistics[1, c] = max(variance, 0.0) if variance == variance else variance
                if not shift * shift > 4 * variance:
                    break
                # The sums began from a number far from the mean, and digits were lost: begin again from the mean.
                pivot = number(statistics[0, c])
        mean = number(statistics[0, c])
        slope = gamma[c] * number(1 / np.sqrt(statistics[1, c] + eps))
        clear_margin(mean, out, mo, c)
        if add:
            if rectify:
                write_normalised(starts, steps, rows, length, mean, slope, beta[c], True, True)
            else:
                write_normalised(starts, steps, rows, length, mean, slope, beta[c], True, False)
        elif rectify:
            write_normalised(starts, steps, rows, length, mean, slope, beta[c], False, True)
        else:
            write_normalised(starts, steps, rows, length, mean, slope, beta[c], False, False)


@kernel
def normalise_backward(  # type: ignore[no-untyped-def]
    dy, mdy, x, mx, y, my, dx, mdx, added, mean, scale, gamma, beta, sums, how, keep, wanted, moving
):
    """Write dx if ``wanted``, and the rectifier's gradient to ``added`` if ``keep``; all but that with their margins.

    sums (2, C) get the gradients of gamma and beta. moving: whether mean and variance were those of the batch.
    """
    number = gamma.dtype.type
    rows, length = x.shape[1] - 2 * mx, (x.shape[2] - 2 * mx) * x.shape[3]
    count = rows * length if moving else np.inf
    if mdy == 0 and mx == 0 and my == 0 and mdx == 0:
        rows, length = 1, rows * length
    first = (dy.strides[1], x.strides[1], y.strides[1], added.strides[1])
    second = (added.strides[1] if keep else dy.strides[1], x.strides[1], y.strides[1], dx.strides[1])
    dy_start, x_start, y_start, dx_start = (
        first_pixel(dy, mdy),
        first_pixel(x, mx),
        first_pixel(y, my),
        first_pixel(dx, mdx),
    )
    for c in prange(gamma.size):
        own = added.ctypes.data + c * added.strides[0]
        g, at, below = dy_start + c * dy.strides[0], x_start + c * x.strides[0], y_start + c * y.strides[0]
        arrays = (g, at, below, own)
        m, slope = mean[c], gamma[c] * scale[c]
        if keep:
            total, along = gradient_sums(arrays, first, rows, length, m, slope, beta[c], STORED, True)
        elif how == STORED:
            total, along = gradient_sums(arrays, first, rows, length, m, slope, beta[c], STORED, False)
        elif how == AGAIN:
            total, along = gradient_sums(arrays, first, rows, length, m, slope, beta[c], AGAIN, False)
        else:
            total, along = gradient_sums(arrays, first, rows, length, m, slope, beta[c], PLAIN, False)
        along *= np.float64(scale[c])
        sums[0, c], sums[1, c] = along, total
        if wanted:
            shift, tilt = number(total / count), number(along * np.float64(scale[c]) / count)
            arrays = (own if keep else g, at, below, dx_start + c * dx.strides[0])
            clear_margin(m, dx, mdx, c)
            if keep or how == PLAIN:  # what was kept is near
                write_gradient(arrays, second, rows, length, m, slope, beta[c], shift, tilt, PLAIN)
            elif how == STORED:
                write_gradient(arrays, second, rows, length, m, slope, beta[c], shift, tilt, STORED)
            else:
                write_gradient(arrays, second, rows, length, m, slope, beta[c], shift, tilt, AGAIN)


def batch_norm(
    x: Images,
    gamma: np.ndarray,
    beta: np.ndarray,
    eps: float,
    out: Images,
    *,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
    add: Images | None = None,
    rectify: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise each channel; see :func:`refimpl.kernels.spec_images.batch_norm`."""
    held = np.empty((2, gamma.size))
    if statistics is not None:
        held[0], held[1] = statistics
    more = x if add is None else add
    run(
        normalise, x.whole, x.margin, out.whole, out.margin, more.whole, more.margin, np.ascontiguousarray(gamma),
        np.ascontiguousarray(beta), float(eps), statistics is not None, held, add is not None, rectify,
        alone=chunk_count(_FLOPS_EACH * x.whole.size) == 1,
    )  # fmt: skip
    return (held[0], held[1]) if statistics is None else statistics


def batch_norm_backward(
    dy: Images,
    x: Images,
    y: Images | None,
    mean: np.ndarray,
    scale: np.ndarray,
    gamma: np.ndarray,
    dx: Images | None,
    *,
    moving: bool,
    beta: np.ndarray | None = None,
    added: Images | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients; see :func:`refimpl.kernels.spec_images.batch_norm_backward`."""
    sums = np.empty((2, gamma.size), gamma.dtype)
    how = STORED if y is not None else PLAIN if beta is None else AGAIN
    # What is not there is not looked at, but an array must stand for it.
    output, below, own = x if y is None else y, dy if dx is None else dx, dy if added is None else added
    mean, scale, gamma, beta = map(np.ascontiguousarray, (mean, scale, gamma, gamma if beta is None else beta))
    run(
        normalise_backward, dy.whole, dy.margin, x.whole, x.margin, output.whole, output.margin, below.whole,
        below.margin, own.whole, mean, scale, gamma, beta, sums, how, added is not None, dx is not None, moving,
        alone=chunk_count(_FLOPS_EACH * x.whole.size) == 1,
    )  # fmt: skip
    return sums[0], sums[1]
