r"""RigL, the rigged lottery: drop by magnitude, grow where the gradient is largest.

Every :math:`\Delta T` steps until :math:`T_{\mathrm{end}}`, for each tensor with n entries stored on S:

.. math::
    k &= \mathrm{round}(f(t)\,n), \qquad f(t) = \tfrac\alpha2\bigl(1 + \cos(\pi t / T_{\mathrm{end}})\bigr) \\
    D &= \text{the } k \text{ entries of } S \text{ with the smallest } |w| \\
    G &= \text{the } k \text{ places outside } S \setminus D \text{ with largest } |\partial L/\partial w| \\
    S &\leftarrow (S \setminus D) \cup G, \qquad w_{G \setminus D} = 0

S = A = B, except that an exchange looks at the gradient of all places. It is scanned in blocks of rows, and
only the best k places so far are remembered: memory O(n + one block), so the method scales as the others do.

Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery: making all tickets winners", ICML 2020,
section 3 and Algorithm 1; densities there are uniform with a dense first layer, or ERK.

Deviations
----------
- The gradient is that of the current batch at the current weights, and the exchange takes the place of the
  optimizer's step, as in Algorithm 1; the batch counts as a step, so the period is :math:`\Delta T` batches.
  In the authors' program the counter stands still and the period is :math:`\Delta T + 1`. Convention
  ``exchange_step="after"`` takes the step first.
- A place just dropped may grow back and then keeps its value (convention ``regrow``); the paper's pseudo-code
  excludes only the places that are kept.
- No noise is added to the magnitudes; ties fall to the higher position, those of gradients to the lower one.
- k is rounded down (convention ``drop_rounding``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import by_gradient
from refimpl.methods.schedule import Cosine, EverySteps, Fraction, When
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class RigL(DropAndGrow):
    """RigL; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores.
    drop_fraction : callable, or float together with ``end_step``
        f(t); a number is α.
    interval : int
        ΔT, in training steps.
    end_step : int, optional
        T_end, in training steps: there are no exchanges from it on. None for no end, which needs a callable
        ``drop_fraction``.
    when : callable, optional
        Another schedule, in place of the one that ``interval`` and ``end_step`` describe.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If α is given without ``end_step``.
    """

    name = "rigl"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float = 0.3,
        *,
        interval: int = 100,
        end_step: int | None = None,
        when: When | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        if not callable(drop_fraction):
            if end_step is None:
                raise ValueError(
                    "a drop fraction that is a number starts a cosine; give end_step, the last step of exchanges, too"
                )
            drop_fraction = Cosine.by(conventions, drop_fraction, end_step)
        super().__init__(allocation, drop_fraction, when or EverySteps.by(conventions, interval, end_step), conventions)

    def needs_gradient(self, step: int) -> bool:
        """Tell whether an exchange is due at this step."""
        return self.exchange_due(step=step, epoch_end=False)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the smallest weights, and grow as many where the gradient is largest."""
        return self.propose(params, step, drop=by_magnitude, grow=by_gradient(gradients))
