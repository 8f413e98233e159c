"""Phases of a run that alternates between a dense and a compressed model, in epochs.

A run begins dense; compressed and dense phases then take turns, and the last is compressed. Epochs are counted from 0,
and a phase covers ``start <= epoch < stop``. The published schedules of AC/DC all have the form

    warm-up | compressed, dense, ..., compressed | last dense | final compressed

with one length for each of its five parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Literal, NamedTuple

Kind = Literal["dense", "compressed"]


class Phase(NamedTuple):
    """The epochs ``start <= epoch < stop``, in which the model is dense or compressed."""

    kind: Kind
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of epochs."""
        return self.stop - self.start


@dataclass(frozen=True)
class Phases:
    """At which epochs the model is compressed, and at which it is made dense again.

    Attributes
    ----------
    compress : tuple of int
        The epochs before which it is compressed, ascending; none is 0, for a run begins dense.
    decompress : tuple of int
        The epochs before which it is made dense again: one between each two of ``compress``.

    Raises
    ------
    ValueError
        If a list does not ascend, phases overlap, or the run would begin compressed or end dense.
    """

    compress: tuple[int, ...]
    decompress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("compress", "decompress"):
            epochs = tuple(index(epoch) for epoch in getattr(self, name))
            object.__setattr__(self, name, epochs)
            if any(b <= a for a, b in pairwise(epochs)):
                raise ValueError(f"{name} lists the epochs {_listed(epochs)}; give them in ascending order, each once")
        if not self.compress:
            raise ValueError("no epoch is given at which the model is compressed; give at least one in compress")
        if min(self.compress + self.decompress) < 1:
            raise ValueError(
                f"a phase begins at epoch {min(self.compress + self.decompress)}, but a run begins with a dense one, "
                "at epoch 0; give epochs of at least 1"
            )
        turns = sorted([(e, "compressed") for e in self.compress] + [(e, "dense") for e in self.decompress])
        for (before, was), (epoch, kind) in pairwise([(0, "dense"), *turns]):
            if epoch == before or kind == was:
                raise ValueError(
                    f"a {was} phase begins at epoch {before} and the next phase is to be a {kind} one, from epoch "
                    f"{epoch}, so that the two overlap; give epochs of compress and decompress in turn, compress first"
                )
        if turns[-1][1] == "dense":
            raise ValueError(
                f"the last phase, from epoch {turns[-1][0]}, is dense, and the run would not end with a compressed "
                "model; give a later epoch in compress, or leave this one out of decompress"
            )

    @classmethod
    def regular(
        cls, epochs: int, *, warmup: int, compressed: int, dense: int, last_dense: int | None = None, final: int
    ) -> Phases:
        """Return the phases of a run of ``epochs`` epochs, by the lengths of its parts.

        Parameters
        ----------
        epochs : int
            Of the whole run.
        warmup : int
            Dense epochs at the beginning.
        compressed, dense : int
            Length of each compressed phase, and of each dense one, between the warm-up and the last dense phase.
        last_dense : int, optional
            Length of the dense phase before the final compressed one; by default ``dense``.
        final : int
            Length of the final compressed phase.

        Raises
        ------
        ValueError
            If a length is below 1, or no whole number of phases fits in between.
        """
        last_dense = dense if last_dense is None else last_dense
        lengths = {
            "warmup": warmup, "compressed": compressed, "dense": dense, "last_dense": last_dense, "final": final,
        }  # fmt: skip
        for name, length in lengths.items():
            if length < 1:
                raise ValueError(f"{name} is {length} epochs; give at least 1")
        period = compressed + dense
        middle = epochs - warmup - last_dense - final  # compressed phases with dense ones between them
        times, rest = divmod(middle + dense, period)
        if rest or times < 1:
            raise ValueError(
                f"{epochs} epochs less {warmup + last_dense + final} for warm-up, last dense and final phase leave "
                f"{middle}, which is not k * {period} - {dense} for a whole k; choose lengths that fit"
            )
        start = range(warmup, warmup + times * period, period)
        return cls((*start, epochs - final), tuple(epoch + compressed for epoch in start))

    @classmethod
    def spread(cls, epochs: int) -> Phases:
        """Return phases for a run of any length, in the proportions of the published one of 100 epochs.

        With a unit u of a twentieth of the run: 2 u dense, then u compressed and u dense in turn, of which the last
        dense phase is 2 u long and the final compressed one at least 3 u. A run of fewer than 8 epochs is dense and
        compressed epoch by epoch.

        Raises
        ------
        ValueError
            If there are fewer than two epochs.
        """
        if epochs < 2:
            raise ValueError(
                f"a run of {epochs} epochs has no room for a dense and a compressed phase; give at least 2 epochs"
            )
        if epochs < 8:
            return cls(tuple(range(1, epochs, 2)), tuple(range(2, epochs - 1, 2)))
        unit = epochs // 20 or 1
        times = (epochs - 6 * unit) // (2 * unit)
        whole = (6 + 2 * times) * unit
        final = 3 * unit + epochs - whole
        return cls.regular(epochs, warmup=2 * unit, compressed=unit, dense=unit, last_dense=2 * unit, final=final)

    def compressed(self, epoch: int) -> bool:
        """Tell whether an epoch lies in a compressed phase."""
        return sum(e <= epoch for e in self.compress) > sum(e <= epoch for e in self.decompress)

    def until(self, epochs: int) -> list[Phase]:
        """Return the phases of a run of so many epochs, in order.

        Raises
        ------
        ValueError
            If the run ends before its last compressed phase begins.
        """
        if epochs <= self.compress[-1]:
            raise ValueError(
                f"the last compressed phase begins at epoch {self.compress[-1]}, but the run has {epochs} epochs; give "
                f"more than {self.compress[-1]}, or phases that begin earlier"
            )
        return self.within(epochs)

    def within(self, epochs: int) -> list[Phase]:
        """Return the phases of the first epochs of a run, the last of them as far as it got."""
        starts = [start for start in sorted((0, *self.compress, *self.decompress)) if start < epochs]
        return [
            Phase("compressed" if self.compressed(start) else "dense", start, stop)
            for start, stop in pairwise([*starts, epochs])
        ]


def _listed(epochs: tuple[int, ...]) -> str:
    return ", ".join(map(str, epochs))
