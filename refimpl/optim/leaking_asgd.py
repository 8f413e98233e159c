"""NT-ASGD as masked dense implementations run it: the averages leak outside the support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from refimpl.optim.asgd import ASGD
from refimpl.optim.base import BLOCK, Slots
from refimpl.weights.carry import CarryRule
from refimpl.weights.support import Support


@dataclass(frozen=True)
class LeakingASGD:
    r"""Averaged stochastic gradient descent whose average is dense although the weight is sparse.

    A dense implementation of sparse training takes an optimizer step on the whole array and masks the weights
    afterwards. An optimizer that averages has read them in between. With the masked weights
    :math:`w = w \odot m` and the gradient :math:`g` of the *whole* array:

    .. math::
        w' &= w (1 - \lambda\eta_t) - \eta_t (g + \lambda_{wd} w) \\
        \bar w &\leftarrow \bar w + \mu_t (w' - \bar w) \\
        w &\leftarrow w' \odot m

    Where :math:`m = 1` this is `ASGD`, symbol by symbol. Where :math:`m = 0`, the weight goes
    :math:`0 \to -\eta_t g \to 0`, and

    .. math:: \bar w \leftarrow \bar w + \mu_t (-\eta_t g - \bar w),

    so the averaged network is dense: outside the support it holds the mean of :math:`-\eta_t g`, the faded
    average of what was dropped, and, where an entry grows, a mean that began before it was there. This class
    exists to reproduce that baseline; it holds a dense array and needs the dense gradient, which nothing else
    here does. For the version without a leak see `ASGD`.

    Slots: ``average``, of the weight's dense shape. It has no carry rule: an exchange leaves it as it is.

    Attributes
    ----------
    lambd, alpha, t0, weight_decay : float
        As in `ASGD`; the defaults are those of NT-ASGD after its trigger, ``t0=0`` and ``lambd=0``.

    Raises
    ------
    ValueError
        If an option is outside its range.

    References
    ----------
    .. [1] Liu, Mocanu, Pei, Pechenizkiy, "Selfish sparse RNN training", ICML 2021, the section on SNT-ASGD,
       which names the flaw (without the leak through the gradient step, which is a matter of implementation).

    Notes
    -----
    *Deviations.* None from the masked dense loop but those of `ASGD` from ``torch.optim.ASGD``. Clip both
    gradients by one factor; a dense implementation takes the norm over the dense gradient.
    """

    lambd: float = 0.0
    alpha: float = 0.75
    t0: float = 0.0
    weight_decay: float = 0.0

    needs_dense_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self.on_dense_arrays  # checks the options

    @cached_property
    def on_dense_arrays(self) -> ASGD:
        """The same rule for a parameter that is dense, such as a bias: nothing can leak there."""
        return ASGD(self.lambd, self.alpha, self.t0, self.weight_decay)

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """Empty: the average is not aligned with the support, and crosses an exchange unchanged."""
        return {}

    def init(self, values: np.ndarray, support: Support) -> Slots:
        """Return the dense average, which starts as the weight with its zeros."""
        average = np.zeros(support.shape, values.dtype)
        average.reshape(-1)[support.flat] = values
        return {"average": average}

    def update(
        self,
        values: np.ndarray,
        grad: np.ndarray,
        slots: Slots,
        *,
        lr: float,
        step: int,
        support: Support,
        dense_grad: np.ndarray,
        scale: float = 1.0,
    ) -> None:
        """Take one step, in place on ``values`` and the dense average.

        Parameters
        ----------
        values, grad : ndarray, shape (support.nnz,)
            The stored values and their gradient; ``grad`` equals ``dense_grad`` on the support.
        slots : dict of ndarray
            From `init`.
        lr, step : float, int
            As in `refimpl.optim.base.Optimizer.update`.
        support : Support
            Where the values stand.
        dense_grad : ndarray of the weight's shape and the values' type
            The gradient of the whole weight, stored or not.
        scale : float
            Factor of both gradients, as in `refimpl.optim.base.Optimizer.update`.

        Raises
        ------
        ValueError
            If the shapes or types do not belong together.
        """
        shapes = (dense_grad.shape, slots["average"].shape)
        if shapes != (support.shape, support.shape) or dense_grad.dtype != values.dtype:
            raise ValueError(
                f"the dense gradient is {dense_grad.dtype} of shape {shapes[0]} and the average has shape"
                f" {shapes[1]}; give both as {values.dtype} of the weight's shape {support.shape}"
            )
        rule, flat = self.on_dense_arrays, support.flat
        average, gradient = slots["average"].reshape(-1), dense_grad.reshape(-1)
        inside = average[flat]
        rule.update(values, grad, {"average": inside}, lr=lr, step=step, scale=scale)
        eta, mu = rule.effective_lr(lr, step), rule.averaging_weight(step)
        for start in range(0, average.size, BLOCK):
            a = average[start : start + BLOCK]
            g = gradient[start : start + BLOCK]
            stray = -(eta * (g if scale == 1 else g * float(scale)))
            if mu == 1:
                a[...] = stray
            else:
                a += mu * (stray - a)
        average[flat] = inside  # what the loop did to the stored entries is undone

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return the dense average, of the weight's shape."""
        return slots["average"]
