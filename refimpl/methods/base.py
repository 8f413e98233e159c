"""What every method of sparse training is: three sets that move in time.

*S* is what is stored, *A* ⊆ S what the forward pass and the input gradient use, *B* where the weight gradient
is computed. A method says how S starts, what A and B are, and how they move. It knows no layer and no
optimizer, and it changes no parameter: it proposes an :class:`~refimpl.weights.carry.Exchange`, and whoever
trains carries the arrays across.

The training loop asks in this order, with ``step`` the number of the training step (the first is 1):

1. forward and backward with ``view(params)``, weight gradients on ``gradient_support``;
2. if ``replaces_step(step)``: exchange with the gradients of this batch, and no optimizer step; the step
   counts all the same;
3. otherwise the optimizer step, and then an exchange if ``exchange_due(step=step, epoch_end=False)``, with
   the gradients of this batch if ``needs_gradient(step)``;
4. at the end of an epoch, after validation, an exchange if ``exchange_due(step=step, epoch_end=True)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class Method(Protocol):
    """A method of sparse training; see the module for when each function is called."""

    name: str
    conventions: Conventions

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Begin: return the supports S of a new model; a parameter that is not named stays a dense array."""

    def view(self, params: Params) -> Params:
        """Return the parameters that the forward pass sees: those of S restricted to A."""

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return B of one parameter; None means what is stored."""

    def extra_gradient(self, name: str, params: Params) -> np.ndarray | None:
        """Return the gradient of the method's own penalty, aligned with B, to add to the loss's; or None."""

    def needs_gradient(self, step: int) -> bool:
        """Tell whether the exchange of this step needs gradients beyond B, as promises."""

    def replaces_step(self, step: int) -> bool:
        """Tell whether the exchange of this step stands in place of the optimizer's step."""

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

        Changes no parameter, and gives the same result when called again. A method whose A and B are
        remembered renews them.
        """

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

    def view(self, params: Params) -> Params:
        """Return the parameters themselves, for A = S."""
        return params

    def gradient_support(self, name: str, params: Params) -> Support | None:
        """Return None, for B = S."""
        return None

    def extra_gradient(self, name: str, params: Params) -> np.ndarray | None:
        """Return None: no penalty."""
        return None

    def needs_gradient(self, step: int) -> bool:
        """Return False."""
        return False

    def replaces_step(self, step: int) -> bool:
        """Tell whether the exchange uses the gradient and the conventions put it in place of the step."""
        return self.needs_gradient(step) and self.conventions.exchange_step == "instead"

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Return False: never."""
        return False

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Return no exchange."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing to remember."""
        return {}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return no arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Do nothing."""
