"""Panels: the layout that the row kernels read.

The columns of an activation array (..., F, N) are regrouped into panels (P, F, w): narrow enough that the rows which
one line of a sparse matrix gathers stay in a near cache, wide enough that a non-zero's value and index are paid for by
several vectors, each row on a cache line of its own. Time steps of a small batch share a panel (batch 20: four steps,
80 columns); a large batch is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.kernels import memory
from refimpl.kernels.cpu.vector import QUAD

IDEAL_WIDTH = 80
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
        width = _round_up(together * columns)
        return Layout(panels, columns, together, 1, columns, width)
    pieces = 1 if columns <= limit else -(-columns // min(IDEAL_WIDTH, limit))
    part = _round_up(-(-columns // pieces))
    return Layout(panels, columns, 1, pieces, part, part)


def _round_up(width: int) -> int:
    return -(-width // QUAD) * QUAD


def are_panels(x: np.ndarray) -> bool:
    """Tell whether an array is in this layout already."""
    return (
        x.ndim == 3
        and x.flags.c_contiguous
        and x.shape[2] % QUAD == 0
        and IDEAL_WIDTH // 2 < x.shape[2] <= MAX_BYTES // x.itemsize
        and memory.is_aligned(x)
    )


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
    if lay.panels_out * lay.width != lay.panels_in * lay.columns:
        out[...] = fill
    for p in range(lay.panels_in):
        for q in range(lay.pieces):
            piece = x[p, :, q * lay.part : (q + 1) * lay.part]
            start = p % lay.together * lay.columns
            out[p // lay.together * lay.pieces + q, :, start : start + piece.shape[1]] = piece
    return out


def unpack(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`pack`: return an array of ``shape`` (..., F, N)."""
    if panels.shape == shape:
        return panels
    out = memory.empty(shape, panels.dtype)
    x = out.reshape(-1, *shape[-2:])
    lay = layout(x.shape[0], x.shape[2], x.itemsize)
    for p in range(lay.panels_in):
        for q in range(lay.pieces):
            piece = x[p, :, q * lay.part : (q + 1) * lay.part]
            start = p % lay.together * lay.columns
            piece[...] = panels[p // lay.together * lay.pieces + q, :, start : start + piece.shape[1]]
    return out
