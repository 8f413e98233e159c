"""Choices about an exchange: what goes, what grows, and what grown entries start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refimpl.methods.conventions.rounding import Rounding, Width
from refimpl.weights.carry import CarryRule


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
    drop_of : {"dropped", "kept", "kept-of-density", "kept-of-sparsity", "kept-of-target"}
        What is rounded, with n₁ stored of n and the drop fraction f: f n₁ entries go; (1 − f) n₁ stay; of the density
        ρ = n₁/n, n (1 − (1 − ρ (1 − f))) stay; of the sparsity c = 1 − n₁/n, n (1 − r) stay, with r = f (1 − c) + c
        rounded to six decimals; or of the target sparsity s, n (1 − (s + (1 − s) f)) stay. *Dropped*: the paper's k.
    drop_width : {"float64", "float32"}
        Precision in which that is computed. *Float64*.
    drop_ties : {"exact", "threshold"}
        *Exact*: the stated count is dropped; among equal scores the lower flat position survives.
        *Threshold*: all entries at or below the last dropped score go, so ties and zeros make the count
        larger. Exact is the default because entries that were grown at 0 and have had no gradient yet tie by
        the thousand.
    drop_none : {"nothing", "zeros"}
        What a count of 0 drops under *threshold*: nothing, or all entries that are exactly 0. *Nothing*: a drop
        fraction of 0 changes nothing.
    drop_scope : {"active", "all"}
        Whether entries that are not stored take part in the ranking, with weight 0. *Active*: otherwise one of them is
        kept in place of a stored zero.
    drop_noise : {"none", "normal-1e-5"}
        Whether normal noise of this deviation is added to the magnitudes. *None*: the noise lets an entry that is not
        stored outrank a small weight that is.
    tie_order : {"lower", "undefined"}
        Which of equal scores wins: the one at the lower flat position, or whichever a system's sort happens to put
        first; then the order is an argument of the one-step function. *Lower*: written, and so repeatable.
    set_criterion : {"sign", "magnitude"}
        What the one-step function drops under the name SET: the weights of each sign that are closest to zero, or the
        smallest of both signs together. *Sign*, as published; most programs have the other. In a run it is an option
        of the method.
    signed_drop : {"balanced", "set-original", "itop", "selfish-authors", "sparse-learning"}
        How SET's criterion, the smallest positive and the least negative weights, is programmed. *Balanced*: the
        rounded fraction of each sign. *set-original*: between two places of the sorted list, found by its
        arithmetic. The others take half of ⌈f n₁⌉ from each sign and have a defect: *itop* keeps the most negative
        ⌈f n₁⌉/2 − 1, *selfish-authors* drops the most negative instead of the least, *sparse-learning* keeps only the
        most negative ⌈f n₁⌉/2.
    """

    pool: Literal["matrix", "gate", "layer"] = "matrix"
    drop_rounding: Rounding = "floor"
    drop_of: Literal["dropped", "kept", "kept-of-density", "kept-of-sparsity", "kept-of-target"] = "dropped"
    drop_width: Width = "float64"
    drop_ties: Literal["exact", "threshold"] = "exact"
    drop_none: Literal["nothing", "zeros"] = "nothing"
    drop_scope: Literal["active", "all"] = "active"
    drop_noise: Literal["none", "normal-1e-5"] = "none"
    tie_order: Literal["lower", "undefined"] = "lower"
    set_criterion: Literal["sign", "magnitude"] = "sign"
    signed_drop: Literal["balanced", "set-original", "itop", "selfish-authors", "sparse-learning"] = "balanced"


