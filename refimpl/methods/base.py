"""What every method of sparse training is: three sets that move in time.

*S* is what is stored, *A* ⊆ S what the forward pass and the input gradient use, *B* where the weight gradient
is computed. A method says how S starts, what A and B are, and how they move. It knows no layer and no
optimizer: it proposes an :class:`~refimpl.weights.carry.Exchange`, and whoever trains carries the arrays across.

Before training, ``supports`` chooses S where no weight is needed for that, the values are drawn, and ``start``
returns what training starts from: the same parameters, or those of a support that was chosen by looking at them, and
whatever else the method trains. Then the training loop asks in this order, with ``step`` the number of the training
step (the first is 1):

1. forward and backward with ``view(params)``;
2. ``observe`` the gradients of this batch;
3. if ``replaces_step(step)``: exchange with these gradients, and no optimizer step; the step counts all the same;
4. otherwise ``pull`` the gradients back to what is trained, clip them, let the optimizer move the values on
   ``update_support``, ``adjust`` them, and then exchange if ``exchange_due(step=step, epoch_end=False)``, with the
   gradients of this batch;
5. at the end of an epoch, after validation, an exchange if ``exchange_due(step=step, epoch_end=True)``;
6. after an exchange, ``values_after`` for each weight that it moved, then ``rewind`` and ``forgets``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from refimpl.kernels import topology
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.rng import generator
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight, values_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads


class Probe(Protocol):
    """What a method may ask of the model before training; it knows the data and the loss, the method does not."""

    def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Grads]:
        """Return the mean training loss over the scoring batch, and its gradients; each call takes the same batch.

        The logits are divided by the temperature. Works in the type of the parameters.
        """

    def flow(self, params: Params) -> tuple[float, Grads]:
        r"""Return the sum of the outputs of the linear network of ``params`` for an input of ones, and its gradients.

        Without data: SynFlow's :math:`R = 1^\top \prod_l W_l 1`, when ``params`` are magnitudes.
        """


class Rewind(NamedTuple):
    """Training goes back to what was there after an earlier step.

    Attributes
    ----------
    step : int
        The step to go back to, 0 for the beginning: learning rate, order of the data and draws go on from there. It is
        the last of an epoch.
    params : Params
        The parameters to go on with.
    """

    step: int
    params: Params


class Method(Protocol):
    """A method of sparse training; see the module for when each function is called."""

    name: str
    conventions: Conventions

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Begin: return the supports S of a new model; a parameter that is not named stays a dense array."""

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters with which training starts; ``params``, just drawn, are not changed.

        A method that looks at gradients to choose a support needs the probe.

        The result holds the model's parameters, some on a support that was chosen here, and may hold further trained
        arrays under names that the model does not have.
        """

    def adopt(self, params: Params) -> Params:
        """Return the trained arrays that stand for weights from elsewhere, in place of what ``start`` returned.

        Raises
        ------
        ValueError
            If the method cannot begin with given weights.
        """

    def view(self, params: Params) -> Params:
        """Return the parameters that the forward pass sees: the model's own, those of S restricted to A."""

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B of one of the model's parameters; None means what is stored."""

    def update_support(self, name: str, params: Params) -> Support | None:
        """Return the entries that the optimizer may move; None means what is stored. The others keep their bits."""

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Look at the gradients of a batch, once in each step; what is remembered of them belongs to the state."""

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Return the gradient of each trained array, from the gradients with respect to what the forward pass saw.

        Aligned with ``update_support``, penalties included. Called once in a step, before clipping.
        """

    def adjust(self, params: Params, *, step: int, lr: float, seed: int) -> None:
        """Move values in place, after the optimizer has."""

    def lr_scale(self, name: str) -> float:
        """Return the factor of the learning rate of one trained array."""

    def replaces_step(self, step: int) -> bool:
        """Tell whether the exchange of this step stands in place of the optimizer's step."""

    def needs_gradient(self, step: int) -> bool:
        """Tell whether this step asks for gradients beyond B, as promises."""

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether an exchange is due after this step, or at the end of the epoch that this step ended.

        Parameters
        ----------
        step : int
            Number of training steps done.
        epoch_end : bool
            Whether the question is asked at the end of an epoch; it is asked there besides after each step.
        asgd_triggered : bool
            Whether averaging was triggered at the end of this very epoch.
        """

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Propose new supports; a parameter that is not in the result keeps its own.

        A dense array counts as a weight on the full support. Changes no parameter, and gives the same result when
        called again. A method whose A and B are remembered renews them.
        """

    def values_after(self, name: str, weight: Weight, exchange: Exchange, *, step: int, seed: int) -> np.ndarray:
        """Return the values on the new support of an exchange, a new array of shape (new.nnz,)."""

    def rewind(self, params: Params, *, step: int) -> Rewind | None:
        """Tell whether training goes back to an earlier step, after the exchange of this one."""

    def forgets(self, step: int) -> bool:
        """Tell whether the optimizer begins anew after the exchange of this step, for all parameters."""

    def horizon(self, steps: int) -> int:
        """Return over how many of a run's steps the learning rate runs its course: fewer if training goes back."""

    def settled(self, step: int) -> bool:
        """Tell whether A has the density that was asked for, from this step on; until then no model is the best."""

    def dense_twin(self, step: int) -> bool:
        """Tell whether the model of this step is dense, and one that the run is to leave beside the sparse one."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the method remembers, small and fit for JSON."""

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return what the method remembers in arrays, by name, for the checkpoint's array part."""

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up what :meth:`state_dict` and :meth:`state_arrays` returned."""


class BaseMethod:
    """A method that never exchanges anything: the answers that most methods share.

    Parameters
    ----------
    conventions : Conventions
        The choices that the paper leaves open.
    """

    name = "base"

    def __init__(self, conventions: Conventions = DEFAULT) -> None:
        self.conventions = conventions

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Return no support: everything stays dense."""
        return {}

    def start(self, params: Params, specs: Mapping[str, ParamSpec], probe: Probe | None = None, *, seed: int) -> Params:
        """Return the parameters as they were drawn."""
        return params

    def adopt(self, params: Params) -> Params:
        """Return the parameters themselves."""
        return params

    def view(self, params: Params) -> Params:
        """Return the parameters themselves, for A = S."""
        return params

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return None, for B = S."""
        return None

    def update_support(self, name: str, params: Params) -> Support | None:
        """Return B."""
        return self.gradient_support(name, params)

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Remember nothing."""

    def pull(self, params: Params, grads: Grads) -> dict[str, np.ndarray]:
        """Evaluate the gradient of each parameter on B."""
        return {
            name: evaluate(grads[name], weight, self.gradient_support(name, params)) for name, weight in params.items()
        }

    def adjust(self, params: Params, *, step: int, lr: float, seed: int) -> None:
        """Leave the values where the optimizer put them."""

    def lr_scale(self, name: str) -> float:
        """Return 1."""
        return 1.0

    def replaces_step(self, step: int) -> bool:
        """Tell whether the exchange uses the gradient and the conventions put it in place of the step."""
        return self.needs_gradient(step) and self.conventions.exchange_step == "instead"

    def needs_gradient(self, step: int) -> bool:
        """Return False."""
        return False

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Return False: never."""
        return False

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Return no exchange."""
        return {}

    def values_after(self, name: str, weight: Weight, exchange: Exchange, *, step: int, seed: int) -> np.ndarray:
        """Carry the values across by the rule of the conventions."""
        values = exchange.carry(values_of(weight).reshape(-1), self.conventions.value_rule)
        if self.conventions.grown_from == "normal-0.1":
            anew = exchange.source < 0 if self.conventions.regrown == "reset" else exchange.source == topology.NEW
            drawn = generator(seed, f"grown/{name}", step).standard_normal(np.count_nonzero(anew))
            values[anew] = drawn.astype(values.dtype) / values.dtype.type(10)
        return values

    def rewind(self, params: Params, *, step: int) -> Rewind | None:
        """Return None: training never goes back."""
        return None

    def forgets(self, step: int) -> bool:
        """Return False."""
        return False

    def horizon(self, steps: int) -> int:
        """Return all steps."""
        return steps

    def settled(self, step: int) -> bool:
        """Return True: the density is there from the start."""
        return True

    def dense_twin(self, step: int) -> bool:
        """Return False: there is one model."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return nothing to remember."""
        return {}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return no arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Do nothing."""


def evaluate(gradient: np.ndarray | Gradient, weight: Weight, support: Support | None = None) -> np.ndarray:
    """Return a gradient as an array: on ``support``, or else aligned with what is stored."""
    if isinstance(gradient, np.ndarray):
        return gradient
    if support is not None:
        return gradient.on(support)
    return gradient.on(weight.support) if isinstance(weight, SparseWeight) else gradient.dense()
