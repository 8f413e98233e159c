"""Optimizers over aligned arrays, clipping, schedules, and the trigger that starts averaging.

=====================  ======================================================================================
name                   what it is
=====================  ======================================================================================
``sgd``                `SGD`, with momentum, Nesterov's form, dampening and weight decay
``adam``, ``adamw``    `Adam`, with coupled and with decoupled weight decay
``asgd``               `ASGD` with the defaults of ``torch.optim.ASGD``
``nt-asgd``            `ASGD` from the first step on, without decay; averages stay inside the support
``nt-asgd-leaking``    `LeakingASGD`: averages leak outside the support, as in masked dense implementations
``snt-asgd``           `SNTASGD`: each weight's average begins when the weight does
=====================  ======================================================================================
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from refimpl.optim.adam import Adam
from refimpl.optim.asgd import ASGD
from refimpl.optim.base import Optimizer, Slots
from refimpl.optim.clipping import clip_scale, global_norm, squared_norm
from refimpl.optim.leaking_asgd import LeakingASGD
from refimpl.optim.schedules import (
    Constant,
    Cosine,
    EpochDecay,
    LinearWarmup,
    Schedule,
    StepDecay,
)
from refimpl.optim.sgd import SGD
from refimpl.optim.snt_asgd import SNTASGD
from refimpl.optim.trigger import NonMonotonicTrigger, triggered

__all__ = [
    "ASGD",
    "OPTIMIZERS",
    "SGD",
    "SNTASGD",
    "Adam",
    "Constant",
    "Cosine",
    "EpochDecay",
    "LeakingASGD",
    "LinearWarmup",
    "NonMonotonicTrigger",
    "Optimizer",
    "Schedule",
    "Slots",
    "StepDecay",
    "clip_scale",
    "global_norm",
    "make_optimizer",
    "squared_norm",
    "triggered",
]

OPTIMIZERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "sgd": (SGD, {}),
    "adam": (Adam, {}),
    "adamw": (Adam, {"decoupled": True, "weight_decay": 0.01}),
    "asgd": (ASGD, {}),
    "nt-asgd": (ASGD, {"t0": 0.0, "lambd": 0.0}),
    "nt-asgd-leaking": (LeakingASGD, {}),
    "snt-asgd": (SNTASGD, {}),
}
"""For each name, the class and the options in which it differs from the class's defaults."""


def make_optimizer(name: str, **options: Any) -> Optimizer | LeakingASGD:
    """Return the optimizer of this name.

    Parameters
    ----------
    name : str
        One of `OPTIMIZERS`.
    **options
        Attributes of its class. The learning rate is not among them: every update is given its own.

    Raises
    ------
    ValueError
        If there is no such optimizer or option, or an option's value is not accepted.
    """
    if name not in OPTIMIZERS:
        near = _nearest(name, OPTIMIZERS)
        raise ValueError(f"there is no optimizer {name!r}{near}; the names are {', '.join(OPTIMIZERS)}")
    kind, preset = OPTIMIZERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            near = _nearest(option, known)
            raise ValueError(f"{name} has no option {option!r}{near}; its options are {', '.join(known)}")
    made: Optimizer | LeakingASGD = kind(**{**preset, **options})
    return made


def _nearest(given: str, known: Any) -> str:
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
