"""Adam, with coupled or decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from refimpl import kernels
from refimpl.optim.base import Regrown, Slots, require_choice, require_number, require_step
from refimpl.weights.carry import CarryRule


@dataclass(frozen=True)
class Adam:
    r"""Adam; with ``decoupled=True``, AdamW.

    With gradient :math:`g`, learning rate :math:`\eta`, weight decay :math:`\lambda`, and
    :math:`c_k = 1 - \beta_k^t` at step :math:`t = 1, 2, \dots`:

    .. math::
        \text{coupled:}\quad g &\leftarrow g + \lambda w \qquad\qquad
        \text{decoupled:}\quad w \leftarrow (1 - \eta\lambda) w \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \text{"torch":}\quad
        w &\leftarrow w - \frac{\eta}{c_1} \, \frac{m}{\sqrt{v} / \sqrt{c_2} + \epsilon} \\
        \text{"inside-correction":}\quad
        w &\leftarrow w - \frac{\eta \sqrt{c_2}}{c_1} \, \frac{m}{\sqrt{v} + \epsilon}

    Slots: ``exp_avg`` (:math:`m`) and ``exp_avg_sq`` (:math:`v`).

    Attributes
    ----------
    betas : (float, float)
        :math:`\beta_1, \beta_2`, each from 0 up to, not including, 1.
    eps : float
        :math:`\epsilon > 0`: it keeps an entry whose gradients have all been 0 from dividing 0 by 0.
    weight_decay : float
        :math:`\lambda \ge 0`.
    decoupled : bool
        Whether the decay acts on the weight directly [2]_ or through the gradient, and so through the
        moments.
    eps_placement : {"torch", "inside-correction"}
        Where :math:`\epsilon` stands. ``"torch"`` is the paper's algorithm 1: it is added to the corrected
        root. ``"inside-correction"`` adds it to the raw root, and corrects afterwards: the reordered form at
        the end of the paper's section 2, used by scikit-learn and by the ONNX operator. It is the first form
        with :math:`\epsilon / \sqrt{c_2}` for :math:`\epsilon`, much larger in the first steps: with
        :math:`\beta_2 = 0.999` about 32 times at :math:`t = 1`.
    regrown : {"keep", "reset"}
        Whether an entry that one exchange drops and grows again keeps its moments or starts from 0, as every
        grown entry does.

    Raises
    ------
    ValueError
        If an option is outside its range.

    References
    ----------
    .. [1] Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1 and section 2.
    .. [2] Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.

    Notes
    -----
    *Deviations.* As in ``torch.optim.AdamW``, the decoupled decay is multiplied by the learning rate; [2]_
    multiplies it by the schedule's factor only. The bias correction counts the optimizer's steps, not those
    of an entry: one that grows late starts from moments of 0 that are not corrected, so its first step is
    :math:`(1-\beta_1)/\sqrt{1-\beta_2}` learning rates long (3.2 with the defaults), as it is in a masked
    dense array.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    eps_placement: Literal["torch", "inside-correction"] = "torch"
    regrown: Regrown = "keep"

    needs_dense_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}; give two numbers of at least 0 and below 1")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, as TOML has it, becomes hashable
        for beta in self.betas:
            require_number("each of betas", beta, 0, 1)
        require_number("eps", self.eps, 0, strict=True)
        require_number("weight_decay", self.weight_decay, 0)
        require_choice("decoupled", self.decoupled, True, False)
        require_choice("eps_placement", self.eps_placement, "torch", "inside-correction")
        require_choice("regrown", self.regrown, "keep", "reset")

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """New entries start from moments of 0."""
        rule = CarryRule(0.0, self.regrown)
        return {"exp_avg": rule, "exp_avg_sq": rule}

    def init(self, values: np.ndarray) -> Slots:
        """Return both moments as zeros."""
        return {"exp_avg": np.zeros_like(values), "exp_avg_sq": np.zeros_like(values)}

    def update(
        self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int, scale: float = 1.0
    ) -> None:
        """Take one step in place; see `refimpl.optim.base.Optimizer.update`."""
        require_step(step)
        kernels.adam_step(
            values,
            grad,
            slots["exp_avg"],
            slots["exp_avg_sq"],
            lr=float(lr),
            betas=(float(self.betas[0]), float(self.betas[1])),
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.decoupled,
            eps_inside=self.eps_placement == "inside-correction",
            scale=float(scale),
            step=step,
        )

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return ``values``."""
        return values
