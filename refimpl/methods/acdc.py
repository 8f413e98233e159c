r"""AC/DC, alternating compressed and decompressed training: top-k projection at phase boundaries, nothing in between.

.. math::
    \text{compress:} \quad & S \leftarrow \text{the } k \text{ entries of largest } |w|, \qquad w \leftarrow w_S \\
    \text{decompress:} \quad & S \leftarrow \text{all entries}, \qquad w_i \leftarrow 0 \text{ for those that return},
        \qquad v \leftarrow 0

A run is dense at first, then compressed and dense in turn, and ends compressed; the phases begin with epochs
(:class:`~refimpl.methods.phases.Phases`). Within a phase the optimizer trains what is stored, as it would any network:
:math:`S = A = B` throughout, everything in a dense phase and the support alone in a compressed one. It is iterative
hard thresholding (:mod:`refimpl.methods.iht`) that projects rarely and keeps the support in between. One learning-rate
schedule runs through all phases. The run leaves two models: the sparse one of its end, and the dense one of its last
dense phase.

The k largest are those of all tensors together (scope *global*) or of each (scope *local*, AC/DC's *uniform*), or N of
each M in a row (a pattern). :math:`v` is the optimizer's state, of every parameter, biases included.

Source: Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks",
NeurIPS 2021 (arXiv:2106.12379), section 3; what happens at a switch as in its authors' program.

Deviations
----------
- The count is exact, and of equal magnitudes the lower places stay. The authors' program (``count="strict-threshold"``)
  keeps what is larger than the k-th largest of :math:`|w| + 10^{-4}`, with :math:`k = \lceil n (1 - p) \rceil` and
  1 − p a float: one entry fewer, fewer again where others tie with that one, and one more where n (1 − p) is whole and
  1 − p is rounded up (p = 0.95, 0.98).
- In a compressed phase nothing is remembered of an entry that is not stored. The authors' program keeps its momentum
  under the mask, where it decays by the factor μ a step; as its weights are set to 0 after every step, this is seen
  only without the reset, when what is left moves the entries that return. To have that, the momentum would need a
  support of its own, as large as the weight.
- The reset begins the optimizer anew, its count of steps included. For SGD without dampening this is momentum 0, as in
  the paper; Adam's corrections of its averages, and averaging optimizers, start over too. Under torch 2 the authors'
  program does not reset at all: gradients are None when it looks for them. Other programs reset after the first step of
  the dense phase, or at both kinds of switch.
- A model on the way, from before the last compressed phase, is not taken for the best one, whatever it scores. The
  best of each kind, sparse and dense, is the one with the lowest validation loss; the authors' program goes by the
  highest accuracy, of the test part.
- An entry that returns is 0, and so is its gradient where its unit has no other weight before or after it; it can stay
  0 for some steps, or for good. The program's counts of operations leave such zeros out; here what is stored counts.
- Groups of a pattern lie within a row (:mod:`refimpl.methods.nm`); the authors' program lets them run on into the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.exchange import values_in
from refimpl.methods.groups import Group, Scope, as_given, take_out
from refimpl.methods.nm import Pattern
from refimpl.methods.oneshot import OneShot
from refimpl.methods.phases import Phases
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params
from refimpl.weights.sparse import SparseWeight

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient, Grads
    from refimpl.weights.support import Support

Count = Literal["exact", "strict-threshold"]


class ACDC(OneShot):
    """AC/DC: one-shot pruning at the start of each compressed phase, and back again; see the module.

    Parameters
    ----------
    allocation : Allocation
        How dense the model is in compressed phases.
    phases : Phases
        When it is compressed and decompressed, in epochs.
    epoch_steps : int
        Training steps of an epoch.
    scope : {"global", "local"}
        Whether all tensors are ranked together or each by itself.
    pattern : tuple of int, optional
        (N, M): N of each M consecutive entries of a row stay. Needs the scope *local* and densities of N/M, or 1.
    reset_momentum : bool
        Whether the optimizer begins anew at decompression; False carries the state of the entries that were stored.
    count : {"exact", "strict-threshold"}
        How many entries stay: what the density stands for, or what the authors' program leaves (see *Deviations*). A
        pattern has no need of it.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If ``epoch_steps`` is below 1, the pattern impossible or together with the scope *global*; in ``supports``, if
        the allocation does not fit; in training, if a phase began elsewhere than at the end of an epoch.
    """

    name = "acdc"

    def __init__(
        self,
        allocation: Allocation,
        phases: Phases,
        *,
        epoch_steps: int,
        scope: Scope = "global",
        pattern: Pattern | None = None,
        reset_momentum: bool = True,
        count: Count = "exact",
        conventions: Conventions = DEFAULT,
    ) -> None:
        if epoch_steps < 1:
            raise ValueError(f"an epoch is to have {epoch_steps} steps; give at least 1")
        if count not in ("exact", "strict-threshold"):
            raise ValueError(f"the count is {count!r}; give 'exact', or 'strict-threshold' for the authors' program")
        self.compress_steps = tuple(epoch * epoch_steps for epoch in phases.compress)
        self.decompress_steps = tuple(epoch * epoch_steps for epoch in phases.decompress)
        super().__init__(
            allocation, at_step=self.compress_steps[0], scope=scope, pattern=pattern, conventions=conventions
        )
        self.phases = phases
        self.epoch_steps = epoch_steps
        self.reset_momentum = reset_momentum
        self.count = count
        self.is_compressed = False

    def compressed(self, step: int) -> bool:
        """Tell whether the training step after ``step`` lies in a compressed phase."""
        return self.phases.compressed(step // self.epoch_steps)

    def observe(self, params: Params, grads: Grads, *, step: int) -> None:
        """Refuse to train on where the beginning of a phase was missed."""
        if self.groups and self.is_compressed != self.compressed(step - 1):
            kind = "a dense" if self.is_compressed else "a compressed"
            raise ValueError(
                f"step {step} lies in {kind} phase, whose beginning was not the end of an epoch; give the true number "
                f"of steps of an epoch, not {self.epoch_steps}"
            )

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether a phase begins with the next epoch."""
        return epoch_end and (step in self.compress_steps or step in self.decompress_steps)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Keep the largest weights of dense tensors, or give the sparse ones all entries back."""
        self.is_compressed = self.compressed(step)
        weights = {s.name: params[s.name] for pool in self.pools for s in pool.segments}
        if not self.is_compressed:
            return {name: _everything(w.support) for name, w in weights.items() if isinstance(w, SparseWeight)}
        if self.count == "exact" or self.pattern is not None:
            return super().exchange(params, step=step, seed=seed)
        goes = {g.pool.label: under_threshold(values_in(g.pool, weights), rank_of(g)) for g in self.groups}
        return take_out(weights, self.pools, goes)

    def forgets(self, step: int) -> bool:
        """Tell whether the model was made dense after this step, and the optimizer is to begin anew."""
        return self.reset_momentum and step in self.decompress_steps

    def kept(self, at: Callable[[float], float] = as_given) -> dict[str, int]:
        """Return how many entries each pool keeps, by label; ties at a strict threshold make it fewer."""
        if self.count == "exact" or self.pattern is not None:
            return super().kept(at)
        whole = {g.pool.label: g.pool.size for g in self.groups if all(at(d) == 1 for d in g.densities)}
        return {g.pool.label: rank_of(g, at) - 1 for g in self.groups} | whole

    def settled(self, step: int) -> bool:
        """Tell whether the model of this step is one of the last compressed phase."""
        return not self.groups or step > self.compress_steps[-1]

    def dense_twin(self, step: int) -> bool:
        """Tell whether this step was one of a dense phase; the warm-up counts, as in the authors' program."""
        return bool(self.groups) and not self.compressed(step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the pools and densities, and what phase it is."""
        return {**super().state_dict(), "compressed": self.is_compressed}

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools and densities, and the phase."""
        super().load_state_dict(state, arrays)
        self.is_compressed = bool(state["compressed"])


def rank_of(group: Group, at: Callable[[float], float] = as_given) -> int:
    r"""Return :math:`k = \lceil n (1 - p) \rceil`, computed in floats; 1 − p is ``at(d)`` of the group's density d."""
    sizes = [segment.stop - segment.start for segment in group.pool.segments]
    return sum(
        math.ceil(sum(n for n, d in zip(sizes, group.densities, strict=True) if d == density) * at(density))
        for density in set(group.densities)
    )


def under_threshold(values: np.ndarray, k: int) -> np.ndarray:
    r"""Return a flag for each weight, true for those that the rule of AC/DC's authors takes away.

    With :math:`s = |w| + 10^{-4}` in the type of the weights, :math:`s \le` the k-th largest of s goes: k − 1 weights
    stay, fewer where others tie with the k-th.

    Parameters
    ----------
    values : ndarray, shape (n,)
    k : int
        ``1 <= k <= n``.

    Raises
    ------
    ValueError
        If a weight is NaN.
    """
    score = np.abs(values) + values.dtype.type(1e-4)
    threshold = np.partition(score, values.size - k)[values.size - k]
    if np.isnan(score.max()):
        raise ValueError("a weight to be ranked is NaN; training has diverged, so lower the learning rate")
    return score <= threshold


def _everything(support: Support) -> Exchange:
    """Return the exchange that stores all entries."""
    free = np.arange(support.size - support.nnz, dtype=np.int64)
    return Exchange.moving(support, np.zeros(support.nnz, bool), free, ranked=True)
