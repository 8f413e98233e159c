r"""One exchange on dense arrays, written out: what a program does that edits a mask.

With the mask :math:`m`, its :math:`n_1` entries and the drop fraction :math:`f`:

.. math::
    m' &= \text{the } n_1 - k \text{ entries with the largest } |m \odot w|, \qquad k = \mathrm{round}(f n_1) \\
    g &= \text{the } R \text{ entries outside } m' \text{ with the largest score, or drawn} \\
    m &\leftarrow m' \cup g

Nothing here is sparse. Where both can follow the conventions, this and the exchange of truly sparse weights are the
same function, which is a test; beyond that this one ranks absent entries, adds noise, and revives stale values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.methods.conventions import Conventions, kept_after, stored_again, stored_at
from refimpl.methods.drop import by_magnitude
from refimpl.methods.grow import Candidates, grow_random
from refimpl.methods.onestep.ranking import best, refuse_nan
from refimpl.methods.onestep.result import Fate
from refimpl.weights.carry import CarryRule

MOMENTA = ("momentum_buffer", "momentum", "trace")
FIRST_MOMENTS = ("exp_avg", "mu")
SECOND_MOMENTS = ("exp_avg_sq", "nu")


@dataclass(frozen=True)
class Inputs:
    """All that one exchange reads, flat; see :func:`~refimpl.methods.onestep.exchange_masks`."""

    weights: np.ndarray
    mask: np.ndarray
    fraction: float
    criterion: Callable[..., np.ndarray]
    score: np.ndarray | None
    sparsity: float | None
    initial_nnz: int | None
    want: int | None
    rng: np.random.Generator | None
    ranks: np.ndarray | None
    uniforms: np.ndarray | None
    noise: np.ndarray | None
    fresh: np.ndarray | None
    drop_order: np.ndarray | None
    growth_order: np.ndarray | None
    slots: Mapping[str, np.ndarray]
    slot_rules: Mapping[str, CarryRule]


@dataclass(frozen=True)
class Outcome:
    """What one exchange made, flat."""

    mask: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    grown: np.ndarray
    fate: np.ndarray
    slots: dict[str, np.ndarray]


def exchange(given: Inputs, c: Conventions) -> Outcome:
    """Drop, grow, and fill in values and slots."""
    kept, tied = survivors(given, c)
    new, grown = growth(given, kept, wanted(given, int(np.count_nonzero(kept)), c), c)
    fate = fates(given, kept, tied, new, grown, c)
    weights = values(given, new, grown, c)
    return Outcome(new, weights, kept, grown, fate, slots(given, new, grown, weights, c))


def survivors(given: Inputs, c: Conventions) -> tuple[np.ndarray, np.ndarray]:
    """Flag the entries that survive the drop, and those that went though they tied with the last to stay."""
    w, mask = given.weights, given.mask
    none = np.zeros(mask.size, bool)
    refuse_nan(w[mask], "a weight")
    if given.criterion is not by_magnitude:
        sized = {"size": mask.size} if c.drop_of in ("kept-of-density", "kept-of-sparsity") else {}
        kept = mask.copy()
        kept[np.flatnonzero(mask)[given.criterion(w[mask], given.fraction, c, **sized)]] = False
        return kept, none
    n1 = int(np.count_nonzero(mask))
    least = int(c.kept_minimum == "one")
    stays = kept_after(n1, given.fraction, c, size=mask.size, sparsity=given.sparsity, minimum=least)
    magnitude = np.abs(np.where(mask, w, 0))
    if c.drop_ties == "threshold":
        if stays == n1:
            return (mask & (w != 0) if c.drop_none == "zeros" else mask.copy()), none
        # Counted over the whole array, whose absent entries are the smallest: n0 + k of them are to go.
        threshold = np.sort(magnitude)[mask.size - stays - 1]
        kept = mask & (magnitude > threshold)
        excess = stays - int(np.count_nonzero(kept))
        return kept, mask & (magnitude == threshold) if excess else none
    score, among = magnitude, None if c.drop_scope == "all" else mask
    if c.drop_noise != "none":
        score = magnitude + noise_of(given)
    kept = best(score, stays, given.drop_order, among)
    last = score[kept].min() if stays else np.inf
    return kept, mask & ~kept & (score == last)


def noise_of(given: Inputs) -> np.ndarray:
    """Return the noise on the magnitudes, in their precision."""
    if given.noise is not None:
        return given.noise.astype(given.weights.dtype)
    if given.rng is None:
        raise ValueError("the conventions add noise to the magnitudes; give noise, an array, or rng")
    return (1e-5 * given.rng.standard_normal(given.mask.size)).astype(given.weights.dtype)


def wanted(given: Inputs, kept: int, c: Conventions) -> int:
    """Return how many places are to grow."""
    if given.want is not None:
        return given.want
    stored, size = int(np.count_nonzero(given.mask)), given.mask.size
    target = stored
    if c.growth_target == "density":
        target = stored_again(stored, size, c)
    elif c.growth_target == "initial" and given.initial_nnz is not None:
        target = given.initial_nnz
    elif c.growth_target == "initial" and given.sparsity is not None:
        target = stored_at(size, given.sparsity, c)
    return max(0, target - kept)


def growth(given: Inputs, kept: np.ndarray, want: int, c: Conventions) -> tuple[np.ndarray, np.ndarray]:
    """Return the new mask, and the entries that growth put into it."""
    taken = kept | given.mask if c.regrow == "forbid" else kept
    free = ~taken
    candidates = Candidates(free.size, np.flatnonzero(taken))
    if given.score is None:
        grown = drawn(given, candidates, free, want, c)
        return kept | grown, grown
    score = np.abs(given.score)
    refuse_nan(score[free], "a gradient")
    if c.growth_ranking == "masked":
        grown = best(score * free, want, given.growth_order) & free
    elif c.growth_ranking == "raised":
        candidates.require(want)
        raised = np.where(taken, score.max() + score.dtype.type(1e-5), score) if score.size else score
        new = best(raised, int(np.count_nonzero(taken)) + want, given.growth_order)
        new &= kept | free
        return new, new & free
    else:
        candidates.require(want)
        grown = best(score, want, given.growth_order, free)
    return kept | grown, grown


def drawn(given: Inputs, candidates: Candidates, free: np.ndarray, want: int, c: Conventions) -> np.ndarray:
    """Flag places that grow by draws: ranks among the free ones, numbers in [0, 1), or a generator's."""
    grown = np.zeros(free.size, bool)
    if given.uniforms is not None and given.ranks is None:
        if c.growth_count == "bernoulli":  # a probability above 1 grows all
            return free & (given.uniforms < want / max(candidates.count, 1))
        candidates.require(want)
        return best(given.uniforms, want, given.growth_order, free)
    grown[grow_random(candidates, want, given.rng, count=c.growth_count, ranks=given.ranks)] = True
    return grown


