"""The non-monotonic trigger: when to begin averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def triggered(history: Sequence[float], loss: float, n: int = 5) -> bool:
    r"""Return whether the validation loss has stopped improving.

    With the losses :math:`v_1, \dots, v_{k}` of the epochs before, and the loss :math:`v` of this one:

    .. math:: k > n \quad\text{and}\quad v > \min_{1 \le i \le k - n} v_i,

    that is, this epoch is worse than the best one that is at least :math:`n + 1` epochs old. It can fire in
    epoch :math:`n + 2` at the earliest.

    Parameters
    ----------
    history : sequence of float
        Validation losses of the previous epochs of plain SGD, oldest first, the current one not yet appended.
    loss : float
        This epoch's validation loss.
    n : int
        The non-monotone interval.

    Returns
    -------
    bool
        Never true for a loss that is NaN. NaNs in the history count as epochs, but not as losses to be better
        than. A loss of ``inf`` is worse than any finite one, and triggers.

    Raises
    ------
    ValueError
        If ``n`` is negative.

    References
    ----------
    .. [1] Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", ICLR 2018, algorithm 1,
       with one epoch as the logging interval.

    Notes
    -----
    *Deviations.* In public implementations the outcome with a NaN in the history depends on its position,
    because ``min`` of a list does.
    """
    if n < 0:
        raise ValueError(f"the non-monotone interval is {n}; give a number of epochs of at least 0")
    old = [v for v in history[: max(0, len(history) - n)] if not math.isnan(v)]
    return bool(old) and loss > min(old)


@dataclass(frozen=True)
class NonMonotonicTrigger:
    """`triggered` with its interval, as part of a run's configuration.

    It remembers nothing: the history is the run's. After it has fired, the caller starts the averaging
    optimizer with fresh slots and does not ask again; in the authors' code of Selfish-RNN the epoch in which
    it fires exchanges no connections.

    Attributes
    ----------
    n : int
        The non-monotone interval in epochs; a larger one waits longer.
    """

    n: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 0:
            raise ValueError(f"n is {self.n!r}; give a whole number of epochs of at least 0")

    def __call__(self, history: Sequence[float], loss: float) -> bool:
        """Return whether to start averaging after the epoch with this loss; see `triggered`."""
        return triggered(history, loss, self.n)
