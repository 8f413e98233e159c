r"""Softmax cross-entropy over a large vocabulary, fused with the decoder that makes its logits.

For logits :math:`z = W h + b` and target :math:`y`: :math:`\ell = \log \sum_j e^{z_j} - z_y`,
:math:`dz = \mathrm{softmax}(z) - e_y`. The logits are overwritten by their gradient, so there is never more than one
array of vocabulary × columns. Columns are regrouped into the kernels' panels once, here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.layers import linear
from refimpl.weights import Grads, Params


class Cache(NamedTuple):
    """What backward needs."""

    d_logits: np.ndarray  # (panels, V, width): gradient of the mean loss
    linear: linear.Cache
    shape: tuple[int, ...]  # of the input


def forward(params: Params, weight: str, bias: str | None, x: np.ndarray, targets: np.ndarray) -> tuple[float, Cache]:
    """Return the mean loss in nats of predicting ``targets``.

    Parameters
    ----------
    x : ndarray, shape (T, H, B)
    targets : ndarray of int, shape (T, B)

    Returns
    -------
    loss : float
        Mean over the T · B positions.
    cache : Cache
    """
    scale = 1.0 / targets.size
    panels = kernels.to_panels(x)
    grouped = kernels.to_panels(targets[:, None, :], fill=-1, itemsize=x.itemsize)[:, 0, :]
    logits, cache = linear.forward(params, weight, bias, panels)
    total = kernels.softmax_cross_entropy(logits, grouped, scale)
    return total * scale, Cache(logits, cache, x.shape)


def backward(cache: Cache, grads: Grads) -> np.ndarray:
    """Add the decoder's gradients to ``grads`` and return ``dx`` (T, H, B)."""
    dx = linear.backward(cache.d_logits, cache.linear, grads)
    assert dx is not None
    return kernels.from_panels(dx, cache.shape)
