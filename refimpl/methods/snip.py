r"""SNIP: keep the connections whose removal would change the loss most, to first order.

With an indicator :math:`c_j` beside each weight, :math:`\mathcal L(c \odot w)`, the effect of a connection on the loss
of one batch at :math:`c = 1` is

.. math::
    s_j = \left|\frac{\partial \mathcal L(c \odot w)}{\partial c_j}\right|_{c = 1}
        = \left|w_j \frac{\partial \mathcal L}{\partial w_j}\right|,
    \qquad S = \text{the } \mathrm{round}(\rho\,N) \text{ entries of largest } s

over all N prunable weights of the model together, once, before training. S = A = B, and none of them changes.

Source: Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019,
section 4 and algorithm 1.

Deviations
----------
- The paper divides the scores by their sum. That changes no rank and is left out.
- The batch is the probe's, dropout included, and the absolute value is taken of its mean gradient.
- The paper draws the weights by a variance-scaling distribution. Here they are the model's own, and those that stay
  keep the values by which they were chosen.
- Scope "local" is a variant: each tensor keeps its share by the allocation, as SNIP masks at the start of other
  methods' runs are made. The paper's is "global".
- Biases and normalisation are not pruned. Counts are exact; of equal scores the earlier tensor's stays, then the lower
  position's. Scores are computed in the type of the weights.
- Weights that the batch does not use, such as an embedding's rows for words that are not in it, score 0 and go first.
  The paper has no embeddings. A fixed density for that tensor keeps it out of the contest.
- A tensor that would lose all its weights is an error; the paper's algorithm goes on with a network that is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope
from refimpl.methods.scored import ScoredOnce, Scores, times_gradient
from refimpl.weights.parameters import Params, ParamSpec


class SNIP(ScoredOnce):
    """SNIP; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries are stored. With scope "global" its rule is not read.
    scope : {"local", "global"}
        Whether weights compete within their tensor or over the whole model.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If the scope is neither.
    """

    name = "snip"

    def __init__(self, allocation: Allocation, *, scope: Scope = "global", conventions: Conventions = DEFAULT) -> None:
        super().__init__(allocation, scope=scope, conventions=conventions)

    def scores(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None) -> Scores:
        """Return |w ∂L/∂w| on the probe's batch."""
        _, grads = self.probed(probe).loss_and_grads(params)
        out = {}
        for name, spec in specs.items():
            if spec.prunable:
                out[name] = times_gradient(params[name], grads[name])
                np.abs(out[name], out=out[name])
        return out
