r"""Allocation: how a density for the whole model becomes a density for each tensor.

Every prunable tensor counts: embedding and decoder like any other, the stacked gates of a recurrent layer as
one, a tied weight once. With :math:`n_l` entries in tensor :math:`l` and the target :math:`\rho`,

* *uniform*: :math:`\rho_l = \rho`;
* *ER* (Mocanu et al. 2018): :math:`\rho_l = \varepsilon\,(r_l + c_l)/(r_l c_l)` with output and input units
  :math:`r_l, c_l`;
* *ERK* (Evci et al. 2020, section 3): :math:`\rho_l = \varepsilon\,\sum_i d_{li} / \prod_i d_{li}` over all
  axes of the shape, which for a matrix is ER,

and :math:`\varepsilon` such that :math:`\sum_l \rho_l n_l = \rho \sum_l n_l`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refimpl.methods.conventions import DEFAULT, AllocationConventions, stored_at
from refimpl.methods.random_support import bernoulli_support, exact_support
from refimpl.rng import generator
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.support import Support

logger = logging.getLogger(__name__)

Specs = Mapping[str, ParamSpec]


def density_from_sparsity(sparsity: float) -> float:
    """Return 1 − sparsity, after checking the sparsity that a user gave.

    Raises
    ------
    ValueError
        If it is not a number in [0, 1).
    """
    if not 0 <= sparsity < 1:  # false for NaN
        raise ValueError(
            f"the sparsity is {sparsity}; give a number from 0 (dense) to just below 1, such as 0.9 "
            "for one weight in ten"
        )
    return 1.0 - sparsity


@dataclass(frozen=True)
class Allocation:
    """What is asked of a model: how dense, and by which rule the tensors share it.

    Attributes
    ----------
    density : float
        Fraction of the entries of all prunable tensors (without those in ``fixed``) that is stored, above 0
        and at most 1.
    rule : {"uniform", "er", "erk"}
        See the module.
    fixed : mapping of str to float
        Densities of tensors that do not take part in the rule, by name; 1 leaves a tensor dense.

    Raises
    ------
    ValueError
        If a density is outside (0, 1] or the rule is unknown.
    """

    density: float
    rule: Literal["uniform", "er", "erk"] = "uniform"
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, density in {"the model": self.density, **self.fixed}.items():
            if not 0 < density <= 1:
                raise ValueError(
                    f"the density of {name} is {density}; give a number above 0 and at most 1 (density = 1 - sparsity)"
                )
        if self.rule not in ("uniform", "er", "erk"):
            raise ValueError(f"the allocation rule is {self.rule!r}; give 'uniform', 'er' or 'erk'")


def densities(specs: Specs, allocation: Allocation, conventions: AllocationConventions = DEFAULT) -> dict[str, float]:
    """Return the density of every prunable tensor.

    Parameters
    ----------
    specs : mapping of str to ParamSpec
        The model's parameters; those that are not prunable are passed over.
    allocation : Allocation
        Target and rule.
    conventions : AllocationConventions
        Of which the fields ``er_*``, ``conv_layout`` and ``*_layer*`` are read.

    Returns
    -------
    dict of str to float
        In (0, 1], in the order of ``specs``.

    Raises
    ------
    ValueError
        If no tensor is prunable, or ``allocation.fixed`` names one that is not.

    Notes
    -----
    With the cap, a density above 1 sends the tensor (the largest density first, equal ones together) to the
    dense set Q, and ε is solved again for the others: ``ε = (ρ Σ n − Σ_Q n) / Σ_{not Q} raw n``, until none
    exceeds 1. Without it the density saturates at 1, the model is smaller than asked, and a warning is
    logged.
    """
    prunable = {name: spec for name, spec in specs.items() if spec.prunable}
    if not prunable:
        raise ValueError(
            "none of the model's parameters is prunable; mark some in their ParamSpec or train the dense method"
        )
    for name in allocation.fixed:
        if name not in prunable:
            raise ValueError(
                f"the allocation fixes the density of {name!r}, which is no prunable parameter; "
                f"there are {', '.join(prunable)}"
            )
    shapes = {name: _laid_out(spec, conventions) for name, spec in prunable.items()}
    return shares(shapes, allocation, conventions)


def shares(
    shapes: Mapping[str, tuple[int, ...]],
    allocation: Allocation,
    conventions: AllocationConventions = DEFAULT,
    *,
    sparsity: float | None = None,
) -> dict[str, float]:
    """Return the density of every tensor, by the shapes alone; see :func:`densities`.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        In the order of the model, each in the layout that ``conventions.conv_layout`` names.
    allocation, conventions
        As in :func:`densities`.
    sparsity : float, optional
        The sparsity from which the allocation's density was computed, where it is known: 1 − (1 − s) need not be s.
    """
    absent = 1 - allocation.density if sparsity is None else sparsity
    fixed = {**_pinned(shapes, allocation, conventions), **allocation.fixed}
    shared = {name: shape for name, shape in shapes.items() if name not in fixed}
    if allocation.rule == "uniform":
        found = dict.fromkeys(shared, allocation.density)
    else:
        found = _erdos_renyi(shared, allocation, conventions, absent)
    return {name: float(fixed.get(name, found.get(name, 1.0))) for name in shapes}


def _laid_out(spec: ParamSpec, conventions: AllocationConventions) -> tuple[int, ...]:
    """Return the shape in the layout of the conventions' system; a model here has OIHW."""
    if conventions.conv_layout == "HWIO" and len(spec.shape) > 1:
        return (*spec.shape[2:], spec.shape[1], spec.shape[0])
    return spec.shape


