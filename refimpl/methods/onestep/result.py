"""What became of a masked array, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from refimpl.weights.support import Support


class Fate(IntEnum):
    """What an exchange did with an entry, and why."""

    ABSENT = 0
    """Was not there, and is not."""
    KEPT = 1
    """Was there and survived the drop."""
    KEPT_THOUGH_ABSENT = 2
    """Was not there, yet outranked an entry that was: by noise, or in a tie with a stored zero."""
    DROPPED = 3
    """Was there and ranked too low."""
    DROPPED_TIED = 4
    """Was there, and went though it scored as much as one that stayed, or beyond the stated count."""
    DISPLACED = 5
    """Survived the drop, and lost its place to a growing entry that could not be told from it."""
    GROWN_BY_SCORE = 6
    """Was not there, and had one of the largest gradients or momenta."""
    GROWN_BY_DRAW = 7
    """Was not there, and was drawn."""
    GROWN = 8
    """Was not there, and was chosen by a method's own rule."""
    GROWN_STALE = 9
    """Was not there, was chosen, and goes on from the number that was stored there unused."""
    REGROWN = 10
    """Was dropped and chosen again, and keeps its value."""
    REGROWN_ANEW = 11
    """Was dropped and chosen again, and starts like any grown entry."""


@dataclass(frozen=True)
class MaskExchange:
    """What one exchange made of a dense array and its mask; all arrays have the weight's shape.

    Attributes
    ----------
    mask : ndarray of bool
        The new mask.
    weights : ndarray
        The new weights; 0 outside the mask, unless the conventions keep what is stored there.
    slots : dict of str to ndarray
        The optimizer's arrays, carried across.
    dropped, grown : ndarray of bool
        What the criterion took out and what growth put in; an entry in both was regrown.
    fate : ndarray of int8
        A :class:`Fate` for each entry.
    """

    mask: np.ndarray
    weights: np.ndarray
    dropped: np.ndarray
    grown: np.ndarray
    slots: dict[str, np.ndarray] = field(default_factory=dict)
    fate: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))

    @property
    def regrown(self) -> np.ndarray:
        """Entries that were dropped and grown back."""
        return self.dropped & self.grown

    def counts(self) -> dict[str, int]:
        """Return how many entries met each fate, by its name; fates that none met are left out."""
        return {fate.name: count for fate in Fate if (count := int(np.count_nonzero(self.fate == fate)))}


class ArrayGradient:
    """A gradient that is there as a dense array.

    Parameters
    ----------
    array : ndarray
        The gradient, of the weight's shape.
    block_rows : int
        Rows that :meth:`blocks` hands out at a time.
    """

    def __init__(self, array: np.ndarray, block_rows: int = 1 << 30) -> None:
        self.array = array
        self.shape = array.shape
        self.block_rows = block_rows

    def on(self, support: Support) -> np.ndarray:
        """Return the entries on a support, in its order."""
        return self.array.reshape(-1)[support.flat]

    def dense(self) -> np.ndarray:
        """Return the array itself."""
        return self.array

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ``(row slice, block)``, rows ascending; a block is valid until the next is asked for."""
        matrix = self.array.reshape(self.shape[0], -1)
        for start in range(0, matrix.shape[0], self.block_rows):
            rows = slice(start, min(start + self.block_rows, matrix.shape[0]))
            block = matrix[rows].copy()
            yield rows, block
            block.fill(np.nan)  # whoever kept the buffer finds out
