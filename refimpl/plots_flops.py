"""The figure of the operations of a run that alternates between a dense and a compressed model.

matplotlib is imported when a figure is drawn; it comes with ``pip install 'refimpl[plot]'``.
"""

from __future__ import annotations

from typing import Any

from refimpl.analysis.flops_by_phase import PhaseTable
from refimpl.extras import require

COLOURS = {"dense": "C0", "compressed": "C1"}


def draw(table: PhaseTable, title: str = "") -> Any:
    """Return a figure with a bar for each phase: as wide as it is long, as high as its epochs cost.

    Costs are operations executed, as a fraction of dense training's, so that the areas of the bars are the operations
    of the phases; a line is at their mean, the cost of the whole run.

    Parameters
    ----------
    table : PhaseTable
    title : str
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in COLOURS.items():
        phases = [phase for phase in table.phases if phase.kind == kind]
        axes.bar(
            [phase.start for phase in phases],
            [phase.fraction for phase in phases],
            [phase.stop - phase.start for phase in phases],
            align="edge",
            color=colour,
            edgecolor="white",
            label=f"{kind}: {table.share(kind):.1%} of the operations",  # type: ignore[arg-type]
        )
    axes.axhline(table.fraction, color="black", linestyle="--", linewidth=1, label=f"whole run: {table.fraction:.3f}")
    axes.set_xlim(0, table.phases[-1].stop)
    axes.set_xlabel("epoch")
    axes.set_ylabel("operations executed / dense")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
