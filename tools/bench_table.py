"""Tables on the screen, and a line that says what is being measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print a table: the first column to the left, numbers to the right, floats with three digits that count."""
    cells = [list(head), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(f"{text:<{w}}" if k == 0 else f"{text:>{w}}" for k, (text, w) in enumerate(zip(row, widths))))
    if note:
        print(note)
    sys.stdout.flush()


def _text(value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) >= 1 else 3}f}"


class Progress:
    """One line on a terminal, written over and over; elsewhere only what is begun."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._line = tqdm(bar_format="{desc}", disable=None, leave=False)
        if self._line.disable:
            print(f"measuring {what}", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        self._line.set_description_str(f"{self.what}: {text}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.close()
