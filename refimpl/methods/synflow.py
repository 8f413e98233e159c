r"""SynFlow: keep the weights that carry the flow of a network of magnitudes, in many small rounds and without data.

Every weight is replaced by its magnitude, the units by the identity, and the input by ones. The sum of the outputs,
:math:`R`, is the sum over all paths from an input to an output of the products of the magnitudes on them, and a
weight's score is the part of it that passes through the weight:

.. math::
    R = 1^\top \Bigl(\prod_{l=L}^{1} |W_l|\Bigr) 1, \qquad
    s = \frac{\partial R}{\partial |w|} \odot |w| \geq 0

In rounds :math:`k = 1, \ldots, K`, with the scores of the network that the round before left,

.. math:: S_k = \text{the } \mathrm{round}(\rho^{k/K} N) \text{ entries of } S_{k-1} \text{ of largest } s,
    \qquad S_0 = \text{all}, \quad S = S_K

What flows into a hidden unit flows out of it, and through every layer flows R: a layer that has few weights left
has large scores, so that no layer is emptied while another has weights to give. That holds only because the scores are
taken anew after each small round. S = A = B, and none of them changes in training.

Source: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow", NeurIPS 2020, algorithm 1; conservation: theorems 1 and 2, layer collapse: theorem 3.

Deviations
----------
- Flow goes through the weights alone. The authors' program keeps biases, as magnitudes, in the network that it
  scores; theirs start at 0 in many models, and the laws of conservation hold without them only.
- The paper treats feed-forward networks. What R is for a recurrent one is this project's definition; see
  :meth:`refimpl.models.language_model.LanguageModel.flow`. There a recurrent matrix lies on some of the paths but not
  on all, so that it may be emptied, which is an error that names it.
- Counts are exact; of equal scores the earlier tensor's stays, then the lower position's. The authors' program keeps
  what is above a threshold, so that ties go together.
- Scope "local", where each tensor keeps its share by the allocation at the same pace, is a variant.
- R and scores are computed in float64 whatever the type of the weights: products over many layers leave the range of
  float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Group, Scope
from refimpl.methods.scored import ScoredOnce, times_gradient
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, as_sparse, values_of
from refimpl.weights.support import Support


class SynFlow(ScoredOnce):
    """SynFlow; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries are stored. With scope "global" its rule is not read.
    rounds : int
        K.
    scope : {"local", "global"}
        Whether weights compete within their tensor or over the whole model.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If the scope is neither, or there is no round.
    """

    name = "synflow"

    def __init__(
        self, allocation: Allocation, *, rounds: int = 100, scope: Scope = "global", conventions: Conventions = DEFAULT
    ) -> None:
        super().__init__(allocation, scope=scope, conventions=conventions)
        if rounds < 1:
            raise ValueError(f"SynFlow is asked for {rounds} rounds; give at least 1, or 100 as the paper does")
        self.rounds = rounds

    def choose(
        self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None, groups: list[Group]
    ) -> dict[str, Support]:
        """Return the supports after the last round."""
        probe = self.probed(probe)
        magnitudes: Params = {name: _magnitude(weight) for name, weight in params.items()}
        left = {s.name: as_sparse(magnitudes[s.name]) for group in groups for s in group.pool.segments}
        for k in range(1, self.rounds + 1):
            _, grads = probe.flow({**magnitudes, **left})
            scored: Params = {
                name: SparseWeight(weight.support, times_gradient(weight, grads[name])) for name, weight in left.items()
            }
            for name, exchange in self._after(k, scored, groups).items():
                left[name] = SparseWeight(exchange.new, exchange.carry(left[name].values))
        return {name: weight.support for name, weight in left.items() if weight.nnz < weight.support.size}

    def _after(self, k: int, scored: Params, groups: list[Group]) -> dict[str, Exchange]:
        """Keep what round k keeps."""
        return self.best(scored, groups, lambda density: density ** (k / self.rounds))


def _magnitude(weight: Weight) -> Weight:
    values = np.abs(values_of(weight).astype(np.float64))
    return SparseWeight(weight.support, values) if isinstance(weight, SparseWeight) else values
