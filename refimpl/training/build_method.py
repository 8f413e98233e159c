"""From the table ``[method]`` of a configuration to the method that it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refimpl.methods import METHODS, Allocation, BaseMethod, Conventions, density_from_sparsity
from refimpl.methods.phases import Phases
from refimpl.methods.powerprop import Powerpropagation
from refimpl.methods.schedule import Cosine
from refimpl.training.method_section import Method


@dataclass(frozen=True)
class Plan:
    """What a method is built from.

    Attributes
    ----------
    options : Method
    conventions : Conventions
    steps, epoch : int
        Training steps of the run, and of an epoch.
    """

    options: Method
    conventions: Conventions
    steps: int
    epoch: int

    @property
    def allocation(self) -> Allocation:
        """How dense, and how the tensors share it."""
        given = {name: float(density) for name, density in self.options.density.items()}
        return Allocation(density_from_sparsity(self.options.sparsity), self.options.allocation, given)

    @property
    def cosine(self) -> Cosine:
        """The drop fraction that falls to its floor over the whole run."""
        return Cosine(self.options.drop_fraction, self.steps, self.options.drop_fraction_floor)

    @property
    def window(self) -> dict[str, int]:
        """First and last step of a sparsity that changes, and the steps between its changes."""
        begin = round(self.options.begin_fraction * self.steps)
        return {"begin_step": begin, "end_step": max(self.end, begin + 1), "interval": self.options.interval}

    @property
    def end(self) -> int:
        """Last step of the method's activity."""
        return max(1, round(self.options.end_fraction * self.steps))

    @property
    def interval(self) -> int | None:
        """Steps between two exchanges; None for the end of each epoch."""
        return self.options.interval or None

    def auto(self, option: str, default: Any) -> Any:
        """Return an option, or what ``"auto"`` stands for."""
        given = getattr(self.options, option)
        return default if given == "auto" else given


def _imp(plan: Plan) -> dict[str, Any]:
    """All rounds together take the run's epochs; a round that rewinds is shorter by what it does not repeat."""
    options, epochs = plan.options, max(1, round(plan.steps / plan.epoch))
    whole, rest = divmod(epochs + (options.rounds - 1) * options.rewind_epoch, options.rounds)
    if rest or whole <= options.rewind_epoch:
        raise ValueError(
            f"{epochs} epochs cannot be divided into method.rounds = {options.rounds} rounds that end with an epoch "
            f"and go back to epoch {options.rewind_epoch}; give training.epochs = rounds * k - (rounds - 1) * "
            "rewind_epoch for some k above rewind_epoch"
        )
    return {
        "rounds": options.rounds, "round_steps": whole * plan.epoch, "rewind_step": options.rewind_epoch * plan.epoch,
    }  # fmt: skip


def _acdc(plan: Plan) -> dict[str, Any]:
    """The phases must fit the run; by default they are spread over it."""
    options, epochs = plan.options, math.ceil(plan.steps / plan.epoch)
    compress, decompress = options.compress, options.decompress
    if compress == "auto":
        phases = Phases.spread(epochs)
    else:
        phases = Phases(compress, () if decompress == "auto" else decompress)
    phases.until(epochs)
    return {
        "phases": phases, "epoch_steps": plan.epoch, "pattern": options.groups if options.pattern else None,
        "scope": plan.auto("scope", "local" if options.pattern else "global"),
        "reset_momentum": options.reset_momentum, "count": options.count,
    }  # fmt: skip


Arguments = Callable[[Plan], dict[str, Any]]

