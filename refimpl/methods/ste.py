r"""STE: the forward pass sees the largest weights, the gradient goes straight through to all.

With hidden weights :math:`w`, every step:

.. math::
    m &= [\,|w| \text{ is among the } K \text{ largest}\,], \qquad L = L(m \odot w) \\
    w &\leftarrow w - \eta\, \frac{\partial L}{\partial (m \odot w)}

The derivative of :math:`m \odot w` with respect to :math:`w` is taken as 1 everywhere, the *straight-through
estimator*: a weight that is left out is moved by the gradient that it would have had if it were there, and enters when
it has become large. The decay of the optimizer acts on all weights.

K is a count for each tensor, one for the whole model, or N of each M consecutive weights of a row
(:mod:`refimpl.methods.nm`). S = B = everything, dense; A is renewed after every step.

Source: Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons for conditional
computation", arXiv:1308.3432, for the estimator; magnitude pruning with it as in Lee, Vladymyrov et al., "JaxPruner: a
concise library for sparsity research", 2023. :mod:`refimpl.methods.dpf` is the same with rarer renewals and a schedule.

Deviations
----------
- A belongs to the weights after a step and is kept until the next, so that evaluation by averaged weights uses the same
  entries; a program that masks within its forward pass chooses them from the averages.
- Of equal magnitudes the lower position is used.
- With a pattern the tensors that take part have its density N/M; an allocation can only fix others at 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Group, Scope, counts_of, groups_of, require_scope
from refimpl.methods.hidden import Hidden, largest
from refimpl.methods.nm import Pattern, check_nm, nm_flat, require_pattern
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.support import Support


class STE(Hidden):
    """Magnitude pruning by the straight-through estimator; see the module.

    Parameters
    ----------
    allocation : Allocation or None
        How many entries of each tensor, or of the model, are used. With a pattern, None or one whose density is N/M and
        that fixes nothing but tensors at 1, which stay dense.
    scope : {"local", "global"}
        Whether each pool of the conventions (each tensor) has its count, or all together.
    pattern : tuple of int, optional
        (N, M): N of each M consecutive weights of a row are used.
    conventions : Conventions
        Of which the allocation's and ``pool`` are read.

    Raises
    ------
    ValueError
        If scope or pattern is none of those there are, or the pattern does not agree with the allocation.
    """

    name = "ste"

    def __init__(
        self,
        allocation: Allocation | None,
        *,
        scope: Scope = "local",
        pattern: Pattern | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(conventions)
        require_scope(scope, allocation)
        if pattern is None and allocation is None:
            raise ValueError("STE needs to know how many weights to use; give an allocation or a pattern N:M")
        self.allocation = allocation
        self.scope = scope
        self.pattern = None if pattern is None else _agreed(pattern, allocation, scope)
        self.groups: list[Group] = []
        self.patterned: list[str] = []

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember which tensors are restricted; return no support, for everything stays stored."""
        self.forget()
        self.groups, self.patterned = [], []
        if self.pattern is None:
            assert self.allocation is not None
            self.groups = groups_of(specs, self.allocation, self.scope, self.conventions)
            counts_of(self.groups, self.conventions)  # refuses what would end up empty
        elif self.pattern[0] < self.pattern[1]:
            fixed = self.allocation.fixed if self.allocation else {}
            self.patterned = [name for name, spec in specs.items() if spec.prunable and name not in fixed]
            for name in self.patterned:
                check_nm(specs[name].shape, *self.pattern, name)
        return {}

    def choose(self, params: Params, step: int) -> dict[str, tuple[np.ndarray, ...]]:
        """Return the places of the largest weights."""
        found: dict[str, tuple[np.ndarray, ...]] = {
            name: (flat,) for name, flat in largest(self, self.groups, params).items()
        }
        for name in self.patterned:
            assert self.pattern is not None
            found[name] = (nm_flat(self.magnitudes(name, params), *self.pattern),)
        return found

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Return True after every step: A is renewed."""
        return not epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Return the restricted tensors and their counts."""
        return super().state_dict() | {
            "groups": [group.as_json() for group in self.groups],
            "patterned": list(self.patterned),
        }

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the restricted tensors and A."""
        self.groups = [Group.from_json(saved) for saved in state["groups"]]
        self.patterned = list(state["patterned"])
        super().load_state_dict(state, arrays)


def _agreed(pattern: Pattern, allocation: Allocation | None, scope: str) -> Pattern:
    """Return the pattern, after checking that nothing else asks for another density."""
    n, m = pattern
    require_pattern(n, m)
    if scope == "global":
        raise ValueError(f"the pattern {n}:{m} holds within each row, so there is no global count; leave the scope out")
    if allocation is not None:
        if allocation.rule != "uniform" or not np.isclose(allocation.density, n / m, rtol=1e-9):
            raise ValueError(
                f"the pattern {n}:{m} has density {n / m:g} in every tensor, but the allocation asks for "
                f"{allocation.density:g} by the rule {allocation.rule!r}; give that density with the rule 'uniform'"
            )
        for name, density in allocation.fixed.items():
            if density != 1:
                raise ValueError(
                    f"the pattern {n}:{m} leaves {name} no density of its own, but the allocation fixes "
                    f"{density:g}; fix it at 1 to leave it dense, or not at all"
                )
    return n, m
