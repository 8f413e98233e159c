"""Who competes for how many places, and who wins: what all methods share that keep the best of something.

A *group* is a pool of weights and the density that they are to have together. By the *scope* each tensor is one, or
all tensors are one. The entries of a group are ranked, by magnitude or by a score, and as many of the best stay as its
density says. Of equal ones the earlier tensor's stays, then the lower position's, unless a convention says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import drop_smallest
from refimpl.methods.exchange import move, values_in
from refimpl.methods.pools import Pool, pools_of
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import as_sparse

Scope = Literal["local", "global"]


def as_given(density: float) -> float:
    """Return the density itself."""
    return density


@dataclass(frozen=True)
class Group:
    """A pool whose weights compete for one number of places, and the density that each of its segments is to have."""

    pool: Pool
    densities: tuple[float, ...]

    def count(self, conventions: Conventions, at: Callable[[float], float] = as_given) -> int:
        """Return how many entries stay where density d stands for ``at(d)``.

        Raises
        ------
        ValueError
            If it would be none, and the conventions refuse that.
        """
        if len(set(self.densities)) == 1:  # counted as one, not each segment rounded
            label = self.pool.label if len(self.pool.segments) == 1 else f"the pool {self.pool.label!r}"
            return count_at(at(self.densities[0]), self.pool.size, conventions, label)
        return sum(
            count_at(at(density), segment.stop - segment.start, conventions, segment.name)
            for segment, density in zip(self.pool.segments, self.densities, strict=True)
        )

    def as_json(self) -> list[Any]:
        """Return lists and numbers from which :meth:`from_json` makes the group again."""
        return [self.pool.as_json(), list(self.densities)]

    @classmethod
    def from_json(cls, saved: list[Any]) -> Group:
        """Undo :meth:`as_json`."""
        pool, densities = saved
        return cls(Pool.from_json(pool), tuple(float(density) for density in densities))


def require_scope(scope: str, allocation: Allocation | None = None) -> None:
    """Raise a ValueError unless there is such a scope, and it leaves the allocation's rule something to say."""
    if scope not in ("local", "global"):
        raise ValueError(
            f"the scope is {scope!r}; give 'local' (a count for each tensor) or 'global' (one for the model)"
        )
    if scope == "global" and allocation is not None and allocation.rule != "uniform":
        raise ValueError(
            f"the allocation rule is {allocation.rule!r}, but with the scope 'global' the magnitudes decide how dense "
            "each tensor is; give the rule 'uniform', or the scope 'local'"
        )


def groups_of(
    specs: Mapping[str, ParamSpec], allocation: Allocation, scope: Scope, conventions: Conventions
) -> list[Group]:
    """Divide the prunable tensors into groups; those of density 1 are in none.

    Parameters
    ----------
    specs, allocation, conventions
        As in :func:`refimpl.methods.allocation.densities`.
    scope : {"local", "global"}
        *Local*: the pools of the conventions, each tensor by default, with the densities that the allocation gives.
        *Global*: all tensors are one, save those whose density is ``fixed``.
    """
    allocated = {name: d for name, d in densities(specs, allocation, conventions).items() if d < 1}
    together = [name for name in allocated if scope == "global" and name not in allocation.fixed]
    pools = [Pool.chain("global", [(name, 0, specs[name].size) for name in together])] if together else []
    pools += pools_of(specs, [name for name in allocated if name not in together], conventions.pool)
    return [Group(pool, tuple(allocated[segment.name] for segment in pool.segments)) for pool in pools]


def counts_of(
    groups: Sequence[Group], conventions: Conventions, at: Callable[[float], float] = as_given
) -> dict[str, int]:
    """Return how many entries of each pool stay, by label, where density d stands for ``at(d)``."""
    return {group.pool.label: group.count(conventions, at) for group in groups}


def keep_best(
    params: Params,
    pools: Sequence[Pool],
    kept: Mapping[str, int],
    conventions: Conventions = DEFAULT,
    *,
    score: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> dict[str, Exchange]:
    """Keep the entries of each pool that score best.

    Parameters
    ----------
    params : Params
        Scores in the place of values, or what they are computed from. A dense array counts as a weight on its full
        support. Nothing in it is changed.
    pools : sequence of Pool
        Disjoint.
    kept : mapping of str to int
        How many entries of each pool stay, by label; a pool that stores no more than that is left alone.
    conventions : Conventions
        Of which ``drop_ties`` is read: by default the count is exact, and of equal scores the lower places stay.
    score : callable, optional
        Makes scores of a pool's values.

    Returns
    -------
    dict of str to Exchange
        One for each tensor that loses entries, and for no other: what loses nothing stays the array that it is.

    Raises
    ------
    ValueError
        If a tensor would lose all its entries, or a score is NaN.
    """
    weights = {s.name: as_sparse(params[s.name]) for pool in pools for s in pool.segments}
    goes: dict[str, np.ndarray] = {}
    for pool in pools:
        scores = score(values_in(pool, weights))
        goes[pool.label] = np.zeros(scores.size, bool)
        surplus = max(0, scores.size - kept[pool.label])
        goes[pool.label][drop_smallest(scores, surplus, conventions.drop_ties)] = True
    return take_out(dict(weights), pools, goes)


def take_out(params: Params, pools: Sequence[Pool], goes: Mapping[str, np.ndarray]) -> dict[str, Exchange]:
    """Take the flagged entries out of each pool; result and errors are those of :func:`keep_best`."""
    losing = [pool for pool in pools if goes[pool.label].any()]
    moved = move(params, losing, goes=goes, want={}, conventions=DEFAULT)  # of which growth alone reads any
    for name, exchange in moved.items():
        if not exchange.new.nnz:
            raise emptied(name)
    return {name: exchange for name, exchange in moved.items() if exchange.goes.any()}


def emptied(name: str) -> ValueError:
    """Return the error that a tensor would keep nothing."""
    return ValueError(
        f"{name} would keep no weight, which cuts the network: none is among the best of its pool; lower the sparsity, "
        "fix this tensor's density, or give each tensor its own count (scope 'local', pool 'matrix')"
    )
