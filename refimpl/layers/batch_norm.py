r"""Batch normalisation: each channel is shifted and scaled to mean 0 and variance 1 over a batch, then by what is
learned.

With :math:`n` numbers of a channel in the batch, over all positions and samples,

.. math::
    \mu = \frac1n \sum_k x_k, \quad \sigma^2 = \frac1n \sum_k (x_k - \mu)^2, \quad
    \hat x_k = \frac{x_k - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad y_k = \gamma \hat x_k + \beta.

In training, the running statistics move towards those of the batch, the variance taken as the unbiased
:math:`\frac{n}{n-1}\sigma^2`: :math:`r \leftarrow (1 - m)\, r + m\, s` with momentum :math:`m`. In evaluation,
:math:`\mu` and :math:`\sigma^2` are the running statistics, which are then constants.

*Backward.* :math:`d\beta = \sum_k dy_k`, :math:`d\gamma = \sum_k dy_k \hat x_k`, and :math:`d\hat x = \gamma\, dy`.
Every input moves the mean and the variance too: with :math:`s = 1 / \sqrt{\sigma^2 + \epsilon}`,
:math:`\partial \hat x_j / \partial x_k = s\, (\delta_{jk} - \frac1n - \frac1n \hat x_j \hat x_k)`, and so in training

.. math:: dx_k = \gamma s \left( dy_k - \frac{d\beta}{n} - \hat x_k \frac{d\gamma}{n} \right),

in evaluation :math:`dx_k = \gamma s\, dy_k`.

Sources: Ioffe, Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
ICML 2015, algorithm 1; names, the unbiased running variance and the meaning of the momentum are those of PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.weights import Grads, Params, add_to, values_of

Buffers = dict[str, np.ndarray]
"""Arrays of a model that are not trained, by name."""


class Names(NamedTuple):
    """Names of a layer's parameters and buffers."""

    weight: str  # gamma
    bias: str  # beta
    running_mean: str
    running_var: str
    num_batches_tracked: str


class Cache(NamedTuple):
    """What backward needs."""

    names: Names
    normalised: np.ndarray  # (C, n): x hat, for d gamma and, in training, dx
    slope: np.ndarray  # (C, 1): gamma / sqrt(variance + eps), for dx
    train: bool  # whether mean and variance were those of the batch and moved with it


def names(name: str) -> Names:
    """Return the names of a layer's parameters and buffers, as in a PyTorch state dict."""
    return Names(*(f"{name}.{part}" for part in Names._fields))


def new_buffers(name: str, channels: int, dtype: Any) -> Buffers:
    """Return the running statistics before the first batch: mean 0, variance 1, no batch seen."""
    of = names(name)
    return {
        of.running_mean: np.zeros(channels, dtype),
        of.running_var: np.ones(channels, dtype),
        of.num_batches_tracked: np.array(0, np.int64),
    }


def forward(
    params: Params,
    buffers: Buffers,
    name: str,
    x: np.ndarray,
    *,
    train: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> tuple[np.ndarray, Cache, Buffers]:
    r"""Normalise each channel.

    Parameters
    ----------
    params : Params
        With ``name.weight`` :math:`\gamma` and ``name.bias`` :math:`\beta`, shape (C,).
    buffers : Buffers
        With ``name.running_mean`` and ``name.running_var``, shape (C,), and ``name.num_batches_tracked``, a number. Not
        changed.
    name : str
        Of the layer.
    x : ndarray, shape (C, ..., B)
        Images (channels, height, width, batch), or (features, batch).
    train : bool
        Whether to normalise by the statistics of the batch, and take them into the running ones.
    momentum : float or None
        Weight of the new statistics in the running ones; None gives each batch the same weight.
    eps : float

    Returns
    -------
    y : ndarray
        In the shape of ``x``.
    cache : Cache
    buffers : Buffers
        This layer's buffers after the batch, new arrays under the same names; in evaluation those that were given.

    Raises
    ------
    ValueError
        If the channels do not fit the parameters, or in training a channel has only one number, whose variance says
        nothing.
    """
    of = names(name)
    gamma, beta = values_of(params[of.weight]), values_of(params[of.bias])
    if x.ndim < 2 or gamma.shape != x.shape[:1] or beta.shape != gamma.shape:
        raise ValueError(
            f"got an array of shape {x.shape}, {of.weight} of shape {gamma.shape} and {of.bias} of shape {beta.shape}; "
            "batch norm takes (channels, ..., batch) and one number of each for every channel"
        )
    flat = x.reshape(len(x), -1)
    n = flat.shape[1]
    updated = {key: buffers[key] for key in (of.running_mean, of.running_var, of.num_batches_tracked)}
    if train:
        if n < 2:
            raise ValueError(
                f"{name} has {n} number for each channel of an array of shape {x.shape}; to train, batch norm needs "
                "two or more: give a larger batch or larger images"
            )
        mean = flat.mean(axis=1)
        centred = flat - mean[:, None]
        var = (centred * centred).mean(axis=1)
        tracked = updated[of.num_batches_tracked] + 1
        m = 1 / float(tracked) if momentum is None else momentum
        updated = {
            of.running_mean: (1 - m) * updated[of.running_mean] + m * mean,
            of.running_var: (1 - m) * updated[of.running_var] + m * (n / (n - 1)) * var,
            of.num_batches_tracked: np.array(tracked),
        }
    else:
        centred = flat - updated[of.running_mean][:, None]
        var = updated[of.running_var]
    scale = 1 / np.sqrt(var + eps)
    normalised = np.multiply(centred, scale[:, None], out=centred)
    y = gamma[:, None] * normalised
    y += beta[:, None]
    return y.reshape(x.shape), Cache(of, normalised, (gamma * scale)[:, None], train), updated


def backward(dy: np.ndarray, cache: Cache, grads: Grads, *, input_gradient: bool = True) -> np.ndarray | None:
    """Add the gradients of weight and bias to ``grads`` and return ``dx``, or None if it is not wanted."""
    flat = dy.reshape(len(dy), -1)
    n = flat.shape[1]
    d_gamma, d_beta = (flat * cache.normalised).sum(axis=1), flat.sum(axis=1)
    add_to(grads, cache.names.weight, d_gamma)
    add_to(grads, cache.names.bias, d_beta)
    if not input_gradient:
        return None
    if not cache.train:
        return (cache.slope * flat).reshape(dy.shape)
    dx = flat - (d_beta / n)[:, None]
    dx -= cache.normalised * (d_gamma / n)[:, None]
    dx *= cache.slope
    return dx.reshape(dy.shape)
