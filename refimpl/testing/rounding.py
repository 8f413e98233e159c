r"""Numbers that know how far rounding may have carried them: running error bounds over whole computations.

A `Rounded` array is a float64 result together with a bound on its distance from what exact arithmetic gives.
With :math:`u = 2^{-53}` and :math:`\gamma_n = n u / (1 - n u)`, each operation hands on the errors of its operands
and adds its own; a product of matrices adds

.. math:: |A| E_B + E_A |B| + E_A E_B + \gamma_n |A| |B|,

which holds for every order of summation, with and without fused multiplication, and with zeros left out. So two
programs that evaluate the same formula in float64, in whatever order and on whatever storage, differ by at most
``2 * error``: a bound that follows from the formula and its numbers, and is not chosen.

Elementary functions are taken to be within `FUNCTION` units of roundoff, four units in the last place.

References
----------
Higham, "Accuracy and stability of numerical algorithms", 2nd edition, SIAM 2002, sections 3.1 and 3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.testing import bounds

U = bounds.unit_roundoff(np.float64)
FUNCTION = 8.0
"""Assumed relative error of exp, log and tanh, in units of roundoff; of a logistic sigmoid the absolute one."""


class Rounded:
    """A float64 array and a bound on its error, elementwise; see the module.

    Parameters
    ----------
    value : array_like
    error : array_like, optional
        Of the same shape, not negative; by default the value is exact.
    """

    __array_ufunc__ = None  # so that `array * rounded` comes here

    def __init__(self, value: object, error: object = 0.0) -> None:
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def T(self) -> Rounded:
        """The transpose."""
        return Rounded(self.value.T, self.error.T)

    def __getitem__(self, item: Any) -> Rounded:
        return Rounded(self.value[item], self.error[item])

    def reshape(self, *shape: int) -> Rounded:
        """Return the same numbers in another shape."""
        return Rounded(self.value.reshape(shape), self.error.reshape(shape))

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __add__(self, other: object) -> Rounded:
        b = rounded(other)
        return _operation(self.value + b.value, self.error + b.error)

    def __sub__(self, other: object) -> Rounded:
        return self + -rounded(other)

    def __rsub__(self, other: object) -> Rounded:
        return rounded(other) - self

    def __mul__(self, other: object) -> Rounded:
        b = rounded(other)
        handed = abs(self.value) * b.error + self.error * abs(b.value) + self.error * b.error
        return _operation(self.value * b.value, handed)

    def __truediv__(self, other: object) -> Rounded:
        b = rounded(other)
        value = self.value / b.value
        room = abs(b.value) - b.error
        if not (room > 0).all():
            raise ZeroDivisionError("a divisor is not known well enough to tell it from 0")
        return _operation(value, (self.error + abs(value) * b.error) / room)

    __radd__, __rmul__ = __add__, __mul__

    def __matmul__(self, other: object) -> Rounded:
        b = rounded(other)
        handed = abs(self.value) @ b.error + self.error @ (abs(b.value) + b.error)
        error = handed + bounds.gamma(self.shape[-1], np.float64) * (abs(self.value) @ abs(b.value))
        return Rounded(self.value @ b.value, error)

    def sum(self, axis: int | None = None) -> Rounded:
        """Return a sum, in any order."""
        n = self.value.size if axis is None else self.shape[axis]
        error = self.error.sum(axis) + float(bounds.gamma(n, np.float64)) * abs(self.value).sum(axis)
        return Rounded(self.value.sum(axis), error)


def rounded(x: object) -> Rounded:
    """Return ``x``, an exact array if it is not `Rounded`."""
    return x if isinstance(x, Rounded) else Rounded(x)


def concatenate(parts: list[Rounded], axis: int = 0) -> Rounded:
    """Join arrays along an axis."""
    return Rounded(np.concatenate([p.value for p in parts], axis), np.concatenate([p.error for p in parts], axis))


def exp(x: Rounded) -> Rounded:
    r"""Return :math:`e^x`."""
    value = np.exp(x.value)
    return Rounded(value, value * (np.expm1(x.error) + FUNCTION * U * np.exp(x.error)))


def log(x: Rounded) -> Rounded:
    r"""Return :math:`\log x` for arrays that are surely positive."""
    value = np.log(x.value)
    return Rounded(value, -np.log1p(-x.error / x.value) + FUNCTION * U * abs(value))


def sqrt(x: Rounded) -> Rounded:
    r"""Return :math:`\sqrt x`; where x may be 0 the bound is :math:`\sqrt E`."""
    value = np.sqrt(x.value)
    slope = x.error / np.where(value > 0, value, 1)
    return _operation(value, np.where(value > 0, np.minimum(slope, np.sqrt(x.error)), np.sqrt(x.error)))


def tanh(x: Rounded) -> Rounded:
    r"""Return :math:`\tanh x`, whose slope is at most 1."""
    value = np.tanh(x.value)
    return Rounded(value, x.error + FUNCTION * U * abs(value))


def sigmoid(x: Rounded) -> Rounded:
    r"""Return :math:`1 / (1 + e^{-x})`, whose slope is at most 1/4."""
    return Rounded(0.5 * np.tanh(0.5 * x.value) + 0.5, x.error / 4 + FUNCTION * U)


def _operation(value: np.ndarray, handed: np.ndarray) -> Rounded:
    """Add the rounding of one operation, whose computed result lies within ``handed`` of the exact one."""
    return Rounded(value, handed + U * (abs(value) + handed))
