"""The definition of every kernel, in NumPy and SciPy: slow enough to be obvious, and what the faster tiers are tested
against.

Shapes
------
``W`` is (R, C), sparse or dense; ``x`` is (..., C, N): any number of panels of N columns. Features come first and the
batch last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refimpl.kernels import dense
from refimpl.kernels.rules import adam_step as adam_step
from refimpl.kernels.rules import sgd_step as sgd_step
from refimpl.kernels.rules import squared_norm as squared_norm
from refimpl.kernels.types import Matrix, Pattern, SparseMatrix, is_sparse

if TYPE_CHECKING:
    import scipy.sparse


def as_scipy(w: SparseMatrix) -> scipy.sparse.csr_array:
    """Return the weight as a SciPy CSR matrix over the same values."""
    import scipy.sparse  # longer to import than this package, and only needed where the definition runs

    return scipy.sparse.csr_array(
        (w.values, w.support.indices.astype(np.int64), w.support.indptr), shape=w.support.matrix_shape
    )


def panels_of(x: np.ndarray) -> np.ndarray:
    """Return ``x`` as (panels, features, width)."""
    return x.reshape(-1, *x.shape[-2:])


def _each_panel(matrix: scipy.sparse.sparray, x: np.ndarray) -> np.ndarray:
    """Multiply panel by panel into one array, so that no second one of its size is made."""
    panels = panels_of(x)
    y = np.empty((len(panels), matrix.shape[0], x.shape[-1]), np.result_type(matrix.dtype, x))
    for p, panel in enumerate(panels):
        y[p] = matrix @ panel
    return y.reshape(*x.shape[:-2], *y.shape[-2:])


def matmul(w: Matrix, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    r"""Return :math:`Y = W X + b \mathbf{1}^\top`, shape (..., R, N)."""
    if not is_sparse(w):
        return dense.matmul(w, x, bias)
    y = _each_panel(as_scipy(w), x)
    if bias is not None:
        y += bias[:, None]
    return y


def matmul_t(w: Matrix, dy: np.ndarray) -> np.ndarray:
    r"""Return :math:`dX = W^\top dY`, shape (..., C, N)."""
    if not is_sparse(w):
        return dense.matmul(w.T, dy)
    return _each_panel(as_scipy(w).T, dy)


def sddmm(support: Pattern, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    r"""Return :math:`dW = (dY X^\top)` restricted to the support, summed over panels, shape (nnz,).

    ``dw[k] = sum over p, b of dy[p, row[k], b] * x[p, column[k], b]``, row by row in bounded memory.
    """
    out = np.zeros(support.indices.size, dy.dtype)
    for panel_dy, panel_x in zip(panels_of(dy), panels_of(x), strict=True):
        for i in range(support.matrix_shape[0]):
            row = slice(support.indptr[i], support.indptr[i + 1])
            out[row] += panel_x[support.indices[row]] @ panel_dy[i]
    return out


def matmul_t_sddmm(w: SparseMatrix, dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both backward products of a linear map on the weight's own support."""
    return matmul_t(w, dy), sddmm(w.support, dy, x)


def sum_rows(dy: np.ndarray) -> np.ndarray:
    r"""Return :math:`db = dY \mathbf{1}`, the sum of each feature over all columns, shape (R,)."""
    return panels_of(dy).sum(axis=(0, 2))


def embed(w: Matrix, tokens: np.ndarray) -> np.ndarray:
    r"""Look up rows of an embedding: column ``(t, b)`` of the result is row ``tokens[t, b]`` of ``W``.

    Parameters
    ----------
    w : (V, E)
    tokens : ndarray of int, shape (T, B)

    Returns
    -------
    ndarray, shape (T, E, B)
    """
    if not is_sparse(w):
        return np.ascontiguousarray(w[tokens].transpose(0, 2, 1))
    rows = as_scipy(w)[tokens.reshape(-1)].toarray()
    return np.ascontiguousarray(rows.reshape(*tokens.shape, -1).transpose(0, 2, 1))


