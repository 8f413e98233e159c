"""The tables of a run's configuration: one frozen dataclass for each, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast, get_type_hints

from refimpl.training.checks import (
    Count,
    CountOrZero,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    ProperFraction,
    Scalar,
    checked,
)


def _annotations_of(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


annotations_of = cast(Callable[[type[Any]], dict[str, Any]], cache(_annotations_of))
"""Return the options of a table (or of the whole configuration) with their types, ranges included."""


@dataclass(frozen=True)
class Section:
    """A table of options: each field is checked against its annotation, then ``check`` compares fields."""

    table: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, annotation in annotations_of(type(self)).items():
            object.__setattr__(self, name, checked(f"{self.table}.{name}", annotation, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raise a ValueError of one sentence if two options contradict each other."""


@dataclass(frozen=True)
class Data(Section):
    """Table ``[data]``: the text to learn.

    Attributes
    ----------
    corpus : str
        ``"default"``, the English text that Python itself carries, or the path of a folder with a train, a
        validation and a test file. ``None`` means the default too.
    eval_batch_size : int
        Columns in which the validation and test texts are read. Tokens beyond a multiple of it are not
        counted, so the perplexity depends on it a little.
    """

    table: ClassVar[str] = "data"
    corpus: str = "default"
    eval_batch_size: Count = 10

    def __post_init__(self) -> None:
        given: Any = self.corpus
        if given is None:
            object.__setattr__(self, "corpus", "default")
        elif isinstance(given, os.PathLike):
            object.__setattr__(self, "corpus", os.fspath(given))
        super().__post_init__()

    def check(self) -> None:
        """An empty path would be the current folder, which nobody means."""
        if not self.corpus:
            raise ValueError("data.corpus is ''; give 'default' or the path of a folder with the text files")


@dataclass(frozen=True)
class Model(Section):
    """Table ``[model]``: the network.

    Attributes
    ----------
    name : {"lstm"}
        Stacked LSTM language model: embedding, LSTM layers, decoder.
    embedding_size, hidden_size, layers : int
        Width of the embedding, units of each LSTM layer, number of LSTM layers.
    tied : bool
        Use the embedding as the decoder; the two sizes must then be equal.
    dropout_embedding : float
        Probability that a *word* is dropped from the embedding for a whole window.
    dropout_input, dropout_hidden, dropout_output : float
        Probability that a feature is dropped after the embedding, between LSTM layers, and before the
        decoder.
    weight_drop : float
        Probability that an entry of a recurrent weight is dropped for a whole window.
    dropout_kind : {"plain", "locked"}
        Draw a new mask for every time step, or one for the whole window.
    init_scale : float
        Embedding and decoder start uniform in ±``init_scale``; LSTM weights uniform in ±1/√``hidden_size``.
    """

    table: ClassVar[str] = "model"
    name: Literal["lstm"] = "lstm"
    embedding_size: Count = 200
    hidden_size: Count = 200
    layers: Count = 2
    tied: bool = False
    dropout_embedding: ProperFraction = 0.0
    dropout_input: ProperFraction = 0.0
    dropout_hidden: ProperFraction = 0.0
    dropout_output: ProperFraction = 0.0
    weight_drop: ProperFraction = 0.0
    dropout_kind: Literal["plain", "locked"] = "plain"
    init_scale: Positive = 0.1

    def check(self) -> None:
        """A tied decoder is the embedding, so its columns are the hidden units."""
        if self.tied and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"model.tied is true but model.embedding_size is {self.embedding_size} and model.hidden_size "
                f"is {self.hidden_size}; give both the same size or set model.tied to false"
            )


@dataclass(frozen=True)
class Method(Section):
    """Table ``[method]``: which weights exist, and when that changes.

    Attributes
    ----------
    name : {"dense", "static", "set", "rigl", "selfish", "topkast"}
        The method of sparse training. ``"dense"`` ignores the other options of this table.
    sparsity : float in [0, 1)
        Fraction of the prunable entries that are not stored (for Top-KAST: not used by the forward pass).
    allocation : {"uniform", "er", "erk"}
        How the entries are shared out between tensors.
    drop_fraction : float in [0, 1]
        Fraction of a tensor's stored entries that the first exchange drops. It then follows a cosine over the
        run.
    drop_fraction_floor : float in [0, 1]
        Where that cosine ends (SET and Selfish-RNN). Equal to ``drop_fraction``, the fraction is constant.
    interval : int
        Optimizer steps between two exchanges (RigL); SET and Selfish-RNN exchange at the end of each epoch.
    end_fraction : float in [0, 1]
        Fraction of the run's steps after which RigL no longer exchanges.
    backward_sparsity : float in [0, 1)
        Top-KAST: fraction of the entries that receive no gradient; at most ``sparsity``.
    refresh : int
        Top-KAST: optimizer steps between two selections of the forward and backward sets.
    conventions : str
        Profile of the choices that a paper leaves open: ``"default"``, ``"selfish-authors"``, …
    convention : dict
        Sub-table ``[method.convention]``: single choices that replace the profile's.
    """

    table: ClassVar[str] = "method"
    name: Literal["dense", "static", "set", "rigl", "selfish", "topkast"] = "selfish"
    sparsity: ProperFraction = 0.8
    allocation: Literal["uniform", "er", "erk"] = "uniform"
    drop_fraction: Fraction = 0.5
    drop_fraction_floor: Fraction = 0.005
    interval: Count = 100
    end_fraction: Fraction = 0.75
    backward_sparsity: ProperFraction = 0.5
    refresh: Count = 100
    conventions: str = "default"
    convention: Mapping[str, Scalar] = field(default_factory=dict)

    def check(self) -> None:
        """The drop fraction falls, and Top-KAST's backward set contains its forward set."""
        if self.name in ("set", "selfish") and self.drop_fraction_floor > self.drop_fraction:
            raise ValueError(
                f"method.drop_fraction is {self.drop_fraction}, below method.drop_fraction_floor, which is "
                f"{self.drop_fraction_floor}; give a floor that is not above it"
            )
        if self.name == "topkast" and self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"method.backward_sparsity is {self.backward_sparsity}, above method.sparsity, which is "
                f"{self.sparsity}; give at most that, since Top-KAST's gradient reaches every weight in use"
            )


