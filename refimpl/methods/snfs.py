r"""SNFS, sparse networks from scratch: sparse momentum says which tensors and which places grow.

A dense momentum follows the gradient of all places, stored or not, in each step:

.. math:: M_l \leftarrow \beta M_l + (1 - \beta)\,\partial L / \partial W_l

At an exchange, with :math:`n_l` entries stored in tensor l, of :math:`N_l` places:

.. math::
    s_l &= \operatorname{mean}_{p \in S_l} |M_{l,p}| \Big/ \sum_m \operatorname{mean}_{p \in S_m} |M_{m,p}| \\
    D_l &= \text{the } \mathrm{round}(f(t)\,n_l) \text{ entries of } S_l \text{ with the smallest } |w| \\
    G_l &= \text{the } s_l \textstyle\sum_m |D_m| \text{ places outside } S_l \setminus D_l
        \text{ with the largest } |M_l|

and new connections start at 0. What a tensor has no room for is shared among the others. The sum of all counts stays
exactly the same. S = A, but B is everything: the method needs the dense gradient in each step and stores M densely, by
design. It adds each gradient block by block, and makes no other dense array.

Source: Dettmers, Zettlemoyer, "Sparse networks from scratch: faster training without losing performance",
arXiv:1907.04840, section 3.

Deviations
----------
- M belongs to the method, whatever the optimizer is; the authors' program takes the momentum of SGD, or Adam's moments.
  The factor :math:`1 - \beta` cancels from shares and ranks.
- The shares are those of the stored entries before the drop. If all of them are 0, the free places stand in for them.
- Shares become counts that add up to what was dropped (:mod:`refimpl.methods.shares`). In the authors' program the
  count is rounded down, corrected over later exchanges, and dropped entries of a nearly dense tensor are limited.
- Only places that are not kept can grow. In public programs that mask scores by zeroing them, places whose momentum is
  0 tie with the stored ones, growth lands on connections that are there already, and the count decays; others mask the
  momentum itself in each step, so that only what was stored is known of it, and hardly anything new is found. Both are
  defects, and not reproduced.
- There is an exchange at the end of each epoch, as in the paper, or every so many steps, after the optimizer's step
  (convention ``exchange_step`` is not read). A place dropped and grown at once keeps its value (``regrow``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import by_gradient, move, values_in
from refimpl.methods.schedule import EveryEpoch, EverySteps, Fraction, over_the_run
from refimpl.methods.shares import share_out
from refimpl.weights.carry import Exchange
from refimpl.weights.gradient import Gradient, Grads
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, support_of
from refimpl.weights.support import Support


class SNFS(DropAndGrow):
    """SNFS; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores at the start.
    drop_fraction : callable, or float together with ``total_steps``
        f(t); a number is f₀ of the cosine with the floor 0.005.
    total_steps : int, optional
        Length of that cosine: the training steps of the whole run.
    interval : int, optional
        Training steps between exchanges; None for the end of each epoch.
    decay : float
        β, at least 0 and below 1.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If β is outside its range, or a drop fraction is given as a number without ``total_steps``.
    """

    name = "snfs"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float,
        *,
        total_steps: int | None = None,
        interval: int | None = None,
        decay: float = 0.9,
        conventions: Conventions = DEFAULT,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of SNFS's momentum is {decay}; give a number of at least 0 and below 1")
        when = EveryEpoch() if interval is None else EverySteps(interval)
        super().__init__(allocation, over_the_run(drop_fraction, total_steps), when, conventions)
        self.decay = decay
        self.momentum: dict[str, np.ndarray] = {}  # (rows, columns) of each sparse tensor

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports; there is no momentum yet."""
        self.momentum = {}
        return super().supports(specs, seed=seed)

    @property
    def names(self) -> list[str]:
        """The sparse tensors."""
        return list(dict.fromkeys(segment.name for pool in self.pools for segment in pool.segments))

    def needs_gradient(self, step: int) -> bool:
        """Return True if anything is sparse: the momentum follows the dense gradient in each step."""
        return bool(self.pools)

    def replaces_step(self, step: int) -> bool:
        """Return False: the optimizer takes its step in each of them."""
        return False

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Let the momentum follow the gradient of all places."""
        for name in self.names:
            gradient = grads[name]
            assert not isinstance(gradient, np.ndarray)
            for rows, block in gradient.blocks():
                if name not in self.momentum:
                    columns = int(np.prod(gradient.shape[1:]))
                    self.momentum[name] = np.zeros((gradient.shape[0], columns), block.dtype)
                part = self.momentum[name][rows]
                part *= self.decay
                part += (1 - self.decay) * block.reshape(part.shape)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the smallest weights, share the places out by momentum, and grow where it is largest."""
        for name in self.names:
            if name not in self.momentum:
                raise ValueError(f"SNFS grows {name} by momentum, and there is none yet; call observe in each step")
        fraction, conventions = self.drop_fraction(step), self.conventions
        followed = {name: _on(self.momentum[name], support_of(params[name])) for name in self.names}
        goes, shares, room, missing = {}, [], [], 0
        for pool in self.pools:
            values = values_in(pool, params)
            goes[pool.label] = by_magnitude(values, fraction, conventions, size=pool.size)
            kept = values.size - int(np.count_nonzero(goes[pool.label]))
            missing += (self.initial_nnz[pool.label] if conventions.growth_target == "initial" else values.size) - kept
            room.append(pool.size - (values.size if conventions.regrow == "forbid" else kept))
            shares.append(float(np.abs(values_in(pool, followed)).mean(dtype=np.float64)) if values.size else 0.0)
        counts = share_out(max(0, missing), shares, room)
        return move(
            params,
            self.pools,
            goes=goes,
            want={pool.label: int(count) for pool, count in zip(self.pools, counts, strict=True)},
            grow=by_gradient({name: _Rows(self.momentum[name]) for name in self.names}),
            conventions=conventions,
        )

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return the momentum of each sparse tensor, shape (rows, columns)."""
        return dict(self.momentum)

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools, the counts and the momentum."""
        super().load_state_dict(state, arrays)
        self.momentum = {name: np.array(array) for name, array in (arrays or {}).items()}


def _on(momentum: np.ndarray, support: Support) -> SparseWeight:
    """Return the momentum of the stored entries."""
    return SparseWeight(support, momentum.reshape(-1)[support.flat])


class _Rows:
    """An array that is there, handed out whole: what growth by gradient asks of a gradient."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        self.shape = matrix.shape

    def on(self, support: Support) -> np.ndarray:
        """Return the entries on a support."""
        return self.matrix.reshape(-1)[support.flat]

    def blocks(self) -> Any:
        """Yield all rows at once; nothing is copied."""
        yield slice(0, self.shape[0]), self.matrix

    def dense(self) -> np.ndarray:
        """Return the array."""
        return self.matrix
