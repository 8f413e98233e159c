r"""Convolution of images, as a linear map on columns.

With :math:`X` the columns of the padded image (see :mod:`refimpl.layers.windows`), one for each position and sample,
and :math:`W` seen as a matrix of :math:`O` rows by :math:`I k_h k_w` columns,

.. math:: Y = W X + b, \quad dX = W^\top dY, \quad dW = dY X^\top, \quad db = dY \mathbf{1},

and the gradient of the image is the sum of :math:`dX` over all places that a pixel was copied to. Like everywhere in
the field this is the cross-correlation :math:`y_{o,h,w} = \sum_{c,i,j} W_{o,c,i,j}\, x_{c, s h + i, s w + j}`; the
kernel is not flipped. With groups, the output channels of group :math:`g` read the input channels of group :math:`g`
alone: one product for each group, on rows of the weight that follow each other.

A sparse weight, and a small dense one, needs no columns: its kernels read the windows where they lie in the padded
image. For a larger dense weight columns are made for a block of positions at a time, and made again where the weight's
gradient is asked for: beside the image, its padded copy and the output, no more than a few blocks of
:data:`refimpl.layers.windows.BLOCK_ENTRIES` numbers are held. Images that come as
:class:`refimpl.layers.padded.Padded`, with a margin as wide as the padding, are not copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.kernels import conv
from refimpl.kernels.types import Inset
from refimpl.layers import depthwise
from refimpl.layers.padded import Padded, image_of
from refimpl.layers.windows import Padding, Pair, Windows, check_images
from refimpl.weights import (
    Grads,
    Params,
    Shape,
    SparseWeight,
    Support,
    Weight,
    add_to,
    gradient,
    values_of,
    whole_support,
)

SMALL_ENTRIES = 1 << 16
"""Entries of a dense weight up to which the sparse kernels, on its full support, are faster than columns."""


class Cache(NamedTuple):
    """What backward needs."""

    weight: str
    bias: str | None
    w: Weight  # the weight as the forward pass saw it, for dX
    x: Inset  # (I, H, W, B) inside its padding, whose windows are read again for dW
    windows: Windows
    groups: int
    shape: Shape  # of the image


def forward(
    params: Params,
    weight: str,
    bias: str | None,
    x: np.ndarray | Padded,
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
    x : ndarray or Padded, shape (I, H, W, B)
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
    check_images(image_of(x))
    shape = image_of(x).shape
    _check(weight, w, offset, shape, groups)
    windows = Windows.of((w.shape[2], w.shape[3]), stride, padding)
    geometry, inset = windows.geometry(shape[1:3]), windows.inset(x)
    cache = Cache(weight, bias, w, inset, windows, groups, shape)
    sparse = _as_sparse(w, groups)
    if sparse is not None and groups == 1:
        return conv.convolve(sparse, inset, geometry, offset), cache
    y = kernels.memory.empty((w.shape[0], *geometry.outputs, shape[3]), np.result_type(values_of(w), inset.whole))
    if depthwise.is_depthwise(w.shape, groups):
        y[...] = 0 if offset is None else offset[:, None, None, None]
        depthwise.add_forward(w, groups, windows, windows.padded(inset, shape), y)
        return y, cache
    for group in _groups(w.shape, groups):
        own_offset = None if offset is None else offset[group.outputs]
        if sparse is not None:
            rows = _sparse_rows(sparse, groups, group)
            y[group.outputs] = conv.convolve(rows, _channels(inset, group.inputs), geometry, own_offset)
            continue
        dense, padded = _dense_rows(w, group), windows.padded(inset, shape)
        for block in _blocks(w.shape, groups, windows, shape):
            product = kernels.matmul(dense, windows.columns(padded[group.inputs], *block), own_offset)
            part = y[group.outputs, *block]
            part[...] = product.reshape(part.shape)
    return y, cache


def backward(dy: np.ndarray | Padded, cache: Cache, grads: Grads, *, input_gradient: bool = True) -> np.ndarray | None:
    """Add the gradients of weight and bias to ``grads`` and return ``dx``, or None if it is not wanted.

    A ``dy`` with a margin as wide as the kernel reaches (1 for a 3 x 3 kernel with padding 1) is not copied.
    """
    dx, known = None, None
    if input_gradient:
        dx, known = _input_gradient(dy, cache)
    add_to(grads, cache.weight, ConvGrad(cache.w.shape, dy, cache.x, cache.windows, cache.shape, cache.groups, known))
    if cache.bias is not None:
        image = image_of(dy)
        add_to(grads, cache.bias, kernels.sum_rows(image.reshape(len(image), -1)))
    return dx


def _input_gradient(dy: np.ndarray | Padded, cache: Cache) -> tuple[np.ndarray, tuple[Support, np.ndarray] | None]:
    """Return ``dx``, and the gradient on the support where it comes out of the same pass."""
    w, x, windows, groups, shape = cache.w, cache.x, cache.windows, cache.groups, cache.shape
    sparse, geometry = _as_sparse(w, groups), windows.geometry(shape[1:3])
    if sparse is not None:
        inset = _inset(dy)
        if groups == 1:
            dx, grad = conv.convolve_backward(sparse, inset, x, geometry)
            return dx, (sparse.support, grad)
        dx = kernels.memory.empty(shape, inset.whole.dtype)
        grad = np.zeros(sparse.nnz, inset.whole.dtype)
        for group in _groups(w.shape, groups):
            rows, own = _sparse_rows(sparse, groups, group), _channels(x, group.inputs)
            dx[group.inputs], grad[_entries(sparse.support, group)] = conv.convolve_backward(
                rows, _channels(inset, group.outputs), own, geometry
            )
        return dx, (sparse.support, grad)
    image = image_of(dy)
    d_padded = windows.zeros(shape, image.dtype)
    if depthwise.is_depthwise(w.shape, groups):
        depthwise.add_input_gradient(w, groups, windows, image, d_padded)
        return np.ascontiguousarray(windows.crop(d_padded)), None
    for group in _groups(w.shape, groups):
        dense = _dense_rows(w, group)
        for block in _blocks(w.shape, groups, windows, shape):
            d_columns = kernels.matmul_t(dense, _columns_of(image, group.outputs, block))
            windows.add_columns(d_columns, d_padded[group.inputs], *block)
    return np.ascontiguousarray(windows.crop(d_padded)), None


class ConvGrad:
    r"""Gradient of a convolution's weight: :math:`dW = dY X^\top`, :math:`X` the columns: evaluated on a support
    without them, and in full with columns that are made again, block by block, whenever it is asked for.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (O, I / groups, kH, kW).
    dy : ndarray or Padded, shape (O, H', W', B)
    x : Inset
        The images inside their padding.
    windows : Windows
    image : tuple of int
        Shape of the images, (I, H, W, B).
    groups : int
    known : (Support, ndarray), optional
        A support on which the gradient was evaluated already, together with another product.
    """

    def __init__(
        self,
        shape: Shape,
        dy: np.ndarray | Padded,
        x: Inset,
        windows: Windows,
        image: Shape,
        groups: int = 1,
        known: tuple[Support, np.ndarray] | None = None,
    ) -> None:
        self.shape = shape
        self.dy = dy
        self.x = x
        self.windows = windows
        self.image = image
        self.groups = groups
        self.known = known

    def on(self, support: Support) -> np.ndarray:
        """Return the gradient on a support, shape (nnz,)."""
        if self.known is not None and self.known[0] is support:
            return self.known[1]
        if depthwise.is_depthwise(self.shape, self.groups):
            padded = self.windows.padded(self.x, self.image)
            return depthwise.weight_gradient(self.shape, self.groups, self.windows, image_of(self.dy), padded, support)
        dy, geometry = _inset(self.dy), self.windows.geometry(self.image[1:3])
        if self.groups == 1:
            return conv.convolve_dot(support, dy, self.x, geometry)
        out = np.empty(support.nnz, dy.whole.dtype)
        for group in _groups(self.shape, self.groups):
            rows = _support_of_rows(support, self.groups, group)
            x = _channels(self.x, group.inputs)
            out[_entries(support, group)] = conv.convolve_dot(rows, _channels(dy, group.outputs), x, geometry)
        return out

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the dense gradient in blocks of rows, (rows, I / groups · kH · kW); columns are made again for each."""
        across, dy = math.prod(self.shape[1:]), image_of(self.dy)
        padded = self.windows.padded(self.x, self.image)
        if depthwise.is_depthwise(self.shape, self.groups):  # no more numbers than channels times taps
            full = depthwise.weight_gradient(self.shape, self.groups, self.windows, dy, padded, None)
            yield slice(0, self.shape[0]), full.reshape(-1, across)
            return
        most = max(1, gradient.BLOCK_ENTRIES // across)
        for start in range(0, self.shape[0], most):
            rows = slice(start, min(start + most, self.shape[0]))
            out = np.zeros((rows.stop - rows.start, across), dy.dtype)
            for group in _groups(self.shape, self.groups):
                own = slice(max(group.outputs.start, rows.start), min(group.outputs.stop, rows.stop))
                if own.start >= own.stop:
                    continue
                for block in _blocks(self.shape, self.groups, self.windows, self.image):
                    columns = self.windows.columns(padded[group.inputs], *block)
                    part = kernels.dense.gemm(_columns_of(dy, own, block), columns.T)
                    out[own.start - start : own.stop - start] += part
            yield rows, out

    def dense(self) -> np.ndarray:
        """Return the whole gradient in the weight's shape."""
        if _is_small(self.shape, self.groups):
            return self.on(whole_support(self.shape)).reshape(self.shape)
        return np.concatenate([block for _, block in self.blocks()]).reshape(self.shape)


class Group(NamedTuple):
    """Output channels that read the same input channels."""

    number: int
    outputs: slice
    inputs: slice


def _groups(shape: Shape, groups: int) -> list[Group]:
    outputs, inputs = shape[0] // groups, shape[1]
    return [Group(g, slice(g * outputs, (g + 1) * outputs), slice(g * inputs, (g + 1) * inputs)) for g in range(groups)]


def _blocks(shape: Shape, groups: int, windows: Windows, image: Shape) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of positions whose columns, and whose outputs, are of bounded size."""
    features = max(math.prod(shape[1:]), shape[0] // groups)
    return windows.blocks(image[1:3], features * image[3])


def _inset(dy: np.ndarray | Padded) -> Inset:
    """Return gradients inside whatever margin they have."""
    if isinstance(dy, Padded):
        return Inset(dy.whole, (dy.margin, dy.margin))
    return Inset(dy if dy.flags.c_contiguous else np.ascontiguousarray(dy), (0, 0))


def _channels(inset: Inset, channels: slice) -> Inset:
    return Inset(inset.whole[channels], inset.at)


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


def _is_small(shape: Shape, groups: int) -> bool:
    return math.prod(shape) <= SMALL_ENTRIES and not depthwise.is_depthwise(shape, groups)


def _as_sparse(w: Weight, groups: int) -> SparseWeight | None:
    """Return the weight as one that the sparse kernels take, if they are to take it."""
    if isinstance(w, SparseWeight):
        return None if depthwise.is_depthwise(w.shape, groups) else w
    if not _is_small(w.shape, groups) or w.dtype not in (np.float32, np.float64):
        return None
    return SparseWeight(whole_support(w.shape), np.ascontiguousarray(w).reshape(-1))


def _sparse_rows(w: SparseWeight, groups: int, group: Group) -> SparseWeight:
    """Return a group's rows as a sparse weight of their own."""
    return SparseWeight(_support_of_rows(w.support, groups, group), w.values[_entries(w.support, group)])


def _dense_rows(w: Weight, group: Group) -> np.ndarray:
    """Return a group's rows of a dense weight as a matrix."""
    return values_of(w).reshape(w.shape[0], -1)[group.outputs]


def _check(weight: str, w: Weight, bias: np.ndarray | None, image: Shape, groups: int) -> None:
    """Raise ValueError unless weight, bias, image and groups fit each other."""
    if len(w.shape) != 4:
        raise ValueError(f"{weight} has shape {w.shape}; the weight of a convolution is (O, I / groups, kH, kW)")
    outputs, inputs = w.shape[:2]
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"{weight} has {outputs} output channels; give a number of groups that divides them, not {groups}"
        )
    if image[0] != inputs * groups:
        raise ValueError(
            f"the image has {image[0]} channels; {weight} of shape {w.shape} in {groups} group(s) reads "
            f"{inputs * groups}: give such images, or another weight or number of groups"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"the bias has shape {bias.shape}; {weight} of shape {w.shape} takes one of {(outputs,)}")
