"""One exchange of connections over all pools: drop, count, grow, and say what happened.

Nothing here is dense: what goes is a flag for each entry, what grows a sorted list of places or of ranks among the free
ones, and growth by gradient sees one block of rows at a time. Tensors that share no pool are exchanged one after
another, so that only one of them has lists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from refimpl.kernels import topology
from refimpl.methods.conventions import Conventions, stored_again
from refimpl.methods.drop import Criterion
from refimpl.methods.grow import BestCandidates, Candidates, Ranked, draw_ranks
from refimpl.methods.pools import Pool, Segment, linked
from refimpl.rng import generator
from refimpl.weights.carry import Exchange
from refimpl.weights.sparse import SparseWeight, Weight, as_sparse
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


@dataclass(frozen=True)
class Growth:
    """What one pool is to grow: ``want`` of its ``candidates``."""

    pool: Pool
    candidates: Candidates
    want: int


Grower = Callable[[Sequence[Growth]], Sequence[np.ndarray | Ranked]]
"""Chooses the places that grow, for each of some pools: ascending, or as their ranks."""


def at_random(seed: int, step: int, conventions: Conventions) -> Grower:
    """Grow uniformly at random, each pool from its own stream at this step."""

    def grow(growths: Sequence[Growth]) -> list[Ranked]:
        chosen = []
        for g in growths:
            rng = generator(seed, f"grow/{g.pool.label}", step)
            chosen.append(Ranked(g.candidates, draw_ranks(g.candidates, g.want, rng, conventions.growth_count)))
        return chosen

    return grow


def by_gradient(gradients: Mapping[str, Gradient] | None) -> Grower:
    """Grow where the gradient of the loss is largest in magnitude, scanning each tensor's gradient once.

    Memory is that of the chosen places and one block. The count is always exact; of equal gradients the lower
    place wins.
    """

    def grow(growths: Sequence[Growth]) -> list[np.ndarray]:
        best = [BestCandidates(g.candidates, g.want) for g in growths]
        for name in dict.fromkeys(segment.name for g in growths for segment in g.pool.segments):
            if gradients is None or name not in gradients:
                raise ValueError(
                    f"growth by gradient needs the gradient of {name}; pass it to exchange(..., gradients=...)"
                )
            gradient = gradients[name]
            columns = int(np.prod(gradient.shape[1:]))
            for rows, block in gradient.blocks():
                start = rows.start * columns
                flat = block.reshape(-1)
                for g, found in zip(growths, best):
                    for segment in g.pool.segments:
                        low, high = max(start, segment.start), min(start + flat.size, segment.stop)
                        if segment.name == name and low < high:
                            found.add(segment.offset + low - segment.start, flat[low - start : high - start])
        return [found.places for found in best]

    return grow


@dataclass(frozen=True)
class _Part:
    """A segment, and the entries that lie in it."""

    segment: Segment
    entries: slice

    @classmethod
    def of(cls, segment: Segment, support: Support) -> _Part:
        return cls(segment, slice(support.entries_before(segment.start), support.entries_before(segment.stop)))


def count_stored(pool: Pool, supports: Mapping[str, Support] | Mapping[str, np.ndarray]) -> int:
    """Return how many entries a pool stores, given each tensor's support, or its flat positions."""
    count = 0
    for s in pool.segments:
        stored = supports[s.name]
        if isinstance(stored, Support):
            count += stored.entries_before(s.stop) - stored.entries_before(s.start)
        else:
            count += int(np.diff(np.searchsorted(stored, [s.start, s.stop]))[0])
    return count


