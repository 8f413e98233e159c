"""Pruning masks to a sparsity, and the sparsity of gradual pruning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.methods.conventions import DEFAULT, Conventions, stored_at
from refimpl.methods.onestep.ranking import best, refuse_nan, same_shapes


def prune_mask(
    weights: np.ndarray,
    mask: np.ndarray,
    amount: float | int,
    conventions: Conventions = DEFAULT,
    *,
    scores: np.ndarray | None = None,
    tie_order: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mask of the entries that pruning leaves in one tensor.

    Parameters
    ----------
    weights : ndarray
        The weight.
    mask : ndarray of bool, same shape
        What was there.
    amount : float or int
        The sparsity to reach, or the fraction of what remains that is to go (``prune_of``); an integer is a number of
        entries to prune, of either.
    conventions : Conventions
        Of which ``prune_of``, ``prune_from``, the rounding of the initial count, and ``kept_minimum`` are read.
    scores : ndarray, same shape
        What ranks the entries; by default :math:`|w|`.
    tie_order : ndarray, same shape
        Of equal scores the one with the lower number here stays; by default the lower position.

    Raises
    ------
    ValueError
        If shapes differ, a score is NaN, the amount is out of range, or nothing would be left and the conventions
        refuse that.
    """
    given = None if scores is None else {"weight": np.asarray(scores)}
    order = None if tie_order is None else {"weight": np.asarray(tie_order)}
    return prune_masks({"weight": weights}, {"weight": mask}, amount, conventions, scores=given, tie_order=order)[
        "weight"
    ]


def prune_masks(
    weights: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    amount: float | int,
    conventions: Conventions = DEFAULT,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    tie_order: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Prune several tensors together, by one threshold; see :func:`prune_mask`.

    ``global_scores`` says whether each tensor's scores are divided by their norm, if there are several.
    """
    ranked: list[np.ndarray] = []
    for name, weight in weights.items():
        score = np.abs(weight) if scores is None else np.asarray(scores[name])
        order = None if tie_order is None else tie_order[name]
        same_shapes(weight.shape, {f"mask of {name}": masks[name], f"scores of {name}": score, "tie_order": order})
        refuse_nan(score[np.asarray(masks[name]) != 0], "a score")
        if conventions.global_scores == "unit-norm" and len(weights) > 1:
            score = score / (np.linalg.norm(score.reshape(-1)).astype(score.dtype) + score.dtype.type(1e-8))
        ranked.append(score.reshape(-1))
    mask = np.concatenate([np.asarray(masks[name]).reshape(-1) != 0 for name in weights])
    order_flat = None if tie_order is None else np.concatenate([tie_order[name].reshape(-1) for name in weights])
    among = None if conventions.prune_from == "all" and conventions.prune_of == "all" else mask
    places = mask.size if conventions.prune_of == "all" else int(np.count_nonzero(mask))
    count = _left(places, amount, conventions)
    new = best(np.concatenate(ranked), count, order_flat, among)
    out, at = {}, 0
    for name, weight in weights.items():
        out[name] = new[at : at + weight.size].reshape(weight.shape)
        at += weight.size
    return out


def _left(places: int, amount: float | int, conventions: Conventions) -> int:
    if isinstance(amount, int) and not isinstance(amount, bool):
        count = places - amount
        if not 0 <= amount <= places:
            raise ValueError(f"{amount} of {places} entries cannot be pruned; give 0 to {places}, or a fraction")
    elif not 0 <= amount <= 1:
        raise ValueError(f"the amount to prune is {amount}; give a fraction from 0 to 1, or a whole number of entries")
    else:
        count = stored_at(places, amount, conventions)
    if not count and conventions.kept_minimum == "refuse":
        raise ValueError(
            f"pruning {amount} of {places} entries would leave none; prune less, or let kept_minimum be 'none' or 'one'"
        )
    return count


def nm_mask(
    weights: np.ndarray,
    n: int,
    m: int,
    conventions: Conventions = DEFAULT,
    *,
    axis: int = -1,
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mask that keeps n of every m consecutive entries along an axis.

    Parameters
    ----------
    weights : ndarray
        The weight; a convolution is to be laid out so that the axis runs over what is summed.
    n, m : int
        ``1 <= n <= m``.
    conventions : Conventions
        Of which ``nm_ties`` is read.
    axis : int
        Its length must be a multiple of m.
    scores : ndarray, same shape
        What ranks the entries; by default :math:`|w|`.

    Raises
    ------
    ValueError
        If the groups do not fit, shapes differ, or a score is NaN.
    """
    score = np.moveaxis(np.abs(weights) if scores is None else np.asarray(scores), axis, -1)
    same_shapes(weights.shape, {"scores": scores})
    if not 1 <= n <= m or score.shape[-1] % m:
        raise ValueError(
            f"{n}:{m} does not fit an axis of {score.shape[-1]}; give 1 <= n <= m with m a divisor of its length"
        )
    refuse_nan(score, "a score")
    groups = score.reshape(*score.shape[:-1], -1, m)
    if conventions.nm_ties == "higher":
        ranks = np.argsort(np.argsort(groups, axis=-1, kind="stable"), axis=-1)
        kept = ranks >= m - n
    else:
        ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1)
        kept = ranks < n
    return np.moveaxis(kept.reshape(score.shape), -1, axis)


def gmp_sparsity(
    step: float,
    *,
    final: float,
    begin: float = 0,
    end: float,
    initial: float = 0.0,
    conventions: Conventions = DEFAULT,
) -> float:
    r"""Return the sparsity of gradual magnitude pruning,

    .. math:: s_t = s_f + (s_i - s_f)(1 - x)^3,

    where the progress x is 0 before ``begin``; inside the window the convention ``gmp_progress`` defines it.

    Parameters
    ----------
    step, begin, end : float
        Steps, or epochs.
    final, initial : float
        :math:`s_f` and :math:`s_i`.
    conventions : Conventions
        Of which ``gmp_progress`` is read.

    Raises
    ------
    ValueError
        If the window ends before it begins, or a sparsity is outside [0, 1].

    References
    ----------
    .. [1] Zhu, Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1.
    """
    if end < begin:
        raise ValueError(f"gradual pruning ends at {end}, before it begins at {begin}; give a later end")
    for name, sparsity in (("final", final), ("initial", initial)):
        if not 0 <= sparsity <= 1:
            raise ValueError(f"the {name} sparsity is {sparsity}; give a number from 0 to 1")
    how, done, span = conventions.gmp_progress, step - begin, end - begin
    if how == "plus-one":
        progress = 1.0 if not span else min(max(done + 1, 0), span) / span
    elif done < 0:
        return initial
    elif how == "over-end":
        progress = done / end if end else 1.0
    else:
        length = span + (how == "window-plus-one")
        progress = min(done / length, 1.0) if length else 1.0
    return final + (initial - final) * (1 - progress) ** 3
