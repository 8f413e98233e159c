"""The dense twin of a sparse model: the best state that a run had at the end of an epoch of a dense phase.

It is kept whole, with what the optimizer remembers, buffers and counters, as it was before the exchange that makes the
model sparse again, so that training can go on from there (`refimpl.training.finetune`). What is evaluated is the same
numbers, unless the optimizer averages them or the method shows others; then it stands besides, as ``evaluated/NAME``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.methods import BaseMethod
from refimpl.training import checkpoint
from refimpl.training.run_folder import Checkpoint
from refimpl.training.state import BUFFERS, State
from refimpl.training.state import pack as pack_state
from refimpl.weights import Params, values_of

EVALUATED = "evaluated/"


def pack(state: State, method: BaseMethod, evaluated: Params) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a state, and what is evaluated of it, as `refimpl.training.state.pack` returns a state."""
    arrays, meta = pack_state(state, method)
    for name, weight in state.params.items():
        seen = evaluated[name]
        if not isinstance(seen, np.ndarray):
            raise ValueError(f"{name} of a dense twin is sparse; a phase that is called dense stores all entries")
        if seen is not values_of(weight):
            arrays[EVALUATED + name] = seen
    return arrays, {**meta, "epoch": state.epoch + 1}


def params_of(twin: Checkpoint) -> Params:
    """Return the parameters of a twin as they are evaluated, buffers among them."""
    params: Params = checkpoint.unpack_params(twin.arrays)[0]
    for key, array in twin.arrays.items():
        for prefix in (BUFFERS, EVALUATED):
            if key.startswith(prefix):
                params[key.removeprefix(prefix)] = array
    return params
