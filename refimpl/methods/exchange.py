"""One exchange of connections over all pools: drop, count, grow, and say what happened.

Nothing here is dense: kept entries and candidates are sorted lists of places, and growth by gradient sees one
block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refimpl.methods.conventions import Conventions
from refimpl.methods.drop import Criterion
from refimpl.methods.grow import BestCandidates, Candidates, grow_random
from refimpl.methods.pools import Pool
from refimpl.rng import generator
from refimpl.weights.carry import Exchange
from refimpl.weights.sparse import SparseWeight, Weight

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


@dataclass(frozen=True)
class Growth:
    """What one pool is to grow: ``want`` of its ``candidates``."""

    pool: Pool
    candidates: Candidates
    want: int


Grower = Callable[[Sequence[Growth]], Sequence[np.ndarray]]
"""Chooses the places that grow, for each pool."""


def at_random(seed: int, step: int, conventions: Conventions) -> Grower:
    """Grow uniformly at random, each pool from its own stream at this step."""

    def grow(growths: Sequence[Growth]) -> list[np.ndarray]:
        return [
            grow_random(
                g.candidates,
                g.want,
                generator(seed, f"grow/{g.pool.label}", step),
                count=conventions.growth_count,
            )
            for g in growths
        ]

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


def count_stored(pool: Pool, supports: Mapping[str, np.ndarray]) -> int:
    """Return how many entries a pool stores, given each tensor's flat positions."""
    return sum(int(np.diff(np.searchsorted(supports[s.name], [s.start, s.stop]))[0]) for s in pool.segments)


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
    (target *conserve*) or :math:`\max(0, n_0 - k)` (target *initial*).

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
    names = list(dict.fromkeys(segment.name for pool in pools for segment in pool.segments))
    weights: dict[str, SparseWeight] = {}
    for name in names:
        weight = params.get(name)
        if not isinstance(weight, SparseWeight):
            raise ValueError(
                f"{name} is no sparse weight, yet the method exchanges its connections; store it on a support"
            )
        weights[name] = weight
    flat = {name: weight.support.flat for name, weight in weights.items()}
    dropped: dict[str, list[np.ndarray]] = {name: [] for name in names}
    grown: dict[str, list[np.ndarray]] = {name: [] for name in names}

    growths = []
    for pool in pools:
        places, values = _gather(pool, flat, weights)
        goes = drop(values, fraction, conventions)
        _scatter(pool, places[goes], dropped)
        kept = np.delete(places, goes)
        n0 = initial_nnz[pool.label] if conventions.growth_target == "initial" else places.size
        taken = places if conventions.regrow == "forbid" else kept
        growths.append(Growth(pool, Candidates(pool.size, taken), max(0, n0 - kept.size)))
    for pool, places in zip(pools, grow(growths)):
        _scatter(pool, places, grown)
    return {
        name: Exchange.of(weights[name].support, np.concatenate(dropped[name]), np.concatenate(grown[name]))
        for name in names
    }


def _gather(
    pool: Pool, flat: Mapping[str, np.ndarray], weights: Mapping[str, SparseWeight]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places that a pool stores, ascending, and their values."""
    places, values = [], []
    for s in pool.segments:
        low, high = np.searchsorted(flat[s.name], [s.start, s.stop])
        places.append(flat[s.name][low:high] + (s.offset - s.start))
        values.append(weights[s.name].values[low:high])
    return np.concatenate(places), np.concatenate(values)


def _scatter(pool: Pool, places: np.ndarray, into: Mapping[str, list[np.ndarray]]) -> None:
    """Hand places of a pool (ascending) to the tensors to which they belong, as flat positions."""
    for s in pool.segments:
        low, high = np.searchsorted(places, [s.offset, s.offset + s.stop - s.start])
        into[s.name].append(places[low:high] + (s.start - s.offset))
