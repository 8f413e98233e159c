"""The definition of the optimizer steps and of the squared norm that are kernels, in NumPy.

All are elementwise (the norm in lanes), so a compiled tier gives the same bits: it rounds after every operation, fuses
no multiplication with an addition, and keeps the order. Numbers such as the learning rate are computed in float64 and
rounded to the arrays' type where they meet an array.
"""

from __future__ import annotations

import math

import numpy as np

LANES = 8192  # a power of two


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
    """Take the step of :class:`refimpl.optim.SGD` in place.

    Parameters
    ----------
    w, g : ndarray, one shape and type
        Values, and their gradient, which is multiplied by ``scale`` before anything else.
    b : ndarray or None
        The momentum buffer, None exactly if ``momentum`` is 0.
    lr, momentum, dampening, nesterov, weight_decay : float
        The rule's.
    scale : float
        Factor of the gradient.
    first : bool
        Whether the buffer is overwritten instead of decayed.
    """
    if scale != 1:
        g = g * scale
    if weight_decay:
        g = g + weight_decay * w
    direction = g
    if b is not None:
        if first:
            b[...] = g
        else:
            b *= momentum
            b += (1 - dampening) * g
        direction = g + momentum * b if nesterov else b
    w -= lr * direction


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
    """Take the step of :class:`refimpl.optim.Adam` in place.

    Parameters
    ----------
    w, g, m, v : ndarray, one shape and type
        Values, gradient (multiplied by ``scale`` before anything else), and both moments.
    lr, betas, eps, weight_decay, decoupled : float
        The rule's.
    eps_inside : bool
        Whether the bias is corrected after epsilon was added.
    scale : float
        Factor of the gradient.
    step : int
        1, 2, ….
    """
    rate, divisor = adam_rates(lr, betas, eps_inside, step)
    if scale != 1:
        g = g * scale
    if weight_decay and decoupled:
        w *= 1 - lr * weight_decay
    elif weight_decay:
        g = g + weight_decay * w
    m += (1 - betas[0]) * (g - m)
    v *= betas[1]
    v += (1 - betas[1]) * (g * g)
    root = np.sqrt(v)
    root /= divisor
    root += eps
    w -= rate * (m / root)


def adam_rates(lr: float, betas: tuple[float, float], eps_inside: bool, step: int) -> tuple[float, float]:
    """Return the factor of the direction and the divisor of the root, which correct the moments' bias."""
    correction, root_correction = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    return (lr * root_correction / correction, 1.0) if eps_inside else (lr / correction, root_correction)


def squared_norm(array: np.ndarray) -> float:
    """Return the sum of the squares of an array of any shape, in float64; ``inf`` or ``nan`` where it has no other.

    Lane ``j`` adds up the squares of the entries ``j, j + LANES, j + 2 LANES, …`` in this order, and the lanes are then
    folded in halves. Both are elementwise sums, whose rounding does not depend on how a machine vectorises them (that
    of ``np.sum`` or ``np.dot`` does). Squares of float32 are exact in float64.
    """
    flat = array.reshape(-1)
    lanes, squares = np.zeros(LANES), np.empty(LANES)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, LANES):
            block = flat[start : start + LANES]
            lanes[: block.size] += np.multiply(block, block, out=squares[: block.size], dtype=np.float64)
        while lanes.size > 1:
            half = lanes.size // 2
            lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])
