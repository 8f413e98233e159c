r"""Choosing a support before training: each weight gets a score, and the best ones of a group stay.

With scores :math:`s` of the n entries that compete and a density :math:`\rho`, the support is

.. math:: S = \text{the } \mathrm{round}(\rho\,n) \text{ entries of largest } s

and does not change any more; A = B = S. The entries compete within their tensor (*local*, with the densities of
:mod:`refimpl.methods.allocation`) or over the whole model (*global*, with one density for all, so that how the
tensors share it follows from the scores and no rule of allocation is read). A tensor whose density the allocation
fixes is a group of its own in either case, or stays dense; see :mod:`refimpl.methods.groups`.

Of equal scores the earlier tensor's, and in a tensor the lower position's, stays. The parameters come dense, and as
many scores are held as there are weights, until the support is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import BaseMethod, Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Group, Scope, as_given, counts_of, groups_of, keep_best, require_scope
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, values_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient

Scores = dict[str, np.ndarray]
"""One number for each stored entry of a tensor, in row-major order, by the tensor's name."""


def refuse_nonfinite(name: str, scores: np.ndarray) -> None:
    """Raise a ValueError if a number by which weights are to be ranked is NaN or infinite."""
    if not np.isfinite(scores).all():
        raise ValueError(
            f"a score of {name} is NaN or infinite, so its weights cannot be ranked; check the initial weights and "
            "the data, or make the weights smaller"
        )


def as_dense(name: str, weight: Weight) -> np.ndarray:
    """Return a weight that must be dense.

    Raises
    ------
    ValueError
        If it is sparse already.
    """
    if isinstance(weight, SparseWeight):
        raise ValueError(
            f"{name} is a sparse weight; a support is chosen among all of a tensor's weights, so give a dense array"
        )
    return weight


def times_gradient(weight: Weight, gradient: np.ndarray | Gradient) -> np.ndarray:
    """Return w ⊙ dw on the stored entries, shape (nnz,); of a dense weight, the gradient is held block by block."""
    if isinstance(weight, SparseWeight):
        return weight.values * (gradient if isinstance(gradient, np.ndarray) else gradient.on(weight.support))
    if isinstance(gradient, np.ndarray):
        return (weight * gradient).reshape(-1)
    matrix = weight.reshape(weight.shape[0], -1)
    out = np.empty(matrix.shape, matrix.dtype)
    for rows, block in gradient.blocks():
        np.multiply(matrix[rows], block, out=out[rows])
    return out.reshape(-1)


class ScoredOnce(BaseMethod):
    """A method that scores all weights once, before training, and keeps the best.

    Parameters
    ----------
    allocation : Allocation
        How many entries are stored. With scope "global" its rule is not read, whichever it is: the scores decide how
        dense each tensor is.
    scope : {"local", "global"}
        Whether weights compete within their tensor or over the whole model.
    conventions : Conventions
        Of which those of the allocation are read; what they say of single tensors (``er_*``, ``*_layer*``) with scope
        "local" only. Counts are exact whatever ``initial_count`` says, and each tensor competes as a whole.

    Raises
    ------
    ValueError
        If the scope is neither.
    """

    def __init__(self, allocation: Allocation, *, scope: Scope, conventions: Conventions = DEFAULT) -> None:
        super().__init__(conventions)
        require_scope(scope)
        self.allocation = allocation
        self.scope: Scope = scope

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Choose the supports by scores of the weights and return the weights on them, their values as drawn.

        Raises
        ------
        ValueError
            If a score is not finite, a tensor or the model would keep no weight, a tensor is sparse already, or the
            method needs a probe and gets none.
        """
        groups = self.competing(specs)
        counts_of(groups, self.conventions)  # so that too low a density is refused before anything is computed
        dense = {s.name: as_dense(s.name, params[s.name]) for group in groups for s in group.pool.segments}
        chosen = self.choose(params, specs, probe, groups) if groups else {}
        return params | {name: SparseWeight.from_dense(dense[name], support) for name, support in chosen.items()}

    def competing(self, specs: Mapping[str, ParamSpec]) -> list[Group]:
        """Return who competes: whole tensors, or all of them, of which then none is treated apart by rule or place."""
        allocation, conventions = self.allocation, replace(self.conventions, pool="matrix")
        if self.scope == "global":
            allocation = replace(allocation, rule="uniform")
            conventions = replace(
                conventions, first_layer="as-others", linear_layers="as-others", last_layer="as-others"
            )
        return groups_of(specs, allocation, self.scope, conventions)

    def choose(
        self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None, groups: list[Group]
    ) -> dict[str, Support]:
        """Return the supports of the tensors that lose entries."""
        scores = self.scores(params, specs, probe)
        names = [segment.name for group in groups for segment in group.pool.segments]
        exchanges = self.best({name: scores[name].reshape(specs[name].shape) for name in names}, groups)
        return {name: exchange.new for name, exchange in exchanges.items()}

    def best(self, scored: Params, groups: list[Group], at: Callable[[float], float] = as_given) -> dict[str, Exchange]:
        """Keep the best of each group, where density d stands for ``at(d)``.

        Raises
        ------
        ValueError
            If a score is not finite, or a tensor would keep no entry.
        """
        for name, scores in scored.items():
            refuse_nonfinite(name, values_of(scores))
        return keep_best(scored, [group.pool for group in groups], counts_of(groups, self.conventions, at))

    def scores(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None) -> Scores:
        """Return the scores of all entries of each prunable tensor."""
        raise NotImplementedError

    def probed(self, probe: Probe | None) -> Probe:
        """Return the probe, which must be there."""
        if probe is None:
            raise ValueError(
                f"{self.name} looks at the model before training; call start with a probe, as the trainer does"
            )
        return probe
