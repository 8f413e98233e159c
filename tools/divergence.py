"""The divergence table: one RigL update of the same arrays under every profile.

    python tools/divergence.py --shape 32x48 --sparsity 0.9 --drop-fraction 0.3

For each profile: how many entries survive the drop, how many grow, how many there are afterwards, and in how many the
new mask differs from the default's. A system that has no such step has n/a. The mask has the default's count, and
systems that return to a target are given the mask's own sparsity. Noise is off unless ``--noise`` is given; where a
system does not define the order of equal scores, the lower position wins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refimpl.methods.onestep import MaskExchange, exchange_masks, initial_mask
from refimpl.methods.profiles import ABOUT, PROFILES
from refimpl.rng import generator


@dataclass(frozen=True)
class Row:
    """One profile's update; None where the system has none."""

    profile: str
    kept: int | None = None
    grown: int | None = None
    nnz: int | None = None
    hamming: int | None = None
    fates: dict[str, int] | None = None


@dataclass(frozen=True)
class Case:
    """The arrays of one update."""

    weights: np.ndarray
    mask: np.ndarray
    gradient: np.ndarray
    noise: np.ndarray


def make_case(
    shape: tuple[int, ...], sparsity: float, *, seed: int = 0, dtype: str = "float32", tied: bool = False, noise: bool
) -> Case:
    """Draw weights, gradient and a mask of the default's count; ``tied`` leaves them few different magnitudes."""
    rng = generator(seed, "divergence")
    weights, gradient = rng.standard_normal(shape), rng.standard_normal(shape)
    mask = initial_mask(shape, sparsity, rng=rng)
    if tied:
        weights, gradient = (np.sign(x) * np.ceil(np.minimum(np.abs(x), 1.5) * 2) for x in (weights, gradient))
    jitter = 1e-5 * rng.standard_normal(shape) if noise else np.zeros(shape)
    return Case((weights * mask).astype(dtype), mask, gradient.astype(dtype), jitter.astype(dtype))


def update(case: Case, name: str, drop_fraction: float) -> MaskExchange | None:
    """Return one profile's RigL update, None if its system has none."""
    if "rigl" not in ABOUT[name].steps:
        return None
    return exchange_masks(
        case.weights,
        case.mask,
        method="rigl",
        drop_fraction=drop_fraction,
        sparsity=1 - np.count_nonzero(case.mask) / case.mask.size,
        gradient=case.gradient,
        noise=case.noise,
        conventions=PROFILES[name],
    )


def compare(case: Case, drop_fraction: float) -> list[Row]:
    """Return a row for each profile."""
    usual = update(case, "default", drop_fraction)
    assert usual is not None
    rows = []
    for name in PROFILES:
        out = update(case, name, drop_fraction)
        if out is None:
            rows.append(Row(name))
            continue
        kept, grown = int(np.count_nonzero(out.mask & ~out.grown)), int(np.count_nonzero(out.grown))
        distance = int(np.count_nonzero(out.mask != usual.mask))
        rows.append(Row(name, kept, grown, int(np.count_nonzero(out.mask)), distance, out.counts()))
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the rows as a table."""

    def cell(number: int | None) -> str:
        return "n/a" if number is None else str(number)

    out = [f"{'profile':<16}{'kept':>9}{'grown':>9}{'nnz':>9}{'differs':>9}"]
    for row in rows:
        numbers = (row.kept, row.grown, row.nnz, row.hamming)
        out.append(f"{row.profile:<16}" + "".join(f"{cell(number):>9}" for number in numbers))
    return out


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give numbers with x between them, such as 32x48")
    return shape


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="one RigL update of the same arrays under every profile")
    parser.add_argument("--shape", type=_shape, default=(32, 48), metavar="RxC", help="default 32x48")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--drop-fraction", type=float, default=0.3)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tied", action="store_true", help="few different magnitudes, so that scores tie")
    parser.add_argument("--noise", action="store_true", help="the noise of systems that add some")
    parser.add_argument("--json", action="store_true", help="print JSON, with what happened to how many entries")
    given = parser.parse_args(argv)
    try:
        case = make_case(
            given.shape, given.sparsity, seed=given.seed, dtype=given.dtype, tied=given.tied, noise=given.noise
        )
        rows = compare(case, given.drop_fraction)
    except ValueError as error:
        parser.error(str(error))
    if given.json:
        settings: dict[str, Any] = {name: value for name, value in vars(given).items() if name != "json"}
        json.dump({"case": settings, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
