r"""Top-KAST: always sparse in the forward and the backward pass, over weights that are all stored.

For each tensor with n entries, density D and exploration M, every N steps:

.. math::
    A = \text{the } \mathrm{round}(D\,n) \text{ entries of largest } |w|, \qquad
    B = \text{the } \mathrm{round}(\min(1, D + M)\,n) \text{ entries of largest } |w| \supseteq A

The forward pass and the input gradient use :math:`w_A`; the weight gradient is computed on :math:`B`, and
only B is updated. Weights outside B keep their values exactly; an optimizer must not move them, neither by
momentum nor by weight decay. A weight of B ∖ A that grows past the smallest of A takes its place at the next
renewal. From an optional stop step on, nothing is explored any more: B = A. An optional penalty lets those of B ∖ A
decay faster:

.. math:: \frac{\lambda}{2}\Bigl(\sum_{A} w^2 + \frac1D \sum_{B \setminus A} w^2\Bigr), \qquad
    \text{its gradient } \lambda w \text{ on } A, \quad (\lambda / D)\,w \text{ on } B \setminus A

S = everything: the weights are dense arrays, and memory is not in proportion to D; time is.

Source: Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: top-k always sparse training", NeurIPS 2020,
section 2.

Deviations
----------
- One threshold for each tensor. M is constant in time, and 0 from the stop step on, if there is one; the sets are
  renewed at that step, and go on being renewed, though what is outside A is then frozen.
- The penalty is of weight-decay form, :math:`w^2/2`; the paper's exploration loss may be read with
  :math:`|w|`.
- Of equal magnitudes the lower position belongs to the set; A ⊆ B therefore holds with ties too.
- Between renewals A stays as it is, though the weights move: that is what makes N > 1 cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import keep_largest
from refimpl.methods.hidden import Hidden
from refimpl.methods.schedule import EverySteps
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Grads


class TopKAST(Hidden):
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
    stop_step : int, optional
        The step from which on B = A; None for never.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If M is outside [0, 1], the penalty is negative or not finite, or an interval or step is below 1.
    """

    name = "topkast"
    roles: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def __init__(
        self,
        allocation: Allocation,
        *,
        exploration: float = 0.1,
        refresh: int = 100,
        penalty: float = 0.0,
        stop_step: int | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        if not 0 <= exploration <= 1:
            raise ValueError(
                f"the exploration of Top-KAST is {exploration}; give the fraction of further entries, from 0 to 1"
            )
        if not 0 <= penalty < np.inf:
            raise ValueError(f"the penalty of Top-KAST is {penalty}; give a finite number of at least 0")
        if stop_step is not None and stop_step < 1:
            raise ValueError(f"the stop step of Top-KAST is {stop_step}; give a training step, at least 1, or None")
        self.allocation = allocation
        self.exploration = exploration
        self.penalty = penalty
        self.stop_step = stop_step
        self.when = EverySteps(refresh)
        self.counts: dict[str, tuple[int, int]] = {}  # |A| and |B|
        self.density: dict[str, float] = {}

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember |A| and |B| of each tensor; return no support, for everything stays stored."""
        self.forget()
        allocated = densities(specs, self.allocation, self.conventions)
        self.density = {name: density for name, density in allocated.items() if density < 1}
        self.counts = {}
        for name, density in self.density.items():
            widened = min(1.0, density + self.exploration)
            forward, backward = (count_at(d, specs[name].size, self.conventions, name) for d in (density, widened))
            self.counts[name] = (forward, backward)
        return {}

    def choose(self, params: Params, step: int) -> dict[str, tuple[np.ndarray, ...]]:
        """Return the places of the largest weights: |A| of them, and |B|."""
        stopped = self.stop_step is not None and step >= self.stop_step
        found: dict[str, tuple[np.ndarray, ...]] = {}
        for name, (forward, backward) in self.counts.items():
            scores = self.magnitudes(name, params).reshape(-1)
            used = keep_largest(scores, forward)
            found[name] = (used, used if stopped else keep_largest(scores, backward))
        return found

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B; only there may the optimizer change the weight."""
        return self.chosen(params)[name][1].support if name in self.counts else None

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradients on B, and add the penalty's."""
        pulled = super().pull(params, grads)
        if self.penalty:
            for name in self.counts:
                pulled[name] = pulled[name] + self._penalty_gradient(name, params)
        return pulled

    def _penalty_gradient(self, name: str, params: Params) -> np.ndarray:
        used, graded = self.chosen(params)[name]
        gradient = graded.of_weight(self.dense(name, params[name])).values * (self.penalty / self.density[name])
        gradient[graded.support.positions_of(used.flat)] *= self.density[name]
        return gradient

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether A and B are to be renewed after this step."""
        return self.when(step=step, epoch_end=epoch_end) or (step == self.stop_step and not epoch_end)

    def state_dict(self) -> dict[str, Any]:
        """Return the shapes, counts and densities."""
        return super().state_dict() | {
            "counts": {name: list(pair) for name, pair in self.counts.items()},
            "density": dict(self.density),
        }

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the counts and the sets."""
        self.counts = {name: (int(a), int(b)) for name, (a, b) in state["counts"].items()}
        self.density = {name: float(d) for name, d in state["density"].items()}
        super().load_state_dict(state, arrays)
