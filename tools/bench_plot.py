"""Figures: how many times faster than dense a sparse step is, over its density, beside what is possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench_task import Record

from refimpl.extras import require

OF_PEAK = 0.8
"""Share of a dense product's arithmetic rate that the row kernels can reach, each number being loaded for two
operations at most. No sparse step can be more than this, over the density, times faster than a perfect dense one."""

PEERS = ("torch-dense", "torch-dense-tuned", "numpy-dense", "torch-csr", "mkl-csr", "scipy-csr", "sparseprop")
STYLES = {1: "-", 2: "--", 4: ":"}

Points = list[tuple[float, float]]
"""Density and ratio."""


def curves(records: Iterable[Record]) -> dict[str, dict[tuple[str, int], Points]]:
    """Return, by case, then by peer and number of threads, how many times longer the peer takes than we do.

    Ratios are formed within a process: of records of one case, number of threads and allocator. A dense peer stands
    beside all our sparsities, a sparse one beside its own.
    """
    taken = {
        (r["case"], r["threads"], r["allocator"], r["implementation"], r["sparsity"]): r["median_ms"]
        for r in records
        if r.get("product", "layer") == "layer" and "part" not in r
    }
    out: dict[str, dict[tuple[str, int], Points]] = {}
    for (case, count, allocator, implementation, sparsity), ms in taken.items():
        if implementation != "refimpl" or sparsity == 1:
            continue
        for peer in PEERS:
            other = taken.get((case, count, allocator, peer, 0.0 if peer.endswith(("dense", "tuned")) else sparsity))
            if other is not None and not (peer == "numpy-dense" and allocator == "tuned"):
                points = out.setdefault(case, {}).setdefault((peer, count), [])
                points.append((1 - sparsity, other / ms))
    for of_case in out.values():
        for points in of_case.values():
            points.sort()
    return out


def draw(records: Sequence[Record]) -> Any:
    """Draw one panel for each case.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window.

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    """
    figure_module = require("matplotlib.figure", "plot")
    cases = curves(records)
    across = min(3, max(1, len(cases)))
    down = max(1, math.ceil(len(cases) / across))
    figure = figure_module.Figure(figsize=(1 + 4.2 * across, 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).reshape(-1)
    for axis, (case, found) in zip(axes, cases.items()):
        _panel(axis, case, found)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    return figure


def _panel(axis: Any, case: str, found: dict[tuple[str, int], Points]) -> None:
    densities = sorted({density for points in found.values() for density, _ in points})
    label = f"bound {OF_PEAK:g} / density, perfect dense"
    axis.plot(densities, [OF_PEAK / d for d in densities], color="0.5", linewidth=4, alpha=0.4, label=label)
    axis.axhline(1, color="0.7", linewidth=0.8)
    for (peer, count), points in found.items():
        label = f"{peer}, {count} thread{'s' * (count > 1)}"
        axis.plot(
            *zip(*points), color=f"C{PEERS.index(peer)}", linestyle=STYLES.get(count, "-."), marker="o", markersize=3,
            linewidth=1.2, label=label,
        )  # fmt: skip
    ticker = require("matplotlib.ticker", "plot")
    axis.set(xscale="log", yscale="log", title=case, xlabel="density", ylabel="time of the peer / ours")
    axis.xaxis.set_major_locator(ticker.FixedLocator(densities))
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(ticker.FormatStrFormatter("%g"))
        part.set_minor_locator(ticker.NullLocator())
    axis.tick_params(labelsize=7)
    axis.invert_xaxis()
    axis.legend(fontsize=7)
