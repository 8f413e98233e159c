r"""Training operations as the literature counts them: the papers' formulas, and the same by the step.

Common to all: the backward pass is twice the forward pass in every layer (the first one's input gradient included),
multiplication and addition count apart, cost is in proportion to the stored entries, and normalisation, loss, biases,
optimizer and the choice of what to drop are free. :math:`f_D` and :math:`f_S` are the operations of a forward pass of
one sample through the dense and through the sparse model, :math:`f_S = \sum_l \rho_l f_{D,l}`; :math:`f_A` and
:math:`f_B` those at Top-KAST's two sets.

===================================  =============================================================  ==============
method                               operations for one sample of training                          status
===================================  =============================================================  ==============
dense                                :math:`3 f_D`                                                  verified
SET                                  :math:`3 f_S`                                                  verified
static, SNIP, GraSP, SynFlow,        :math:`3 f_S`, of the present supports                         derived
DeepR, DSR, MEST, Selfish, one-shot
RigL                                 :math:`(3 f_S \Delta T + 2 f_S + f_D) / (\Delta T + 1)`        verified
SNFS                                 :math:`2 f_S + f_D`                                            verified
GMP, dense weight gradient           :math:`2 f_D (1 - \bar s) + f_D`                               verified
GMP, sparse weight gradient          :math:`3 f_D\,E_t(1 - s_t)`                                    remembered
GraNet, ITOP by gradient             RigL's, at the present :math:`f_S`                             derived
Top-KAST                             :math:`2 f_A + f_B`                                            remembered
STE, SR-STE, DPF, movement           :math:`2 f_S(t) + f_D`                                         derived
STR                                  :math:`3 f_S(t)`                                               derived
AC/DC                                :math:`3 f_D` and :math:`3 f_S`, in turn                       verified
lottery tickets                      :math:`3 f_D \rho_r` in round r                                derived
ISS                                  :math:`3 f_D` until units are removed                          derived
===================================  =============================================================  ==============

*verified*: as in the authors' counting code. *remembered*: as the paper is remembered; unchecked. *derived*: by the
same rules, here.

The programs behind published tables of convolutional networks add to :math:`f` what no sparsity removes:
:mod:`refimpl.training.countings`.

The functions take whatever adds and multiplies, :class:`fractions.Fraction` included. :class:`Formula` counts the same
step by step from a run's own sets; a test holds the two against each other, and :meth:`Formula.differences` names what
lies between a formula and what was executed.

References
----------
Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery", ICML 2020, appendix on FLOPs, and its counting code; Dettmers,
Zettlemoyer, "Sparse networks from scratch", 2019; Zhu, Gupta, "To prune, or not to prune", 2018; Jayakumar et al.,
"Top-KAST", NeurIPS 2020; Peste et al., "AC/DC", NeurIPS 2021, and its counting code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from refimpl.training.flops import Counts, Specs, Terms, forward

Number = Any
"""int, float or Fraction."""


def dense(f_d: Number) -> Number:
    """Return 3 f_D, verified in the counting code of AC/DC's authors."""
    return 3 * f_d


def static(f_s: Number) -> Number:
    """Return 3 f_S: SET verified in the authors' counting code, the others that keep S = A = B derived here."""
    return 3 * f_s


def rigl(f_s: Number, f_d: Number, interval: int) -> Number:
    r"""Return :math:`(3 f_S \Delta T + 2 f_S + f_D) / (\Delta T + 1)`, verified in the authors' counting code.

    One batch more for each exchange, of which a forward pass, the inputs' gradients and a dense weight gradient are
    taken. The code does not let it end; see :func:`rigl_until`.
    """
    return (3 * f_s * interval + 2 * f_s + f_d) / (interval + 1)


def rigl_until(f_s: Number, f_d: Number, interval: int, steps: int, end_step: int | None = None) -> Number:
    """Return RigL's mean over a run of ``steps`` steps: the formula up to the last exchange, then 3 f_S (derived here).

    Exchanges are at the multiples of the interval below ``end_step``, and each is a batch beside the steps.
    """
    last = steps if end_step is None else min(steps, end_step - 1)
    exchanges = last // interval
    periods = exchanges * (interval + 1) * rigl(f_s, f_d, interval)
    return (periods + (steps - exchanges * interval) * static(f_s)) / (steps + exchanges)


def snfs(f_s: Number, f_d: Number) -> Number:
    """Return 2 f_S + f_D, verified in the authors' counting code; f_S drifts as weights move between layers."""
    return 2 * f_s + f_d


