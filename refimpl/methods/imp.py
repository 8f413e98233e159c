r"""Iterative magnitude pruning with rewinding: how lottery tickets are found.

With R rounds and the final density d, after the training of round :math:`r = 1, \dots, R - 1`:

.. math::
    S &\leftarrow \text{the } \mathrm{round}(d^{\,r/(R-1)}\,n) \text{ entries of } S \text{ with the largest } |w| \\
    w_S &\leftarrow (w_k)_S, \qquad t \leftarrow k

where :math:`w_k` are the weights after step k of round 1, the initial ones if :math:`k = 0`, and the ranking is that of
the weights at the end of the round. Each round thus keeps the same fraction :math:`d^{1/(R-1)}` of the weights; each
goes through the steps :math:`k + 1, \dots, T` of the same learning rate and the same data, and the last trains the
final sparse network to the end. :math:`S = A = B`, and the remembered weights shrink with S.

Source: Frankle, Carbin, "The lottery ticket hypothesis: finding sparse, trainable neural networks", ICLR 2019,
section 1; rewinding to :math:`k > 0`: Frankle, Dziugaite, Roy, Carbin, "Linear mode connectivity and the lottery
ticket hypothesis", ICML 2020.

Deviations
----------
- The number of rounds and the final density are given and the fraction of each round follows; the papers give the
  fraction, and the density is what comes of it.
- The count is exact. The authors' later program compares with the k-th smallest magnitude, which then goes too.
- Biases and whatever else is not pruned are rewound as well. The optimizer begins anew at each rewinding, where
  a program that saves its state at step k could take it up; with :math:`k = 0` the two are one.
- Where no tensor is to be pruned there is nothing to find, and training never goes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import Probe, Rewind
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope
from refimpl.methods.pruning import Pruning, prune
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads


class IMP(Pruning):
    """Iterative magnitude pruning with rewinding; see the module.

    Parameters
    ----------
    allocation : Allocation
        How dense the model is in the last round.
    rounds : int
        R, at least 2.
    round_steps : int
        T: training steps of a round, counted from the beginning. A whole number of epochs.
    rewind_step : int
        k: the step whose weights each round starts from, below T. A whole number of epochs.
    scope : {"local", "global"}
        Whether each tensor is ranked by itself or all together.
    conventions : Conventions
        The choices that the paper leaves open.

    Attributes
    ----------
    pruning_steps : tuple of int
        The training steps, counted through all rounds, at whose epochs' ends weights go.

    Raises
    ------
    ValueError
        If there are fewer than two rounds, or the steps are not 0 <= k < T; in training, if a round's end, or k, was
        not the end of an epoch.
    """

    name = "imp"

    def __init__(
        self,
        allocation: Allocation,
        *,
        rounds: int,
        round_steps: int,
        rewind_step: int = 0,
        scope: Scope = "global",
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(allocation, scope, conventions)
        if rounds < 2:
            raise ValueError(f"there are {rounds} rounds; give at least 2: a dense one, and one for the pruned network")
        if not 0 <= rewind_step < round_steps:
            raise ValueError(
                f"training is to go back from step {round_steps} to step {rewind_step}; give 0 <= rewind_step < "
                "round_steps"
            )
        self.rounds = rounds
        self.rewind_step = rewind_step
        again = round_steps - rewind_step
        self.pruning_steps = tuple(round_steps + r * again for r in range(rounds - 1))
        self.done = 0  # prunings
        self.remembered: Params = {}  # w_k, on the supports that are left

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters as drawn, and remember them if every round starts from them."""
        self.done = 0
        return self.adopt(params)

    def adopt(self, params: Params) -> Params:
        """Return the parameters, and come back to them in every round that starts from the beginning."""
        self.remembered = _copied(params) if self.pools and not self.rewind_step else {}
        return params

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Refuse to train on where the end of an epoch was missed."""
        if not self.pools:
            return
        forgot = step > self.rewind_step and not self.remembered
        if forgot or sum(step > end for end in self.pruning_steps) > self.done:
            missed = self.rewind_step if forgot else self.pruning_steps[self.done]
            raise ValueError(
                f"step {missed}, where weights are to be {'remembered' if forgot else 'pruned'}, was not the end of an "
                "epoch; give round_steps and rewind_step in whole epochs"
            )

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether this is the end of a round, or the step to come back to."""
        here = step in self.pruning_steps or step == self.rewind_step > 0
        return epoch_end and here and bool(self.pools)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Keep the largest of the trained weights; at the step to come back to, remember all."""
        if step == self.rewind_step:
            self.remembered = _copied(params)
        if step not in self.pruning_steps:
            return {}
        share = (self.pruning_steps.index(step) + 1) / (self.rounds - 1)
        return prune(params, self.pools, self.kept(lambda final: final**share), self.conventions)

    def rewind(self, params: Params, *, step: int) -> Rewind | None:
        """Go back to the remembered weights, on the supports of ``params``."""
        if step not in self.pruning_steps:
            return None
        self.remembered = {name: _restricted(old, params[name]) for name, old in self.remembered.items()}
        self.done = self.pruning_steps.index(step) + 1
        return Rewind(self.rewind_step, _copied(self.remembered))

    def horizon(self, steps: int) -> int:
        """Return the steps of a round: each runs through the whole schedule, from where it begins."""
        # Asked before the tensors are known: something is pruned if any density is below 1.
        prunes = min(self.allocation.density, *self.allocation.fixed.values(), 1.0) < 1
        return self.pruning_steps[0] if prunes else steps

    def settled(self, step: int) -> bool:
        """Tell whether the model of this step is one of the last round."""
        return not self.pools or step > self.pruning_steps[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, how many prunings are done, and the shapes of the remembered weights that are sparse."""
        shapes = {name: list(w.shape) for name, w in self.remembered.items() if isinstance(w, SparseWeight)}
        return {**super().state_dict(), "done": self.done, "shapes": shapes}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the remembered weights, and of the sparse ones their places."""
        out = {}
        for name, weight in self.remembered.items():
            if isinstance(weight, SparseWeight):
                out[f"{name}/values"], out[f"{name}/flat"] = weight.values, weight.support.flat
            else:
                out[f"{name}/values"] = weight
        return out

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the remembered weights."""
        super().load_state_dict(state)
        self.done = int(state["done"])
        self.remembered = {}
        saved, end = arrays or {}, "/values"
        for name in (key.removesuffix(end) for key in saved if key.endswith(end)):
            values, shape = saved[name + end], state["shapes"].get(name)
            sparse = shape is not None
            self.remembered[name] = SparseWeight(Support(shape, saved[f"{name}/flat"]), values) if sparse else values


def _copied(params: Params) -> Params:
    """Return copies, which no optimizer can reach."""
    return {
        name: SparseWeight(w.support, w.values.copy()) if isinstance(w, SparseWeight) else w.copy()
        for name, w in params.items()
    }


def _restricted(old: Weight, now: Weight) -> Weight:
    """Return the numbers of ``old`` on the support of ``now``, which lies within that of ``old``."""
    if not isinstance(now, SparseWeight):
        return old
    if isinstance(old, SparseWeight):
        return SparseWeight(now.support, old.values[old.support.positions_of(now.support.flat)])
    return SparseWeight.from_dense(old, now.support)
