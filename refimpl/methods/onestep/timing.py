"""When an exchange is due and what fraction it drops, as functions of the step."""

from __future__ import annotations

from typing import Literal

from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.schedule import Cosine


def drop_fraction(
    step: int,
    *,
    initial: float,
    end: int,
    begin: int = 0,
    total: int | None = None,
    shape: Literal["cosine", "constant", "linear", "power"] = "cosine",
    power: float = 1.0,
    conventions: Conventions = DEFAULT,
) -> float:
    r"""Return the drop fraction at a step.

    Parameters
    ----------
    step : int
        By the counter that ``step_counter`` names.
    initial : float
        :math:`\alpha`, from 0 to 1.
    end, begin : int
        The window of exchanges.
    total : int, optional
        Steps of the whole run, for the conventions whose cosine spans them; by default ``end``.
    shape : {"cosine", "constant", "linear", "power"}
        The cosine of the conventions (fields ``cosine_*``); :math:`\alpha`; :math:`\alpha (1 - t/T)` with the span
        and origin of the cosine; or :math:`\alpha (1 - (t - b)/(e - b))^k` over the window from b to e.
    power : float
        k.

    Raises
    ------
    ValueError
        If the fraction is outside [0, 1] or the shape is unknown.
    """
    curve = Cosine.by(conventions, initial, end, begin=begin, total=total)
    if shape == "cosine":
        return curve(step)
    if shape == "constant":
        return initial
    if shape == "linear":
        return initial * max(0.0, 1 - max(0, step - curve.origin) / curve.steps)
    if shape == "power":
        return initial * float(max(0.0, 1 - max(0, step - begin) / (end - begin)) ** power)
    raise ValueError(f"the shape of the drop fraction is {shape!r}; give 'cosine', 'constant', 'linear' or 'power'")


def exchange_due(
    step: int,
    *,
    interval: int,
    begin: int = 0,
    end: int | None = None,
    last: int | None = None,
    conventions: Conventions = DEFAULT,
) -> bool:
    """Tell whether an exchange is due at a step.

    Parameters
    ----------
    step : int
        By the counter that ``step_counter`` names: the number of steps done when the question is asked, with this one
        or without.
    interval : int
        Steps between exchanges, at least 1.
    begin, end : int
        The window; what becomes of its end is ``update_end``.
    last : int, optional
        Step of the last exchange, for ``update_period="since-last"``; None before the first.
    conventions : Conventions
        Of which the fields ``update_*`` are read.
    """
    if interval < 1:
        raise ValueError(f"the interval between exchanges is {interval} steps; give at least 1")
    if step < begin or (step == 0 and conventions.update_zero == "never"):
        return False
    bounded = end is not None and conventions.update_end != "none"
    if bounded and step >= (end or 0) + (conventions.update_end == "inclusive"):
        return False
    if conventions.update_period == "since-last":
        return last is None or last + interval <= step
    return (step - (begin if conventions.update_period == "from-begin" else 0)) % interval == 0
