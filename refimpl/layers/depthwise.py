r"""Depthwise convolution: each output channel reads one input channel, :math:`m` of them each.

.. math::
    y_o = b_o + \sum_{i,j} W_{o,0,i,j}\, x_{\lfloor o / m \rfloor}[i, j], \quad
    dx_c[i, j] \mathrel{+}= \sum_{\lfloor o / m \rfloor = c} W_{o,0,i,j}\, dy_o, \quad
    dW_{o,0,i,j} = \langle dy_o, x_{\lfloor o / m \rfloor}[i, j] \rangle,

where :math:`x_c[i, j]` is tap :math:`(i, j)` of all windows of channel :math:`c`. As matrices of one row these products
would be too small to be worth a call, so they are done tap by tap, elementwise over all channels at once; of a sparse
weight over the rows alone that store the tap. Each pass makes a few arrays as large as the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refimpl.layers.windows import Windows
from refimpl.weights import Shape, SparseWeight, Support, Weight, values_of


class Pass(NamedTuple):
    """Entries of a weight that are at one tap, and of which no two read one channel."""

    i: int
    j: int
    entries: slice | np.ndarray  # places in the values
    outputs: slice | np.ndarray  # their rows
    inputs: slice | np.ndarray  # the channel that each of them reads


def is_depthwise(shape: Shape, groups: int) -> bool:
    """Tell whether a weight (O, I / groups, kH, kW) has as many groups as input channels, and more than one."""
    return shape[1] == 1 and groups > 1


def _passes(shape: Shape, groups: int, windows: Windows, support: Support | None) -> Iterator[Pass]:
    """Yield all entries: of a dense weight, or of those that a support stores."""
    multiplier, taps = shape[0] // groups, len(windows.taps)
    rows = None if support is None else support.rows
    for k, (i, j) in enumerate(windows.taps):
        for r in range(multiplier):
            if support is None or rows is None:
                entries = slice(r * taps + k, None, multiplier * taps)
                yield Pass(i, j, entries, slice(r, None, multiplier), slice(None))
                continue
            at = np.flatnonzero((support.indices == k) & (rows % multiplier == r))
            if at.size:
                yield Pass(i, j, at, rows[at], rows[at] // multiplier)


def _of(w: Weight, groups: int, windows: Windows) -> Iterator[tuple[Pass, np.ndarray]]:
    """Yield the passes of a weight with their values, (entries, 1, 1, 1)."""
    values = values_of(w).reshape(-1)
    for part in _passes(w.shape, groups, windows, w.support if isinstance(w, SparseWeight) else None):
        yield part, values[part.entries, None, None, None]


def add_forward(w: Weight, groups: int, windows: Windows, padded: np.ndarray, y: np.ndarray) -> None:
    """Add the convolution of a padded image to ``y`` (O, H', W', B)."""
    every = slice(0, y.shape[1]), slice(0, y.shape[2])
    for part, values in _of(w, groups, windows):
        y[part.outputs] += values * windows.tap(padded, part.i, part.j, *every)[part.inputs]


def add_input_gradient(w: Weight, groups: int, windows: Windows, dy: np.ndarray, d_padded: np.ndarray) -> None:
    """Add the gradient of the padded image to ``d_padded``."""
    every = slice(0, dy.shape[1]), slice(0, dy.shape[2])
    for part, values in _of(w, groups, windows):
        windows.tap(d_padded, part.i, part.j, *every)[part.inputs] += values * dy[part.outputs]


def weight_gradient(
    shape: Shape, groups: int, windows: Windows, dy: np.ndarray, padded: np.ndarray, support: Support | None
) -> np.ndarray:
    """Return the gradient on a support, (nnz,), or in full and flat without one."""
    every = slice(0, dy.shape[1]), slice(0, dy.shape[2])
    out = np.zeros(int(np.prod(shape)) if support is None else support.nnz, dy.dtype)
    for part in _passes(shape, groups, windows, support):
        product = dy[part.outputs] * windows.tap(padded, part.i, part.j, *every)[part.inputs]
        out[part.entries] = product.reshape(len(product), -1).sum(axis=1)
    return out
