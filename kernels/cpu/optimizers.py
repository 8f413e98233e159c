"""Optimizer steps and the squared norm in one pass over the arrays, to the bits of :mod:`refimpl.kernels.rules`.

The NumPy rules go over their arrays once for each operation; here every number is read and written once, and the
memory's speed is the limit: 20 bytes for a float32 entry of SGD with momentum. Numba keeps the order of operations and
rounds after each, as NumPy does, because ``fastmath`` is off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from refimpl.kernels import rules
from refimpl.kernels.cpu.plan import chunk_count
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.rules import LANES

_FLOPS_EACH = 32.0  # of one entry, counted as its memory traffic costs
_TYPES = "fd"  # float32 and float64 as NumPy abbreviates them
_GROUP = 1024  # lanes whose sums stay in the level-1 cache


# Loops that start at 0 and end at the size of a slice are vectorised; those over a part of an array are not.


@kernel
def sgd(w, g, lr, decay, scale, chunks):  # type: ignore[no-untyped-def]
    """``w -= lr (scale g + decay w)``; flat, one type."""
    number = w.dtype.type
    lr, decay, scale = number(lr), number(decay), number(scale)
    for c in prange(chunks):
        start, stop = c * w.size // chunks, (c + 1) * w.size // chunks
        w_, g_ = w[start:stop], g[start:stop]
        for i in range(w_.size):
            d = g_[i] * scale
            if decay != 0:
                d = d + decay * w_[i]
            w_[i] = w_[i] - lr * d


@kernel
def sgd_momentum(w, g, b, lr, decay, scale, momentum, kept, nesterov, first, chunks):  # type: ignore[no-untyped-def]
    """``b = momentum b + kept d`` with ``d = scale g + decay w`` (``b = d`` if ``first``); ``w -= lr b``, or
    ``lr (d + momentum b)`` if ``nesterov``; flat, one type.
    """
    number = w.dtype.type
    lr, momentum, kept, decay, scale = number(lr), number(momentum), number(kept), number(decay), number(scale)
    for c in prange(chunks):
        start, stop = c * w.size // chunks, (c + 1) * w.size // chunks
        w_, g_, b_ = w[start:stop], g[start:stop], b[start:stop]
        for i in range(w_.size):
            d = g_[i] * scale
            if decay != 0:
                d = d + decay * w_[i]
            moved = d if first else b_[i] * momentum + kept * d
            b_[i] = moved
            w_[i] = w_[i] - lr * (d + momentum * moved if nesterov else moved)


@kernel
def adam(w, g, m, v, rate, beta1, beta2, divisor, eps, shrink, decay, scale, chunks):  # type: ignore[no-untyped-def]
    """``m += (1 - beta1) (d - m)``, ``v = beta2 v + (1 - beta2) d^2`` with ``d = scale g + decay w``;
    ``w = shrink w - rate m / (sqrt(v) / divisor + eps)``; flat, one type.
    """
    number = w.dtype.type
    keep1, keep2 = number(1 - beta1), number(1 - beta2)
    rate, beta2, divisor, eps = number(rate), number(beta2), number(divisor), number(eps)
    shrink, decay, scale = number(shrink), number(decay), number(scale)
    for c in prange(chunks):
        start, stop = c * w.size // chunks, (c + 1) * w.size // chunks
        w_, g_, m_, v_ = w[start:stop], g[start:stop], m[start:stop], v[start:stop]
        for i in range(w_.size):
            weight, first, second = w_[i] * shrink, m_[i], v_[i]
            d = g_[i] * scale
            if decay != 0:
                d = d + decay * weight
            first = first + keep1 * (d - first)
            second = second * beta2 + keep2 * (d * d)
            m_[i] = first
            v_[i] = second
            w_[i] = weight - rate * (first / (np.sqrt(second) / divisor + eps))


@kernel
def lane_sums(x, count, groups):  # type: ignore[no-untyped-def]
    """Return the sum of squares in ``count`` lanes, a power of two, which fold in halves."""
    lanes = np.zeros(count, np.float64)
    for group in prange(groups):
        begin, end = group * count // groups, (group + 1) * count // groups
        sums = lanes[begin:end]
        for start in range(begin, x.size, count):
            part = x[start : min(start + sums.size, x.size)]
            for j in range(part.size):
                number = np.float64(part[j])
                sums[j] += number * number
    while count > 1:
        count = count // 2
        low, high = lanes[:count], lanes[count : 2 * count]
        for j in range(count):
            low[j] += high[j]
    return lanes[0]


def sgd_step(
    w: np.ndarray,
    g: np.ndarray,
    b: np.ndarray | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    scale: float,
    first: bool,
) -> None:
    """Take a step of SGD in place; see :func:`refimpl.kernels.rules.sgd_step`."""
    flat = _flat(w, g) if b is None else _flat(w, g, b)
    if flat is None:
        options: dict[str, Any] = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        rules.sgd_step(w, g, b, lr=lr, weight_decay=weight_decay, scale=scale, first=first, **options)
        return
    chunks = chunk_count(_FLOPS_EACH * w.size)
    numbers = float(lr), float(weight_decay), float(scale)  # one type, one compilation
    if b is None:
        run(sgd, *flat, *numbers, chunks, alone=chunks == 1)
    else:
        kept = float(1 - dampening)
        run(
            sgd_momentum, *flat, *numbers, float(momentum), kept, bool(nesterov), bool(first), chunks,
            alone=chunks == 1,
        )  # fmt: skip


def adam_step(
    w: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    eps_inside: bool,
    scale: float,
    step: int,
) -> None:
    """Take a step of Adam in place; see :func:`refimpl.kernels.rules.adam_step`."""
    flat = _flat(w, g, m, v)
    if flat is None:
        options: dict[str, Any] = {"weight_decay": weight_decay, "decoupled": decoupled, "eps_inside": eps_inside}
        rules.adam_step(w, g, m, v, lr=lr, betas=betas, eps=eps, scale=scale, step=step, **options)
        return
    rate, divisor = rules.adam_rates(lr, betas, eps_inside, step)
    shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    chunks = chunk_count(_FLOPS_EACH * w.size)
    run(
        adam, *flat, float(rate), float(betas[0]), float(betas[1]), divisor, float(eps), float(shrink), float(decay),
        float(scale), chunks, alone=chunks == 1,
    )  # fmt: skip


def squared_norm(array: np.ndarray) -> float:
    """Return the sum of the squares; see :func:`refimpl.kernels.rules.squared_norm`."""
    if array.dtype.char not in _TYPES or not array.dtype.isnative:
        return rules.squared_norm(array)
    flat = np.ascontiguousarray(array.reshape(-1))
    # Lanes that no entry falls in add zeros, which change no bit
    count = LANES if flat.size >= LANES else 1 << max(flat.size - 1, 0).bit_length()
    chunks = chunk_count(_FLOPS_EACH * flat.size)
    return float(run(lane_sums, flat, count, max(1, count // _GROUP), alone=chunks == 1))


def _flat(*arrays: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Return views with one axis, or None where there are none, or not of one type that the kernels take."""
    dtype = arrays[0].dtype
    if dtype.char not in _TYPES or not dtype.isnative:
        return None
    flat = True
    for array in arrays:
        if array.dtype != dtype:
            return None
        if array.ndim != 1:
            flat = False
            if not array.flags.c_contiguous:
                return None
    return arrays if flat else tuple(array.reshape(-1) for array in arrays)
