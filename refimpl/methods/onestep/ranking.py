"""Ranking dense arrays: the best of equal scores by a written order."""

from __future__ import annotations

import numpy as np


def best(scores: np.ndarray, count: int, order: np.ndarray | None, among: np.ndarray | None = None) -> np.ndarray:
    """Flag the ``count`` entries of largest score.

    Parameters
    ----------
    scores : ndarray, shape (n,)
        Real numbers.
    count : int
        At most as many as there are; more flag all.
    order : ndarray of numbers, shape (n,), optional
        Of equal scores the entry of lower ``order`` wins; by default the lower position.
    among : ndarray of bool, shape (n,), optional
        The entries that take part.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    places = np.arange(scores.size) if among is None else np.flatnonzero(among)
    ranks = places if order is None else order[places]
    flags = np.zeros(scores.size, bool)
    flags[places[np.lexsort((places, ranks, -scores[places]))[: max(count, 0)]]] = True
    return flags


def refuse_nan(scores: np.ndarray, what: str) -> None:
    """Raise a ValueError if a score is NaN."""
    if np.isnan(scores).any():
        raise ValueError(f"{what} to be ranked is NaN; training has diverged, so lower the learning rate or clip it")


def same_shapes(shape: tuple[int, ...], arrays: dict[str, np.ndarray | None]) -> None:
    """Raise a ValueError if an array has another shape than the weight."""
    for name, array in arrays.items():
        if array is not None and np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)} but the weight has {shape}; give the same shape")