def propose(
    params: Mapping[str, Weight],
    pools: Sequence[Pool],
    *,
    fraction: float,
    drop: Criterion,
    grow: Grower,
    conventions: Conventions,
    initial_nnz: Mapping[str, int],
) -> dict[str, Exchange]:
    r"""Drop a fraction of each pool's entries and fill the pool up again.

    With :math:`n` entries stored in a pool and :math:`k` of them left by the drop, growth wants :math:`n - k`
    (target *conserve*), :math:`\max(0, n_0 - k)` (target *initial*), or what the pool's density stands for instead of
    :math:`n` (target *density*).

    Parameters
    ----------
    params : mapping of str to Weight
        The tensors that the pools name must be sparse weights. Nothing in it is changed.
    pools : sequence of Pool
        Disjoint.
    fraction : float
        Drop fraction, in [0, 1].
    drop, grow : callable
        The criterion, and the choice of places.
    conventions : Conventions
        Rounding, ties, growth target, eligibility.
    initial_nnz : mapping of str to int
        :math:`n_0` of each pool, by label.

    Returns
    -------
    dict of str to Exchange
        One for each tensor that the pools name, whether or not it changes.

    Raises
    ------
    ValueError
        If a tensor is not sparse, a score is NaN, or places run short.
    """
    weights = _sparse(params, pools)
    made: dict[str, Exchange] = {}
    for group in linked(pools):
        goes, want = {}, {}
        for pool in group:
            values = values_in(pool, weights)
            goes[pool.label] = _flagged(drop, values, fraction, conventions, pool.size)
            kept = values.size - int(np.count_nonzero(goes[pool.label]))
            want[pool.label] = max(0, _target(pool, values.size, conventions, initial_nnz) - kept)
        made |= _move(weights, group, goes, want, grow, forbid=conventions.regrow == "forbid")
    return {name: made[name] for name in weights}


def _target(pool: Pool, stored: int, conventions: Conventions, initial_nnz: Mapping[str, int]) -> int:
    """Return how many entries a pool is to have when it has grown."""
    if conventions.growth_target == "density":
        return stored_again(stored, pool.size, conventions)
    return initial_nnz[pool.label] if conventions.growth_target == "initial" else stored


def move(
    params: Mapping[str, Weight],
    pools: Sequence[Pool],
    *,
    goes: Mapping[str, np.ndarray],
    want: Mapping[str, int],
    grow: Grower | None = None,
    conventions: Conventions,
) -> dict[str, Exchange]:
    """Take out of each pool the entries that are flagged, and put in as many others as are wanted.

    Parameters
    ----------
    params : mapping of str to Weight
        A dense array counts as a weight on its full support. Nothing in it is changed.
    pools : sequence of Pool
        Disjoint.
    goes : mapping of str to ndarray of bool
        For each pool, by label, a flag for each of its entries, in the order of :func:`values_in`.
    want : mapping of str to int
        How many places of each pool grow; a pool that is not named grows none.
    grow : callable, optional
        Chooses the places; needed if any is wanted.
    conventions : Conventions
        Of which ``regrow`` is read: whether what goes may come back at once.

    Returns
    -------
    dict of str to Exchange
        One for each tensor that the pools name, whether or not it changes.

    Raises
    ------
    ValueError
        If places run short, or the flags are not one for each entry.
    """
    weights = {name: as_sparse(params[name]) for name in _names(pools)}
    made: dict[str, Exchange] = {}
    for group in linked(pools):
        made |= _move(weights, group, goes, want, grow, forbid=conventions.regrow == "forbid")
    return {name: made[name] for name in weights}


def values_in(pool: Pool, weights: Mapping[str, Weight]) -> np.ndarray:
    """Return the stored values of a pool, its segments one after another; a view if there is only one."""
    lists = []
    for segment in pool.segments:
        weight = as_sparse(weights[segment.name])
        lists.append(weight.values[_Part.of(segment, weight.support).entries])
    return lists[0] if len(lists) == 1 else np.concatenate(lists)


def _names(pools: Sequence[Pool]) -> list[str]:
    return list(dict.fromkeys(segment.name for pool in pools for segment in pool.segments))


def _sparse(params: Mapping[str, Weight], pools: Sequence[Pool]) -> dict[str, SparseWeight]:
    weights: dict[str, SparseWeight] = {}
    for name in _names(pools):
        weight = params.get(name)
        if not isinstance(weight, SparseWeight):
            raise ValueError(
                f"{name} is no sparse weight, yet the method exchanges its connections; store it on a support"
            )
        weights[name] = weight
    return weights