def embed_gradient(support: Pattern, tokens: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Return the gradient of an embedding on a support: sums of ``dx[t, :, b]`` over the places of each row's token."""
    out = np.zeros(support.indices.size, dx.dtype)
    for t, b in np.ndindex(*tokens.shape):
        row = slice(support.indptr[tokens[t, b]], support.indptr[tokens[t, b] + 1])
        out[row] += dx[t, support.indices[row], b]
    return out


def sigmoid(x: np.ndarray) -> np.ndarray:
    r"""Return :math:`1 / (1 + e^{-x})` without overflow."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


class LSTMTrace(NamedTuple):
    """What backward needs of an LSTM layer's forward pass, in (time, features, batch)."""

    x: np.ndarray  # (T, I, B)       input, for the gradient of W_ih
    gates: np.ndarray  # (T, 4H, B)  i, f, g, o after their nonlinearities
    cells: np.ndarray  # (T + 1, H, B) c_{-1}, ..., c_{T-1}
    hidden: np.ndarray  # (T + 1, H, B) h_{-1}, ..., h_{T-1}: output, and input of W_hh


class LSTMBackward(NamedTuple):
    """Results of an LSTM layer's backward pass.

    The weight gradients are given as their two factors, ``dW_ih = d_gates x^T`` and ``dW_hh = d_gates h_prev^T`` summed
    over panels, so that whoever needs them can evaluate them on any support. The panels may hold several time steps
    each.
    """

    dx: np.ndarray | None  # (T, I, B)
    dh0: np.ndarray  # (H, B)
    dc0: np.ndarray  # (H, B)
    d_gates: np.ndarray  # (panels, 4H, width)
    x: np.ndarray  # (panels, I, width)
    h_prev: np.ndarray  # (panels, H, width)
    d_bias: np.ndarray  # (4H,)
    dw_ih: np.ndarray | None  # (nnz,) on W_ih's own support, where the tier got it together with dx


def lstm_forward(
    w_ih: Matrix, w_hh: Matrix, bias: np.ndarray, x: np.ndarray, h0: np.ndarray, c0: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LSTMTrace]:
    r"""Run an LSTM layer over a window.

    .. math::
        a_t &= W_{ih} x_t + W_{hh} h_{t-1} + b \\
        i, f, o &= \sigma(a^i_t), \sigma(a^f_t), \sigma(a^o_t) \qquad g = \tanh(a^g_t) \\
        c_t &= f \odot c_{t-1} + i \odot g \qquad h_t = o \odot \tanh(c_t)

    Parameters
    ----------
    w_ih, w_hh : (4H, I), (4H, H)
        Rows in gate order i, f, g, o.
    bias : ndarray, shape (4H,)
    x : ndarray, shape (T, I, B)
    h0, c0 : ndarray, shape (H, B)

    Returns
    -------
    y : ndarray, shape (T, H, B)
    h, c : ndarray, shape (H, B)
        The last state.
    trace : LSTMTrace
    """
    steps, size, batch = len(x), h0.shape[0], x.shape[2]
    gates = matmul(w_ih, x, bias)
    cells = np.empty((steps + 1, size, batch), x.dtype)
    hidden = np.empty((steps + 1, size, batch), x.dtype)
    cells[0], hidden[0] = c0, h0
    for t in range(steps):
        a = gates[t]
        a += matmul(w_hh, hidden[t])
        i, f, g, o = a.reshape(4, size, batch)
        for gate in (i, f, o):
            gate[...] = sigmoid(gate)
        np.tanh(g, out=g)
        cells[t + 1] = f * cells[t] + i * g
        hidden[t + 1] = o * np.tanh(cells[t + 1])
    return hidden[1:], hidden[-1], cells[-1], LSTMTrace(x, gates, cells, hidden)


def lstm_backward(
    w_ih: Matrix, w_hh: Matrix, trace: LSTMTrace, dy: np.ndarray, dh: np.ndarray, dc: np.ndarray, input_gradient: bool
) -> LSTMBackward:
    r"""Run an LSTM layer's backward pass through time.

    With :math:`dh_t = dy_t + W_{hh}^\top da_{t+1}` and :math:`dc_t` the gradient that arrives from the next step,

    .. math::
        dc_t &\mathrel{+}= dh_t \odot o \odot (1 - \tanh^2 c_t) \\
        da^i &= dc_t \odot g \odot i (1 - i) \qquad da^f = dc_t \odot c_{t-1} \odot f (1 - f) \\
        da^g &= dc_t \odot i \odot (1 - g^2) \qquad da^o = dh_t \odot \tanh c_t \odot o (1 - o) \\
        dc_{t-1} &= dc_t \odot f \qquad dx_t = W_{ih}^\top da_t

    Parameters
    ----------
    dy : ndarray, shape (T, H, B)
        Gradient of the outputs.
    dh, dc : ndarray, shape (H, B)
        Gradient of the last state.
    """
    x, gates, cells, hidden = trace
    steps, size, batch = dy.shape
    d_gates = np.empty((steps, 4 * size, batch), dy.dtype)
    dh, dc = dh.copy(), dc.copy()
    for t in reversed(range(steps)):
        i, f, g, o = gates[t].reshape(4, size, batch)
        da_i, da_f, da_g, da_o = d_gates[t].reshape(4, size, batch)
        tanh_c = np.tanh(cells[t + 1])
        dh += dy[t]
        dc += dh * o * (1 - tanh_c**2)
        da_i[...] = dc * g * i * (1 - i)
        da_f[...] = dc * cells[t] * f * (1 - f)
        da_g[...] = dc * i * (1 - g**2)
        da_o[...] = dh * tanh_c * o * (1 - o)
        dc *= f
        dh = matmul_t(w_hh, d_gates[t])
    dx = matmul_t(w_ih, d_gates) if input_gradient else None
    return LSTMBackward(dx, dh, dc, d_gates, x, hidden[:-1], sum_rows(d_gates), None)


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray, scale: float) -> float:
    r"""Return the summed loss and turn the logits into their gradient, in place.

    For a column with logits :math:`z` and target :math:`y`, the loss is :math:`\log \sum_j e^{z_j} - z_y` and its
    gradient
    :math:`\mathrm{softmax}(z) - e_y`.

    Parameters
    ----------
    logits : ndarray, shape (panels, V, N)
        Overwritten with ``scale`` times the gradient of the summed loss.
    targets : ndarray of int, shape (panels, N)
        −1 marks a column that does not count: its gradient is zero.
    scale : float
        Factor of the gradient, such as 1/columns for the mean loss.

    Returns
    -------
    float
        Sum of the losses of the columns that count, added up in float64.
    """
    total = 0.0
    for z, target in zip(logits, targets, strict=True):
        columns = np.flatnonzero(target >= 0)
        z -= z.max(axis=0)
        chosen = z[target[columns], columns].astype(np.float64)
        np.exp(z, out=z)
        mass = z.sum(axis=0)
        total += float((np.log(mass[columns].astype(np.float64)) - chosen).sum())
        z *= np.where(target >= 0, scale / mass, 0).astype(z.dtype)
        z[target[columns], columns] -= z.dtype.type(scale)
    return total


def relu(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    r"""Return :math:`Y = \max(X, 0)` of an array of any shape; NaN stays NaN, and −0 becomes 0.

    ``out`` is where it is written, such as ``x`` itself.
    """
    y = np.where(x <= 0, 0, x)
    if out is None:
        return y
    out[...] = y
    return out


def relu_backward(dy: np.ndarray, y: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    r"""Return :math:`dX = dY` where :math:`Y > 0` and 0 elsewhere (dY where Y is NaN), and its :func:`sum_rows`: the
    gradient of the bias below.

    Parameters
    ----------
    dy, y : ndarray, shape (..., F, N)
        Gradient of the output, and the output.
    out : ndarray, optional
        Where dX is written, such as ``dy`` itself.
    """
    dx = np.where(y <= 0, 0, dy)
    if out is not None:
        out[...] = dx
        dx = out
    return dx, sum_rows(dx)


def to_panels(x: np.ndarray, fill: float = 0, itemsize: int = 0) -> np.ndarray:
    """Return ``x`` as (panels, F, N): the definition groups columns as they come."""
    return panels_of(x)


def from_panels(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`to_panels`."""
    return panels.reshape(shape)
