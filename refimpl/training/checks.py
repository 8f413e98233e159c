"""Options say what they accept by their type annotation; the check and its error sentence read it there."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

Scalar = str | bool | int | float


@dataclass(frozen=True)
class Interval:
    """A range of numbers, to stand beside a type: ``Annotated[float, Interval(0, 1, "[)")]``.

    Parameters
    ----------
    low, high : float
        The two ends; infinity is never inside.
    ends : {"[]", "[)", "()", "(]"}
        Whether each end belongs to the range.
    """

    low: float
    high: float = math.inf
    ends: Literal["[]", "[)", "()", "(]"] = "[]"

    def __contains__(self, value: float) -> bool:
        if not -math.inf < value < math.inf:
            return False
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.ends[0] == "(" else f"of at least {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


Positive = Annotated[float, Interval(0, ends="()")]
NonNegative = Annotated[float, Interval(0)]
Fraction = Annotated[float, Interval(0, 1)]
ProperFraction = Annotated[float, Interval(0, 1, "[)")]
Count = Annotated[int, Interval(1)]
CountOrZero = Annotated[int, Interval(0)]
Auto = Literal["auto"]
"""Stands for a default that depends on other options; the option's documentation says on which."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that looks most like ``name``."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def shown(value: object) -> str:
    """Return a value as an error sentence shows it: short, whatever it is."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def accepts_text(annotation: Any) -> bool:
    """Return whether an option of this type is text."""
    return annotation is str or get_origin(annotation) is Literal


def accepted(annotation: Any) -> str:
    """Return in words what an option of this type accepts."""
    base, interval = _split(annotation)
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        *others, last = map(repr, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is UnionType or origin is Union:
        return " or ".join(map(accepted, arguments))
    if origin is tuple and arguments[-1] is ...:
        return f"a list of one or more entries, each {accepted(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} entries, each {accepted(arguments[0])}"
    if origin is Mapping:
        return "a table of names and single values"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[base]
    return f"{words} {interval}" if interval is not None else words


def checked(key: str, annotation: Any, value: Any) -> Any:
    """Return ``value`` in the exact type that the annotation names.

    Integers become floats where a float is asked for, lists become tuples, NumPy's scalars become Python's.

    Raises
    ------
    ValueError
        If the value has another type or lies outside the range; the sentence names the key, what was given
        and what is accepted. A bool is not an integer here, NaN and infinities are not numbers.
    """
    base, interval = _split(annotation)
    origin, arguments = get_origin(base), get_args(base)
    result: Any = None
    if origin is Literal:
        result = value if isinstance(value, str) and value in arguments else None
        if result is None and isinstance(value, str) and len(arguments) > 1:
            close = difflib.get_close_matches(value, arguments, n=1)
            hint = f" (the nearest is {close[0]!r})" if close else ""
            raise ValueError(f"{key} is {shown(value)}; give {accepted(base)}{hint}")
    elif origin is UnionType or origin is Union:
        for alternative in arguments:
            with contextlib.suppress(ValueError):
                return checked(key, alternative, value)
    elif origin is tuple:
        if arguments[-1] is ... and isinstance(value, list | tuple) and value:
            arguments = arguments[:1] * len(value)
        if isinstance(value, list | tuple) and len(value) == len(arguments) and arguments[-1] is not ...:
            return tuple(checked(f"{key}[{i}]", a, v) for i, (a, v) in enumerate(zip(arguments, value)))
    elif origin is Mapping:
        if isinstance(value, Mapping):
            plain = all(isinstance(k, str) and isinstance(v, Scalar) for k, v in value.items())
            result = dict(value) if plain else None
    elif base is bool or base is str:
        result = value if isinstance(value, base) else None
    elif not isinstance(value, bool):
        kind: type[Any] = numbers.Integral if base is int else numbers.Real
        if isinstance(value, kind) and (interval is None or value in interval):
            with contextlib.suppress(OverflowError):  # an integer beyond the largest float
                result = base(value)
    if result is None:
        raise ValueError(f"{key} is {shown(value)}; give {accepted(annotation)}")
    return result


def _split(annotation: Any) -> tuple[Any, Interval | None]:
    if get_origin(annotation) is Annotated:
        base, *extras = get_args(annotation)
        return base, next((extra for extra in extras if isinstance(extra, Interval)), None)
    return annotation, None
