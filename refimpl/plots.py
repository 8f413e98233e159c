"""Figures of runs: loss, perplexity or accuracy, density of the gates, and how many weights each exchange moved.

matplotlib is imported when a figure is drawn; it comes with ``pip install 'refimpl[plot]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.extras import require
from refimpl.training.atomic import replacing
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import RunFolder

FORMATS = ("png", "pdf", "svg")
STYLES = ("-", "--", ":", "-.")
SMOOTH = 0.9
"""Weight of the past in the running mean of the training loss."""


class Series(NamedTuple):
    """Numbers at training steps; NaN where the run recorded none."""

    step: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class History:
    """What the metrics file of a run says over time.

    Attributes
    ----------
    label : str
        Name in legends.
    train_loss, valid_loss, valid_perplexity, valid_accuracy : Series
        In nats for each predicted token or image: of single steps, and at the ends of epochs. A language model has no
        accuracy, and a classifier no perplexity.
    gates : dict of str to dict of str to Series
        Weight name, then gate, to its density.
    updates : dict of str to Series
        ``"dropped"``, ``"grown"`` and ``"regrown"`` (grown back at once), over all weights, one point for each
        exchange.
    averaging_from : int or None
        Step after which weights were averaged.
    """

    label: str
    train_loss: Series
    valid_loss: Series
    valid_perplexity: Series
    valid_accuracy: Series
    gates: dict[str, dict[str, Series]]
    updates: dict[str, Series]
    averaging_from: int | None = None

    @classmethod
    def of(cls, label: str, records: Sequence[dict[str, Any]]) -> History:
        """Read the records of a metrics file.

        Raises
        ------
        ValueError
            If nothing was recorded yet.
        """
        steps = [r for r in records if r.get("kind") == "step"]
        epochs = [r for r in records if r.get("kind") == "epoch"]
        if not steps and not epochs:
            raise ValueError(f"the run {label!r} has recorded nothing yet; let it train for some steps first")
        moved = [(r["step"], r["weights"]) for r in records if r.get("kind") == "exchange"]
        moved += [(r["step"], r["exchanged"]) for r in epochs if r.get("exchanged")]
        moved.sort(key=lambda pair: pair[0])
        names = {name: list(gates) for r in epochs for name, gates in r.get("gate_density", {}).items()}
        return cls(
            label,
            _series(steps, "loss"),
            _series(epochs, "valid_loss"),
            _series([r for r in epochs if "valid_perplexity" in r], "valid_perplexity"),
            _series([r for r in epochs if "valid_accuracy" in r], "valid_accuracy"),
            {
                name: {
                    gate: _points((r["step"], r.get("gate_density", {}).get(name, {}).get(gate)) for r in epochs)
                    for gate in gates
                }
                for name, gates in names.items()
            },
            {
                kind: _points((step, sum(counts[kind] for counts in weights.values())) for step, weights in moved)
                for kind in ("dropped", "grown", "regrown")
            },
            next((r["step"] for r in epochs if r.get("trigger")), None),
        )


def read_run(path: str | Path) -> History:
    """Read the history of a run's folder, also while it trains.

    Raises
    ------
    FileNotFoundError
        If there is no run.
    ValueError
        If it has recorded nothing yet.
    """
    folder = RunFolder.open(path)
    records = read_metrics(folder.metrics_path) if folder.metrics_path.is_file() else []
    return History.of(Path(path).resolve().name, records)


def draw(runs: Sequence[History]) -> Any:
    """Draw runs into one figure.

    Loss, perplexity and accuracy have a colour for each run; in the panels of gates and of updates a colour stands for
    the gate or the kind, and a line's style for the run.

    Returns
    -------
    matplotlib.figure.Figure
        Not attached to any window or to pyplot's state.

    Raises
    ------
    MissingExtraError
        If matplotlib is not there.
    ValueError
        If no run is given.
    """
    if not runs:
        raise ValueError("no run is given; give at least one")
    figure_module = require("matplotlib.figure", "plot")
    weights = list(dict.fromkeys(name for run in runs for name in run.gates))
    measures = [name for name, of in _MEASURES.items() if any(of.series(run).step.size for run in runs)]
    measures = measures or ["perplexity"]
    count = 2 + len(measures) + len(weights)
    rows = -(-count // 2)
    figure = figure_module.Figure(figsize=(11, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).reshape(-1)
    _draw_loss(axes[0], runs)
    for axis, measure in zip(axes[1:], measures):
        _MEASURES[measure].draw(axis, runs)
    for axis, name in zip(axes[1 + len(measures) :], weights):
        _draw_gates(axis, name, runs)
    _draw_updates(axes[count - 1], runs)
    for axis in axes[:count]:
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.set_xlim(0, max(_last_step(run) for run in runs) * 1.02)
    for axis in axes[count:]:
        axis.set_axis_off()
    figure.suptitle(runs[0].label if len(runs) == 1 else f"{len(runs)} runs")
    return figure


def check_plot(path: str | Path) -> None:
    """Find out before anything is computed whether a figure of this name can be drawn.

    Raises
    ------
    ValueError
        If the name does not end in .png, .pdf or .svg.
    MissingExtraError
        If matplotlib is not there.
    """
    _format_of(Path(path))
    require("matplotlib.figure", "plot")


def _format_of(path: Path) -> str:
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"the figure is to be called {str(path)!r}; give a name that ends in .png, .pdf or .svg")
    return kind


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the file is there in full or not at all.

    Raises
    ------
    ValueError
        If the name does not end in .png, .pdf or .svg.
    OSError
        If it cannot be written.
    """
    path = Path(path)
    kind = _format_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=kind, dpi=130)


