r"""Sharing out: how a number of connections is divided among pools that can only hold so many.

Pool :math:`l` is to get :math:`R\,s_l / \sum_m s_m` of :math:`R` connections, but has room for :math:`c_l`. What does
not fit is shared among the others in the same proportions, and so on; the fractions that are left by rounding down go
to the pools where they are largest. The counts therefore add up to :math:`R` exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def share_out(total: int, shares: Sequence[float] | np.ndarray, room: Sequence[int] | np.ndarray) -> np.ndarray:
    """Divide ``total`` among pools in proportion to their shares, within their room.

    Parameters
    ----------
    total : int
        At least 0.
    shares : array_like of float, shape (pools,)
        At least 0. Where those of the pools that still have room are all 0, their room stands in for them.
    room : array_like of int, shape (pools,)
        Most that each can take.

    Returns
    -------
    ndarray of int64, shape (pools,)
        Counts whose sum is ``total``, each at most its room. Of equal fractions the earlier pool's is rounded up.

    Raises
    ------
    ValueError
        If there is not room for all, or a share is negative or not finite.
    """
    shares, room = np.asarray(shares, np.float64), np.asarray(room, np.int64)
    if not (np.isfinite(shares) & (shares >= 0)).all():
        raise ValueError(
            "the shares by which connections are divided must be finite and at least 0; training may have diverged, "
            "so lower the learning rate or clip the gradient"
        )
    if not 0 <= total <= room.sum():
        raise ValueError(
            f"{total} connections are to be shared out but there is room for {room.sum()}; lower the drop fraction, or "
            "let dropped entries grow back (regrow 'keep' or 'reset')"
        )
    counts = np.zeros(room.size, np.int64)
    open_ = room > 0
    while True:
        rest = total - int(counts.sum())
        weights = np.where(open_, shares, 0.0)
        if not weights.any():
            weights = np.where(open_, room, 0).astype(np.float64)
        if weights.any():
            weights /= weights.max()  # so that their sum neither overflows nor underflows
        quota = rest * (weights / max(weights.sum(), 1.0))
        full = open_ & (quota >= room)
        if not full.any():
            break
        counts[full] = room[full]
        open_ &= ~full
    counts[open_] = np.floor(quota[open_]).astype(np.int64)
    fraction = np.where(open_ & (weights > 0), quota - counts, -1.0)  # a floor below the room leaves space for one more
    up = np.argsort(-fraction, kind="stable")[: total - int(counts.sum())]
    counts[up] += 1
    return counts
