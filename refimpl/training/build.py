"""From a configuration to the objects that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from refimpl.methods import BaseMethod, Conventions, profile
from refimpl.methods.conventions import require_sparse
from refimpl.models.language_model import LanguageModel
from refimpl.optim import (
    SGD,
    Constant,
    Cosine,
    EpochDecay,
    LeakingASGD,
    LinearWarmup,
    Optimizer,
    Schedule,
    StepDecay,
    make_optimizer,
)
from refimpl.training.build_method import Plan, build_method
from refimpl.training.config import Config
from refimpl.training.sections import Optimizer as Options

AnyOptimizer = Optimizer | LeakingASGD
LearningRate = Callable[[int, int], float]
"""Learning rate as a function of the steps and the epochs that are done."""


def make_language_model(config: Config, vocabulary: int) -> LanguageModel:
    """Return the language model of a configuration."""
    known = {f.name for f in dataclasses.fields(LanguageModel)}
    return LanguageModel(vocabulary, **{name: v for name, v in vars(config.model).items() if name in known})


def make_conventions(config: Config) -> Conventions:
    """Return the profile that is named, with the single choices that replace its own."""
    chosen = profile(config.method.conventions)
    known = [f.name for f in dataclasses.fields(Conventions)]
    for name in config.method.convention:
        if name not in known:
            raise ValueError(f"there is no convention {name!r}; there are {', '.join(known)}")
    return dataclasses.replace(chosen, **config.method.convention)  # type: ignore[arg-type]


def make_method(config: Config, total_steps: int, steps_per_epoch: int | None = None) -> BaseMethod:
    """Return the method of a configuration, for a run of ``total_steps`` training steps.

    Raises
    ------
    ValueError
        If an option of the method is outside its range, or the conventions need what a sparse run does not store.
    """
    conventions = make_conventions(config)
    require_sparse(conventions)
    steps = max(total_steps, 1)
    return build_method(Plan(config.method, conventions, steps, steps_per_epoch or steps))


def make_optimizers(config: Config) -> tuple[AnyOptimizer, AnyOptimizer | None]:
    """Return the optimizer to begin with, and the averaging one that the non-monotonic trigger starts, if any."""
    options, conventions = config.optimizer, make_conventions(config)
    regrown = conventions.regrown
    decay = {"weight_decay": options.weight_decay}
    sgd = SGD(
        options.momentum,
        dampening=options.dampening,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        regrown=regrown,
    )
    match options.name:
        case "adam" | "adamw":
            return make_optimizer(options.name, betas=options.betas, eps=options.eps, regrown=regrown, **decay), None
        case "asgd":
            shape = {"lambd": options.lambd, "alpha": options.alpha, "t0": options.t0}
            return make_optimizer("asgd", regrown=regrown, **shape, **decay), None
        case "sgd":
            return sgd, None
        case "nt-asgd":
            averaging = (
                make_optimizer("nt-asgd-leaking", **decay)
                if options.leak
                else make_optimizer("nt-asgd", regrown=regrown, **decay)
            )
        case "snt-asgd":
            averaging = make_optimizer("snt-asgd", first_iterate=conventions.average_first, regrown=regrown, **decay)
    return sgd, averaging


def make_learning_rate(config: Config, steps_per_epoch: int, total_steps: int) -> LearningRate:
    """Return the learning rate as a function of the steps and epochs done.

    Raises
    ------
    ValueError
        If a warm-up by epochs leaves none of the run for the cosine.
    """
    options = config.optimizer
    warmup = options.warmup
    by_epoch = _by_epoch(options, -(-max(total_steps, 1) // steps_per_epoch))
    if by_epoch is not None:
        rate = by_epoch
        return lambda step, epoch: rate(epoch) * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
    by_step: Schedule
    match options.schedule:
        case "step-decay":
            by_step = StepDecay(
                options.lr, options.decay, tuple(range(options.decay_steps, total_steps, options.decay_steps))
            )
        case "cosine":
            by_step = Cosine(options.lr, options.lr_min, max(total_steps - warmup, 1))
        case _:
            by_step = Constant(options.lr)
    if warmup:
        by_step = LinearWarmup(warmup, by_step)
    return lambda step, epoch: by_step(step)


def _by_epoch(options: Options, epochs: int) -> Schedule | None:
    """Return a schedule that is called with the epochs done; None for one that goes by steps."""
    match options.schedule:
        case "epoch-decay":
            return EpochDecay(options.lr, options.decay, options.decay_start)
        case "milestones":
            given = options.milestones
            return StepDecay(options.lr, options.decay, (epochs // 2, 3 * epochs // 4) if given == "auto" else given)
        case "epoch-cosine":
            rising = options.warmup_epochs
            if rising >= epochs:
                raise ValueError(
                    f"optimizer.warmup_epochs is {rising} and epochs of the run are {epochs}; give fewer to the "
                    "warm-up, so that the cosine has room"
                )
            return LinearWarmup(rising, Cosine(options.lr, options.lr_min, epochs - rising), full="last")
        case _:
            return None
