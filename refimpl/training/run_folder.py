"""The folder of a run: its configuration, its metrics and its checkpoints.

::

    config.json                     configuration as resolved, environment, data; written once
    metrics.jsonl                   one record a line
    checkpoints/step-00001328.npz   the newest ones
    checkpoints/best.npz            the model with the best validation loss
    checkpoints/best-dense.npz      of a method with dense phases: the best state at the end of an epoch of one
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from refimpl.training import checkpoint
from refimpl.training.atomic import TEMPORARY, replacing
from refimpl.training.config import Config, differences
from refimpl.training.environment import environment
from refimpl.training.lock import LOCK_NAME, FolderLock

_log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"


class Checkpoint(NamedTuple):
    """A checkpoint as it was read."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


class RunFolder:
    """A run on disk. Made by `create` or `open`; a context manager that gives the lock back.

    Attributes
    ----------
    path : Path
        The folder.
    config : Config
        The configuration that the run was started with.
    facts : dict
        The rest of ``config.json``: ``"created"``, ``"environment"`` and ``"data"``; and ``"origin"`` if the run began
        with another's state.
    """

    def __init__(self, path: Path, config: Config, facts: dict[str, Any], lock: FolderLock | None) -> None:
        self.path, self.config, self.facts, self._lock = path, config, facts, lock

    @classmethod
    def check_new(cls, path: str | Path) -> None:
        """Check that a new run could go into ``path``, touching nothing.

        Raises
        ------
        ValueError
            If it is a file, a folder that holds a run, or another folder that is not empty.
        """
        path = Path(path)
        if not path.exists():
            return
        if not path.is_dir():
            raise ValueError(f"{str(path)!r} is a file; give a folder that is new or empty")
        if (path / CONFIG_NAME).exists():
            raise ValueError(f"{str(path)!r} holds a run already; resume that one, or give a new folder")
        if not all(_of_unborn_run(entry.name) for entry in path.iterdir()):
            raise ValueError(f"{str(path)!r} holds other files and no run; give a new or empty folder")

    @classmethod
    def create(
        cls, path: str | Path, config: Config, data: Mapping[str, Any], origin: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Start a run in a new or empty folder, and lock it.

        Parameters
        ----------
        path : path-like
            The folder; it and its parents are made.
        config : Config
            The configuration as resolved.
        data : mapping
            What identifies the data: ``"name"``, ``"sha256"``, ``"vocabulary_size"``, …; what JSON can hold.
        origin : mapping, optional
            Which other run's state this one begins with.

        Raises
        ------
        ValueError
            As `check_new` does, or if another process is starting a run in the folder.
        OSError
            If the folder cannot be written.
        """
        path = Path(path)
        cls.check_new(path)
        facts = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "data": dict(data),
            **({} if origin is None else {"origin": dict(origin)}),
        }
        text = json.dumps({"config": config.to_dict(), **facts}, indent=2) + "\n"
        path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(path)
        try:
            cls.check_new(path)  # another process may have come and gone since the first look
            _remove_temporary(path)
            with replacing(path / CONFIG_NAME) as file:
                file.write(text.encode())
        except BaseException:
            lock.release()
            raise
        return cls(path, config, json.loads(text), lock)._without_config()

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> RunFolder:
        """Open the folder of a run.

        Parameters
        ----------
        path : path-like
            The folder.
        write : bool
            Lock it, to go on with the run; without, it is only read, also while another process writes.

        Raises
        ------
        FileNotFoundError
            If there is no folder, or no run in it.
        ValueError
            If ``config.json`` cannot be understood, or another process is writing.
        """
        path = Path(path)
        if not (path / CONFIG_NAME).is_file():
            what = "has no config.json" if path.is_dir() else "is no folder"
            raise FileNotFoundError(f"{str(path)!r} is not a run: it {what}; give the folder of a run")
        try:
            facts = json.loads((path / CONFIG_NAME).read_bytes())
            config = Config.from_dict(facts["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = str(path / CONFIG_NAME)
            raise ValueError(f"{where!r} cannot be read ({error}); bring back the original file") from error
        lock = FolderLock(path) if write else None
        run = cls(path, config, facts, lock)._without_config()
        if write:
            _remove_temporary(path)
            _remove_temporary(run.checkpoints_path)
        return run

    @property
    def metrics_path(self) -> Path:
        """Path of ``metrics.jsonl``."""
        return self.path / METRICS_NAME

    @property
    def checkpoints_path(self) -> Path:
        """Path of the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def best_path(self) -> Path:
        """Path of the checkpoint with the best validation loss."""
        return self.checkpoints_path / "best.npz"

    @property
    def best_dense_path(self) -> Path:
        """Path of the state with the best validation loss at the end of an epoch of a dense phase."""
        return self.checkpoints_path / "best-dense.npz"

    def checkpoints(self) -> list[Path]:
        """Return the paths of the numbered checkpoints, the newest last."""
        found = ((_step(path), path) for path in self.checkpoints_path.glob("step-*.npz"))
        return [path for step, path in sorted(found) if step >= 0]

    def save(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove those that are too old.

        Parameters
        ----------
        step : int
            Completed optimizer steps.
        arrays, meta
            As `checkpoint.save` takes them. The configuration is added to ``meta``.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ValueError
            If the folder was opened for reading.
        OSError
            If it cannot be written, such as on a full disk; older checkpoints are untouched.
        """
        target = self._write(f"step-{step:08d}.npz", step, arrays, meta)
        older = [path for path in self.checkpoints() if _step(path) <= step]
        # Later ones are from before the run went back to an older checkpoint, since their own was unreadable.
        stale = [path for path in self.checkpoints() if _step(path) > step]
        for path in older[: -self.config.training.keep] + stale:
            path.unlink(missing_ok=True)
        return target

    def save_best(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Write the model with the best validation loss so far, as it was evaluated; as `save`, but to ``best.npz``.

        Write it before the checkpoint of its epoch: a run killed between the two resumes from an older one and comes to
        the same best again.
        """
        return self._write(self.best_path.name, step, arrays, meta)

    def save_best_dense(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Write the dense state with the best validation loss so far, a whole one; as `save_best`."""
        return self._write(self.best_dense_path.name, step, arrays, meta)

    def _write(self, name: str, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        if self._lock is None:
            raise ValueError(f"{str(self.path)!r} is open for reading; open it with write=True to save")
        self.checkpoints_path.mkdir(exist_ok=True)
        target = self.checkpoints_path / name
        checkpoint.save(target, arrays, {**meta, "step": step, "config": self.config.to_dict()})
        return target

    def latest_valid(self) -> Checkpoint | None:
        """Read the newest checkpoint that can be read; ``None`` if the run has not written one yet.

        One that is truncated or damaged is left out with a warning in the log.

        Raises
        ------
        ValueError
            If all are unreadable, or one belongs to another configuration.
        """
        paths = self.checkpoints()
        for path in reversed(paths):
            try:
                arrays, meta = checkpoint.load(path)
            except ValueError as error:
                _log.warning("%s", error)
                continue
            self._check_config(path, meta)
            if path != paths[-1]:
                _log.warning("going on from the older checkpoint %r", str(path))
            return Checkpoint(path, arrays, meta)
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {str(self.checkpoints_path)!r} can be read; bring "
                f"one back, or start the run again in a new folder"
            )
        return None

    def best(self) -> Checkpoint:
        """Read the checkpoint with the best validation loss.

        Raises
        ------
        FileNotFoundError
            If the run has not finished an epoch yet.
        ValueError
            If it is damaged, or belongs to another configuration.
        """
        if not self.best_path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} has no best checkpoint yet; let it end an epoch")
        return self._read(self.best_path)

    def best_dense(self) -> Checkpoint:
        """Read the best dense state; see `refimpl.training.twin`.

        Raises
        ------
        FileNotFoundError
            If the run has none.
        ValueError
            If it is damaged, or belongs to another configuration.
        """
        if not self.best_dense_path.is_file():
            method = self.config.method.name
            raise FileNotFoundError(
                f"{str(self.path)!r} has no dense twin; give a run of acdc that has ended an epoch, this one is of "
                f"{method}"
            )
        return self._read(self.best_dense_path)

    def _read(self, path: Path) -> Checkpoint:
        arrays, meta = checkpoint.load(path)
        self._check_config(path, meta)
        return Checkpoint(path, arrays, meta)

    def check_data(self, sha256: str) -> None:
        """Check that a corpus is the one that the run was started with.

        Raises
        ------
        ValueError
            If it is not.
        """
        known = self.facts.get("data", {}).get("sha256")
        if known is not None and known != sha256:
            raise ValueError(
                f"the data have sha256 {sha256} and the run in {str(self.path)!r} was started on {known}; "
                f"give the same data"
            )

    def close(self) -> None:
        """Give the lock back; may be called twice."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _without_config(self) -> RunFolder:
        self.facts.pop("config")
        return self

    def _check_config(self, path: Path, meta: Mapping[str, Any]) -> None:
        try:
            theirs = Config.from_dict(meta["config"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"checkpoint {str(path)!r} has no proper configuration: {error}") from error
        differing = differences(self.config, theirs)
        if differing:
            listed = ", ".join(f"{key} ({b!r} there, {a!r} here)" for key, (a, b) in differing.items())
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another configuration: {listed}; use it in the folder "
                f"of its own run"
            )


def _of_unborn_run(name: str) -> bool:
    """Return whether a process that was killed while it created a run may have left a file of this name."""
    return name == LOCK_NAME or (name.startswith(CONFIG_NAME) and name.endswith(TEMPORARY))


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
