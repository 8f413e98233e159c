r"""Schedules: numbers that depend on the step, and on nothing else.

A schedule is called with the number :math:`t` of steps (or epochs) that are *done*, so :math:`t = 0` is the
value to begin with; the learning rate of an optimizer's step ``s``, which counts from 1, is
``schedule(s - 1)``. A resumed run needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from refimpl.optim.base import require_choice, require_number


class Schedule(Protocol):
    """A function from the number of steps done to a number."""

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        ...


def _require_count(option: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{option} is {value!r}; give a whole number of at least {low}")


def _cosine(initial: float, floor: float, steps: int, past: str, step: int) -> float:
    if past == "hold":
        step = min(step, steps)
    return floor + (initial - floor) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Constant:
    """Always ``value``."""

    value: float

    def __post_init__(self) -> None:
        require_number("value", self.value, 0)

    def __call__(self, step: int) -> float:
        """Return the value."""
        return float(self.value)


@dataclass(frozen=True)
class StepDecay:
    r"""Multiplied by ``gamma`` at each milestone: :math:`\eta_0 \gamma^{\#\{m \le t\}}`.

    Attributes
    ----------
    initial, gamma : float
        The value at the start, and the factor.
    milestones : tuple of int
        Steps done when the factor is applied, in any order. For one every ``k`` steps write
        ``tuple(range(k, total, k))``.
    """

    initial: float
    gamma: float
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        require_number("initial", self.initial, 0)
        require_number("gamma", self.gamma, 0)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            _require_count("each of milestones", milestone, 0)

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        return self.initial * self.gamma ** sum(milestone <= step for milestone in self.milestones)


@dataclass(frozen=True)
class EpochDecay:
    r"""Constant for some epochs, then geometric.

    In epoch :math:`e = 0, 1, \dots` it is :math:`\eta_0 \gamma^{\max(0, \, e - e_0)}`. The classic schedule
    of LSTM language models on the Penn Treebank. To be called with the number of epochs done.

    Attributes
    ----------
    initial, gamma : float
        The value at the start, and the factor for each epoch.
    start : int
        :math:`e_0`: epochs done in the last epoch with the full value.

    References
    ----------
    .. [1] Zaremba, Sutskever, Vinyals, "Recurrent neural network regularization", arXiv 1409.2329.
    """

    initial: float
    gamma: float
    start: int = 0

    def __post_init__(self) -> None:
        require_number("initial", self.initial, 0)
        require_number("gamma", self.gamma, 0)
        _require_count("start", self.start, 0)

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` epochs."""
        return self.initial * self.gamma ** max(0, step - self.start)


@dataclass(frozen=True)
class Cosine:
    r"""Half a cosine: :math:`f + (\eta_0 - f)(1 + \cos(\pi t / T)) / 2`.

    Attributes
    ----------
    initial, floor : float
        :math:`\eta_0` at the start and :math:`f` after :math:`T` steps.
    steps : int
        :math:`T \ge 1`.
    past : {"hold", "rise"}
        After :math:`T`: stay at the floor, or follow the formula up again.

    References
    ----------
    .. [1] Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, equation 5
       (one period).
    """

    initial: float
    floor: float
    steps: int
    past: Literal["hold", "rise"] = "hold"

    def __post_init__(self) -> None:
        require_number("initial", self.initial, 0)
        require_number("floor", self.floor, 0)
        _require_count("steps", self.steps, 1)
        require_choice("past", self.past, "hold", "rise")

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        return _cosine(self.initial, self.floor, self.steps, self.past, step)


@dataclass(frozen=True)
class LinearWarmup:
    r"""A straight rise to the start of another schedule.

    It is :math:`s(0)\,\frac{t + 1}{T + 1}` for :math:`t < T`, and then :math:`s(t - T)`. The first step is
    not wasted on a learning rate of 0, and the two pieces join. (Others start at 0, or at a given factor.)

    Attributes
    ----------
    steps : int
        :math:`T \ge 0`.
    then : Schedule
        :math:`s`, which begins when the warm-up ends.
    full : {"after", "last"}
        When :math:`s(0)` is reached: after the warm-up, or in its last step already, by :math:`s(0)\,(t + 1)/T`, so
        that two steps have it. The latter is the schedule by epochs of AC/DC's authors, and of others who train on
        ImageNet.
    """

    steps: int
    then: Schedule
    full: Literal["after", "last"] = "after"

    def __post_init__(self) -> None:
        _require_count("steps", self.steps, 0)
        require_choice("full", self.full, "after", "last")

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        if step < self.steps:
            return self.then(0) * (step + 1) / (self.steps + (self.full == "after"))
        return self.then(step - self.steps)
