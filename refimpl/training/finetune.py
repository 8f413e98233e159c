"""Training the dense twin of a sparse model on, as a run of its own.

The new run has the configuration of the one that it comes from, with the method ``dense``, and begins with that run's
best dense state (`refimpl.training.twin`): parameters, optimizer state, buffers and counters. Order of the data, draws
and the one learning-rate schedule go on from there to the end of the schedule: a twin of the last dense phase is
trained densely while the sparse model has its final phase. It is what the run would have become had it stayed dense.

Source: Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks",
NeurIPS 2021; as the ``ftdense`` runs of its authors' program do it.

The twin as it was counts as the best model until training finds a better one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from refimpl.training import checkpoint, twin
from refimpl.training.config import Config
from refimpl.training.corpora import open_corpus
from refimpl.training.loop import Run
from refimpl.training.run_folder import Checkpoint, RunFolder
from refimpl.training.start import changed, free_folder, launch
from refimpl.training.state import unpack
from refimpl.training.task import Data


def begin(
    run_folder: str | Path, into: str | Path | None = None, *, changes: Iterable[str] = (), corpus: Data | None = None
) -> Run:
    """Begin a run that goes on with the dense twin of another.

    Parameters
    ----------
    run_folder : path-like
        Folder of a run that has a dense twin; only read.
    into : path-like, optional
        New folder of the fine-tuning; by default beside the other, ``NAME-finetuned-1``.
    changes : iterable of str
        Settings ``"key=value"`` among those that leave the numbers alone, `refimpl.training.config.FREE_TO_CHANGE`.
    corpus : Corpus or Images, optional
        By default the one that the configuration names; its sha256 must be the other run's.

    Returns
    -------
    Run
        As `refimpl.training.start.start` returns one; it resumes like every run.

    Raises
    ------
    FileNotFoundError
        If there is no run in the folder, it has no dense twin, or its data are gone.
    ValueError
        If the twin is damaged, a change is not allowed, or the new folder is not empty.
    """
    source = RunFolder.open(run_folder)
    start = source.best_dense()
    if into is not None:
        RunFolder.check_new(into)
    config = dense(changed(source.config, changes, "a fine-tuning"))
    corpus = open_corpus(config) if corpus is None else corpus
    source.check_data(corpus.sha256)
    run = Run(config, corpus)
    take_up(run, start)
    out = partial(free_folder, f"{source.path.name}-finetuned", source.path.parent) if into is None else into
    origin = {"run": str(source.path), "step": start.meta["step"], "epoch": start.meta["epoch"]}
    best = checkpoint.pack_params(twin.params_of(start), {})
    return launch(run, out, (best, run.state.best), origin)


def dense(config: Config) -> Config:
    """Return a configuration with the method dense."""
    return replace(config, method=replace(config.method, name="dense"))


def take_up(run: Run, start: Checkpoint) -> None:
    """Put a twin's state into a run that has not taken a step, and begin the epoch that follows it."""
    unpack(run.state, None, start.arrays, start.meta)
    loss = run.state.best_dense
    run.state.best, run.state.best_dense, run.state.settled = loss, float("inf"), True
    run.next_epoch(loss, fires=run.fires(loss))