def gmp(f_d: Number, sparsities: Sequence[Number], gradient: Literal["dense", "sparse"] = "dense") -> Number:
    r"""Return the mean over all steps of gradual magnitude pruning, for sparsities :math:`s_t`, one for each.

    :math:`2 f_D (1 - \bar s) + f_D` with a dense weight gradient, verified in the counting code of RigL's authors;
    :math:`3 f_D\,E_t(1 - s_t)` with a sparse one, as RigL's paper is remembered; unchecked. Both take the operations to
    be in proportion to the overall density.
    """
    kept = sum(1 - s for s in sparsities) / len(sparsities)
    return 2 * f_d * kept + f_d if gradient == "dense" else 3 * f_d * kept


def granet(f_s: Sequence[Number], f_d: Number, interval: int) -> Number:
    """Return the mean of RigL's formula over the f_S of the periods between two exchanges (derived here)."""
    return sum(rigl(f, f_d, interval) for f in f_s) / len(f_s)


def topkast(f_a: Number, f_b: Number) -> Number:
    """Return 2 f_A + f_B (as the paper is remembered; unchecked); renewing the sets is free."""
    return 2 * f_a + f_b


def straight_through(f_s: Sequence[Number], f_d: Number) -> Number:
    """Return the mean of 2 f_S(t) + f_D: STE, SR-STE, DPF and movement pruning (derived here)."""
    return sum(2 * f + f_d for f in f_s) / len(f_s)


def soft_threshold(f_s: Sequence[Number]) -> Number:
    """Return the mean of 3 f_S(t), of the sets that STR's thresholds leave (derived here)."""
    return sum(3 * f for f in f_s) / len(f_s)


def mest(f_s: Number, f_wider: Number, soft_steps: int, steps: int) -> Number:
    """Return MEST's mean with a soft bound: 3 f at the wider supports for ``soft_steps`` of the steps (derived)."""
    return (3 * f_wider * soft_steps + 3 * f_s * (steps - soft_steps)) / steps


def acdc(f_d: Number, f_s: Number, phases: Iterable[tuple[Literal["dense", "compressed"], int]]) -> Number:
    """Return AC/DC's mean over its phases, each with its number of steps: 3 f_D or 3 f_S a step.

    Verified in its authors' counting code, which takes each epoch's f_S at its end.
    """
    phases = list(phases)
    spent = sum(steps * 3 * (f_d if kind == "dense" else f_s) for kind, steps in phases)
    return spent / sum(steps for _, steps in phases)


def imp(f_d: Number, round_steps: Sequence[int], kept: Number) -> Number:
    r"""Return all rounds of iterative magnitude pruning: :math:`\sum_r 3 f_D k^r` times the steps of round r.

    A sum, not a mean, since the rounds are what a ticket costs; ``kept`` is k, the fraction that a pruning keeps
    (derived here; ideal kernels).
    """
    return sum(3 * f_d * kept**r * steps for r, steps in enumerate(round_steps))


def iss(f_d: Number) -> Number:
    """Return 3 f_D, which holds until units are removed physically (derived here)."""
    return 3 * f_d


def snip_scoring(f_d: Number, samples: int) -> Number:
    """Return SNIP's passes before training: 3 f_D for each sample of its batch (derived here)."""
    return 3 * f_d * samples


def grasp_scoring(f_d: Number, samples: int) -> Number:
    """Return GraSP's: a gradient, and the gradient of its product with itself at twice the cost (derived here)."""
    return 3 * f_d * samples + 2 * 3 * f_d * samples


def synflow_scoring(f_s: Sequence[Number]) -> Number:
    """Return SynFlow's: a forward and a backward pass of one sample a round, at that round's f_S (derived here)."""
    return sum(3 * f for f in f_s)


