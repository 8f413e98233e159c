r"""Sparse convolutions without columns: the row kernels of a linear map, reading windows where they lie.

Pixels of an image (C, H, W, B) lie B numbers apart, so the window of the *next* output position along a row begins B
numbers after this one's, and a stretch of positions and samples along a row of outputs is a row in the sense of
:mod:`refimpl.kernels.cpu.rows`: for an entry :math:`(o, c, i, j)` of the weight it gathers the stretch of the padded
image that begins :math:`c H_p W_p + i W_p + j` pixels after that of the entry (·, 0, 0, 0). The index of an entry is
this number of pixels; it depends on the padded image's size alone, not on the batch. With a stride along the row, a
stretch is the samples of one position.

*Backward.* Pixel p of the padded image is seen by the window at :math:`(p - i) / s` through tap i, where s divides
:math:`p - i`. So the pixels fall into :math:`s_h s_w` *phases*, in each of which a part of the taps takes part, and the
gradient of a phase is a convolution of stride 1 of a ``dY`` with a margin; each stretch of ``dY`` that is loaded serves
for ``dX`` and for the weight's gradient. Lines are then the input channels.

What it costs is what the row kernels cost: for each entry and 16 numbers of a stretch one load and one multiply–add.
Stretches are up to 128 numbers; tiles keep the channels that a tile gathers from in the level-1 cache.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.extending import register_jitable

from refimpl.kernels import memory
from refimpl.kernels.cpu.plan import Lines, Tiles, chunk_count, plan
from refimpl.kernels.cpu.products import even_chunks, from_tiles, in_tiles, put, take
from refimpl.kernels.cpu.rows import dot_pixels, fetch_row, gather_dot_pixels, gather_pixels
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import QUAD, quads
from refimpl.kernels.types import Geometry, Inset, Pattern, SparseMatrix

_STRETCH_BYTES = 512
_TILE_BYTES = 40 << 10  # of the pixels that a tile gathers from
_LEAST = 12  # entries of a line in a tile
_MANY_STRETCHES = 32  # of an image: from there on it pays to ask for the next one's numbers ahead of time


class Walk(NamedTuple):
    """Where the stretches of an image array begin, in single numbers."""

    first: int
    plane: int  # from one channel to the next
    row: int  # from one row of positions to the next
    step: int  # from one position to the next, where a stretch is not longer than one


class Stretches(NamedTuple):
    """How the positions of an image are cut into stretches."""

    quads: tuple[int, ...]
    width: int
    rows: int
    across: int  # stretches in a row
    parts: int  # stretches in a position; all of a row if positions follow each other


@register_jitable
def begin(walk, row, stretch, parts, width):  # type: ignore[no-untyped-def]
    """Return where a stretch of a row begins, in the first channel."""
    return walk[0] + row * walk[2] + stretch // parts * walk[3] + stretch % parts * width


@kernel
def conv_gather(quads, values, index, starts, ends, across, parts, x, x_walk, unit, offset, out, out_walk, rows):  # type: ignore[no-untyped-def]
    """``out[i, pos] = offset[i] + sum over k in line i of values[k] * x[pos + unit * index[k]]``."""
    width = len(quads) * 4
    for job in prange(rows * across):
        r, a = job // across, job % across
        base = begin(x_walk, r, a, parts, width)
        to = begin(out_walk, r, a, parts, width)
        for t in range(starts.shape[0]):
            for i in range(starts.shape[1]):
                at, start, end = to + i * out_walk[1], starts[t, i], ends[t, i]
                if t == 0:
                    gather_pixels(quads, x, base, values, index, start, end, out, at, False, offset[i], unit)
                else:
                    gather_pixels(quads, x, base, values, index, start, end, out, at, True, offset[i], unit)


@kernel
def conv_gather_dot(  # type: ignore[no-untyped-def]
    quads, values, index, starts, ends, bounds, across, parts, y, y_walk, unit, x, x_walk, out, out_walk, rows, grad,
    ahead,
):  # fmt: skip
    """``out[j, pos] = sum over k in line j of values[k] * y[pos + unit * index[k]]`` and
    ``grad[k] += <x[j, pos], y[pos + unit * index[k]]>``.

    If ``ahead`` is not negative, what the next stretch reads and writes is asked for during this one, of y the numbers
    at that distance, which no stretch before has read.
    """
    width = len(quads) * 4
    for c in prange(bounds.size - 1):
        for r in range(rows):
            for a in range(across):
                base = begin(y_walk, r, a, parts, width)
                at = begin(x_walk, r, a, parts, width)
                to = begin(out_walk, r, a, parts, width)
                next_r, next_a = r + (a + 1) // across, (a + 1) % across
                soon = begin(y_walk, next_r, next_a, parts, width) + ahead
                soon_at = begin(x_walk, next_r, next_a, parts, width)
                soon_to = begin(out_walk, next_r, next_a, parts, width)
                for t in range(starts.shape[0]):
                    for j in range(bounds[c], bounds[c + 1]):
                        if t == 0 and ahead >= 0:  # one line of each at a time: more at once would be dropped
                            fetch_row(quads, x, soon_at + j * x_walk[1])
                            fetch_row(quads, out, soon_to + j * out_walk[1])
                            if j * y_walk[1] < y.size:
                                fetch_row(quads, y, soon + j * y_walk[1])
                        fixed, own, start, end = at + j * x_walk[1], to + j * out_walk[1], starts[t, j], ends[t, j]
                        if t == 0:
                            gather_dot_pixels(
                                quads, y, base, x, fixed, values, index, start, end, grad, True, out, False, own, unit
                            )
                        else:
                            gather_dot_pixels(
                                quads, y, base, x, fixed, values, index, start, end, grad, True, out, True, own, unit
                            )


@kernel
def conv_dot(quads, index, starts, ends, bounds, across, parts, x, x_walk, unit, y, y_walk, rows, grad):  # type: ignore[no-untyped-def]
    """``grad[k] += <y[i, pos], x[pos + unit * index[k]]>`` for the entries ``k`` of each line ``i``."""
    width = len(quads) * 4
    for c in prange(bounds.size - 1):
        for r in range(rows):
            for a in range(across):
                base = begin(x_walk, r, a, parts, width)
                at = begin(y_walk, r, a, parts, width)
                for t in range(starts.shape[0]):
                    for i in range(bounds[c], bounds[c + 1]):
                        dot_pixels(
                            quads, x, base, y, at + i * y_walk[1], index, starts[t, i], ends[t, i], grad, True, unit
                        )


def convolve(w: SparseMatrix, x: Inset, geometry: Geometry, bias: np.ndarray | None = None) -> np.ndarray:
    """Return the convolution of images; see :func:`refimpl.kernels.spec_conv.convolve`."""
    batch = x.whole.shape[3]
    x = _filled(x)
    whole = x.whole
    cut = stretches(geometry.outputs, whole.shape[3], geometry.stride, whole.itemsize)
    tiles = _rows(w.support, geometry, whole.shape, cut.width, whole.itemsize)
    out = memory.empty((w.support.matrix_shape[0], *geometry.outputs, whole.shape[3]), whole.dtype)
    offset = np.zeros(len(out), out.dtype) if bias is None else bias
    alone = chunk_count(2.0 * tiles.index.size * out[0].size) == 1
    run(
        conv_gather, cut.quads, in_tiles(w.values, tiles), tiles.index, tiles.starts, tiles.ends, cut.across,
        cut.parts, whole.reshape(-1), _windows_walk(x, geometry), whole.shape[3], offset, out.reshape(-1),
        _walk(Inset(out, (0, 0)), (0, 0), (1, 1)), cut.rows, alone=alone,
    )  # fmt: skip
    return out if batch == whole.shape[3] else np.ascontiguousarray(out[..., :batch])


def convolve_dot(support: Pattern, dy: Inset, x: Inset, geometry: Geometry) -> np.ndarray:
    """Return the weight's gradient on a support; see :func:`refimpl.kernels.spec_conv.convolve_dot`."""
    x, dy = _filled(x), _filled(dy)
    whole = x.whole
    cut = stretches(geometry.outputs, whole.shape[3], geometry.stride, whole.itemsize)
    tiles = _rows(support, geometry, whole.shape, cut.width, whole.itemsize)
    grad = memory.zeros((tiles.index.size,), whole.dtype)
    count = chunk_count(2.0 * grad.size * math.prod(geometry.outputs) * whole.shape[3])
    run(
        conv_dot, cut.quads, tiles.index, tiles.starts, tiles.ends, plan(support).rows.chunks(count), cut.across,
        cut.parts, whole.reshape(-1), _windows_walk(x, geometry), whole.shape[3], dy.whole.reshape(-1),
        _walk(dy, (0, 0), (1, 1)), cut.rows, grad, alone=count == 1,
    )  # fmt: skip
    return from_tiles(grad, tiles)


