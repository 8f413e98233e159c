"""The kernels: ``spec`` (NumPy and SciPy, the definition), ``cpu`` (Numba), and the choice between them.

A tier is a module with the functions below. Code above this package calls them here; ``REFIMPL_KERNELS=spec`` or
:func:`use` overrides the choice, so that anything can be run on the definition.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.kernels import checks, dense, memory, spec, threads
from refimpl.kernels.spec import LSTMBackward
from refimpl.kernels.types import Matrix, Pattern, SparseMatrix, is_sparse

TIERS = ("cpu", "spec")

_chosen = os.environ.get("REFIMPL_KERNELS", "cpu")
_tier: ModuleType | None = None  # the module of that name, once it was asked for: only then is a compiler imported


def tier() -> ModuleType:
    """Return the module whose kernels are in use.

    Raises
    ------
    ValueError
        If ``REFIMPL_KERNELS`` names no tier.
    """
    global _tier
    if _tier is None:
        _tier = _module(_chosen)
    return _tier


def _module(name: str) -> ModuleType:
    if name not in TIERS:
        raise ValueError(
            f"there are no kernels called {name!r}; REFIMPL_KERNELS and use() take one of {', '.join(TIERS)}"
        )
    return import_module(f"refimpl.kernels.{name}")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Use the kernels of one tier inside a ``with`` block."""
    global _tier
    before, _tier = _tier, _module(name)
    try:
        yield
    finally:
        _tier = before


