"""One exchange on anyone's dense arrays and masks: a pure function for framework authors.

It runs the same rules as the methods, on pictures of supports. Everything that a framework draws by itself
can be handed in, so that two programs can be compared without sharing a random generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import Criterion, by_magnitude
from refimpl.methods.exchange import Grower, Growth, by_gradient, count_stored, propose
from refimpl.methods.grow import grow_random
from refimpl.methods.pools import pools_of
from refimpl.weights.carry import CarryRule
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support


@dataclass(frozen=True)
class MaskExchange:
    """What one exchange made of a dense array and its mask; all arrays have the weight's shape.

    Attributes
    ----------
    mask : ndarray of bool
        The new mask.
    weights : ndarray
        The new weights, 0 outside the mask.
    slots : dict of str to ndarray
        The optimizer's arrays, carried across, 0 outside the mask.
    dropped, grown : ndarray of bool
        What the criterion took out and what growth put in; an entry in both was regrown.
    """

    mask: np.ndarray
    weights: np.ndarray
    dropped: np.ndarray
    grown: np.ndarray
    slots: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def regrown(self) -> np.ndarray:
        """Entries that were dropped and grown back."""
        return self.dropped & self.grown


class ArrayGradient:
    """A gradient that is there as a dense array.

    Parameters
    ----------
    array : ndarray
        The gradient, of the weight's shape.
    block_rows : int
        Rows that :meth:`blocks` hands out at a time.
    """

    def __init__(self, array: np.ndarray, block_rows: int = 1 << 30) -> None:
        self.array = array
        self.shape = array.shape
        self.block_rows = block_rows

    def on(self, support: Support) -> np.ndarray:
        """Return the entries on a support, in its order."""
        return self.array.reshape(-1)[support.flat]

    def dense(self) -> np.ndarray:
        """Return the array itself."""
        return self.array

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ``(row slice, block)``, rows ascending; a block is valid until the next is asked for."""
        matrix = self.array.reshape(self.shape[0], -1)
        for start in range(0, matrix.shape[0], self.block_rows):
            rows = slice(start, min(start + self.block_rows, matrix.shape[0]))
            block = matrix[rows].copy()
            yield rows, block
            block.fill(np.nan)  # whoever kept the buffer finds out


