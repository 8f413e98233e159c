"""``refimpl plot``."""

from __future__ import annotations

import argparse
from pathlib import Path


def plot(arguments: argparse.Namespace) -> int:
    """Draw runs into one figure and say where it is."""
    from refimpl.plots import draw, read_run, save

    runs = [read_run(path) for path in arguments.runs]
    out = Path(arguments.runs[0], "figure.png") if arguments.out is None else Path(arguments.out)
    save(draw(runs), out)
    print(out)
    return 0
