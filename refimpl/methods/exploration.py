r"""Exploration: which places have ever been active, the accounting of in-time over-parametrization.

With :math:`A_t` the active places of a tensor of n entries at step t, the fraction of the parameters that training has
explored is

.. math:: R_s = \frac{\sum_l \bigl|\bigcup_t A_{l,t}\bigr|}{\sum_l n_l},

over the tensors that are sparse. It starts at the density and never falls. A place that is dropped and grown at once,
or grown for the second time, counts once.

Memory is one bit for each place, n/8 bytes for a tensor. It grows with the dense size, not with the density: at a
density of 1/32 it is as much as the values in float32.

Source: Liu, Yin, Mocanu, Pechenizkiy, "Do we actually need dense over-parameterization? In-time over-parameterization
in sparse training", ICML 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.weights.support import Support

_BYTES = 1 << 14
"""Bytes of a tensor's bits that are looked at together when places are counted through."""


class Explored:
    """The places of each tensor that were ever active; see the module.

    Only sparse tensors belong here: those that are dense would raise the fraction without having been explored.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._bits: dict[str, np.ndarray] = {}

    def update(self, name: str, support: Support) -> None:
        """Add the places of a support; the first one of a tensor registers it. O(nnz) time and memory.

        Raises
        ------
        ValueError
            If the tensor had another size before.
        """
        size = self._sizes.setdefault(name, support.size)
        if size != support.size:
            raise ValueError(
                f"{name} had {size} entries and now has {support.size}; keep a new record for another model"
            )
        bits = self._bits.setdefault(name, np.zeros(-(-size // 8), np.uint8))
        if support.nnz == size:
            bits[:] = 0xFF
            bits[-1:] >>= -size % 8  # no place lies behind the last bit
        elif support.nnz:
            flat = support.flat
            byte, bit = flat >> 3, np.left_shift(1, flat & 7).astype(np.uint8)
            first = np.flatnonzero(np.diff(byte, prepend=-1))
            bits[byte[first]] |= np.bitwise_or.reduceat(bit, first)

    @property
    def names(self) -> list[str]:
        """The tensors that were ever updated."""
        return list(self._sizes)

    def count(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """Return how many places of ``start <= p < stop`` were ever active."""
        stop = self._sizes[name] if stop is None else stop
        return sum(int(np.count_nonzero(piece)) for _, piece in self._pieces(name, start, stop))

    def fraction(self, name: str) -> float:
        """Return the fraction of a tensor's places that were ever active."""
        return self.count(name) / self._sizes[name]

    def overall(self) -> float:
        r"""Return :math:`R_s` over all tensors; 0 if there is none."""
        explored = sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in self._bits.values())
        return explored / max(1, sum(self._sizes.values()))

    def mask(self, name: str) -> np.ndarray:
        """Return a flag for each place, shape (n,) (dense, for people and tests)."""
        return np.unpackbits(self._bits[name], count=self._sizes[name], bitorder="little").astype(bool)

    def unexplored(self, name: str, start: int, stop: int, ranks: np.ndarray) -> np.ndarray:
        """Find places that were never active by their ranks among those of ``start <= p < stop``.

        Parameters
        ----------
        name : str
        start, stop : int
        ranks : ndarray of int64
            Ascending, from 0.

        Returns
        -------
        ndarray of int64
            Flat positions, ascending. Beside them, memory is that of one piece.

        Raises
        ------
        ValueError
            If there are fewer such places.
        """
        found, passed, done = [], 0, 0
        for at, piece in self._pieces(name, start, stop):
            if done == ranks.size:
                break
            free = np.flatnonzero(~piece)
            here = int(np.searchsorted(ranks, passed + free.size))
            found.append(at + free[ranks[done:here] - passed])
            passed, done = passed + free.size, here
        if done < ranks.size:
            raise ValueError(f"{name} has {passed} places that were never active; ask for ranks below that number")
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _pieces(self, name: str, start: int, stop: int) -> Any:
        """Yield (first place, a flag for each place from there on), a bounded number of places at a time."""
        bits = self._bits[name]
        for low in range(start >> 3, -(-stop // 8), _BYTES):
            piece = np.unpackbits(bits[low : low + _BYTES], bitorder="little").astype(bool)
            first, last = max(start, 8 * low), min(stop, 8 * low + piece.size)
            yield first, piece[first - 8 * low : last - 8 * low]

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes of the tensors, fit for JSON."""
        return {"sizes": dict(self._sizes)}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the bits of each tensor: uint8 of length ⌈n/8⌉, place p at bit p mod 8 of byte p div 8."""
        return dict(self._bits)

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up what :meth:`state_dict` and :meth:`state_arrays` returned.

        Raises
        ------
        ValueError
            If the bits of a tensor are missing or have another length.
        """
        arrays = arrays or {}
        sizes = {name: int(size) for name, size in state["sizes"].items()}
        for name, size in sizes.items():
            if name not in arrays or arrays[name].shape != (-(-size // 8),):
                raise ValueError(
                    f"the saved record of explored places lacks the bits of {name}; pass what state_arrays() returned"
                )
        self._sizes = sizes
        self._bits = {name: np.array(arrays[name], np.uint8) for name in sizes}
