r"""One-shot magnitude pruning: train dense, take away the smallest weights once, train what is left.

After step :math:`t_1`, for each tensor, or for all together, with n entries and density ρ:

.. math:: S \leftarrow \text{the } \mathrm{round}(\rho\,n) \text{ entries of largest } |w|

Before, everything is stored and used; after, :math:`S = A = B` is fixed. With a pattern N:M, the N largest of each M
consecutive entries of a row stay instead (of a convolution's, input channels innermost).

Source: Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks", NeurIPS 2015,
section 3, in its simplest form: one pruning, one threshold.

Deviations
----------
- The paper sets a threshold for each layer from the standard deviation of its weights; here a stated count stays.
- Of equal magnitudes the lower places stay. Implementations that compare with a threshold let all ties live or die.
- Optimizer state of the weights that stay goes on as it is; the learning rate is not restarted.
- A pattern is not in the paper; its groups are those of SR-STE, see :mod:`refimpl.methods.nm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.groups import Scope, groups_of, take_out
from refimpl.methods.nm import Pattern, check_nm, nm_flat, require_pattern
from refimpl.methods.pruning import Pruning, prune
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, Weight

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient
    from refimpl.weights.support import Support


class OneShot(Pruning):
    """One-shot magnitude pruning; see the module.

    Parameters
    ----------
    allocation : Allocation
        How dense the model is after the pruning.
    at_step : int
        t₁: the training step after which it is pruned.
    scope : {"local", "global"}
        Whether each tensor is ranked by itself or all together.
    pattern : tuple of int, optional
        (N, M): N of each M consecutive entries of a row stay. The densities of the allocation must be N/M, or 1.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If the step is below 1, the pattern impossible or together with the scope *global*; in ``supports``, if the
        allocation contradicts the pattern or a tensor's rows are no multiple of M.
    """

    name = "one-shot"

    def __init__(
        self,
        allocation: Allocation,
        *,
        at_step: int,
        scope: Scope = "local",
        pattern: Pattern | None = None,
        conventions: Conventions = DEFAULT,
    ) -> None:
        super().__init__(allocation, scope, conventions)
        if at_step < 1:
            raise ValueError(f"one-shot pruning is to happen after step {at_step}; give a step of at least 1")
        if pattern is not None:
            require_pattern(*pattern)
            if scope == "global":
                raise ValueError(
                    f"the pattern {pattern[0]}:{pattern[1]} fixes how many weights each tensor keeps; give it with "
                    "the scope 'local'"
                )
        self.at_step = at_step
        self.pattern = pattern

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Remember who competes; with a pattern, check that it fits the tensors."""
        super().supports(specs, seed=seed)
        if self.pattern is not None:
            # Rows are grouped across whatever the conventions make pools of, so each tensor is one.
            self.groups = groups_of(specs, self.allocation, "local", replace(self.conventions, pool="matrix"))
            for group in self.groups:
                _check_pattern(specs[group.pool.label], group.densities[0], *self.pattern)
        return {}

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether this is the step after which the model is pruned."""
        return not epoch_end and step == self.at_step

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Keep the largest weights."""
        if self.pattern is None:
            return prune(params, self.pools, self.kept(), self.conventions)
        goes = {pool.label: _outside(params[pool.label], self.pattern) for pool in self.pools}
        return take_out(params, self.pools, goes)

    def settled(self, step: int) -> bool:
        """Tell whether the model has been pruned."""
        return step >= self.at_step


def _check_pattern(spec: ParamSpec, density: float, n: int, m: int) -> None:
    if not math.isclose(density, n / m, rel_tol=1e-9):
        raise ValueError(
            f"the pattern {n}:{m} keeps {n / m:.4g} of a tensor, but {spec.name} is to have density {density:.4g}; "
            f"give the density {n / m:.4g}, or fix this tensor's density to 1"
        )
    check_nm(spec.shape, n, m, spec.name)


def _outside(weight: Weight, pattern: Pattern) -> np.ndarray:
    """Return a flag for each stored entry, true for those that are not among the N largest of their group."""
    picture = weight.dense() if isinstance(weight, SparseWeight) else weight
    goes = np.ones(picture.size, bool)
    goes[nm_flat(np.abs(picture), *pattern)] = False
    return goes[weight.support.flat] if isinstance(weight, SparseWeight) else goes