@dataclass(frozen=True)
class GrowthConventions:
    """How many entries grow, which may, and what they start from.

    Attributes
    ----------
    growth_count : {"exact", "bernoulli"}
        For random growth: a fixed number, or each candidate independently with the probability that gives it
        on average. *Exact*: the sparsity of a tensor does not wander.
    growth_target : {"conserve", "initial", "density"}
        Fill up to the entries stored just before this exchange; to those stored before the first one, or that the
        sparsity asked for stands for; or to those that the present density n₁/n stands for, by the rule of the
        initial count. *Conserve*: an exchange needs no memory; with exact counts they agree, and with Bernoulli growth
        only *initial* keeps the count from drifting as a random walk.
    growth_ranking : {"free", "masked", "raised"}
        How entries that are kept are excluded when places are ranked by a score: they do not take part; they take part
        with score 0, and growth falls short where it meets one; or they are ranked above all, by 1e-5, which float32
        loses beside scores of 256 and more, so that they tie with the best. *Free*: never a silent shortfall.
    regrow : {"keep", "reset", "forbid"}
        What may happen to an entry that this exchange has dropped: it is a candidate for growth and, if
        chosen, goes on with its value and optimizer state; it is a candidate and starts anew; it is no
        candidate. *Keep*: this is what an algorithm does that edits a mask and applies it once at the end, as
        nearly all public implementations do.
    grown_value : float
        Where a grown entry starts. *0*: the network computes the same function before and after growth.
    grown_from : {"constant", "stored", "normal-0.1"}
        *Constant*: from ``grown_value``. *Stored*: from the number that the dense array held there unused, as it was
        when last in use, or drawn. *normal-0.1*: from a fresh draw of deviation 0.1. Constant: nothing is stored where
        nothing exists.
    growth_gradient : {"batch", "window-mean", "sum-since-start", "extra-batches"}
        Which gradient growth sees: of the batch of the exchange; the mean over the last few; the sum over all since
        training began for the first exchange, and later the batch's own; or of batches drawn for it alone. *Batch*,
        as in Algorithm 1 of RigL.
    snfs_score : {"momentum", "momentum-or-adam", "ema-0.9"}
        What SNFS ranks by: the magnitude of the momentum; under Adam, of its first moment divided by
        the root of the second plus 1e-8; or of its own average of gradients with decay 0.9. *Momentum*.
    momentum_masking : {"never", "every-step"}
        Whether that momentum is set to 0 outside the mask after every step. *Never*: SNFS then has nothing
        to rank but what was just dropped.
    """

    growth_count: Literal["exact", "bernoulli"] = "exact"
    growth_target: Literal["conserve", "initial", "density"] = "conserve"
    growth_ranking: Literal["free", "masked", "raised"] = "free"
    regrow: Literal["keep", "reset", "forbid"] = "keep"
    grown_value: float = 0.0
    grown_from: Literal["constant", "stored", "normal-0.1"] = "constant"
    growth_gradient: Literal["batch", "window-mean", "sum-since-start", "extra-batches"] = "batch"
    snfs_score: Literal["momentum", "momentum-or-adam", "ema-0.9"] = "momentum"
    momentum_masking: Literal["never", "every-step"] = "never"

    @property
    def regrown(self) -> Literal["keep", "reset"]:
        """What an entry that was dropped and grown back at once holds, in a value or in a slot."""
        return "keep" if self.regrow == "keep" else "reset"

    @property
    def value_rule(self) -> CarryRule:
        """How the values of a weight are carried across an exchange."""
        return CarryRule(grown=self.grown_value, regrown=self.regrown)


@dataclass(frozen=True)
class StorageConventions:
    """What dense arrays hold where nothing exists.

    Attributes
    ----------
    inactive_values : {"absent", "stored"}
        Whether the weight of an entry that is not in the mask is gone (0 in a picture), or stays in the array unused.
        *Absent*: this is what sparse means here.
    grown_slot : {"zero", "stored"}
        What the optimizer's state of a newly grown entry is: 0, or whatever the array held there. *Zero*.
    slot_masked : {"all", "momentum", "first-moments", "momentum-and-adam", "none"}
        Which arrays of an optimizer are set to 0 outside the mask: every one of the weight's shape; SGD's
        ``momentum_buffer``; this and Adam's ``exp_avg``; these and ``exp_avg_sq``; none. *All*: state of what does not
        exist does not exist.
    slot_mask : {"mask", "nonzero"}
        Whether "outside the mask" means that, or wherever the weight is 0, which wipes the state of stored zeros too.
        *Mask*.
    """

    inactive_values: Literal["absent", "stored"] = "absent"
    grown_slot: Literal["zero", "stored"] = "zero"
    slot_masked: Literal["all", "momentum", "first-moments", "momentum-and-adam", "none"] = "all"
    slot_mask: Literal["mask", "nonzero"] = "mask"
