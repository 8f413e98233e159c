r"""What the methods share that only ever take weights away: who competes, how many stay, and which.

Weights are ranked by :math:`|w|` within pools: each tensor by itself (scope *local*; convention ``pool``), or all
tensors together under one threshold (scope *global*). Everything is stored at first, :math:`S` shrinks and never grows,
and :math:`A = B = S`. What has gone has no memory, so it cannot come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import drop_smallest
from refimpl.methods.exchange import move, values_in
from refimpl.methods.hidden import Group, Scope, groups_of, require_scope
from refimpl.methods.pools import Pool
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import as_sparse

if TYPE_CHECKING:
    from refimpl.weights.support import Support


def cubic(initial: float, final: float, *, step: int, begin: int, end: int) -> float:
    r"""Return the density of the cubic schedule, which prunes fast at first and ever more slowly.

    .. math:: d_t = d_f + (d_i - d_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3, \qquad t_0 \le t \le t_1

    Before :math:`t_0` it is :math:`d_i` and after :math:`t_1` it is :math:`d_f`, exactly. In between it is the number
    above, rounded once: computed in fractions, so that it never rises and no count is off by an entry.

    Parameters
    ----------
    initial, final : float
        :math:`d_i, d_f`.
    step, begin, end : int
        :math:`t, t_0, t_1`.

    References
    ----------
    Zhu, Gupta, "To prune, or not to prune", 2018, section 3, which writes it for the sparsity 1 − d.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    left = Fraction(end - step, end - begin)
    return float(Fraction(final) + (Fraction(initial) - Fraction(final)) * left**3)


def prune(
    params: Params, pools: Sequence[Pool], kept: Mapping[str, int], conventions: Conventions = DEFAULT
) -> dict[str, Exchange]:
    """Keep the largest weights of each pool.

    Parameters
    ----------
    params : Params
        A dense array counts as a weight on its full support. Nothing in it is changed.
    pools : sequence of Pool
        Disjoint.
    kept : mapping of str to int
        How many entries of each pool stay, by label; a pool that stores no more than that is left alone.
    conventions : Conventions
        Of which ``drop_ties`` is read: by default the count is exact, and of equal weights the lower places stay.

    Returns
    -------
    dict of str to Exchange
        One for each tensor that loses entries, and for no other: what loses nothing stays the array that it is.

    Raises
    ------
    ValueError
        If a tensor would lose all its entries, or a weight is NaN.
    """
    weights = {s.name: as_sparse(params[s.name]) for pool in pools for s in pool.segments}
    goes: dict[str, np.ndarray] = {}
    for pool in pools:
        magnitude = np.abs(values_in(pool, weights))
        goes[pool.label] = np.zeros(magnitude.size, bool)
        surplus = max(0, magnitude.size - kept[pool.label])
        goes[pool.label][drop_smallest(magnitude, surplus, conventions.drop_ties)] = True
    return take_out(dict(weights), pools, goes, conventions)


def take_out(
    params: Params, pools: Sequence[Pool], goes: Mapping[str, np.ndarray], conventions: Conventions = DEFAULT
) -> dict[str, Exchange]:
    """Take the flagged entries out of each pool; result and errors are those of :func:`prune`."""
    losing = [pool for pool in pools if goes[pool.label].any()]
    moved = move(params, losing, goes=goes, want={}, conventions=conventions)
    for name, exchange in moved.items():
        if not exchange.new.nnz:
            raise ValueError(
                f"pruning would take all entries of {name}, which cuts the network; lower the sparsity, fix this "
                "tensor's density, or prune each tensor by itself (scope 'local')"
            )
    return {name: exchange for name, exchange in moved.items() if exchange.goes.any()}


class Pruning(BaseMethod):
    """A method that starts dense and takes weights away by their magnitude.

    Parameters
    ----------
    allocation : Allocation
        How dense the model is in the end. With scope *global* its density is that of all tensors together; those
        that it fixes do not take part and keep their own.
    scope : {"local", "global"}
        Whether each tensor is ranked by itself or all together.
    conventions : Conventions
        Of which those of the allocation, ``pool`` (scope *local*) and ``drop_ties`` are read.

    Raises
    ------
    ValueError
        If the scope is unknown, or is global with an allocation that is not uniform.
    """

    def __init__(self, allocation: Allocation, scope: Scope, conventions: Conventions = DEFAULT) -> None:
        super().__init__(conventions)
        require_scope(scope, allocation)
        self.allocation = allocation
        self.scope = scope
        self.groups: list[Group] = []

    @property
    def pools(self) -> list[Pool]:
        """The pools; empty if no tensor is pruned."""
        return [group.pool for group in self.groups]

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember who competes and how dense they are in the end; return no support, for training starts dense."""
        self.groups = groups_of(specs, self.allocation, self.scope, self.conventions)
        for pool, kept in zip(self.pools, self.kept().values(), strict=True):
            tensors = len(pool.segments)
            if kept < tensors:
                raise ValueError(
                    f"{pool.label!r} is to keep {kept} entries in {tensors} tensors, of which one would be empty; "
                    "lower the sparsity"
                )
        return {}

    def kept(self, at: Callable[[float], float] = lambda density: density) -> dict[str, int]:
        """Return how many entries each pool keeps, by label, where a final density d stands for ``at(d)``."""
        return {group.pool.label: group.count(self.conventions, at) for group in self.groups}

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, and the densities in the end."""
        return {"groups": [group.as_json() for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and densities."""
        self.groups = [Group.from_json(saved) for saved in state["groups"]]
