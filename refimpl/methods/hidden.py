"""What methods share that train every weight and use a part of them: the part is chosen now and then, and remembered.

S = everything, as dense arrays: the *hidden* weights. A, the entries that the forward pass and the input gradient use,
is chosen from their magnitudes and stays until the method renews it; because the hidden weights go on moving, a weight
that was left out can come back, with the value that it has by then. With B = S each gradient is evaluated as a whole:
that is what these methods cost, in time and in memory, beside the sparse products that they save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.methods.groups import Group, as_given, emptied
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params
from refimpl.weights.sparse import SparseWeight, Weight, values_of
from refimpl.weights.support import Shape, Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


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


def largest(
    method: Hidden, groups: list[Group], params: Params, at: Callable[[float], float] = as_given
) -> dict[str, np.ndarray]:
    """Find the weights of largest magnitude in each group, where density d stands for ``at(d)``.

    Returns
    -------
    dict of str to ndarray of int64
        Ascending flat positions, for the tensors of which not all entries are found.

    Raises
    ------
    ValueError
        If nothing of a tensor would be found, or a weight is NaN.
    """
    found: dict[str, list[np.ndarray]] = {}
    for group in groups:
        lists = [method.magnitudes(s.name, params).reshape(-1)[s.start : s.stop] for s in group.pool.segments]
        kept = keep_largest(lists[0] if len(lists) == 1 else np.concatenate(lists), group.count(method.conventions, at))
        for name, flat in group.pool.divided(kept):
            if not flat.size:
                raise emptied(name)
            found.setdefault(name, []).append(flat)
    merged = {name: lists[0] if len(lists) == 1 else np.sort(np.concatenate(lists)) for name, lists in found.items()}
    return {name: flat for name, flat in merged.items() if flat.size < values_of(params[name]).size}
