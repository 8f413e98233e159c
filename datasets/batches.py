"""Columns of contiguous text, and the windows over them that truncated back-propagation walks through."""

from dataclasses import dataclass
from operator import index
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from refimpl.datasets.numbered import Numbered

TokenArray = npt.NDArray[np.int32]
Window = tuple[TokenArray, TokenArray]


def batchify(tokens: TokenArray, batch_size: int) -> TokenArray:
    r"""Cut one stream of tokens into `batch_size` contiguous columns of equal length.

    With ``R = len(tokens) // batch_size``,

    .. math:: \text{rows}[r, b] = \text{tokens}[b R + r],

    so that column b can be read downwards by a recurrent network whose state is carried from window to
    window. The ``len(tokens) - R * batch_size`` tokens at the end are dropped.

    Parameters
    ----------
    tokens : array of int, shape (n,)
        Token ids in reading order.
    batch_size : int
        Number of columns, from 1 to n.

    Returns
    -------
    array of int, shape (R, batch_size)
        A C-contiguous copy.

    Raises
    ------
    ValueError
        If `tokens` is not one-dimensional, or `batch_size` is below 1 or above the number of tokens.

    Notes
    -----
    Source: the batches of PyTorch's ``word_language_model`` example, which most papers on recurrent
    language models (Selfish-RNN among them) build on.
    """
    batch_size = index(batch_size)
    if tokens.ndim != 1:
        raise ValueError(f"tokens has shape {tokens.shape}; give one stream of token ids, of shape (n,).")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give a whole number of at least 1.")
    if batch_size > tokens.size:
        raise ValueError(
            f"batch_size is {batch_size}, more than the {tokens.size} tokens of the text; "
            f"choose a smaller batch or a longer text."
        )
    rows = tokens.size // batch_size
    return np.ascontiguousarray(tokens[: rows * batch_size].reshape(batch_size, rows).T)


@dataclass(frozen=True, eq=False)
class Windows(Numbered[Window]):
    """The windows of `bptt` rows over a batch of columns, as a sequence of (inputs, targets).

    The k-th window starts at row ``k * bptt``, so that k is all that a run needs to remember in order to
    continue in the middle of an epoch: ``windows(rows, bptt)[k:]`` are the windows that are left.

    Attributes
    ----------
    rows : array of int, shape (R, B)
        What `batchify` returned.
    bptt : int
        Rows predicted in each window; the last window may be shorter.
    """

    rows: TokenArray
    bptt: int
    noun: ClassVar[str] = "window"

    def __len__(self) -> int:
        """Count the windows: (R - 1) / bptt, rounded up."""
        return -(-(self.rows.shape[0] - 1) // self.bptt)

    def item(self, k: int) -> Window:
        """Return window `k` as two views of `rows`, each of shape (T, B)."""
        start = k * self.bptt
        stop = min(start + self.bptt, self.rows.shape[0] - 1)
        return self.rows[start:stop], self.rows[start + 1 : stop + 1]


def windows(rows: TokenArray, bptt: int) -> Windows:
    r"""Walk down the columns of `rows` in windows of `bptt` predictions.

    .. math::
        \text{inputs}_k = \text{rows}[k\,\text{bptt} : k\,\text{bptt} + T], \qquad
        \text{targets}_k = \text{rows}[k\,\text{bptt} + 1 : k\,\text{bptt} + T + 1],

    where T = bptt except in the last window, which ends with the text. Every row but the first is a target
    exactly once: the windows of a column predict R - 1 tokens in all.

    Parameters
    ----------
    rows : array of int, shape (R, B)
        What `batchify` returned.
    bptt : int
        Time steps of truncated back-propagation, from 1 to R - 1.

    Returns
    -------
    Windows
        A sequence of (inputs, targets), each of shape (T, B): views, no copies.

    Raises
    ------
    ValueError
        If `rows` is not two-dimensional, or `bptt` is below 1 or above R - 1.
    """
    bptt = index(bptt)
    if rows.ndim != 2:
        raise ValueError(f"rows has shape {rows.shape}; give the (rows, batch) array that batchify returns.")
    if bptt < 1:
        raise ValueError(f"bptt is {bptt}; give a whole number of at least 1.")
    length, batch = rows.shape
    if bptt > length - 1:
        raise ValueError(
            f"bptt is {bptt}, but the text gives {length} rows at batch size {batch} and so {length - 1} "
            f"predictions a column; choose a smaller bptt, a smaller batch or a longer text."
        )
    return Windows(rows, bptt)
