r"""LSTM layer over a window, with carried state: truncated back-propagation through time.

.. math::
    a_t &= W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
    (i, f, o) &= \sigma(a^i_t, a^f_t, a^o_t), \quad g = \tanh(a^g_t) \\
    c_t &= f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh(c_t)

Names, shapes and gate order (i, f, g, o) are those of ``torch.nn.LSTM``, including its two biases, whose gradients are
equal. The state that enters a window is a constant: no gradient flows into the window before.
The equations of backward stand at :func:`refimpl.kernels.spec.lstm_backward`.

Weight drop (Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", ICLR 2018) is dropout on the
entries of :math:`W_{hh}`, drawn once for each window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.weights import Grads, LinearGrad, Params, ScaledGrad, SparseWeight, Weight, add_to, values_of

GATES = ("i", "f", "g", "o")


class State(NamedTuple):
    """What is carried from window to window."""

    h: np.ndarray  # (H, B)
    c: np.ndarray  # (H, B)


class Cache(NamedTuple):
    """What backward needs."""

    layer: int
    w_ih: Weight
    w_hh: Weight  # as the forward pass saw it, entries dropped
    dropped: np.ndarray | None  # aligned with W_hh's values: 0 or 1/keep
    trace: Any  # the kernel tier's record of activations


def names(layer: int, prefix: str = "rnn") -> tuple[str, str, str, str]:
    """Return the names of a layer's parameters: W_ih, W_hh, b_ih, b_hh."""
    return tuple(f"{prefix}.{part}_l{layer}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # type: ignore[return-value]


def zero_state(size: int, batch: int, dtype: Any) -> State:
    """Return the state before the first token."""
    return State(np.zeros((size, batch), dtype), np.zeros((size, batch), dtype))


def forward(
    params: Params,
    layer: int,
    x: np.ndarray,
    state: State,
    *,
    weight_drop: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, State, Cache]:
    """Run the layer over a window.

    Parameters
    ----------
    x : ndarray, shape (T, I, B)
    state : State
        Of the step before the window.
    weight_drop : float
        Probability that an entry of W_hh is dropped for this window.
    rng : numpy.random.Generator, optional
        Draws the dropped entries; none are without it.

    Returns
    -------
    y : ndarray, shape (T, H, B)
    state : State
        Of the window's last step.
    cache : Cache
    """
    ih, hh, b_ih, b_hh = names(layer)
    w_ih, w_hh = params[ih], params[hh]
    dropped = None
    if weight_drop > 0 and rng is not None:
        values = values_of(w_hh)
        dropped = ((rng.random(values.shape) >= weight_drop) / (1 - weight_drop)).astype(values.dtype)
        w_hh = SparseWeight(w_hh.support, values * dropped) if isinstance(w_hh, SparseWeight) else values * dropped
    bias = values_of(params[b_ih]) + values_of(params[b_hh])
    y, h, c, trace = kernels.lstm_forward(w_ih, w_hh, bias, x, state.h, state.c)
    return y, State(h, c), Cache(layer, w_ih, w_hh, dropped, trace)


def backward(dy: np.ndarray, cache: Cache, grads: Grads, *, input_gradient: bool = True) -> np.ndarray | None:
    """Add the layer's gradients to ``grads`` and return ``dx`` (T, I, B), or None if it is not wanted."""
    ih, hh, b_ih, b_hh = names(cache.layer)
    nothing = np.zeros(dy.shape[1:], dy.dtype)
    result = kernels.lstm_backward(cache.w_ih, cache.w_hh, cache.trace, dy, nothing, nothing, input_gradient)
    known = None
    if result.dw_ih is not None:
        assert isinstance(cache.w_ih, SparseWeight)
        known = (cache.w_ih.support, result.dw_ih)
    add_to(grads, ih, LinearGrad(cache.w_ih.shape, result.d_gates, result.x, known))
    recurrent = LinearGrad(cache.w_hh.shape, result.d_gates, result.h_prev)
    add_to(grads, hh, recurrent if cache.dropped is None else ScaledGrad(recurrent, cache.w_hh, cache.dropped))
    add_to(grads, b_ih, result.d_bias)
    add_to(grads, b_hh, result.d_bias.copy())
    return result.dx
