r"""Sparse models of one run and their dense twin: how the mask changes between phases, how far two models agree.

Of the supports of one weight in two compressed phases, of K entries before and K' after, g are new and r have gone:

.. math::
    \mathrm{IoU} = \frac{K - r}{K + g}, \qquad \mathrm{change} = \frac{2 g}{n}

with n entries in the dense weight. With as many entries after as before, g = r, the change is the Hamming distance of
the two masks over n, and :math:`\mathrm{IoU} = (K - g) / (K + g)`; at density d neither more than :math:`2 d n` entries
can differ, nor the change exceed 2 d. AC/DC's authors log 100 times the change, over all weights together.

Of two classifiers the agreement is the fraction of samples of which they predict the same class, right or wrong. Two
models with accuracies a and b agree on at least :math:`a + b - 1` and at most :math:`1 - |a - b|` of the samples.

Source: Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks",
NeurIPS 2021, its analysis of masks and of the dense and sparse models; the logged change as in its authors' program.

Deviations
----------
- The authors' program leaves out of its sum the weights that have no zero, and so goes by the values; here those are
  left out whose support is full in the second phase.
- Their program has no measure of agreement; the two figures here are the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.weights.support import Support


@dataclass(frozen=True)
class MaskChange:
    """How one support became another.

    Attributes
    ----------
    size : int
        n, entries of the dense weight.
    kept, grown, dropped : int
        Entries in both, g in the second alone, and r in the first alone.
    """

    size: int
    kept: int
    grown: int
    dropped: int

    @classmethod
    def between(cls, before: Support, after: Support) -> MaskChange:
        """Compare two supports.

        Raises
        ------
        ValueError
            If their shapes differ.
        """
        if before.shape != after.shape:
            raise ValueError(
                f"two supports of shapes {before.shape} and {after.shape} are compared; give two of the same weight"
            )
        kept = int(np.count_nonzero(after.positions_of(before.flat) >= 0)) if before.nnz else 0
        return cls(before.size, kept, after.nnz - kept, before.nnz - kept)

    @property
    def hamming(self) -> int:
        """In how many entries the masks differ."""
        return self.grown + self.dropped

    @property
    def iou(self) -> float:
        """Intersection over union; 1 for two empty supports."""
        union = self.kept + self.hamming
        return self.kept / union if union else 1.0

    @property
    def change(self) -> float:
        """2 g / n."""
        return 2 * self.grown / self.size if self.size else 0.0

    @classmethod
    def total(cls, changes: Iterable[MaskChange]) -> MaskChange:
        """Take several weights together."""
        counts = [(c.size, c.kept, c.grown, c.dropped) for c in changes]
        return cls(*(sum(column) for column in zip(*counts, strict=True))) if counts else cls(0, 0, 0, 0)


def mask_changes(before: Mapping[str, Support], after: Mapping[str, Support]) -> dict[str, MaskChange]:
    """Compare the supports of two compressed phases, weight by weight.

    Parameters
    ----------
    before, after : mapping of str to Support
        A weight that is not in one of them counts as dense there; one that is dense in the second is left out.

    Returns
    -------
    dict of str to MaskChange
        Of which :meth:`MaskChange.total` makes one figure: 100 times its ``change`` is what AC/DC's authors log.
    """
    found = {}
    for name, support in after.items():
        if support.nnz < support.size:
            earlier = before[name] if name in before else Support.full(support.shape)
            found[name] = MaskChange.between(earlier, support)
    return found


@dataclass(frozen=True)
class Agreement:
    r"""How two classifiers answer the same samples.

    Attributes
    ----------
    samples : int
    same : float
        Fraction of which both predict one class.
    cross_entropy : float
        Mean of :math:`-\sum_c p_c \log q_c`, in nats, with the probabilities p of the first and q of the second.
    accuracies : tuple of float
        Of the two; NaN without targets.
    both_right, both_wrong_alike : float
        Fractions of all samples: both right; both wrong with one answer. NaN without targets.
    """

    samples: int
    same: float
    cross_entropy: float
    accuracies: tuple[float, float]
    both_right: float
    both_wrong_alike: float


def agreement(first: np.ndarray, second: np.ndarray, targets: np.ndarray | None = None) -> Agreement:
    """Compare two classifiers by their logits.

    Parameters
    ----------
    first, second : ndarray, shape (classes, samples)
        Logits of the same samples in the same order. Of equal ones the lower class is predicted.
    targets : ndarray of int, shape (samples,), optional
        The right classes.

    Raises
    ------
    ValueError
        If the shapes do not fit, or there are no samples.
    """
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"logits of shapes {first.shape} and {second.shape} are compared; give two arrays (classes, samples) of "
            "the same samples, at least one"
        )
    samples = first.shape[1]
    if targets is not None and targets.shape != (samples,):
        raise ValueError(f"there are targets of shape {targets.shape} for {samples} samples; give one class for each")
    a, b = first.argmax(axis=0), second.argmax(axis=0)
    log_p, log_q = _log_softmax(first), _log_softmax(second)
    cross = -float(np.where(np.exp(log_p) > 0, np.exp(log_p) * log_q, 0.0).sum(axis=0).mean())
    unknown = float("nan")
    of_targets: tuple[tuple[float, float], float, float] = ((unknown, unknown), unknown, unknown)
    if targets is not None:
        right_a, right_b = a == targets, b == targets
        both, alike = right_a & right_b, ~right_a & (a == b)
        of_targets = ((float(right_a.mean()), float(right_b.mean())), float(both.mean()), float(alike.mean()))
    return Agreement(samples, float((a == b).mean()), cross, *of_targets)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=0)
    return shifted - np.log(np.exp(shifted).sum(axis=0))
