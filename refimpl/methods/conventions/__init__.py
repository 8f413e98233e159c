"""The choices that papers leave open, named: every one a field with a defended default.

Two correct readings of one paper differ in the weights they drop, in how many they grow and in what a grown
weight starts from. Each such choice is a field of :class:`Conventions`. The fields are grouped by topic into
small classes that :class:`Conventions` inherits from, so that a function can ask for the topic that it reads,
and a user still writes one flat ``Conventions(pool="gate", regrow="reset")``.

Not every choice can be made by a program that stores only what exists; :func:`require_sparse` tells which. The
functions of :mod:`refimpl.methods.onestep` honour them all, on dense arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from refimpl.methods.conventions.allocation import AllocationConventions, PruneConventions
from refimpl.methods.conventions.counts import kept_after, stored_again, stored_at
from refimpl.methods.conventions.exchanges import DropConventions, GrowthConventions, StorageConventions
from refimpl.methods.conventions.rounding import Rounding, Width, in_width, rounded
from refimpl.methods.conventions.training import OptimizerConventions, TimingConventions


@dataclass(frozen=True)
class Conventions(
    OptimizerConventions,
    TimingConventions,
    StorageConventions,
    GrowthConventions,
    DropConventions,
    PruneConventions,
    AllocationConventions,
):
    """All named choices of a run; see the topics for what each field means and why its default is what it is.

    Raises
    ------
    ValueError
        If a field has a value that is not one of those listed, or ``grown_value`` is not finite.
    """

    def __post_init__(self) -> None:
        for name, accepted in choices().items():
            value = getattr(self, name)
            if accepted and (value not in accepted or isinstance(value, bool) != isinstance(accepted[0], bool)):
                listed = ", ".join(map(repr, accepted))
                raise ValueError(f"the convention {name} is {value!r}; give one of {listed}")
        if isinstance(self.grown_value, str) or not math.isfinite(self.grown_value):
            raise ValueError(f"the convention grown_value is {self.grown_value}; give a finite number, usually 0")


def choices() -> dict[str, tuple[Any, ...]]:
    """Return the accepted values of each field, the default first as it stands; none for a number."""
    if not _CHOICES:
        hints = get_type_hints(Conventions)
        _CHOICES.update(
            {f.name: (True, False) if hints[f.name] is bool else get_args(hints[f.name]) for f in fields(Conventions)}
        )
    return _CHOICES


_CHOICES: dict[str, tuple[Any, ...]] = {}

TOPICS = (
    AllocationConventions,
    PruneConventions,
    DropConventions,
    GrowthConventions,
    StorageConventions,
    TimingConventions,
    OptimizerConventions,
)
"""The topics, in the order in which a run meets them."""

DEFAULT = Conventions()

ONE_STEP_ONLY: dict[str, tuple[Any, ...]] = {
    "initial_choice": ("magnitude", "magnitude-and-gradient"),
    "drop_of": ("kept-of-target",),
    "drop_scope": ("all",),
    "drop_noise": ("normal-1e-5",),
    "signed_drop": ("sparse-learning",),
    "growth_ranking": ("masked", "raised"),
    "grown_from": ("stored",),
    "growth_gradient": ("window-mean", "sum-since-start", "extra-batches"),
    "snfs_score": ("momentum-or-adam", "ema-0.9"),
    "momentum_masking": ("every-step",),
    "grown_slot": ("stored",),
    "slot_mask": ("nonzero",),
    "prune_of": ("remaining",),
    "prune_from": ("all",),
    "nm_ties": ("higher",),
    "exchange_counts": ("nothing",),
    "step_counter": ("before-step",),
    "before_first": ("dense",),
    "adam_eps": ("uncorrected",),
}
"""Choices that only the functions on dense arrays can make: they need numbers where a sparse weight has none, such as
noise or stale values, or another order of a training step than the trainer's."""


def require_sparse(conventions: Conventions) -> None:
    """Check that a training run, which stores only what exists, can do what conventions say.

    Raises
    ------
    ValueError
        If it cannot; the message names the fields, and what to set them to.
    """
    beyond = _beyond(conventions)
    if beyond:
        asked = ", ".join(f"{name}={getattr(conventions, name)!r}" for name in beyond)
        instead = ", ".join(f"{name}={value!r}" for name, value in beyond.items())
        raise ValueError(
            f"a run that stores only what exists cannot train with the conventions {asked}, which the one-step "
            f"functions on dense arrays alone can follow; for a run set {instead}"
        )


def for_training(conventions: Conventions) -> Conventions:
    """Return the conventions with those that a training run cannot follow set to their defaults."""
    return replace(conventions, **_beyond(conventions))


def _beyond(conventions: Conventions) -> dict[str, Any]:
    return {
        name: getattr(DEFAULT, name) for name, refused in ONE_STEP_ONLY.items() if getattr(conventions, name) in refused
    }


__all__ = [
    "DEFAULT",
    "ONE_STEP_ONLY",
    "TOPICS",
    "AllocationConventions",
    "Conventions",
    "DropConventions",
    "GrowthConventions",
    "OptimizerConventions",
    "PruneConventions",
    "Rounding",
    "StorageConventions",
    "TimingConventions",
    "Width",
    "choices",
    "for_training",
    "in_width",
    "kept_after",
    "require_sparse",
    "rounded",
    "stored_again",
    "stored_at",
]
