"""Schedules: when an exchange is due, and what fraction of the weights it drops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from refimpl.methods.conventions import TimingConventions, Width


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
    r"""At multiples of an interval within a window: :math:`t \bmod \Delta T = 0`, :math:`t < T_{\mathrm{end}}`.

    Attributes
    ----------
    interval : int
        :math:`\Delta T`, in training steps.
    end_step : int or None
        :math:`T_{\mathrm{end}}`, itself excluded; None for no end.
    begin : int
        The first step at which an exchange may be due.
    period : {"multiples", "from-begin", "since-last"}
        Whether the steps are counted from 0, from the begin, or from the last exchange. The last two agree as long as
        every step is asked about; before the first exchange, ``"since-last"`` is due at the begin.
    zero : {"never", "if-due"}
        Whether an exchange may be due at step 0.
    end : {"exclusive", "inclusive", "none"}
        Whether one may be due at ``end_step``, or even after it.

    Raises
    ------
    ValueError
        If the interval is below 1.
    """

    interval: int
    end_step: int | None = None
    begin: int = 0
    period: Literal["multiples", "from-begin", "since-last"] = "multiples"
    zero: Literal["never", "if-due"] = "never"
    end: Literal["exclusive", "inclusive", "none"] = "exclusive"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"the interval between exchanges is {self.interval} steps; give at least 1")

    @classmethod
    def by(
        cls, conventions: TimingConventions, interval: int, end_step: int | None = None, begin: int = 0
    ) -> EverySteps:
        """Return the schedule whose window and period the conventions define."""
        return cls(
            interval, end_step, begin, conventions.update_period, conventions.update_zero, conventions.update_end
        )

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer as :class:`When` says."""
        if epoch_end or step < max(self.begin, int(self.zero == "never")):
            return False
        bounded = self.end_step is not None and self.end != "none"
        if bounded and step >= (self.end_step or 0) + (self.end == "inclusive"):
            return False
        if self.period == "since-last":
            first = max(self.begin, int(self.zero == "never"))
            return (step - first) % self.interval == 0
        return (step - (self.begin if self.period == "from-begin" else 0)) % self.interval == 0


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

    .. math:: d(t) = f + (d_0 - f) \frac{1 + \cos(\pi t / T)}{2}

    Attributes
    ----------
    initial : float
        :math:`d_0`, from 0 to 1.
    steps : int
        :math:`T \ge 1`, in training steps.
    floor : float
        :math:`f`, from 0 to 1. With 0 this is RigL's :math:`\tfrac\alpha2(1 + \cos(\pi t / T_{\mathrm{end}}))`;
        Selfish-RNN's code uses 0.005.
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
    origin : int
        The step at which the cosine begins; before it the fraction is the initial one.
    width : {"float64", "float32"}
        Precision in which the closed form is evaluated.

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
    *Deviations.* RigL's paper writes the formula with a floor of 0; the code of [1]_ and [2]_ has 0.005. By default the
    fraction stays at the floor past :math:`T`, where unclamped formulas rise again.
    """

    initial: float
    steps: int
    floor: float = 0.0
    form: Literal["closed", "recursive"] = "closed"
    past: Literal["hold", "rise"] = "hold"
    origin: int = 0
    width: Width = "float64"

    def __post_init__(self) -> None:
        _check(self.initial)
        _check(self.floor)
        if self.steps < 1:
            raise ValueError(f"the cosine of the drop fraction runs over {self.steps} steps; give at least 1")
        for option, value, choices in (
            ("form", self.form, ("closed", "recursive")),
            ("past", self.past, ("hold", "rise")),
        ):
            if value not in choices:
                raise ValueError(f"{option} of the drop fraction is {value!r}; give {' or '.join(map(repr, choices))}")

    @classmethod
    def by(
        cls, conventions: TimingConventions, initial: float, end: int, *, begin: int = 0, total: int | None = None
    ) -> Cosine:
        """Return the cosine that the conventions define.

        Parameters
        ----------
        conventions : TimingConventions
            Of which the fields ``cosine_*`` and ``fraction_width`` are read.
        initial : float
            The drop fraction at the beginning.
        end, begin : int
            The window of exchanges.
        total : int, optional
            Steps of the whole run, for ``cosine_span="run"``; by default ``end``.
        """
        spans = {"end": end, "window": end - begin, "run": end if total is None else total}
        return cls(
            initial,
            spans[conventions.cosine_span],
            floor=float(conventions.cosine_floor),
            form=conventions.cosine_form,
            past=conventions.cosine_past,
            origin=begin if conventions.cosine_origin == "begin" else 0,
            width=conventions.fraction_width,
        )

    def __call__(self, step: int) -> float:
        """Return the drop fraction at a step."""
        step = max(0, step - self.origin)
        if self.past == "hold":
            step = min(step, self.steps)
        if self.form == "closed" and self.width == "float32":
            one, length = np.float32(1), np.float32(self.steps)
            wave = one + np.cos(np.float32(math.pi) * np.float32(step) / length)
            return float(np.float32(self.floor) + np.float32(self.initial - self.floor) / np.float32(2) * wave)
        if self.form == "closed":
            return self.floor + (self.initial - self.floor) * (1 + math.cos(math.pi * step / self.steps)) / 2
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


def over_the_run(drop_fraction: Fraction | float, total_steps: int | None) -> Fraction:
    """Return a schedule as it is, and for a number the cosine from it down to 0.005 over a whole run.

    Raises
    ------
    ValueError
        If it is a number and the length of the run is not given.
    """
    if callable(drop_fraction):
        return drop_fraction
    if total_steps is None:
        raise ValueError(
            "a drop fraction that is a number starts a cosine; give total_steps, the length of the run, too"
        )
    return Cosine(drop_fraction, total_steps, floor=0.005)
