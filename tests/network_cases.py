"""Networks against torch: what the tests of the networks share.

A network is written once more as a function of :class:`Ops`, in torch's own functions and by the names of its state
dict; the same function without norms, rectifiers and biases is the linear network whose flow SynFlow asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest

from refimpl.models.classifier import Network
from refimpl.weights import Grads, Params, SparseWeight, Support, support_of, values_of

CLOSE = 1e-9
"""Of the largest entry: float64 through a few layers, whose norms divide by deviations that are not small."""


class Ops:
    """The functions of torch that a network is made of, by the names of its parameters."""

    def __init__(self, params: dict[str, np.ndarray], *, train: bool = True, linear: bool = False) -> None:
        self.torch = pytest.importorskip("torch")
        self.p = {name: self.torch.tensor(w) for name, w in params.items()}
        for name, w in self.p.items():
            w.requires_grad_(w.is_floating_point() and "running" not in name)
        self.train, self.only_linear = train, linear
        self.F = self.torch.nn.functional

    def _bias(self, name: str) -> Any:
        return None if self.only_linear else self.p.get(f"{name}.bias")

    def conv(self, name: str, x: Any, **geometry: int) -> Any:
        return self.F.conv2d(x, self.p[f"{name}.weight"], self._bias(name), **geometry)

    def dense(self, name: str, x: Any) -> Any:
        return self.F.linear(x, self.p[f"{name}.weight"], self._bias(name))

    def norm(self, name: str, x: Any) -> Any:
        if self.only_linear:
            return x
        if self.train:
            self.p[f"{name}.num_batches_tracked"] += 1
        own = [self.p[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return self.F.batch_norm(x, *own, training=self.train)

    def relu(self, x: Any) -> Any:
        return x if self.only_linear else x.relu()

    def max_pool(self, x: Any) -> Any:
        return self.F.avg_pool2d(x, 2) if self.only_linear else self.F.max_pool2d(x, 2)

    def grads(self) -> dict[str, np.ndarray]:
        return {name: w.grad.numpy() for name, w in self.p.items() if w.grad is not None}


Reference = Callable[[Ops, Any], Any]
"""From images (batch, channels, height, width), or (batch, features), to scores (batch, classes)."""


def drawn(network: Network, seed: int, density: float = 1.0, *, magnitudes: bool = False) -> Params:
    """Return parameters with buffers; below density 1 every second weight is sparse, the first one among them."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    number = 0
    for name, spec in network.specs().items():
        w = rng.uniform(0 if magnitudes else -1, 1, spec.shape) * max(spec.fan_in, 1) ** -0.5
        if spec.kind == "norm" and name.endswith(".weight"):
            w = rng.uniform(0.5, 1.5, spec.shape)
        params[name] = w
        if spec.prunable:
            if density < 1 and number % 2 == 0:
                params[name] = SparseWeight.from_dense(w, Support.from_mask(rng.random(spec.shape) < density))
            number += 1
    for name, b in network.buffers(np.float64).items():
        params[name] = b if b.dtype.kind == "i" else rng.uniform(0.5, 1.5, b.shape)
    return params


