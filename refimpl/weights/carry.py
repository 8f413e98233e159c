"""Carrying arrays across a change of support: the one place where a topology changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refimpl.kernels import topology
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

    It holds five or nine bytes for each entry: a flag for each old one, and for each new one where it comes from, which
    all aligned arrays are carried by. The lists of positions are made when they are asked for.

    Attributes
    ----------
    old, new : Support
        The support before and after.
    goes : ndarray of bool, shape (old.nnz,)
        The entries that the drop criterion took out.
    source : ndarray of int32 or int64, shape (new.nnz,)
        Place among the old entries of one that was kept; −1 for one that growth put in; and −2 − its old place for one
        that was dropped and grown back, that is, *regrown*.
    """

    old: Support
    new: Support
    goes: np.ndarray
    source: np.ndarray

    @property
    def dropped(self) -> np.ndarray:
        """Flat positions that the drop criterion took out, ascending, int64; a subset of ``old``."""
        return topology.places(self.old, 0, self.old.nnz, ~self.goes)

    @property
    def grown(self) -> np.ndarray:
        """Flat positions that growth put in, ascending, int64; a subset of ``new``, disjoint from what was kept."""
        return topology.places(self.new, 0, self.new.nnz, self.source >= 0)

    @property
    def regrown(self) -> np.ndarray:
        """Flat positions that were dropped and grown back in this exchange."""
        return topology.places(self.new, 0, self.new.nnz, self.source >= topology.NEW)

    def counts(self) -> dict[str, int]:
        """Return how many entries were dropped, grown, and of these grown back, without listing them."""
        return {
            "dropped": int(np.count_nonzero(self.goes)),
            "grown": int(np.count_nonzero(self.source < 0)),
            "regrown": int(np.count_nonzero(self.source < topology.NEW)),
        }

    @classmethod
    def of(cls, old: Support, dropped: np.ndarray, grown: np.ndarray) -> Exchange:
        """Build the exchange that removes ``dropped`` from ``old`` and then adds ``grown``.

        Raises
        ------
        ValueError
            If a dropped entry is not stored, a grown one is stored and not dropped, or one of either stands in the list
            twice.
        """
        at = old.positions_of(np.asarray(dropped, np.int64))
        if (at < 0).any():
            raise ValueError("an exchange can only drop entries that are stored")
        goes = np.zeros(old.nnz, bool)
        goes[at] = True
        if np.count_nonzero(goes) != at.size:
            raise ValueError("an exchange can drop an entry once; the list of dropped entries holds one twice")
        return cls.moving(old, goes, np.sort(np.asarray(grown, np.int64)))

    @classmethod
    def moving(cls, old: Support, goes: np.ndarray, grown: np.ndarray, *, ranked: bool = False) -> Exchange:
        """Build the exchange from a flag for each old entry, and what grows; see :meth:`Support.exchanged`."""
        new, source = old.exchanged(goes, grown, ranked=ranked)
        return cls(old, new, goes, source)

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
        return topology.carry(self.source, aligned, rule.grown, rule.regrown == "reset")
