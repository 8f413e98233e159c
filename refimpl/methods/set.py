r"""SET, sparse evolutionary training: drop what is closest to zero, grow at random.

The support of layer :math:`l`, with r output and c input units, starts as an Erdős–Rényi graph,
:math:`P[(i,j) \in S] = \varepsilon (r + c)/(r c)`. At the end of each epoch, with a constant :math:`\zeta`,

1. remove the fraction :math:`\zeta` of the smallest positive weights and the fraction :math:`\zeta` of the
   largest negative ones, that is, of those closest to zero;
2. add as many new connections, uniformly at random among the places that are free.

S = A = B.

Source: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable training of artificial neural networks with
adaptive sparse connectivity inspired by network science", Nature Communications 9, 2018, Algorithm 1.

Deviations
----------
- The density is given and ε follows from it (rule ``"er"``), instead of the other way round.
- The count is exact (convention ``initial_count``), and so is the number of removed weights:
  :math:`\lfloor\zeta n_+\rfloor + \lfloor\zeta n_-\rfloor`. A weight of exactly 0 counts as positive.
- New connections start at 0 (convention ``grown_value``), so that growth changes no output. The authors'
  program draws them from the initial distribution, also where the connection has just been removed.
- A connection removed and grown back at once keeps its value (convention ``regrow``).
- There is an exchange after the last epoch too, if the loop asks; it can make no difference to a checkpoint
  saved before it.
- ``criterion="magnitude"`` drops the smallest :math:`|w|` of both signs together, the form in which later
  papers compare with SET.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude, by_sign
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import at_random
from refimpl.methods.schedule import Constant, EveryEpoch, Fraction, When
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient


class SET(DropAndGrow):
    """Sparse evolutionary training; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores; the paper's is the rule ``"er"``.
    drop_fraction : callable or float
        ζ; a number is constant.
    criterion : {"sign", "magnitude"}
        Whether the two signs are counted apart, as in the paper, or together.
    when : callable
        By default at the end of each epoch.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If the criterion is unknown.
    """

    name = "set"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float = 0.3,
        *,
        criterion: Literal["sign", "magnitude"] = "sign",
        when: When | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        if criterion not in ("sign", "magnitude"):
            raise ValueError(f"the drop criterion of SET is {criterion!r}; give 'sign' or 'magnitude'")
        if not callable(drop_fraction):
            drop_fraction = Constant(drop_fraction)
        super().__init__(allocation, drop_fraction, when or EveryEpoch(), conventions)
        self.drop = by_sign if criterion == "sign" else by_magnitude

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the weights closest to zero, and grow as many at random."""
        return self.propose(params, step, drop=self.drop, grow=at_random(seed, step, self.conventions))
