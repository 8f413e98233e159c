"""The state of a run, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.layers import lstm
from refimpl.methods import BaseMethod
from refimpl.models.language_model import States
from refimpl.optim.base import Slots
from refimpl.training import checkpoint
from refimpl.weights import Params


@dataclass
class State:
    """Everything that a run carries from step to step; a checkpoint is this and nothing else.

    Attributes
    ----------
    params, slots : dict
        The trained numbers, and what the optimizer remembers of each parameter.
    carried : list of lstm.State
        Hidden state of the training text.
    step, epoch, window : int
        Training steps done, epochs done, and windows done of the current epoch.
    origin_step, origin_epoch : int
        Learning rate, data and draws are those of a run that began here: 0, unless the method has rewound.
    settled : bool
        Whether the method had its density at the end of the last epoch.
    averaging : bool
        Whether the trigger has started the averaging optimizer.
    updates : int
        Steps of the optimizer that is active.
    history : list of float
        Validation losses of the epochs before averaging.
    best : float
        Lowest validation loss so far.
    loss_sum, loss_count : float, int
        Training losses of the current epoch, weighted by predicted tokens.
    flops : float
        Operations executed so far.
    """

    params: Params
    slots: dict[str, Slots]
    carried: States
    step: int = 0
    epoch: int = 0
    window: int = 0
    origin_step: int = 0
    origin_epoch: int = 0
    settled: bool = True
    averaging: bool = False
    updates: int = 0
    history: list[float] = field(default_factory=list)
    best: float = float("inf")
    loss_sum: float = 0.0
    loss_count: int = 0
    flops: float = 0.0


_COUNTERS = (
    "step", "epoch", "window", "origin_step", "origin_epoch", "settled", "averaging", "updates", "history", "best",
    "loss_sum", "loss_count", "flops",
)  # fmt: skip


def pack(state: State, method: BaseMethod) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a state, and what its method remembers, as named arrays and a small dictionary."""
    arrays = checkpoint.pack_params(state.params, state.slots)
    for k, carried in enumerate(state.carried):
        arrays[f"carried/{k}/h"], arrays[f"carried/{k}/c"] = carried
    arrays |= {f"method/{name}": array for name, array in method.state_arrays().items()}
    return arrays, {"state": {key: getattr(state, key) for key in _COUNTERS}, "method": method.state_dict()}


def unpack(state: State, method: BaseMethod, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Put what :func:`pack` returned back into a state and its method."""
    state.params, state.slots = checkpoint.unpack_params(arrays)
    state.carried = [lstm.State(arrays[f"carried/{k}/h"], arrays[f"carried/{k}/c"]) for k in range(len(state.carried))]
    for key in _COUNTERS:
        setattr(state, key, meta["state"][key])
    prefix = "method/"
    method.load_state_dict(
        meta["method"], {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    )
