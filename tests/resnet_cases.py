"""Residual networks once more in torch's functions, as they are drawn in the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from network_cases import CLOSE, Ops, Reference, check_close, dense, drawn, evaluated

from refimpl.models.resnet import ResNet
from refimpl.models.wide_resnet import WideResNet
from refimpl.rng import Draws


def _shortcut(o: Ops, name: str, x: Any, like: Any, stride: int) -> Any:
    if f"{name}.downsample.0.weight" in o.p:
        return o.norm(f"{name}.downsample.1", o.conv(f"{name}.downsample.0", x, stride=stride))
    more = like.shape[1] - x.shape[1]
    return o.F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more // 2, more - more // 2))


def _basic(o: Ops, name: str, x: Any, stride: int) -> Any:
    h = o.relu(o.norm(f"{name}.bn1", o.conv(f"{name}.conv1", x, stride=stride, padding=1)))
    h = o.norm(f"{name}.bn2", o.conv(f"{name}.conv2", h, padding=1))
    return o.relu(h + _shortcut(o, name, x, h, stride))


def _bottleneck(o: Ops, name: str, x: Any, stride: int) -> Any:
    h = o.relu(o.norm(f"{name}.bn1", o.conv(f"{name}.conv1", x)))
    h = o.relu(o.norm(f"{name}.bn2", o.conv(f"{name}.conv2", h, stride=stride, padding=1)))
    h = o.norm(f"{name}.bn3", o.conv(f"{name}.conv3", h))
    return o.relu(h + _shortcut(o, name, x, h, stride))


def resnet(network: ResNet) -> Reference:
    """Return the network as a function of torch's; how many blocks there are follows from the names."""
    cifar, deep = network.form == "cifar", network.form == "imagenet" and network.depth >= 50
    block = _bottleneck if deep else _basic

    def scores(o: Ops, x: Any) -> Any:
        geometry = {"padding": 1} if cifar else {"stride": 2, "padding": 3}
        x = o.relu(o.norm("bn1", o.conv("conv1", x, **geometry)))
        if not cifar and o.only_linear:
            x = o.F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        elif not cifar:
            x = o.F.max_pool2d(x, 3, stride=2, padding=1)
        for name in _blocks(o):
            first = name.endswith(".0") and name != "layer1.0"
            x = block(o, name, x, 2 if first else 1)
        return o.dense("fc", x.mean(dim=(2, 3)))

    return scores


def wide(network: WideResNet, draws: Draws | None = None) -> Reference:
    """Return the network as a function of torch's, with the dropout of a step if its draws are given."""
    acdc = network.form == "acdc"

    def drop(o: Ops, name: str, h: Any) -> Any:
        if draws is None or not o.train:
            return h
        batch, *image = h.shape
        kept = draws(f"dropout/{name}").random((*image, batch), dtype=np.float32) >= np.float32(network.dropout)
        return h * o.torch.tensor(np.moveaxis(kept, -1, 0).copy()) / (1 - network.dropout)

    def scores(o: Ops, x: Any) -> Any:
        x = o.conv("conv1", x, padding=1)
        for name in _blocks(o):
            stride = 2 if name in ("layer2.0", "layer3.0") else 1
            n = o.relu(o.norm(f"{name}.bn1", x))
            h = o.conv(f"{name}.conv1", n, stride=1 if acdc else stride, padding=1)
            h = drop(o, name, h) if acdc else h
            h = o.relu(o.norm(f"{name}.bn2", h))
            h = h if acdc else drop(o, name, h)
            h = o.conv(f"{name}.conv2", h, stride=stride if acdc else 1, padding=1)
            if f"{name}.shortcut.0.weight" in o.p:
                x = o.conv(f"{name}.shortcut.0", x if acdc else n, stride=stride)
            x = x + h
        last = [o.p[f"bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        if o.train:
            o.p["bn1.num_batches_tracked"] += 1
        if not o.only_linear:
            x = o.F.batch_norm(x, *last, training=o.train, momentum=0.9 if acdc else 0.1)
        return o.dense("linear", o.relu(x).mean(dim=(2, 3)))

    return scores


def _blocks(o: Ops) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in o.p if name.startswith("layer")))


def check_residual_flow(network: ResNet | WideResNet, reference: Reference, *, seed: int = 0) -> None:
    """R is linear in each weight, with the slope that is returned; and torch's R and slopes are the same.

    Shortcuts pass layers by, so that R is not the sum of weights times slopes of each layer, as it is in a chain; that
    sum is no greater than R, and of the layers that nothing passes by it is R.
    """
    params = drawn(network, seed, 0.6, magnitudes=True)
    total, grads = network.flow(params)
    own, weights = evaluated(grads), [name for name, spec in network.specs().items() if spec.prunable]
    assert own.keys() == set(weights)
    rng = np.random.default_rng(seed)
    for name in ("conv1.weight", *rng.choice(weights[1:-1], 5, replace=False), network.output[0]):
        w = dense(params)[name]
        through = float((w * own[name]).sum())
        assert through <= total * (1 + CLOSE), f"more than R passes {name}"
        if name in ("conv1.weight", network.output[0]):
            assert abs(through - total) <= CLOSE * total, f"not all of R passes {name}"
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
