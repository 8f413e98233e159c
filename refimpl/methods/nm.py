r"""N:M sparsity: of each M consecutive weights along the reduction axis, N are kept.

A product :math:`y_o = \sum_c W_{oc} x_c` sums over the columns of a row; the groups lie along it, because hardware
skips within a sum. The columns of a linear or recurrent weight stand in that order already. The last axes of a
convolution's weight (O, I, kH, kW) are positions in the kernel; its columns are taken in the order (kH, kW, I), so that
a group holds input channels of one position (or, where I is no multiple of M, of neighbouring ones).

Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR 2021, with the
order of a convolution's columns from its authors' program.

Deviations
----------
- Of equal scores the lower position is kept. The authors' program leaves that to an unstable sort; jaxpruner sorts
  ascending and keeps the last N, so that there the *higher* position wins.
- Groups do not run on from one row into the next: the number of columns must be a multiple of M, where other
  programs ask only that the number of entries is.
"""

from __future__ import annotations

import numpy as np

from refimpl.weights.support import Shape

Pattern = tuple[int, int]
"""(N, M)."""


def require_pattern(n: int, m: int) -> None:
    """Raise a ValueError unless ``1 <= n <= m``, whole numbers."""
    whole = all(isinstance(k, (int, np.integer)) and not isinstance(k, bool) for k in (n, m))
    if not whole or not 1 <= n <= m:
        raise ValueError(f"the pattern is {n}:{m}; give whole numbers N:M with 1 <= N <= M, such as 2:4")


def check_nm(shape: Shape, n: int, m: int, name: str = "a tensor") -> None:
    """Raise a ValueError unless a weight of this shape can have the pattern: rows of a multiple of M columns."""
    require_pattern(n, m)
    columns = int(np.prod(shape[1:]))
    if len(shape) < 2 or columns % m:
        raise ValueError(
            f"{name} of shape {tuple(shape)} has rows of {columns if len(shape) > 1 else 1} entries, which do not "
            f"divide into groups of {m} for the pattern {n}:{m}; choose sizes that are multiples of {m}, or leave "
            "this tensor out"
        )


def nm_order(shape: Shape) -> np.ndarray:
    """Return the order in which a weight's columns are grouped.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (O, C) or (O, I, kH, kW) with ``C = I kH kW`` columns.

    Returns
    -------
    ndarray of int64, shape (C,)
        ``w.reshape(O, -1)[:, order]`` has the columns in the order of the groups: channels innermost.
    """
    columns = np.arange(int(np.prod(shape[1:])))
    return np.moveaxis(columns.reshape(shape[1:]), 0, -1).reshape(-1)


def nm_keep(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Choose the n largest scores of each m consecutive ones along the last axis.

    Parameters
    ----------
    scores : ndarray, shape (rows, columns)
        With columns a multiple of m.
    n, m : int
        The pattern.

    Returns
    -------
    ndarray of bool, shape (rows, columns)
        True in exactly n places of each group; of equal scores the lower position is kept.

    Raises
    ------
    ValueError
        If m does not divide the columns, n is not in 1..m, or a score is NaN.
    """
    check_nm(scores.shape, n, m, "an array of scores")
    if np.isnan(scores).any():
        raise ValueError("a score to be ranked is NaN; training has diverged, or a gradient overflowed")
    groups = scores.reshape(-1, m)
    best = np.argsort(-groups, axis=1, kind="stable")[:, :n]
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, best, True, axis=1)
    return keep.reshape(scores.shape)


def nm_flat(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return the ascending flat positions that the pattern keeps in a weight of any shape, given its scores."""
    order = nm_order(scores.shape)
    matrix = scores.reshape(scores.shape[0], -1)
    keep = np.empty(matrix.shape, bool)
    keep[:, order] = nm_keep(matrix[:, order], n, m)
    return np.flatnonzero(keep)
