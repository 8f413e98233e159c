r"""The rounding bound of a product, and the error of a result measured in it.

An inner product of :math:`n` terms, computed in any order and with or without fused multiply-adds, satisfies

.. math:: |\hat y - y| \le \gamma_n \, |a|^\top |b|, \qquad \gamma_n = \frac{n u}{1 - n u},

where :math:`u` is the unit roundoff (Higham, "Accuracy and stability of numerical algorithms", 2nd edition,
SIAM 2002, section 3.1). A kernel is right when its distance from a result in a wider type is within that
bound, whatever its order of summation: the *error ratio* is at most 1. A missing, doubled or misplaced term
is larger than it by many orders of magnitude.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def unit_roundoff(dtype: Any) -> float:
    """Return the greatest relative error of rounding to ``dtype``: 2**-24 for float32, 2**-53 for float64."""
    return float(np.finfo(dtype).eps) / 2


def gamma(n: Any, dtype: Any) -> Any:
    r"""Return :math:`\gamma_n = n u / (1 - n u)` for a number of roundings, or for an array of such numbers.

    Raises
    ------
    ValueError
        If :math:`n u \ge 1`, where the bound says nothing.
    """
    nu = np.asarray(n, np.float64) * unit_roundoff(dtype)
    if (nu >= 1).any():
        raise ValueError(f"{np.max(n)} roundings in {np.dtype(dtype)} leave no digit; give fewer, or a wider type")
    return nu / (1 - nu)


def wider(dtype: Any) -> np.dtype[Any]:
    """Return the type to compute references in: float64 for float32, and ``numpy.longdouble`` for float64.

    Where longdouble is no wider than float64 (some ARM and Windows systems) the reference errs as much as
    what is measured; `product_bound` then allows for both.
    """
    return np.dtype(np.float64 if np.dtype(dtype) == np.float32 else np.longdouble)


def product_bound(a: np.ndarray, b: np.ndarray, terms: Any = None, dtype: Any = None) -> np.ndarray:
    r"""Return :math:`\gamma_n |A| |B|`, the bound on the error of each entry of a computed product.

    Parameters
    ----------
    a, b : ndarray, shapes (..., M, K) and (..., K, N)
        The exact factors.
    terms : array_like of int, optional
        Number of terms that each entry sums, broadcast against (..., M, N); K by default. A row of a sparse
        matrix has as many as it has non-zeros, so that an empty row's bound is 0: it must come out as exact
        zeros.
    dtype : dtype, optional
        The type of the computation; that of ``a`` by default.

    Returns
    -------
    ndarray, shape (..., M, N)
        In the `wider` type, and with room for one underflow in each term.
    """
    dtype = np.dtype(a.dtype if dtype is None else dtype)
    n = np.asarray(a.shape[-1] if terms is None else terms)
    wide = wider(dtype)
    sides = 1 if np.finfo(wide).eps < np.finfo(dtype).eps else 2
    magnitude = np.abs(a).astype(wide) @ np.abs(b).astype(wide)
    underflow = n * np.finfo(dtype).smallest_subnormal.astype(wide)
    return sides * (gamma(n, dtype) * magnitude + underflow)


def error_ratio(got: np.ndarray, reference: np.ndarray, bound: np.ndarray) -> float:
    """Return the greatest error in units of its bound: at most 1 for a right result.

    Parameters
    ----------
    got : ndarray
        The result to judge.
    reference : ndarray
        The same in a wider type.
    bound : ndarray
        Allowed distance of each entry, not negative. Where it is 0, any difference at all has an infinite
        ratio.

    Returns
    -------
    float
        0 if nothing differs; infinity if ``got`` is NaN or infinite where the reference is another number, or
        the reverse.

    Raises
    ------
    ValueError
        If the shapes differ, or a bound is negative or NaN.
    """
    if got.shape != reference.shape:
        raise ValueError(f"the result has shape {got.shape} and the reference {reference.shape}; they must be the same")
    bound = np.broadcast_to(bound, got.shape)
    if not (bound >= 0).all():
        raise ValueError("a bound is negative or NaN; give the allowed distance of each entry")
    wide = np.promote_types(reference.dtype, np.promote_types(bound.dtype, np.float64))
    got, reference = got.astype(wide), reference.astype(wide)
    same = (got == reference) | (np.isnan(got) & np.isnan(reference))
    comparable = np.isfinite(got) & np.isfinite(reference) & (bound > 0) & ~same
    ratio = np.where(same, 0.0, np.inf)
    ratio[comparable] = np.abs(got[comparable] - reference[comparable]) / bound[comparable]
    return float(ratio.max(initial=0.0))
