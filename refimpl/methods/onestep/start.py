"""Masks and densities before training, on shapes and dense arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from refimpl.methods.allocation import Allocation, density_from_sparsity, shares
from refimpl.methods.conventions import DEFAULT, Conventions, kept_after, stored_at
from refimpl.methods.onestep.ranking import best, refuse_nan, same_shapes
from refimpl.methods.random_support import draw_distinct

Shapes = Mapping[str, tuple[int, ...]] | Sequence[tuple[int, ...]]


def allocate(
    shapes: Shapes,
    sparsity: float,
    rule: Literal["uniform", "er", "erk"] = "uniform",
    conventions: Conventions = DEFAULT,
    *,
    fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the density of each tensor.

    Parameters
    ----------
    shapes : mapping of str to tuple of int, or sequence of tuples
        In the order of the model, in the layout of the conventions (``conv_layout``); tensors of a sequence are called
        ``"0"``, ``"1"``, and so on.
    sparsity : float
        Of all tensors together, in [0, 1).
    rule : {"uniform", "er", "erk"}
        See :mod:`refimpl.methods.allocation`.
    conventions : Conventions
        Of which the fields ``er_*``, ``conv_layout`` and ``*_layer*`` are read.
    fixed : mapping of str to float
        Densities of tensors that take no part in the rule.

    Raises
    ------
    ValueError
        If the sparsity is outside [0, 1), or the rule is unknown.
    """
    allocation = Allocation(density_from_sparsity(sparsity), rule, dict(fixed or {}))
    return shares(_named(shapes), allocation, conventions, sparsity=sparsity)


def allocate_counts(
    shapes: Shapes,
    sparsity: float,
    rule: Literal["uniform", "er", "erk"] = "uniform",
    conventions: Conventions = DEFAULT,
    *,
    fixed: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return how many entries each tensor stores; arguments and errors are those of :func:`allocate`."""
    found = allocate(shapes, sparsity, rule, conventions, fixed=fixed)
    counts = {}
    for name, shape in _named(shapes).items():
        density, size = found[name], int(np.prod(shape))
        # 1 - (1 - s) need not be s: a uniform density is counted from the sparsity that was given.
        share = sparsity if density == 1 - sparsity else 1 - density
        counts[name] = stored_at(size, share, conventions, density)
    return counts


def initial_mask(
    shape: tuple[int, ...],
    sparsity: float,
    conventions: Conventions = DEFAULT,
    *,
    scores: np.ndarray | None = None,
    gradient: np.ndarray | None = None,
    drop_fraction: float | None = None,
    uniforms: np.ndarray | None = None,
    permutation: np.ndarray | None = None,
    places: np.ndarray | None = None,
    tie_order: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the mask with which one tensor starts.

    Parameters
    ----------
    shape : tuple of int
        Of the tensor.
    sparsity : float
        In [0, 1).
    conventions : Conventions
        Of which the fields ``initial_*`` and ``kept_minimum`` are read.
    scores : ndarray, same shape
        The entries with the largest are stored, such as :math:`|w|`; needed where ``initial_choice`` is no draw.
    gradient : ndarray, same shape
    drop_fraction : float
        For ``"magnitude-and-gradient"``: the share of the entries that this fraction would drop is chosen by gradient.
    uniforms : ndarray, same shape
        Draws from [0, 1): the largest are stored, or for a Bernoulli count those below the density.
    permutation : ndarray of int, shape (n,)
        Of the flat positions: the first, as many as are absent, are left out.
    places : ndarray of int
        Flat positions drawn with replacement, one for each entry asked for.
    tie_order : ndarray, same shape
        Of equal scores or draws the one with the lower number here wins; by default the lower position.
    rng : numpy.random.Generator
        Source of draws, if none are given.

    Returns
    -------
    ndarray of bool

    Raises
    ------
    ValueError
        If the sparsity is outside [0, 1), a shape or a number of draws is wrong, what the conventions need is not
        given, or the mask would be empty and they refuse that.
    """
    density = density_from_sparsity(sparsity)
    same_shapes(tuple(shape), {"scores": scores, "gradient": gradient, "uniforms": uniforms, "tie_order": tie_order})
    size = int(np.prod(shape))
    count = stored_at(size, sparsity, conventions)
    if not count and conventions.kept_minimum == "refuse":
        raise ValueError(
            f"a tensor of {size} entries would keep none at sparsity {sparsity}; lower the sparsity, or let "
            "kept_minimum be 'none' or 'one'"
        )
    order = None if tie_order is None else np.asarray(tie_order).reshape(-1)
    if scores is not None:
        flags = _by_scores(np.asarray(scores).reshape(-1), gradient, count, sparsity, drop_fraction, order, conventions)
    elif conventions.initial_choice != "random":
        raise ValueError(f"the initial choice is by {conventions.initial_choice}; give scores, the magnitudes")
    else:
        flags = _drawn(size, count, density, uniforms, permutation, places, order, rng, conventions)
    return flags.reshape(shape)


def _by_scores(
    scores: np.ndarray,
    gradient: np.ndarray | None,
    count: int,
    sparsity: float,
    fraction: float | None,
    order: np.ndarray | None,
    c: Conventions,
) -> np.ndarray:
    refuse_nan(scores, "a score")
    if c.initial_choice != "magnitude-and-gradient":
        return best(scores, count, order)
    if gradient is None or fraction is None:
        raise ValueError("the initial choice is by magnitude and gradient; give gradient and drop_fraction too")
    first = best(scores, kept_after(count, fraction, c, size=scores.size, sparsity=sparsity), order)
    rest = np.abs(gradient).reshape(-1)
    refuse_nan(rest, "a gradient")
    return first | best(rest, count - int(np.count_nonzero(first)), order, ~first)


def _drawn(
    size: int,
    count: int,
    density: float,
    uniforms: np.ndarray | None,
    permutation: np.ndarray | None,
    places: np.ndarray | None,
    order: np.ndarray | None,
    rng: np.random.Generator | None,
    c: Conventions,
) -> np.ndarray:
    if all(given is None for given in (uniforms, permutation, places, rng)):
        raise ValueError("a random mask needs draws; give uniforms, permutation, places or rng")
    flags = np.zeros(size, bool)
    if c.initial_count == "with-replacement":
        if places is None:
            if rng is None:
                raise ValueError("draws with replacement are flat positions; give places or rng")
            places = rng.integers(size, size=count)
        flags[np.asarray(places)] = True
    elif c.initial_count == "bernoulli":
        if uniforms is None:
            if rng is None:
                raise ValueError("a Bernoulli mask needs a number for each entry; give uniforms or rng")
            uniforms = rng.random(size)
        flags = np.asarray(uniforms).reshape(-1) < density
    elif permutation is not None:
        if sorted(np.asarray(permutation).tolist()) != list(range(size)):
            raise ValueError(f"the permutation must hold each of the {size} flat positions once")
        flags[np.asarray(permutation)[size - count :]] = True
    elif uniforms is not None:
        flags = best(np.asarray(uniforms).reshape(-1), count, order)
    else:
        if rng is None:
            raise ValueError("an exact random mask needs uniforms, permutation or rng")
        flags[draw_distinct(size, count, rng)] = True
    return flags


def _named(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    if isinstance(shapes, Mapping):
        return {name: tuple(shape) for name, shape in shapes.items()}
    return {str(at): tuple(shape) for at, shape in enumerate(shapes)}
