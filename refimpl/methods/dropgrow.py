"""What the drop-and-grow methods share: where they start, when they act, and what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.methods.allocation import Allocation, initial_supports
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import Criterion
from refimpl.methods.exchange import Grower, count_stored, propose
from refimpl.methods.pools import Pool, pools_of
from refimpl.methods.schedule import Fraction, When
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support


class DropAndGrow(BaseMethod):
    """A method whose sets coincide, S = A = B, and move by dropping and growing.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores.
    drop_fraction : callable
        Fraction of a pool's entries to drop, by step.
    when : callable
        When an exchange is due.
    conventions : Conventions
        The choices that the paper leaves open.
    """

    def __init__(
        self, allocation: Allocation, drop_fraction: Fraction, when: When, conventions: Conventions = DEFAULT
    ) -> None:
        super().__init__(conventions)
        self.allocation = allocation
        self.drop_fraction = drop_fraction
        self.when = when
        self.pools: list[Pool] = []
        self.initial_nnz: dict[str, int] = {}

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports, and remember the pools and how many entries each began with."""
        drawn = initial_supports(specs, self.allocation, seed=seed, conventions=self.conventions)
        self.pools = pools_of(specs, list(drawn), self.conventions.pool)
        self.initial_nnz = {pool.label: count_stored(pool, drawn) for pool in self.pools}
        return drawn

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Ask the schedule; the epoch in which averaging starts is a convention (``trigger_epoch``).

        With nothing to exchange none is due: at density 1 no step gives way to one.
        """
        if not self.pools:
            return False
        if asgd_triggered and self.conventions.trigger_epoch == "skip":
            return False
        return self.when(step=step, epoch_end=epoch_end)

    def propose(self, params: Params, step: int, *, drop: Criterion, grow: Grower) -> dict[str, Exchange]:
        """Run the exchange of this step with the method's own criterion and growth."""
        return propose(
            params,
            self.pools,
            fraction=self.drop_fraction(step),
            drop=drop,
            grow=grow,
            conventions=self.conventions,
            initial_nnz=self.initial_nnz,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the pools and the counts with which they began."""
        return {"pools": [pool.as_json() for pool in self.pools], "initial_nnz": dict(self.initial_nnz)}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and counts."""
        self.pools = [Pool.from_json(saved) for saved in state["pools"]]
        self.initial_nnz = {label: int(n) for label, n in state["initial_nnz"].items()}
