r"""Smooth activation functions.

*GELU*: :math:`y = x\, \Phi(x)`, :math:`dx = dy\, (\Phi(x) + x\, \varphi(x))`, with the normal distribution's
:math:`\Phi` and density :math:`\varphi(x) = e^{-x^2/2} / \sqrt{2\pi}`.

*GELU by tanh*: :math:`y = \tfrac12 x (1 + t)`, :math:`t = \tanh u`, :math:`u = \sqrt{2/\pi}\, (x + 0.044715\, x^3)`,
:math:`dx = dy\, (\tfrac12 (1 + t) + \tfrac12 x (1 - t^2)\, u')`,
:math:`u' = \sqrt{2/\pi}\, (1 + 3 \cdot 0.044715\, x^2)`.

*SiLU*, also called swish: :math:`y = x\, \sigma(x)`, :math:`dx = dy\, \sigma(x)\, (1 + x\, (1 - \sigma(x)))`.

Backward needs the input, from which it computes everything again: memory costs more than arithmetic. Arrays may have
any shape. The rectifier is in :mod:`refimpl.layers.relu`.

Sources: Hendrycks, Gimpel, "Gaussian error linear units", arXiv 1606.08415, section 2; Elfwing, Uchibe, Doya,
"Sigmoid-weighted linear units for neural network function approximation in reinforcement learning", Neural Networks
2018.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

_CUBIC = 0.044715
_ROOT = math.sqrt(2 / math.pi)


class GeluCache(NamedTuple):
    """What backward needs of GELU."""

    x: np.ndarray
    approximate: str


def gelu_forward(x: np.ndarray, approximate: Literal["none", "tanh"] = "none") -> tuple[np.ndarray, GeluCache]:
    """Return GELU of ``x``, exactly or, with ``"tanh"``, by the formula with tanh.

    Raises
    ------
    ValueError
        If ``approximate`` is neither of the two.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; GELU takes 'none' or 'tanh'")
    y = 0.5 * x * (1 + _tanh(x)) if approximate == "tanh" else x * _normal(x)
    return y, GeluCache(x, approximate)


def gelu_backward(dy: np.ndarray, cache: GeluCache) -> np.ndarray:
    """Return the gradient of ``x``."""
    x = cache.x
    if cache.approximate == "tanh":
        t = _tanh(x)
        inner = _ROOT * (1 + 3 * _CUBIC * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)
    return dy * (_normal(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def silu_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return SiLU of ``x``, and ``x``."""
    return x * _sigmoid(x), x


def silu_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the gradient of ``x``."""
    s = _sigmoid(x)
    return dy * s * (1 + x * (1 - s))


def _tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(_ROOT * (x + _CUBIC * x * x * x))


def _normal(x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr  # SciPy is long to import, and most networks need none of it

    return ndtr(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit  # keeps the digits of the left tail, which one minus something loses

    return expit(x)
