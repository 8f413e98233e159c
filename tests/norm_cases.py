"""Batch norm layers for the checks: random ones, and three steps beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.layers import batch_norm
from refimpl.layers.padded import Padded, image_of
from refimpl.testing.kernels import poison_pool
from refimpl.testing.layers import Layer
from refimpl.weights import Grads, Params

OF = batch_norm.names("bn")
BUFFERS = (OF.running_mean, OF.running_var, OF.num_batches_tracked)
SIZES: dict[str, Any] = {
    "channels": range(1, 4), "positions": [(), (2, 2), (1, 3)], "batch": [4, 5], "train": [True, False],
    "add": [True, False], "rectify": [True, False], "margin": [0, 1],
}  # fmt: skip


def padded(x: np.ndarray, margin: int) -> Any:
    """Return images inside a margin; what is no image, or gets no margin, as it is."""
    if not margin or x.ndim != 4:
        return x
    out = Padded.empty(x.shape, x.dtype, margin)
    out.image[...] = x
    return out


def inner(x: Any, margin: int) -> np.ndarray:
    """Return images without the margin, in which nothing may have been written."""
    if not margin:
        assert isinstance(x, np.ndarray)
        return x
    assert x.margin == margin
    edge = x.whole.copy()
    x._replace(whole=edge).image[...] = 0
    assert not edge.any(), "something stands in the margin"
    return x.image


def make(
    rng: np.random.Generator, *, channels: int, positions: tuple[int, ...], batch: int, train: bool, add: bool = False,
    rectify: bool = False, margin: int = 0,
    forward: Callable[..., Any] = batch_norm.forward, backward: Callable[..., Any] = batch_norm.backward,
) -> Layer:  # fmt: skip
    """Make a layer whose numbers are well apart: little variance would amplify rounding."""
    shape = (channels, *positions, batch)
    margin *= bool(positions)
    x = rng.permuted(np.arange(np.prod(shape)).reshape(channels, -1), axis=1).reshape(shape) / 4
    params: Params = {OF.weight: rng.uniform(0.5, 2, channels), OF.bias: rng.standard_normal(channels)}
    buffers = {
        OF.running_mean: rng.standard_normal(channels),
        OF.running_var: rng.uniform(0.5, 2, channels),
        OF.num_batches_tracked: np.array(3),
    }

    def run(p: Params, x: np.ndarray, *more: np.ndarray) -> tuple[np.ndarray, Any]:
        poison_pool()
        kind = np.float32 if x.dtype == np.float32 else np.float64
        own: Params = {name: b.astype(kind) for name, b in buffers.items()}
        extra = padded(more[0], margin) if more else None
        y, cache, _ = forward(
            {**p, **own}, "bn", padded(x, margin), train=train, add=extra, rectify=rectify, margin=margin
        )
        return inner(y, margin), cache

    def back(dy: np.ndarray, cache: Any, grads: Grads, dx: bool) -> Any:
        got, added = backward(padded(dy, margin), cache, grads, input_gradient=dx, margin=margin)
        if not dx:
            assert added is None
            return None
        if not add:
            assert added is None
            return inner(got, margin)
        return inner(got, margin), added if isinstance(added, np.ndarray) else added.image

    more = (rng.standard_normal(shape),) if add else ()
    return Layer(run, back, params, (x, *more), complex_step=True)


def drawn(rng: np.random.Generator, channels: int, dtype: Any = np.float64) -> Params:
    params: Params = {name: rng.uniform(0.5, 2, channels).astype(dtype) for name in (OF.weight, OF.bias)}
    return params | batch_norm.new_buffers("bn", channels, dtype)


def check_against_torch(
    seed: int, channels: int, positions: tuple[int, ...], batch: int, momentum: float | None, eps: float,
    add: bool = False, rectify: bool = False, margin: int = 0,
    forward: Callable[..., Any] = batch_norm.forward, backward: Callable[..., Any] = batch_norm.backward,
) -> None:  # fmt: skip
    """Three training steps and one in evaluation: outputs, gradients and statistics."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    params = drawn(rng, channels)
    margin *= bool(positions)
    kind = torch.nn.BatchNorm2d if positions else torch.nn.BatchNorm1d
    theirs = kind(channels, eps=eps, momentum=momentum).double()
    theirs.load_state_dict({k.removeprefix("bn."): torch.tensor(v) for k, v in params.items()})

    def of_torch(a: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(np.moveaxis(a, -1, 0)), requires_grad=True)

    for train in (True, True, True, False):
        x, more, dy = rng.standard_normal((3, channels, *positions, batch)) * 3 + 1
        y, cache, buffers = forward(
            params, "bn", padded(x, margin), train=train, momentum=momentum, eps=eps, add=more if add else None,
            rectify=rectify, margin=margin,
        )  # fmt: skip
        params = params | buffers
        grads: Grads = {}
        dx, added = backward(padded(dy, margin), cache, grads, margin=margin)
        theirs.train(train)
        theirs.zero_grad()
        x_torch, more_torch = of_torch(x), of_torch(more)
        out = theirs(x_torch)
        out = out + more_torch if add else out
        out = torch.relu(out) if rectify else out
        out.backward(of_torch(dy).detach())
        pairs = [
            (np.moveaxis(inner(y, margin), -1, 0), out.detach()),
            (np.moveaxis(inner(dx, margin), -1, 0), x_torch.grad),
            (grads[OF.weight], theirs.weight.grad),
            (grads[OF.bias], theirs.bias.grad),
            (params[OF.running_mean], theirs.running_mean),
            (params[OF.running_var], theirs.running_var),
        ]
        if add:
            pairs.append((np.moveaxis(added if rectify else image_of(added), -1, 0), more_torch.grad))
        for ours, expected in pairs:
            scale = max(1.0, float(expected.abs().max()))
            np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-12 * scale)
        assert int(np.asarray(params[OF.num_batches_tracked])) == int(theirs.num_batches_tracked)
        assert bool(buffers) == train
