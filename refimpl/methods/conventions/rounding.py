"""Counts from fractions: how a product that is no integer becomes a number of entries, and in which precision."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

Rounding = Literal["floor", "ceil", "half-even"]
Width = Literal["float64", "float32"]


def rounded(number: float | np.floating[Any], how: Rounding) -> int:
    """Round a count that came out fractional.

    Parameters
    ----------
    number : float, or NumPy's float of either width
        The product itself: nothing is added to undo its rounding, so ``0.29 * 100`` floors to 28.
    how : {"floor", "ceil", "half-even"}
        Towards −∞, towards +∞, or to the nearest integer with halves to the even one.
    """
    if how == "floor":
        return math.floor(number)
    return math.ceil(number) if how == "ceil" else round(float(number))


def in_width(number: float, width: Width) -> float | np.float32:
    """Return a number in the precision in which a system computes its counts; float32 stays float32 in arithmetic."""
    return np.float32(number) if width == "float32" else float(number)
