r"""Derivatives of a function of one number at 0, from its values alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_COMPLEX_STEP = 1e-20  # its square is lost beside 1
_FIRST_STEP, _STEPS = 1 / 8, 5  # of the central differences: 1/8, 1/16, ..., 1/128


def complex_slope(phi: Callable[[complex], Any]) -> float:
    r"""Return :math:`\phi'(0) = \mathrm{Im}\, \phi(ih) / h`, exact up to rounding: nothing is subtracted.

    Parameters
    ----------
    phi : callable
        Analytic, and computed with complex numbers throughout: no ``abs``, conjugate or comparison.

    References
    ----------
    Squire, Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Review 1998.
    """
    return float(phi(1j * _COMPLEX_STEP).imag) / _COMPLEX_STEP


def extrapolated_slope(phi: Callable[[float], Any], rounding: float = 1e-14) -> tuple[float, float]:
    r"""Return :math:`\phi'(0)` by central differences extrapolated to step 0, and a bound of the error.

    Romberg's table over halved steps: :math:`D_{k,j+1} = D_{k,j} + (D_{k,j} - D_{k-1,j}) / (4^{j+1} - 1)`.
    The bound is the last change of the extrapolation, which is the error of the estimate before it, plus the
    rounding of :math:`\phi` magnified by the smallest step.

    Parameters
    ----------
    phi : callable
        Smooth around 0 at a distance of 1/8.
    rounding : float
        Relative rounding error of one value of ``phi``.
    """
    table: list[float] = []
    size, change, h = 1.0, 0.0, _FIRST_STEP
    for k in range(_STEPS):
        h = _FIRST_STEP / 2**k
        up, down = float(phi(h)), float(phi(-h))
        size = float(np.max([size, abs(up), abs(down)]))  # NaN if one of them is
        row = [(up - down) / (2 * h)]
        for j in range(k):
            row.append(row[j] + (row[j] - table[j]) / (4 ** (j + 1) - 1))
        change = abs(row[-1] - table[-1]) if table else 0.0
        table = row
    return table[-1], change + rounding * size / h
