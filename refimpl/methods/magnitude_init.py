r"""Magnitude pruning at initialisation: the largest of the weights as they were drawn.

.. math:: s = |w|, \qquad S = \text{the } \mathrm{round}(\rho\,n) \text{ entries of largest } s

No data is looked at. It is the baseline that methods which do look at data (SNIP, GraSP) are compared with, and the
contrast to magnitude pruning after training. S = A = B, and none of them changes.

Source: the baseline "magnitude pruning at initialization" of Frankle, Dziugaite, Roy, Carbin, "Pruning neural networks
at initialization: why are we missing the mark?", ICLR 2021, section 3; the criterion is that of Han, Pool, Tran, Dally,
"Learning both weights and connections for efficient neural networks", NIPS 2015.

Deviations
----------
- By default each tensor keeps its share (scope "local"). Globally, what is compared are mostly the scales of the
  tensors' initial distributions: a layer whose weights are drawn from a narrower one can lose them all, which is an
  error here and an untrainable network elsewhere.
- The weights that stay keep the values by which they were chosen; nothing is drawn again.
- Biases and normalisation are not pruned. Counts are exact; of equal magnitudes the lower position stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import Probe
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope
from refimpl.methods.scored import ScoredOnce, Scores, as_dense
from refimpl.weights.parameters import Params, ParamSpec


class MagnitudeInit(ScoredOnce):
    """Magnitude pruning at initialisation; see the module.

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

    name = "magnitude-init"

    def __init__(self, allocation: Allocation, *, scope: Scope = "local", conventions: Conventions = DEFAULT) -> None:
        super().__init__(allocation, scope=scope, conventions=conventions)

    def scores(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None) -> Scores:
        """Return |w|."""
        return {name: np.abs(as_dense(name, params[name])).reshape(-1) for name, spec in specs.items() if spec.prunable}
