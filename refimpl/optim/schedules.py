r"""Schedules: numbers that depend on the step, and on nothing else.

A schedule is called with the number :math:`t` of steps (or epochs) that are *done*, so :math:`t = 0` is the
value to begin with; the learning rate of an optimizer's step ``s``, which counts from 1, is
``schedule(s - 1)``. A resumed run needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
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
    """

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        _require_count("steps", self.steps, 0)

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        if step < self.steps:
            return self.then(0) * (step + 1) / (self.steps + 1)
        return self.then(step - self.steps)


@dataclass(frozen=True)
class CosineDropFraction:
    r"""The share of connections that an exchange replaces, annealed by half a cosine.

    .. math:: d(t) = f + (d_0 - f) \frac{1 + \cos(\pi t / T)}{2}

    Attributes
    ----------
    initial, floor : float
        :math:`d_0` and :math:`f`, from 0 to 1.
    steps : int
        :math:`T \ge 1`, in optimizer steps.
    form : {"closed", "recursive"}
        ``"recursive"`` evaluates it as ``torch.optim.lr_scheduler.CosineAnnealingLR`` does, to the bit:

        .. math:: d(t) = f + (d(t-1) - f) \frac{1 + \cos(\pi t / T)}{1 + \cos(\pi (t - 1) / T)},

        except one step past an odd multiple of :math:`T`, where the quotient has no meaning and
        :math:`d(t) = d(t-1) + (d_0 - f)(1 - \cos(\pi / T)) / 2`. It differs by accumulated rounding alone,
        which can still move a count of connections by one. The first call of a period costs :math:`T` steps,
        later ones nothing.
    past : {"hold", "rise"}
        After :math:`T`: stay at the floor, or follow the formula up again, as torch does. Selfish-RNN's
        recipes run a few steps past :math:`T`.

    Raises
    ------
    ValueError
        If an option is outside its range.

    References
    ----------
    .. [1] Dettmers, Zettlemoyer, "Sparse networks from scratch", arXiv 1907.04840 (cosine annealing of the
       pruning rate).
    .. [2] Liu, Mocanu, Pei, Pechenizkiy, "Selfish sparse RNN training", ICML 2021.

    Notes
    -----
    *Deviations.* RigL's paper writes the formula with a floor of 0; the code of [1]_ and [2]_ has 0.005.
    """

    initial: float
    floor: float
    steps: int
    form: Literal["closed", "recursive"] = "closed"
    past: Literal["hold", "rise"] = "hold"

    def __post_init__(self) -> None:
        for option in ("initial", "floor"):
            value = getattr(self, option)
            require_number(option, value, 0)
            if value > 1:
                raise ValueError(f"{option} is {value!r}; a fraction is from 0 to 1")
        _require_count("steps", self.steps, 1)
        require_choice("form", self.form, "closed", "recursive")
        require_choice("past", self.past, "hold", "rise")

    def __call__(self, step: int) -> float:
        """Return the fraction after ``step`` optimizer steps."""
        if self.form == "closed":
            return _cosine(self.initial, self.floor, self.steps, self.past, step)
        if self.past == "hold":
            step = min(step, self.steps)
        periods = 1 + step // self.steps
        return _recursive_cosine(float(self.initial), float(self.floor), self.steps, periods)[step]


@lru_cache(maxsize=8)
def _recursive_cosine(initial: float, floor: float, steps: int, periods: int) -> tuple[float, ...]:
    values = [initial]
    for t in range(1, steps * periods + 1):
        last = values[-1]
        if (t - 1 - steps) % (2 * steps) == 0:
            values.append(last + (initial - floor) * (1 - math.cos(math.pi / steps)) / 2)
        else:
            ratio = (1 + math.cos(math.pi * t / steps)) / (1 + math.cos(math.pi * (t - 1) / steps))
            values.append(ratio * (last - floor) + floor)
    return tuple(values)