def _move(
    weights: Mapping[str, SparseWeight],
    pools: Sequence[Pool],
    goes: Mapping[str, np.ndarray],
    want: Mapping[str, int],
    grow: Grower | None,
    *,
    forbid: bool,
) -> dict[str, Exchange]:
    """Exchange the connections of pools that share tensors."""
    gone = {s.name: np.zeros(weights[s.name].nnz, bool) for pool in pools for s in pool.segments}
    growths = []
    for pool in pools:
        parts = [_Part.of(s, weights[s.name].support) for s in pool.segments]
        flags, at = goes[pool.label], 0
        for part in parts:
            stored = part.entries.stop - part.entries.start
            gone[part.segment.name][part.entries] = flags[at : at + stored]
            at += stored
        if flags.shape != (at,):
            raise ValueError(f"there are {flags.size} flags for the {at} entries of {pool.label}; give one for each")
        kept = at - int(np.count_nonzero(flags))
        taken = partial(_taken, parts, weights, None if forbid else gone)
        growths.append(Growth(pool, Candidates(pool.size, taken, at if forbid else kept), want.get(pool.label, 0)))

    grown: dict[str, list[np.ndarray | Ranked]] = {name: [] for name in gone}
    for growth, chosen in zip(growths, _chosen(growths, grow)):
        first = growth.pool.segments[0]
        whole = len(growth.pool.segments) == 1 and (first.start, first.stop) == (0, weights[first.name].support.size)
        if whole and not forbid and isinstance(chosen, Ranked) and chosen.candidates is growth.candidates:
            grown[first.name].append(chosen)  # a tensor's own ranks, which need not become places first
        else:
            places = chosen.places if isinstance(chosen, Ranked) else chosen
            for name, flat in growth.pool.divided(places):
                grown[name].append(flat)
    return {name: _moved(weights[name].support, gone[name], chosen) for name, chosen in grown.items()}


def _chosen(growths: Sequence[Growth], grow: Grower | None) -> Sequence[np.ndarray | Ranked]:
    if any(growth.want for growth in growths):
        if grow is None:
            raise ValueError("places are to grow but nothing chooses them; give grow")
        return grow(growths)
    return [np.empty(0, np.int64) for _ in growths]


_BY_DENSITY = ("kept-of-density", "kept-of-sparsity")


def _flagged(drop: Criterion, values: np.ndarray, fraction: float, conventions: Conventions, size: int) -> np.ndarray:
    """Return a flag for each value, true for those that the criterion drops."""
    places = {"size": size} if conventions.drop_of in _BY_DENSITY else {}
    dropped = drop(values, fraction, conventions, **places)
    if dropped.dtype == bool:
        if dropped.shape != values.shape:
            raise ValueError(f"a criterion gave flags of shape {dropped.shape} for {values.size} entries; one each")
        return dropped
    flags = np.zeros(values.size, bool)
    flags[dropped] = True
    if np.count_nonzero(flags) != dropped.size:
        raise ValueError("a criterion can drop an entry once; the list of dropped entries holds one twice")
    return flags


def _taken(
    parts: Sequence[_Part], weights: Mapping[str, SparseWeight], goes: Mapping[str, np.ndarray] | None
) -> np.ndarray:
    """List the places of a pool that its entries hold, without those that go."""
    lists = []
    for part in parts:
        name, low, high = part.segment.name, part.entries.start, part.entries.stop
        places = topology.places(weights[name].support, low, high, None if goes is None else goes[name])
        shift = part.segment.offset - part.segment.start
        if shift:
            places += shift
        lists.append(places)
    return lists[0] if len(lists) == 1 else np.concatenate(lists)


def _moved(support: Support, goes: np.ndarray, chosen: Sequence[np.ndarray | Ranked]) -> Exchange:
    """Build the exchange of one tensor from what its pools grow in it."""
    if len(chosen) == 1 and isinstance(chosen[0], Ranked):
        return Exchange.moving(support, goes, chosen[0].ranks, ranked=True)
    lists = [places for places in chosen if not isinstance(places, Ranked)]
    return Exchange.moving(support, goes, lists[0] if len(lists) == 1 else np.sort(np.concatenate(lists)))
