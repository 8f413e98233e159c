r"""Dead units and structural zeros: what a compressed phase leaves behind in the dense phase that follows it.

After decompression, entries that return are 0. One of them moves as soon as its gradient does not vanish:

.. math:: \partial f / \partial w_{ij} = \sum_b \delta_{ib} x_{jb}

with the gradient :math:`\delta` of its unit's scores and the unit's inputs x. Where *all* of a filter's entries were
pruned, the filter gives 0, batch normalisation makes of it its shift β, and if β ≤ 0 the rectifier behind it passes
neither a value nor a gradient: the whole row, its scale and its shift have no gradient, nor have the weights that read
it, weight decay leaves at 0 what is 0, and the filter is dead for good. (Without normalisation the bias has the part of
β.) A unit that has lost only the weights that leave it is not dead: they move in the first step, and from the second on
its own have a gradient.

Source: Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks",
NeurIPS 2021, its counts of inactive neurons and of operations in dense phases.

Deviations
----------
- What is counted are units without a weight that differs from 0; a unit whose output is constant for another reason is
  not found.
- The authors' counts of operations leave out entries of dense weights that are exactly 0. Here they are multiplied like
  all others and counted like all others; this is where one sees how many they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.analysis.watch import Ledger, phase_of, read_ledger
from refimpl.training.loop import Run
from refimpl.weights import Params, ParamSpec, SparseWeight, Weight, values_of


@dataclass(frozen=True)
class Zeros:
    """What of a weight is 0.

    Attributes
    ----------
    units, dead : int
        Rows (output units, filters), and those of them that hold nothing but zeros, stored or absent.
    stored, zeros : int
        Entries that are stored (all, of a dense weight), and those of them that are exactly 0.
    """

    units: int
    dead: int
    stored: int
    zeros: int

    @classmethod
    def of(cls, weight: Weight) -> Zeros:
        """Count."""
        values = values_of(weight)
        if isinstance(weight, SparseWeight):
            units = weight.support.matrix_shape[0]
            alive = np.unique(weight.support.rows[values != 0]).size
        else:
            units = weight.shape[0]
            alive = int((values.reshape(units, -1) != 0).any(axis=1).sum()) if units else 0
        return cls(units, units - alive, values.size, values.size - int(np.count_nonzero(values)))

    @classmethod
    def total(cls, found: Iterable[Zeros]) -> Zeros:
        """Take several weights together."""
        counts = [(z.units, z.dead, z.stored, z.zeros) for z in found]
        return cls(*(sum(column) for column in zip(*counts, strict=True))) if counts else cls(0, 0, 0, 0)

    @property
    def dead_fraction(self) -> float:
        """Of the units; 0 of none."""
        return self.dead / self.units if self.units else 0.0

    @property
    def zero_fraction(self) -> float:
        """Of the stored entries; 0 of none."""
        return self.zeros / self.stored if self.stored else 0.0


def zeros_of(params: Params, specs: Mapping[str, ParamSpec]) -> dict[str, Zeros]:
    """Count in each prunable weight.

    Parameters
    ----------
    params : Params
        What is trained.
    specs : mapping of str to ParamSpec
        Of the model.
    """
    return {name: Zeros.of(params[name]) for name, spec in specs.items() if spec.prunable}


@dataclass(frozen=True)
class EpochZeros:
    """The zeros at the end of an epoch, before the next phase begins.

    Attributes
    ----------
    epoch : int
        From 0.
    phase : {"dense", "compressed"}
    weights : dict of str to Zeros
        Of each prunable weight.
    """

    epoch: int
    phase: str
    weights: dict[str, Zeros]

    @property
    def total(self) -> Zeros:
        """All weights together."""
        return Zeros.total(self.weights.values())


class ZeroWatcher(Ledger):
    """Counts dead units and zeros at the end of each epoch; see `Ledger` and `read_zeros`."""

    file = "zeros.json"

    def entry(self, run: Run) -> Any:
        """Count."""
        params, specs = run.state.params, run.trainer.specs
        counts = {name: asdict(zeros) for name, zeros in zeros_of(params, specs).items()}
        return {"phase": phase_of(params, specs), "weights": counts}

    @property
    def epochs(self) -> list[EpochZeros]:
        """What was counted."""
        return _epochs(self.entries)


def read_zeros(run: str | Path) -> list[EpochZeros]:
    """Return what a `ZeroWatcher` left in a run's folder.

    Raises
    ------
    FileNotFoundError
        If it left nothing.
    ValueError
        If the file is damaged.
    """
    return _epochs(read_ledger(Path(run) / ZeroWatcher.file))


def _epochs(entries: Mapping[int, Any]) -> list[EpochZeros]:
    return [
        EpochZeros(epoch, entry["phase"], {name: Zeros(**counts) for name, counts in entry["weights"].items()})
        for epoch, entry in sorted(entries.items())
    ]
