"""SNT-ASGD: averages that begin when their weight does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from refimpl.optim.base import Regrown, Slots, aligned_blocks, require_choice, require_number
from refimpl.weights.carry import CarryRule


@dataclass(frozen=True)
class SNTASGD:
    r"""Sparse non-monotonically triggered averaged SGD, the optimizer of Selfish-RNN.

    Each entry has an age :math:`a`, the number of its updates since it was last grown (or since the optimizer
    started), and its average runs over that time alone. With gradient :math:`g` and learning rate
    :math:`\eta`:

    .. math::
        a &\leftarrow a + 1 \\
        w &\leftarrow w - \eta (g + \lambda_{wd} w) \\
        \mu &= \begin{cases} 1 / \max(1, a - 1) & \text{"skip"} \\ 1 / a & \text{"include"} \end{cases} \\
        \bar w &\leftarrow
        \begin{cases} w & \mu = 1 \\ \bar w + \mu (w - \bar w) & \text{otherwise} \end{cases}

    In closed form, for an entry that was active from step :math:`T` to step :math:`K`, with the iterates
    :math:`w^{(t)}` after each step: with ``"include"`` the mean over :math:`t = T, \dots, K`; with ``"skip"``
    the mean over :math:`t = T + 1, \dots, K`, or :math:`w^{(T)}` when :math:`K = T`. What is not stored has
    no average, so the averaged network is exactly as sparse as the trained one. A dense array is averaged as
    by ``ASGD(t0=0, lambd=0)``, to the bit.

    Start it with fresh slots when `NonMonotonicTrigger` fires, and evaluate with `averaged`.

    Slots: ``average`` (:math:`\bar w`) and ``age`` (:math:`a`, int32).

    Attributes
    ----------
    weight_decay : float
        :math:`\lambda_{wd} \ge 0`, added to the gradient.
    first_iterate : {"skip", "include"}
        Whether an average leaves out the iterate of its first step, as the authors' code does (and as
        ``torch.optim.ASGD`` does with ``t0=0``), or has it in, as the paper's equation does.
    regrown : {"keep", "reset"}
        An entry that one exchange drops and grows again continues its age and average, as in the authors'
        code, where the optimizer never notices; or it starts anew like every grown entry, as the paper's
        definition of :math:`T` reads.

    Raises
    ------
    ValueError
        If an option is outside its range.

    References
    ----------
    .. [1] Liu, Mocanu, Pei, Pechenizkiy, "Selfish sparse RNN training", ICML 2021 (arXiv 2101.09048), the
       section on SNT-ASGD.

    Notes
    -----
    *Deviations.* The defaults are the authors' code, not the paper's equation, in both conventions. The
    authors' code freezes the learning rate of masked arrays at that of the first step, and updates others
    with the one of the step before; here the given learning rate acts. (With a constant one, as in their
    recipes, that is the same.) It has ``alpha`` and ``t0`` options that masked arrays ignore; they are left
    out, as is ``lambd``, which is 0 in NT-ASGD.
    """

    weight_decay: float = 0.0
    first_iterate: Literal["skip", "include"] = "skip"
    regrown: Regrown = "keep"

    needs_dense_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("weight_decay", self.weight_decay, 0)
        require_choice("first_iterate", self.first_iterate, "skip", "include")
        require_choice("regrown", self.regrown, "keep", "reset")

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """New entries start at age 0; their average is then overwritten by the first update."""
        rule = CarryRule(0.0, self.regrown)
        return {"average": rule, "age": rule}

    def init(self, values: np.ndarray) -> Slots:
        """Return the averages, which start as a copy of the values, and ages of 0."""
        return {"average": values.copy(), "age": np.zeros(values.shape, np.int32)}

    def update(
        self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int, scale: float = 1.0
    ) -> None:
        """Take one step in place; see `refimpl.optim.base.Optimizer.update`."""
        lr = float(lr)  # a NumPy scalar would promote float32 arrays
        skipped = 1 if self.first_iterate == "skip" else 0
        for w, g, average, age in aligned_blocks(step, values, grad, slots["average"], slots["age"], scale=scale):
            if self.weight_decay:
                g = g + self.weight_decay * w
            w -= lr * g
            age += 1
            count = np.maximum(age - skipped, 1).astype(w.dtype)
            pull = w - average
            pull *= 1 / count
            average += pull
            np.copyto(average, w, where=count == 1)  # ax + (w - ax) need not round to w

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return the averages, aligned with the values."""
        return slots["average"]
