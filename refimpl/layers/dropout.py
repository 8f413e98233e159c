r"""Dropout: :math:`y = x \odot m / (1 - p)` with :math:`m \sim \mathrm{Bernoulli}(1 - p)`; backward is the same
product.

*Plain* dropout draws every number; *locked* (variational) dropout draws one mask for each feature and sequence and uses
it at every time step of the window.
"""

from __future__ import annotations

import numpy as np

Cache = np.ndarray | None
"""The mask, already divided by ``1 - p``; None if nothing was dropped."""


def forward(
    x: np.ndarray, p: float, *, locked: bool = False, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, Cache]:
    """Drop numbers of ``x`` (T, F, B) with probability ``p``; without ``rng``, as in evaluation, return ``x``."""
    if rng is None or p == 0:
        return x, None
    shape = x.shape[1:] if locked else x.shape
    kept = rng.random(shape, dtype=np.float32) >= np.float32(p)
    scale = kept * x.dtype.type(1 / (1 - p))
    return x * scale, scale


def backward(dy: np.ndarray, cache: Cache) -> np.ndarray:
    """Return the gradient of ``x``."""
    return dy if cache is None else dy * cache