def fates(
    given: Inputs, kept: np.ndarray, tied: np.ndarray, new: np.ndarray, grown: np.ndarray, c: Conventions
) -> np.ndarray:
    """Say of each entry what happened to it."""
    mask = given.mask
    fate = np.full(mask.size, Fate.ABSENT, np.int8)
    fate[mask & ~kept] = Fate.DROPPED
    fate[tied] = Fate.DROPPED_TIED
    fate[kept & mask] = Fate.KEPT
    fate[kept & ~mask] = Fate.KEPT_THOUGH_ABSENT
    fate[kept & ~new] = Fate.DISPLACED
    fate[grown] = Fate.GROWN_BY_DRAW if given.score is None else Fate.GROWN_BY_SCORE
    if c.grown_from == "stored":
        fate[grown & ~mask] = Fate.GROWN_STALE
    fate[grown & mask] = Fate.REGROWN if c.regrow == "keep" else Fate.REGROWN_ANEW
    return fate


def values(given: Inputs, new: np.ndarray, grown: np.ndarray, c: Conventions) -> np.ndarray:
    """Return the new weights."""
    w = given.weights.copy()
    anew = grown if c.regrow == "reset" else grown & ~given.mask
    if c.grown_from == "constant":
        w[anew] = c.grown_value
    elif c.grown_from == "normal-0.1":
        if given.fresh is None and given.rng is None:
            raise ValueError(
                "the conventions draw the value of what grows; give fresh, standard normal numbers, or rng"
            )
        fresh = given.fresh if given.rng is None or given.fresh is not None else given.rng.standard_normal(w.size)
        assert fresh is not None
        w[anew] = (fresh / 10)[anew]
    if c.inactive_values == "absent":
        w[~new] = 0
    return w


def slots(
    given: Inputs, new: np.ndarray, grown: np.ndarray, weights: np.ndarray, c: Conventions
) -> dict[str, np.ndarray]:
    """Carry the optimizer's arrays across."""
    masked = {
        "none": (),
        "momentum": MOMENTA,
        "first-moments": MOMENTA + FIRST_MOMENTS,
        "momentum-and-adam": MOMENTA + FIRST_MOMENTS + SECOND_MOMENTS,
        "all": tuple(given.slots),
    }[c.slot_masked]
    out = {}
    for name, array in given.slots.items():
        rule = given.slot_rules.get(name, CarryRule(regrown=c.regrown))
        slot = array.copy()
        if c.grown_slot == "zero":
            slot[new & ~given.mask] = rule.grown
        if rule.regrown == "reset":
            slot[grown & given.mask] = rule.grown
        if name in masked:
            slot[~new if c.slot_mask == "mask" else ~new | (weights == 0)] = 0
        out[name] = slot
    return out
