r"""Gradual magnitude pruning: the smallest weights go, a few at a time, on a cubic schedule.

At the steps :math:`t = t_0 + k\,\Delta t` up to :math:`t_1`, and at :math:`t_1` itself, the sparsity becomes

.. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

and of each tensor (or of all together) with n entries the :math:`\mathrm{round}((1 - s_t)\,n)` of largest
:math:`|w|` stay. Between the updates :math:`S = A = B` is fixed. S only shrinks: what has gone is not stored, takes no
time, and never returns; memory falls with it.

Source: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", ICLR workshop
2018 (arXiv:1710.01878), section 3.

Deviations
----------
- The last update is at :math:`t_1` exactly, so the final sparsity is reached whether or not :math:`\Delta t` divides
  :math:`t_1 - t_0`; the cubic runs in time, so that the updates before it do not depend on that either. The paper has
  :math:`t_1 = t_0 + n \Delta t`, for which the two are one. Elsewhere the fraction is shifted by a step, or divided by
  :math:`t_1` alone, or the last update is missed, and the final sparsity with it.
- The paper's masks are made anew from stored weights at each update. Its masked weights get no gradient, so only decay
  and momentum could bring one back; here they are gone (``monotone``). A method in which they return is DPF.
- With :math:`t_0 = 0` the weights that are ranked first are the initial ones, before training; this matters where
  :math:`s_i > 0` alone. A tensor whose final density exceeds :math:`1 - s_i` (ER, ERK) is pruned to it at :math:`t_0`.
- Scope *global* and densities by tensor are not in the paper, which gives all tensors one sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from refimpl.methods.allocation import Allocation, density_from_sparsity
from refimpl.methods.base import Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope
from refimpl.methods.pruning import Pruning, cubic, prune
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, values_of

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class GMP(Pruning):
    """Gradual magnitude pruning; see the module.

    Parameters
    ----------
    allocation : Allocation
        How dense the model is from ``end_step`` on.
    begin_step, end_step : int
        t₀ and t₁: the first and the last step after which weights go.
    interval : int
        Δt, in training steps.
    scope : {"local", "global"}
        Whether each tensor is ranked by itself or all together.
    initial_sparsity : float
        s_i, from t₀ on; before that the model is dense.
    monotone : bool
        True: what has gone stays away. The alternative needs the values of what has gone, which are not stored.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If the steps or the sparsities contradict one another, or ``monotone`` is false.
    """

    name = "gmp"

    def __init__(
        self,
        allocation: Allocation,
        *,
        begin_step: int,
        end_step: int,
        interval: int,
        scope: Scope = "local",
        initial_sparsity: float = 0.0,
        monotone: bool = True,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(allocation, scope, conventions)
        if not 0 <= begin_step <= end_step or end_step < 1:
            raise ValueError(
                f"gradual pruning is to run from step {begin_step} to step {end_step}; give 0 <= begin_step <= "
                "end_step, and an end_step of at least 1"
            )
        if interval < 1:
            raise ValueError(f"the interval between prunings is {interval} steps; give at least 1")
        self.initial_density = density_from_sparsity(initial_sparsity)
        if allocation.density > self.initial_density:
            raise ValueError(
                f"the initial sparsity {initial_sparsity} is above the final one, {1 - allocation.density:.4g}, and "
                "pruning only takes away; give an initial_sparsity that is at most the final sparsity"
            )
        if not monotone:
            raise ValueError(
                "gradual pruning stores no weight that it has taken away, so none can return; leave monotone true, or "
                "use DPF (method 'dpf'), which keeps all weights and prunes them anew"
            )
        self.begin_step = begin_step
        self.end_step = end_step
        self.interval = interval

    def density_at(self, final: float, step: int) -> float:
        """Return 1 − s_t for a tensor of a final density."""
        if step < self.begin_step:
            return 1.0
        return cubic(max(self.initial_density, final), final, step=step, begin=self.begin_step, end=self.end_step)

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters as drawn, or those of density 1 − s_i if pruning begins at once."""
        if self.begin_step:
            return params
        kept = dict(params)
        for name, exchange in self.exchange(params, step=0, seed=seed).items():
            kept[name] = SparseWeight(exchange.new, exchange.carry(values_of(params[name]).reshape(-1)))
        return kept

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether weights go after this step."""
        inside = not epoch_end and self.begin_step <= step <= self.end_step
        return inside and ((step - self.begin_step) % self.interval == 0 or step == self.end_step)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Keep as many of the largest weights as the schedule says."""
        kept = self.kept(lambda final: self.density_at(final, step))
        return prune(params, self.pools, kept, self.conventions)

    def settled(self, step: int) -> bool:
        """Tell whether the last weights have gone."""
        return step >= self.end_step
