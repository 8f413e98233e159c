"""What the kernels are given, checked once: compiled code does not look, and would read foreign memory."""

from __future__ import annotations

import numpy as np

from refimpl.kernels.types import Matrix, Pattern, SparseMatrix, is_sparse


def extents(w: Matrix) -> tuple[int, int]:
    """Return (rows, columns) of a weight seen as a matrix."""
    return (w.shape[0], w.size // max(w.shape[0], 1)) if isinstance(w, np.ndarray) else w.support.matrix_shape


def features(name: str, x: np.ndarray, count: int) -> None:
    """Raise ValueError unless ``x`` is (..., count, N) with at least one column."""
    if x.ndim < 2 or x.shape[-2] != count or (not x.size and count):
        raise ValueError(
            f"{name} has shape {x.shape}; this weight takes (..., {count}, columns), with one column or more"
        )


def operand(name: str, x: np.ndarray, w: SparseMatrix, count: int) -> None:
    """Raise ValueError unless ``x`` is (..., count, N) with at least one column, of the type of a sparse weight."""
    if x.ndim < 2 or x.shape[-2] != count or x.dtype != w.values.dtype or not x.size:
        features(name, x, count)
        one_type(name, x, w)


def factors(support: Pattern, dy: np.ndarray, x: np.ndarray) -> None:
    """Raise ValueError unless ``dy`` and ``x`` are factors of the gradient of a weight with this pattern."""
    rows, columns = support.matrix_shape
    features("dY", dy, rows)
    features("X", x, columns)
    same_columns(dy, x)


def one_type(name: str, x: np.ndarray, w: Matrix) -> None:
    """Raise ValueError unless an operand of a sparse weight has the type of its values."""
    if is_sparse(w) and x.dtype != w.values.dtype:
        raise ValueError(f"{name} is {x.dtype} and the weight {w.values.dtype}; convert one, a run has one type")


def same_columns(dy: np.ndarray, x: np.ndarray) -> None:
    """Raise ValueError unless two arrays (..., F, N) differ in their features alone, and have one type."""
    if dy.shape[:-2] != x.shape[:-2] or dy.shape[-1] != x.shape[-1] or dy.dtype != x.dtype:
        raise ValueError(
            f"dY is {dy.dtype} of shape {dy.shape} and X {x.dtype} of shape {x.shape}; "
            "they must agree in type and in all axes but the last but one"
        )


def like(name: str, given: np.ndarray, other: np.ndarray) -> None:
    """Raise ValueError unless an array has another's shape and type."""
    if given.shape != other.shape or given.dtype != other.dtype:
        raise ValueError(
            f"{name} is {given.dtype} of shape {given.shape}; it must be {other.dtype} of shape {other.shape}"
        )


def aligned(values: np.ndarray, grad: np.ndarray, *slots: np.ndarray) -> None:
    """Raise ValueError unless the arrays of an optimizer step have one entry for each value, and one type."""
    if values.dtype.kind != "f" or grad.dtype != values.dtype:
        raise ValueError(
            f"the values are {values.dtype} and the gradient {grad.dtype};"
            " give both in one floating type, float32 or float64"
        )
    for array in (grad, *slots):
        if array.shape != values.shape:
            shapes = ", ".join(str(array.shape) for array in (values, grad, *slots))
            raise ValueError(
                f"values, gradient and slots have the shapes {shapes}; give arrays with one entry for each value"
            )


def tokens(name: str, given: np.ndarray, count: int, lowest: int = 0) -> None:
    """Raise ValueError unless all of ``given`` are integers in ``lowest <= token < count``."""
    if given.dtype == np.int64 and given.size:  # shifted and seen as unsigned, one comparison tells both bounds
        inside = np.maximum.reduce((given - lowest).view(np.uint64), axis=None) < count - lowest
    else:
        inside = not given.size or bool(given.min() >= lowest and given.max() < count)
    if given.dtype.kind not in "iu" or not inside:
        found = f"{given.min()} to {given.max()}" if given.size else "nothing"
        raise ValueError(f"{name} are {given.dtype} from {found}; they must be integers from {lowest} to {count - 1}")


def recurrence(w_ih: Matrix, w_hh: Matrix, bias: np.ndarray, x: np.ndarray, h0: np.ndarray, c0: np.ndarray) -> None:
    """Raise ValueError unless the arrays of an LSTM layer fit each other."""
    size = extents(w_hh)[1]
    if extents(w_hh)[0] != 4 * size or extents(w_ih)[0] != 4 * size or bias.shape != (4 * size,):
        raise ValueError(
            f"an LSTM layer of {size} units has four rows for each in W_ih, W_hh and the bias; "
            f"got {extents(w_ih)[0]}, {extents(w_hh)[0]} and a bias of shape {bias.shape}"
        )
    if x.ndim != 3:
        raise ValueError(f"an LSTM layer takes (time, features, batch); got shape {x.shape}")
    features("x", x, extents(w_ih)[1])
    for name, state in (("h0", h0), ("c0", c0)):
        if state.shape != (size, x.shape[2]):
            raise ValueError(
                f"{name} has shape {state.shape}; this layer's state is (units, batch) = {(size, x.shape[2])}"
            )
    for name, array in (("x", x), ("h0", h0), ("c0", c0), ("the bias", bias)):
        for w in (w_ih, w_hh):
            one_type(name, array, w)


def arriving(shape: tuple[int, int, int], w_hh: Matrix, dy: np.ndarray, dh: np.ndarray, dc: np.ndarray) -> None:
    """Raise ValueError unless the gradients that arrive at an LSTM layer fit its window of (T, H, B)."""
    for name, given, wanted in (("dy", dy, shape), ("dh", dh, shape[1:]), ("dc", dc, shape[1:])):
        if given.shape != wanted:
            raise ValueError(f"{name} has shape {given.shape}; this window's is {wanted}")
        one_type(name, given, w_hh)
