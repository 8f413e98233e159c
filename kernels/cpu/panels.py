"""Panels: the layout that the row kernels read.

The columns of an activation array (..., F, N) are regrouped into panels (P, F, w): narrow enough that the rows which
one line of a sparse matrix gathers stay in a near cache, wide enough that a non-zero's value and index are paid for by
several vectors, each row on a cache line of its own. Time steps of a small batch share a panel (batch 20: four steps,
80 columns); a large batch is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels import memory
from refimpl.kernels.cpu.rows import copy_row
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import QUAD, REGISTER_BYTES, quads

IDEAL_WIDTH = 80
_SMALL = 1 << 18  # numbers that one thread copies before another is awake
MAX_BYTES = 512  # of one row of a panel: eight registers, so that four non-zeros' sums need no more than there are


class Layout(NamedTuple):
    """How the columns of (panels, F, N) are grouped: several input panels to one of ours, or one cut into several."""

    panels_in: int  # of the input
    columns: int  # of each input panel
    together: int  # input panels in one of ours
    pieces: int  # of ours in one input panel
    part: int  # columns of an input panel in one of ours
    width: int

    @property
    def panels_out(self) -> int:
        """Number of our panels."""
        return -(-self.panels_in // self.together) * self.pieces


def layout(panels: int, columns: int, itemsize: int) -> Layout:
    """Choose the grouping for ``panels`` arrays of ``columns`` columns each."""
    limit = MAX_BYTES // itemsize
    if columns <= IDEAL_WIDTH // 2:
        # A few panels are padded to a full one of ours rather than have kernels compiled for a width of their own.
        together = max(1, min(IDEAL_WIDTH, limit) // columns) if panels > 1 else 1
        width = _round_up(together * columns, QUAD if panels == 1 else REGISTER_BYTES // itemsize)
        return Layout(panels, columns, together, 1, columns, width)
    pieces = 1 if columns <= limit else -(-columns // min(IDEAL_WIDTH, limit))
    part = _round_up(-(-columns // pieces), REGISTER_BYTES // itemsize)
    return Layout(panels, columns, 1, pieces, part, part)


def _round_up(width: int, step: int) -> int:
    return -(-width // step) * step


def are_panels(x: np.ndarray) -> bool:
    """Tell whether an array is in this layout already."""
    if x.ndim != 3 or not x.flags.c_contiguous or not memory.is_aligned(x):
        return False
    panels, _, width = x.shape
    if width <= IDEAL_WIDTH // 2:
        return panels == 1 and width % QUAD == 0
    return width % (REGISTER_BYTES // x.itemsize) == 0 and width <= MAX_BYTES // x.itemsize


def pack(x: np.ndarray, fill: float = 0, itemsize: int = 0) -> np.ndarray:
    """Return the columns of ``x`` (..., F, N) as panels (P, F, w); an array that is in the layout already is returned
    as it is.

    ``itemsize`` asks for the layout of another type, to group labels as the activations that they belong to.
    """
    if are_panels(x) and not itemsize:
        return x
    x = x.reshape(-1, *x.shape[-2:])
    lay = layout(x.shape[0], x.shape[2], itemsize or x.itemsize)
    out = memory.empty((lay.panels_out, x.shape[1], lay.width), x.dtype)
    if lay.pieces == 1:
        if lay.together * lay.columns < lay.width:
            out[:, :, lay.together * lay.columns :] = fill
        if lay.panels_in % lay.together:
            out[-1, :, lay.panels_in % lay.together * lay.columns :] = fill
    else:
        out[lay.pieces - 1 :: lay.pieces, :, lay.columns - (lay.pieces - 1) * lay.part :] = fill
    regroup(x, out, lay, into=True)
    return out


def unpack(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`pack`: return an array of ``shape`` (..., F, N)."""
    if panels.shape == shape:
        return panels
    out = memory.empty(shape, panels.dtype)
    x = out.reshape(-1, *shape[-2:])
    lay = layout(x.shape[0], x.shape[2], x.itemsize)
    regroup(x, panels, lay, into=False)
    return out


def regroup(x: np.ndarray, panels: np.ndarray, lay: Layout, *, into: bool) -> None:
    """Copy all columns of ``x`` (panels_in, F, columns) into our panels, or the other way."""
    simple = x.flags.c_contiguous and panels.flags.c_contiguous and x.dtype.kind == "f"
    if simple and lay.pieces == 1 and lay.columns % QUAD == 0:
        run(copy_columns, quads(lay.columns), x, panels, into, alone=x.size < _SMALL)
        return
    for p in range(lay.panels_in):
        for q in range(lay.pieces):
            ours = x[p, :, q * lay.part : (q + 1) * lay.part]
            start = p % lay.together * lay.columns
            theirs = panels[p // lay.together * lay.pieces + q, :, start : start + ours.shape[1]]
            (theirs if into else ours)[...] = ours if into else theirs


@kernel
def copy_columns(quads, x, panels, into):  # type: ignore[no-untyped-def]
    """Copy ``x`` (P, F, columns) into panels that hold several of its own side by side, or out of them."""
    features, columns = x.shape[1:]
    width = panels.shape[2]
    together = width // columns
    flat_x, flat_panels = x.reshape(-1), panels.reshape(-1)
    for p in prange(x.shape[0]):
        first = p // together * features * width + p % together * columns
        for f in range(features):
            ours, theirs = (p * features + f) * columns, first + f * width
            if into:
                copy_row(quads, flat_x, ours, flat_panels, theirs)
            else:
                copy_row(quads, flat_panels, theirs, flat_x, ours)
