r"""GraSP: keep the weights whose removal would shrink the gradient, so that the pruned network still learns.

The loss of a network with gradient g falls at the rate :math:`\|g\|^2`. Removing weight j changes that, to first
order, by :math:`-2 w_j (H g)_j`, with H the Hessian. The weights whose removal raises it most, or lowers it least, go:

.. math::
    S(-w) = -\,w \odot H g, \qquad
    S = \text{the } \mathrm{round}(\rho\,N) \text{ entries of largest } w \odot H g

over all N prunable weights together, once, before training; the sign counts. The logits are divided by a temperature
:math:`T = 200`, so that the scores depend little on what the untrained network happens to predict. S = A = B, and none
of them changes.

There is no second backward pass here. H g is a difference quotient along g, in float64, of the gradient of the same
batch with the same draws:

.. math::
    H g \approx \frac{\nabla\mathcal L(w + \varepsilon g) - \nabla\mathcal L(w - \varepsilon g)}{2\varepsilon}, \qquad
    \varepsilon = \delta\,\frac{\|w\|}{\|g\|}, \qquad \delta = 2^{-19}

Both errors are small there: that of the quotient falls with :math:`\delta^2`, that of rounding is near
:math:`10^{-16} / \delta`. Compared with exact second derivatives by automatic differentiation, no entry was off by
more than :math:`10^{-9}` of its tensor's largest (MLPs up to 784-300-100-10 with 100 samples, LSTMs of two layers up
to 500 words and 60 units, T = 1 and 200; the tests repeat small ones of these). A rectifier that changes sides within
the step is the exception: it adds a jump of the gradient divided by :math:`\varepsilon`, hundreds of times the largest
entry. It also bends the three gradients away from a line, on which they lie to :math:`10^{-5}` otherwise; so where they
are bent by more than :math:`10^{-4}` the step is divided by 8, up to three times, and if they still are, a warning says
so. An LSTM has no such edges.

Source: Wang, Zhang, Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020,
section 4 and algorithms 1 and 2.

Deviations
----------
- g and H are those of the prunable tensors, fixed ones included; biases and normalisation stand still. The paper says
  "parameters"; its authors' program takes the weights of linear and convolutional layers, which is the same there.
- The paper divides the scores by their sum, whose sign does not count. That changes no rank and is left out.
- The batch is the probe's, dropout included; the authors' program collects the same number of samples of each class.
- The authors' program draws the weights of linear layers anew before it scores; here the weights are the model's own,
  and those that stay keep the values by which they were chosen.
- Weights that the batch does not use, such as an embedding's rows for words that are not in it, score 0: they go after
  all those whose score is negative. The paper has no embeddings.
- Counts are exact; of equal scores the earlier tensor's stays, then the lower position's. That program keeps all that
  tie with the threshold.
- Scope "local", where each tensor keeps its share by the allocation, is a variant.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import Probe, evaluate
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope
from refimpl.methods.scored import ScoredOnce, Scores, refuse_nonfinite
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, values_of

STEP = 2.0**-19
"""δ: length of the first step of the difference quotient, in units of the weights' norm."""

BEND = 1e-4
"""How far from straight the gradient may run over a step, relative to its change."""

_ATTEMPTS, _SHORTER = 4, 8.0

logger = logging.getLogger(__name__)


class GraSP(ScoredOnce):
    """GraSP; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries are stored. With scope "global" its rule is not read.
    temperature : float
        T, by which the logits are divided.
    scope : {"local", "global"}
        Whether weights compete within their tensor or over the whole model.
    conventions : Conventions
        Of which the allocation's are read.

    Raises
    ------
    ValueError
        If the scope is neither, or the temperature is not a positive number.
    """

    name = "grasp"

    def __init__(
        self,
        allocation: Allocation,
        *,
        temperature: float = 200.0,
        scope: Scope = "global",
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(allocation, scope=scope, conventions=conventions)
        if not 0 < temperature < np.inf:
            raise ValueError(
                f"the temperature of GraSP is {temperature}; give a positive number, 200 as the paper does"
            )
        self.temperature = temperature

    def scores(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None) -> Scores:
        """Return w ⊙ Hg, signed."""
        names = [name for name, spec in specs.items() if spec.prunable]
        product = hessian_gradient(params, names, self.probed(probe), self.temperature)
        for name, values in product.items():
            values *= values_of(params[name]).reshape(-1)
        return product


def hessian_gradient(params: Params, names: list[str], probe: Probe, temperature: float = 1.0) -> Scores:
    """Return Hg of some parameters, by a central difference of the gradient along itself; see the module.

    Parameters
    ----------
    params : Params
        The point; changed in nothing.
    names : list of str
        The parameters to which g and H are restricted.
    probe : Probe
        Whose gradient is asked for three times in float64, or twice more for each shortening of the step.
    temperature : float
        By which the logits are divided.

    Returns
    -------
    dict of str to ndarray of float64, shape (nnz,)
        Zeros where all weights or all gradients are zero.

    Raises
    ------
    ValueError
        If a gradient is NaN or infinite.
    """
    wide = {name: _with_values(weight, values_of(weight).astype(np.float64)) for name, weight in params.items()}

    def gradient(point: Params) -> Scores:
        _, grads = probe.loss_and_grads(point, temperature=temperature)
        return {name: evaluate(grads[name], point[name]).reshape(-1) for name in names}

    def norm(arrays: Scores) -> float:
        return float(np.sqrt(sum(np.vdot(array, array) for array in arrays.values())))

    g = gradient(wide)
    for name, own in g.items():
        refuse_nonfinite(name, own)
    size, steepness = norm({name: values_of(wide[name]) for name in names}), norm(g)
    if not size or not steepness:
        return {name: np.zeros_like(own) for name, own in g.items()}

    def moved(by: float) -> Params:
        there = dict(wide)
        for name in names:
            values = values_of(wide[name])
            there[name] = _with_values(wide[name], values + by * g[name].reshape(values.shape))
        return there

    step, bend = STEP * size / steepness, np.inf
    for _ in range(_ATTEMPTS):
        ahead, behind = gradient(moved(step)), gradient(moved(-step))
        bend = max(_bend(behind[name], g[name], ahead[name]) for name in names)
        if bend <= BEND:
            break
        step /= _SHORTER
    else:
        step *= _SHORTER  # the last one taken
        logger.warning(
            "the gradient bends by %.1g of its change over the shortest step, so GraSP's scores are rough", bend
        )
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in names}


def _bend(behind: np.ndarray, here: np.ndarray, ahead: np.ndarray) -> float:
    """Return how far the middle of three equidistant gradients is from the line through the others."""
    change = np.linalg.norm(ahead - behind)
    return float(np.linalg.norm(ahead + behind - 2 * here) / change) if change else 0.0


def _with_values(weight: Weight, values: np.ndarray) -> Weight:
    return SparseWeight(weight.support, values) if isinstance(weight, SparseWeight) else values