def exchange_masks(
    weights: np.ndarray,
    mask: np.ndarray,
    *,
    drop_fraction: float,
    conventions: Conventions = DEFAULT,
    drop: Criterion = by_magnitude,
    gradient: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
    ranks: np.ndarray | Sequence[np.ndarray] | None = None,
    uniforms: np.ndarray | None = None,
    blocks: Mapping[str, slice] | None = None,
    initial_nnz: int | Mapping[str, int] | None = None,
    slots: Mapping[str, np.ndarray] | None = None,
    slot_rules: Mapping[str, CarryRule] | None = None,
) -> MaskExchange:
    """Drop and grow connections of one masked dense array.

    Growth is by gradient if ``gradient`` is given, and otherwise at random: from ``uniforms``, ``ranks`` or
    ``rng``.

    Parameters
    ----------
    weights : ndarray
        The weight; what it holds outside the mask is not read.
    mask : ndarray of bool (or of zeros and ones), same shape
        What exists.
    drop_fraction : float
        Of the existing entries of each pool.
    conventions : Conventions
        Rounding, ties, pool, target, eligibility, value of the grown.
    drop : callable
        The drop criterion, by default by magnitude.
    gradient : ndarray, same shape
        Full gradient of the loss with respect to the masked weight.
    rng : numpy.random.Generator
        Source of the draws.
    ranks : ndarray of int, or one for each block
        For each grown entry its rank among the places that are free after the drop, in row-major order from
        0.
    uniforms : ndarray, same shape
        Numbers in [0, 1) for Bernoulli growth: a free place grows if its number is below (wanted / free
        places).
    blocks : mapping of str to slice
        Row ranges of the gates, for the pool ``"gate"``.
    initial_nnz : int, or mapping of block to int
        Entries before the first exchange ever, for the growth target ``"initial"``; by default those of
        ``mask``.
    slots : mapping of str to ndarray
        Optimizer arrays of the weight's shape.
    slot_rules : mapping of str to CarryRule
        What grown and regrown entries of a slot get; by default 0, and for regrown ones what ``regrow`` says
        of the value.

    Returns
    -------
    MaskExchange
        New arrays; the arguments are unchanged.

    Raises
    ------
    ValueError
        If shapes differ, the drop fraction is outside [0, 1], the pool is ``"layer"``, free places run short,
        or a score is NaN.
    """
    weights, mask = np.asarray(weights), np.asarray(mask)
    slots, slot_rules = dict(slots or {}), dict(slot_rules or {})
    arrays = {"mask": mask, "gradient": gradient, "uniforms": uniforms, **slots}
    for name, array in arrays.items():
        if array is not None and np.shape(array) != weights.shape:
            raise ValueError(
                f"{name} has shape {np.shape(array)} but the weight has {weights.shape}; give the same shape"
            )
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"the drop fraction is {drop_fraction}; give a number from 0 to 1")
    if conventions.pool == "layer":
        raise ValueError(
            "the pool 'layer' spans several tensors; use a method's exchange, or the pool 'matrix' or 'gate' here"
        )

    weight = SparseWeight.from_dense(weights, Support.from_mask(mask))
    spec = ParamSpec("weight", weights.shape, "linear", prunable=True, blocks=dict(blocks or {}))
    pools = pools_of({"weight": spec}, ["weight"], conventions.pool)
    first = {pool.label: count_stored(pool, {"weight": weight.support.flat}) for pool in pools}
    if isinstance(initial_nnz, Mapping):
        first = {pool.label: initial_nnz[pool.label[len("weight[") : -1]] for pool in pools}
    elif initial_nnz is not None:
        if len(pools) > 1:
            raise ValueError("with several blocks initial_nnz must map each block to its count")
        first = {pools[0].label: initial_nnz}

    grow: Grower
    if gradient is not None:
        grow = by_gradient({"weight": ArrayGradient(np.asarray(gradient))})
    elif uniforms is not None:
        grow = _by_uniforms(np.asarray(uniforms).reshape(-1))
    else:
        grow = _by_draws(rng, ranks, conventions)
    exchange = propose(
        {"weight": weight},
        pools,
        fraction=drop_fraction,
        drop=drop,
        grow=grow,
        conventions=conventions,
        initial_nnz=first,
    )["weight"]

    def picture(aligned: np.ndarray, rule: CarryRule) -> np.ndarray:
        return SparseWeight(exchange.new, exchange.carry(aligned, rule)).dense()

    slot_rule = CarryRule(regrown=conventions.regrown)
    return MaskExchange(
        mask=exchange.new.mask(),
        weights=picture(weight.values, conventions.value_rule),
        dropped=Support(weights.shape, exchange.dropped).mask(),
        grown=Support(weights.shape, exchange.grown).mask(),
        slots={
            name: picture(array.reshape(-1)[weight.support.flat], slot_rules.get(name, slot_rule))
            for name, array in slots.items()
        },
    )


def _by_uniforms(uniforms: np.ndarray) -> Grower:
    def grow(growths: Sequence[Growth]) -> list[np.ndarray]:
        out = []
        for g in growths:
            places = g.candidates.at(np.arange(g.candidates.count))
            start = g.pool.segments[0].start
            out.append(places[uniforms[places + start] < g.want / max(places.size, 1)])
        return out

    return grow


def _by_draws(
    rng: np.random.Generator | None, ranks: np.ndarray | Sequence[np.ndarray] | None, conventions: Conventions
) -> Grower:
    def grow(growths: Sequence[Growth]) -> list[np.ndarray]:
        each: Sequence[np.ndarray | None]
        if ranks is None:
            each = [None] * len(growths)
        elif len(growths) == 1 and np.ndim(ranks[0] if len(ranks) else 0) == 0:
            each = [np.asarray(ranks)]
        else:
            each = [np.asarray(block) for block in ranks]
        if len(each) != len(growths):
            raise ValueError(
                f"there are ranks for {len(each)} blocks but there are {len(growths)} blocks; give one array for each"
            )
        return [
            grow_random(g.candidates, g.want, rng, count=conventions.growth_count, ranks=drawn)
            for g, drawn in zip(growths, each)
        ]

    return grow