ARGUMENTS: dict[str, Arguments] = {
    "static": lambda p: {},
    "magnitude-init": lambda p: {"scope": p.auto("scope", "local")},
    "snip": lambda p: {"scope": p.auto("scope", "global")},
    "grasp": lambda p: {"scope": p.auto("scope", "global")},
    "synflow": lambda p: {"scope": p.auto("scope", "global"), "rounds": p.options.scoring_rounds},
    "one-shot": lambda p: {
        "at_step": max(1, p.window["begin_step"]),
        "scope": p.auto("scope", "local"),
        "pattern": p.options.groups if p.options.pattern else None,
    },
    "gmp": lambda p: {
        **p.window, "scope": p.auto("scope", "local"), "initial_sparsity": p.options.initial_sparsity,
    },
    "imp": lambda p: {**_imp(p), "scope": p.auto("scope", "global")},
    "acdc": _acdc,
    "movement": lambda p: {
        **p.window,
        "form": "soft" if p.options.soft else "hard",
        "threshold": p.auto("threshold", 0.1),
        "penalty": p.auto("penalty", 0.0),
        "scores_lr": p.options.scores_lr,
    },
    "set": lambda p: {"drop_fraction": p.cosine, "criterion": p.options.criterion},
    "selfish": lambda p: {"drop_fraction": p.cosine},
    "rigl": lambda p: {"drop_fraction": p.options.drop_fraction, "interval": p.options.interval, "end_step": p.end},
    "itop": lambda p: {
        "drop_fraction": p.cosine, "total_steps": p.steps, "interval": p.options.interval, "growth": p.options.growth,
    },
    "deepr": lambda p: {
        "penalty": p.auto("penalty", 1e-5),
        "temperature": p.auto("temperature", 2.5e-11),
        "form": "soft" if p.options.soft else "strict",
    },
    "dsr": lambda p: {
        "drop_fraction": p.options.drop_fraction,
        "threshold": p.auto("threshold", 1e-3),
        "interval": p.options.interval,
    },
    "snfs": lambda p: {"drop_fraction": p.cosine, "interval": p.interval},
    "granet": lambda p: {
        **p.window,
        "drop_fraction": Cosine(p.options.drop_fraction, p.end),
        "initial_density": 1 - p.options.initial_sparsity,
    },
    "mest": lambda p: {
        "drop_fraction": p.options.drop_fraction,
        "gradient_weight": p.options.gradient_weight,
        "extra_density": p.options.extra_density,
        "soft_until_step": p.end,
        "interval": p.interval,
        "form": "EM&S" if p.options.soft else "EM",
    },
    "topkast": lambda p: {
        "exploration": p.options.sparsity - p.options.backward_sparsity,
        "refresh": p.options.refresh,
        "penalty": p.auto("penalty", 0.0),
        "stop_step": max(1, round(part * p.steps)) if (part := p.options.exploration_fraction) < 1 else None,
    },
    "dpf": lambda p: {
        "interval": p.options.interval,
        "end_step": p.end,
        "scope": p.auto("scope", "global"),
        "initial_sparsity": p.options.initial_sparsity,
    },
    "ste": lambda p: {
        "scope": p.auto("scope", "local"), "pattern": p.options.groups if p.options.pattern else None,
    },
}  # fmt: skip
"""What each method that shares out a density takes beside that; from the options that it knows."""

WITHOUT_DENSITY: dict[str, Arguments] = {
    "dense": lambda p: {},
    "str": lambda p: {"initial_threshold": p.auto("threshold", -5.0), "penalty": p.auto("penalty", 1e-4)},
    "iss": lambda p: {"penalty": p.auto("penalty", 7e-5), "threshold": p.auto("threshold", 1e-4)},
    "sr-ste": lambda p: {"pattern": p.options.groups, "penalty": p.auto("penalty", 2e-4)},
}
"""The same for methods whose density is learned, or follows from something else."""


def build_method(plan: Plan) -> BaseMethod:
    """Return the method of a plan.

    Raises
    ------
    ValueError
        If an option is outside its range, or the run cannot be divided as the method needs.
    """
    name = plan.options.name
    make: Callable[..., BaseMethod] = METHODS[name]
    if name in WITHOUT_DENSITY:
        made = make(**WITHOUT_DENSITY[name](plan), conventions=plan.conventions)
    else:
        made = make(plan.allocation, **ARGUMENTS[name](plan), conventions=plan.conventions)
    return made if plan.options.power == 1 else Powerpropagation(made, plan.options.power)
