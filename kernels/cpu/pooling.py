"""Maximum over windows of images, channel by channel, each by one thread.

The samples of a batch, which follow each other, are the lanes of vectors; a window's greatest numbers, and which of its
taps they were, stay in registers until all taps are seen. Each pixel is read as often as windows see it, mostly from a
near cache; the floor is what it takes to read the images once, and to write a number and a byte for each window.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from refimpl.kernels.cpu.plan import chunk_count
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.stretches import Stretch, Values, clear, clear_margin, element_of, first_pixel, lanes_of
from refimpl.kernels.cpu.vector import INT, INT32, for_range, splat
from refimpl.kernels.spec_images import Images

_FLOPS_EACH = 16.0  # of one number, counted as its memory traffic costs
_BYTE = ir.IntType(8)


@intrinsic
def window_max(typingctx, like, x, row, batch, window, width, out, chosen):  # type: ignore[no-untyped-def]
    """``out[b] = max over taps of x[tap, b]``, and ``chosen[b]`` is the tap's number; NaN counts as the greatest.

    x, out and chosen are addresses: of the window's upper left pixel (it may be in the padding), and of samples 0. Taps
    ``window = (i, i end, j, j end)`` are those that are pixels, in rows ``row`` bytes apart; their numbers are
    ``i * width + j``.
    """
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        _, x, row, batch, window, width, out, chosen = arguments
        element = element_of(signature.args[0])
        size = 4 if isinstance(element, ir.FloatType) else 8
        i_first, i_end, j_first, j_end = (b.extract_value(window, k) for k in range(4))

        def pixels(i: ir.Value, j: ir.Value) -> ir.Value:
            across = b.mul(b.mul(j, batch), INT(size))
            return b.inttoptr(b.add(x, b.add(b.mul(i, row), across)), element.as_pointer())

        def number(i: ir.Value, j: ir.Value, lanes: int) -> ir.Value:
            return splat(b, b.trunc(b.add(b.mul(i, width), j), INT32), lanes)

        at = INT(0)
        for lanes in (lanes_of(element), 1):

            def code(at: ir.Value, _: Values, lanes: int = lanes) -> Values:
                def one(i: ir.Value, j: ir.Value, state: Values) -> Values:
                    best, tap = state
                    value = Stretch(b, element, lanes, [pixels(i, j)], at).load(0)
                    greater = b.or_(b.fcmp_ordered(">", value, best), b.fcmp_unordered("uno", value, value))
                    return [b.select(greater, value, best), b.select(greater, number(i, j, lanes), tap)]

                def line(i: ir.Value, state: Values) -> Values:
                    return for_range(b, j_first, j_end, 1, state, lambda j, state: one(i, j, state))[1]

                first = Stretch(b, element, lanes, [pixels(i_first, j_first)], at).load(0)
                _, state = for_range(b, i_first, i_end, 1, [first, number(i_first, j_first, lanes)], line)
                Stretch(b, element, lanes, [b.inttoptr(out, element.as_pointer())], at).store(state[0], 0)
                bytes_ = b.trunc(state[1], ir.VectorType(_BYTE, lanes))
                place = b.gep(b.inttoptr(chosen, _BYTE.as_pointer()), [at])
                b.store(bytes_, b.bitcast(place, bytes_.type.as_pointer())).align = 1
                return []

            at, _ = for_range(b, at, batch, lanes, [], code)
        return context.get_dummy_value()

    return types.void(like, n, n, n, window, n, n, n), generate


@intrinsic
def window_add(typingctx, like, dy, chosen, batch, dx, tap):  # type: ignore[no-untyped-def]
    """``dx[b] += dy[b]`` where ``chosen[b]`` is ``tap``; addresses of samples 0."""
    n = types.intp

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        _, dy, chosen, batch, dx, tap = arguments
        element = element_of(signature.args[0])
        rows = [b.inttoptr(address, element.as_pointer()) for address in (dy, dx)]
        at = INT(0)
        for lanes in (lanes_of(element), 1):

            def code(at: ir.Value, _: Values, lanes: int = lanes) -> Values:
                stretch = Stretch(b, element, lanes, rows, at)
                kind = ir.VectorType(_BYTE, lanes)
                place = b.gep(b.inttoptr(chosen, _BYTE.as_pointer()), [at])
                held = b.load(b.bitcast(place, kind.as_pointer()))
                held.align = 1
                own = b.icmp_unsigned("==", held, splat(b, b.trunc(tap, _BYTE), lanes))
                before = stretch.load(1)
                stretch.store(b.select(own, b.fadd(before, stretch.load(0)), before), 1)
                return []

            at, _ = for_range(b, at, batch, lanes, [], code)
        return context.get_dummy_value()

    return types.void(like, n, n, n, n, n), generate


@njit(nogil=True, error_model="numpy")
def taps(place, stride, before, kernel, size):  # type: ignore[no-untyped-def]
    """Return the first tap of a window that is a pixel, and the end of those."""
    start = place * stride - before
    return max(0, -start), min(kernel, size - start)


@kernel
def pool(like, x, mx, out, mo, chosen, kernel, stride, before):  # type: ignore[no-untyped-def]
    """Write the maxima and their taps: x and out with their margins, ``before`` the padding above and to the left."""
    channels, high, wide, batch = chosen.shape
    height, width = x.shape[1] - 2 * mx, x.shape[2] - 2 * mx
    x_start, out_start = first_pixel(x, mx), first_pixel(out, mo)
    for c in prange(channels):
        clear_margin(like, out, mo, c)
        for h in range(high):
            i, i_end = taps(h, stride[0], before[0], kernel[0], height)
            at = x_start + c * x.strides[0] + (h * stride[0] - before[0]) * x.strides[1] - before[1] * x.strides[2]
            to = out_start + c * out.strides[0] + h * out.strides[1]
            note = chosen.ctypes.data + (c * high + h) * wide * batch
            for w in range(wide):
                j, j_end = taps(w, stride[1], before[1], kernel[1], width)
                window_max(
                    like, at + w * stride[1] * x.strides[2], x.strides[1], batch, (i, i_end, j, j_end), kernel[1],
                    to + w * out.strides[2], note + w * batch,
                )  # fmt: skip


@kernel
def pool_backward(like, dy, mdy, chosen, dx, mdx, kernel, stride, before):  # type: ignore[no-untyped-def]
    """Write the gradient of x: dy and dx with their margins."""
    channels, high, wide, batch = chosen.shape
    height, width = dx.shape[1] - 2 * mdx, dx.shape[2] - 2 * mdx
    dy_start, dx_start = first_pixel(dy, mdy), first_pixel(dx, mdx)
    for c in prange(channels):
        clear(like, dx.ctypes.data + c * dx.strides[0], dx.shape[1] * dx.shape[2] * batch)
        # The last window comes first, so that a pixel's gradients are added in the order of its taps.
        for h in range(high - 1, -1, -1):
            i_first, i_end = taps(h, stride[0], before[0], kernel[0], height)
            at = dx_start + c * dx.strides[0] + (h * stride[0] - before[0]) * dx.strides[1] - before[1] * dx.strides[2]
            g = dy_start + c * dy.strides[0] + h * dy.strides[1]
            note = chosen.ctypes.data + (c * high + h) * wide * batch
            for w in range(wide - 1, -1, -1):
                j_first, j_end = taps(w, stride[1], before[1], kernel[1], width)
                for i in range(i_first, i_end):
                    for j in range(j_first, j_end):
                        pixel = at + i * dx.strides[1] + (w * stride[1] + j) * dx.strides[2]
                        window_add(like, g + w * dy.strides[2], note + w * batch, batch, pixel, i * kernel[1] + j)


def max_pool(
    x: Images,
    out: Images,
    chosen: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    """Write the greatest numbers; see :func:`refimpl.kernels.spec_images.max_pool`."""
    run(
        pool, x.whole.dtype.type(0), x.whole, x.margin, out.whole, out.margin, chosen, kernel, stride, before,
        alone=chunk_count(_FLOPS_EACH * x.whole.size) == 1,
    )  # fmt: skip


def max_pool_backward(
    dy: Images,
    chosen: np.ndarray,
    dx: Images,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    """Write the gradient; see :func:`refimpl.kernels.spec_images.max_pool_backward`."""
    run(
        pool_backward, dy.whole.dtype.type(0), dy.whole, dy.margin, chosen, dx.whole, dx.margin, kernel, stride, before,
        alone=chunk_count(_FLOPS_EACH * dx.whole.size) == 1,
    )  # fmt: skip
