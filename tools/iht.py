"""k-IHT and AC/DC on a sparse least-squares problem: what theory predicts, in numbers and in a figure.

    python tools/iht.py
    python tools/iht.py --plot iht.png

Printed: the loss on the way and the last step that changed the support for three k, with the rate at which the spectrum
says that the loss falls; the floors for three variances of the gradient's noise; and AC/DC with phases of five steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from refimpl.extras import MissingExtraError, require
from refimpl.methods.iht import LeastSquares, Path, alternate, iterate
from refimpl.rng import generator

COUNTS = (10, 20, 40)
VARIANCES = (0.0025, 0.01, 0.04)
NOISY_COUNT = 20
PHASE = 5


def positive(text: str) -> int:
    """Read a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; give at least 1")
    return number


def run(problem: LeastSquares, steps: int, seed: int) -> dict[str, dict[Any, Path]]:
    """Return the paths: exact by k, noisy by variance, and AC/DC's by k."""
    phases = [("dense", PHASE), ("compressed", PHASE)] * -(-steps // (2 * PHASE))
    return {
        "exact": {k: iterate(problem, k, steps) for k in COUNTS},
        "noisy": {
            v: iterate(problem, NOISY_COUNT, 10 * steps, variance=v, rng=generator(seed, "iht/noise"))
            for v in VARIANCES
        },
        "alternating": {NOISY_COUNT: alternate(problem, NOISY_COUNT, phases)},  # type: ignore[arg-type]
    }


def report(problem: LeastSquares, paths: dict[str, dict[Any, Path]]) -> str:
    """Return the numbers in lines."""
    n, d = problem.design.shape
    lines = [
        f"least squares of {n} rows and {d} unknowns, {int((problem.truth != 0).sum())} of them not zero; "
        f"L/mu = {problem.spectrum[-1] / problem.spectrum[0]:.1f}, step 1/L"
    ]
    for k, path in paths["exact"].items():
        steps = len(path.losses) - 1
        found = ", ".join(f"{path.losses[t]:.1e} after {t}" for t in sorted({min(10, steps), min(50, steps), steps}))
        lines.append(
            f"k = {k}: loss {found} steps; support {_recovered(problem, path)}, last moved in step {path.moved}, then "
            f"at least times {problem.rate(path.theta):.3f} a step"
        )
    for variance, path in paths["noisy"].items():
        lines.append(
            f"noise of variance {variance}: floor {path.floor(len(path.losses) // 2):.3e} at k = {NOISY_COUNT}, "
            f"{path.floor(len(path.losses) // 2) / variance:.4f} of it; support {_recovered(problem, path)}"
        )
    for k, path in paths["alternating"].items():
        lines.append(
            f"AC/DC, phases of {PHASE} steps, k = {k}: loss {path.losses[-1]:.1e} after {len(path.losses) - 1} steps; "
            f"support {_recovered(problem, path)}"
        )
    return "\n".join(lines)


def _recovered(problem: LeastSquares, path: Path) -> str:
    return "recovered" if problem.recovered(path.theta) else "not recovered"


def draw(paths: dict[str, dict[Any, Path]]) -> Any:
    """Draw three panels: convergence, floors, AC/DC beside k-IHT.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, path in paths["exact"].items():
        left.semilogy(path.losses, label=f"k = {k}")
        left.axvline(path.moved, color="0.8", zorder=0)
    left.set_title("k-IHT: linear once the support stays")
    for variance, path in paths["noisy"].items():
        (line,) = middle.semilogy(path.losses, lw=0.5, label=f"σ² = {variance:g}")
        middle.axhline(path.floor(len(path.losses) // 2), color=line.get_color())
    middle.set_title("floor in proportion to the noise's variance")
    for k, path in paths["alternating"].items():
        right.semilogy(path.losses, label=f"AC/DC, k = {k}")
        right.semilogy(paths["exact"][k].losses, "--", label=f"k-IHT, k = {k}")
        for start in range(PHASE, len(path.losses), 2 * PHASE):
            right.axvspan(start, start + PHASE, color="0.93", zorder=0)
    right.set_title("AC/DC (shaded: compressed)")
    for axis in (left, middle, right):
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    left.set_ylabel("f")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=150, help="steps of a run without noise; ten times with it")
    parser.add_argument("--seed", type=int, default=0, help="of the problem and the noise")
    parser.add_argument("--plot", metavar="FILE", help="draw a figure; needs matplotlib")
    given = parser.parse_args(arguments)
    problem = LeastSquares.draw(generator(given.seed, "iht/problem"))
    paths = run(problem, given.steps, given.seed)
    print(report(problem, paths))
    if given.plot:
        try:
            draw(paths).savefig(given.plot)
        except (MissingExtraError, OSError, ValueError) as error:  # an ending that matplotlib does not know
            parser.error(f"--plot {given.plot}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
