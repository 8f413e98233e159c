r"""Clipping by the global norm, with its two conventions.

.. math:: g_\theta \leftarrow g_\theta \min\!\Bigl(1, \frac{c}{\lVert g \rVert + 10^{-6}}\Bigr), \qquad
    \lVert g \rVert^2 = \sum_\theta \sum_i g_{\theta,i}^2,

one factor for all parameters :math:`\theta` [1]_. For a sparse weight there are two answers to what :math:`i`
runs over:

- ``"support"``: the stored entries. This is the norm of the gradient that the optimizer gets to see, and it
  costs nothing extra.
- ``"dense"``: all entries, stored or not. This is what masked dense implementations do, the authors' code of
  Selfish-RNN among them: they clip the gradient of the whole array, and mask later. The entries outside the
  support carry a share of the norm that grows with sparsity, so the same threshold clips harder. With
  independent entries of one size and density :math:`\rho`, a ``"dense"`` norm is :math:`1/\sqrt\rho` times
  the ``"support"`` one; to compare two runs, compare their conventions first.

The caller picks the convention by the squares that it passes: a linear map's gradient gives its squared norm
on a support, or in full block by block; `squared_norm` serves for arrays.

References
----------
.. [1] Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
   algorithm 1 (there a factor :math:`c / \lVert g \rVert` when the norm exceeds :math:`c`; the
   :math:`10^{-6}` is that of ``torch.nn.utils.clip_grad_norm_``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from refimpl import kernels
from refimpl.kernels.rules import LANES as LANES


def squared_norm(array: np.ndarray) -> float:
    """Return the sum of the squares, in float64: the same bits on every machine, for any thread count.

    Parameters
    ----------
    array : ndarray
        Of any shape.

    Returns
    -------
    float
        ``inf`` or ``nan`` if an entry is not finite, or a square overflows.

    See Also
    --------
    refimpl.kernels.rules.squared_norm : The order of the sum.
    """
    return kernels.squared_norm(array)


def global_norm(sq_norms: Iterable[float]) -> float:
    """Return the norm of all gradients together.

    Parameters
    ----------
    sq_norms : iterable of float
        The squared norm of each parameter's gradient. The sum is rounded once, so their order does not
        matter.

    Returns
    -------
    float
        0 if there are none; ``inf`` or ``nan`` if one of them is.
    """
    try:
        return math.sqrt(math.fsum(sq_norms))
    except OverflowError:
        return math.inf


def clip_scale(norm: float, max_norm: float) -> float:
    """Return the factor by which to multiply every gradient: ``min(1, max_norm / (norm + 1e-6))``.

    Parameters
    ----------
    norm : float
        From `global_norm`. For ``inf`` the factor is 0, and for ``nan`` it is ``nan``: neither makes a broken
        gradient look sound.
    max_norm : float
        The largest norm that passes, above 0; ``inf`` clips nothing that is finite.

    Raises
    ------
    ValueError
        If ``max_norm`` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm!r}; give a number above 0, or do not clip at all")
    scale = max_norm / (norm + 1e-6)
    return 1.0 if scale > 1 else scale
