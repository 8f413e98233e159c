r"""Embedding: column :math:`x_t = W_{w_t,:}^\top` for token :math:`w_t`.

Embedding-word dropout (Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
networks", NIPS 2016) drops whole words: one Bernoulli draw for each row of ``W``, so a word that occurs twice in a
window is dropped in both places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.weights import EmbeddingGrad, Grads, Params, add_to


class Cache(NamedTuple):
    """What backward needs."""

    name: str
    shape: tuple[int, ...]
    tokens: np.ndarray  # (T, B): which rows were read
    scale: np.ndarray | None  # (T, 1, B): 0 or 1/keep for each token's row


def forward(
    params: Params, name: str, tokens: np.ndarray, *, dropout: float = 0.0, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, Cache]:
    """Look up rows.

    Parameters
    ----------
    params : Params
    name : str
        The weight, of shape (V, E).
    tokens : ndarray of int, shape (T, B)
    dropout : float
        Probability that a row is dropped; rows that stay are divided by ``1 - dropout``.
    rng : numpy.random.Generator, optional
        Draws the rows; no dropout without it.

    Returns
    -------
    x : ndarray, shape (T, E, B)
    cache : Cache
    """
    w = params[name]
    x = kernels.embed(w, tokens)
    scale = None
    if dropout > 0 and rng is not None:
        rows = (rng.random(w.shape[0]) >= dropout) / (1 - dropout)
        scale = rows.astype(x.dtype)[tokens][:, None, :]
        x *= scale
    return x, Cache(name, w.shape, tokens, scale)


def backward(dx: np.ndarray, cache: Cache, grads: Grads) -> None:
    r"""Add the embedding's gradient to ``grads``: :math:`dW_{v,:} = \sum_{t: w_t = v} dx_t`."""
    if cache.scale is not None:
        dx = dx * cache.scale
    add_to(grads, cache.name, EmbeddingGrad(cache.shape, cache.tokens, dx))
