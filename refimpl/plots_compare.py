"""The figure of a comparison: what each method reaches against what its training costs.

matplotlib is imported when a figure is drawn; it comes with ``pip install 'refimpl[plot]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refimpl.extras import require
from refimpl.training.compare import Row


def draw(rows: Sequence[Row]) -> Any:
    """Return a figure: score against operations of training, a point for each method and seed.

    A method's seeds share a colour and are joined; its name stands beside its first point. Operations are those
    executed, as a fraction of dense training, on a logarithmic axis.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for k, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = [row for row in rows if row.method == method]
        cost, score = [row.flops_training for row in own], [row.score for row in own]
        axes.plot(cost, score, "o-", color=f"C{k % 10}", markersize=5, linewidth=0.7)
        axes.annotate(method, (cost[0], score[0]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    measure = rows[0].measure
    axes.set_xscale("log")
    axes.set_xlabel("operations of training, as a fraction of dense (executed)")
    axes.set_ylabel(f"test {measure}")
    if measure == "perplexity":
        axes.invert_yaxis()  # better is up
    axes.set_xmargin(0.12)  # room for the names
    axes.grid(alpha=0.3)
    return figure
