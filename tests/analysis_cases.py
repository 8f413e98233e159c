"""What the tests of the analyses share: tiny images, and runs on them that take milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from refimpl.datasets import Images, Part
from refimpl.training.config import Config
from refimpl.training.loop import Observer, Run
from refimpl.training.trainer import StepResult

SHAPE = (1, 6, 5)
CLASSES = 3


def part(n: int, seed: int) -> Part:
    """Return noisy images, each class brighter in its own rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.uint8)
    pixels = rng.integers(0, 100, (n, *SHAPE))
    for row in range(SHAPE[1]):
        pixels[:, :, row] += 120 * (labels == row % CLASSES)[:, None, None]
    return Part(pixels.astype(np.uint8), labels)


def images(n: int = 40) -> Images:
    return Images("drawn", part(n, 0), part(11, 1), part(9, 2), CLASSES, "drawn")


def acdc(**more: Any) -> Config:
    """Return AC/DC on an MLP for seven epochs: dense in 0, 3 and 5, compressed in 1, 2, 4 and 6."""
    tables: dict[str, Any] = {
        "task": "classification",
        "dtype": "float64",
        "seed": 3,
        "data": {"eval_batch_size": 4},
        "model": {"name": "mlp", "sizes": [8, 6]},
        "method": {"name": "acdc", "sparsity": 0.8, "compress": [1, 4, 6], "decompress": [3, 5]},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "training": {"epochs": 7, "batch_size": 7, "threads": 1},
    }
    for name, table in more.items():
        tables[name] = {**tables[name], **table} if isinstance(table, dict) else table
    return Config.from_dict(tables)


class Stops(Observer):
    """Asks a run to stop after so many of its steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def stepped(self, run: Run, result: StepResult) -> None:
        self.left -= 1
        run.stop_asked = self.left == 0


def write_idx(folder: Path, n: int = 60, seed: int = 0) -> Path:
    """Write images as idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, of in (("train", n, seed), ("t10k", 12, seed + 1)):
        drawn = part(count, of)
        sizes = np.array([0x803, count, *SHAPE[1:]], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(sizes + drawn.pixels.tobytes())
        sizes = np.array([0x801, count], ">i4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(sizes + drawn.labels.tobytes())
    return folder
