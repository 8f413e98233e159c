"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refimpl import kernels
from refimpl.optim.base import Regrown, Slots, require_choice, require_number, require_step
from refimpl.weights.carry import CarryRule


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent, plain, with heavy-ball or with Nesterov momentum.

    With gradient :math:`g`, weight decay :math:`\lambda`, momentum :math:`\mu`, dampening :math:`\tau`,
    learning rate :math:`\eta` and buffer :math:`b`, at step :math:`t = 1, 2, \dots`:

    .. math::
        g &\leftarrow g + \lambda w \\
        b &\leftarrow \begin{cases} g & t = 1 \\ \mu b + (1 - \tau) g & t > 1 \end{cases} \\
        w &\leftarrow w - \eta d, \qquad
        d = \begin{cases} g & \mu = 0 \\ b & \text{heavy ball} \\ g + \mu b & \text{Nesterov} \end{cases}

    Slots: ``momentum_buffer``, only if ``momentum`` is not 0.

    Attributes
    ----------
    momentum : float
        :math:`\mu \ge 0`.
    dampening : float
        :math:`0 \le \tau < 1`, without effect where there is no momentum.
    nesterov : bool
        Nesterov's form; needs momentum, and no dampening.
    weight_decay : float
        :math:`\lambda \ge 0`, added to the gradient.
    regrown : {"keep", "reset"}
        Whether an entry that one exchange drops and grows again keeps its momentum or starts from 0, as every
        grown entry does.

    Raises
    ------
    ValueError
        If an option is outside its range, or Nesterov's form is asked for without momentum or with dampening.

    References
    ----------
    .. [1] Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
       learning", ICML 2013, section 2 (heavy ball and Nesterov's form for stochastic gradients).

    Notes
    -----
    *Deviations.* None from ``torch.optim.SGD``, whose form of Nesterov's momentum (the learning rate outside
    the buffer) this is. The case :math:`t = 1` is the optimizer's first step, not an entry's: an entry that
    grows later finds 0 in the buffer and takes :math:`(1 - \tau) g`, as it does in a masked dense array.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    regrown: Regrown = "keep"

    needs_dense_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("momentum", self.momentum, 0)
        require_number("dampening", self.dampening, 0, 1)
        require_number("weight_decay", self.weight_decay, 0)
        require_choice("nesterov", self.nesterov, True, False)
        require_choice("regrown", self.regrown, "keep", "reset")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"Nesterov's form was asked for with momentum {self.momentum:g} and dampening"
                f" {self.dampening:g}; give a momentum above 0 and a dampening of 0"
            )

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """New entries start without momentum."""
        return {"momentum_buffer": CarryRule(0.0, self.regrown)} if self.momentum else {}

    def init(self, values: np.ndarray) -> Slots:
        """Return a buffer of zeros, which the first update overwrites; nothing without momentum."""
        return {"momentum_buffer": np.zeros_like(values)} if self.momentum else {}

    def update(
        self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int, scale: float = 1.0
    ) -> None:
        """Take one step in place; see `refimpl.optim.base.Optimizer.update`."""
        require_step(step)
        kernels.sgd_step(
            values,
            grad,
            slots["momentum_buffer"] if self.momentum else None,
            lr=float(lr),
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            scale=float(scale),
            first=step == 1,
        )

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return ``values``."""
        return values
