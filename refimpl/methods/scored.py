r"""Choosing a support before training: each weight gets a score, and the best ones of a contest stay.

With scores :math:`s` of the n entries that compete and a density :math:`\rho`, the support is

.. math:: S = \text{the } \mathrm{round}(\rho\,n) \text{ entries of largest } s

and does not change any more; A = B = S. The entries compete within their tensor (*local*, with the densities of
:mod:`refimpl.methods.allocation`) or over the whole model (*global*, with one density for all, so that how the
tensors share it follows from the scores and no rule of allocation is read). A tensor whose density the allocation
fixes is a contest of its own in either case, or stays dense.

Of equal scores the earlier tensor's, and in a tensor the lower position's, stays. The parameters come dense, and as
many scores are held as there are weights, until the support is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.base import BaseMethod, Probe
from refimpl.methods.conventions import DEFAULT, AllocationConventions, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient

Scope = Literal["local", "global"]
Scores = dict[str, np.ndarray]
"""One number for each stored entry of a tensor, in row-major order, by the tensor's name."""


@dataclass(frozen=True)
class Contest:
    """Tensors whose entries compete for the same places.

    Attributes
    ----------
    names : tuple of str
        In the order of the model's parameters.
    size : int
        Entries of them all.
    density : float
        Fraction of those entries that stays in the end.
    """

    names: tuple[str, ...]
    size: int
    density: float

    def count(self, conventions: AllocationConventions, density: float | None = None) -> int:
        """Return how many entries stay, at the final density or at another on the way there.

        Raises
        ------
        ValueError
            If it would be none.
        """
        label = self.names[0] if len(self.names) == 1 else "the whole model"
        return count_at(self.density if density is None else density, self.size, conventions, label)


def contests_of(
    specs: Mapping[str, ParamSpec], allocation: Allocation, scope: Scope, conventions: AllocationConventions
) -> list[Contest]:
    """Divide the prunable tensors of density below 1 into contests.

    Raises
    ------
    ValueError
        As :func:`refimpl.methods.allocation.densities` does.
    """
    own = densities(specs, allocation, conventions)
    contests = []
    if scope == "global":
        shared = tuple(name for name in own if name not in allocation.fixed)
        if shared:
            contests.append(Contest(shared, sum(specs[name].size for name in shared), allocation.density))
        own = {name: own[name] for name in allocation.fixed}
    contests += [Contest((name,), specs[name].size, density) for name, density in own.items()]
    return [contest for contest in contests if contest.density < 1]


def keep_best(scores: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Find the ``count`` largest scores of some tensors together.

    Parameters
    ----------
    scores : mapping of str to ndarray, shape (n_l,)
        Of equal ones those that come earlier stay.
    count : int

    Returns
    -------
    dict of str to ndarray of int64
        Places among each tensor's scores, ascending.

    Raises
    ------
    ValueError
        If a score is not finite, or a tensor would keep none.
    """
    for name, own in scores.items():
        refuse_nonfinite(name, own)
    kept = keep_largest(np.concatenate(list(scores.values())), count)
    ends = np.cumsum([own.size for own in scores.values()])
    out = {}
    for name, places, end in zip(scores, np.split(kept, np.searchsorted(kept, ends[:-1])), ends, strict=True):
        if not places.size:
            raise ValueError(
                f"{name} would keep no weight: all its {scores[name].size} scores are below those that stay; lower "
                "the sparsity, fix this tensor's density in the allocation, or let each tensor keep its share "
                "(scope 'local')"
            )
        out[name] = places - (end - scores[name].size)
    return out


def refuse_nonfinite(name: str, scores: np.ndarray) -> None:
    """Raise a ValueError if a number by which weights are to be ranked is NaN or infinite."""
    if not np.isfinite(scores).all():
        raise ValueError(
            f"a score of {name} is NaN or infinite, so its weights cannot be ranked; check the initial weights and "
            "the data, or make the weights smaller"
        )


def restricted(params: Params, supports: Mapping[str, Support]) -> Params:
    """Return the parameters with some dense ones on a support; one that keeps all its entries stays as it is."""
    out = dict(params)
    for name, support in supports.items():
        if support.nnz < support.size:
            out[name] = SparseWeight.from_dense(as_dense(name, params[name]), support)
    return out


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
        How many entries are stored. With scope "global" its rule is not read.
    scope : {"local", "global"}
        Whether weights compete within their tensor or over the whole model.
    conventions : Conventions
        Of which ``initial_rounding`` and ``er_cap`` are read; counts are exact whatever ``initial_count`` says.

    Raises
    ------
    ValueError
        If the scope is neither.
    """

    def __init__(self, allocation: Allocation, *, scope: Scope, conventions: Conventions = DEFAULT) -> None:
        super().__init__(conventions)
        if scope not in ("local", "global"):
            raise ValueError(f"the scope of {self.name} is {scope!r}; give 'local' or 'global'")
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
        contests = contests_of(specs, self.allocation, self.scope, self.conventions)
        for contest in contests:
            contest.count(self.conventions)  # so that too low a density is refused before anything is computed
            for name in contest.names:
                as_dense(name, params[name])
        return restricted(params, self.choose(params, specs, probe, contests)) if contests else params

    def choose(
        self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None, contests: list[Contest]
    ) -> dict[str, Support]:
        """Return the supports of the tensors of all contests."""
        scores = self.scores(params, specs, probe)
        kept: dict[str, np.ndarray] = {}
        for contest in contests:
            kept |= keep_best({name: scores[name] for name in contest.names}, contest.count(self.conventions))
        return {name: Support(specs[name].shape, flat) for name, flat in kept.items()}

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
