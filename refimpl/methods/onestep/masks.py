"""The exchange of one masked array, as anyone's program holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.drop import Criterion, by_magnitude, by_sign
from refimpl.methods.onestep import step
from refimpl.methods.onestep.ranking import same_shapes
from refimpl.methods.onestep.result import MaskExchange
from refimpl.methods.pools import pools_of
from refimpl.weights.carry import CarryRule
from refimpl.weights.parameters import ParamSpec

ExchangeName = Literal["rigl", "set", "random", "snfs", "static"]


def exchange_masks(
    weights: np.ndarray,
    mask: np.ndarray,
    *,
    drop_fraction: float,
    method: ExchangeName | None = None,
    conventions: Conventions = DEFAULT,
    drop: Criterion | None = None,
    gradient: np.ndarray | None = None,
    sparsity: float | None = None,
    initial_nnz: int | Mapping[str, int] | None = None,
    want: int | None = None,
    rng: np.random.Generator | None = None,
    ranks: np.ndarray | Sequence[np.ndarray] | None = None,
    uniforms: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
    tie_order: np.ndarray | Mapping[str, np.ndarray] | None = None,
    blocks: Mapping[str, slice] | None = None,
    slots: Mapping[str, np.ndarray] | None = None,
    slot_rules: Mapping[str, CarryRule] | None = None,
) -> MaskExchange:
    """Drop and grow connections of one masked dense array.

    Whatever a system draws by itself, or leaves to its sort, is an argument.

    Parameters
    ----------
    weights : ndarray
        The weight. What it holds outside the mask is read only where the conventions revive it, or keep it.
    mask : ndarray of bool (or of zeros and ones), same shape
        What exists.
    drop_fraction : float
        Of the existing entries of each pool, from 0 to 1.
    method : {"rigl", "set", "random", "snfs", "static"}, optional
        *rigl*: drop by magnitude, grow by ``gradient``; *set*: drop by the criterion that ``set_criterion`` names, grow
        at random; *random*: drop by magnitude, grow at random; *snfs*: grow by the momentum among ``slots``, or by what
        is given as ``gradient``; *static*: what was there grows back. By default *rigl* with a gradient, otherwise
        *random*.
    conventions : Conventions
        All choices.
    drop : callable, optional
        Another drop criterion.
    gradient : ndarray, same shape
        Full gradient of the loss with respect to the masked weight.
    sparsity : float, optional
        That was asked for, where the conventions return to its count, or count from it.
    initial_nnz : int, or mapping of block to int
        Entries before the first exchange ever, for the growth target ``"initial"``; by default what ``sparsity``
        stands for, or else those of ``mask``.
    want : int, optional
        How many entries of each pool grow, if that was decided elsewhere.
    rng : numpy.random.Generator
        Source of the draws that are not given.
    ranks : ndarray of int, or one for each block
        For each grown entry its rank among the places that are free after the drop, in row-major order from 0.
    uniforms : ndarray, same shape
        Numbers in [0, 1). For Bernoulli growth a free place grows if its number is below (wanted / free places); for
        an exact count those with the largest numbers grow.
    noise : ndarray, same shape
        What ``drop_noise`` adds to the magnitudes.
    fresh : ndarray, same shape
        Standard normal numbers for the values of grown entries.
    tie_order : ndarray, same shape, or mapping of "drop" and "grow" to one each
        Of entries with equal scores the one with the lower number here wins; by default the lower position.
    blocks : mapping of str to slice
        Row ranges of the gates, for the pool ``"gate"``.
    slots : mapping of str to ndarray
        Optimizer arrays of the weight's shape; ``slot_masked`` knows those of PyTorch and Optax by name.
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
        a score is NaN, or something is needed that is not given.
    """
    weights, mask = np.asarray(weights), np.asarray(mask)
    slots = {name: np.asarray(slot) for name, slot in (slots or {}).items()}
    orders = tie_order if isinstance(tie_order, Mapping) else {"drop": tie_order, "grow": tie_order}
    arrays: dict[str, np.ndarray | None] = {
        "mask": mask, "gradient": gradient, "uniforms": uniforms, "noise": noise, "fresh": fresh,
        **{f"tie_order of {name}": order for name, order in orders.items()}, **slots,
    }  # fmt: skip
    same_shapes(weights.shape, arrays)
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"the drop fraction is {drop_fraction}; give a number from 0 to 1")
    if conventions.pool == "layer":
        raise ValueError(
            "the pool 'layer' spans several tensors; use a method's exchange, or the pool 'matrix' or 'gate' here"
        )
    mask = mask != 0
    criterion, score = _rules(method, mask, gradient, slots, drop, conventions)

    spec = ParamSpec("weight", weights.shape, "linear", prunable=True, blocks=dict(blocks or {}))
    pools = pools_of({"weight": spec}, ["weight"], conventions.pool)
    labels = [pool.label[len("weight[") : -1] for pool in pools]
    first = _for_each(initial_nnz, labels)
    drawn = _ranks_for_each(ranks, len(pools))
    outcomes = []
    for pool, n0, ranked in zip(pools, first, drawn):
        part = slice(pool.segments[0].start, pool.segments[0].stop)
        given = step.Inputs(
            weights.reshape(-1)[part], mask.reshape(-1)[part], drop_fraction, criterion, _part(score, part),
            sparsity, n0, want, rng, ranked, _part(uniforms, part), _part(noise, part), _part(fresh, part),
            _part(orders.get("drop"), part), _part(orders.get("grow"), part),
            {name: slot.reshape(-1)[part] for name, slot in slots.items()}, slot_rules or {},
        )  # fmt: skip
        outcomes.append(step.exchange(given, conventions))

    def whole(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).reshape(weights.shape)

    return MaskExchange(
        mask=whole([out.mask for out in outcomes]),
        weights=whole([out.weights for out in outcomes]),
        dropped=mask & ~whole([out.kept for out in outcomes]),
        grown=whole([out.grown for out in outcomes]),
        slots={name: whole([out.slots[name] for out in outcomes]) for name in slots},
        fate=whole([out.fate for out in outcomes]),
    )


def _rules(
    method: str | None,
    mask: np.ndarray,
    gradient: np.ndarray | None,
    slots: Mapping[str, np.ndarray],
    drop: Criterion | None,
    conventions: Conventions,
) -> tuple[Criterion, np.ndarray | None]:
    """Return the drop criterion, and the score by which places grow, or None for draws."""
    method = method or ("random" if gradient is None else "rigl")
    if method == "rigl":
        if gradient is None:
            raise ValueError("growth by gradient needs the gradient; give gradient, an array of the weight's shape")
        return drop or by_magnitude, np.asarray(gradient)
    if method == "snfs":
        momentum = _momentum(gradient, slots, conventions)
        return drop or by_magnitude, momentum * mask if conventions.momentum_masking == "every-step" else momentum
    if method == "static":
        return drop or by_magnitude, mask.astype(float)
    if method == "set":
        return drop or (by_sign if conventions.set_criterion == "sign" else by_magnitude), None
    if method == "random":
        return drop or by_magnitude, None
    raise ValueError(f"there is no exchange {method!r}; give 'rigl', 'set', 'random', 'snfs' or 'static'")


def _momentum(gradient: np.ndarray | None, slots: Mapping[str, np.ndarray], conventions: Conventions) -> np.ndarray:
    """Return the momentum that SNFS ranks."""
    if gradient is not None:
        return np.asarray(gradient)
    for name in step.MOMENTA:
        if name in slots:
            return slots[name]
    if conventions.snfs_score == "momentum-or-adam" and {"exp_avg", "exp_avg_sq"} <= set(slots):
        ratio: np.ndarray = slots["exp_avg"] / (np.sqrt(slots["exp_avg_sq"]) + slots["exp_avg"].dtype.type(1e-8))
        return ratio
    raise ValueError("growth by momentum needs it; give slots={'momentum_buffer': ...}, or the momentum as gradient")


def _part(array: np.ndarray | None, part: slice) -> np.ndarray | None:
    return None if array is None else np.asarray(array).reshape(-1)[part]


def _for_each(initial_nnz: int | Mapping[str, int] | None, labels: list[str]) -> list[int | None]:
    if isinstance(initial_nnz, Mapping):
        return [initial_nnz[label] for label in labels]
    if initial_nnz is not None and len(labels) > 1:
        raise ValueError("with several blocks initial_nnz must map each block to its count")
    return [initial_nnz] * len(labels)


def _ranks_for_each(ranks: Any, pools: int) -> list[np.ndarray | None]:
    if ranks is None:
        return [None] * pools
    if pools == 1 and np.ndim(ranks[0] if len(ranks) else 0) == 0:
        return [np.asarray(ranks, np.int64)]
    if len(ranks) != pools:
        raise ValueError(
            f"there are ranks for {len(ranks)} blocks but there are {pools} blocks; give one array for each"
        )
    return [np.asarray(block) for block in ranks]
