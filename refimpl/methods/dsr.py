r"""DSR, dynamic sparse reparameterization: one threshold for all tensors, and connections that move between them.

With :math:`N_p` entries that an exchange should prune, an adaptive threshold H, and the tensors :math:`l` of
:math:`n_l` places, every so many steps:

.. math::
    D_l &= \{ p \in S_l : |w_p| < H \}, \qquad K = \sum_l |D_l|, \qquad R_l = |S_l| - |D_l| \\
    H &\leftarrow \begin{cases}
        2H & \text{if } K < 0.9\,N_p \\
        H/2 & \text{if } K > 1.1\,N_p \\
        H & \text{otherwise}
    \end{cases} \\
    G_l &= K\,\frac{R_l}{\sum_m R_m} \text{ places of } l \text{ that are free and were not just pruned, at random}

and the new connections start at 0. The total is constant, while tensors whose weights are large gain places from the
others. S = A = B, and memory is O(|S|). The exchanges become rarer: their interval doubles from time to time.

Source: Mostafa, Wang, "Parameter efficient training of deep convolutional neural networks by dynamic sparse
reparameterization", ICML 2019, section 3 and Algorithm 1.

Deviations
----------
- :math:`N_p` is given as a fraction of what is stored; the paper gives a number for each network.
- The authors' program rounds the shares and hands the remainder to a tensor chosen at random. Here the remainder goes
  to the largest fractions, and what a tensor has no room for to the others (:mod:`refimpl.methods.shares`), so that no
  draw decides a count.
- Each pool (convention ``pool``; the paper's are the tensors) keeps its largest weight even below the threshold.
- No more is pruned than there are free places: of a model so dense that there are too few, the smallest of those below
  H go. K in the rule for H is the number before this limit.
- What was just pruned never grows back, and growth is exact: the conventions ``regrow`` and ``growth_count`` are not
  read.
- The interval doubles a fixed number of times after equal stretches of steps; the authors' program does so by epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions, rounded
from refimpl.methods.drop import drop_smallest
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import at_random, move, values_in
from refimpl.methods.schedule import Constant
from refimpl.methods.shares import share_out
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


@dataclass(frozen=True)
class Doubling:
    """At multiples of an interval that doubles after each stretch of so many steps, a few times.

    Attributes
    ----------
    interval : int
        At the beginning, in training steps.
    stretch : int or None
        Steps after which the interval doubles; None keeps it.
    times : int
        How often it doubles at most.
    """

    interval: int
    stretch: int | None = None
    times: int = 3

    def __post_init__(self) -> None:
        if self.interval < 1 or (self.stretch is not None and self.stretch < 1):
            raise ValueError(
                f"exchanges are {self.interval} steps apart and their interval doubles every {self.stretch}; give at "
                "least 1 for each, or None as the second for an interval that stays"
            )

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer as :class:`refimpl.methods.schedule.When` says."""
        doubled = 0 if self.stretch is None else min(self.times, step // self.stretch)
        return not epoch_end and step > 0 and step % (self.interval << doubled) == 0


@dataclass(frozen=True)
class Threshold:
    """H before and after the last exchange, which may be asked for again.

    Attributes
    ----------
    step : int
        Of the last exchange.
    before, after : float
    """

    step: int
    before: float
    after: float

    def at(self, step: int) -> float:
        """Return H with which the exchange of a step begins."""
        return self.before if step == self.step else self.after


class DSR(DropAndGrow):
    """DSR; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores at the start.
    drop_fraction : float
        :math:`N_p` as a fraction of all stored entries, above 0 and at most 1.
    threshold : float
        H at the start, above 0.
    interval : int
        Training steps between exchanges, at the start.
    growth_period : int, optional
        Training steps after which the interval doubles, three times at most; None keeps it.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If a number is outside its range.
    """

    name = "dsr"

    def __init__(
        self,
        allocation: Allocation,
        *,
        drop_fraction: float = 0.2,
        threshold: float = 1e-3,
        interval: int = 1000,
        growth_period: int | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        if not 0 < drop_fraction <= 1:
            raise ValueError(f"the drop fraction of DSR is {drop_fraction}; give a number above 0 and at most 1")
        if not 0 < threshold < np.inf:
            raise ValueError(f"the threshold of DSR is {threshold}; give a finite number above 0, such as 1e-3")
        strict = replace(conventions, regrow="forbid", growth_count="exact")
        super().__init__(allocation, Constant(drop_fraction), Doubling(interval, growth_period), strict)
        self.first_threshold = threshold
        self.threshold = Threshold(0, threshold, threshold)

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports; the threshold is that of the start."""
        self.threshold = Threshold(0, self.first_threshold, self.first_threshold)
        return super().supports(specs, seed=seed)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Prune what lies below the threshold, share the places out by what survives, and adapt the threshold."""
        limit = self.threshold.at(step)
        goes = {pool.label: below(values_in(pool, params), limit) for pool in self.pools}
        stored = np.array([goes[pool.label].size for pool in self.pools])
        free = np.array([pool.size for pool in self.pools]) - stored  # what has just been pruned is not free
        pruned = sum(int(np.count_nonzero(flags)) for flags in goes.values())
        self.threshold = Threshold(step, limit, self._adapted(limit, pruned, int(stored.sum())))
        if pruned > free.sum():
            goes, pruned = self._smallest(params, goes, int(free.sum())), int(free.sum())

        survive = stored - np.array([np.count_nonzero(flags) for flags in goes.values()])
        want = {
            pool.label: int(count) for pool, count in zip(self.pools, share_out(pruned, survive, free), strict=True)
        }
        grow = at_random(seed, step, self.conventions)
        return move(params, self.pools, goes=goes, want=want, grow=grow, conventions=self.conventions)

    def _adapted(self, limit: float, pruned: int, stored: int) -> float:
        """Return the next threshold."""
        asked = rounded(self.drop_fraction(0) * stored, self.conventions.drop_rounding)  # N_p
        if pruned < 0.9 * asked:
            return 2 * limit
        return limit / 2 if pruned > 1.1 * asked else limit

    def _smallest(self, params: Params, goes: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Return flags for the ``count`` smallest of the entries that would go."""
        flags = np.concatenate(list(goes.values()))
        scores = np.concatenate([np.abs(values_in(pool, params)) for pool in self.pools])[flags]
        places = np.flatnonzero(flags)[drop_smallest(scores, count)]
        flags[:] = False
        flags[places] = True
        return dict(zip(goes, np.split(flags, np.cumsum([part.size for part in goes.values()])[:-1]), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, their counts, and the threshold."""
        t = self.threshold
        return super().state_dict() | {"threshold": [t.step, t.before, t.after]}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools, their counts, and the threshold."""
        super().load_state_dict(state, arrays)
        step, before, after = state["threshold"]
        self.threshold = Threshold(int(step), float(before), float(after))


def below(values: np.ndarray, limit: float) -> np.ndarray:
    """Return a flag for each value, true where the magnitude is below a limit; the largest is never flagged.

    Raises
    ------
    ValueError
        If a value is NaN.
    """
    magnitude = np.abs(values)
    goes = magnitude < limit
    if magnitude.size:
        largest = int(np.argmax(magnitude))  # the first NaN, if there is one
        if np.isnan(magnitude[largest]):
            raise ValueError(
                "a weight to be compared with the threshold is NaN; training has diverged, so lower the learning rate "
                "or clip the gradient"
            )
        goes[largest] = False
    return goes
