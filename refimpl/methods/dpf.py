r"""DPF, dynamic model pruning with feedback: the gradient of the pruned model moves all weights.

With hidden weights :math:`w` and a mask :math:`m` that is renewed every :math:`p` steps:

.. math::
    w_{t+1} &= w_t - \eta\, g(m_t \odot w_t), \qquad g = \partial L / \partial (m \odot w) \text{ on all entries} \\
    m_t &= [\,|w_t| \text{ is among the } (1 - s_t)\,n \text{ largest}\,] \quad\text{at } t = p, 2p, \dots \\
    s_t &= s + (s_0 - s)\,(1 - t / T)^3

The gradient is taken at the pruned weights and applied to the dense ones: what pruning took away feeds back as an error
that the next steps correct, and a weight that was pruned too early returns with the value that it has by then.
Momentum and weight decay act on all weights. S = B = everything, dense.

Source: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic model pruning with feedback", ICLR 2020, section 3 and Algorithm 1;
interval and schedule as in its authors' program.

Deviations
----------
- The last renewal is at T whether or not p divides it, so that the sparsity asked for is reached exactly. From then on
  A stays, as in the authors' program after its second drop of the learning rate; the paper's algorithm goes on renewing
  it.
- The program counts steps from 0 and renews when :math:`(t + 1) \bmod 16 = 0`, with :math:`s_t` of the smaller number;
  here both use the number of steps that are done.
- The program keeps what is strictly above a threshold, which is one entry fewer, or more with ties. Here counts are
  exact, and of equal magnitudes the lower position stays.
- The program's one threshold for the model is scope ``"global"``. The default is a count for each tensor, because one
  threshold empties tensors whose initial distribution is narrow, such as wide recurrent layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Group, Scope, counts_of, groups_of, require_scope
from refimpl.methods.hidden import Hidden, largest
from refimpl.methods.pruning import cubic
from refimpl.methods.schedule import EverySteps
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support


class DPF(Hidden):
    """Dynamic model pruning with feedback; see the module.

    Parameters
    ----------
    allocation : Allocation
        1 − s of each tensor, or of the model.
    interval : int
        p, in training steps.
    end_step : int
        T: the step of the last renewal.
    scope : {"local", "global"}
        Whether each pool of the conventions (each tensor) has its count, or all together.
    initial_sparsity : float
        s₀, from 0 to below 1; a tensor whose own s is smaller begins with that.
    conventions : Conventions
        Of which the allocation's and ``pool`` are read.

    Raises
    ------
    ValueError
        If an option is outside its range.
    """

    name = "dpf"

    def __init__(
        self,
        allocation: Allocation,
        *,
        interval: int = 16,
        end_step: int,
        scope: Scope = "local",
        initial_sparsity: float = 0.0,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        require_scope(scope, allocation)
        if end_step < 1:
            raise ValueError(f"the end step of DPF is {end_step}; give the step of the last renewal, at least 1")
        if not 0 <= initial_sparsity < 1:
            raise ValueError(f"the initial sparsity of DPF is {initial_sparsity}; give a number from 0 to below 1")
        self.allocation = allocation
        self.when = EverySteps(interval, end_step)
        self.end_step = end_step
        self.scope = scope
        self.initial_sparsity = initial_sparsity
        self.groups: list[Group] = []

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember which tensors are pruned; return no support, for everything stays stored."""
        self.forget()
        self.groups = groups_of(specs, self.allocation, self.scope, self.conventions)
        counts_of(self.groups, self.conventions)  # refuses what would end up empty
        return {}

    def density_at(self, final: float, step: int) -> float:
        """Return 1 − s_t where the last density is given."""
        first = max(1 - self.initial_sparsity, final)
        return cubic(first, final, step=step, begin=0, end=self.end_step)

    def choose(self, params: Params, step: int) -> dict[str, tuple[np.ndarray, ...]]:
        """Return the places of the largest weights at the sparsity of this step."""
        used = largest(self, self.groups, params, lambda density: self.density_at(density, step))
        return {name: (flat,) for name, flat in used.items()}

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether A is renewed after this step."""
        return self.when(step=step, epoch_end=epoch_end) or (step == self.end_step and not epoch_end)

    def settled(self, step: int) -> bool:
        """Tell whether the last renewal is done."""
        return step >= self.end_step

    def state_dict(self) -> dict[str, Any]:
        """Return the pruned tensors and their last densities."""
        return super().state_dict() | {"groups": [group.as_json() for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pruned tensors and A."""
        self.groups = [Group.from_json(saved) for saved in state["groups"]]
        super().load_state_dict(state, arrays)