def matmul(w: Matrix, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``W X + b``; see :func:`refimpl.kernels.spec.matmul`."""
    if not is_sparse(w):
        return dense.matmul(w, x, bias)
    rows, columns = w.support.matrix_shape
    checks.operand("X", x, w, columns)
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias is {bias.dtype} of shape {bias.shape}; this product takes {x.dtype} of shape {(rows,)}"
        )
    return tier().matmul(w, x, bias)


def matmul_t(w: Matrix, dy: np.ndarray) -> np.ndarray:
    """Return ``W^T dY``; see :func:`refimpl.kernels.spec.matmul_t`."""
    if not is_sparse(w):
        return dense.matmul(w.T, dy)
    checks.operand("dY", dy, w, w.support.matrix_shape[0])
    return tier().matmul_t(w, dy)


def sddmm(support: Pattern, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``dY X^T`` on a support; see :func:`refimpl.kernels.spec.sddmm`."""
    checks.factors(support, dy, x)
    return tier().sddmm(support, dy, x)


def matmul_t_sddmm(w: SparseMatrix, dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both backward products at once; see :func:`refimpl.kernels.spec.matmul_t_sddmm`."""
    checks.factors(w.support, dy, x)
    checks.one_type("dY", dy, w)
    return tier().matmul_t_sddmm(w, dy, x)


def sum_rows(dy: np.ndarray) -> np.ndarray:
    """Return the sum of each feature over all columns; see :func:`refimpl.kernels.spec.sum_rows`."""
    return tier().sum_rows(dy)


def embed(w: Matrix, tokens: np.ndarray) -> np.ndarray:
    """Look up rows of an embedding; see :func:`refimpl.kernels.spec.embed`."""
    checks.tokens("the tokens", tokens, checks.extents(w)[0])
    return tier().embed(w, tokens) if is_sparse(w) else spec.embed(w, tokens)


def embed_gradient(support: Pattern, tokens: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Return the gradient of an embedding on a support; see :func:`refimpl.kernels.spec.embed_gradient`."""
    checks.tokens("the tokens", tokens, support.matrix_shape[0])
    if dx.shape != (tokens.shape[0], support.matrix_shape[1], *tokens.shape[1:]):
        raise ValueError(
            f"dX has shape {dx.shape}; tokens of shape {tokens.shape} need (T, E, B), "
            f"with E = {support.matrix_shape[1]}"
        )
    return tier().embed_gradient(support, tokens, dx)


def lstm_forward(w_ih: Matrix, w_hh: Matrix, bias: np.ndarray, x: np.ndarray, h0: np.ndarray, c0: np.ndarray) -> tuple:
    """Run an LSTM layer over a window; see :func:`refimpl.kernels.spec.lstm_forward`. The trace is the tier's own."""
    checks.recurrence(w_ih, w_hh, bias, x, h0, c0)
    chosen = tier() if is_sparse(w_ih) and is_sparse(w_hh) else spec
    return chosen.lstm_forward(w_ih, w_hh, bias, x, h0, c0)


def lstm_backward(
    w_ih: Matrix, w_hh: Matrix, trace: Any, dy: np.ndarray, dh: np.ndarray, dc: np.ndarray, input_gradient: bool = True
) -> LSTMBackward:
    """Run its backward pass; see :func:`refimpl.kernels.spec.lstm_backward`."""
    states, size = trace.hidden.shape[-3:-1]
    batch = getattr(trace, "batch", trace.hidden.shape[-1])  # a tier may hold more columns than there are
    checks.arriving((states - 1, size, batch), w_hh, dy, dh, dc)
    chosen = spec if isinstance(trace, spec.LSTMTrace) else import_module("refimpl.kernels.cpu")
    return chosen.lstm_backward(w_ih, w_hh, trace, dy, dh, dc, input_gradient)


def to_panels(x: np.ndarray, fill: float = 0, itemsize: int = 0) -> np.ndarray:
    """Return the columns of ``x`` (..., F, N) regrouped into the panels (panels, F, width) that the tier likes best.

    A linear map does not care how its columns are grouped; ``fill`` stands in the columns that the last panel has too
    many. Labels are grouped like their activations by giving the activations' ``itemsize``.
    """
    return tier().to_panels(x, fill, itemsize)


def from_panels(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`to_panels`: return the columns as an array of ``shape`` (..., F, N)."""
    return tier().from_panels(panels, shape)


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray, scale: float) -> float:
    """Return the summed loss, and the gradient in place; see :func:`refimpl.kernels.spec.softmax_cross_entropy`."""
    if logits.ndim != 3 or targets.shape != (logits.shape[0], logits.shape[2]):
        raise ValueError(
            f"logits of shape {logits.shape} and targets {targets.shape}; they must be (panels, V, N) and (panels, N)"
        )
    checks.tokens("the targets", targets, logits.shape[1], lowest=-1)
    return tier().softmax_cross_entropy(logits, targets, scale)


def relu(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``max(X, 0)``; see :func:`refimpl.kernels.spec.relu`."""
    if out is not None:
        checks.like("out", out, x)
    return tier().relu(x, out)


def relu_backward(dy: np.ndarray, y: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient below a rectifier and its sums; see :func:`refimpl.kernels.spec.relu_backward`."""
    if y.ndim < 2:
        raise ValueError(f"Y has shape {y.shape}; a rectifier's gradient takes (..., features, columns)")
    checks.like("dY", dy, y)
    if out is not None and out is not dy:
        checks.like("out", out, y)
    return tier().relu_backward(dy, y, out)


def sgd_step(w: np.ndarray, g: np.ndarray, b: np.ndarray | None, **options: Any) -> None:
    """Take a step of SGD in place; see :func:`refimpl.kernels.rules.sgd_step`."""
    if b is None:
        checks.aligned(w, g)
    else:
        checks.aligned(w, g, b)
    tier().sgd_step(w, g, b, **options)


def adam_step(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, **options: Any) -> None:
    """Take a step of Adam in place; see :func:`refimpl.kernels.rules.adam_step`."""
    checks.aligned(w, g, m, v)
    tier().adam_step(w, g, m, v, **options)


def squared_norm(array: np.ndarray) -> float:
    """Return the sum of the squares in float64; see :func:`refimpl.kernels.rules.squared_norm`."""
    return tier().squared_norm(array)


__all__ = [
    "TIERS",
    "LSTMBackward",
    "adam_step",
    "dense",
    "embed",
    "embed_gradient",
    "from_panels",
    "lstm_backward",
    "lstm_forward",
    "matmul",
    "matmul_t",
    "matmul_t_sddmm",
    "memory",
    "relu",
    "relu_backward",
    "sddmm",
    "sgd_step",
    "softmax_cross_entropy",
    "spec",
    "squared_norm",
    "sum_rows",
    "threads",
    "tier",
    "to_panels",
    "use",
]
