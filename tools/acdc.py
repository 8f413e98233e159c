"""AC/DC's two models beside dense training, GMP and RigL of the same budget: accuracy, operations and time.

    python tools/acdc.py acdc-fashion-mnist --data data/fashion-mnist --folder runs/acdc
    python tools/acdc.py acdc-fashion-mnist --data DIR --sparsity 0.9 --seeds 1,2,3 --folder runs/acdc --figures figures

For each sparsity and seed: AC/DC's sparse model, its dense twin, the twin after it was trained on to the end, GMP and
RigL; and for each seed one dense run. Each run has a folder of its own; one that was stopped goes on where it was, and
one that has finished is not trained again. Operations are those executed, as fractions of the dense run's. Times of
steps are medians over the phases of the runs; "sparse : dense" is of steps of one model, stored either way, taken in
turn.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acdc_runs import MODELS, Outcome, Plan, agreements, run_all

from refimpl.analysis.masks import phase_changes, read_supports
from refimpl.analysis.twins import Agreement
from refimpl.analysis.zeros import read_zeros
from refimpl.cli.progress import Progress
from refimpl.datasets import Images, first_images
from refimpl.extras import MissingExtraError
from refimpl.training.config import load_recipe, override
from refimpl.training.corpora import open_corpus

HEADINGS = (
    "sparsity", "model", "epoch", "test accuracy", "training FLOPs", "inference FLOPs", "dense step, ms",
    "sparse step, ms", "sparse : dense", "training, min",
)  # fmt: skip
Rows = dict[tuple[str, float | None], list[Outcome]]


def grouped(outcomes: Sequence[Outcome]) -> Rows:
    """Return the outcomes by model and sparsity, the seeds together, in the order of `MODELS`."""
    targets = sorted({o.target for o in outcomes if o.target is not None})
    found: Rows = {}
    for target in (None, *targets):
        for model in MODELS:
            rows = [o for o in outcomes if (o.model, o.target) == (model, target)]
            if rows:
                found[model, target] = rows
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and sample standard deviation, or the one value that there is."""
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table in Markdown, a line for each model and sparsity."""
    lines = [
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for (model, target), rows in grouped(outcomes).items():
        cells = [
            "" if target is None else f"{target:g}",
            model,
            ", ".join(str(row.epoch) for row in rows),
            spread([row.accuracy for row in rows], ".4f"),
            f"{statistics.fmean(row.training for row in rows):.3f}",
            f"{statistics.fmean(row.inference for row in rows):.3f}",
            _times([row.dense_ms for row in rows]),
            _times([row.sparse_ms for row in rows]),
            _times([row.ratio for row in rows], ".2f"),
            f"{statistics.fmean(row.seconds for row in rows) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(values: Sequence[float | None], form: str = ".1f") -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else "-"


def agreement_table(pairs: dict[str, Agreement]) -> str:
    """Return how far pairs of models agree as a table in Markdown."""
    lines = ["| models | same answer | cross-entropy, nats | both right | wrong alike |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {a.same:.4f} | {a.cross_entropy:.4f} | {a.both_right:.4f} | {a.both_wrong_alike:.4f} |"
        for name, a in pairs.items()
    ]
    return "\n".join(lines)


def points(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float | None, float, list[float]]]]:
    """Return what the figure shows of each model: sparsity, operations of training, accuracies of the seeds."""
    found: dict[str, list[tuple[float | None, float, list[float]]]] = {}
    for (model, target), rows in grouped(outcomes).items():
        cost = statistics.fmean(row.training for row in rows)
        found.setdefault(model, []).append((target, cost, [row.accuracy for row in rows]))
    return found


def draw(plan: Plan, outcomes: Sequence[Outcome], pairs: dict[str, Agreement], into: Path) -> list[Path]:
    """Draw the comparison and, of the first seed's runs of AC/DC, masks, zeros and agreement; return the files."""
    from refimpl import plots_acdc
    from refimpl.plots import save

    runs = {f"sparsity {s:g}": plan.path("acdc", plan.seeds[0], s) for s in plan.sparsities}
    changes = {name: phase_changes(read_supports(path)) for name, path in runs.items()}
    figures = {
        "comparison": plots_acdc.draw_comparison(points(outcomes)),
        "agreement": plots_acdc.draw_agreement(pairs),
        "zeros": plots_acdc.draw_zeros({name: read_zeros(path) for name, path in runs.items()}),
    }
    if any(changes.values()):
        figures["masks"] = plots_acdc.draw_mask_changes(changes)
    for name, figure in figures.items():
        save(figure, into / f"{name}.png")
    return [into / f"{name}.png" for name in figures]


def numbers(kind: type[Any]) -> Any:
    """Return a reader of numbers with commas between them."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(number) for number in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is given; give numbers with commas between them") from None

    return read


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", help="of AC/DC, such as acdc-fashion-mnist")
    made.add_argument("--data", required=True, metavar="DIR", help="folder of the images")
    made.add_argument("--sparsity", type=numbers(float), default=[0.8, 0.9, 0.95], help="default 0.8,0.9,0.95")
    made.add_argument("--seeds", type=numbers(int), default=[1, 2], help="default 1,2")
    made.add_argument("--images", type=int, metavar="N", help="train on the first N images alone")
    made.add_argument("--folder", type=Path, default=Path("runs/acdc"), help="of the runs (default: %(default)s)")
    for name, whose in (("--set", "all runs"), ("--gmp", "GMP"), ("--rigl", "RigL")):
        made.add_argument(
            name, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=f"settings of {whose}"
        )
    made.add_argument("--json", metavar="FILE", help="write what came of each run")
    made.add_argument("--figures", type=Path, metavar="DIR", help="draw figures; needs matplotlib")
    return made


def planned(given: argparse.Namespace) -> Plan:
    """Return what the command line asks for.

    Raises
    ------
    ValueError, FileNotFoundError
        If the recipe, the data or a setting is not as it should be.
    """
    base = override(load_recipe(given.recipe), [f"data.corpus={given.data}", *given.set])
    if base.method.name != "acdc":
        raise ValueError(f"the recipe {given.recipe!r} trains with {base.method.name!r}; give one of AC/DC")
    images = open_corpus(base)
    if not isinstance(images, Images):
        raise ValueError(f"the recipe {given.recipe!r} learns a text; give one that classifies images")
    if given.images is not None:
        images = first_images(images, given.images)
    return Plan(base, given.sparsity, given.seeds, given.folder, images, given.gmp, given.rigl)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, and print the tables."""
    made = parser()
    given = made.parse_args(arguments)

    def watch(name: str) -> Progress:
        print(f"\n{name}", flush=True)
        return Progress()

    try:
        if given.figures:
            from refimpl.plots import check_plot

            check_plot(given.figures / "comparison.png")  # before hours of training
        plan = planned(given)
        outcomes = run_all(plan, watch)
        pairs = agreements(plan, plan.seeds[0])
    except (MissingExtraError, ValueError, OSError) as error:
        made.error(str(error))
    words = ["python", "tools/acdc.py", *(sys.argv[1:] if arguments is None else arguments)]
    print(f"\n    {shlex.join(words)}\n\n{table(outcomes)}\n\n{agreement_table(pairs)}", flush=True)
    if given.json:
        told: dict[str, Any] = {"command": shlex.join(words), "outcomes": [asdict(o) for o in outcomes]}
        told["agreement"] = {name: asdict(pair) for name, pair in pairs.items()}
        Path(given.json).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    if given.figures:
        for path in draw(plan, outcomes, pairs, given.figures):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
