r"""Batch normalisation: each channel is shifted and scaled to mean 0 and variance 1 over a batch, then by what is
learned.

With :math:`n` numbers of a channel in the batch, over all positions and samples,

.. math::
    \mu = \frac1n \sum_k x_k, \quad \sigma^2 = \frac1n \sum_k (x_k - \mu)^2, \quad
    \hat x_k = \frac{x_k - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad y_k = \gamma \hat x_k + \beta.

In training, the running statistics move towards those of the batch, the variance taken as the unbiased
:math:`\frac{n}{n-1}\sigma^2`: :math:`r \leftarrow (1 - m)\, r + m\, s` with momentum :math:`m`. In evaluation,
:math:`\mu` and :math:`\sigma^2` are the running statistics, which are then constants.

What usually follows is done in the same pass over the memory: something of the same shape is added, and the sum is
rectified, :math:`\max(y + a, 0)`; below, :math:`dy` is then 0 where that is, and is the gradient of :math:`a` too.

*Backward.* :math:`d\beta = \sum_k dy_k`, :math:`d\gamma = \sum_k dy_k \hat x_k`, and :math:`d\hat x = \gamma\, dy`.
Every input moves the mean and the variance too: with :math:`s = 1 / \sqrt{\sigma^2 + \epsilon}`,
:math:`\partial \hat x_j / \partial x_k = s\, (\delta_{jk} - \frac1n - \frac1n \hat x_j \hat x_k)`, and so in training

.. math:: dx_k = \gamma s \left( dy_k - \frac{d\beta}{n} - \hat x_k \frac{d\gamma}{n} \right),

in evaluation :math:`dx_k = \gamma s\, dy_k`. The input is kept for this, and :math:`\hat x` computed again.

Sources: Ioffe, Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
ICML 2015, algorithm 1; names, the unbiased running variance and the meaning of the momentum are those of PyTorch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from refimpl.kernels import images
from refimpl.layers.padded import Padded
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
    x: Padded  # with or without a margin: for x hat
    y: Padded | None  # likewise: the output, if something was added and all rectified: where it is 0
    gamma: np.ndarray  # (C,)
    beta: np.ndarray | None  # (C,): if only what was normalised was rectified, whose sign is then computed again
    mean: np.ndarray  # (C,)
    scale: np.ndarray  # (C,): 1 / sqrt(variance + eps)
    train: bool  # whether mean and variance were those of the batch and moved with it
    added: bool  # whether something was added
    shape: tuple[int, ...]  # (C, ..., B), of the input


class Backward(NamedTuple):
    """Gradients of the inputs.

    Attributes
    ----------
    dx : ndarray, Padded or None
        None if it was not wanted.
    added : ndarray, Padded or None
        Gradient of what was added; ``dy`` itself where nothing was rectified. None if nothing was added, or no
        gradient of an input was wanted.
    """

    dx: Any
    added: Any


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
    name: str,
    x: np.ndarray | Padded,
    *,
    train: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    add: np.ndarray | Padded | None = None,
    rectify: bool = False,
    margin: int = 0,
) -> tuple[Any, Cache, Buffers]:
    r"""Normalise each channel, add something, and rectify the sum.

    Parameters
    ----------
    params : Params
        With ``name.weight`` :math:`\gamma` and ``name.bias`` :math:`\beta`, shape (C,), and the buffers
        ``name.running_mean`` and ``name.running_var``, shape (C,), and ``name.num_batches_tracked``, a number. Not
        changed.
    name : str
        Of the layer.
    x : ndarray or Padded, shape (C, ..., B)
        Images (channels, height, width, batch), or (features, batch). Kept, and must not be changed until backward.
    train : bool
        Whether to normalise by the statistics of the batch, and take them into the running ones.
    momentum : float or None
        Weight of the new statistics in the running ones; None gives each batch the same weight.
    eps : float
    add : ndarray or Padded, optional
        In the shape of ``x``, added to what was normalised.
    rectify : bool
        Whether the output is :math:`\max(\cdot, 0)` of all that; NaN stays NaN.
    margin : int
        Pixels of zeros to write the output into.

    Returns
    -------
    y : ndarray, or Padded with a margin
        In the shape of ``x``.
    cache : Cache
    buffers : Buffers
        This layer's buffers after the batch, new arrays under the same names; in evaluation none.

    Raises
    ------
    ValueError
        If the channels do not fit the parameters, or ``add`` not ``x``, or what gets a margin is no image; or in
        training a channel has only one number, whose variance says nothing.
    """
    of = names(name)
    gamma, beta = values_of(params[of.weight]), values_of(params[of.bias])
    shape = x.shape
    _check(of, shape, x.dtype, gamma, beta, add, margin)
    framed, more = Padded.of(x), None if add is None else Padded.of(add)
    out = Padded.unfilled(framed.shape, np.result_type(x.dtype, gamma), margin)
    n = math.prod(shape[1:])
    if train and n < 2:
        raise ValueError(
            f"{name} has {n} number for each channel of an array of shape {shape}; to train, batch norm needs two or "
            "more: give a larger batch or larger images"
        )
    running = values_of(params[of.running_mean]), values_of(params[of.running_var])
    mean, var = images.batch_norm(
        framed, gamma, beta, eps, out, statistics=None if train else running, add=more, rectify=rectify
    )
    buffers: Buffers = {}
    if train:
        tracked = values_of(params[of.num_batches_tracked]) + 1
        m = 1 / float(tracked) if momentum is None else momentum
        new = mean, n / (n - 1) * var
        for key, old, now in zip((of.running_mean, of.running_var), running, new, strict=True):
            buffers[key] = ((1 - m) * old + m * now).astype(np.result_type(old, x.dtype))
        buffers[of.num_batches_tracked] = np.asarray(tracked)
    kept, signs = (None, beta) if add is None else (out, None)
    cache = Cache(
        of, framed, kept if rectify else None, gamma, signs if rectify else None, mean.astype(out.dtype),
        images.scale_of(var, eps, out.dtype), train, add is not None, shape,
    )  # fmt: skip
    return out if margin else out.whole.reshape(shape), cache, buffers


def backward(
    dy: np.ndarray | Padded, cache: Cache, grads: Grads, *, input_gradient: bool = True, margin: int = 0
) -> Backward:
    """Add the gradients of weight and bias to ``grads`` and return those of the inputs.

    Parameters
    ----------
    dy : ndarray or Padded, shape (C, ..., B)
        Not changed.
    cache : Cache
    grads : Grads
    input_gradient : bool
        Whether gradients of the inputs are wanted.
    margin : int
        Pixels of zeros to write ``dx`` into, which then is a Padded.
    """
    if dy.shape != cache.shape or dy.dtype != cache.x.dtype:
        raise ValueError(
            f"dy is {dy.dtype} of shape {dy.shape}; it must be {cache.x.dtype} of shape {cache.shape}, as the output"
        )
    framed = Padded.of(dy)
    dx = Padded.unfilled(framed.shape, framed.dtype, margin) if input_gradient else None
    rectified = input_gradient and cache.added and cache.y is not None
    added = Padded.unfilled(framed.shape, framed.dtype, 0) if rectified else None
    d_gamma, d_beta = images.batch_norm_backward(
        framed, cache.x, cache.y, cache.mean, cache.scale, cache.gamma, dx, moving=cache.train, beta=cache.beta,
        added=added,
    )  # fmt: skip
    add_to(grads, cache.names.weight, d_gamma)
    add_to(grads, cache.names.bias, d_beta)
    if dx is None:
        return Backward(None, None)
    beside = None if not cache.added else dy if added is None else added.whole.reshape(cache.shape)
    return Backward(dx if margin else dx.whole.reshape(cache.shape), beside)


def _check(
    of: Names, shape: tuple[int, ...], dtype: Any, gamma: np.ndarray, beta: np.ndarray, add: Any, margin: int
) -> None:
    """Raise ValueError unless the arrays fit each other."""
    if len(shape) < 2 or gamma.shape != shape[:1] or beta.shape != gamma.shape:
        raise ValueError(
            f"got an array of shape {shape}, {of.weight} of shape {gamma.shape} and {of.bias} of shape {beta.shape}; "
            "batch norm takes (channels, ..., batch) and one number of each for every channel"
        )
    if add is not None and (add.shape != shape or add.dtype != dtype):
        raise ValueError(
            f"{of.weight} normalises {dtype} of shape {shape} and is to add {add.dtype} of shape {add.shape}; give "
            "both in one shape and type"
        )
    if margin and len(shape) != 4:
        raise ValueError(
            f"got an array of shape {shape} and a margin of {margin}; only images (channels, height, width, batch) "
            "have one"
        )
