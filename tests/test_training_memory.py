r"""Training takes memory in proportion to the non-zeros, besides the activations: nothing dense is made.

NumPy reports its allocations to `tracemalloc`, so a peak is what arrays held, no more and no less. If each peak is
:math:`X + c \cdot \mathrm{nnz}`, two densities tell its parts,

.. math:: X = 2\,\mathrm{peak}(\rho / 2) - \mathrm{peak}(\rho), \qquad
    c = \frac{\mathrm{peak}(\rho) - \mathrm{peak}(\rho / 2)}{\mathrm{nnz}(\rho) - \mathrm{nnz}(\rho / 2)},

and a dense array of one weight, made at that moment, would stand in X with 36 MB. No allowance for each non-zero has
to be chosen to see it.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from refimpl import kernels
from refimpl.kernels import memory, threads
from refimpl.kernels.cpu.panels import IDEAL_WIDTH
from refimpl.methods import Allocation, Conventions, RigL, Selfish
from refimpl.models.language_model import LanguageModel
from refimpl.optim import SNTASGD
from refimpl.training.trainer import Trainer
from refimpl.weights import SparseWeight, gradient

H, VOCABULARY, BATCH, BPTT = 1500, 2000, 4, 5
ITEM = 4  # bytes of a float32
ONE_WEIGHT = 4 * H * H * ITEM
BLOCK = 1 << 17  # entries of a dense gradient that are looked at together


class DenseGradients(Trainer):
    """A planted mistake: gradients are evaluated everywhere, and then masked."""

    def _update_one(self, name: str, gradient: np.ndarray, *rest: Any) -> None:
        weight, promise = self.state.params[name], rest[2]
        if isinstance(weight, SparseWeight):
            gradient = promise.dense().reshape(-1)[weight.support.flat]
        super()._update_one(name, gradient, *rest)


class Parts(NamedTuple):
    """A peak at the larger density, what does not depend on the density, and bytes for each non-zero."""

    peak: float
    fixed: float
    each: float


def measured(work: Callable[[], object]) -> int:
    """Return the most bytes that were held beyond those from before."""
    gc.collect()
    memory.trim()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peaks(density: float) -> tuple[int, dict[str, int]]:
    """Return the entries stored, and the peak of each kind of work."""
    selfish = Selfish(Allocation(density), 0.5, total_steps=1000)
    trainer = Trainer.begin(
        LanguageModel(VOCABULARY, H, H, 2), selfish, SNTASGD(), lambda step, epoch: 1.0,
        batch=BATCH, dtype=np.float32, seed=0, clip=0.25,
    )  # fmt: skip
    by_gradient = RigL(Allocation(density), 0.5, interval=1, end_step=1000)
    by_gradient.load_state_dict(selfish.state_dict())
    rng = np.random.default_rng(0)
    window = rng.integers(0, VOCABULARY, (2, BPTT, BATCH)).astype(np.int32)

    def step() -> None:
        trainer.step(*window)

    step()  # compiles the kernels
    found = {}
    found["exchange at random"] = measured(lambda: trainer.end_epoch(triggered=False))
    found["step on new supports"] = measured(step)  # which makes the twins' plans
    found["step"] = measured(step)
    selfish.conventions = Conventions(clip_norm="dense")
    found["step with the dense norm"] = measured(step)
    selfish.conventions = Conventions()
    trainer.__class__ = DenseGradients
    found["planted mistake"] = measured(step)
    trainer.__class__, trainer.method = Trainer, by_gradient
    found["exchange by gradient"] = measured(step)
    nnz = sum(w.nnz for w in trainer.state.params.values() if isinstance(w, SparseWeight))
    return nnz, found


@pytest.fixture(scope="module")
def parts() -> dict[str, Parts]:
    """Measure at densities 0.1 and 0.05."""
    before, block = threads.get(), gradient.BLOCK_ENTRIES
    threads.set_count(1)
    gradient.BLOCK_ENTRIES = BLOCK
    with kernels.use("cpu"):  # the definition makes no promise about memory
        (nnz, dense), (half, sparse) = peaks(0.1), peaks(0.05)
    threads.set_count(before)
    gradient.BLOCK_ENTRIES = block
    assert (nnz, half) == (4_200_000, 2_100_000)
    return {
        work: Parts(peak, 2 * sparse[work] - peak, (peak - sparse[work]) / (nnz - half)) for work, peak in dense.items()
    }


def limit() -> int:
    """Return what may be fixed: activations, pointers to lines, and one block of a dense gradient.

    For each LSTM layer in panels of the kernels' width: the gates and their gradients (4H rows each), inputs, outputs
    of the step before, and the inputs' gradients. Over the T + 1 steps of B columns besides: nine arrays of H rows
    (cells, outputs, their gradients, and copies). Logits in panels, and a copy. For each row and column of each weight
    eight 64-bit numbers. A block, its magnitudes, and where the largest are.
    """
    columns = max(BPTT * BATCH, IDEAL_WIDTH)
    in_panels = ITEM * columns * (2 * (4 + 4 + 3) * H + 2 * VOCABULARY)
    in_steps = ITEM * (BPTT + 1) * BATCH * 2 * 9 * H
    pointers = 8 * 8 * (4 * 5 * H + 2 * (VOCABULARY + H))
    return in_panels + in_steps + pointers + BLOCK * (2 * ITEM + 16)


WORK = [
    "step", "step on new supports", "step with the dense norm", "exchange at random", "exchange by gradient",
]  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_nothing_dense_is_made(parts: dict[str, Parts], work: str) -> None:
    assert limit() < ONE_WEIGHT
    assert parts[work].fixed < limit()


def test_catches_a_dense_gradient(parts: dict[str, Parts]) -> None:
    assert parts["planted mistake"].fixed > ONE_WEIGHT


@pytest.mark.parametrize(("work", "most"), list(zip(WORK, [12, 24, 12, 64, 64], strict=True)))
def test_bytes_for_each_non_zero(parts: dict[str, Parts], work: str, most: int) -> None:
    """A budget, beyond values, supports and slots.

    A step: the gradients of all weights (4 bytes), and for one tensor at a time, a quarter of all at most, its
    gradient clipped, and values and gradient in the order of its columns. On new supports, besides, the tiles of rows
    and of columns, indices and permutations (6 and 10), and what sorting takes, for one tensor at a time. An exchange:
    eight 64-bit numbers, among them places, what goes and what comes of all tensors, and the new supports.
    """
    assert 0 < parts[work].each < most
