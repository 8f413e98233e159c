"""``refimpl recipes``, ``refimpl methods`` and ``refimpl fetch``."""

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


def methods(arguments: argparse.Namespace) -> int:
    """Print name and summary of every method, from the docstring of its module."""
    import sys

    from refimpl.methods import METHODS, Powerpropagation

    width = max(map(len, METHODS))
    for name, kind in [*METHODS.items(), ("power=2", Powerpropagation)]:
        text = sys.modules[kind.__module__].__doc__ or ""
        print(f"{name:<{width}}  {' '.join(text.strip().split(chr(10) * 2)[0].split())}")
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Download a data set."""
    from refimpl.datasets import fetch as download

    folder = Path("data", arguments.name) if arguments.out is None else Path(arguments.out)
    for path in download(arguments.name, folder, base_url=arguments.mirror):
        print(path)
    return 0
