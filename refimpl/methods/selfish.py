r"""Selfish-RNN: weights of all gates compete for the places of their stacked matrix.

The weights of a recurrent cell's gates form one matrix, :math:`W = [W_i; W_f; W_g; W_o]` (4H rows), for the
input and for the recurrent part each. With :math:`n` entries stored, at the end of each epoch, after step
:math:`t`:

.. math::
    k &= n - \mathrm{round}(d(t)\,n) \text{ entries stay: those of largest } |w| \text{ over all gates} \\
    g &= n - k \;(\text{or } n_0 - k) \text{ places grow, at random among the } N - k \text{ that are free} \\
    d(t) &= d_{\min} + (d_0 - d_{\min})\,\tfrac12\bigl(1 + \cos(\pi t / T)\bigr), \qquad d_{\min} = 0.005

The matrix keeps its number of weights, while a gate whose weights are large gains places from the others: the
redistribution between gates from which the method has its name. Embedding and decoder are exchanged likewise;
biases are dense. S = A = B. The averaging that belongs to the method, SNT-ASGD, is an optimizer.

Places just vacated are free, so of the :math:`d\,n` dropped a share :math:`p = d\rho/(1 - \rho + d\rho)` (at
density ρ) grows back at once, and the net turnover is :math:`d(1 - \rho)/(1 - \rho + d\rho)`.

Source: Liu, Mocanu, Pei, Pechenizkiy, "Selfish sparse RNN training", ICML 2021 (arXiv:2101.09048), with
details that the paper does not give from its authors' program.

Deviations
----------
- Counts are exact. The authors' program tosses a coin for each entry at the start and at growth, aims back at
  the first count, rounds the drop up and lets all ties die: profile ``selfish-authors``. That growth draws a
  binomial count and then that many places, which is the same law.
- A place that is dropped and grown at once keeps its value and its optimizer state, as in that program; the
  paper does not say (convention ``regrow``).
- Input and recurrent matrices are separate pools, as in that program; ``pool="layer"`` takes them together,
  and ``pool="gate"`` is the contrast without redistribution.
- The cosine is clamped at its end. The authors' runs pass it by a few steps, which changes the fraction by
  less than 1e-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import at_random
from refimpl.methods.schedule import EveryEpoch, Fraction, When, over_the_run
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class Selfish(DropAndGrow):
    """Selfish-RNN's exchange; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores; the paper's headline results use the uniform rule.
    drop_fraction : callable, or float together with ``total_steps``
        d(t); a number is d₀ of the cosine with the floor 0.005.
    total_steps : int, optional
        T of that cosine: the training steps of the whole run.
    when : callable
        By default at the end of each epoch.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If a drop fraction is given as a number without ``total_steps``.
    """

    name = "selfish"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float,
        *,
        total_steps: int | None = None,
        when: When | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(allocation, over_the_run(drop_fraction, total_steps), when or EveryEpoch(), conventions)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the smallest weights of each stacked matrix, and grow as many at random."""
        return self.propose(params, step, drop=by_magnitude, grow=at_random(seed, step, self.conventions))
