"""The state of a run, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.layers import lstm
from refimpl.methods import BaseMethod
from refimpl.methods.exploration import Explored
from refimpl.models.base import Carried
from refimpl.optim.base import Slots
from refimpl.training import checkpoint
from refimpl.training.flop_account import FlopAccount, new_account
from refimpl.weights import Params

BUFFERS = "buffers/"
"""What a checkpoint's names of buffers begin with."""


@dataclass
class State:
    """Everything that a run carries from step to step; a checkpoint is this and nothing else.

    Attributes
    ----------
    params, slots : dict
        The trained numbers, and what the optimizer remembers of each parameter.
    carried : list of lstm.State, or dict of str to ndarray
        What the model hands on from batch to batch: hidden states of the training text, or buffers.
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
    best_dense : float
        The same of the dense twins; see `refimpl.methods.base.Method.dense_twin`.
    loss_sum, loss_count : float, int
        Training losses of the current epoch, weighted by predicted tokens, or images.
    flops : dict
        Account of the operations so far; see `refimpl.training.flop_account`.
    explored : Explored
        The entries of each prunable weight that the forward pass has ever used.
    """

    params: Params
    slots: dict[str, Slots]
    carried: Carried
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
    best_dense: float = float("inf")
    loss_sum: float = 0.0
    loss_count: int = 0
    flops: FlopAccount = field(default_factory=new_account)
    explored: Explored = field(default_factory=Explored)


_COUNTERS = (
    "step", "epoch", "window", "origin_step", "origin_epoch", "settled", "averaging", "updates", "history", "best",
    "best_dense", "loss_sum", "loss_count", "flops",
)  # fmt: skip


def pack(state: State, method: BaseMethod) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a state, and what its method remembers, as named arrays and a small dictionary."""
    arrays = checkpoint.pack_params(state.params, state.slots)
    arrays |= carried_arrays(state.carried)
    arrays |= {f"method/{name}": array for name, array in method.state_arrays().items()}
    arrays |= {f"explored/{name}": array for name, array in state.explored.state_arrays().items()}
    counters = {key: getattr(state, key) for key in _COUNTERS}
    return arrays, {"state": counters, "method": method.state_dict(), "explored": state.explored.state_dict()}


def unpack(state: State, method: BaseMethod | None, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Put what :func:`pack` returned back into a state and its method (None: what that remembered is left out)."""
    state.params, state.slots = checkpoint.unpack_params(arrays)
    state.carried = carried_from(arrays, state.carried)
    counters = {"best_dense": float("inf"), **meta["state"]}  # which checkpoints from before there were twins lack
    for key in _COUNTERS:
        setattr(state, key, counters[key])
    if method is not None:
        method.load_state_dict(meta["method"], _under("method/", arrays))
    state.explored.load_state_dict(meta["explored"], _under("explored/", arrays))


def carried_arrays(carried: Carried) -> dict[str, np.ndarray]:
    """Return what a model carries as named arrays."""
    if isinstance(carried, dict):
        return {f"{BUFFERS}{name}": array for name, array in carried.items()}
    return {f"carried/{k}/{part}": array for k, of_layer in enumerate(carried) for part, array in zip("hc", of_layer)}


def carried_from(arrays: dict[str, np.ndarray], like: Carried) -> Carried:
    """Return what `carried_arrays` was given, for a model that begins with ``like``."""
    if isinstance(like, dict):
        return {name: arrays[f"{BUFFERS}{name}"] for name in like}
    return [lstm.State(arrays[f"carried/{k}/h"], arrays[f"carried/{k}/c"]) for k in range(len(like))]


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