def batch_of(network: Network, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels."""
    rng = np.random.default_rng(seed)
    classes = network.specs()[network.output[1]].shape[0]
    return rng.standard_normal((*network.input_shape, batch)), rng.integers(0, classes, batch)


def dense(params: Params) -> dict[str, np.ndarray]:
    return {name: w.dense() if isinstance(w, SparseWeight) else w for name, w in params.items()}


def evaluated(grads: Grads) -> dict[str, np.ndarray]:
    return {name: np.asarray(g) if isinstance(g, np.ndarray) else g.dense() for name, g in grads.items()}


def check_close(own: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert own.shape == expected.shape, f"{what} has shape {own.shape}, not {expected.shape}"
    error, scale = np.abs(own - expected).max(initial=0), np.abs(expected).max(initial=0)
    assert error <= CLOSE * max(scale, 1e-3), f"{what} is off by {error}, its largest entry being {scale}"


def check_against_torch(
    network: Network, reference: Reference, *, batch: int = 4, density: float = 1.0, seed: int = 0, steps: int = 2
) -> None:
    """Compare losses, gradients in full and on the supports, and running statistics over steps; then the scores."""
    torch = pytest.importorskip("torch")
    params = drawn(network, seed, density)
    before = network.buffers(np.float64).keys()
    smoothing: float = getattr(network, "label_smoothing", 0.0)
    for step in range(steps):
        x, labels = batch_of(network, batch, seed + step)
        loss, grads, buffers = network.loss_and_grads(params, x, labels)
        assert buffers.keys() == before
        ops = Ops(dense(params))
        scores = reference(ops, torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 0))))
        theirs = torch.nn.functional.cross_entropy(scores, torch.tensor(labels), label_smoothing=smoothing)
        theirs.backward()
        check_close(np.array(loss), theirs.detach().numpy(), "the loss")
        expected, own = ops.grads(), evaluated(grads)
        assert own.keys() == expected.keys() == network.specs().keys()
        for name, g in own.items():
            check_close(g, expected[name], f"the gradient of {name}")
            promise = grads[name]
            if not isinstance(promise, np.ndarray):
                support = support_of(params[name])
                at_support = expected[name].reshape(-1)[support.flat]
                check_close(promise.on(support), at_support, f"the gradient of {name} on its support")
        for name, b in buffers.items():
            check_close(b, ops.p[name].detach().numpy(), name)
            assert b.dtype == values_of(params[name]).dtype
        params |= buffers
    x, _ = batch_of(network, 3, seed + steps)
    kept = {name: w.copy() for name, w in dense(params).items()}
    scores = reference(Ops(kept, train=False), torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 0))))
    check_close(network.logits(params, x), scores.detach().numpy().T, "the scores")
    assert all(np.array_equal(w, kept[name]) for name, w in dense(params).items()), "evaluation changed something"


def check_flow(network: Network, reference: Reference, *, seed: int = 0, density: float = 0.6) -> None:
    """R against torch's, its gradients likewise; and without torch, that all of R passes every layer, and that R is
    linear in each weight, so that its slopes are differences.
    """
    params = drawn(network, seed, density, magnitudes=True)
    total, grads = network.flow(params)
    own = evaluated(grads)
    weights = [name for name, spec in network.specs().items() if spec.prunable]
    assert own.keys() == set(weights)
    rng = np.random.default_rng(seed)
    for name in weights:
        w = dense(params)[name]
        assert abs((w * own[name]).sum() - total) <= CLOSE * total, f"not all of R passes {name}"
        at = tuple(int(rng.integers(0, n)) for n in w.shape)
        moved = w.copy()
        moved[at] += 1
        slope = network.flow({**params, name: moved})[0] - total
        assert abs(slope - own[name][at]) <= CLOSE * max(total, abs(slope)), f"R has another slope along {name}"
    torch = pytest.importorskip("torch")
    ops = Ops(dense(params), linear=True)
    theirs = reference(ops, torch.ones((1, *network.input_shape), dtype=torch.float64)).sum()
    theirs.backward()
    check_close(np.array(total), theirs.detach().numpy(), "R")
    for name, g in ops.grads().items():
        check_close(own[name], g, f"the slope of R along {name}")


def check_start(network: Network, *, supports: Collection[str] = ()) -> None:
    """Names, shapes and types of what a run begins with; the same draws again for the same seed; sparse ones too."""
    specs = network.specs()
    rng = np.random.default_rng(0)
    given = {name: Support.from_mask(rng.random(specs[name].shape) < 0.5) for name in supports}
    for dtype in (np.float32, np.float64):
        params, again = network.init(3, dtype, given), network.init(3, dtype, given)
        assert params.keys() == specs.keys()
        for name, w in params.items():
            assert w.shape == specs[name].shape
            assert values_of(w).dtype == dtype
            assert values_of(w).flags.c_contiguous
            assert np.array_equal(values_of(w), values_of(again[name]))
            assert isinstance(w, SparseWeight) == (name in given)
            assert np.isfinite(values_of(w)).all()
            if specs[name].prunable:
                assert np.ptp(values_of(w)) > 0
                assert not np.array_equal(values_of(w), values_of(network.init(4, dtype, given)[name]))
        for b in network.buffers(dtype).values():
            assert b.dtype in (dtype, np.int64)
    he = getattr(network, "initial", "torch") == "he"
    for name, spec in specs.items():
        if spec.kind in ("linear", "bias") or (spec.kind == "conv" and not he):
            # PyTorch's default: +- 1 / sqrt(n) for n inputs of a unit, which the weight tells. That all of N draws lie
            # below 1 - 10 / N of the bound has a probability below exp(-10).
            own, inputs = np.abs(values_of(params[name])), np.prod(specs[f"{spec.layer}.weight"].shape[1:])
            assert 1 - 10 / own.size < own.max() * inputs**0.5 <= 1, name
    first = [name for name, spec in specs.items() if spec.prunable and not spec.input_gradient]
    assert len(first) == 1, "one map reads the input"
    assert specs[network.output[0]].prunable
    assert specs[network.output[1]].kind == "bias"
    assert network.describe()
    assert hash(network) == hash(network)


def check_learns(network: Network, *, batch: int = 16, steps: int = 12, lr: float = 0.1, density: float = 0.5) -> None:
    """Steps of SGD in float32 on one batch of noise lower its loss by a tenth at least."""
    specs = network.specs()
    rng = np.random.default_rng(1)
    supports = {n: Support.from_mask(rng.random(s.shape) < density) for n, s in specs.items() if s.prunable}
    params = network.init(0, np.float32, supports if density < 1 else None)
    buffers: dict[str, Any] = network.buffers(np.float32)
    x, labels = batch_of(network, batch, 2)
    x = x.astype(np.float32)
    losses = []
    for _ in range(steps):
        loss, grads, buffers = network.loss_and_grads({**params, **buffers}, x, labels)
        losses.append(loss)
        for name, w in params.items():
            g = grads[name]
            stored = g if isinstance(g, np.ndarray) else g.on(support_of(w)).reshape(values_of(w).shape)
            assert stored.dtype == np.float32, name
            values_of(w)[...] -= lr * stored
        assert all(b.dtype in (np.float32, np.int64) for b in buffers.values())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0], losses
