r"""STR, soft threshold reparameterization: each tensor learns the threshold below which its weights are zero.

With one trained number :math:`s` for each tensor, the threshold :math:`\theta = \sigma(s)`, σ the logistic function,
and :math:`G = \partial L / \partial \tilde W`:

.. math::
    \tilde W &= \operatorname{sign}(W) \max(0, |W| - \theta), \qquad A = \{|W| > \theta\} \\
    \frac{\partial L}{\partial W} &= G \text{ on } A,\ 0 \text{ elsewhere} \\
    \frac{\partial L}{\partial s} &= -\sigma'(s) \sum_A G \odot \operatorname{sign}(W),
        \qquad \sigma'(s) = \sigma(s)\,\sigma(-s)

and :math:`\lambda W` and :math:`\lambda s` are added: decay drives weights below the threshold and, s being negative,
the threshold up. So λ and the first s set the sparsity, which is learned and not stated. A moves in every step and is
all that the forward pass, the input gradient and the weight gradient use: B = A. S = everything: weights below the
threshold are stored and decay on; momentum may carry them, and one that comes above the threshold is used again.

Source: Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi, "Soft threshold weight reparameterization for
learnable sparsity", ICML 2020, section 3.

Deviations
----------
- λ is the method's own, for the weights that it prunes and their thresholds alone; the authors' is the weight decay of
  their optimizer. Set the optimizer's to 0, or both act.
- σ is the logistic function; other functions, and thresholds by channel or for the whole model, are left out. The
  authors' configurations start from so negative an s that :math:`\sigma(s)` and its derivative are 0 in float32, so
  that decay alone moves s at first; the default here is one that learns at once.
- A weight whose magnitude is exactly θ is inactive, and gets no gradient.
- A tensor of which nothing is left could never come back, for its gradients are 0: that is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refimpl.methods.base import BaseMethod, Probe, evaluate
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.logistic import sigmoid
from refimpl.weights.sparse import SparseWeight, values_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refimpl.weights.gradient import Grads
    from refimpl.weights.parameters import Params, ParamSpec

THRESHOLD = ".threshold"
"""What the name of a tensor's threshold adds to the tensor's."""


class _Active(NamedTuple):
    """The set A of one tensor."""

    flags: np.ndarray
    support: Support
    flat: np.ndarray


class STR(BaseMethod):
    """Soft threshold reparameterization; see the module.

    All prunable tensors take part; to the trained arrays ``name`` it adds ``name.threshold``, of shape (1,).

    Parameters
    ----------
    initial_threshold : float
        The first s of each tensor, before the logistic function: −5 is a threshold of 0.0067.
    penalty : float
        λ, on the weights and on s.
    conventions : Conventions
        None of which is read.

    Raises
    ------
    ValueError
        If an option is not finite or the penalty is negative; in training, if a tensor has no weight above its
        threshold.
    """

    name = "str"

    def __init__(
        self, *, initial_threshold: float = -5.0, penalty: float = 1e-4, conventions: Conventions = DEFAULT
    ) -> None:
        super().__init__(conventions)
        if not np.isfinite(initial_threshold):
            raise ValueError(
                f"the initial threshold of STR is {initial_threshold}; give a finite number, of which the logistic "
                "function makes the threshold"
            )
        if not 0 <= penalty < np.inf:
            raise ValueError(f"the penalty of STR is {penalty}; give a finite number of at least 0")
        self.initial_threshold = initial_threshold
        self.penalty = penalty
        self._known: dict[str, _Active] = {}  # the last A: while it stays, so does all that is derived from it

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters as drawn, and the thresholds."""
        thresholds: Params = {
            name + THRESHOLD: np.full(1, self.initial_threshold, values_of(params[name]).dtype)
            for name, spec in specs.items()
            if spec.prunable
        }
        return params | thresholds

    def view(self, params: Params) -> Params:
        """Return W̃ on A for each tensor that has a threshold."""
        seen: Params = {name: weight for name, weight in params.items() if not _is_threshold(name, params)}
        for name in _thresholded(params):
            active, weight = self._active(name, params), values_of(params[name])
            moved = weight.reshape(-1)[active.flat]
            shrunk = np.copysign(np.abs(moved) - _theta(name, params), moved)
            whole = active.support.nnz == active.support.size  # as dense training computes it
            seen[name] = shrunk.reshape(weight.shape) if whole else SparseWeight(active.support, shrunk)
        return seen

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B = A."""
        if name + THRESHOLD not in params:
            return None
        support = self._active(name, params).support
        return None if support.nnz == support.size else support

    def update_support(self, name: str, params: Params) -> Support | None:
        """Return None: everything stored moves."""
        return None

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Return the gradients with respect to W and s, decay included."""
        pulled = {}
        for name, weight in params.items():
            if name + THRESHOLD in params:
                pulled[name], pulled[name + THRESHOLD] = self._pulled(name, params, grads)
            elif not _is_threshold(name, params):
                pulled[name] = evaluate(grads[name], weight)
        return pulled

    def _pulled(self, name: str, params: Params, grads: Grads) -> tuple[np.ndarray, np.ndarray]:
        weight, s, flat = values_of(params[name]), values_of(params[name + THRESHOLD]), self._active(name, params).flat
        on_active = evaluate(grads[name], weight, self.gradient_support(name, params)).reshape(-1)
        of_weight = self.penalty * weight
        of_weight.reshape(-1)[flat] += on_active
        slope = sigmoid(s) * sigmoid(-s)
        of_s = self.penalty * s - slope * (on_active * np.sign(weight.reshape(-1)[flat])).sum()
        return of_weight, of_s

    def _active(self, name: str, params: Params) -> _Active:
        """Return A, the same object as before if no weight has crossed the threshold."""
        weight = params[name]
        if isinstance(weight, SparseWeight):
            raise ValueError(f"{name} is a sparse weight; STR stores all weights, so give a dense array")
        flags = ~(np.abs(weight) <= _theta(name, params))  # a NaN counts as active, so that the loss shows it
        known = self._known.get(name)
        if known is None or not np.array_equal(known.flags, flags):
            support = Support.from_mask(flags)
            if not support.nnz:
                raise ValueError(
                    f"all weights of {name} are below its threshold {_theta(name, params):.4g}, which cuts the "
                    "network; give a lower initial_threshold or a smaller penalty"
                )
            known = self._known[name] = _Active(flags, support, support.flat)
        return known


def _is_threshold(name: str, params: Params) -> bool:
    return name.endswith(THRESHOLD) and name.removesuffix(THRESHOLD) in params


def _thresholded(params: Params) -> list[str]:
    return [name for name in params if name + THRESHOLD in params]


def _theta(name: str, params: Params) -> float:
    return sigmoid(values_of(params[name + THRESHOLD]))[0]
