r"""Convolution of images, as a linear map on columns.

With :math:`X` the columns of the padded image (see :mod:`refimpl.layers.windows`), one for each position and sample,
and :math:`W` seen as a matrix of :math:`O` rows by :math:`I k_h k_w` columns,

.. math:: Y = W X + b, \quad dX = W^\top dY, \quad dW = dY X^\top, \quad db = dY \mathbf{1},

and the gradient of the image is the sum of :math:`dX` over all places that a pixel was copied to. Like everywhere in
the field this is the cross-correlation :math:`y_{o,h,w} = \sum_{c,i,j} W_{o,c,i,j}\, x_{c, s h + i, s w + j}`; the
kernel is not flipped. With groups, the output channels of group :math:`g` read the input channels of group :math:`g`
alone: one product for each group, on rows of the weight that follow each other.

Columns are made for a block of positions at a time, and made again where the weight's gradient is asked for: beside the
image, its padded copy and the output, no more than a few blocks of
:data:`refimpl.layers.windows.BLOCK_ENTRIES` numbers are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.layers import depthwise
from refimpl.layers.windows import Padding, Pair, Windows, check_images
from refimpl.weights import Grads, Params, Shape, SparseWeight, Support, Weight, add_to, gradient, values_of


class Cache(NamedTuple):
    """What backward needs."""

    weight: str
    bias: str | None
    w: Weight  # the weight as the forward pass saw it, for dX
    x: np.ndarray  # (I, H, W, B): the image without padding, whose columns are made again for dW
    windows: Windows
    groups: int


def forward(
    params: Params,
    weight: str,
    bias: str | None,
    x: np.ndarray,
    *,
    stride: int | Pair = 1,
    padding: Padding = 0,
    groups: int = 1,
) -> tuple[np.ndarray, Cache]:
    r"""Return the convolution of images.

    Parameters
    ----------
    params : Params
    weight : str
        Dense or sparse, of shape (O, I / groups, kH, kW).
    bias : str or None
        Of shape (O,).
    x : ndarray, shape (I, H, W, B)
    stride : int or (int, int)
        Of the height and the width.
    padding : int, (int, int) or ((int, int), (int, int))
        Zeros around the image: everywhere, above and below / left and right, or (top, bottom), (left, right).
    groups : int

    Returns
    -------
    y : ndarray, shape (O, H', W', B)
        With :math:`H' = \lfloor (H + p - k_h) / s \rfloor + 1` for :math:`p` rows of padding, and W' likewise.
    cache : Cache

    Raises
    ------
    ValueError
        If the channels do not fit the weight, the groups do not divide them, or the kernel is larger than the padded
        image.
    """
    w = params[weight]
    offset = None if bias is None else values_of(params[bias])
    _check(weight, w, offset, x, groups)
    windows = Windows.of((w.shape[2], w.shape[3]), stride, padding)
    padded = windows.pad(x)
    y = kernels.memory.empty((w.shape[0], *windows.size(x.shape[1:3]), x.shape[3]), np.result_type(values_of(w), x))
    cache = Cache(weight, bias, w, x, windows, groups)
    if depthwise.is_depthwise(w.shape, groups):
        y[...] = 0 if offset is None else offset[:, None, None, None]
        depthwise.add_forward(w, groups, windows, padded, y)
        return y, cache
    for group in _groups(w.shape, groups):
        rows = _rows(w, groups, group)
        own_offset = None if offset is None else offset[group.outputs]
        for block in _blocks(w.shape, groups, windows, x):
            product = kernels.matmul(rows, windows.columns(padded[group.inputs], *block), own_offset)
            part = y[group.outputs, *block]
            part[...] = product.reshape(part.shape)
    return y, cache


def backward(dy: np.ndarray, cache: Cache, grads: Grads, *, input_gradient: bool = True) -> np.ndarray | None:
    """Add the gradients of weight and bias to ``grads`` and return ``dx``, or None if it is not wanted."""
    dx, known = None, None
    if input_gradient:
        dx, known = _input_gradient(dy, cache)
    add_to(grads, cache.weight, ConvGrad(cache.w.shape, dy, cache.x, cache.windows, cache.groups, known))
    if cache.bias is not None:
        add_to(grads, cache.bias, kernels.sum_rows(dy.reshape(len(dy), -1)))
    return dx


def _input_gradient(dy: np.ndarray, cache: Cache) -> tuple[np.ndarray, tuple[Support, np.ndarray] | None]:
    """Return ``dx``, and of a sparse weight the gradient on its support, for which each block is read only once."""
    w, x, windows, groups = cache.w, cache.x, cache.windows, cache.groups
    d_padded = windows.zeros(x.shape, dy.dtype)
    if depthwise.is_depthwise(w.shape, groups):
        depthwise.add_input_gradient(w, groups, windows, dy, d_padded)
        return np.ascontiguousarray(windows.crop(d_padded)), None
    padded = windows.pad(x) if isinstance(w, SparseWeight) else x
    known = (w.support, np.zeros(w.nnz, dy.dtype)) if isinstance(w, SparseWeight) else None
    for group in _groups(w.shape, groups):
        rows = _rows(w, groups, group)
        for block in _blocks(w.shape, groups, windows, x):
            d_rows = _columns_of(dy, group.outputs, block)
            if known is None or not isinstance(rows, SparseWeight):
                d_columns = kernels.matmul_t(rows, d_rows)
            else:
                columns = windows.columns(padded[group.inputs], *block)
                d_columns, on_support = kernels.matmul_t_sddmm(rows, d_rows, columns)
                known[1][_entries(known[0], group)] += on_support
            windows.add_columns(d_columns, d_padded[group.inputs], *block)
    return np.ascontiguousarray(windows.crop(d_padded)), known


class ConvGrad:
    r"""Gradient of a convolution's weight: :math:`dW = dY X^\top`, :math:`X` the columns, which are made again, block
    by block, whenever it is asked for.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (O, I / groups, kH, kW).
    dy : ndarray, shape (O, H', W', B)
    x : ndarray, shape (I, H, W, B)
        The image, without padding.
    windows : Windows
    groups : int
    known : (Support, ndarray), optional
        A support on which the gradient was evaluated already, together with another product.
    """

    def __init__(
        self,
        shape: Shape,
        dy: np.ndarray,
        x: np.ndarray,
        windows: Windows,
        groups: int = 1,
        known: tuple[Support, np.ndarray] | None = None,
    ) -> None:
        self.shape = shape
        self.dy = dy
        self.x = x
        self.windows = windows
        self.groups = groups
        self.known = known

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        if self.known is not None and self.known[0] is support:
            return self.known[1]
        padded = self.windows.pad(self.x)
        if depthwise.is_depthwise(self.shape, self.groups):
            return depthwise.weight_gradient(self.shape, self.groups, self.windows, self.dy, padded, support)
        out = np.zeros(support.nnz, self.dy.dtype)
        for group in _groups(self.shape, self.groups):
            rows = _support_of_rows(support, self.groups, group)
            for block in _blocks(self.shape, self.groups, self.windows, self.x):
                columns = self.windows.columns(padded[group.inputs], *block)
                out[_entries(support, group)] += kernels.sddmm(
                    rows, _columns_of(self.dy, group.outputs, block), columns
                )
        return out

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows, (rows, I / groups · kH · kW); columns are made again for each."""
        across = math.prod(self.shape[1:])
        padded = self.windows.pad(self.x)
        if depthwise.is_depthwise(self.shape, self.groups):  # no more numbers than channels times taps
            full = depthwise.weight_gradient(self.shape, self.groups, self.windows, self.dy, padded, None)
            yield slice(0, self.shape[0]), full.reshape(-1, across)
            return
        most = max(1, gradient.BLOCK_ENTRIES // across)
        for start in range(0, self.shape[0], most):
            rows = slice(start, min(start + most, self.shape[0]))
            out = np.zeros((rows.stop - rows.start, across), self.dy.dtype)
            for group in _groups(self.shape, self.groups):
                own = slice(max(group.outputs.start, rows.start), min(group.outputs.stop, rows.stop))
                if own.start >= own.stop:
                    continue
                for block in _blocks(self.shape, self.groups, self.windows, self.x):
                    columns = self.windows.columns(padded[group.inputs], *block)
                    part = kernels.dense.gemm(_columns_of(self.dy, own, block), columns.T)
                    out[own.start - start : own.stop - start] += part
            yield rows, out

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        return np.concatenate([block for _, block in self.blocks()]).reshape(self.shape)


class Group(NamedTuple):
    """Output channels that read the same input channels."""

    number: int
    outputs: slice
    inputs: slice


def _groups(shape: Shape, groups: int) -> list[Group]:
    outputs, inputs = shape[0] // groups, shape[1]
    return [Group(g, slice(g * outputs, (g + 1) * outputs), slice(g * inputs, (g + 1) * inputs)) for g in range(groups)]


def _blocks(shape: Shape, groups: int, windows: Windows, x: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of positions whose columns, and whose outputs, are of bounded size."""
    features = max(math.prod(shape[1:]), shape[0] // groups)
    return windows.blocks(x.shape[1:3], features * x.shape[3])


def _columns_of(dy: np.ndarray, outputs: slice, block: tuple[slice, slice]) -> np.ndarray:
    """Return some channels of an image at a block of positions as a matrix (channels, positions · batch)."""
    return dy[outputs, *block].reshape(outputs.stop - outputs.start, -1)


def _entries(support: Support, group: Group) -> slice:
    """Return where the entries of a group's rows stand among a support's."""
    return slice(int(support.indptr[group.outputs.start]), int(support.indptr[group.outputs.stop]))


def _support_of_rows(support: Support, groups: int, group: Group) -> Support:
    """Return a group's rows as a support of their own, kept with the whole one like all that is derived from it."""
    if groups == 1:
        return support
    kept: dict[int, Support] = support.plans.setdefault(f"{groups} groups", {})
    if group.number not in kept:
        first, after = group.outputs.start, group.outputs.stop
        flat = support.flat[_entries(support, group)] - first * support.matrix_shape[1]
        kept[group.number] = Support((after - first, *support.shape[1:]), flat)
    return kept[group.number]


def _rows(w: Weight, groups: int, group: Group) -> Weight:
    """Return a group's rows of the weight as a matrix, or as a sparse weight of a shape that is seen as one."""
    if isinstance(w, SparseWeight):
        if groups == 1:
            return w
        return SparseWeight(_support_of_rows(w.support, groups, group), w.values[_entries(w.support, group)])
    return w.reshape(len(w), -1)[group.outputs]


def _check(weight: str, w: Weight, bias: np.ndarray | None, x: np.ndarray, groups: int) -> None:
    """Raise ValueError unless weight, bias, image and groups fit each other."""
    check_images(x)
    if len(w.shape) != 4:
        raise ValueError(f"{weight} has shape {w.shape}; the weight of a convolution is (O, I / groups, kH, kW)")
    outputs, inputs = w.shape[:2]
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"{weight} has {outputs} output channels; give a number of groups that divides them, not {groups}"
        )
    if x.shape[0] != inputs * groups:
        raise ValueError(
            f"the image has {x.shape[0]} channels; {weight} of shape {w.shape} in {groups} group(s) reads "
            f"{inputs * groups}: give such images, or another weight or number of groups"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"the bias has shape {bias.shape}; {weight} of shape {w.shape} takes one of {(outputs,)}")
