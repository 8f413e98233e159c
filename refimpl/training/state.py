"""The state of a run, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.layers import lstm
from refimpl.methods import BaseMethod
from refimpl.methods.exploration import Explored
from refimpl.optim.base import Slots
from refimpl.training import checkpoint
from refimpl.training.flop_account import FlopAccount, new_account
from refimpl.weights import Params


@dataclass
class State:
    """Everything that a run carries from step to step; a checkpoint is this and nothing else.

    Attributes
    ----------
    params, slots : dict
        The trained numbers, and what the optimizer remembers of each parameter.
    carried : list of lstm.State
        Hidden state of the training text; empty for a model that carries nothing from batch to batch.
    step, epoch, window : int
        Training steps done, epochs done, and windows of text, or batches of images, done of the current epoch.
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
        Training losses of the current epoch, weighted by predicted tokens, or images.
    flops : dict
        Account of the operations so far; see `refimpl.training.flop_account`.
    explored : Explored
        The entries of each prunable weight that the forward pass has ever used.
    """

    params: Params
    slots: dict[str, Slots]
    carried: list[Any]
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
    flops: FlopAccount = field(default_factory=new_account)
    explored: Explored = field(default_factory=Explored)


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
    arrays |= {f"explored/{name}": array for name, array in state.explored.state_arrays().items()}
    counters = {key: getattr(state, key) for key in _COUNTERS}
    return arrays, {"state": counters, "method": method.state_dict(), "explored": state.explored.state_dict()}


def unpack(state: State, method: BaseMethod, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Put what :func:`pack` returned back into a state and its method."""
    state.params, state.slots = checkpoint.unpack_params(arrays)
    state.carried = [lstm.State(arrays[f"carried/{k}/h"], arrays[f"carried/{k}/c"]) for k in range(len(state.carried))]
    for key in _COUNTERS:
        setattr(state, key, meta["state"][key])
    method.load_state_dict(meta["method"], _under("method/", arrays))
    state.explored.load_state_dict(meta["explored"], _under("explored/", arrays))


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