def _draw_loss(axis: Any, runs: Sequence[History]) -> None:
    for k, run in enumerate(runs):
        colour, prefix = f"C{k}", f"{run.label}, " if len(runs) > 1 else ""
        axis.plot(run.train_loss.step, run.train_loss.value, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(
            run.train_loss.step, _smoothed(run.train_loss.value), color=colour, linewidth=1.3, label=f"{prefix}training"
        )
        axis.plot(
            run.valid_loss.step, run.valid_loss.value, color=colour, linestyle="--", marker="o", markersize=3.5,
            linewidth=1.3, label=f"{prefix}validation",
        )  # fmt: skip
        if run.averaging_from is not None:
            axis.axvline(run.averaging_from, color=colour, linestyle=":", linewidth=1)
    dotted = " (dotted: averaging begins)" if any(run.averaging_from for run in runs) else ""
    units = [unit for unit, some in (("token", _texts(runs)), ("image", _images(runs))) if some] or ["token"]
    axis.set(title=f"Loss{dotted}", ylabel=f"nats per {' or '.join(units)}")
    axis.legend(fontsize=8)


def _draw_perplexity(axis: Any, runs: Sequence[History]) -> None:
    for k, run in enumerate(runs):
        step, value = run.valid_perplexity
        if not step.size and _images([run]):
            continue
        label = run.label
        if np.isfinite(value).any():
            best = int(np.nanargmin(value))
            label = f"{run.label}, best {value[best]:.1f}"
            axis.plot(step[best], value[best], marker="*", markersize=11, color=f"C{k}")
        axis.plot(step, value, color=f"C{k}", marker="o", markersize=3.5, linewidth=1.3, label=label)
    axis.set(title="Validation perplexity", ylabel="perplexity (log scale)", yscale="log")
    finite = np.concatenate([run.valid_perplexity.value for run in runs])
    finite = finite[np.isfinite(finite)]
    if finite.size and finite.max() < 20 * finite.min():  # too few powers of ten for the usual ticks
        ticker = require("matplotlib.ticker", "plot")
        axis.yaxis.set_major_locator(ticker.MaxNLocator(6))
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.0f}"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.legend(fontsize=8)


def _draw_accuracy(axis: Any, runs: Sequence[History]) -> None:
    for k, run in enumerate(runs):
        step, value = run.valid_accuracy
        if step.size:
            best = int(np.nanargmax(value))
            axis.plot(step[best], value[best], marker="*", markersize=11, color=f"C{k}")
            label = f"{run.label}, best {value[best]:.4f}"
            axis.plot(step, value, color=f"C{k}", marker="o", markersize=3.5, linewidth=1.3, label=label)
    axis.set(title="Validation accuracy", ylabel="fraction of the images")
    axis.legend(fontsize=8)


