"""The tables of a run's configuration: one frozen dataclass for each, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast, get_type_hints

from refimpl.training.checks import (
    Auto,
    Count,
    CountOrZero,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    ProperFraction,
    checked,
    shown,
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
    """Table ``[data]``: what to learn from.

    Attributes
    ----------
    corpus : str
        A language model: ``"default"``, the English text that Python itself carries, or the path of a folder with a
        train, a validation and a test file. A classifier: the path of a folder with images; see
        `refimpl.datasets.load_image_folder`. ``None`` means the default too.
    eval_batch_size : int
        Columns in which the validation and test texts are read. Tokens beyond a multiple of it are not
        counted, so the perplexity depends on it a little. A classifier: images that are evaluated together, of which
        none is left out.
    valid_fraction : float in (0, 1)
        A classifier: fraction of the training images, the last ones, that are for validation alone. A text has a file
        for that.
    augment : bool
        A classifier: move the training images at random by a few pixels, and mirror half of them.
    flip : bool
        Whether ``augment`` mirrors; false for images that mean something else in a mirror, such as digits.
    """

    table: ClassVar[str] = "data"
    corpus: str = "default"
    eval_batch_size: Count = 10
    valid_fraction: Annotated[float, Interval(0, 1, "()")] = 0.1
    augment: bool = False
    flip: bool = True

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
            raise ValueError("data.corpus is ''; give 'default' or the path of a folder with the data")


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
    schedule : {"constant", "epoch-decay", "step-decay", "milestones", "cosine", "epoch-cosine"}
        The learning rate over time. The cosines fall over the whole run, in each step or from epoch to epoch.
    decay : float
        Factor of a decay: each epoch after ``decay_start`` (``"epoch-decay"``), every ``decay_steps`` steps
        (``"step-decay"``), or at each of ``milestones``.
    decay_start : int
        Epochs at the full learning rate.
    decay_steps : int
        Steps between two decays.
    milestones : list of int, or "auto"
        Epochs that are done when the decay of ``"milestones"`` is applied; ``"auto"`` is one half and three quarters of
        the run.
    lr_min : float
        Where the cosine ends.
    warmup : int
        Steps over which the learning rate first rises linearly; 0 for none.
    warmup_epochs : int
        For ``"epoch-cosine"``: epochs over which the learning rate first rises linearly, the last of them at the full
        rate, before the cosine begins.
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
    schedule: Literal["constant", "epoch-decay", "step-decay", "milestones", "cosine", "epoch-cosine"] = "constant"
    decay: Annotated[float, Interval(0, 1, "(]")] = 0.5
    decay_start: CountOrZero = 0
    decay_steps: Count = 1000
    milestones: tuple[Count, ...] | Auto = "auto"
    lr_min: NonNegative = 0.0
    warmup: CountOrZero = 0
    warmup_epochs: CountOrZero = 0

    def check(self) -> None:
        """Nesterov's step is defined for a momentum that is not damped, and an option of a schedule needs it."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"optimizer.nesterov is true with momentum {self.momentum} and dampening {self.dampening}; "
                f"give a momentum above 0 and dampening 0, or set nesterov to false"
            )
        if self.schedule in ("cosine", "epoch-cosine") and self.lr_min > self.lr:
            raise ValueError(f"optimizer.lr_min is {self.lr_min}, above optimizer.lr, which is {self.lr}; give less")
        for option, schedule in (("warmup_epochs", "epoch-cosine"), ("milestones", "milestones")):
            if getattr(self, option) not in (0, "auto") and self.schedule != schedule:
                raise ValueError(
                    f"optimizer.{option} is {shown(getattr(self, option))} and optimizer.schedule is "
                    f"{self.schedule!r}, which does not read it; give schedule={schedule}, or leave it out"
                )


@dataclass(frozen=True)
class Training(Section):
    """Table ``[training]``: how long, in which portions, and what is kept.

    Attributes
    ----------
    epochs : int
        Passes over the training text or images.
    batch_size : int
        Columns of a text, or images in a batch.
    bptt : int
        A language model: time steps through which the gradient flows back.
    label_smoothing : float in [0, 1]
        A classifier: share of the target that is spread over all classes. Validation and test losses are the plain
        ones.
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
    label_smoothing: Fraction = 0.0
    checkpoint_every: CountOrZero = 0
    keep: Count = 2
    threads: CountOrZero = 0
    max_steps: CountOrZero = 0
