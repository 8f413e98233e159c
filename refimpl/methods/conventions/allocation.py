"""Choices about the start: how many entries each tensor stores, which, and how tensors share a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refimpl.methods.conventions.rounding import Rounding


@dataclass(frozen=True)
class AllocationConventions:
    """How many entries each tensor stores at the start.

    Attributes
    ----------
    initial_count : {"exact", "bernoulli", "with-replacement"}
        A tensor of n entries at density ρ gets a fixed number of them, or each independently with probability
        ρ, or as many as are different among that fixed number of draws with replacement. *Exact*, because a sparsity
        that one asks for should be the sparsity that one gets, in every tensor and for every seed; the spread of the
        second, √(nρ(1−ρ)), is small but makes two runs differ in size, and the third stores fewer than were asked for.
    initial_rounding : {"floor", "ceil", "half-even"}
        From ρn to the fixed number. *Half-even*: the nearest number, and immune to ρ = 1 − 0.9 being a little
        below 0.1 in binary, which makes other implementations keep 99 of 1000.
    initial_of : {"ones", "zeros"}
        What is rounded: the entries that are stored, ρn, or those that are not, (1 − ρ)n. *Ones*: the sparse code
        counts what exists.
    initial_width : {"float64", "float32", "float32-product"}
        Precision in which that product is computed, from the sparsity on, or with ρ = 1 − s still in float64.
        *Float64*, exact far beyond any tensor's size; in float32, 0.2 of 10,000 can come out as 1999.
    kept_minimum : {"refuse", "none", "one"}
        What happens to a tensor that would start with nothing: an error, an empty tensor, or one entry; *one* holds
        after every drop too. *Refuse*: an empty tensor cuts the network, and one entry is not what was asked for.
    initial_choice : {"random", "magnitude", "magnitude-and-gradient"}
        Which entries these are: drawn, those of largest initial weight, or 1 − f of them so and the others by gradient.
        *Random*, which needs no dense initial weights.
    er_cap : bool
        Whether ER and ERK make tensors whose density would exceed 1 dense and hand what they cannot hold to
        the others. *Yes*, because otherwise the model comes out smaller than asked. Without it there is one pass, and
        a density above 1 saturates at 1.
    er_exhaust : {"all-maxima", "one-maximum"}
        Which tensors become dense in a round of that: all whose raw density is the largest, or the first of them.
        *All*: equal tensors are treated equally. They are in the end by the other rule too: what one of two equals
        cannot hold pushes the other beyond 1.
    er_zeros : {"unrounded", "floor"}
        Whether the number of absent entries of each tensor is rounded down while the factor ε is solved for.
        *Unrounded*: one rounding, at the end.
    er_epsilon : {"solved", "searched"}
        Whether ε is solved for, or approached by a search that stops within five entries, then moves once more, and
        knows no cap. *Solved*: the equation is linear.
    er_axes : {"first-two", "last-two"}
        Which axes of a shape the rule ER takes as the fans of a tensor. *First two*: output and input units of the
        layout OIHW. Of a convolution it takes kernel axes if it does not fit the layout.
    conv_layout : {"OIHW", "HWIO"}
        Order of the axes of a system's convolutions, to which the weights of a model here are brought before
        ``er_axes`` are taken. *OIHW*, the layout here; for arrays that are handed over it only declares theirs.
    first_layer : {"as-others", "dense-if-uniform"}
        Whether the first tensor is dense under the uniform rule, where there are several. *As others*: what is dense is
        said for each tensor by name (``Allocation.fixed``), not guessed from an order.
    linear_layers : {"as-others", "dense"}
        Whether tensors of two axes are dense. *As others*: most of the models here have no others.
    last_layer : {"as-others", "density-0.2"}
        Whether the last tensor keeps density 0.2 under the uniform rule when the sparsity is 0.8 or more. *As others*.
    """

    initial_count: Literal["exact", "bernoulli", "with-replacement"] = "exact"
    initial_rounding: Rounding = "half-even"
    initial_of: Literal["ones", "zeros"] = "ones"
    initial_width: Literal["float64", "float32", "float32-product"] = "float64"
    kept_minimum: Literal["refuse", "none", "one"] = "refuse"
    initial_choice: Literal["random", "magnitude", "magnitude-and-gradient"] = "random"
    er_cap: bool = True
    er_exhaust: Literal["all-maxima", "one-maximum"] = "all-maxima"
    er_zeros: Literal["unrounded", "floor"] = "unrounded"
    er_epsilon: Literal["solved", "searched"] = "solved"
    er_axes: Literal["first-two", "last-two"] = "first-two"
    conv_layout: Literal["OIHW", "HWIO"] = "OIHW"
    first_layer: Literal["as-others", "dense-if-uniform"] = "as-others"
    linear_layers: Literal["as-others", "dense"] = "as-others"
    last_layer: Literal["as-others", "density-0.2"] = "as-others"


@dataclass(frozen=True)
class PruneConventions:
    """How weights are pruned to a sparsity, once or along a schedule.

    Attributes
    ----------
    prune_of : {"all", "remaining"}
        What the amount is a fraction of: all entries of a tensor, so that it is the sparsity afterwards, or those that
        are left, so that repeated calls compound. *All*: the sparsity asked for is the sparsity got.
    prune_from : {"mask", "all"}
        Whether entries pruned earlier stay so, or every stored number competes anew. *Mask*: what is not stored is
        gone; the other needs the weights of pruned entries.
    global_scores : {"plain", "unit-norm"}
        Whether scores of several tensors are compared as they are, or each tensor's divided by their norm plus 1e-8.
        *Plain*: one threshold for |w|, as the word global says.
    nm_ties : {"lower", "higher"}
        Which of equal magnitudes in a group of an N:M mask stays. *Lower* position, as everywhere here.
    gmp_progress : {"plain", "plus-one", "over-end", "window-plus-one"}
        The progress x of gradual pruning, s = s_f + (s_i − s_f)(1 − x)³, between the begin b and the end e: at step t,
        (t − b)/(e − b), (t + 1 − b)/(e − b), (t − b)/e or (t − b)/(e − b + 1). *Plain*: s_i at b and s_f at e,
        as the paper has it.
    """

    prune_of: Literal["all", "remaining"] = "all"
    prune_from: Literal["mask", "all"] = "mask"
    global_scores: Literal["plain", "unit-norm"] = "plain"
    nm_ties: Literal["lower", "higher"] = "lower"
    gmp_progress: Literal["plain", "plus-one", "over-end", "window-plus-one"] = "plain"
