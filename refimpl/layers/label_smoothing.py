r"""Softmax cross-entropy with label smoothing, on scores that are there already.

The target is a mixture of the label and of all :math:`K` classes,
:math:`q = (1 - \epsilon)\, e_y + \frac{\epsilon}{K} \mathbf{1}`. With :math:`p = \mathrm{softmax}(z)`,

.. math::
    \ell = -\sum_k q_k \log p_k = (1 - \epsilon) (-\log p_y) - \frac{\epsilon}{K} \sum_k \log p_k, \qquad dz = p - q,

because :math:`\sum_k q_k = 1`. At :math:`\epsilon = 0` it is the ordinary cross-entropy, and at 1 the labels do not
count. The right class has :math:`1 - \epsilon + \epsilon / K`, as in PyTorch, not :math:`1 - \epsilon`.

Source: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer vision", CVPR
2016, section 7.
"""

from __future__ import annotations

import numpy as np

from refimpl.kernels import checks

Cache = np.ndarray
"""Gradient of the mean loss, in the shape of the scores."""


def forward(scores: np.ndarray, targets: np.ndarray, *, epsilon: float = 0.0) -> tuple[float, Cache]:
    r"""Return the mean loss in nats.

    Parameters
    ----------
    scores : ndarray, shape (..., K, N)
        Any number of panels of N columns. Not changed.
    targets : ndarray of int, shape (..., N)
        −1 marks a column that does not count.
    epsilon : float
        Share of the target that is spread over all classes, from 0 to 1.

    Returns
    -------
    loss : float
        Mean over the columns that count, added up in float64.
    cache : Cache

    Raises
    ------
    ValueError
        If the shapes do not fit, a target is no class, no column counts, or epsilon is not from 0 to 1.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"the label smoothing is {epsilon}; give a number from 0 to 1")
    if scores.ndim < 2 or targets.shape != (*scores.shape[:-2], scores.shape[-1]):
        raise ValueError(
            f"the scores have shape {scores.shape} and the targets {targets.shape}; they must be (..., classes, "
            "columns) and (..., columns)"
        )
    classes = scores.shape[-2]
    checks.tokens("the targets", targets, classes, lowest=-1)
    counts = (targets >= 0)[..., None, :]
    number = int(counts.sum())
    if not number:
        raise ValueError("all targets are -1; give at least one column that counts")
    with np.errstate(invalid="ignore"):  # scores that overflowed give a loss of NaN, which training reports
        shifted = scores - scores.max(axis=-2, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=-2, keepdims=True))
    chosen = np.maximum(targets, 0)[..., None, :]
    of_label = np.take_along_axis(log_p, chosen, axis=-2)
    each = (1 - epsilon) * of_label + epsilon * log_p.mean(axis=-2, keepdims=True)
    loss = -float(each.sum(where=counts, dtype=np.float64)) / number
    d_scores = np.exp(log_p) - scores.dtype.type(epsilon / classes)
    at_label = np.take_along_axis(d_scores, chosen, axis=-2)
    np.put_along_axis(d_scores, chosen, at_label - scores.dtype.type(1 - epsilon), axis=-2)
    return loss, np.where(counts, d_scores / number, scores.dtype.type(0))


def backward(cache: Cache) -> np.ndarray:
    """Return the gradient of the scores."""
    return cache