@dataclass(frozen=True)
class Formula:
    """A published way of counting, as sets: which ones its two products and its weight gradient are over.

    Attributes
    ----------
    name, text : str
        The text is as in the table of the module.
    status : {"verified", "remembered", "derived"}
        See the module.
    used : {"A", "all"}
        Entries of the forward pass and of the inputs' gradients.
    graded : {"B", "all"}
        Entries of the weight gradient.
    exchange_batch : bool
        Whether an exchange by gradient has a batch of its own: both products on A, and a dense weight gradient.
    """

    name: str
    text: str
    status: Literal["verified", "remembered", "derived"]
    used: Literal["A", "all"] = "A"
    graded: Literal["B", "all"] = "B"
    exchange_batch: bool = False

    def step_terms(self, specs: Specs, used: Counts, graded: Counts, *, exchange: bool = False) -> Terms:
        """Return the operations for one sample of a step, and of the exchange's batch if there is one.

        Parameters
        ----------
        specs, used, graded
            As in :func:`refimpl.training.flops.step_terms`.
        exchange : bool
            Whether the step exchanges by dense gradients.
        """
        f_a, f_b, f_d = _passes(specs, used, graded)
        once = f_d if self.used == "all" else f_a
        terms = {"forward": once, "input_gradient": once, "weight_gradient": f_d if self.graded == "all" else f_b}
        if exchange and self.exchange_batch:
            terms["exchange_batch"] = 2 * f_a + f_d
        return terms

    def batches(self, *, exchange: bool = False) -> int:
        """Return how many batches a step stands for."""
        return 2 if exchange and self.exchange_batch else 1

    def differences(
        self, specs: Specs, used: Counts, graded: Counts, executed: Terms, *, exchange: bool = False
    ) -> Terms:
        """Return what a step executes beyond the formula, by name, for one sample; less is negative.

        Parameters
        ----------
        executed : dict of str to float
            The step's executed terms, for one sample, of which those of gradients outside B are read.
        """
        f_a, f_b, f_d = _passes(specs, used, graded)
        first = forward(specs, {name: n for name, n in used.items() if not specs[name].input_gradient})
        found = {"first_layer": -first}
        looked_at: Terms = {name: executed[name] for name in ("growth", "observed") if name in executed}
        if self.used == "all":
            found["forward_set"] = 2 * (f_a - f_d)
        if self.graded == "all":
            found["gradient_set"] = f_b + sum(looked_at.values()) - f_d
        elif exchange and self.exchange_batch:
            found["shared_batch"] = -(2 * f_a + f_b)
        else:
            found |= looked_at
        return found | {name: executed[name] for name in ("dense_norm", "leaking_average") if name in executed}


DIFFERENCES = {
    "first_layer": "the first layer needs no gradient of its input",
    "forward_set": "products on A, not on everything",
    "gradient_set": "weight gradient on B, not on everything",
    "shared_batch": "an exchange shares its batch with a step or takes its place, and is no batch more",
    "growth": "gradients outside B that decide what grows",
    "observed": "gradients outside B that the method remembers",
    "dense_norm": "gradients outside B for a norm over everything",
    "leaking_average": "gradients outside B for an average that leaks",
    "scoring": "passes before training",
}
"""What each named difference between executed and published stands for."""


def _passes(specs: Specs, used: Counts, graded: Counts) -> tuple[float, float, float]:
    """Return f_A, f_B and f_D."""
    return forward(specs, used), forward(specs, graded), forward(specs, {name: specs[name].size for name in used})


_SPARSE = Formula("sparse", "3 f_S", "derived")
FORMULAS = {
    formula.name: formula
    for formula in (
        _SPARSE,
        Formula("dense", "3 f_D", "verified", used="all", graded="all"),
        Formula("set", "3 f_S", "verified"),
        Formula("rigl", "(3 f_S dT + 2 f_S + f_D) / (dT + 1)", "verified", exchange_batch=True),
        Formula("granet", "(3 f_S(t) dT + 2 f_S(t) + f_D) / (dT + 1)", "derived", exchange_batch=True),
        Formula("snfs", "2 f_S + f_D", "verified", graded="all"),
        Formula("gmp", "2 f_D (1 - mean s) + f_D", "verified", graded="all"),
        Formula("gmp-sparse-gradient", "3 f_D mean(1 - s_t)", "remembered"),
        Formula("topkast", "2 f_A + f_B", "remembered"),
        Formula("straight-through", "2 f_S(t) + f_D", "derived", graded="all"),
        Formula("changing", "3 f_S(t)", "derived"),
        Formula("acdc", "3 f_D and 3 f_S, in turn", "verified"),
        Formula("iss", "3 f_D until units are removed", "derived", used="all", graded="all"),
    )
}
"""The formulas by name."""

BY_METHOD = {
    "dense": "dense", "set": "set", "rigl": "rigl", "itop": "granet", "granet": "granet", "snfs": "snfs",
    "gmp": "gmp", "topkast": "topkast", "ste": "straight-through", "sr-ste": "straight-through",
    "dpf": "straight-through", "movement": "straight-through", "str": "changing", "imp": "changing",
    "one-shot": "changing", "acdc": "acdc", "mest": "changing", "dsr": "changing", "iss": "iss",
}  # fmt: skip
"""The formula of each method; those that are not listed keep S = A = B, as ``"sparse"``."""


def formula_of(method: object) -> Formula:
    """Return the formula of a method: of its class's ``flops_formula`` if it has one, or by its name.

    A method that wraps another, as powerpropagation does under ``inner``, has that one's.

    Raises
    ------
    ValueError
        If ``flops_formula`` names none of :data:`FORMULAS`.
    """
    method = getattr(method, "inner", method)
    chosen = getattr(method, "flops_formula", None) or BY_METHOD.get(getattr(method, "name", ""), _SPARSE.name)
    if chosen not in FORMULAS:
        raise ValueError(f"there is no formula of operations {chosen!r}; there are {', '.join(FORMULAS)}")
    return FORMULAS[chosen]
