"""Residual networks: torch's gradients and statistics, counts, names, flow, and what they refuse."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import batch_of, check_against_torch, check_learns, check_start, drawn, evaluated
from resnet_cases import check_residual_flow, resnet

from refimpl import kernels
from refimpl.layers.padded import Padded, image_of
from refimpl.methods.iss import unit_groups
from refimpl.models.conv_units import Conv, ConvUnit, MaxPool, Pass, draw
from refimpl.models.resnet import ResNet, Skip
from refimpl.weights import Grads, SparseWeight, Support, as_sparse, support_of, values_of


@pytest.fixture(autouse=True)
def _definition() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    count = kernels.threads.get()
    kernels.threads.set_count(1)
    with kernels.use("spec"):
        yield
    kernels.threads.set_count(count)


SMALL = {
    "cifar, A": ResNet(8, classes=4, width=4, input_shape=(3, 9, 8)),
    "cifar, B": ResNet(14, classes=4, width=3, input_shape=(2, 8, 8), shortcut="B", label_smoothing=0.1),
    "basic, B": ResNet(18, classes=3, width=2, input_shape=(3, 32, 32)),
    "bottleneck, A": ResNet(50, classes=3, width=2, input_shape=(1, 40, 33), shortcut="A"),
    "bottleneck, B": ResNet(50, classes=3, width=2, input_shape=(3, 33, 40)),
}


# --- what it computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_resnet20_of_torch(shortcut: Any, density: float) -> None:
    network = ResNet(20, shortcut=shortcut)
    check_against_torch(network, resnet(network), batch=2, density=density, steps=1)


@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
def test_small_of_torch(network: ResNet) -> None:
    """Every second weight is sparse."""
    check_against_torch(network, resnet(network), batch=3, density=0.3)


@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
def test_flow(network: ResNet) -> None:
    check_residual_flow(network, resnet(network))


def test_flow_by_hand() -> None:
    """1x1 images: a 3x3 kernel sees them with its middle alone, so R is a product of small matrices and sums."""
    network = ResNet(8, classes=2, width=2, input_shape=(1, 1, 1), shortcut="A")
    params = drawn(network, 5, 0.5, magnitudes=True)

    def middle(name: str) -> np.ndarray:
        return as_sparse(params[f"{name}.weight"]).dense()[:, :, 1, 1]

    h = middle("conv1") @ np.ones(1)
    for k in (1, 2, 3):
        beside = np.pad(h, len(h) // 2) if k > 1 else h
        h = middle(f"layer{k}.0.conv2") @ middle(f"layer{k}.0.conv1") @ h + beside
    total = (as_sparse(params["fc.weight"]).dense() @ h).sum()
    assert math.isclose(network.flow(params)[0], total, rel_tol=1e-12)


@settings(max_examples=4, derandomize=True)
@given(st.sampled_from(list(SMALL)[:3]), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 0.4]))
def test_slope_along_a_direction(name: str, seed: int, density: float) -> None:
    """Without torch: the loss along a random direction of all parameters, by differences extrapolated to step 0."""
    network = SMALL[name]
    params = drawn(network, seed, density)
    x, labels = batch_of(network, 3, seed)
    _, grads, _ = network.loss_and_grads(params, x, labels)
    rng = np.random.default_rng(seed)
    along = {key: rng.standard_normal(values_of(params[key]).shape) for key in network.specs()}
    expected = 0.0
    for key, v in along.items():
        g = grads[key]
        stored = g if isinstance(g, np.ndarray) else g.on(support_of(params[key]))
        expected += float((stored.reshape(-1) * v.reshape(-1)).sum())

    def loss(step: float) -> float:
        moved = dict(params)
        for key, v in along.items():
            w, values = params[key], values_of(params[key]) + step * v
            moved[key] = SparseWeight(w.support, values) if isinstance(w, SparseWeight) else values
        return network.loss_and_grads(moved, x, labels)[0]

    # The error of a difference over a step of h is of order h^2 (but for rectifiers that turn within the step, of order
    # h) plus the loss's rounding, 1e-15, over h.
    h = 1e-7
    slope = (loss(h) - loss(-h)) / (2 * h)
    assert abs(slope - expected) <= 1e-5 * max(1.0, abs(expected))


# --- what it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "tensors", "weights", "gigaflops"),
    [
        (ResNet(20), 20, 268_336, None),
        (ResNet(20, shortcut="B"), 22, 270_896, 0.08222),
        (ResNet(32), 32, 461_872, None),
        (ResNet(50), 54, 25_502_912, 8.2121),
    ],
    ids=["ResNet-20", "ResNet-20, B", "ResNet-32", "ResNet-50"],
)
def test_counts(network: ResNet, tensors: int, weights: int, gigaflops: float | None) -> None:
    """AC/DC's authors count two operations for each product, two for each number that is normalised, one for each that
    is rectified, and the taps of pools; biases too.
    """
    specs = network.specs()
    prunable = [spec for spec in specs.values() if spec.prunable]
    assert (len(prunable), sum(spec.size for spec in prunable)) == (tensors, weights)
    if gigaflops is None:
        return
    operations = sum(2 * spec.size * spec.columns_per_sample for spec in prunable)
    for name, spec in specs.items():
        if spec.kind == "norm" and name.endswith(".weight"):
            numbers = spec.size * spec.columns_per_sample
            operations += 2 * numbers + (0 if "downsample" in name else numbers)
    if network.form == "imagenet":
        operations += 9 * 64 * 56 * 56 + 2048 * 7 * 7
    operations += network.classes
    assert f"{operations / 1e9:.4g}" == f"{gigaflops:.4g}"
    assert network.form == "cifar" or f"{operations / 1e9:.4f}" == f"{gigaflops:.4f}"


def test_names_of_torchvision() -> None:
    network = ResNet(50)
    specs, buffers = list(network.specs()), list(network.buffers(np.float32))
    assert specs[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert specs[3:15] == [
        *(f"layer1.0.{kind}{k}.{part}" for k in (1, 2, 3) for kind, part in
          (("conv", "weight"), ("bn", "weight"), ("bn", "bias"))),
        "layer1.0.downsample.0.weight", "layer1.0.downsample.1.weight", "layer1.0.downsample.1.bias",
    ]  # fmt: skip
    assert specs[-2:] == ["fc.weight", "fc.bias"]
    assert network.output == ("fc.weight", "fc.bias")
    assert len(specs) == 161
    assert len(buffers) == 3 * 53
    assert buffers[:3] == ["bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"]
    assert "layer4.0.downsample.1.running_var" in buffers
    assert network.specs()["layer3.5.conv3.weight"].shape == (1024, 256, 1, 1)
    assert network.specs()["layer4.0.conv2.weight"].columns_per_sample == 7 * 7
    assert network.specs()["layer4.0.conv1.weight"].columns_per_sample == 14 * 14
    small = ResNet(20).specs()
    assert "layer2.0.downsample.0.weight" not in small
    assert "layer2.0.downsample.0.weight" in ResNet(20, shortcut="B").specs()
    assert small["layer3.0.conv1.weight"].columns_per_sample == 8 * 8
    assert small["layer3.2.conv2.weight"].source == "layer3.2.conv1"
    assert small["layer3.2.conv1.weight"].source == ""


def test_hidden_units() -> None:
    """Units are the channels inside a block, which one convolution makes and one reads; sums belong to no layer."""
    groups = unit_groups(ResNet(50).specs())
    assert len(groups) == 2 * 16
    assert (groups["layer1.0.conv1"].units, groups["layer1.0.conv1"].columns) == (64, {"layer1.0.conv2.weight": 9})
    assert groups["layer1.0.conv2"].columns == {"layer1.0.conv3.weight": 1}
    assert unit_groups(ResNet(20).specs()).keys() == {f"layer{k}.{j}.conv1" for k in (1, 2, 3) for j in (0, 1, 2)}


@pytest.mark.parametrize("initial", ["he", "torch"])
def test_start(initial: Any) -> None:
    network = ResNet(8, width=4, initial=initial, shortcut="B")
    check_start(network, supports=["layer1.0.conv2.weight", "fc.weight", "layer3.0.downsample.0.weight"])


@pytest.mark.parametrize("sparse", [False, True])
def test_initial_distributions(sparse: bool) -> None:
    """Variances within five of their own deviations; of fans of the dense map, whatever the sparsity."""
    specs = ResNet(14, width=16).specs()
    name = "layer2.1.conv1.weight"
    spec = specs[name]
    support = Support.from_mask(np.random.default_rng(0).random(spec.shape) < 0.5) if sparse else None
    supports = {name: support} if support is not None else {}
    he = values_of(draw(specs.values(), 0, np.float64, supports, "he")[name]).reshape(-1)
    uniform = values_of(draw(specs.values(), 0, np.float64, supports, "torch")[name]).reshape(-1)
    assert he.size == uniform.size == (support.nnz if support is not None else spec.size)
    assert abs(he.var() / (2 / (32 * 9)) - 1) < 5 * math.sqrt(2 / he.size)
    bound = (32 * 9) ** -0.5
    assert np.abs(uniform).max() <= bound
    assert abs(uniform.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / uniform.size)
    params = ResNet(14).init(0, np.float32)
    assert all((values_of(params[n]) == n.endswith("weight")).all() for n, s in specs.items() if s.kind == "norm")
    assert np.abs(values_of(params["fc.bias"])).max() <= 64**-0.5
    with pytest.raises(ValueError, match="'he' or 'torch'"):
        draw(specs.values(), 0, np.float32, None, "xavier")  # type: ignore[arg-type]


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_learns(density: float) -> None:
    check_learns(ResNet(8, classes=4, width=8, input_shape=(3, 8, 8)), batch=16, steps=15, density=density)


def test_resnet50_takes_a_step() -> None:
    """A sparse step on images of full size: the memory is that of activations and of their gradients, which the
    gradients of weights keep until they are evaluated.
    """
    network = ResNet(50, width=8, classes=10)
    rng = np.random.default_rng(0)
    supports = {n: Support.from_mask(rng.random(s.shape) < 0.1) for n, s in network.specs().items() if s.prunable}
    params = network.init(0, np.float32, supports) | network.buffers(np.float32)
    x, labels = batch_of(network, 2, 0)
    tracemalloc.start()
    loss, grads, _ = network.loss_and_grads(params, x.astype(np.float32), labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(loss)
    assert grads.keys() == network.specs().keys()
    norms = [spec for n, spec in network.specs().items() if spec.kind == "norm" and n.endswith("weight")]
    activations = 4 * 2 * sum(spec.size * spec.columns_per_sample for spec in norms)
    assert peak < 8 * activations


def test_evaluation_changes_nothing_and_training_only_what_it_returns() -> None:
    network = SMALL["cifar, B"]
    params = drawn(network, 0)
    before = {name: values_of(w).copy() for name, w in params.items()}
    x, labels = batch_of(network, 3, 0)
    image = x.copy()
    network.logits(params, x)
    _, _, buffers = network.loss_and_grads(params, x, labels)
    assert all(np.array_equal(values_of(w), before[name]) for name, w in params.items())
    assert np.array_equal(x, image)
    assert buffers.keys() == network.buffers(np.float64).keys()
    assert all(not np.array_equal(b, before[name]) for name, b in buffers.items())
    again = network.loss_and_grads(params, x, labels)[2]
    assert all(np.array_equal(b, again[name]) for name, b in buffers.items())


def test_compiled_kernels_of_torch() -> None:
    """The same with compiled kernels, which read images where they lie inside their margins."""
    network = ResNet(8, classes=3, width=4, input_shape=(3, 4, 4), shortcut="B")
    with kernels.use("cpu"):
        check_against_torch(network, resnet(network), batch=4, density=0.4, steps=1)


# --- its parts ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 5), st.sampled_from([1, 2]), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_skip_is_linear_and_backward_its_adjoint(inputs: int, more: int, stride: int, size: int, seed: int) -> None:
    skip = Skip(inputs, inputs + more, stride)
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, (inputs, size, size + 1, 2)).astype(float)  # exact sums
    padded = Padded.empty(x.shape, float, 1)
    padded.image[...] = x
    y, cache = skip.forward({}, x, Pass("train"))
    assert np.array_equal(image_of(skip.forward({}, padded, Pass("train"))[0]), image_of(y))
    assert y.shape == (inputs + more, -(-size // stride), -(-(size + 1) // stride), 2)
    dy = rng.integers(-9, 10, y.shape).astype(float)
    dx = skip.backward(dy, cache, {})
    assert dx.shape == x.shape
    assert (image_of(y) * dy).sum() == (x * image_of(dx)).sum()


@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
def test_gradient_margin(kernel: int, stride: int, padding: int, height: int, width: int) -> None:
    """The least that has all outputs whose windows would see a pixel, were there windows beyond the image."""
    if min(height, width) + 2 * padding < kernel:
        return
    conv = Conv("c", (1, 1, kernel, kernel), (height, width), stride, padding)
    beyond = [0]
    for pixels, outputs in zip(conv.image, conv.output, strict=True):
        for pixel in range(pixels):
            seen = [(pixel + padding - tap) // stride for tap in range(kernel) if (pixel + padding - tap) % stride == 0]
            beyond += [max(-at, at - outputs + 1) for at in seen]
    assert conv.gradient_margin == max(beyond)
    assert Conv("c", (1, 1, kernel, kernel), (height, width), stride, padding, first=True).gradient_margin == 0


def test_unit_keeps_the_order_of_its_state_dict() -> None:
    unit = ConvUnit.of(Conv("c", (4, 2, 3, 3), (5, 6), stride=2, padding=1, bias=True), "n")
    assert [spec.name for spec in unit.specs()] == ["c.weight", "c.bias", "n.weight", "n.bias"]
    assert unit.output == (3, 3)
    assert [spec.columns_per_sample for spec in unit.specs()] == [9, 9, 9, 9]
    grads: Grads = {}
    params = draw(unit.specs(), 0, np.float64) | unit.buffers(np.float64)
    y, cache = unit.forward(params, np.random.default_rng(0).standard_normal((2, 5, 6, 3)), Pass("train"), margin=1)
    assert isinstance(y, Padded)
    assert y.shape == (4, 3, 3, 3)
    assert not y.whole[:, 0].any()
    unit.backward(np.ones((4, 3, 3, 3)), cache, grads)
    assert evaluated(grads).keys() == {"c.weight", "c.bias", "n.weight", "n.bias"}


def test_pool_with_a_margin() -> None:
    pool = MaxPool((5, 4), 3, stride=2, around=1)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 3))
    (plain, cache), (padded, other) = (pool.forward({}, x, Pass("train"), margin=m) for m in (0, 1))
    assert isinstance(padded, Padded)
    assert padded.shape == image_of(plain).shape == (2, *pool.output, 3)
    assert np.array_equal(padded.image, image_of(plain))
    assert np.array_equal(pool.backward(plain, cache, {}), pool.backward(padded, other, {}))
    padded.image[...] = 0
    assert not padded.whole.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 21}, "6 n . 2 layers"),
        ({"depth": 2}, "6 n . 2 layers"),
        ({"depth": 20, "form": "imagenet"}, r"one of \[18, 34, 50"),
        ({"form": "svhn"}, "'cifar' or 'imagenet'"),
        ({"shortcut": "C"}, "'A' .* or 'B'"),
        ({"width": -1}, "channels of the first stage"),
        ({"classes": 1.5}, "whole number above 0"),
        ({"input_shape": (32, 32)}, "channels, height, width"),
        ({"label_smoothing": 2.0}, "from 0 to 1"),
        ({"initial": "zero"}, "'he', 'torch'"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ResNet(**options)


def test_refuses_images_of_another_size() -> None:
    network = SMALL["cifar, A"]
    params = drawn(network, 0)
    for shape in ((3, 9, 9, 2), (9, 8, 2), (3, 9, 8, 0)):
        with pytest.raises(ValueError, match=r"takes \(channels, height, width, batch\) = \(3, 9, 8, n\)"):
            network.loss_and_grads(params, np.zeros(shape), np.zeros(shape[-1], int))
    with pytest.raises(ValueError, match="target"):
        network.loss_and_grads(params, np.zeros((3, 9, 8, 2)), np.array([0, 4]))
