"""What the tests of memory share: a gradient of a large tensor that is never there as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ROWS = 25
"""Rows of a block."""


@dataclass(frozen=True)
class RandomBlocks:
    """A random gradient in float32, drawn block by block."""

    shape: tuple[int, int]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        rows, columns = self.shape
        for start in range(0, rows, ROWS):
            yield slice(start, start + ROWS), np.random.default_rng(start).random((ROWS, columns), np.float32)
