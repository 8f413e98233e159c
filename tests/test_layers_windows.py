"""The windows of convolutions and poolings: blocks of positions, and columns with their adjoint."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.layers import windows
from refimpl.layers.windows import Windows


@pytest.fixture(autouse=True)
def _entries() -> Iterator[None]:
    """Leave the size of the blocks as it was."""
    entries = windows.BLOCK_ENTRIES
    yield
    windows.BLOCK_ENTRIES = entries


def test_one_position_may_be_more_than_a_block() -> None:
    cut = list(Windows.of(2, 1, 0).blocks((4, 5), windows.BLOCK_ENTRIES + 1))
    assert cut == [(slice(h, h + 1), slice(v, v + 1)) for h in range(3) for v in range(4)]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 50), st.sampled_from([1, 7, 60, 1000]))
def test_blocks_hold_every_position_once(height: int, width: int, entries: int, most: int) -> None:
    windows.BLOCK_ENTRIES = most
    seen = np.zeros((height, width), int)
    for block in Windows.of(1, 1, 0).blocks((height, width), entries):
        seen[block] += 1
        assert seen[block].size * entries <= most or seen[block].size == 1
    assert (seen == 1).all()


@given(
    st.sampled_from([1, 2, 3, (1, 3)]), st.sampled_from([1, 2, 4, (3, 1)]), st.sampled_from([0, 1, ((0, 2), 1)]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_adding_columns_is_the_adjoint_of_taking_them(kernel: Any, stride: Any, padding: Any, seed: int) -> None:
    """Small integers: the two inner products are exactly equal."""
    rng = np.random.default_rng(seed)
    w = Windows.of(kernel, stride, padding)
    padded = rng.integers(-9, 10, w.zeros((2, 5, 4, 3), float).shape).astype(float)
    block = w.whole((5, 4))
    columns = w.columns(padded, *block)
    other, back = rng.integers(-9, 10, columns.shape).astype(float), np.zeros_like(padded)
    w.add_columns(other, back, *block)
    assert np.sum(columns * other) == np.sum(padded * back)
