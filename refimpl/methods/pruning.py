r"""What the methods share that only ever take weights away by their magnitude: how many stay, and when.

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
from refimpl.methods.groups import Group, Scope, as_given, counts_of, groups_of, keep_best, require_scope
from refimpl.methods.pools import Pool
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec

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
    """Keep the largest weights of each pool; see :func:`refimpl.methods.groups.keep_best`."""
    return keep_best(params, pools, kept, conventions, score=np.abs)


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

    def kept(self, at: Callable[[float], float] = as_given) -> dict[str, int]:
        """Return how many entries each pool keeps, by label, where a final density d stands for ``at(d)``."""
        return counts_of(self.groups, self.conventions, at)

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, and the densities in the end."""
        return {"groups": [group.as_json() for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and densities."""
        self.groups = [Group.from_json(saved) for saved in state["groups"]]
