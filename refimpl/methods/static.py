r"""Static sparse training: a random support, chosen before training and never changed.

.. math:: |S_l| = \rho_l n_l, \qquad S_l \text{ uniform among the sets of that size}, \qquad A = B = S

with the densities :math:`\rho_l` of :mod:`refimpl.methods.allocation`: uniform, ER or ERK. It is SET without
the exchange, the baseline that shows what the exchange is worth.

Source: Mocanu, Mocanu, Nguyen, Gibescu, Liotta, "A topological insight into restricted Boltzmann machines",
Machine Learning, 2016, and the static baselines of the papers on SET and RigL.

Deviations
----------
A fixed number of entries in each tensor, where some implementations toss a coin for each (convention
``initial_count``).
"""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.methods.allocation import Allocation, initial_supports
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.support import Support


class Static(BaseMethod):
    """Static sparse training; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores.
    conventions : Conventions
        Of which the allocation's are read.
    """

    name = "static"

    def __init__(self, allocation: Allocation, conventions: Conventions = DEFAULT) -> None:
        super().__init__(conventions)
        self.allocation = allocation

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports."""
        return initial_supports(specs, self.allocation, seed=seed, conventions=self.conventions)
