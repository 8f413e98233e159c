r"""ITOP, in-time over-parametrization: explore many places while training, few at a time.

Not another rule of exchange but a way to choose its schedule: what counts is the fraction :math:`R_s` of places that
were active at some time (:mod:`refimpl.methods.exploration`), and that each stays long enough to be trained. Every
:math:`\Delta T` steps, in each tensor with n entries stored:

.. math::
    k &= \mathrm{round}(f(t)\,n), \qquad
    f(t) = f_{\min} + (f_0 - f_{\min})\,\tfrac12\bigl(1 + \cos(\pi t / T)\bigr), \quad f_{\min} = 0.005 \\
    D &= \text{the } k \text{ entries of } S \text{ with the smallest } |w| \\
    G &= k \text{ places outside } S \setminus D, \qquad S \leftarrow (S \setminus D) \cup G

The places of G are drawn uniformly (*random*), are those of the largest :math:`|\partial L/\partial w|` (*gradient*),
or are drawn among those that were never active, and among the others when these have run out (*random-unfired*).
There is no end of the exchanges before the end of training. S = A = B; growth by gradient looks at all places at an
exchange, in blocks.

Memory is O(n), and for *random-unfired* one bit for each place, active or not.

Source: Liu, Yin, Mocanu, Pechenizkiy, "Do we actually need dense over-parameterization? In-time over-parameterization
in sparse training", ICML 2021, section 3.

Deviations
----------
- Counts are exact, and of equal magnitudes the lower position survives. The authors' program drops all that lie at or
  below the last dropped magnitude, draws random growth by a coin for each place, and may grow fewer by gradient than it
  dropped.
- Its growth by momentum explores next to nothing, because the momentum is masked in every step; for growth by a true
  dense momentum see :mod:`refimpl.methods.snfs`.
- Growth by gradient takes the place of the optimizer's step, as in RigL (convention ``exchange_step``); the authors'
  program takes the step first and then grows by the gradient from before it.
- A place that is dropped and grown at once keeps its value (convention ``regrow``), as in that program. It was active
  before, so that *random-unfired* draws it only when no place is left that never was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import by_magnitude
from refimpl.methods.dropgrow import DropAndGrow
from refimpl.methods.exchange import Grower, Growth, at_random, by_gradient
from refimpl.methods.exploration import Explored
from refimpl.methods.grow import Candidates, draw_ranks
from refimpl.methods.pools import Pool
from refimpl.methods.schedule import Cosine, EverySteps, Fraction
from refimpl.rng import generator
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import support_of
from refimpl.weights.support import Support

if TYPE_CHECKING:
    from refimpl.weights.gradient import Gradient

GrowthRule = Literal["random", "gradient", "random-unfired"]


class ITOP(DropAndGrow):
    """ITOP; see the module.

    Parameters
    ----------
    allocation : Allocation
        How many entries each tensor stores.
    drop_fraction : callable or float
        f(t); a number is f₀ of the cosine.
    total_steps : int
        T, the training steps of the whole run.
    interval : int
        ΔT, in training steps. The paper's advice is a large one.
    growth : {"random", "gradient", "random-unfired"}
        Which places grow.
    conventions : Conventions
        The choices that the paper leaves open.

    Raises
    ------
    ValueError
        If the growth rule is unknown.
    """

    name = "itop"

    def __init__(
        self,
        allocation: Allocation,
        drop_fraction: Fraction | float,
        *,
        total_steps: int,
        interval: int,
        growth: GrowthRule = "random",
        conventions: Conventions = DEFAULT,
    ) -> None:
        if growth not in get_args(GrowthRule):
            raise ValueError(f"the growth rule of ITOP is {growth!r}; give 'random', 'gradient' or 'random-unfired'")
        if not callable(drop_fraction):
            drop_fraction = Cosine(drop_fraction, total_steps, floor=0.005)
        super().__init__(allocation, drop_fraction, EverySteps(interval), conventions)
        self.growth = growth
        self.explored = Explored()

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Draw the supports; nothing but they has been explored."""
        self.explored = Explored()
        return super().supports(specs, seed=seed)

    def needs_gradient(self, step: int) -> bool:
        """Tell whether growth by gradient is due at this step."""
        return self.growth == "gradient" and self.exchange_due(step=step, epoch_end=False)

    def exchange(
        self, params: Params, *, step: int, seed: int, gradients: Mapping[str, Gradient] | None = None
    ) -> dict[str, Exchange]:
        """Drop the smallest weights, and grow as many by the growth rule."""
        if self.growth == "gradient":
            grow = by_gradient(gradients)
        elif self.growth == "random":
            grow = at_random(seed, step, self.conventions)
        else:
            # What is active now was so since the last exchange; to record it twice changes nothing.
            for name in {segment.name: None for pool in self.pools for segment in pool.segments}:
                self.explored.update(name, support_of(params[name]))
            grow = unexplored_first(self.explored, seed, step, self.conventions)
        return self.propose(params, step, drop=by_magnitude, grow=grow)

    def state_dict(self) -> dict[str, Any]:
        """Return the pools, their counts, and the sizes of the tensors whose places are remembered."""
        return super().state_dict() | {"explored": self.explored.state_dict()}

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return one bit for each place that was ever active, for growth "random-unfired"."""
        return self.explored.state_arrays()

    def load_state_dict(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Take up the pools, the counts and the places that were active."""
        super().load_state_dict(state, arrays)
        self.explored = Explored()
        self.explored.load_state_dict(state["explored"], arrays)


def unexplored_first(explored: Explored, seed: int, step: int, conventions: Conventions) -> Grower:
    """Grow uniformly among the places that were never active; if they are too few, all of them and others."""

    def grow(growths: Sequence[Growth]) -> list[np.ndarray]:
        return [choose(g, generator(seed, f"grow/{g.pool.label}", step)) for g in growths]

    def choose(g: Growth, rng: np.random.Generator) -> np.ndarray:
        g.candidates.require(g.want)
        nothing = np.empty(0, np.int64)
        never = Candidates(sum(_never(explored, g.pool)), nothing)  # all of them are free: what is stored was active
        if g.want <= never.count:
            return _places(explored, g.pool, draw_ranks(never, g.want, rng, conventions.growth_count))
        first = _places(explored, g.pool, np.arange(never.count))
        others = Candidates(g.pool.size, np.union1d(g.candidates.taken, first))
        return np.union1d(first, others.at(draw_ranks(others, g.want - never.count, rng, conventions.growth_count)))

    return grow


def _never(explored: Explored, pool: Pool) -> list[int]:
    """Return how many places of each segment were never active."""
    return [s.stop - s.start - explored.count(s.name, s.start, s.stop) for s in pool.segments]


def _places(explored: Explored, pool: Pool, ranks: np.ndarray) -> np.ndarray:
    """Return the places in the pool of ascending ranks among those that were never active."""
    found, before = [], 0
    for segment, count in zip(pool.segments, _never(explored, pool)):
        low, high = np.searchsorted(ranks, [before, before + count])
        flat = explored.unexplored(segment.name, segment.start, segment.stop, ranks[low:high] - before)
        found.append(flat + (segment.offset - segment.start))
        before += count
    return np.concatenate(found)
