"""Carrying arrays across a change of support: the one place where a topology changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refimpl.weights.support import Support


@dataclass(frozen=True)
class CarryRule:
    """What an aligned array holds for an entry after an exchange.

    A *kept* entry always keeps its number, and a *dropped* one has none. The rest is a convention:

    Attributes
    ----------
    grown : float
        Number of an entry that was not stored before.
    regrown : {"keep", "reset"}
        An entry that the same exchange dropped and grew again: it keeps its old number, or is treated as grown.
        Public implementations nearly all keep weights; for optimizer state they differ.
    """

    grown: float = 0.0
    regrown: Literal["keep", "reset"] = "keep"


KEEP = CarryRule()
"""Zero for what is new; what was dropped and regrown at once continues."""


@dataclass(frozen=True)
class Exchange:
    """A change of one weight's support, and what happened to which entry.

    Attributes
    ----------
    old, new : Support
        The support before and after.
    dropped : ndarray of int64
        Flat positions that the drop criterion took out, ascending; a subset of ``old``.
    grown : ndarray of int64
        Flat positions that growth put in, ascending; a subset of ``new``, disjoint from what the drop kept. An entry in
        both ``dropped`` and ``grown`` was *regrown*.
    """

    old: Support
    new: Support
    dropped: np.ndarray
    grown: np.ndarray

    @property
    def regrown(self) -> np.ndarray:
        """Flat positions that were dropped and grown back in this exchange."""
        return np.intersect1d(self.dropped, self.grown, assume_unique=True)

    @classmethod
    def of(cls, old: Support, dropped: np.ndarray, grown: np.ndarray) -> Exchange:
        """Build the exchange that removes ``dropped`` from ``old`` and then adds ``grown``.

        Raises
        ------
        ValueError
            If a dropped entry is not stored, a grown one is stored and not dropped, or one of either stands in the list
            twice.
        """
        dropped, grown = np.sort(dropped).astype(np.int64), np.sort(grown).astype(np.int64)
        if (old.positions_of(dropped) < 0).any():
            raise ValueError("an exchange can only drop entries that are stored")
        if (np.diff(dropped) == 0).any():
            raise ValueError("an exchange can drop an entry once; the list of dropped entries holds one twice")
        kept = np.setdiff1d(old.flat, dropped, assume_unique=True)
        merged = np.concatenate([kept, grown])
        merged.sort(kind="stable")  # two sorted runs: timsort merges them in one pass
        if (np.diff(merged) == 0).any():
            raise ValueError("an exchange can only grow entries that are not kept, each once")
        return cls(old, Support(old.shape, merged), dropped, grown)

    def carry(self, aligned: np.ndarray, rule: CarryRule = KEEP) -> np.ndarray:
        """Return an array aligned with ``new`` from one aligned with ``old``.

        Parameters
        ----------
        aligned : ndarray, shape (old.nnz, ...)
            Values, or one slot of an optimizer.
        rule : CarryRule
            What grown and regrown entries get.

        Returns
        -------
        ndarray, shape (new.nnz, ...)
            A new array; ``aligned`` is unchanged.

        Raises
        ------
        ValueError
            If ``aligned`` has not one number for each entry of ``old``.
        """
        if len(aligned) != self.old.nnz:
            raise ValueError(
                f"an array aligned with {self.old.nnz} entries is carried; got one of length {len(aligned)}"
            )
        source = self.old.positions_of(self.new.flat)
        if rule.regrown == "reset":
            source[self.new.positions_of(self.regrown)] = -1
        out = np.full((self.new.nnz, *aligned.shape[1:]), rule.grown, aligned.dtype)
        stays = source >= 0
        out[stays] = aligned[source[stays]]
        return out
