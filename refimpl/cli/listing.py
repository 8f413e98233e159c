"""``refimpl recipes`` and ``refimpl fetch``."""

from __future__ import annotations

import argparse
from pathlib import Path


def recipes(arguments: argparse.Namespace) -> int:
    """Print name and description of every recipe."""
    from refimpl.training.config import recipes as known

    found = known()
    width = max(len(name) for name, _ in found)
    for name, description in found:
        print(f"{name:<{width}}  {description}")
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Download a data set."""
    from refimpl.datasets import fetch as download

    folder = Path("data", arguments.name) if arguments.out is None else Path(arguments.out)
    for path in download(arguments.name, folder, base_url=arguments.mirror):
        print(path)
    return 0