def convolve_backward(w: SparseMatrix, dy: Inset, x: Inset, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return ``dx`` and the weight's gradient; see :func:`refimpl.kernels.spec_conv.convolve_backward`."""
    batch = x.whole.shape[3]
    x, dy = _filled(x), _with_margin(_filled(dy), geometry)
    unit = x.whole.shape[3]
    dx = memory.empty((x.whole.shape[0], *geometry.image, unit), x.whole.dtype)
    grad = memory.zeros(w.values.shape, dx.dtype)  # a tap may see nothing but padding
    if not _sees_all(geometry):
        dx[...] = 0  # of pixels that no tap reads
    for phase in _phases(geometry):
        columns = _columns(w.support, geometry, phase, dy.whole.shape)
        step = geometry.stride
        cut = stretches(phase.size, unit, step, dx.itemsize)
        tiles = columns.tiles(tile_count(columns.lines, geometry, cut.width, unit, dx.itemsize))
        count = chunk_count(4.0 * tiles.index.size * math.prod(phase.size) * unit)
        bounds = even_chunks(tiles.index.size)  # a phase has some of the entries
        values, part = memory.empty((tiles.index.size,), dx.dtype), memory.zeros((tiles.index.size,), dx.dtype)
        run(take, w.values, tiles.source, bounds, values, alone=bounds.size == 2)
        dx_walk = _walk(Inset(dx, (0, 0)), phase.first, step)
        run(
            conv_gather_dot, cut.quads, values, tiles.index, tiles.starts, tiles.ends,
            columns.lines.chunks(count), cut.across, cut.parts, dy.whole.reshape(-1), _walk(dy, phase.seen, (1, 1)),
            unit, x.whole.reshape(-1), _walk(x, phase.first, step), dx.reshape(-1), dx_walk, cut.rows, part,
            _edge(phase, dy) if cut.rows * cut.across >= _MANY_STRETCHES else -1, alone=count == 1,
        )  # fmt: skip
        run(put, part, tiles.source, bounds, grad, alone=bounds.size == 2)
    return (dx if batch == unit else np.ascontiguousarray(dx[..., :batch])), grad


# --- where things lie


def _edge(phase: Phase, dy: Inset) -> int:
    """Return how far the last tap of a phase reads from where the first does."""
    _, _, width, batch = dy.whole.shape
    return (phase.beyond[0] * width + phase.beyond[1]) * batch


def _walk(inset: Inset, pixel: tuple[int, int], step: tuple[int, int]) -> Walk:
    """Return how to walk over the positions of an image, ``step`` pixels apart, from one of its pixels on."""
    _, height, width, batch = inset.whole.shape
    first = (inset.at[0] + pixel[0]) * width + inset.at[1] + pixel[1]
    return Walk(first * batch, height * width * batch, step[0] * width * batch, step[1] * batch)


def _windows_walk(x: Inset, geometry: Geometry) -> Walk:
    """Return how to walk over the windows of an image, by their first pixels."""
    top, left = geometry.padding
    return _walk(x, (-top, -left), geometry.stride)


@lru_cache(maxsize=1 << 10)
def stretches(positions: tuple[int, int], batch: int, stride: tuple[int, int], itemsize: int) -> Stretches:
    """Cut rows of positions into stretches of equal width: the greatest that divides them, up to 512 bytes."""
    rows, across = positions
    numbers = across * batch if stride[1] == 1 else batch
    count = numbers // QUAD
    most = _STRETCH_BYTES // itemsize // QUAD
    width = QUAD * max(d for d in range(1, most + 1) if count % d == 0)
    parts = numbers // width
    return Stretches(quads(width), width, rows, parts if stride[1] == 1 else across * parts, parts)


def _filled(inset: Inset) -> Inset:
    """Return images whose batch is a multiple of four: themselves, or a copy with empty ones at the end."""
    batch = inset.whole.shape[3]
    if batch % QUAD == 0:
        return inset
    whole = memory.empty((*inset.whole.shape[:3], -(-batch // QUAD) * QUAD), inset.whole.dtype)
    whole[..., :batch] = inset.whole
    whole[..., batch:] = 0
    return Inset(whole, inset.at)


def _with_margin(dy: Inset, geometry: Geometry) -> Inset:
    """Return ``dY`` with as many zeros around it as the taps reach beyond it: itself, or a copy."""
    (top, bottom), (left, right) = _reach(geometry)
    channels, height, width, batch = dy.whole.shape
    (h, v), (t, l) = geometry.outputs, dy.at
    if t >= top and l >= left and height - t - h >= bottom and width - l - v >= right:
        return dy
    whole = memory.zeros((channels, top + h + bottom, left + v + right, batch), dy.whole.dtype)
    whole[:, top : top + h, left : left + v] = dy.whole[:, t : t + h, l : l + v]
    return Inset(whole, (top, left))


# --- the phases of a stride


class Phase(NamedTuple):
    """The pixels of an image that one part of the taps reads."""

    taps: tuple[tuple[int, int], ...]
    first: tuple[int, int]  # pixel of the image
    seen: tuple[int, int]  # output position that tap (0, 0) would see it at, less what makes all taps' ways positive
    size: tuple[int, int]  # how many of its pixels there are
    beyond: tuple[int, int]  # the longest way from ``seen``


def _along(kernel: int, stride: int, padding: int, image: int) -> list[tuple[list[int], int, int, int, int]]:
    """Return the phases along one axis: taps, first pixel, first output, number of pixels, longest way."""
    found = []
    for residue in range(stride):
        taps = list(range(residue, kernel, stride))
        least = max(0, -((residue - padding) // stride))  # a of the first pixel inside: residue + stride a >= padding
        pixel = residue + stride * least - padding
        count = -(-(image - pixel) // stride) if pixel < image else 0
        if taps and count:
            way = taps[-1] // stride
            found.append((taps, pixel, least - way, count, way))
    return found


@lru_cache(maxsize=1 << 10)
def _phases(geometry: Geometry) -> list[Phase]:
    down = _along(geometry.kernel[0], geometry.stride[0], geometry.padding[0], geometry.image[0])
    across = _along(geometry.kernel[1], geometry.stride[1], geometry.padding[1], geometry.image[1])
    return [
        Phase(tuple(product(a[0], b[0])), (a[1], b[1]), (a[2], b[2]), (a[3], b[3]), (a[4], b[4]))
        for a, b in product(down, across)
    ]


@lru_cache(maxsize=1 << 10)
def _sees_all(geometry: Geometry) -> bool:
    """Tell whether the phases together hold every pixel of an image."""
    return sum(math.prod(p.size) for p in _phases(geometry)) == math.prod(geometry.image)


@lru_cache(maxsize=1 << 10)
def _reach(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return how far the taps reach beyond ``dY``: (before, after) for each axis."""
    before_after = []
    for axis in (0, 1):
        phases = _phases(geometry)
        before = max((-p.seen[axis] for p in phases), default=0)
        last = max((p.seen[axis] + p.size[axis] - 1 + p.beyond[axis] for p in phases), default=0)
        before_after.append((max(before, 0), max(last - geometry.outputs[axis] + 1, 0)))
    return before_after[0], before_after[1]


# --- what is derived from a pattern


def _rows(support: Pattern, geometry: Geometry, image: tuple[int, ...], width: int, itemsize: int) -> Tiles:
    """Return the rows of a weight in tiles, their index in pixels of a padded image (I, H, W, B)."""
    lines = plan(support).rows
    count = tile_count(lines, geometry, width, image[3], itemsize)
    kept = support.plans.setdefault("conv rows", {})
    key = geometry.kernel, image[1:3], count
    if key not in kept:
        (kh, kw), (_, height, across, _) = geometry.kernel, image
        channels, taps = np.divmod(np.arange(lines.across), kh * kw)
        kept[key] = _in_pixels(lines.cut(count), channels * (height * across) + taps // kw * across + taps % kw)
    return kept[key]


class _Columns:
    """The columns of a phase as a pattern: rows are input channels, their entries (o, tap) in ascending order.

    Parameters
    ----------
    support : Pattern
    geometry : Geometry
    phase : Phase
    dy : tuple of int
        Shape of ``dY`` with its margin.
    """

    def __init__(self, support: Pattern, geometry: Geometry, phase: Phase, dy: tuple[int, ...]) -> None:
        from scipy.sparse import csr_matrix  # longer to import than this package

        (kh, kw), (outputs, columns) = geometry.kernel, support.matrix_shape
        taps = kh * kw
        own = np.zeros(taps, bool)
        own[[i * kw + j for i, j in phase.taps]] = True
        channel, tap = np.divmod(support.indices.astype(np.int64), taps)
        inside = np.flatnonzero(own[tap])
        pointer = np.concatenate([[0], np.cumsum(own[tap])])[support.indptr]
        # A counting sort, which keeps the order of the entries of one channel.
        by_channel = csr_matrix((inside, channel[inside], pointer), shape=(outputs, columns // taps)).tocsc()
        self.source = by_channel.data
        self.matrix_shape = columns // taps, outputs * taps
        self.indptr = by_channel.indptr.astype(np.int64)
        self.indices = (by_channel.indices.astype(np.int64) * taps + tap[self.source]).astype(np.uint32)
        for array in (self.indptr, self.indices):
            array.flags.writeable = False  # as a support's are: to Numba that is a type
        self.plans: dict[str, Any] = {}
        self.lines = Lines(self, transposed=False)
        o, k = np.divmod(np.arange(outputs * taps), taps)
        down = phase.beyond[0] - k // kw // geometry.stride[0]
        self._pixels = o * (dy[1] * dy[2]) + down * dy[2] + phase.beyond[1] - k % kw // geometry.stride[1]
        self._tiles: dict[int, Tiles] = {}

    def tiles(self, count: int) -> Tiles:
        """Return the lines in tiles, their index in pixels of ``dY``."""
        if count not in self._tiles:
            self._tiles[count] = _in_pixels(self.lines.cut(count), self._pixels, self.source)
        return self._tiles[count]


def _columns(support: Pattern, geometry: Geometry, phase: Phase, dy: tuple[int, ...]) -> _Columns:
    kept = support.plans.setdefault("conv columns", {})
    key = geometry.kernel, geometry.stride, phase.taps, dy[1:3]
    if key not in kept:
        kept[key] = _Columns(support, geometry, phase, dy)
    return kept[key]


def tile_count(lines: Lines, geometry: Geometry, width: int, batch: int, itemsize: int) -> int:
    """Return into how many tiles to cut lines, so that the pixels that a tile gathers from stay in the near cache.

    The stretches that neighbouring taps of a row gather overlap where the stride is 1.
    """
    kh, kw = geometry.kernel
    distinct = width + (kw - 1) * batch if geometry.stride[1] == 1 else kw * width
    wanted = -(-lines.across // (kh * kw) * kh * distinct * itemsize // _TILE_BYTES)
    return int(max(1, min(wanted, lines.nnz / max(lines.count, 1) // _LEAST)))


def _in_pixels(tiles: Tiles, pixels: np.ndarray, source: np.ndarray | None = None) -> Tiles:
    """Return tiles whose index is ``pixels`` of each place, and whose values come from ``source`` of the lines'."""
    index = pixels.astype(np.uint32)[tiles.index]
    starts, ends = (np.ascontiguousarray(bounds) for bounds in (tiles.starts, tiles.ends))
    place = tiles.place
    if source is not None:
        source = source.astype(np.uint32 if source.size < 1 << 32 else np.uint64)
        if place is not None:
            moved = np.empty_like(source)
            moved[place] = source
            source, place = moved, None
    for array in (index, starts, ends):
        array.flags.writeable = False
    return Tiles(index, starts, ends, None, place, source)
