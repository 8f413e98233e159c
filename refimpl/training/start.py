"""Starting a run in a new folder, and going on with one: everything that can be wrong is found first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.training import checkpoint
from refimpl.training.adopt import begin_with
from refimpl.training.config import FREE_TO_CHANGE, Config, differences, override
from refimpl.training.corpora import facts_of, open_corpus
from refimpl.training.loop import Run
from refimpl.training.run_folder import RunFolder
from refimpl.training.task import Data
from refimpl.weights import Params

ATTEMPTS = 10_000
"""How many numbered folder names are tried."""


def start(
    config: Config, out: str | Path | Callable[[], Path], corpus: Data | None = None, params: Params | None = None
) -> Run:
    """Begin a run in a new folder.

    The model is built before the folder is made, so that a run that fails its checks leaves nothing behind.

    Parameters
    ----------
    config : Config
        Of the run.
    out : path-like, or callable
        A folder that is new or empty; it and its parents are made. A function such as `free_folder` is asked when all
        else is ready, and again if another process has taken the folder in the meantime.
    corpus : Corpus or Images, optional
        By default the one that the configuration names.
    params : dict of str to Weight, optional
        Weights to begin with, in place of random ones; they count as the best ones until training finds better ones.

    Returns
    -------
    Run
        At step 0, holding the folder's lock; ``run.train()`` trains it, ``run.close()`` gives the lock back.

    Raises
    ------
    ValueError, FileNotFoundError
        As `RunFolder.check_new`, `open_corpus`, `Run` and `begin_with` do.
    OSError
        If the folder cannot be written.
    """
    if not callable(out):
        RunFolder.check_new(out)
    corpus = open_corpus(config) if corpus is None else corpus
    run = Run(config, corpus)
    if params is None:
        return launch(run, out)
    begin_with(run, params)
    return launch(run, out, (checkpoint.pack_params(params, {}), run.state.best))


def launch(
    run: Run,
    out: str | Path | Callable[[], Path],
    best: tuple[dict[str, np.ndarray], float] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Run:
    """Give a run that is ready its folder; see `start` for ``out`` and what can go wrong.

    Parameters
    ----------
    run : Run
        Without a folder.
    out : path-like, or callable
    best : tuple, optional
        If the run's state is not the one that its configuration begins with: the arrays that count as the best model
        for now, and its validation loss. The state is saved too.
    origin : mapping, optional
        Where that state comes from, for ``config.json``.
    """
    folder = _create(run.config, out, facts_of(run.corpus), origin)
    try:
        run.attach(folder)
        if best is not None:
            run.save_as_it_is(*best)
    except BaseException:
        folder.close()
        raise
    return run


def resume(path: str | Path, changes: Iterable[str] = (), corpus: Data | None = None) -> Run:
    """Go on with the run of a folder, from its newest checkpoint that can be read.

    Parameters
    ----------
    path : path-like
        The run's folder.
    changes : iterable of str
        Settings ``"key=value"`` among those that leave the run's numbers alone, `FREE_TO_CHANGE`.
    corpus : Corpus or Images, optional
        By default the one that the configuration names; its sha256 must be the run's.

    Raises
    ------
    FileNotFoundError
        If there is no run in the folder, or its corpus is gone.
    ValueError
        If a change is not allowed, another process writes there, or the data or the checkpoints are not the
        run's.
    """
    folder = RunFolder.open(path, write=True)
    try:
        config = changed(folder.config, changes, "a resumed run")
        if "origin" in folder.facts and not folder.checkpoints():
            raise ValueError(
                f"{str(path)!r} was to begin with the state of {folder.facts['origin'].get('run')!r} and was stopped "
                "before it had that; remove it and run the same command again"
            )
        folder.config = config
        return Run(config, open_corpus(config) if corpus is None else corpus, folder)
    except BaseException:
        folder.close()
        raise


def changed(config: Config, changes: Iterable[str], who: str) -> Config:
    """Return a configuration with settings replaced that leave the numbers alone, `FREE_TO_CHANGE`.

    Raises
    ------
    ValueError
        If another setting would change; ``who`` is the subject of the sentence.
    """
    new = override(config, changes)
    refused = differences(config, new)
    if refused:
        listed = ", ".join(f"{key} (from {a!r} to {b!r})" for key, (a, b) in refused.items())
        raise ValueError(
            f"{who} cannot change {listed}; only {', '.join(sorted(FREE_TO_CHANGE))} may change, so start a new run "
            f"for it"
        )
    return new


def _create(
    config: Config,
    out: str | Path | Callable[[], Path],
    facts: dict[str, Any],
    origin: Mapping[str, Any] | None = None,
) -> RunFolder:
    if not callable(out):
        return RunFolder.create(out, config, facts, origin)
    for _ in range(ATTEMPTS):
        path = out()
        try:
            return RunFolder.create(path, config, facts, origin)
        except ValueError:
            if not path.exists():
                raise
    raise ValueError("other processes have taken every folder that was tried; give a folder's name")


def free_folder(recipe: str, parent: Path | None = None) -> Path:
    """Return the first of ``runs/<recipe>-1``, ``runs/<recipe>-2``, … that is not there yet."""
    parent = Path("runs") if parent is None else parent
    name = Path(recipe).name.removesuffix(".toml")
    for k in range(1, ATTEMPTS):
        path = parent / f"{name}-{k}"
        if not path.exists():
            return path
    raise ValueError(f"all of {name}-1 to {name}-{ATTEMPTS - 1} exist in {str(parent)!r}; give a folder's name")
