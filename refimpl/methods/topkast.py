r"""Top-KAST: always sparse in the forward and the backward pass, over weights that are all stored.

For each tensor with n entries, density D and exploration M, every N steps:

.. math::
    A = \text{the } \mathrm{round}(D\,n) \text{ entries of largest } |w|, \qquad
    B = \text{the } \mathrm{round}(\min(1, D + M)\,n) \text{ entries of largest } |w| \supseteq A

The forward pass and the input gradient use :math:`w_A`; the weight gradient is computed on :math:`B`, and
only B is updated. Weights outside B keep their values exactly; an optimizer must not move them, neither by
momentum nor by weight decay. A weight of B ∖ A that grows past the smallest of A takes its place at the next
renewal. An optional penalty lets those of B ∖ A decay faster:

.. math:: \frac{\lambda}{2}\Bigl(\sum_{A} w^2 + \frac1D \sum_{B \setminus A} w^2\Bigr), \qquad
    \text{its gradient } \lambda w \text{ on } A, \quad (\lambda / D)\,w \text{ on } B \setminus A

S = everything: the weights are dense arrays, and memory is not in proportion to D; time is.

Source: Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: top-k always sparse training", NeurIPS 2020,
section 2.

Deviations
----------
- The simplest form: one threshold for each tensor, M constant in time, no stage in which B shrinks to A.
- The penalty is of weight-decay form, :math:`w^2/2`; the paper's exploration loss may be read with
  :math:`|w|`.
- Of equal magnitudes the lower position belongs to the set; A ⊆ B therefore holds with ties too.
- Between renewals A stays as it is, though the weights move: that is what makes N > 1 cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.methods.schedule import EverySteps
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads


@dataclass(frozen=True)
class _Sets:
    """A and B of one tensor; the flat positions are kept because every step gathers by them."""

    forward: Support
    backward: Support
    forward_flat: np.ndarray
    backward_flat: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...], forward: np.ndarray, backward: np.ndarray) -> _Sets:
        return cls(Support(shape, forward), Support(shape, backward), forward, backward)


class TopKAST(BaseMethod):
    """Top-KAST; see the module.

    Parameters
    ----------
    allocation : Allocation
        D of each tensor.
    exploration : float
        M: the additional fraction of the entries whose gradient is computed.
    refresh : int
        N: training steps between renewals of A and B.
    penalty : float
        λ of the penalty; 0 for none.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If M is outside [0, 1], or the penalty is negative or not finite.
    """

    name = "topkast"

    def __init__(
        self,
        allocation: Allocation,
        *,
        exploration: float = 0.1,
        refresh: int = 100,
        penalty: float = 0.0,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        if not 0 <= exploration <= 1:
            raise ValueError(
                f"the exploration of Top-KAST is {exploration}; give the fraction of further entries, from 0 to 1"
            )
        if not 0 <= penalty < np.inf:
            raise ValueError(f"the penalty of Top-KAST is {penalty}; give a finite number of at least 0")
        self.allocation = allocation
        self.exploration = exploration
        self.penalty = penalty
        self.when = EverySteps(refresh)
        self.counts: dict[str, tuple[int, int]] = {}  # |A| and |B|
        self.density: dict[str, float] = {}
        self._sets: dict[str, _Sets] = {}

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember |A| and |B| of each tensor; return no support, for everything stays stored."""
        allocated = densities(specs, self.allocation, self.conventions)
        self.density = {name: density for name, density in allocated.items() if density < 1}
        self.counts = {}
        for name, density in self.density.items():
            widened = min(1.0, density + self.exploration)
            forward, backward = (count_at(d, specs[name].size, self.conventions, name) for d in (density, widened))
            self.counts[name] = (forward, backward)
        self._sets = {}
        return {}

    def _sets_of(self, name: str, params: Params) -> _Sets:
        """Return A and B of a tensor; the first ones are taken from the weights as they then are."""
        if name not in self._sets:
            self._renew(name, params)
        return self._sets[name]

    def _renew(self, name: str, params: Params) -> None:
        weight = params[name]
        if isinstance(weight, SparseWeight):
            raise ValueError(f"{name} is a sparse weight; Top-KAST stores all weights, so give a dense array")
        scores = np.abs(weight).reshape(-1)
        forward, backward = (keep_largest(scores, count) for count in self.counts[name])
        self._sets[name] = _Sets.of(weight.shape, forward, backward)

    def view(self, params: Params) -> Params:
        """Return the parameters with each sparse tensor restricted to A, gathered from the dense array."""
        seen = dict(params)
        for name in self.counts:
            sets, weight = self._sets_of(name, params), params[name]
            assert isinstance(weight, np.ndarray)
            seen[name] = SparseWeight(sets.forward, weight.reshape(-1)[sets.forward_flat])
        return seen

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B; only there may the optimizer change the weight."""
        return self._sets_of(name, params).backward if name in self.counts else None

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradients on B, and add the penalty's."""
        pulled = super().pull(params, grads)
        if self.penalty:
            for name in self.counts:
                pulled[name] = pulled[name] + self._penalty_gradient(name, params)
        return pulled

    def _penalty_gradient(self, name: str, params: Params) -> np.ndarray:
        sets, weight = self._sets_of(name, params), params[name]
        assert isinstance(weight, np.ndarray)
        gradient = weight.reshape(-1)[sets.backward_flat] * (self.penalty / self.density[name])
        gradient[sets.backward.positions_of(sets.forward_flat)] *= self.density[name]
        return gradient

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether A and B are to be renewed after this step."""
        return self.when(step=step, epoch_end=epoch_end)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Renew A and B from the weights; return no exchange, for S does not change."""
        for name in self.counts:
            self._renew(name, params)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the shapes, counts and densities."""
        return {
            "counts": {name: list(pair) for name, pair in self.counts.items()},
            "density": dict(self.density),
            "shapes": {name: list(sets.forward.shape) for name, sets in self._sets.items()},
        }

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the flat positions of A and B: the weights from which they follow are gone."""
        out = {}
        for name, sets in self._sets.items():
            out[f"{name}/forward"], out[f"{name}/backward"] = sets.forward_flat, sets.backward_flat
        return out

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the counts and the sets."""
        self.counts = {name: (int(a), int(b)) for name, (a, b) in state["counts"].items()}
        self.density = {name: float(d) for name, d in state["density"].items()}
        arrays = arrays or {}
        self._sets = {}
        for name, shape in state["shapes"].items():
            if f"{name}/forward" not in arrays or f"{name}/backward" not in arrays:
                raise ValueError(
                    f"the saved state of Top-KAST lacks the sets of {name}; pass what state_arrays() returned"
                )
            self._sets[name] = _Sets.of(tuple(shape), arrays[f"{name}/forward"], arrays[f"{name}/backward"])
