"""Randomness as an argument: counter-based streams that can be drawn again at any step.

A draw is named by what it is for, not by when it happens: ``generator(seed, stream, step)`` gives the same
numbers whatever was drawn before it, so a resumed run, a run on another device, or a reader at a prompt can
repeat any single step.
"""

from hashlib import blake2b

import numpy as np


def generator(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """Return the generator of one named draw.

    Parameters
    ----------
    seed : int
        The run's seed, ``0 <= seed < 2**64``.
    stream : str
        What the numbers are for, such as ``"dropout/0"``. Different streams are independent.
    step : int
        The step, epoch or exchange that the numbers belong to.

    Returns
    -------
    numpy.random.Generator
        Philox 4x64 [1]_ with key (seed, digest of the stream's name) and the step in the counter's highest word: two
        steps of one stream are 2**192 blocks of random numbers apart.

    References
    ----------
    .. [1] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed}; give an integer from 0 to 2**64 - 1")
    name = int.from_bytes(blake2b(stream.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(
        np.random.Philox(
            key=np.array([seed, name], dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64)
        )
    )


class Draws:
    """The random draws of one training step, by what they are for: ``draws("dropout/output")`` is a generator."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed = seed
        self.step = step

    def __call__(self, stream: str) -> np.random.Generator:
        """Return the generator of one stream at this step."""
        return generator(self.seed, stream, self.step)
