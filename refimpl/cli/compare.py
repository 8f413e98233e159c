"""``refimpl compare``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from refimpl.cli import stop_if_interrupted
from refimpl.cli.progress import Progress
from refimpl.cli.train import configure
from refimpl.plots import check_plot, save
from refimpl.training.compare import Row, compare, names, table
from refimpl.training.config import load_recipe


def run_all(arguments: argparse.Namespace) -> int:
    """Train each method, and print the table as it grows."""
    stop_if_interrupted()
    base = configure(load_recipe(arguments.recipe), arguments)
    methods = names() if arguments.methods == "all" else arguments.methods.split(",")
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else [base.seed]
    except ValueError:
        raise ValueError(f"--seeds is {arguments.seeds!r}; give whole numbers with commas between them") from None
    if arguments.plot:
        check_plot(arguments.plot)  # before hours of training
    rows: list[Row] = []

    def watch(name: str, seed: int) -> Progress:
        print(f"\n{name}, seed {seed}", flush=True)
        return Progress()

    def done(row: Row) -> None:
        rows.append(row)

    try:
        compare(base, methods, seeds, arguments.out, observer=watch, done=done)
    finally:
        if rows:
            print(f"\n{table(rows)}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1), "utf-8")
    if arguments.plot:
        from refimpl.plots_compare import draw

        save(draw(rows), arguments.plot)
    return 0
