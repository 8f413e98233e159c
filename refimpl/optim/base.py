"""What an optimizer is: a rule over aligned arrays, updated in place.

An optimizer knows no layer, no method and no model. It sees the trained numbers of one parameter, their
gradient, and the slots that it asked for, all aligned: entry ``i`` of each belongs to the same weight.
Whether they are the stored values of a sparse weight or a whole dense array makes no difference to it,
because every rule here acts on one entry at a time. So a sparse weight is updated exactly, to the bit, as the
same entries of a masked dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from refimpl.kernels import checks
from refimpl.weights.carry import CarryRule

Slots = dict[str, np.ndarray]
"""What an optimizer remembers about one parameter, by the slot's name."""

Regrown = Literal["keep", "reset"]

BLOCK = 1 << 15  # entries: with a few slots and temporaries, what a second-level cache holds


@runtime_checkable
class Optimizer(Protocol):
    """An optimizer over aligned arrays.

    Attributes
    ----------
    carry_rules : mapping of str to CarryRule
        For each slot, what the entries that an exchange grew, or dropped and grew again, find in it.
    needs_dense_gradient : bool
        Whether ``update`` asks for the gradient outside the support as well; true of `LeakingASGD` alone,
        which therefore has another signature.
    """

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        """For each slot, what grown and regrown entries get."""
        ...

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether ``update`` needs the gradient outside the support."""
        ...

    def init(self, values: np.ndarray) -> Slots:
        """Return fresh slots, each of the shape of ``values``; empty for a rule that remembers nothing."""
        ...

    def update(
        self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int, scale: float = 1.0
    ) -> None:
        """Take one step, in place on ``values`` and ``slots``; ``grad`` is only read.

        Parameters
        ----------
        values, grad : ndarray of float32 or float64, the same shape and type
            The trained numbers and the gradient of the loss.
        slots : dict of ndarray
            From `init`, or carried across exchanges of the support.
        lr : float
            Learning rate of this step.
        step : int
            1 at this optimizer's first update, then 2, 3, ….
        scale : float
            Factor of the gradient, such as that of clipping: the step is, to the bit, that of ``grad * scale``, whose
            product is rounded to the arrays' type.

        Raises
        ------
        ValueError
            If the arrays are not aligned, or the step is below 1.
        """
        ...

    def averaged(self, values: np.ndarray, slots: Slots) -> np.ndarray:
        """Return the numbers to evaluate with, to be read only; ``values`` itself if nothing is averaged."""
        ...


def require_step(step: int) -> None:
    """Raise a ValueError unless ``step`` is 1 or more."""
    if step < 1:
        raise ValueError(f"the step is {step}; an optimizer's first update is step 1")


def aligned_blocks(
    step: int, values: np.ndarray, grad: np.ndarray, *slots: np.ndarray, scale: float = 1.0
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the same stretch of each array, stretch by stretch, as views to be updated in place.

    Where ``scale`` is not 1, the gradient's stretch is ``grad * scale``, a temporary.

    The rules are elementwise, so the stretches change no bit of the result; they bound the temporaries, and
    keep them in the cache. Arrays that are not contiguous come whole.

    Raises
    ------
    ValueError
        If the shapes differ, the gradient is of another type than the values, or ``step`` is below 1.
    """
    require_step(step)
    checks.aligned(values, grad, *slots)
    scale = float(scale)  # a NumPy scalar would promote float32 arrays
    arrays = (values, grad, *slots)
    if not all(array.flags.c_contiguous for array in arrays):
        yield arrays if scale == 1 else (values, grad * scale, *slots)
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, values.size, BLOCK):
        w, g, *rest = (array[start : start + BLOCK] for array in flat)
        yield (w, g if scale == 1 else g * scale, *rest)


def require_number(option: str, value: float, low: float, high: float = math.inf, *, strict: bool = False) -> None:
    """Raise a ValueError unless ``low <= value < high`` (``low < value`` if ``strict``); NaN fails."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not (low < value if strict else low <= value) or not value < high:
        lower = f"above {low:g}" if strict else f"of at least {low:g}"
        upper = f" and below {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{option} is {value!r}; give a finite number {lower}{upper}")


def require_choice(option: str, value: object, *choices: object) -> None:
    """Raise a ValueError unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{option} is {value!r}; give {' or '.join(repr(choice) for choice in choices)}")
