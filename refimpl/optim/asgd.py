"""Averaged stochastic gradient descent, and NT-ASGD without a leak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refimpl.optim.base import Regrown, Slots, aligned_blocks, require_choice, require_number
from refimpl.weights.carry import CarryRule


@dataclass(frozen=True)
class ASGD:
    r"""Averaged stochastic gradient descent, as in ``torch.optim.ASGD``.

    With gradient :math:`g`, learning rate :math:`\eta` and average :math:`\bar w`, at step
    :math:`t = 1, 2, \dots`:

    .. math::
        \eta_t &= \frac{\eta}{(1 + \lambda \eta (t - 1))^{\alpha}}, \qquad
        \mu_t = \frac{1}{\max(1, \, t - 1 - t_0)} \\
        g &\leftarrow g + \lambda_{wd} w \\
        w &\leftarrow w (1 - \lambda \eta_t) - \eta_t g \\
        \bar w &\leftarrow
        \begin{cases} w & \mu_t = 1 \\ \bar w + \mu_t (w - \bar w) & \text{otherwise} \end{cases}

    So :math:`\bar w` is the latest iterate up to step :math:`t_0 + 2`, and from there on the mean of the
    iterates :math:`t_0 + 2, \dots, t`. With ``t0=0`` the first iterate is skipped.

    **NT-ASGD** [2]_ is ``ASGD(t0=0, lambd=0)``, started with fresh slots when `NonMonotonicTrigger` fires.
    While the support moves there are two versions of it:

    - *masked*: this class on the stored entries. What is dropped loses its average, what grows starts at an
      average of 0 and is mixed in with the weight :math:`\mu_t` that everything else has: zeros from before
      its growth count, the flaw that `SNTASGD` removes. In masked dense terms,
      :math:`\bar w \leftarrow \bar w \odot m` after each step.
    - *leaking*: what a dense implementation that masks the weights but not the averages does; see
      `LeakingASGD`.

    Slots: ``average`` (:math:`\bar w`, ``ax`` in a PyTorch state dict).

    Attributes
    ----------
    lambd : float
        :math:`\lambda \ge 0`: decay of the weights, and of the learning rate.
    alpha : float
        :math:`\alpha \ge 0`: power of the decay of the learning rate.
    t0 : float
        :math:`t_0 \ge 0`: averaging starts after this many steps.
    weight_decay : float
        :math:`\lambda_{wd} \ge 0`, added to the gradient.
    regrown : {"keep", "reset"}
        Whether an entry that one exchange drops and grows again keeps its average or finds 0, as every grown
        entry does.

    Raises
    ------
    ValueError
        If an option is outside its range.

    References
    ----------
    .. [1] Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim.
       30(4), 1992.
    .. [2] Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", ICLR 2018, algorithm 1.

    Notes
    -----
    *Deviations.* ``torch.optim.ASGD`` prepares :math:`\eta_t` at the end of the step before, from the
    learning rate of that step: under a schedule it lags one step behind, while here the learning rate that is
    given is the one that acts. It keeps :math:`\eta_t` and :math:`\mu_t` as tensors of the default type,
    which rounds them to float32 even if the weights are float64. Its average is 0 before the first step; here
    it is the weights, so that evaluating at once makes sense.
    """

    lambd: float = 1e-4
    alpha: float = 0.75
    t0: float = 1e6
    weight_decay: float = 0.0
    regrown: Regrown = "keep"

    needs_dense_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in ("lambd", "alpha", "t0", "weight_decay"):
            require_number(option, getattr(self, option), 0)
        require_choice("regrown", self.regrown, "keep", "reset")

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """New entries start at an average of 0."""
        return {"average": CarryRule(0.0, self.regrown)}

    def init(self, values: np.ndarray) -> Slots:
        """Return the average, which starts as a copy of the values."""
        return {"average": values.copy()}

    def effective_lr(self, lr: float, step: int) -> float:
        r"""Return :math:`\eta_t`."""
        lr = float(lr)
        return lr / (1 + self.lambd * lr * (step - 1)) ** self.alpha

    def averaging_weight(self, step: int) -> float:
        r"""Return :math:`\mu_t`."""
        return 1 / max(1.0, step - 1 - self.t0)

    def update(
        self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int, scale: float = 1.0
    ) -> None:
        """Take one step in place; see `refimpl.optim.base.Optimizer.update`."""
        eta, mu = self.effective_lr(lr, step), self.averaging_weight(step)
        for w, g, average in aligned_blocks(step, values, grad, slots["average"], scale=scale):
            if self.weight_decay:
                g = g + self.weight_decay * w
            if self.lambd:
                w *= 1 - self.lambd * eta
            w -= eta * g
            if mu == 1:
                average[...] = w
            else:
                average += mu * (w - average)

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return the average."""
        return slots["average"]
