"""Methods side by side: the same model, data, seeds and budget, one method after another.

Each run lives in a folder of its own, so that a comparison that was stopped goes on where it was, and one that is asked
for more methods or seeds only trains those.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.methods import METHODS
from refimpl.training.atomic import replacing
from refimpl.training.checks import nearest
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.loop import Observer, Run, stopping_on_signals
from refimpl.training.report import Report, report
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import resume, start
from refimpl.training.trainer import StepResult

ROW = "row.json"
VARIANTS = {"powerprop": "set"}
"""Entries of a comparison that are no method of their own, with the method that they use."""


@dataclass(frozen=True)
class Row:
    """One method, one seed.

    Attributes
    ----------
    method : str
    seed : int
    loss : float
        Validation loss of the best checkpoint, in nats; of a method that ends at another density than it begins with,
        the best of those with the final density.
    measure, score : str, float
        Perplexity or accuracy on the test part, of the same model.
    sparsity : float
        Exact: absent entries of all prunable weights in that model's forward pass.
    flops_training, flops_published, flops_inference : float
        Operations as a fraction of dense training's and inference's: executed, by the method's published formula, and
        of one sample at the end.
    step_ms : float
        Median time of a training step in the run.
    mean_step_ms : float
        Mean time, exchanges included.
    explored : float
        Fraction of the entries of the sparse weights that were ever used.
    """

    method: str
    seed: int
    loss: float
    measure: str
    score: float
    sparsity: float
    flops_training: float
    flops_published: float
    flops_inference: float
    step_ms: float
    mean_step_ms: float
    explored: float


def names() -> list[str]:
    """Return what can be compared: the methods, and the variants."""
    return [*METHODS, *VARIANTS]


def configured(base: Config, name: str, settings: Iterable[str] = ()) -> Config:
    """Return a configuration with another method, in its small setting.

    The method's options are those of its small recipe (``lstm-NAME``), the sparsity that of ``base``; what the table
    ``[method]`` of ``base`` says otherwise does not count. ``settings`` come last.

    Raises
    ------
    ValueError
        If there is no such method, or the settings do not fit it.
    """
    if name not in names():
        raise ValueError(f"there is no method {name!r} to compare; the nearest is {nearest(name, names())!r}")
    tables = base.to_dict()
    small = load_recipe(f"lstm-{name}").to_dict()["method"]
    tables["method"] = {**small, "sparsity": base.method.sparsity, "conventions": base.method.conventions}
    if name == "imp":
        tables["method"]["rounds"] = _rounds(base.training.epochs)
    return override(Config.from_dict(tables), settings)


def _rounds(epochs: int) -> int:
    """Return into how many rounds the budget is divided: 4 at most, each a whole number of epochs."""
    for rounds in (4, 3, 2):
        if epochs % rounds == 0:
            return rounds
    raise ValueError(
        f"training.epochs is {epochs}, which imp cannot divide into rounds; give a multiple of 2 or 3, or leave it out"
    )


def compare(
    base: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    observer: Callable[[str, int], Observer] | None = None,
    done: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train each method with each seed, and return what came of it.

    Parameters
    ----------
    base : Config
        Model, data, optimizer, budget and sparsity.
    methods : sequence of str
        Of `names`.
    seeds : sequence of int
    out : path-like
        Folder of the runs, one for each method and seed. Runs that have finished there are not repeated.
    settings : sequence of str
        ``"key=value"`` for all runs, such as an option of a method.
    observer : callable, optional
        ``(method, seed) -> observer`` of a run's progress.
    done : callable, optional
        Called with each row as it comes.

    Raises
    ------
    ValueError
        As `configured` does, for any of the methods before the first run begins; and if a run in the folder has
        another configuration.
    """
    configs = {
        (name, seed): dataclasses.replace(configured(base, name, settings), seed=seed)
        for seed in seeds
        for name in methods
    }
    rows = []
    for (name, seed), config in configs.items():
        row = _row(name, seed, config, Path(out) / f"{name}-{seed}", observer)
        rows.append(row)
        if done:
            done(row)
    return rows


def _row(name: str, seed: int, config: Config, path: Path, observer: Callable[[str, int], Observer] | None) -> Row:
    saved = path / ROW
    if saved.is_file():
        given = RunFolder.open(path).config
        if given != config:
            raise ValueError(f"{str(path)!r} holds a run with other settings; give another folder with --out")
        return Row(**json.loads(saved.read_text("utf-8")))
    run = resume(path) if path.exists() else start(config, path)
    try:
        timing = _Timing(observer(name, seed) if observer else Observer())
        with stopping_on_signals(run):
            outcome = run.train(timing)
        if outcome == "stopped":
            raise KeyboardInterrupt
        row = _row_of(name, seed, run, report(run, repeats=0), timing)
        with replacing(saved) as file:
            file.write(json.dumps(dataclasses.asdict(row), indent=1).encode())
    finally:
        run.close()
    return row


def _row_of(name: str, seed: int, run: Run, found: Report, timing: _Timing) -> Row:
    stored, size = (sum(getattr(t, key) for t in found.tensors.values()) for key in ("nnz", "size"))
    return Row(
        method=name,
        seed=seed,
        loss=found.scores.valid["loss"],
        measure=found.measure,
        score=found.scores.test[found.measure],
        sparsity=1 - stored / size,
        flops_training=found.flops_training,
        flops_published=found.flops_published,
        flops_inference=found.flops_inference,
        step_ms=1000 * statistics.median(timing.seconds) if timing.seconds else float("nan"),
        mean_step_ms=1000 * statistics.fmean(timing.seconds) if timing.seconds else float("nan"),
        explored=run.trainer.explored(),
    )


class _Timing(Observer):
    """Takes down how long each step took, and passes everything on."""

    def __init__(self, other: Observer) -> None:
        self.other = other
        self.seconds: list[float] = []
        self._before = 0.0

    def started(self, run: Run) -> None:
        """Begin at the run's own clock."""
        self._before = run.seconds
        self.other.started(run)

    def stepped(self, run: Run, result: StepResult) -> None:
        """Take down one step."""
        self.seconds.append(run.seconds - self._before)
        self._before = run.seconds
        self.other.stepped(run, result)

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Pass on."""
        self.other.evaluated(run, record)

    def finished(self, run: Run) -> None:
        """Pass on."""
        self.other.finished(run)


COLUMNS = (
    ("method", "method", ""),
    ("seed", "seed", ""),
    ("loss", "valid loss", ".4f"),
    ("score", "", ""),
    ("sparsity", "sparsity", ".6f"),
    ("flops_training", "training FLOPs", ".3f"),
    ("flops_published", "published", ".3f"),
    ("flops_inference", "inference", ".3f"),
    ("step_ms", "step, ms", ".2f"),
    ("mean_step_ms", "mean, ms", ".2f"),
    ("explored", "explored", ".3f"),
)
"""Field of a row, heading, format."""


def table(rows: Sequence[Row]) -> str:
    """Return rows as people read them."""
    lines = [[rows[0].measure if field == "score" else head for field, head, _ in COLUMNS]]
    for row in rows:
        shown = ".4f" if row.measure == "accuracy" else ".2f"
        lines.append([format(getattr(row, field), shown if field == "score" else form) for field, _, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
