"""Batches and windows: every token but the dropped ones, each predicted once, in its own column."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.datasets import batchify, windows


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    n = draw(st.integers(1, 200))
    return np.arange(n, dtype=np.int32), draw(st.integers(1, n))


@st.composite
def windowed(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    length, batch = draw(st.integers(2, 40)), draw(st.integers(1, 5))
    return batchify(np.arange(length * batch, dtype=np.int32), batch), draw(st.integers(1, length - 1))


@given(batches())
def test_columns_are_contiguous_and_in_order(case: tuple[np.ndarray, int]) -> None:
    tokens, batch = case
    rows = batchify(tokens, batch)
    assert rows.shape == (tokens.size // batch, batch)
    assert rows.dtype == np.int32
    assert rows.flags.c_contiguous
    # Read column after column, the tokens are the text, less fewer than `batch` at its end.
    np.testing.assert_array_equal(rows.T.ravel(), tokens[: rows.size])
    assert 0 <= tokens.size - rows.size < batch


def test_batches_agree_with_torch() -> None:
    torch = pytest.importorskip("torch")
    for n in range(1, 40):
        tokens = np.arange(n, dtype=np.int32)
        for batch in range(1, n + 1):
            length = n // batch
            expected = torch.from_numpy(tokens).narrow(0, 0, length * batch).view(batch, -1).t().contiguous()
            np.testing.assert_array_equal(batchify(tokens, batch), expected.numpy())


@given(windowed())
def test_every_row_but_the_first_is_predicted_once_from_the_one_above(case: tuple[np.ndarray, int]) -> None:
    rows, bptt = case
    pairs = list(windows(rows, bptt))
    for inputs, targets in pairs:
        assert inputs.shape == targets.shape
        # The tokens are numbered along the text, so that the next token of a column is one more.
        np.testing.assert_array_equal(targets, inputs + 1)
        assert np.shares_memory(inputs, rows)
        assert inputs.flags.c_contiguous
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in pairs]), rows[1:])
    assert [len(inputs) for inputs, _ in pairs[:-1]] == [bptt] * (len(pairs) - 1)
    assert 1 <= len(pairs[-1][0]) <= bptt


@given(windowed(), st.data())
def test_windows_can_be_picked_up_anywhere(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    sequence = windows(*case)
    pairs = list(sequence)
    assert len(sequence) == len(pairs)
    k = data.draw(st.integers(0, len(pairs)))
    rest = sequence[k:]
    assert len(rest) == len(pairs) - k
    for (inputs, targets), (expected_inputs, expected_targets) in zip(rest, pairs[k:]):
        np.testing.assert_array_equal(inputs, expected_inputs)
        np.testing.assert_array_equal(targets, expected_targets)
    np.testing.assert_array_equal(sequence[-1][0], pairs[-1][0])
    for outside in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError, match="does not exist"):
            sequence[outside]


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    tokens = np.arange(5, dtype=np.int32)
    assert batchify(tokens, 5).shape == (1, 5)
    with pytest.raises(ValueError, match="batch_size is 6, more than the 5 tokens"):
        batchify(tokens, 6)


def test_bptt_longer_than_the_text_is_refused() -> None:
    rows = batchify(np.arange(12, dtype=np.int32), 3)
    assert len(windows(rows, 3)) == 1
    with pytest.raises(ValueError, match=r"bptt is 4, but the text gives 4 rows .* 3 predictions"):
        windows(rows, 4)
    with pytest.raises(ValueError, match="1 rows at batch size 3 and so 0 predictions"):
        windows(rows[:1], 1)


@pytest.mark.parametrize("wrong", [0, -1])
def test_sizes_below_one_are_refused(wrong: int) -> None:
    rows = batchify(np.arange(12, dtype=np.int32), 3)
    with pytest.raises(ValueError, match=f"batch_size is {wrong}"):
        batchify(np.arange(12, dtype=np.int32), wrong)
    with pytest.raises(ValueError, match=f"bptt is {wrong}"):
        windows(rows, wrong)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 2\)"):
        batchify(np.zeros((2, 2), np.int32), 1)
    with pytest.raises(ValueError, match=r"rows has shape \(4,\)"):
        windows(np.zeros(4, np.int32), 1)