def _pinned(
    shapes: Mapping[str, tuple[int, ...]], allocation: Allocation, conventions: AllocationConventions
) -> dict[str, float]:
    """Return the densities that a convention fixes by a tensor's place or kind."""
    pinned: dict[str, float] = {}
    names, uniform = list(shapes), allocation.rule == "uniform"
    if conventions.linear_layers == "dense":
        pinned |= {name: 1.0 for name, shape in shapes.items() if len(shape) == 2}
    if uniform and conventions.last_layer == "density-0.2" and allocation.density <= 0.2:
        pinned[names[-1]] = 0.2
    if uniform and conventions.first_layer == "dense-if-uniform" and len(names) > 1:
        pinned[names[0]] = 1.0
    return pinned


def _erdos_renyi(
    shapes: Mapping[str, tuple[int, ...]],
    allocation: Allocation,
    conventions: AllocationConventions,
    absent: float,
) -> dict[str, float]:
    two = slice(None, 2) if conventions.er_axes == "first-two" else slice(-2, None)
    axes = {name: shape[two] if allocation.rule == "er" else shape for name, shape in shapes.items()}
    raw = {name: sum(shape) / _product(shape) for name, shape in axes.items()}
    size = {name: _product(shape) for name, shape in shapes.items()}
    target = allocation.density * sum(size.values())
    if conventions.er_epsilon == "searched":
        epsilon, open_ = _searched(raw, size, target), list(shapes)
    else:
        epsilon, open_ = _solved(raw, size, allocation.density, absent, conventions)
    found = {name: min(1.0, epsilon * raw[name]) if name in open_ else 1.0 for name in shapes}
    stored = sum(found[name] * size[name] for name in shapes)
    uncapped = not conventions.er_cap or conventions.er_epsilon == "searched"
    if uncapped and stored < target * (1 - 1e-9):
        logger.warning(
            "without a cap, %s allocation saturates: density %.4g instead of %.4g",
            allocation.rule.upper(),
            stored / sum(size.values()),
            allocation.density,
        )
    return found


def _solved(
    raw: Mapping[str, float], size: Mapping[str, int], density: float, absent: float, conventions: AllocationConventions
) -> tuple[float, list[str]]:
    """Return ε, and the tensors that it is the factor of: the complement of Q."""
    ones = {name: density * n for name, n in size.items()}
    if conventions.er_zeros == "floor":
        ones = {name: float(n - math.floor(absent * n)) for name, n in size.items()}
    target = sum(ones.values())
    open_ = list(raw)
    while open_:
        held = sum(size[name] for name in raw if name not in open_)
        epsilon = (target - held) / sum(raw[name] * size[name] for name in open_)
        largest = max(raw[name] for name in open_)
        if not conventions.er_cap or epsilon * largest <= 1:
            return epsilon, open_
        if conventions.er_exhaust == "one-maximum":
            open_.remove(next(name for name in open_ if raw[name] == largest))
        else:
            open_ = [name for name in open_ if raw[name] < largest]
    return 0.0, open_


def _searched(raw: Mapping[str, float], size: Mapping[str, int], target: float) -> float:
    """Approach ε by steps that shrink, until it is right within five entries; then it has moved once more."""
    epsilon, move, total = 10.0, 0.5, sum(raw[name] * size[name] for name in raw)
    for _ in range(_SEARCH_ROUNDS):
        found = epsilon * total
        epsilon *= 1 - move if found > target else 1 + move
        move *= 0.95
        if abs(found - target) < 5:
            break
    return epsilon


_SEARCH_ROUNDS = 1000
"""The steps of the search have shrunk to nothing long before."""


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def count_at(density: float, size: int, conventions: AllocationConventions = DEFAULT, name: str = "a tensor") -> int:
    """Return how many of ``size`` entries a density stands for.

    Raises
    ------
    ValueError
        If it would be none, and the conventions refuse that: an empty tensor cuts the network.
    """
    count = stored_at(size, 1 - density, conventions, density)
    if count < 1 and conventions.kept_minimum == "refuse":
        raise _empty(name, size, density)
    return count


def _empty(name: str, size: int, density: float) -> ValueError:
    return ValueError(
        f"{name} of {size} entries would keep none at density {density:.4g}; lower the sparsity, or "
        "fix this tensor's density"
    )


def initial_supports(
    specs: Specs, allocation: Allocation, *, seed: int, conventions: AllocationConventions = DEFAULT
) -> dict[str, Support]:
    """Draw the supports with which training starts.

    Parameters
    ----------
    specs, allocation, conventions
        As in :func:`densities`.
    seed : int
        Of the run. Each tensor has its own stream, so that adding a tensor changes no other.

    Returns
    -------
    dict of str to Support
        For the tensors of density below 1. A tensor of density 1 is not in it and stays a dense array.

    Raises
    ------
    ValueError
        As in :func:`densities`, and if a tensor would be empty.
    """
    out: dict[str, Support] = {}
    for name, density in densities(specs, allocation, conventions).items():
        if density == 1:
            continue
        shape, rng = specs[name].shape, generator(seed, f"support/{name}")
        if conventions.initial_count == "bernoulli":
            out[name] = bernoulli_support(shape, density, rng)
            if not out[name].nnz and conventions.kept_minimum == "refuse":
                raise _empty(name, specs[name].size, density)
            continue
        count = count_at(density, specs[name].size, conventions, name)
        if conventions.initial_count == "exact":
            out[name] = exact_support(shape, count, rng)
        else:
            out[name] = Support(shape, np.unique(rng.integers(specs[name].size, size=count)))
    return out
