"""Initial parameters of convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from refimpl.rng import generator
from refimpl.weights import Params, ParamSpec, Shape, SparseWeight, Support, Weight, draw_uniform

Initial = Literal["he", "torch"]
"""Initial distribution of convolutions; see :func:`draw`."""


def draw(
    specs: Iterable[ParamSpec],
    seed: int,
    dtype: Any,
    supports: Mapping[str, Support] | None = None,
    initial: Initial = "he",
) -> Params:
    r"""Draw the initial parameters of a network; of a sparse weight only the values that exist are drawn.

    Scales of batch norm are 1 and its shifts 0. Linear maps, and all biases, are :math:`U(\pm 1/\sqrt{n})` for
    :math:`n` inputs of a unit, PyTorch's default. Of a convolution's weight, with ``initial``

    - ``"he"``: :math:`\mathcal N(0, 2/m)`, m the outputs times the taps of the kernel (fan-out), as in torchvision's
      ResNet;
    - ``"torch"``: :math:`U(\pm 1/\sqrt{n})`, n the inputs of a unit times the taps, PyTorch's default.

    Fans are those of the dense map, whatever the sparsity.

    Source: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015, section 2.2.

    Raises
    ------
    ValueError
        If ``initial`` is neither.
    """
    if initial not in ("he", "torch"):
        raise ValueError(f"the initial distribution is {initial!r}; give 'he' or 'torch'")
    params: Params = {}
    for spec in specs:
        rng, support = generator(seed, f"init/{spec.name}"), (supports or {}).get(spec.name)
        if spec.kind == "norm":
            params[spec.name] = np.full(spec.shape, float(spec.name.endswith(".weight")), dtype)
        elif spec.kind == "conv" and initial == "he":
            params[spec.name] = _draw_normal(rng, spec.shape, math.sqrt(2 / spec.fan_out), dtype, support)
        else:
            params[spec.name] = draw_uniform(rng, spec.shape, spec.fan_in**-0.5, dtype, support)
    return params


def _draw_normal(rng: np.random.Generator, shape: Shape, scale: float, dtype: Any, support: Support | None) -> Weight:
    values = rng.normal(0.0, scale, shape if support is None else support.nnz).astype(dtype)
    return values if support is None else SparseWeight(support, values)
