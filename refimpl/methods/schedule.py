"""Schedules: when an exchange is due, and what fraction of the weights it drops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class When(Protocol):
    """Tells whether an exchange is due."""

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer for the training step ``step`` (the first is 1), or for the epoch that it ended."""


class Fraction(Protocol):
    """The drop fraction as a function of time."""

    def __call__(self, step: int) -> float:
        """Return the fraction of the stored entries to drop in an exchange at ``step``, in [0, 1]."""


@dataclass(frozen=True)
class EveryEpoch:
    """At the end of each epoch."""

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer as :class:`When` says."""
        return epoch_end


@dataclass(frozen=True)
class EverySteps:
    r"""At multiples of an interval before an end: :math:`t \bmod \Delta T = 0`, :math:`t < T_{\mathrm{end}}`.

    Attributes
    ----------
    interval : int
        :math:`\Delta T`, in training steps.
    end_step : int or None
        :math:`T_{\mathrm{end}}`, itself excluded; None for no end.
    """

    interval: int
    end_step: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"the interval between exchanges is {self.interval} steps; give at least 1")

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer as :class:`When` says."""
        ended = self.end_step is not None and step >= self.end_step
        return not epoch_end and step > 0 and step % self.interval == 0 and not ended


def _check(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"the drop fraction is {fraction}; give a number from 0 to 1")


@dataclass(frozen=True)
class Constant:
    """The same drop fraction at all times."""

    fraction: float

    def __post_init__(self) -> None:
        _check(self.fraction)

    def __call__(self, step: int) -> float:
        """Return the drop fraction."""
        return self.fraction


@dataclass(frozen=True)
class Cosine:
    r"""Half a cosine from the initial drop fraction down to a floor.

    .. math:: d(t) = d_{\min} + (d_0 - d_{\min})\,\tfrac12\bigl(1 + \cos(\pi\,\min(t, T)/T)\bigr)

    With the floor 0 this is RigL's :math:`\tfrac\alpha2(1 + \cos(\pi t / T_{\mathrm{end}}))`; with the floor
    0.005, what Selfish-RNN's code uses. The closed form is evaluated at each step; code that multiplies from
    step to step agrees to rounding. Past :math:`T` the fraction stays at the floor; unclamped formulas rise
    again.

    Attributes
    ----------
    initial : float
        :math:`d_0`, at step 0.
    steps : int
        :math:`T`, in training steps.
    floor : float
        :math:`d_{\min}`.
    """

    initial: float
    steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self.initial)
        _check(self.floor)
        if self.steps < 1:
            raise ValueError(f"the cosine of the drop fraction runs over {self.steps} steps; give at least 1")

    def __call__(self, step: int) -> float:
        """Return the drop fraction at a step."""
        turn = math.cos(math.pi * min(step, self.steps) / self.steps)
        return self.floor + (self.initial - self.floor) * (1 + turn) / 2
