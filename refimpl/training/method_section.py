"""The table ``[method]`` of a run's configuration: which weights exist, and when that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from refimpl.training.checks import (
    Auto,
    Count,
    CountOrZero,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    ProperFraction,
    Scalar,
    shown,
)
from refimpl.training.sections import Section

MethodName = Literal[
    "dense",
    "static", "magnitude-init", "snip", "grasp", "synflow",
    "one-shot", "gmp", "imp", "str", "movement", "iss",
    "set", "selfish", "rigl", "itop", "deepr", "dsr", "snfs", "granet", "mest",
    "acdc",
    "topkast", "dpf", "ste", "sr-ste",
]  # fmt: skip
FLOORED = ("set", "selfish", "snfs", "itop")
"""Methods whose drop fraction follows a cosine down to ``drop_fraction_floor`` over the whole run."""


STARTS_DENSE = ("one-shot", "gmp", "imp", "iss", "granet", "acdc")
"""Methods that may begin with dense arrays, and store some of them sparsely later."""


@dataclass(frozen=True)
class Method(Section):
    """Table ``[method]``: which weights exist, and when that changes.

    An option that a method does not know is ignored by it.

    Attributes
    ----------
    name : str
        The method of sparse training; ``refimpl methods`` lists them. ``"dense"`` ignores the other options of this
        table, but for ``power``.
    sparsity : float in [0, 1)
        Fraction of the prunable entries that are not stored, or, where all are stored, not used by the forward pass; of
        pruning methods, at the end. STR and ISS learn theirs and do not read it.
    allocation : {"uniform", "er", "erk"}
        How the entries are shared out between tensors.
    density : dict
        Sub-table ``[method.density]``: densities of single tensors, which do not take part in that; 1 leaves one dense.
    scope : {"auto", "local", "global"}
        Whether the entries of a tensor compete among themselves or with all others (magnitude-init, SNIP, GraSP,
        SynFlow, one-shot, GMP, IMP, AC/DC, DPF, STE). ``"auto"`` is what the method's paper has.
    pattern : str
        ``"2:4"``: of each four consecutive entries of a row two stay (SR-STE; one-shot, AC/DC and STE if not
        empty).
    power : float of at least 1
        Powerpropagation's exponent, with any method; 1 for none.
    drop_fraction : float in [0, 1]
        Fraction of a tensor's stored entries that the first exchange drops. It then follows a cosine over the run.
    drop_fraction_floor : float in [0, 1]
        Where that cosine ends (SET, Selfish-RNN, SNFS, ITOP). Equal to ``drop_fraction``, the fraction is constant.
    criterion : {"sign", "magnitude"}
        Whether SET counts the two signs apart.
    growth : {"random", "gradient", "random-unfired"}
        How ITOP grows.
    interval : int
        Training steps between two exchanges (RigL, ITOP, SNFS, DSR, GraNet, MEST, GMP, movement, DPF). 0 stands for the
        end of each epoch, where SET and Selfish-RNN always exchange (SNFS, MEST).
    begin_fraction, end_fraction : float in [0, 1]
        Fractions of the run's steps between which the method acts: GMP, GraNet, movement and DPF change the sparsity
        there, one-shot prunes at the first; RigL and MEST's soft bound end at the second.
    initial_sparsity : float in [0, 1)
        Where the sparsity of GMP, GraNet and DPF starts.
    rounds, rewind_epoch : int
        IMP: how many times training runs, the first time dense; and the epoch to whose end it goes back.
    scoring_rounds : int
        SynFlow's.
    compress, decompress : list of int, or "auto"
        AC/DC: the epochs, counted from 0, at whose beginnings the model is made sparse, and dense again. The first and
        the last phase of a run are a dense and a compressed one. ``"auto"``: in the proportions of the published
        schedule of 100 epochs.
    reset_momentum : bool
        AC/DC: whether the optimizer begins anew where the model is made dense again.
    count : {"exact", "strict-threshold"}
        AC/DC: whether as many entries are kept as the sparsity says, or as the authors' program keeps.
    penalty : float or "auto"
        λ: of Top-KAST's penalty (auto: 0), SR-STE's decay of what is not used (2e-4), the group lasso of ISS (7e-5),
        the decay that drives STR (1e-4), DeepR's L1 (1e-5), movement's soft form (0).
    temperature : float or "auto"
        DeepR: of its random walk (auto: 2.5e-11).
    soft : bool
        The soft form of DeepR (dormant weights walk on), of movement pruning (a threshold on the scores) and of MEST (a
        soft bound on the memory).
    threshold : float or "auto"
        DSR: magnitude below which weights are dropped first (auto: 1e-3). ISS: below which they become 0 (1e-4).
        Movement's soft form: of the scores' sigmoid (0.1). STR: the sigmoid of this number is the first threshold (−5).
    scores_lr : float
        Movement: learning rate of the scores, as a multiple of the weights'.
    gradient_weight : float
        MEST: λ of the score |w| + λ|g|.
    extra_density : float in [0, 1)
        MEST: what is held beyond the density that is asked for.
    backward_sparsity : float in [0, 1)
        Top-KAST: fraction of the entries that receive no gradient; at most ``sparsity``.
    refresh : int
        Top-KAST: training steps between two selections of the forward and backward sets.
    exploration_fraction : float in [0, 1]
        Top-KAST: fraction of the run's steps after which the backward set shrinks to the forward set.
    conventions : str
        Profile of the choices that a paper leaves open; ``refimpl conventions`` shows them.
    convention : dict
        Sub-table ``[method.convention]``: single choices that replace the profile's.
    """

    table: ClassVar[str] = "method"
    name: MethodName = "selfish"
    sparsity: ProperFraction = 0.8
    allocation: Literal["uniform", "er", "erk"] = "uniform"
    density: Mapping[str, Scalar] = field(default_factory=dict)
    scope: Literal["auto", "local", "global"] = "auto"
    pattern: str = ""
    power: Annotated[float, Interval(1)] = 1.0
    drop_fraction: Fraction = 0.5
    drop_fraction_floor: Fraction = 0.005
    criterion: Literal["sign", "magnitude"] = "sign"
    growth: Literal["random", "gradient", "random-unfired"] = "random"
    interval: CountOrZero = 100
    begin_fraction: Fraction = 0.0
    end_fraction: Fraction = 0.75
    initial_sparsity: ProperFraction = 0.0
    rounds: Annotated[int, Interval(2)] = 4
    rewind_epoch: CountOrZero = 0
    scoring_rounds: Count = 100
    compress: tuple[Count, ...] | Auto = "auto"
    decompress: tuple[Count, ...] | Auto = "auto"
    reset_momentum: bool = True
    count: Literal["exact", "strict-threshold"] = "exact"
    penalty: NonNegative | Auto = "auto"
    temperature: NonNegative | Auto = "auto"
    soft: bool = False
    threshold: float | Auto = "auto"
    scores_lr: Positive = 1.0
    gradient_weight: NonNegative = 1.0
    extra_density: ProperFraction = 0.05
    backward_sparsity: ProperFraction = 0.5
    refresh: Count = 100
    exploration_fraction: Fraction = 1.0
    conventions: str = "default"
    convention: Mapping[str, Scalar] = field(default_factory=dict)

    def check(self) -> None:
        """Options that depend on each other are in order."""
        for name, density in self.density.items():
            if isinstance(density, (str, bool)) or not 0 < density <= 1:
                raise ValueError(f"method.density.{name} is {shown(density)}; give a number above 0 and at most 1")
        if self.name in FLOORED and self.drop_fraction_floor > self.drop_fraction:
            raise ValueError(
                f"method.drop_fraction is {self.drop_fraction}, below method.drop_fraction_floor, which is "
                f"{self.drop_fraction_floor}; give a floor that is not above it"
            )
        if self.name in ("gmp", "dpf", "granet", "movement") and self.begin_fraction > self.end_fraction:
            raise ValueError(
                f"method.begin_fraction is {self.begin_fraction}, above method.end_fraction, which is "
                f"{self.end_fraction}; give at most that"
            )
        if self.name in ("gmp", "dpf", "granet") and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"method.initial_sparsity is {self.initial_sparsity}, above method.sparsity, which is {self.sparsity}; "
                "give at most that, since this method only removes"
            )
        if self.interval == 0 and self.name not in ("snfs", "mest", "set", "selfish") and self.uses_interval:
            raise ValueError(f"method.interval is 0; {self.name} exchanges between steps, so give at least 1")
        if self.name == "topkast" and self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"method.backward_sparsity is {self.backward_sparsity}, above method.sparsity, which is "
                f"{self.sparsity}; give at most that, since Top-KAST's gradient reaches every weight in use"
            )
        if self.compress == "auto" and self.decompress != "auto":
            raise ValueError(
                f"method.decompress is {shown(self.decompress)} and method.compress is 'auto'; give both, or neither"
            )
        if self.pattern or self.name == "sr-ste":
            self.groups  # noqa: B018

    @property
    def uses_interval(self) -> bool:
        """Whether the method reads ``interval``."""
        return self.name in ("rigl", "itop", "dsr", "granet", "gmp", "movement", "dpf", "snfs", "mest")

    @property
    def groups(self) -> tuple[int, int]:
        """N and M of the pattern.

        Raises
        ------
        ValueError
            If it is not written N:M with 0 < N < M.
        """
        text = self.pattern or "2:4"
        n, colon, m = text.partition(":")
        if colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m):
            return int(n), int(m)
        raise ValueError(f"method.pattern is {text!r}; give how many of how many entries stay, such as '2:4'")
