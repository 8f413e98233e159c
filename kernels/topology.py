"""Kernels that change a topology: the choice between their definition and the compiled ones, and the checks of both.

They stand apart from the products because no layer needs them: exchanges of connections, and the arrays carried across.
See :mod:`refimpl.kernels.spec_topology` for what each returns.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np

from refimpl import kernels
from refimpl.kernels import spec, spec_topology
from refimpl.kernels.spec_topology import NEW, STRETCH
from refimpl.kernels.types import Pattern


def _tier() -> ModuleType:
    return spec_topology if kernels.tier() is spec else import_module("refimpl.kernels.cpu.topology")


def places(pattern: Pattern, start: int, stop: int, goes: np.ndarray | None = None) -> np.ndarray:
    """List the places of some entries; see :func:`refimpl.kernels.spec_topology.places`."""
    return _tier().places(pattern, start, stop, goes)


def free_places(taken: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return the free places of ascending ranks; see :func:`refimpl.kernels.spec_topology.free_places`."""
    return _tier().free_places(taken, ranks)


def exchange(
    old: Pattern, goes: np.ndarray, grown: np.ndarray, ranked: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take entries out of a pattern and put others in; see :func:`refimpl.kernels.spec_topology.exchange`.

    Raises
    ------
    ValueError
        If what is put in does not ascend strictly, lies outside the weight, or is kept.
    """
    rows, columns = old.matrix_shape
    size = rows * columns - (goes.size - int(np.count_nonzero(goes)) if ranked else 0)
    if grown.size and not (grown[1:] > grown[:-1]).all():
        raise ValueError("an exchange can only grow entries that are not kept, each once")
    if grown.size and not (grown[0] >= 0 and grown[-1] < size):
        what = "ranks of free places" if ranked else "flat positions of a support"
        raise ValueError(f"the {what} must ascend strictly within 0..{size - 1}")
    return _tier().exchange(old, goes, np.ascontiguousarray(grown), ranked)


def carry(source: np.ndarray, aligned: np.ndarray, fill: float, reset: bool) -> np.ndarray:
    """Carry an aligned array across an exchange; see :func:`refimpl.kernels.spec_topology.carry`."""
    return _tier().carry(source, aligned, fill, reset)


def collect(
    piece: np.ndarray, start: int, taken: np.ndarray, threshold: float, found: np.ndarray, scores: np.ndarray, held: int
) -> tuple[int, int]:
    """Append scores above a threshold to a list; see :func:`refimpl.kernels.spec_topology.collect`."""
    return _tier().collect(piece, start, taken, threshold, found, scores, held)


def shorten(found: np.ndarray, scores: np.ndarray, want: int) -> float:
    """Move the largest scores of a list to its front; see :func:`refimpl.kernels.spec_topology.shorten`."""
    return _tier().shorten(found, scores, want)


__all__ = ["NEW", "STRETCH", "carry", "collect", "exchange", "free_places", "places", "shorten"]
