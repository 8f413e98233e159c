"""Pools: the sets of places within which weights compete.

A pool is a chain of ranges of flat positions: one whole tensor, one gate's rows of it, or all tensors of a
layer one after another. Its entries are counted through from 0, so that whoever drops or grows sees one long
vector and never asks what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refimpl.weights.parameters import ParamSpec


@dataclass(frozen=True)
class Segment:
    """The flat positions ``start <= p < stop`` of one tensor, which begin at ``offset`` in their pool."""

    name: str
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True)
class Pool:
    """Ranges of one or more tensors, taken together.

    Attributes
    ----------
    label : str
        Names the pool's random stream and its count in a checkpoint.
    segments : tuple of Segment
        In ascending order of offset.
    """

    label: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of places."""
        last = self.segments[-1]
        return last.offset + last.stop - last.start

    def divided(self, places: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Hand ascending places of the pool to its tensors: each segment's name, with flat positions in its tensor."""
        for s in self.segments:
            low, high = np.searchsorted(places, [s.offset, s.offset + s.stop - s.start])
            yield s.name, places[low:high] + (s.start - s.offset)

    @classmethod
    def chain(cls, label: str, ranges: list[tuple[str, int, int]]) -> Pool:
        """Lay ranges ``(name, start, stop)`` end to end."""
        segments, offset = [], 0
        for name, start, stop in ranges:
            segments.append(Segment(name, start, stop, offset))
            offset += stop - start
        return cls(label, tuple(segments))

    def as_json(self) -> list[Any]:
        """Return lists and numbers from which :meth:`from_json` makes the pool again."""
        return [self.label, [[s.name, s.start, s.stop] for s in self.segments]]

    @classmethod
    def from_json(cls, saved: list[Any]) -> Pool:
        """Undo :meth:`as_json`."""
        label, ranges = saved
        return cls.chain(label, [(name, start, stop) for name, start, stop in ranges])


def _blocks(spec: ParamSpec) -> list[tuple[str, int, int]]:
    """Return ``(label, first row, last row + 1)`` of each block; the blocks must partition the rows."""
    rows = sorted((block.start, block.stop, name) for name, block in spec.blocks.items())
    at = 0
    for start, stop, _ in rows:
        if start != at:
            break
        at = stop
    if at != spec.shape[0]:
        raise ValueError(
            f"the blocks of {spec.name} do not partition its {spec.shape[0]} rows; pool 'gate' needs blocks that do"
        )
    return [(name, start, stop) for start, stop, name in rows]


def pools_of(specs: Mapping[str, ParamSpec], names: list[str], scope: Literal["matrix", "gate", "layer"]) -> list[Pool]:
    """Divide sparse tensors into pools.

    Parameters
    ----------
    specs : mapping of str to ParamSpec
        Shape, blocks and layer of each tensor.
    names : list of str
        The sparse tensors.
    scope : {"matrix", "gate", "layer"}
        See ``Conventions.pool``. A tensor without blocks, or without a layer's name, is a pool of its own.

    Raises
    ------
    ValueError
        If the blocks of a tensor do not partition its rows.
    """
    if scope == "layer":
        layers: dict[str, list[tuple[str, int, int]]] = {}
        for name in names:
            label = f"layer:{specs[name].layer}" if specs[name].layer else name
            layers.setdefault(label, []).append((name, 0, specs[name].size))
        return [Pool.chain(label, ranges) for label, ranges in layers.items()]
    out = []
    for name in names:
        spec = specs[name]
        columns = spec.size // spec.shape[0]
        if scope == "gate" and spec.blocks:
            out += [
                Pool.chain(f"{name}[{block}]", [(name, start * columns, stop * columns)])
                for block, start, stop in _blocks(spec)
            ]
        else:
            out.append(Pool.chain(name, [(name, 0, spec.size)]))
    return out


def linked(pools: Sequence[Pool]) -> list[list[Pool]]:
    """Divide pools into groups that share no tensor, so that an exchange need only hold one group at a time."""
    groups: list[tuple[set[str], list[Pool]]] = []
    for pool in pools:
        names, members = {segment.name for segment in pool.segments}, [pool]
        apart = []
        for group in groups:
            if names & group[0]:
                names, members = names | group[0], group[1] + members
            else:
                apart.append(group)
        groups = [*apart, (names, members)]
    return [sorted(members, key=pools.index) for _, members in groups]
