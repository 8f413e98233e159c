"""The masks of a run's compressed phases: kept while it trains, compared afterwards.

`SupportKeeper` writes the supports that a run has after an exchange between two epochs into its folder, one archive for
each: ``supports/epoch-00010.npz`` holds those with which epoch 10 (from 0) begins. Of AC/DC these are the masks of its
compressed phases; of a method that exchanges at the end of each epoch, those of each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.analysis.twins import MaskChange, mask_changes
from refimpl.training import checkpoint
from refimpl.training.loop import Observer, Run
from refimpl.weights import SparseWeight, Support

FOLDER = "supports"
Supports = dict[str, Support]


@dataclass(frozen=True)
class PhaseChange:
    """From one compressed phase to the next.

    Attributes
    ----------
    before, epoch : int
        The epochs, from 0, with which the two phases begin.
    weights : dict of str to MaskChange
        Of each weight that is sparse in the second.
    """

    before: int
    epoch: int
    weights: dict[str, MaskChange]

    @cached_property
    def total(self) -> MaskChange:
        """All weights together."""
        return MaskChange.total(self.weights.values())


def phase_changes(kept: Mapping[int, Mapping[str, Support]]) -> list[PhaseChange]:
    """Compare the supports of each compressed phase with those of the one before.

    Parameters
    ----------
    kept : mapping of int to mapping of str to Support
        By the epoch with which the phase begins, as `SupportKeeper` or `read_supports` has them.
    """
    return [
        PhaseChange(before, epoch, mask_changes(kept[before], kept[epoch])) for before, epoch in pairwise(sorted(kept))
    ]


class SupportKeeper(Observer):
    """Keeps the supports of the prunable weights at each exchange that ends an epoch.

    Attributes
    ----------
    kept : dict of int to dict of str to Support
        By the epoch that begins with them. Empty for a run with a folder, where they are on disk: see `read_supports`.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Supports] = {}

    def started(self, run: Run) -> None:
        """Forget what lies ahead, of a run that has gone back to an older checkpoint."""
        if run.folder is not None:
            for epoch, path in _files(run.folder.path).items():
                if epoch > run.state.epoch:
                    path.unlink(missing_ok=True)

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Keep the supports, if the epoch ended with an exchange that left a weight sparse."""
        if not record["exchanged"]:
            return
        seen, specs = run.trainer.method.view(run.state.params), run.trainer.specs
        supports = {name: w.support for name, w in seen.items() if isinstance(w, SparseWeight) and specs[name].prunable}
        if supports and run.folder is not None:
            write_supports(run.folder.path, run.state.epoch, supports)
        elif supports:
            self.kept[run.state.epoch] = supports


def write_supports(run: str | Path, epoch: int, supports: Mapping[str, Support]) -> Path:
    """Write the supports with which an epoch begins into a run's folder, and return the file."""
    folder = Path(run) / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"epoch-{epoch:05d}.npz"
    arrays = {name: s.flat.astype(np.min_scalar_type(max(s.size - 1, 0))) for name, s in supports.items()}
    checkpoint.save(path, arrays, {"epoch": epoch, "shapes": {name: s.shape for name, s in supports.items()}})
    return path


def read_supports(run: str | Path) -> dict[int, Supports]:
    """Return the supports that a run's folder holds, by epoch, in order.

    Raises
    ------
    FileNotFoundError
        If it holds none.
    ValueError
        If a file is damaged.
    """
    files = _files(Path(run))
    if not files:
        raise FileNotFoundError(
            f"{str(run)!r} holds no supports of compressed phases; train the run with a SupportKeeper among its "
            "observers, as tools/acdc.py does, past its first compression"
        )
    kept = {}
    for epoch, path in files.items():
        arrays, meta = checkpoint.load(path)
        try:
            kept[epoch] = {name: Support(tuple(meta["shapes"][name]), flat) for name, flat in arrays.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} holds no supports ({error}); remove it") from error
    return kept


def _files(run: Path) -> dict[int, Path]:
    found = {path.stem.removeprefix("epoch-"): path for path in sorted((run / FOLDER).glob("epoch-*.npz"))}
    return {int(epoch): path for epoch, path in found.items() if epoch.isdecimal()}
