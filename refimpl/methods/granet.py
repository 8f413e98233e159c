r"""GraNet, gradual pruning with zero-cost neuroregeneration: prune to a falling density, and exchange as RigL does.

The model starts at density :math:`\rho_i` and ends at :math:`\rho_f`. Every :math:`\Delta T` steps from :math:`t_0` to
:math:`t_1`, with N places in all tensors together:

.. math::
    \rho_t &= \rho_f + (\rho_i - \rho_f)\Bigl(1 - \frac{t - t_0}{t_1 - t_0}\Bigr)^3 \\
    \text{(1)} \quad S &\leftarrow \text{the } \mathrm{round}(\rho_t N) \text{ entries of } S \text{ with the largest }
        |w| \text{ over all tensors} \\
    \text{(2)} \quad S_l &\leftarrow (S_l \setminus D_l) \cup G_l \quad \text{for each tensor } l \text{ with } n_l
        \text{ entries left:} \\
    & \quad D_l \text{ its } k_l = \mathrm{round}(f(t)\,n_l) \text{ entries of smallest } |w|, \qquad
        G_l \text{ the } k_l \text{ places outside } S_l \setminus D_l \text{ of largest } |\partial L/\partial w|

Both happen in one exchange: in each tensor the smallest weights go, those of (1) and those of (2), and as many grow as
(2) took. The total never grows. S = A = B, and an exchange looks at the gradient of all places, in blocks. Memory is
O(|S|), and S shrinks.

Source: Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu, "Sparse training via boosting pruning
plasticity with neuroregeneration", NeurIPS 2021, section 4.

Deviations
----------
- The last pruning is at :math:`t_1` itself, whether or not the period ends there, and reaches :math:`\rho_f` to the
  entry. The authors' program stops one update before the end of its schedule, short of it by :math:`(1/J)^3` of the way
  with J updates, and keeps one entry fewer than its count, for it drops all at the threshold.
- A tensor keeps at least its largest weight in (1).
- (2) ends with the pruning by default; the authors' program goes on until the end of training (``end_growth_step``).
- A place that (1) prunes may grow in (2) of the same exchange, as in that program, and then keeps its value as one that
  (2) dropped does (convention ``regrow``).
- The exchange takes the place of the optimizer's step, as in RigL (convention ``exchange_step``).
- The allocation's rule divides :math:`\rho_i`; how :math:`\rho_f` is divided follows from the weights. A tensor whose
  density the allocation fixes takes no part in (1).
- Ties in (1) are exact: of equal magnitudes those in earlier tensors and at lower positions stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.allocation import Allocation, count_at, densities, initial_supports
from refimpl.methods.conventions import DEFAULT, Conventions, kept_after
from refimpl.methods.drop import drop_smallest
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import by_gradient, count_stored, move, values_in
from refimpl.methods.pools import Pool, pools_of
from refimpl.methods.pruning import cubic
from refimpl.methods.schedule import Cosine, Fraction
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


@dataclass(frozen=True)
class Updates:
    """Every so many steps from a first one to the end of growth, and at the last step of pruning.

    Attributes
    ----------
    begin, interval : int
        The first update, and the steps from one to the next.
    end, end_growth : int
        The last step of pruning, at which there is an update in any case, and the last step of growth.
    """

    begin: int
    end: int
    interval: int
    end_growth: int

    def __post_init__(self) -> None:
        if self.interval < 1 or not 0 <= self.begin < self.end:
            raise ValueError(
                f"GraNet prunes from step {self.begin} to {self.end} every {self.interval} steps; give an interval of "
                "at least 1 and 0 <= begin_step < end_step"
            )
        if self.end_growth < self.begin:
            raise ValueError(
                f"growth ends at step {self.end_growth}, before it begins at {self.begin}; give a later end"
            )

    def __call__(self, *, step: int, epoch_end: bool) -> bool:
        """Answer as :class:`refimpl.methods.schedule.When` says."""
        regular = self.begin <= step <= max(self.end, self.end_growth) and (step - self.begin) % self.interval == 0
        return not epoch_end and step > 0 and (regular or step == self.end)


class GraNet(DropAndGrow):
    """GraNet; see the module.

    Parameters
    ----------
    allocation : Allocation
        ρ_f, the rule by which the tensors share ρ_i, and the tensors that keep a density of their own.
    drop_fraction : callable or float
        f(t); a number starts a cosine down to 0.005 at the end of growth.
    initial_density : float
        ρ_i, from ρ_f to 1; at 1 training starts from dense arrays.
    begin_step, end_step : int
        t₀ and t₁, in training steps.
    interval : int
        ΔT, in training steps.
    end_growth_step : int, optional
        Last step of (2); None for t₁.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If ρ_i is below ρ_f or above 1, or the steps are in another order.
    """

    name = "granet"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float,
        *,
        initial_density: float = 0.5,
        begin_step: int,
        end_step: int,
        interval: int,
        end_growth_step: int | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        self.updates = Updates(begin_step, end_step, interval, end_step if end_growth_step is None else end_growth_step)
        if not callable(drop_fraction):
            drop_fraction = Cosine(drop_fraction, max(1, self.updates.end_growth), floor=min(0.005, drop_fraction))
        super().__init__(allocation, drop_fraction, self.updates, conventions)
        if not allocation.density <= initial_density <= 1:
            raise ValueError(
                f"GraNet starts at density {initial_density} and prunes to {allocation.density}; give an "
                "initial_density from the final density to 1"
            )
        self.initial_density = initial_density
        self.shared: list[str] = []  # labels of the pools that (1) prunes together
        self.places = 0  # N

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw supports of the initial density; remember the pools, of tensors that are still dense too."""
        allocation, conventions = replace(self.allocation, density=self.initial_density), self.conventions
        drawn = initial_supports(specs, allocation, seed=seed, conventions=conventions)
        pruned = [name for name in densities(specs, allocation, conventions) if name not in allocation.fixed]
        if self.allocation.density == 1:
            pruned = []
        kept = [name for name in drawn if name not in pruned]
        pools = pools_of(specs, pruned, conventions.pool)
        own = [replace(pool, label=f"{pool.label} (fixed)") for pool in pools_of(specs, kept, conventions.pool)]
        self.pools, self.shared = pools + own, [pool.label for pool in pools]
        self.places = sum(pool.size for pool in pools)
        stored = {name: drawn.get(name) or Support.full(specs[name].shape) for name in pruned + kept}
        self.initial_nnz = {pool.label: count_stored(pool, stored) for pool in self.pools}
        if pools and self._target(self.updates.end) < len(pools):
            raise ValueError(
                f"{len(pools)} tensors would share {self._target(self.updates.end)} entries at density "
                f"{self.allocation.density:.4g}, and each keeps at least one; lower the sparsity"
            )
        return drawn

    def density(self, step: int) -> float:
        """Return ρ_t."""
        return cubic(
            self.initial_density, self.allocation.density, step=step, begin=self.updates.begin, end=self.updates.end
        )

    def _target(self, step: int) -> int:
        return count_at(self.density(step), self.places, self.conventions, "the whole model")

    def settled(self, step: int) -> bool:
        """Tell whether the last pruning has been."""
        return step >= self.updates.end or self.initial_density == self.allocation.density

    def needs_gradient(self, step: int) -> bool:
        """Tell whether growth is due at this step."""
        return step <= self.updates.end_growth and self.exchange_due(step=step, epoch_end=False)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Prune the model to the density of this step, and exchange a fraction of each tensor's entries."""
        pruned, goes, want = self._pruned(params, step), {}, {}
        for pool in self.pools:
            values = values_in(pool, params)
            grow = self._regrown(values.size, values.size - pruned[pool.label], pool, step)
            # Pruning takes the smallest weights of a tensor, and dropping takes the smallest of those that are left.
            goes[pool.label] = np.zeros(values.size, bool)
            out = drop_smallest(
                np.abs(values), pruned[pool.label] + grow, self.conventions.drop_ties if grow else "exact"
            )
            goes[pool.label][out] = True
            want[pool.label] = out.size - pruned[pool.label]
        made = move(
            params, self.pools, goes=goes, want=want, grow=by_gradient(gradients), conventions=self.conventions
        )  # fmt: skip
        return {name: e for name, e in made.items() if isinstance(params[name], SparseWeight) or e.new.nnz < e.new.size}

    def _pruned(self, params: Params, step: int) -> dict[str, int]:
        """Return how many entries (1) takes from each pool: the smallest of all pools together."""
        none = dict.fromkeys((pool.label for pool in self.pools), 0)
        pools = [pool for pool in self.pools if pool.label in self.shared]
        stored = sum(values_in(pool, params).size for pool in pools)
        surplus = stored - self._target(step) if pools else 0
        if surplus <= 0:
            return none
        scores, at = np.empty(stored, np.result_type(*(params[s.name].dtype for p in pools for s in p.segments))), 0
        ends = []
        for pool in pools:
            values = values_in(pool, params)
            own = np.abs(values, out=scores[at : at + values.size])
            own[np.argmax(own)] = np.inf if not np.isnan(own.max()) else np.nan  # a tensor keeps one
            ends.append(at := at + values.size)
        taken = np.searchsorted(drop_smallest(scores, surplus), ends)
        return none | {pool.label: int(n) for pool, n in zip(pools, np.diff(taken, prepend=0), strict=True)}

    def _regrown(self, stored: int, left: int, pool: Pool, step: int) -> int:
        """Return how many entries (2) drops and grows in a pool."""
        if step > self.updates.end_growth:
            return 0
        count = left - kept_after(left, self.drop_fraction(step), self.conventions, size=pool.size)
        return min(count, pool.size - stored) if self.conventions.regrow == "forbid" else count

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, which of them are pruned together, and the counts with which they began."""
        return super().state_dict() | {"shared": list(self.shared)}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and counts."""
        super().load_state_dict(state, arrays)
        self.shared = list(state["shared"])
        self.places = sum(pool.size for pool in self.pools if pool.label in self.shared)
