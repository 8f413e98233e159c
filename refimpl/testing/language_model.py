r"""A second implementation of the language model's training step, on masked dense arrays and with error bounds.

It is written from the equations, in plain NumPy on `refimpl.testing.rounding.Rounded` numbers, and shares nothing with
the layers, the kernels or the trainer: an independent witness of what a sparse training step should compute. It knows
neither dropout nor weight drop.

.. math::
    a_t &= W_{ih} x_t + W_{hh} h_{t-1} + b_{ih} + b_{hh}, \qquad
    c_t = f \odot c_{t-1} + i \odot g, \qquad h_t = o \odot \tanh c_t \\
    \ell &= \frac{1}{TB} \sum_{t,b} \Bigl(\log \sum_v e^{z_{tvb}} - z_{t y_{tb} b}\Bigr), \qquad z_t = W_d h_t + b_d

The bounds rest on the dense lengths of all sums, so they hold for a program that leaves out what a mask makes zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from refimpl.testing.rounding import Rounded, concatenate, exp, log, rounded, sigmoid, sqrt, tanh

Arrays = Mapping[str, np.ndarray]


class Pass(NamedTuple):
    """What `loss_and_grads` returns."""

    loss: Rounded
    grads: dict[str, Rounded]  # of every entry, stored or not
    states: list[tuple[Rounded, Rounded]]  # (h, c) of each layer after the window, (H, B)


class _Step(NamedTuple):
    """One layer at one time step."""

    inputs: Rounded  # (I + H + 2, B): x, h before, and the ones of the two biases
    gates: tuple[Rounded, Rounded, Rounded, Rounded]  # i, f, g, o
    before: Rounded  # c
    tanh_c: Rounded


def loss_and_grads(
    params: Arrays, tokens: np.ndarray, targets: np.ndarray, states: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Pass:
    """Return the loss, all gradients and the last states of a window, each with its error bound.

    Parameters
    ----------
    params : mapping of str to ndarray
        Dense arrays of float64 under the model's names; masked where the model is sparse. Without
        ``decoder.weight`` the embedding is the decoder.
    tokens : ndarray of int, shape (T, B)
        What is read.
    targets : ndarray of int, shape (T, B)
        What is to be predicted.
    states : iterable of (h, c)
        Of each layer, shape (H, B); gradients stop there.
    """
    tied = "decoder.weight" not in params
    decoder = "encoder.weight" if tied else "decoder.weight"
    steps, batch = tokens.shape
    columns = [rounded(params["encoder.weight"][tokens[t]].T) for t in range(steps)]
    records: list[list[_Step]] = []
    last = []
    for k, (h, c) in enumerate(states):
        columns, record, state = _layer_forward(params, k, columns, rounded(h), rounded(c))
        records.append(record)
        last.append(state)

    features = concatenate(columns, axis=1)  # (H, T B)
    y = targets.reshape(-1)
    z = rounded(params[decoder]) @ features + params["decoder.bias"][:, None]
    top = z.value.max(axis=0)
    e = exp(z - Rounded(top, z.error.max(axis=0)))
    mass = e.sum(axis=0)
    at = (y, np.arange(y.size))
    loss = (log(mass) - (z - Rounded(top, z.error.max(axis=0)))[at]).sum() * (1 / y.size)
    hot = np.zeros(z.shape)
    hot[at] = 1 / y.size
    dz = e * (Rounded(1 / y.size) / mass) - hot

    grads = {decoder: dz @ features.T, "decoder.bias": dz.sum(axis=1)}
    dx = rounded(params[decoder]).T @ dz
    d_columns = [dx[:, t * batch : (t + 1) * batch] for t in range(steps)]
    for k in reversed(range(len(records))):
        d_columns = _layer_backward(params, k, records[k], d_columns, grads)
    one_hot = (np.arange(len(params["encoder.weight"]))[:, None] == tokens.reshape(-1)).astype(float)
    looked_up = rounded(one_hot) @ concatenate(d_columns, axis=1).T
    grads["encoder.weight"] = grads["encoder.weight"] + looked_up if tied else looked_up
    return Pass(loss, grads, last)


def _layer_forward(
    params: Arrays, k: int, columns: list[Rounded], h: Rounded, c: Rounded
) -> tuple[list[Rounded], list[_Step], tuple[Rounded, Rounded]]:
    w = rounded(_joined(params, k))  # [W_ih, W_hh, b_ih, b_hh]: one sum, whatever the order of its parts
    size, ones = h.shape[0], rounded(np.ones((2, h.shape[1])))
    out, record = [], []
    for x in columns:
        inputs = concatenate([x, h, ones])
        a = w @ inputs
        i, f, g, o = (act(a[n * size : (n + 1) * size]) for n, act in enumerate((sigmoid, sigmoid, tanh, sigmoid)))
        before, c = c, f * c + i * g
        tanh_c = tanh(c)
        h = o * tanh_c
        out.append(h)
        record.append(_Step(inputs, (i, f, g, o), before, tanh_c))
    return out, record, (h, c)


def _layer_backward(
    params: Arrays, k: int, record: list[_Step], dy: list[Rounded], grads: dict[str, Rounded]
) -> list[Rounded]:
    w_ih, w_hh = (rounded(params[f"rnn.weight_{part}_l{k}"]) for part in ("ih", "hh"))
    dc: Rounded = rounded(np.zeros(dy[0].shape))
    dh = dc
    d_a: list[Rounded] = []
    for step, d_out in zip(reversed(record), reversed(dy)):
        i, f, g, o = step.gates
        dh = dh + d_out
        dc = dc + dh * o * (1 - step.tanh_c * step.tanh_c)
        d_a.append(
            concatenate(
                [
                    dc * g * (i * (1 - i)),
                    dc * step.before * (f * (1 - f)),
                    dc * i * (1 - g * g),
                    dh * step.tanh_c * (o * (1 - o)),
                ]
            )
        )
        dc = dc * f
        dh = w_hh.T @ d_a[-1]
    d_a.reverse()
    whole = concatenate(d_a, axis=1) @ concatenate([step.inputs for step in record], axis=1).T
    inputs = w_ih.shape[1]
    grads[f"rnn.weight_ih_l{k}"] = whole[:, :inputs]
    grads[f"rnn.weight_hh_l{k}"] = whole[:, inputs:-2]
    grads[f"rnn.bias_ih_l{k}"], grads[f"rnn.bias_hh_l{k}"] = whole[:, -2], whole[:, -1]
    return [w_ih.T @ d for d in d_a]


def _joined(params: Arrays, k: int) -> np.ndarray:
    weights = [params[f"rnn.weight_{part}_l{k}"] for part in ("ih", "hh")]
    return np.hstack([*weights, *(params[f"rnn.bias_{part}_l{k}"][:, None] for part in ("ih", "hh"))])


def clipped(grads: Mapping[str, Rounded], seen: Mapping[str, Rounded], limit: float) -> dict[str, Rounded]:
    r"""Return the gradients times :math:`\min(1, c / (\lVert g \rVert + 10^{-6}))`.

    Parameters
    ----------
    grads : mapping of str to Rounded
        By parameter.
    seen : mapping of str to Rounded
        What the norm runs over: the gradients themselves, or those of all entries.
    limit : float
        :math:`c`; 0 does not clip.
    """
    if not limit:
        return dict(grads)
    flat = concatenate([g.reshape(-1) for g in seen.values()])
    scale = Rounded(limit) / (sqrt((flat * flat).sum()) + 1e-6)
    if scale.value - scale.error > 1:
        return dict(grads)
    if scale.value + scale.error > 1:
        raise ValueError("the norm is too close to the limit to tell whether it clips; choose another limit")
    return {name: g * scale for name, g in grads.items()}
