"""The choices that papers leave open, named: every one a field with a defended default.

Two correct readings of one paper differ in the weights they drop, in how many they grow and in what a grown
weight starts from. Each such choice is a field of :class:`Conventions`. The fields are grouped by topic into
small classes that :class:`Conventions` inherits from, so that a function can ask for the topic that it reads,
and a user still writes one flat ``Conventions(pool="gate", regrow="reset")``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Literal, get_args, get_type_hints

from refimpl.weights.carry import CarryRule

Rounding = Literal["floor", "ceil", "half-even"]


def rounded(number: float, how: Rounding) -> int:
    """Round a count that came out fractional.

    Parameters
    ----------
    number : float
        The float64 product itself: nothing is added to undo its rounding, so ``0.29 * 100`` floors to 28.
    how : {"floor", "ceil", "half-even"}
        Towards −∞, towards +∞, or to the nearest integer with halves to the even one.
    """
    if how == "floor":
        return math.floor(number)
    return math.ceil(number) if how == "ceil" else round(number)


@dataclass(frozen=True)
class AllocationConventions:
    """How many entries each tensor stores at the start.

    Attributes
    ----------
    initial_count : {"exact", "bernoulli"}
        A tensor of n entries at density ρ gets a fixed number of them, or each independently with probability
        ρ. *Exact*, because a sparsity that one asks for should be the sparsity that one gets, in every tensor
        and for every seed; the spread of the other, √(nρ(1−ρ)), is small but makes two runs differ in size.
    initial_rounding : {"floor", "ceil", "half-even"}
        From ρn to the fixed number. *Half-even*: the nearest number, and immune to ρ = 1 − 0.9 being a little
        below 0.1 in binary, which makes other implementations keep 99 of 1000.
    er_cap : bool
        Whether ER and ERK make tensors whose density would exceed 1 dense and hand what they cannot hold to
        the others. *Yes*, because otherwise the model comes out smaller than asked. Without it a density
        above 1 saturates at 1.
    """

    initial_count: Literal["exact", "bernoulli"] = "exact"
    initial_rounding: Rounding = "half-even"
    er_cap: bool = True


@dataclass(frozen=True)
class DropConventions:
    """Which stored entries an exchange drops.

    Attributes
    ----------
    pool : {"matrix", "gate", "layer"}
        The set within which weights compete to stay and places compete to be filled; the count is conserved
        in each pool. *Matrix*: one tensor, the stacked gates of a recurrent layer together. It is what the
        papers say for linear layers, and for recurrent ones it is the redistribution between gates that
        Selfish-RNN is about. *Gate*: each of a tensor's blocks of rows on its own (the contrast). *Layer*:
        the tensors of one layer together, such as ``weight_ih`` and ``weight_hh``.
    drop_rounding : {"floor", "ceil", "half-even"}
        From (drop fraction) · (stored entries) to a count. *Floor*: no more is taken than was asked for, as
        in RigL.
    drop_ties : {"exact", "threshold"}
        *Exact*: the stated count is dropped; among equal scores the lower flat position survives.
        *Threshold*: all entries at or below the last dropped score go, so ties and zeros make the count
        larger. Exact is the default because entries that were grown at 0 and have had no gradient yet tie by
        the thousand. A count of 0 drops nothing under either.
    """

    pool: Literal["matrix", "gate", "layer"] = "matrix"
    drop_rounding: Rounding = "floor"
    drop_ties: Literal["exact", "threshold"] = "exact"


@dataclass(frozen=True)
class GrowthConventions:
    """How many entries grow, which may, and what they start from.

    Attributes
    ----------
    growth_count : {"exact", "bernoulli"}
        For random growth: a fixed number, or each candidate independently with the probability that gives it
        on average. *Exact*: the sparsity of a tensor does not wander.
    growth_target : {"conserve", "initial"}
        Fill up to the entries stored just before this exchange, or to those stored before the first one.
        *Conserve*: an exchange needs no memory; with exact counts the two agree, and with Bernoulli growth
        only *initial* keeps the count from drifting as a random walk.
    regrow : {"keep", "reset", "forbid"}
        What may happen to an entry that this exchange has dropped: it is a candidate for growth and, if
        chosen, goes on with its value and optimizer state; it is a candidate and starts anew; it is no
        candidate. *Keep*: this is what an algorithm does that edits a mask and applies it once at the end, as
        nearly all public implementations do.
    grown_value : float
        Where a grown entry starts. *0*: the network computes the same function before and after growth.
    """

    growth_count: Literal["exact", "bernoulli"] = "exact"
    growth_target: Literal["conserve", "initial"] = "conserve"
    regrow: Literal["keep", "reset", "forbid"] = "keep"
    grown_value: float = 0.0

    @property
    def regrown(self) -> Literal["keep", "reset"]:
        """What an entry that was dropped and grown back at once holds, in a value or in a slot."""
        return "keep" if self.regrow == "keep" else "reset"

    @property
    def value_rule(self) -> CarryRule:
        """How the values of a weight are carried across an exchange."""
        return CarryRule(grown=self.grown_value, regrown=self.regrown)


@dataclass(frozen=True)
class TimingConventions:
    """When an exchange happens relative to the rest of training.

    Attributes
    ----------
    trigger_epoch : {"skip", "exchange"}
        Whether connections are exchanged at the end of the epoch in which averaging starts. *Skip*: the
        average then begins from a network that has just been evaluated.
    exchange_step : {"instead", "after"}
        For growth by gradient. *Instead*: the batch's gradient decides the growth, and no optimizer step is
        taken with it (Algorithm 1 of RigL); the batch still counts as a training step. *After*: the optimizer
        takes its step first, and growth uses the gradient from before it. Instead is the default, for the
        gradient then belongs to the weights on which it decides.
    """

    trigger_epoch: Literal["skip", "exchange"] = "skip"
    exchange_step: Literal["instead", "after"] = "instead"


@dataclass(frozen=True)
class OptimizerConventions:
    """Choices that the optimizer side reads.

    Attributes
    ----------
    clip_norm : {"support", "dense"}
        The gradient norm that clipping compares with its limit: over the entries that are trained, or over
        all entries of every weight as an implementation with masks computes it. *Support*: what is not stored
        is not there, and the limit means the same at every sparsity. *Dense* needs the norm of the full
        gradients.
    average_first : {"skip", "include"}
        Whether the average of a weight counts the first iterate after its (re)start. *Skip*: then SNT-ASGD on
        a full support is ``torch.optim.ASGD`` with ``t0=0``, bit for bit. *Include* is the plain mean of all
        iterates.
    """

    clip_norm: Literal["support", "dense"] = "support"
    average_first: Literal["skip", "include"] = "skip"


@dataclass(frozen=True)
class Conventions(OptimizerConventions, TimingConventions, GrowthConventions, DropConventions, AllocationConventions):
    """All named choices of a run; see the topics for what each field means and why its default is what it is.

    Raises
    ------
    ValueError
        If a field has a value that is not one of those listed, or ``grown_value`` is not finite.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            accepted = (True, False) if hints[field.name] is bool else get_args(hints[field.name])
            if accepted and value not in accepted:
                listed = ", ".join(map(repr, accepted))
                raise ValueError(f"the convention {field.name} is {value!r}; give one of {listed}")
        if not math.isfinite(self.grown_value):
            raise ValueError(f"the convention grown_value is {self.grown_value}; give a finite number, usually 0")


DEFAULT = Conventions()

PROFILES: dict[str, Conventions] = {
    "default": DEFAULT,
    "selfish-authors": Conventions(
        initial_count="bernoulli",
        er_cap=False,
        drop_rounding="ceil",
        drop_ties="threshold",
        growth_count="bernoulli",
        growth_target="initial",
        regrow="keep",
        trigger_epoch="skip",
        exchange_step="after",
        clip_norm="dense",
        average_first="skip",
    ),
}
"""Named sets of conventions: the defaults, and what other systems do."""


def profile(name: str) -> Conventions:
    """Return the conventions of a named profile.

    Raises
    ------
    ValueError
        If there is no such profile; the message lists those there are and names the nearest.
    """
    if name in PROFILES:
        return PROFILES[name]
    near = get_close_matches(name, PROFILES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no profile {name!r}; {hint}there are {', '.join(PROFILES)}")
