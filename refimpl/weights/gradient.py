"""Gradients as promises: known by their factors, evaluated where they are wanted.

The gradient of a linear map ``Y = W X`` is ``dY X^T``, a matrix as large as the dense weight. Nobody needs all of it at
once: an optimizer needs it on the support, RigL the largest entries outside it, clipping its norm. A promise keeps the
two factors and answers such questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from refimpl import kernels
from refimpl.kernels import dense
from refimpl.weights.sparse import Weight, support_of
from refimpl.weights.support import Shape, Support

BLOCK_ENTRIES = 1 << 20
"""Entries of a dense gradient that are held at a time."""


class Gradient(Protocol):
    """The gradient of one weight, not yet evaluated."""

    shape: Shape

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        ...

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (rows, dense block (rows, columns)) in ascending order; a block is valid until the next."""
        ...

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        ...


class LinearGrad:
    r"""Gradient of a linear map: :math:`dW = \sum_p dY_p X_p^\top`.

    Parameters
    ----------
    shape : tuple of int
        Of the weight.
    dy : ndarray, shape (..., R, N)
    x : ndarray, shape (..., C, N)
        The two factors, in the same panels.
    known : (Support, ndarray), optional
        A support on which the gradient was evaluated already, together with another product.
    """

    def __init__(
        self, shape: Shape, dy: np.ndarray, x: np.ndarray, known: tuple[Support, np.ndarray] | None = None
    ) -> None:
        self.shape = shape
        self.dy = dy
        self.x = x
        self.known = known

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        if self.known is not None and self.known[0] is support:
            return self.known[1]
        return kernels.sddmm(support, self.dy, self.x)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows."""
        rows = max(1, BLOCK_ENTRIES // self.x.shape[-2])
        columns = np.ascontiguousarray(dense.columns(self.x).T)  # (panels N, C)
        for start in range(0, self.dy.shape[-2], rows):
            part = slice(start, min(start + rows, self.dy.shape[-2]))
            yield part, dense.gemm(np.ascontiguousarray(dense.columns(self.dy[..., part, :])), columns)

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        if self.known is not None and self.known[0].nnz == self.known[0].size:
            return self.known[1].reshape(self.shape)
        return dense.outer(self.dy, self.x).reshape(self.shape)


class EmbeddingGrad:
    """Gradient of an embedding: column ``(t, b)`` of ``dx`` is added to row ``tokens[t, b]``.

    Parameters
    ----------
    shape : tuple of int
        (V, E).
    tokens : ndarray of int, shape (T, B)
    dx : ndarray, shape (T, E, B)
    """

    def __init__(self, shape: Shape, tokens: np.ndarray, dx: np.ndarray) -> None:
        self.shape = shape
        self.tokens = tokens
        self.dx = dx

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        return kernels.embed_gradient(support, self.tokens, self.dx)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows."""
        tokens = self.tokens.reshape(-1)
        order = np.argsort(tokens, kind="stable")
        t, b = np.divmod(order, self.tokens.shape[1])
        ordered = tokens[order]
        rows = max(1, BLOCK_ENTRIES // self.shape[1])
        for start in range(0, self.shape[0], rows):
            part = slice(start, min(start + rows, self.shape[0]))
            block = np.zeros((part.stop - part.start, self.shape[1]), self.dx.dtype)
            among = slice(*np.searchsorted(ordered, [part.start, part.stop]))
            np.add.at(block, ordered[among] - start, self.dx[t[among], :, b[among]])
            yield part, block

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        out = np.zeros(self.shape, self.dx.dtype)
        for rows, block in self.blocks():
            out[rows] = block
        return out


class SumGrad:
    """Sum of the gradients of one weight that is used in several places, such as a tied embedding."""

    def __init__(self, parts: list[Gradient]) -> None:
        self.parts = parts
        self.shape = parts[0].shape

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        total = self.parts[0].on(support).copy()
        for part in self.parts[1:]:
            total += part.on(support)
        return total

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows."""
        for together in zip(*(part.blocks() for part in self.parts), strict=True):
            total = together[0][1].copy()
            for _, block in together[1:]:
                total += block
            yield together[0][0], total

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        return sum((part.dense() for part in self.parts[1:]), start=self.parts[0].dense())


class ScaledGrad:
    r"""Gradient of a weight :math:`W` that was used as :math:`W \odot m`, the factors :math:`m` being given on its
    entries (DropConnect).

    Parameters
    ----------
    gradient : Gradient
        Of the product ``W * m``.
    w : ndarray or SparseWeight
        Whose entries were scaled; entries outside its support were not.
    factor : ndarray
        Aligned with the values of ``w``.
    """

    def __init__(self, gradient: Gradient, w: Weight, factor: np.ndarray) -> None:
        self.gradient = gradient
        self.support = support_of(w)
        self.factor = factor.reshape(-1)
        self.shape = gradient.shape

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        values = self.gradient.on(support)
        if self.support is support:
            return values * self.factor
        at = support.positions_of(self.support.flat)
        values = values.copy()
        values[at[at >= 0]] *= self.factor[at >= 0]
        return values

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows."""
        pointer, columns = self.support.indptr, self.support.indices
        for rows, block in self.gradient.blocks():
            entries = slice(pointer[rows.start], pointer[rows.stop])
            row = np.repeat(np.arange(rows.stop - rows.start), np.diff(pointer[rows.start : rows.stop + 1]))
            block[row, columns[entries]] *= self.factor[entries]
            yield rows, block

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        return np.concatenate([block.copy() for _, block in self.blocks()]).reshape(self.shape)


Grads = dict[str, np.ndarray | Gradient]
"""Gradients by parameter name: arrays for biases, promises for weights."""


def add_to(grads: Grads, name: str, gradient: np.ndarray | Gradient) -> None:
    """Add an array or a promise to what is there for a parameter."""
    there = grads.get(name)
    if there is None:
        grads[name] = gradient
    elif isinstance(there, np.ndarray):
        assert isinstance(gradient, np.ndarray)
        grads[name] = there + gradient
    else:
        assert not isinstance(gradient, np.ndarray)
        grads[name] = SumGrad([*there.parts, gradient] if isinstance(there, SumGrad) else [there, gradient])
