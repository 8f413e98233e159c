"""The products of a linear layer by other sparse libraries, each in the layout that suits it best: one column a sample,
both a matrix and its transpose prepared, outputs allocated once where the library takes them.

The peers' transposed matrices stay as they were made, while ours takes over the weight's present values at each call.

A peer is a dict from product to call: ``forward`` (W X), ``input-gradient`` (W^T dY), ``weight-gradient`` (dY X^T on
the support), or ``backward``, the two latter at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module

import numpy as np
import scipy.sparse

from refimpl.weights import SparseWeight

Calls = dict[str, Callable[[], object]]


def csr_of(w: SparseWeight) -> scipy.sparse.csr_array:
    """Return a weight as SciPy's matrix, with 32-bit indices."""
    support = w.support
    parts = (w.values, support.indices.astype(np.int32), support.indptr.astype(np.int32))
    return scipy.sparse.csr_array(parts, shape=support.matrix_shape)


def scipy_csr(w: SparseWeight, x: np.ndarray, dy: np.ndarray) -> Calls:
    """SciPy's own loops, single-threaded; it has no product for the weight gradient."""
    matrix = csr_of(w)
    transposed = matrix.T.tocsr()
    return {"forward": lambda: matrix @ x, "input-gradient": lambda: transposed @ dy}


def mkl_csr(w: SparseWeight, x: np.ndarray, dy: np.ndarray) -> Calls:
    """MKL through sparse_dot_mkl; it has no product for the weight gradient."""
    dot_product_mkl = import_module("sparse_dot_mkl").dot_product_mkl
    matrix = scipy.sparse.csr_matrix(csr_of(w))
    transposed = scipy.sparse.csr_matrix(matrix.T.tocsr())
    y, dx = np.zeros_like(dy), np.zeros_like(x)
    return {
        "forward": lambda: dot_product_mkl(matrix, x, out=y, out_scalar=0.0),
        "input-gradient": lambda: dot_product_mkl(transposed, dy, out=dx, out_scalar=0.0),
    }


def torch_csr(w: SparseWeight, x: np.ndarray, dy: np.ndarray) -> Calls:
    """PyTorch's CSR tensors, which use MKL where torch was built with it, and its sampled product."""
    import torch

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")

    def tensor(matrix: scipy.sparse.csr_array) -> torch.Tensor:
        pointer, index, values = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
        return torch.sparse_csr_tensor(pointer, index, values, matrix.shape, check_invariants=False)

    matrix, transposed = tensor(csr_of(w)), tensor(csr_of(w).T.tocsr())
    tx, tdy = torch.from_numpy(x), torch.from_numpy(dy)
    return {
        "forward": lambda: matrix @ tx,
        "input-gradient": lambda: transposed @ tdy,
        "weight-gradient": lambda: torch.sparse.sampled_addmm(matrix, tdy, tx.T, beta=0.0),
    }


def sparseprop(w: SparseWeight, x: np.ndarray, dy: np.ndarray) -> Calls:
    """SparseProp's kernels, which add to outputs that must be cleared before."""
    backend = import_module("sparseprop").backend
    matrix = csr_of(w)
    y, dx, grad = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w.values)

    def forward() -> np.ndarray:
        y.fill(0)
        backend.sparse_linear_vectorized_forward(x, matrix.indptr, matrix.indices, matrix.data, y)
        return y

    def backward() -> tuple[np.ndarray, np.ndarray]:
        dx.fill(0)
        backend.sparse_linear_vectorized_backward(x, matrix.indptr, matrix.indices, matrix.data, dy, dx, grad)
        return dx, grad

    return {"forward": forward, "backward": backward}


PEERS: dict[str, tuple[str, Callable[[SparseWeight, np.ndarray, np.ndarray], Calls]]] = {
    "scipy-csr": ("", scipy_csr),
    "mkl-csr": ("sparse_dot_mkl", mkl_csr),
    "torch-csr": ("torch", torch_csr),
    "sparseprop": ("sparseprop", sparseprop),
}
"""Implementation: the package that it needs, and its products."""


def dense_products(w: np.ndarray, x: np.ndarray, dy: np.ndarray) -> dict[str, Calls]:
    """Return NumPy's dense products, columns being samples and rows being samples."""
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
    xt, dyt = np.ascontiguousarray(x.T), np.ascontiguousarray(dy.T)
    yt, dxt = np.empty_like(dyt), np.empty_like(xt)
    return {
        "columns": {
            "forward": lambda: np.matmul(w, x, out=y),
            "input-gradient": lambda: np.matmul(w.T, dy, out=dx),
            "weight-gradient": lambda: np.matmul(dy, x.T, out=dw),
        },
        "rows": {
            "forward": lambda: np.matmul(xt, w.T, out=yt),
            "input-gradient": lambda: np.matmul(dyt, w, out=dxt),
            "weight-gradient": lambda: np.matmul(dyt.T, xt, out=dw),
        },
    }


def torch_dense(w: np.ndarray, x: np.ndarray, dy: np.ndarray) -> Calls:
    """PyTorch's dense products as its linear layer calls them, rows being samples."""
    import torch

    weight = torch.from_numpy(w)
    xt, dyt = (torch.from_numpy(np.ascontiguousarray(a.T)) for a in (x, dy))
    return {
        "forward": lambda: xt @ weight.T,
        "input-gradient": lambda: dyt @ weight,
        "weight-gradient": lambda: dyt.T @ xt,
    }
