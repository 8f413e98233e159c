"""Looking at a run while it trains: at the ends of its epochs, several things at once, and what is kept of it on disk.

What is kept is written by epoch and written again by a run that repeats an epoch, so that a run that was stopped and
resumed leaves the same as one that never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.methods.phases import Kind
from refimpl.training.atomic import replacing
from refimpl.training.loop import Observer, Run
from refimpl.training.trainer import StepResult
from refimpl.weights import Params, ParamSpec, SparseWeight


def phase_of(params: Params, specs: Mapping[str, ParamSpec]) -> Kind:
    """Return ``"compressed"`` if a prunable weight is stored sparsely, ``"dense"`` otherwise."""
    sparse = any(spec.prunable and isinstance(params[name], SparseWeight) for name, spec in specs.items())
    return "compressed" if sparse else "dense"


class EpochEnds(Observer):
    """Is told when the last step of an epoch was taken, before the method exchanges weights there."""

    def stepped(self, run: Run, result: StepResult) -> None:
        """Find out whether an epoch has ended."""
        if run.state.window == run.steps_per_epoch or run.done:
            self.epoch_ended(run, run.state.epoch)

    def epoch_ended(self, run: Run, epoch: int) -> None:
        """Look at the run; epochs are counted from 0."""


class Several(Observer):
    """Passes everything on to several observers, in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = list(observers)

    def started(self, run: Run) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.started(run)

    def stepped(self, run: Run, result: StepResult) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.stepped(run, result)

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.evaluated(run, record)

    def finished(self, run: Run) -> None:
        """Pass on."""
        for observer in self.observers:
            observer.finished(run)


class Ledger(EpochEnds):
    """Takes down an entry for each epoch, in a JSON file of the run's folder if it has one.

    Attributes
    ----------
    file : str
        Name of that file.
    entries : dict of int to dict
        By epoch, from 0, in order; what JSON can hold.
    """

    file = ""

    def __init__(self) -> None:
        self.entries: dict[int, Any] = {}

    def started(self, run: Run) -> None:
        """Take up what was written before, as far as the run has come."""
        if run.folder is not None and (run.folder.path / self.file).is_file():
            self.entries = read_ledger(run.folder.path / self.file)
        self.entries = {epoch: entry for epoch, entry in self.entries.items() if epoch < run.state.epoch}

    def epoch_ended(self, run: Run, epoch: int) -> None:
        """Make the entry of an epoch, and write the file."""
        self.entries[epoch] = self.entry(run)
        if run.folder is not None:
            with replacing(run.folder.path / self.file) as out:
                out.write(json.dumps(self.entries, indent=1).encode())

    def entry(self, run: Run) -> Any:
        """Return what is to be kept of the epoch that has ended."""
        raise NotImplementedError


def read_ledger(path: Path) -> dict[int, Any]:
    """Return the entries of a ledger's file, by epoch.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no ledger.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; give the folder of a run that was watched while it trained"
        )
    try:
        return {int(epoch): entry for epoch, entry in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); remove it and watch the run again") from error


class PhaseTimes(Ledger):
    """Takes down the seconds of each training step, by whether the model was dense or compressed.

    The first step of an epoch begins with preparations for the support (and, in a process, with compilation), and is in
    the list like the others; a median passes over it.
    """

    file = "step-seconds.json"

    def __init__(self) -> None:
        super().__init__()
        self._before = 0.0
        self._steps: list[float] = []

    def started(self, run: Run) -> None:
        """Begin at the run's own clock."""
        super().started(run)
        self._before, self._steps = run.seconds, []

    def stepped(self, run: Run, result: StepResult) -> None:
        """Take down one step."""
        self._steps.append(run.seconds - self._before)
        self._before = run.seconds
        super().stepped(run, result)

    def entry(self, run: Run) -> Any:
        """Return the epoch's phase and its steps' times; those of a part of an epoch if the run was resumed in it."""
        entry = {"phase": phase_of(run.state.params, run.trainer.specs), "seconds": self._steps}
        self._steps = []
        return entry


def seconds_by_phase(times: Mapping[int, Any]) -> dict[Kind, list[float]]:
    """Return the times of all steps of dense and of compressed phases, from the entries of `PhaseTimes`."""
    found: dict[Kind, list[float]] = {"dense": [], "compressed": []}
    for entry in times.values():
        found[entry["phase"]] += entry["seconds"]
    return found