class _Measure(NamedTuple):
    """A score with a panel of its own."""

    series: Callable[[History], Series]
    draw: Callable[[Any, Sequence[History]], None]


_MEASURES = {
    "perplexity": _Measure(lambda run: run.valid_perplexity, _draw_perplexity),
    "accuracy": _Measure(lambda run: run.valid_accuracy, _draw_accuracy),
}


def _texts(runs: Sequence[History]) -> bool:
    return any(run.valid_perplexity.step.size for run in runs)


def _images(runs: Sequence[History]) -> bool:
    return any(run.valid_accuracy.step.size for run in runs)


def _draw_gates(axis: Any, name: str, runs: Sequence[History]) -> None:
    with_weight = [(k, run) for k, run in enumerate(runs) if name in run.gates]
    for k, run in with_weight:
        for g, (gate, series) in enumerate(run.gates[name].items()):
            axis.plot(
                series.step, series.value, color=f"C{g}", linestyle=STYLES[k % len(STYLES)], marker="o", markersize=2.5,
                linewidth=1.3, label=gate if run is with_weight[0][1] else None,
            )  # fmt: skip
    axis.set(title=f"Density of the gates of {name}{_styles(with_weight)}", ylabel="density")
    axis.set_ymargin(0.18)  # room for the legend
    axis.legend(fontsize=8, ncols=4, loc="upper center")


def _draw_updates(axis: Any, runs: Sequence[History]) -> None:
    largest = 0.0
    moving = [(k, run) for k, run in enumerate(runs) if run.updates["dropped"].step.size]
    for k, run in moving:
        for c, (kind, series) in enumerate(run.updates.items()):
            largest = max(largest, series.value.max(initial=0))
            # What is dropped is grown elsewhere: a wide pale line, so that the other can be seen on top of it.
            wide = {"linewidth": 4.5, "alpha": 0.35} if kind == "dropped" else {"linewidth": 1.3}
            axis.plot(
                series.step, series.value, color=f"C{c}", linestyle=STYLES[k % len(STYLES)], marker="o", markersize=2.5,
                label=kind if run is moving[0][1] else None, **wide,
            )  # fmt: skip
    axis.set(title=f"Weights moved by each exchange{_styles(moving)}", ylabel="entries, all weights")
    axis.set_ylim(0, 1.2 * largest or 1)
    axis.yaxis.set_major_formatter(require("matplotlib.ticker", "plot").StrMethodFormatter("{x:,.0f}"))
    if moving:
        axis.legend(fontsize=8, ncols=3, loc="upper right")
    else:
        axis.text(0.5, 0.5, "no exchange", transform=axis.transAxes, ha="center", color="0.5")


def _styles(shown: Sequence[tuple[int, History]]) -> str:
    """Return the key from line styles to runs, which the panels need that spend their colours on something else."""
    if len(shown) == 1:
        return "" if shown[0][0] == 0 else f"\n{shown[0][1].label}"
    names = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dot"}
    return ("\n" if shown else "") + ", ".join(f"{names[STYLES[k % len(STYLES)]]}: {run.label}" for k, run in shown)


def _last_step(run: History) -> float:
    return max(series.step.max(initial=1) for series in (run.train_loss, run.valid_loss))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean with weights 0.9^age, unbiased from the first value on; NaN breaks nothing."""
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = SMOOTH * total + value, SMOOTH * weight + 1
        out[i] = total / weight if weight else np.nan
    return out


def _series(records: Sequence[dict[str, Any]], key: str) -> Series:
    return _points((r["step"], r.get(key)) for r in records)


def _points(pairs: Any) -> Series:
    """Return pairs of step and number as arrays; the ``null`` of a number that was not finite becomes NaN."""
    listed = [(step, np.nan if value is None else value) for step, value in pairs]
    table = np.array(listed, float).reshape(-1, 2)
    return Series(table[:, 0], table[:, 1])
