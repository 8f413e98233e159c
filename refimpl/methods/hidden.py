"""What methods share that train every weight and use a part of them: the part is chosen now and then, and remembered.

S = everything, as dense arrays: the *hidden* weights. A, the entries that the forward pass and the input gradient use,
is chosen from their magnitudes and stays until the method renews it; because the hidden weights go on moving, a weight
that was left out can come back, with the value that it has by then. With B = S each gradient is evaluated as a whole:
that is what these methods cost, in time and in memory, beside the sparse products that they save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.methods.pools import Pool, pools_of
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, values_of
from refimpl.weights.support import Shape, Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient

Scope = Literal["local", "global"]


@dataclass(frozen=True)
class Chosen:
    """Entries of a dense array; their flat positions are kept because every step gathers by them."""

    support: Support
    flat: np.ndarray

    @classmethod
    def of(cls, shape: Shape, flat: np.ndarray) -> Chosen:
        """Return the entries at ascending flat positions."""
        return cls(Support(shape, flat), flat)

    def of_weight(self, weight: np.ndarray) -> SparseWeight:
        """Return a dense weight restricted to these entries."""
        return SparseWeight(self.support, weight.reshape(-1)[self.flat])


class Hidden(BaseMethod):
    """A method over dense weights that remembers A; B = S unless it remembers a B too.

    A subclass says in :meth:`choose` which entries of which tensor are in each of its sets, and in ``exchange_due``
    when they are chosen anew. The first ones are chosen from the weights as they are when first asked for, as of step
    0.
    """

    roles: ClassVar[tuple[str, ...]] = ("forward",)
    """Names of the sets, of which the first is A."""

    def __init__(self, conventions: Conventions = DEFAULT) -> None:
        super().__init__(conventions)
        self._chosen: dict[str, tuple[Chosen, ...]] | None = None

    def choose(self, params: Params, step: int) -> dict[str, tuple[np.ndarray, ...]]:
        """Return, for each tensor that is restricted, the ascending flat positions of each set; one for each role."""
        raise NotImplementedError

    def chosen(self, params: Params) -> dict[str, tuple[Chosen, ...]]:
        """Return the sets that are remembered."""
        if self._chosen is None:
            self._chosen = self._choose(params, 0)
        return self._chosen

    def _choose(self, params: Params, step: int) -> dict[str, tuple[Chosen, ...]]:
        return {
            name: tuple(Chosen.of(params[name].shape, flat) for flat in sets)
            for name, sets in self.choose(params, step).items()
        }

    def forget(self) -> None:
        """Let the sets be chosen when they are next asked for: a new run begins."""
        self._chosen = None

    def magnitudes(self, name: str, params: Params) -> np.ndarray:
        """Return the magnitudes of a dense weight, in its own shape.

        Raises
        ------
        ValueError
            If it is no dense array.
        """
        return np.abs(self.dense(name, params[name]))

    def dense(self, name: str, weight: Weight) -> np.ndarray:
        """Return the array of a weight that must be dense."""
        if isinstance(weight, SparseWeight):
            raise ValueError(f"{name} is a sparse weight; {self.name} trains all weights, so give a dense array")
        return weight

    def view(self, params: Params) -> Params:
        """Return the parameters with each restricted tensor on its A, gathered from the dense array."""
        seen = dict(params)
        for name, sets in self.chosen(params).items():
            seen[name] = sets[0].of_weight(self.dense(name, params[name]))
        return seen

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Choose the sets anew from the weights; return no exchange, for S does not change."""
        self._chosen = self._choose(params, step)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the shapes of the restricted tensors; None if nothing was chosen yet."""
        if self._chosen is None:
            return {"shapes": None}
        return {"shapes": {name: list(sets[0].support.shape) for name, sets in self._chosen.items()}}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the flat positions of the sets: the weights that they were chosen from are gone."""
        return {
            f"{name}/{role}": one.flat
            for name, sets in (self._chosen or {}).items()
            for role, one in zip(self.roles, sets, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the sets.

        Raises
        ------
        ValueError
            If the arrays of :meth:`state_arrays` are missing.
        """
        self._chosen = None
        if state["shapes"] is None:
            return
        arrays = arrays or {}
        taken = {}
        for name, shape in state["shapes"].items():
            keys = [f"{name}/{role}" for role in self.roles]
            if not all(key in arrays for key in keys):
                raise ValueError(
                    f"the saved state of {self.name} lacks the sets of {name}; pass what state_arrays() returned"
                )
            taken[name] = tuple(Chosen.of(tuple(shape), arrays[key]) for key in keys)
        self._chosen = taken


@dataclass(frozen=True)
class Group:
    """A pool whose weights compete for one number of places, and the density that each of its segments is to have."""

    pool: Pool
    densities: tuple[float, ...]

    def count(self, conventions: Conventions, at: Callable[[float], float] = lambda density: density) -> int:
        """Return how many entries are used where density d stands for ``at(d)``."""
        if len(set(self.densities)) == 1:  # counted as one, not each segment rounded
            return count_at(at(self.densities[0]), self.pool.size, conventions, self.pool.label)
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


def keep_in(pool: Pool, scores: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Find the ``count`` largest scores of a pool; of equal ones the earlier segment and the lower position stay.

    Returns
    -------
    dict of str to ndarray of int64
        Ascending flat positions in each tensor.

    Raises
    ------
    ValueError
        If nothing of a tensor would be kept, which cuts the network, or a score is NaN.
    """
    lists = [scores[segment.name].reshape(-1)[segment.start : segment.stop] for segment in pool.segments]
    kept = keep_largest(lists[0] if len(lists) == 1 else np.concatenate(lists), count)
    out = {}
    for segment in pool.segments:
        low, high = np.searchsorted(kept, [segment.offset, segment.offset + segment.stop - segment.start])
        if low == high:
            raise ValueError(
                f"nothing of {segment.name} is among the {count} largest weights of the pool {pool.label!r}; lower the "
                "sparsity, fix this tensor's density, or give each tensor its own count (scope 'local', pool 'matrix')"
            )
        out[segment.name] = kept[low:high] + (segment.start - segment.offset)
    return out


def largest(
    method: Hidden, groups: list[Group], params: Params, at: Callable[[float], float] = lambda density: density
) -> dict[str, np.ndarray]:
    """Find the weights of largest magnitude in each group, where density d stands for ``at(d)``.

    Returns
    -------
    dict of str to ndarray of int64
        Ascending flat positions, for the tensors of which not all entries are found.
    """
    found: dict[str, list[np.ndarray]] = {}
    for group in groups:
        scores = {name: method.magnitudes(name, params) for name in {s.name for s in group.pool.segments}}
        for name, flat in keep_in(group.pool, scores, group.count(method.conventions, at)).items():
            found.setdefault(name, []).append(flat)
    merged = {name: lists[0] if len(lists) == 1 else np.sort(np.concatenate(lists)) for name, lists in found.items()}
    return {name: flat for name, flat in merged.items() if flat.size < values_of(params[name]).size}
