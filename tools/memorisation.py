"""Memorisation of random labels in dense and compressed phases of AC/DC, beside dense training.

    python tools/memorisation.py --data data/fashion-mnist
    python tools/memorisation.py --data data/fashion-mnist --sparsity 0.9 --epochs 60 --phase 6 --plot memory.png

The labels of some training images are drawn anew. At the end of each epoch these images are classified: how many get
their random label, and how many their true one? Printed is the last epoch of each phase. The phases are those of the
published run on 200 epochs (a warm-up of half a phase, phases of one length, the rest compressed), with shorter ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from refimpl.analysis.memorisation import Memory, MemoryWatcher
from refimpl.analysis.watch import Several
from refimpl.cli.progress import Progress
from refimpl.datasets import Images, RandomLabels, first_images, random_labels
from refimpl.extras import MissingExtraError
from refimpl.methods.phases import Phases
from refimpl.rng import generator
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.corpora import open_corpus
from refimpl.training.loop import Run, stopping_on_signals


def phases_of(epochs: int, length: int) -> Phases:
    """Return phases of one length after a warm-up of half of it; the last one, compressed, takes what is left.

    Raises
    ------
    ValueError
        If a phase has less than an epoch, or two do not fit into the run.
    """
    warmup = max(1, length // 2)
    times = (epochs - warmup - length) // (2 * length) if length >= 1 else 0
    if times < 1:
        raise ValueError(
            f"phases of {length} epochs do not fit into {epochs}; give phases of at least 1 epoch, and at least "
            f"{warmup + 3 * max(length, 1)} epochs"
        )
    return Phases.regular(
        epochs, warmup=warmup, compressed=length, dense=length, final=epochs - warmup - 2 * times * length
    )


def configured(base: Config, sparsity: float | None, epochs: int, length: int) -> Config:
    """Return the configuration of a run: AC/DC of a sparsity, or dense training for None; no augmentation."""
    settings = [f"epochs={epochs}", "augment=false"]
    if sparsity is None:
        return override(base, [*settings, "method=dense"])
    phases = phases_of(epochs, length)
    turns = [f"compress={list(phases.compress)}", f"decompress={list(phases.decompress)}"]
    return override(base, [*settings, "method=acdc", f"sparsity={sparsity}", *turns])


def watch(config: Config, labels: RandomLabels) -> list[Memory]:
    """Train, and return what is remembered at the end of each epoch."""
    run, watcher = Run(config, labels.images), MemoryWatcher(labels)
    with stopping_on_signals(run):
        if run.train(Several([watcher, Progress()])) == "stopped":
            raise KeyboardInterrupt
    return watcher.epochs


def ends(epochs: Sequence[Memory]) -> list[Memory]:
    """Return the last epoch of each phase."""
    return [list(phase)[-1] for _, phase in groupby(epochs, key=lambda memory: memory.phase)]


def table(runs: dict[str, list[Memory]]) -> str:
    """Return the last epochs of the phases as a table in Markdown."""
    lines = ["| run | phase, to epoch | random label | true label |", "|---|---|---|---|"]
    for name, epochs in runs.items():
        for memory in ends(epochs):
            lines.append(f"| {name} | {memory.phase}, {memory.epoch + 1} | {memory.random:.3f} | {memory.true:.3f} |")
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    """Read numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given; give numbers with commas between them") from None


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--recipe", default="mlp-fashion-mnist-acdc", help="model and optimizer (default: %(default)s)")
    made.add_argument("--data", required=True, metavar="DIR", help="folder of the images")
    made.add_argument("--sparsity", type=numbers, default=[0.5, 0.9, 0.95], help="default 0.5,0.9,0.95")
    made.add_argument("--images", type=int, default=5000, help="training images that are used (default: %(default)s)")
    made.add_argument("--random", type=int, default=500, help="of these, with a random label (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    made.add_argument("--phase", type=int, default=4, help="length of a phase in epochs (default: %(default)s)")
    made.add_argument("--seed", type=int, default=21, help="of runs and labels (default: %(default)s)")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of all runs")
    made.add_argument("--json", metavar="FILE", help="write every epoch")
    made.add_argument("--plot", metavar="FILE", help="draw a figure; needs matplotlib")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print the table."""
    made = parser()
    given = made.parse_args(arguments)
    try:
        runs = _run(given)
    except (MissingExtraError, ValueError, OSError) as error:
        made.error(str(error))
    print(f"\n{table(runs)}")
    if given.json:
        listed: dict[str, Any] = {name: [asdict(memory) for memory in epochs] for name, epochs in runs.items()}
        Path(given.json).write_text(json.dumps({"settings": vars(given), "runs": listed}, indent=1) + "\n", "utf-8")
    if given.plot:
        from refimpl.plots import save
        from refimpl.plots_acdc import draw_memorisation

        save(draw_memorisation(runs), given.plot)
    return 0


def _run(given: argparse.Namespace) -> dict[str, list[Memory]]:
    if given.plot:
        from refimpl.plots import check_plot

        check_plot(given.plot)
    base = override(load_recipe(given.recipe), [f"data.corpus={given.data}", f"seed={given.seed}", *given.set])
    names: dict[str, float | None] = {"dense": None, **{f"AC/DC, sparsity {s:g}": s for s in given.sparsity}}
    configs = {name: configured(base, sparsity, given.epochs, given.phase) for name, sparsity in names.items()}
    corpus = open_corpus(base)
    if not isinstance(corpus, Images):
        raise ValueError(f"the recipe {given.recipe!r} learns a text; give one that classifies images")
    labels = random_labels(first_images(corpus, given.images), given.random, rng=generator(given.seed, "random-labels"))
    runs = {}
    for name, config in configs.items():
        print(f"\n{name}", flush=True)
        runs[name] = watch(config, labels)
    return runs


if __name__ == "__main__":
    sys.exit(main())
