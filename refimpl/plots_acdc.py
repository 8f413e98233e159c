"""Figures of AC/DC: masks from phase to phase, agreement of the twins, memorisation, zeros, and a comparison.

matplotlib is imported when a figure is drawn; it comes with ``pip install 'refimpl[plot]'``. Compressed phases are
shaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from refimpl.analysis.masks import PhaseChange
from refimpl.analysis.memorisation import Memory
from refimpl.analysis.twins import Agreement
from refimpl.analysis.zeros import EpochZeros
from refimpl.extras import require


def draw_mask_changes(runs: Mapping[str, Sequence[PhaseChange]]) -> Any:
    """Draw how the mask changes from one compressed phase to the next: the change, and intersection over union.

    Parameters
    ----------
    runs : mapping of str to sequence of PhaseChange
        By the name that a run has in the legend.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If no run has two compressed phases.
    """
    if not any(runs.values()):
        raise ValueError("no run has two compressed phases to compare; give one that has begun its second")
    figure, (left, right) = _panels(2)
    for label, changes in runs.items():
        epochs = [change.epoch for change in changes]
        left.plot(epochs, [100 * change.total.change for change in changes], "o-", label=label)
        right.plot(epochs, [change.total.iou for change in changes], "o-", label=label)
    left.set(title="Masks of two compressed phases in turn: change", ylabel="2 · new entries / all entries, %")
    left.set_ylim(bottom=0)
    right.set(title="The same: overlap", ylabel="intersection over union")
    for axis in (left, right):
        axis.set_xlabel("epochs done before the second of the two")
        _whole_numbers(axis)
        _legend(axis)
    return figure


def draw_agreement(pairs: Mapping[str, Agreement]) -> Any:
    """Draw what two models say of the same images: a bar for each pair, cut into the five things that can happen.

    Parameters
    ----------
    pairs : mapping of str to Agreement
        By name; compared with targets.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If there is no pair, or one was compared without targets.
    """
    if not pairs or any(pair.both_right != pair.both_right for pair in pairs.values()):
        raise ValueError("agreement is drawn for pairs of models that were compared with targets; give at least one")
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 1.6 + 0.5 * len(pairs)), layout="constrained")
    axis = figure.add_subplot()
    for row, pair in enumerate(pairs.values()):
        start = 0.0
        for (kind, width), colour in zip(shares(pair).items(), ("C2", "C0", "C9", "C1", "C3"), strict=True):
            axis.barh(row, width, left=start, color=colour, label=kind if row == 0 else None)
            start += width
        axis.text(1.01, row, f"{pair.same:.1%} alike, {pair.cross_entropy:.2f} nats", va="center", fontsize=8)
    axis.set_yticks(range(len(pairs)), list(pairs))
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="fraction of the images", title="What both models say")
    axis.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.35 if len(pairs) < 3 else -0.2))
    return figure


def shares(pair: Agreement) -> dict[str, float]:
    """Return the fractions of the images that both models, one, or none have right; together they are 1."""
    first, second = (accuracy - pair.both_right for accuracy in pair.accuracies)
    apart = 1 - pair.both_right - first - second - pair.both_wrong_alike
    return {
        "both right": pair.both_right,
        "first right": first,
        "second right": second,
        "wrong alike": pair.both_wrong_alike,
        "wrong, each its own way": max(0.0, apart),
    }


def draw_memorisation(runs: Mapping[str, Sequence[Memory]]) -> Any:
    """Draw the accuracy on images with random labels by epoch, against these labels and the true ones; a panel a run.

    Parameters
    ----------
    runs : mapping of str to sequence of Memory
        By the panel's title.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If no run is given.
    """
    figure, axes = _panels(len(runs), share=True)
    for axis, (label, epochs) in zip(axes, runs.items(), strict=True):
        numbers = [memory.epoch + 1 for memory in epochs]
        axis.plot(numbers, [memory.random for memory in epochs], "o-", color="C3", ms=3, label="random label")
        axis.plot(numbers, [memory.true for memory in epochs], "o-", color="C0", ms=3, label="true label")
        _shade(axis, [(memory.epoch, memory.phase) for memory in epochs])
        axis.set(title=label, xlabel="epoch", ylim=(0, 1))
        _legend(axis)
    figure.supylabel("fraction of the images with random labels", fontsize="medium")
    return figure


def draw_zeros(runs: Mapping[str, Sequence[EpochZeros]]) -> Any:
    """Draw dead units and exact zeros among what is stored, by epoch and over all weights; a panel a run.

    Parameters
    ----------
    runs : mapping of str to sequence of EpochZeros
        By the panel's title.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If no run is given.
    """
    figure, axes = _panels(len(runs), share=True)
    for axis, (label, epochs) in zip(axes, runs.items(), strict=True):
        numbers = [found.epoch + 1 for found in epochs]
        axis.plot(numbers, [f.total.dead_fraction for f in epochs], "o-", color="C3", ms=3, label="dead units")
        axis.plot(numbers, [f.total.zero_fraction for f in epochs], "o-", color="C0", ms=3, label="stored zeros")
        _shade(axis, [(found.epoch, found.phase) for found in epochs])
        axis.set(title=label, xlabel="epoch")
        _legend(axis)
    figure.supylabel("fraction", fontsize="medium")
    axes[0].set_ylim(bottom=0)  # all panels share the axis
    return figure


def draw_comparison(points: Mapping[str, Sequence[tuple[float | None, float, Sequence[float]]]]) -> Any:
    """Draw test accuracy against sparsity and against operations of training, with the spread over seeds.

    Parameters
    ----------
    points : mapping of str to sequence of tuple
        For each model, by name: (sparsity of the run, operations of training as a fraction of dense, accuracies of the
        seeds). A model without a sparsity, a dense network trained from the start, is drawn as a line over all.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If no model is given.
    """
    figure, (left, right) = _panels(2 if points else 0)
    for k, (name, rows) in enumerate(points.items()):
        colour = f"C{k % 10}"
        means = [sum(scores) / len(scores) for _, _, scores in rows]
        span = [
            [mean - min(scores) for mean, (_, _, scores) in zip(means, rows, strict=True)],
            [max(scores) - mean for mean, (_, _, scores) in zip(means, rows, strict=True)],
        ]
        look = {"color": colour, "ms": 4, "capsize": 3}
        if rows[0][0] is None:
            left.axhline(means[0], color=colour, ls="--", label=name)
        else:
            left.errorbar([sparsity for sparsity, _, _ in rows], means, span, fmt="o-", label=name, **look)
        right.errorbar([cost for _, cost, _ in rows], means, span, fmt="o", label=name, **look)
    left.set(xlabel="sparsity", ylabel="test accuracy", title="Mean and range over the seeds")
    right.set(xlabel="operations of training, as a fraction of dense (executed)", title="What it costs")
    for axis in (left, right):
        _legend(axis)
    return figure


def _panels(count: int, *, share: bool = False) -> tuple[Any, Sequence[Any]]:
    """Return a figure of so many panels: up to three in a row, more in two columns."""
    if not count:
        raise ValueError("nothing is given to be drawn; give at least one run")
    columns = count if count <= 3 else 2
    rows = -(-count // columns)
    size = (max(5, 4.6 * columns), 3.6 * rows)
    figure = require("matplotlib.figure", "plot").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share).reshape(-1)
    for axis in axes[count:]:
        figure.delaxes(axis)
    for axis in axes[:count]:
        axis.grid(alpha=0.25)
    return figure, axes[:count]


def _shade(axis: Any, phases: Iterable[tuple[int, str]]) -> None:
    """Shade the compressed epochs; the first epoch is 1 on the axis and reaches from 0.5 to 1.5."""
    for phase, epochs in groupby(phases, key=lambda pair: pair[1]):
        listed = [epoch for epoch, _ in epochs]
        if phase == "compressed":
            axis.axvspan(listed[0] + 0.5, listed[-1] + 1.5, color="0.92", zorder=0)
    _whole_numbers(axis)


def _whole_numbers(axis: Any) -> None:
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
