"""What the tests of dense twins and buffers share: AC/DC on a classifier with batch norm, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from test_training_classification import images

from refimpl.training.config import Config, override
from refimpl.training.loop import Observer, Run
from refimpl.training.start import start

DATA = images()
STEPS = 6
"""Of an epoch: five batches of seven images, one of five."""
EPOCHS = 6
MODELS: dict[str, dict[str, Any]] = {
    "norm-mlp": {"name": "norm-mlp", "sizes": [8, 6]},
    "small-conv": {"name": "small-conv", "widths": [4, 4]},
}


def config_of(*more: str, model: str = "norm-mlp", **tables: Any) -> Config:
    """Return AC/DC with dense epochs 0, 2 and 3, compressed ones 1, 4 and 5, and one cosine through all."""
    base: dict[str, Any] = {
        "task": "classification",
        "dtype": "float32",
        "seed": 3,
        "data": {"eval_batch_size": 4},
        "model": MODELS[model],
        "method": {"name": "acdc", "sparsity": 0.6, "compress": [1, 4], "decompress": [2]},
        "optimizer": {
            "name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "schedule": "cosine",
        },
        "training": {"epochs": EPOCHS, "batch_size": 7, "threads": 1},
    }  # fmt: skip
    return override(Config.from_dict({**base, **tables}), more)


def trained(config: Config, path: Path, observer: Observer | None = None) -> Run:
    """Return a run in a folder that has come to its end, or to where the observer stopped it; closed."""
    run = start(config, path, DATA)
    try:
        run.train(observer)
    finally:
        run.close()
    return run


class Stop(Observer):
    """Asks a run to stop after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def stepped(self, run: Run, result: Any) -> None:
        """Ask."""
        run.stop_asked = run.state.step == self.at


def numbers(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Return parameters, what the optimizer remembers of them, and buffers, as bytes."""
    own = {k: a for k, a in arrays.items() if not k.startswith(("method/", "explored/", "evaluated/"))}
    return {name: array.tobytes() for name, array in own.items()}
