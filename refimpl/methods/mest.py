r"""MEST, memory-economic sparse training: drop by weight and gradient on the support, grow at random, grow fewer later.

With the density :math:`\rho`, a further density p, and n entries held in a tensor, an exchange is

.. math::
    \text{score} &= |w| + \lambda\,|\partial L/\partial w| \quad \text{on } S \text{ alone} \\
    D &= \text{the } \mathrm{round}(f\,n) \text{ entries of } S \text{ with the smallest score} \\
    G &= \text{as many places outside } S \setminus D, \text{ at random}, \qquad S \leftarrow (S \setminus D) \cup G

and new connections start at 0. In form *EM* (elastic mutation) :math:`\rho` of the places are held, an exchange goes
down to :math:`\rho - p` and up again: :math:`f = p/\rho`. In form *EM&S* (with a soft memory bound) :math:`\rho + p` of
the places are held, so that what grows is trained beside what it may replace, and an exchange goes down to
:math:`\rho` and up again: :math:`f = p/(\rho + p)`. At the end of the soft phase it goes down to :math:`\rho` and
stays there.

No dense gradient is ever needed, S = A = B, and memory is O(|S|) at all times.

Source: Yuan, Ma, Niu and others, "MEST: accurate and fast memory-economic sparse training framework on the edge",
NeurIPS 2021.

Deviations
----------
- p is a density of the whole model. A tensor exchanges the fraction above of its own entries, so that p is shared out
  as the allocation shares out :math:`\rho`.
- EM&S holds its extra entries from the first step, drawn at random with the others; a tensor that has no room for its
  part holds all its places, and no other takes over what is missing.
- The paper lets p fall by stages; a callable ``drop_fraction`` is f as a function of the step.
- Exchanges end with ``soft_until_step``, in both forms.
- The gradient is that of the batch of this step, before the optimizer's step, whereas the weights are those after it
  (convention ``exchange_step`` is not read: nothing grows by gradient).
- A place dropped and grown at once keeps its value (convention ``regrow``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude, drop_smallest
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import at_random, count_stored, move, values_in
from refimpl.methods.schedule import Constant, EveryEpoch, EverySteps, Fraction
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, as_sparse
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class MEST(DropAndGrow):
    """MEST; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores in the end.
    drop_fraction : callable or float, optional
        f, of the entries that are held; None for that which p gives.
    gradient_weight : float
        λ, at least 0. Above 0, exchanges are at steps, where there are gradients, and ``interval`` must be given.
    extra_density : float
        p, of all places of the sparse tensors, at least 0.
    soft_until_step : int
        The step of the last exchange. EM&S drops its extra entries there.
    interval : int or None
        Training steps between exchanges; None for the end of each epoch.
    form : {"EM", "EM&S"}
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If an argument is outside its range, or gradients are asked for at the ends of epochs.
    """

    name = "mest"

    def __init__(
        self,
        allocation: Allocation,
        *,
        drop_fraction: Fraction | float | None = None,
        gradient_weight: float = 1.0,
        extra_density: float = 0.05,
        soft_until_step: int,
        interval: int | None = None,
        form: Literal["EM", "EM&S"] = "EM",
        conventions: Conventions = DEFAULT,
    ) -> None:
        if form not in ("EM", "EM&S"):
            raise ValueError(f"the form of MEST is {form!r}; give 'EM' or 'EM&S'")
        if not 0 <= gradient_weight < np.inf:
            raise ValueError(f"the weight of MEST's gradient is {gradient_weight}; give a finite number of at least 0")
        if not 0 <= extra_density <= 1:
            raise ValueError(f"the extra density of MEST is {extra_density}; give a number from 0 to 1")
        if gradient_weight and interval is None:
            raise ValueError(
                "MEST's score needs the gradients of a step, and there are none at the end of an epoch; give interval, "
                "the steps between exchanges, or gradient_weight=0"
            )
        held = allocation.density + (extra_density if form == "EM&S" else 0.0)
        if drop_fraction is None and extra_density > held:
            raise ValueError(
                f"MEST would exchange {extra_density} of all places but holds {held:.4g} of them; lower extra_density "
                "or give drop_fraction"
            )
        if drop_fraction is None:
            drop_fraction = extra_density / held
        if not callable(drop_fraction):
            drop_fraction = Constant(drop_fraction)
        when = EveryEpoch() if interval is None else EverySteps(interval)
        super().__init__(allocation, drop_fraction, when, conventions)
        self.gradient_weight = gradient_weight
        self.extra_density = extra_density
        self.soft_until_step = soft_until_step
        self.form = form
        self.target: dict[str, int] = {}  # entries of each pool in the end

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports, those of EM&S with the extra entries."""
        drawn = super().supports(specs, seed=seed)
        self.target = dict(self.initial_nnz)
        if self.form == "EM":
            return drawn
        extra = {}
        for pool in self.pools:
            target = self.target[pool.label]
            extra[pool.label] = min(int(self.extra_density / self.allocation.density * target), pool.size - target)
        nothing: Params = {name: SparseWeight(s, np.zeros(s.nnz, np.float32)) for name, s in drawn.items()}
        goes = {pool.label: np.zeros(self.target[pool.label], bool) for pool in self.pools}
        grow = at_random(seed, 0, self.conventions)
        made = move(nothing, self.pools, goes=goes, want=extra, grow=grow, conventions=self.conventions)
        held = {name: exchange.new for name, exchange in made.items()}
        self.initial_nnz = {pool.label: count_stored(pool, held) for pool in self.pools}
        return held

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Ask the schedule until the soft phase ends, at which there is a last exchange."""
        if step >= self.soft_until_step:
            last = step == self.soft_until_step and not epoch_end
            return last and self.form == "EM&S" and bool(self.pools)
        return super().exchange_due(step=step, epoch_end=epoch_end, asgd_triggered=asgd_triggered)

    def settled(self, step: int) -> bool:
        """Tell whether the extra entries are gone."""
        return self.form == "EM" or step >= self.soft_until_step

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the smallest scores and grow as many places at random; at the end of the soft phase only drop."""
        scored = self._scores(params, gradients)
        if self.form == "EM&S" and step >= self.soft_until_step:
            return self._down(scored)
        return self.propose(scored, step, drop=by_magnitude, grow=at_random(seed, step, self.conventions))

    def _down(self, scored: Params) -> dict[str, Exchange]:
        """Drop what each pool holds beyond its target."""
        goes = {}
        for pool in self.pools:
            scores = values_in(pool, scored)
            goes[pool.label] = np.zeros(scores.size, bool)
            goes[pool.label][drop_smallest(scores, max(0, scores.size - self.target[pool.label]))] = True
        return move(scored, self.pools, goes=goes, want={}, conventions=self.conventions)

    def _scores(self, params: Params, gradients: Mapping[str, Gradient] | None) -> Params:
        """Return the score of each stored entry of the sparse tensors, in the place of its value."""
        scored: Params = {}
        for name in dict.fromkeys(segment.name for pool in self.pools for segment in pool.segments):
            weight = as_sparse(params[name])
            score = np.abs(weight.values)
            if self.gradient_weight:
                if gradients is None or name not in gradients:
                    raise ValueError(
                        f"MEST's score needs the gradient of {name}; pass it to exchange(..., gradients=...) or set "
                        "gradient_weight=0"
                    )
                score += self.gradient_weight * np.abs(gradients[name].on(weight.support))
            scored[name] = SparseWeight(weight.support, score)
        return scored

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, the counts with which they began, and those with which they end."""
        return super().state_dict() | {"target": dict(self.target)}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and counts."""
        super().load_state_dict(state, arrays)
        self.target = {label: int(n) for label, n in state["target"].items()}
