"""How large a method's sets are at each step, as far as that is known without its weights.

A table has one entry for each method whose counts follow from sizes, schedule and conventions alone: that is what it
takes to count the operations of a run of any size within a moment. Of the others the sets have to be made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from refimpl.methods.allocation import count_at, densities
from refimpl.methods.base import BaseMethod
from refimpl.methods.groups import Group
from refimpl.methods.pools import Pool, pools_of
from refimpl.methods.pruning import cubic
from refimpl.training.flops import Specs, multiplied


class Sizes(NamedTuple):
    """|A| and |B| of each weight."""

    used: dict[str, int]
    graded: dict[str, int]


class Visit(NamedTuple):
    """Training steps of one kind: their sizes, whether they exchanged by dense gradients, and on how many samples."""

    sizes: Sizes
    exchange: bool
    samples: int


SizesAt = Callable[[int], Sizes]
"""Returns the sizes of the sets that the method made after a training step, 0 for those that it begins with."""


def sizes_of(method: BaseMethod, specs: Specs, *, alike: bool = False) -> SizesAt | None:
    """Return the sizes of a method's sets by the step of their last renewal; None if the weights decide them.

    Parameters
    ----------
    method : BaseMethod
        As :func:`prepare` leaves it.
    specs : mapping of str to ParamSpec
    alike : bool
        Where weights of several tensors are ranked together, take each tensor to keep the same share of its entries,
        in place of None.
    """
    method = getattr(method, "inner", method)  # powerpropagation's sets are those of the method inside
    if not alike and method.name not in STARTS_GLOBALLY:
        if getattr(method, "scope", "local") == "global" or method.name == "granet":
            return None
        if _spans(method) and BY_METHOD.get(method.name) is not _allocated:
            return None
    known = BY_METHOD.get(method.name)
    return None if known is None else known(method, specs)


def prepare(method: BaseMethod, specs: Specs) -> None:
    """Let a method get to know the model: as its ``supports`` does, without drawing any."""
    inner: Any = getattr(method, "inner", method)
    if BY_METHOD.get(inner.name) is not _allocated:
        method.supports(specs, seed=0)
    elif hasattr(inner, "pools"):
        shared = densities(specs, inner.allocation, inner.conventions)
        inner.pools = pools_of(specs, [name for name, density in shared.items() if density < 1], inner.conventions.pool)


def _dense_sizes(specs: Specs) -> dict[str, int]:
    return {name: specs[name].size for name in multiplied(specs)}


def _dense(method: Any, specs: Specs) -> SizesAt:
    whole = _dense_sizes(specs)
    return lambda step: Sizes(whole, whole)


def _allocated(method: Any, specs: Specs) -> SizesAt:
    """S = A = B, shared out by the allocation and constant in number."""
    counts = _dense_sizes(specs)
    for name, density in densities(specs, method.allocation, method.conventions).items():
        counts[name] = count_at(density, specs[name].size, method.conventions, name)
    return lambda step: Sizes(counts, counts)


def _topkast(method: Any, specs: Specs) -> SizesAt:
    whole = _dense_sizes(specs)
    used = whole | {name: forward for name, (forward, _) in method.counts.items()}
    graded = whole | {name: backward for name, (_, backward) in method.counts.items()}
    stop = getattr(method, "stop_step", None)
    return lambda step: Sizes(used, used if stop is not None and step >= stop else graded)


def _straight_through(method: Any, specs: Specs) -> SizesAt:
    """A of the groups or the pattern, at the density of the moment if it moves; B = everything."""
    whole = _dense_sizes(specs)
    patterned = {}
    for name in getattr(method, "patterned", ()):
        n, m = method.pattern
        patterned[name] = specs[name].size // m * n

    def at(step: int) -> Sizes:
        density_at = getattr(method, "density_at", lambda final, step: final)
        counts = [
            (group.pool, group.count(method.conventions, lambda final: density_at(final, step)))
            for group in method.groups
        ]
        return Sizes(whole | _by_tensor(counts) | patterned, whole)

    return at


def _movement(method: Any, specs: Specs) -> SizesAt:
    whole = _dense_sizes(specs)
    if method.form == "soft":  # learned; the scores start at 0, whose sigmoid is 1/2
        used = {n: whole[n] if method.threshold < 0.5 else int(0.005 * whole[n]) + 1 for n in method.density}
        return lambda step: Sizes(whole | used if step else whole, whole)

    def at(step: int) -> Sizes:
        used = dict(whole)
        for name, final in method.density.items():
            density = cubic(1.0, final, step=step, begin=method.begin_step, end=method.end_step)
            used[name] = count_at(density, specs[name].size, method.conventions, name)
        return Sizes(used, whole)

    return at


def _pruned(method: Any, specs: Specs, density: Callable[[int], Callable[[float], float]]) -> SizesAt:
    """S = A = B, the largest of each pool at the density of the moment; ``density(step)`` maps a final one to it."""
    whole = _dense_sizes(specs)

    def at(step: int) -> Sizes:
        kept = method.kept(density(step))
        counts = whole | _by_tensor([(pool, kept[pool.label]) for pool in method.pools])
        return Sizes(counts, counts)

    return at


def _gmp(method: Any, specs: Specs) -> SizesAt:
    return _pruned(method, specs, lambda step: lambda final: method.density_at(final, step))


def _one_shot(method: Any, specs: Specs) -> SizesAt:
    return _pruned(method, specs, lambda step: lambda final: final if step >= method.at_step else 1.0)


def _imp(method: Any, specs: Specs) -> SizesAt:
    def share(step: int) -> float:
        return sum(end <= step for end in method.pruning_steps) / (method.rounds - 1)

    return _pruned(method, specs, lambda step: lambda final: final ** share(step))


def _acdc(method: Any, specs: Specs) -> SizesAt:
    return _pruned(method, specs, lambda step: lambda final: final if method.compressed(step) else 1.0)


def _by_tensor(counts: list[tuple[Pool, int]]) -> dict[str, int]:
    """Add up the counts of pools by tensor; segments share the count of their pool by their sizes."""
    found: dict[str, int] = {}
    for pool, count in counts:
        before = 0
        for segment in pool.segments:
            until = count * (segment.offset + segment.stop - segment.start) // pool.size
            found[segment.name] = found.get(segment.name, 0) + until - before
            before = until
    return found


def _granet(method: Any, specs: Specs) -> SizesAt:
    """S = A = B at the density of the moment, in every tensor whose density is not fixed."""
    whole = _dense_sizes(specs)

    def at(step: int) -> Sizes:
        counts = dict(whole)
        for name, spec in specs.items():
            if spec.prunable:
                density = method.allocation.fixed.get(name, method.density(step))
                counts[name] = count_at(density, spec.size, method.conventions, name)
        return Sizes(counts, counts)

    return at


LEARNED = ("str", "iss")
"""Methods whose sizes are learned."""
STARTS_GLOBALLY = ("snip", "grasp", "synflow")
"""Methods that share entries out between tensors by looking at gradients: their sizes are those of the allocation."""
STARTS_ONCE = (*STARTS_GLOBALLY, "magnitude-init")
"""Methods whose sizes never change after the start."""

BY_METHOD: Mapping[str, Callable[[Any, Specs], SizesAt]] = {
    "dense": _dense,
    **dict.fromkeys(("static", "set", "selfish", "rigl", "itop", "deepr", "dsr", "snfs"), _allocated),
    **dict.fromkeys(("magnitude-init", "snip", "grasp", "synflow"), _allocated),
    "topkast": _topkast,
    **dict.fromkeys(("ste", "sr-ste", "dpf"), _straight_through),
    "movement": _movement,
    "gmp": _gmp,
    "one-shot": _one_shot,
    "imp": _imp,
    "acdc": _acdc,
    "granet": _granet,
}
"""Where the sizes of each method come from; what is not listed is made from weights."""


def moves_between_tensors(method: BaseMethod) -> bool:
    """Tell whether a method moves entries from one tensor to another as training goes."""
    return method.name in ("dsr", "snfs") or (BY_METHOD.get(method.name) is _allocated and _spans(method))


def ranks_across_tensors(method: BaseMethod) -> bool:
    """Tell whether a method ranks weights of several tensors together in training."""
    return method.name == "granet" or (method.name not in STARTS_ONCE and _spans(method))


def _spans(method: Any) -> bool:
    """Tell whether a pool of the method lies in more than one tensor."""
    grouped = [group.pool for group in getattr(method, "groups", ()) if isinstance(group, Group)]
    pools = [*getattr(method, "pools", ()), *grouped]
    return any(len({segment.name for segment in pool.segments}) > 1 for pool in pools)
