"""``refimpl conventions``: the choices that papers leave open, and what each system makes of them."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from refimpl.methods.conventions import DEFAULT, TOPICS, Conventions, choices
from refimpl.methods.profiles import ABOUT, PROFILES, profile

SAME = "·"


def conventions(arguments: argparse.Namespace) -> int:
    """Print the table of all profiles, or one of them with explanations."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = table(width) if arguments.profile is None else explained(arguments.profile, width)
    for line in lines:
        print(line.rstrip())
    return 0


def table(width: int) -> Iterator[str]:
    """Yield the lines of the table: every knob with its choices, then the profiles in groups that fit the width."""
    yield from textwrap.wrap(
        "Each knob is a choice that a paper leaves open, or that a system makes otherwise. The default is marked *; "
        "what each choice means: refimpl conventions --profile NAME. In a run: --set method.conventions=PROFILE, and "
        "method.convention.KNOB=CHOICE for one knob.",
        width,
    )
    knob = max(len(field.name) for field in fields(Conventions)) + 2
    for topic in TOPICS:
        yield ""
        yield f"{_title(topic)}".upper()
        for field in fields(topic):
            yield from _wrapped(field.name, _choices(field.name), knob, width)
    names = [name for name in PROFILES if name != "default"]
    cells = {name: {field.name: _cell(name, field.name) for field in fields(Conventions)} for name in names}
    sizes = {name: max(len(name), *map(len, cells[name].values())) + 2 for name in names}
    for group in _groups(names, sizes, width - knob):
        yield ""
        yield " " * knob + "".join(name.ljust(sizes[name]) for name in group)
        for topic in TOPICS:
            for field in fields(topic):
                row = [cells[name][field.name] for name in group]
                if set(row) != {SAME}:
                    yield field.name.ljust(knob) + "".join(c.ljust(sizes[n]) for n, c in zip(group, row))
    yield ""
    yield f"{SAME} is the default; a knob is left out where all profiles of a group have it."


def explained(name: str, width: int) -> Iterator[str]:
    """Yield the lines about one profile: where it comes from, and each knob with its explanation."""
    chosen, about = profile(name), ABOUT[name]
    yield from textwrap.wrap(f"{name}: {about.system}", width, subsequent_indent="  ")
    yield from textwrap.wrap(f"has: {', '.join(about.steps)}", width, subsequent_indent="  ")
    for what, said in (("defect", about.defects), ("note", about.notes)):
        for line in said:
            yield from textwrap.wrap(f"{what}: {line}", width, subsequent_indent="  ")
    for topic in TOPICS:
        yield ""
        yield _title(topic).upper()
        said_of = explanations(topic)
        for field in fields(topic):
            value, usual = getattr(chosen, field.name), getattr(DEFAULT, field.name)
            mark = "*" if value == usual else f"   (default: {_text(usual)})"
            yield f"{field.name} = {_text(value)}{mark}"
            yield from textwrap.wrap(said_of[field.name], width, initial_indent="    ", subsequent_indent="    ")


def explanations(topic: type) -> dict[str, str]:
    """Return what the docstring of a topic says of each of its fields."""
    text = inspect.cleandoc(topic.__doc__ or "").partition("Attributes\n----------\n")[2]
    said = {field.name: "" for field in fields(topic)}
    for name, body in re.findall(r"^(\w+) : [^\n]*\n((?:(?: {4}[^\n]*)?\n?)*)", text, re.MULTILINE):
        said[name] = re.sub(r"[`*]+", "", " ".join(body.split()))
    return said


def _title(topic: type) -> str:
    return (topic.__doc__ or topic.__name__).split("\n")[0].rstrip(".")


def _text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _choices(name: str) -> str:
    usual, others = getattr(DEFAULT, name), choices()[name]
    if not others:
        return f"{_text(usual)}*, or any number"
    return ", ".join(f"{_text(choice)}*" if choice == usual else _text(choice) for choice in others)


def _cell(name: str, field: str) -> str:
    value = getattr(PROFILES[name], field)
    return SAME if value == getattr(DEFAULT, field) else _text(value)


def _wrapped(name: str, text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=name.ljust(indent), subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _groups(names: Sequence[str], sizes: dict[str, int], width: int) -> Iterator[list[str]]:
    """Divide the profiles into groups whose columns fit, each with one at least."""
    group: list[str] = []
    for name in names:
        if group and sum(sizes[n] for n in [*group, name]) > width:
            yield group
            group = []
        group.append(name)
    if group:
        yield group