@dataclass(frozen=True)
class Optimizer(Section):
    """Table ``[optimizer]``: how values move.

    Attributes
    ----------
    name : {"sgd", "adam", "adamw", "asgd", "nt-asgd", "snt-asgd"}
        ``"nt-asgd"`` and ``"snt-asgd"`` are SGD until the non-monotonic trigger, then the averaging of that
        name.
    lr : float
        Learning rate.
    momentum, dampening, nesterov
        SGD's, as in ``torch.optim.SGD``.
    weight_decay : float
        L2 penalty added to the gradient; for ``"adamw"`` the decoupled decay.
    betas, eps
        Adam's decay rates of the two moments, and the number that keeps the quotient finite.
    lambd, alpha, t0
        ASGD's decay, exponent and start of averaging, as in ``torch.optim.ASGD``.
    nonmono : int
        The trigger's n: averaging starts when the validation loss is worse than the best one of more than n
        epochs ago.
    leak : bool
        NT-ASGD under dynamic sparsity: keep averages of entries that are not stored, as masked
        implementations do (this takes dense memory), or drop them with their entries.
    clip : float
        Largest norm of the gradient over all parameters together; 0 does not clip.
    schedule : {"constant", "epoch-decay", "step-decay", "cosine"}
        The learning rate over time.
    decay : float
        Factor of a decay: each epoch after ``decay_start`` (``"epoch-decay"``), or every ``decay_steps``
        steps (``"step-decay"``).
    decay_start : int
        Epochs at the full learning rate.
    decay_steps : int
        Steps between two decays.
    lr_min : float
        Where the cosine ends.
    warmup : int
        Steps over which the learning rate first rises linearly; 0 for none.
    """

    table: ClassVar[str] = "optimizer"
    name: Literal["sgd", "adam", "adamw", "asgd", "nt-asgd", "snt-asgd"] = "snt-asgd"
    lr: Positive = 20.0
    momentum: ProperFraction = 0.0
    dampening: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6
    nonmono: CountOrZero = 5
    leak: bool = False
    clip: NonNegative = 0.0
    schedule: Literal["constant", "epoch-decay", "step-decay", "cosine"] = "constant"
    decay: Annotated[float, Interval(0, 1, "(]")] = 0.5
    decay_start: CountOrZero = 0
    decay_steps: Count = 1000
    lr_min: NonNegative = 0.0
    warmup: CountOrZero = 0

    def check(self) -> None:
        """Nesterov's step is defined for a momentum that is not damped."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"optimizer.nesterov is true with momentum {self.momentum} and dampening {self.dampening}; "
                f"give a momentum above 0 and dampening 0, or set nesterov to false"
            )
        if self.schedule == "cosine" and self.lr_min > self.lr:
            raise ValueError(f"optimizer.lr_min is {self.lr_min}, above optimizer.lr, which is {self.lr}; give less")


@dataclass(frozen=True)
class Training(Section):
    """Table ``[training]``: how long, in which portions, and what is kept.

    Attributes
    ----------
    epochs : int
        Passes over the training text.
    batch_size, bptt : int
        Columns, and time steps through which the gradient flows back.
    checkpoint_every : int
        Optimizer steps between two checkpoints; 0 writes them at the end of each epoch only.
    keep : int
        How many of the newest checkpoints stay (the best one stays besides).
    threads : int
        Threads of the kernels; 0 chooses. The numbers do not depend on it.
    max_steps : int
        Stop after that many optimizer steps; 0 does not limit them.
    """

    table: ClassVar[str] = "training"
    epochs: Count = 3
    batch_size: Count = 20
    bptt: Count = 35
    checkpoint_every: CountOrZero = 0
    keep: Count = 2
    threads: CountOrZero = 0
    max_steps: CountOrZero = 0
