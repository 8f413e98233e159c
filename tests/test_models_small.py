"""The small networks: LeNet-5, a small convolutional net and an MLP with batch norm, each against torch in every
gradient and statistic; their flow, counts and names; and mistakes that these see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import Ops, batch_of, check_against_torch, check_flow, check_learns, check_start, drawn

from refimpl import kernels
from refimpl.kernels import threads
from refimpl.layers import batch_norm, pooling, relu
from refimpl.methods.iss import unit_groups
from refimpl.models import lenet as lenet_module
from refimpl.models.classifier import Network
from refimpl.models.lenet import LeNet5
from refimpl.models.norm_mlp import NormMLP
from refimpl.models.small_conv import SmallConv
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, add_to, values_of

SMALL = SmallConv((2, 9, 7), widths=(4, 6), strides=(1, 2), classes=3)
MLP = NormMLP((6, 5, 4, 3))


@pytest.fixture(autouse=True)
def _spec() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    before = threads.get()
    threads.set_count(1)
    with kernels.use("spec"):
        yield
    threads.set_count(before)


def torch_lenet(o: Ops, x: Any) -> Any:
    """Rectifiers before the pools, as they are written in torch; the number of classes follows from fc2."""
    for name in ("conv1", "conv2"):
        x = o.max_pool(o.relu(o.conv(name, x)))
    return o.dense("fc2", o.relu(o.dense("fc1", x.flatten(1))))


def torch_small_conv(o: Ops, x: Any, strides: tuple[int, ...] = SMALL.strides) -> Any:
    for k, stride in enumerate(strides, 1):
        x = o.relu(o.norm(f"bn{k}", o.conv(f"conv{k}", x, stride=stride, padding=1)))
    return o.dense("fc", x.mean((2, 3)))


def torch_norm_mlp(o: Ops, x: Any) -> Any:
    last = sum(name.startswith("layers.") and name.endswith(".weight") for name in o.p) - 1
    for k in range(last):
        x = o.relu(o.norm(f"norms.{k}", o.dense(f"layers.{k}", x)))
    return o.dense(f"layers.{last}", x)


NETWORKS: list[tuple[Network, Any]] = [
    (LeNet5(classes=4), torch_lenet),
    (SMALL, torch_small_conv),
    (MLP, torch_norm_mlp),
]


# --- torch


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_lenet_of_torch(density: float) -> None:
    check_against_torch(LeNet5(), torch_lenet, batch=3, density=density)
    check_against_torch(LeNet5(classes=3, label_smoothing=0.2), torch_lenet, batch=1, density=density, steps=1)


@settings(max_examples=12)
@given(
    image=st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9)),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    batch=st.integers(3, 6), density=st.sampled_from([1.0, 0.5]), seed=st.integers(0, 999),
)  # fmt: skip
def test_small_conv_of_torch(image: tuple[int, ...], widths: list[int], batch: int, density: float, seed: int) -> None:
    strides = tuple(1 + (k + seed) % 2 for k in range(len(widths)))
    network = SmallConv(image, tuple(widths), strides, classes=3, label_smoothing=0.1 * (seed % 2))
    check_against_torch(network, lambda o, x: torch_small_conv(o, x, strides), batch=batch, density=density, seed=seed)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5), batch=st.integers(4, 9),
    density=st.sampled_from([1.0, 0.6]), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 999),
)  # fmt: skip
def test_norm_mlp_of_torch(sizes: list[int], batch: int, density: float, smoothing: float, seed: int) -> None:
    network = NormMLP(tuple(sizes), label_smoothing=smoothing)
    check_against_torch(network, torch_norm_mlp, batch=batch, density=density, seed=seed)


@pytest.mark.parametrize(("network", "reference"), NETWORKS[1:])
def test_compiled_kernels(network: Network, reference: Any) -> None:
    with kernels.use("cpu"):
        check_against_torch(network, reference, batch=4, density=0.5)


# --- without torch: every gradient as that of one layer, by differences, dense and sparse


def make_loss(rng: np.random.Generator, *, network: Network, batch: int) -> Layer:
    """Make a loss whose units stay on their side of the kink: small scales, large shifts."""
    x, labels = rng.standard_normal((*network.input_shape, batch)), rng.integers(0, 2, batch)
    params: Params = {}
    for name, spec in network.specs().items():
        params[name] = rng.uniform(-0.5, 0.5, spec.shape)
        if spec.kind == "norm":
            shifts = rng.choice([-1, 1], spec.shape) * rng.uniform(2, 3, spec.shape)
            params[name] = rng.uniform(0.1, 0.3, spec.shape) if name.endswith("weight") else shifts

    def run(p: Params) -> Any:
        dtype = values_of(p[network.output[1]]).dtype
        return network.loss_and_grads({**p, **network.buffers(dtype)}, x.astype(dtype), labels)

    def forward(p: Params) -> tuple[float, Params]:
        return run(p)[0], p

    def backward(dy: float, cache: Params, grads: Grads, input_gradient: bool) -> None:
        for name, gradient in run(cache)[1].items():
            add_to(grads, name, gradient)

    sparse = tuple(name for name, spec in network.specs().items() if spec.prunable)
    return Layer(forward, backward, params, sparse=sparse)


def test_every_gradient() -> None:
    networks = [NormMLP((3, 4, 2)), NormMLP((2, 3, 3, 2)), SmallConv((1, 3, 3), (2, 3), (1, 2), classes=2)]
    check_layer(make_loss, {"network": networks, "batch": [3, 4]}, max_examples=8)


# --- flow, starts, learning


@pytest.mark.parametrize(("network", "reference"), NETWORKS)
def test_flow(network: Network, reference: Any) -> None:
    check_flow(network, reference)


@pytest.mark.parametrize("network", [LeNet5(), SMALL, NormMLP((20, 50, 7))])
def test_start(network: Network) -> None:
    weights = [name for name, spec in network.specs().items() if spec.prunable]
    check_start(network, supports=weights[::2])


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize(
    ("network", "batch", "lr"),
    [
        (LeNet5(classes=5), 4, 0.1),
        (SmallConv((1, 8, 8), (8, 16), (1, 2), 5), 16, 0.3),
        (NormMLP((10, 20, 20, 5)), 16, 0.3),
    ],
)
def test_learns(network: Network, batch: int, lr: float, density: float) -> None:
    check_learns(network, batch=batch, lr=lr, density=density)


@pytest.mark.parametrize(("network", "_"), NETWORKS)
def test_nothing_that_was_given_is_changed(network: Network, _: Any) -> None:
    """Neither parameters nor buffers, images and labels; and a second step does not touch what the first returned."""
    params = drawn(network, 0, 0.5)
    x, labels = batch_of(network, 4, 0)
    before = [values_of(w).copy() for w in params.values()], x.copy(), labels.copy()
    first = network.loss_and_grads(params, x, labels)
    kept = [b.copy() for b in first[2].values()]
    second = network.loss_and_grads(params, x, labels)
    assert first[0] == second[0]
    assert all(map(np.array_equal, kept, second[2].values()))
    for name, g in first[1].items():
        a, b = (h if isinstance(h, np.ndarray) else h.dense() for h in (g, second[1][name]))
        assert np.array_equal(a, b), name
    assert all(map(np.array_equal, before[0], map(values_of, params.values())))
    assert np.array_equal(before[1], x)
    assert np.array_equal(before[2], labels)


# --- counts and names


def test_counts_of_lenet() -> None:
    """As pruning papers state them."""
    specs = LeNet5().specs()
    assert sum(spec.size for spec in specs.values() if spec.prunable) == 430_500
    assert sum(spec.size for spec in specs.values()) == 431_080
    columns = {name: spec.columns_per_sample for name, spec in specs.items() if spec.prunable}
    assert columns == {"conv1.weight": 24 * 24, "conv2.weight": 8 * 8, "fc1.weight": 1, "fc2.weight": 1}
    assert list(specs) == [
        f"{layer}.{part}" for layer in ("conv1", "conv2", "fc1", "fc2") for part in ("weight", "bias")
    ]
    assert LeNet5().buffers(np.float32) == {}
    assert LeNet5().initial == "torch"


def test_counts_of_the_small_net() -> None:
    """As its documentation states them."""
    weights = [spec for spec in SmallConv().specs().values() if spec.prunable]
    assert sum(spec.size for spec in weights) == 56_224
    assert [spec.columns_per_sample for spec in weights] == [14 * 14, 7 * 7, 7 * 7, 1]
    assert round(sum(spec.columns_per_sample * spec.size for spec in weights) / 1e6, 1) == 2.8


def test_names_of_norm_mlp() -> None:
    network = NormMLP((5, 4, 3))
    assert list(network.specs()) == [
        "layers.0.weight", "norms.0.weight", "norms.0.bias", "layers.1.weight", "layers.1.bias",
    ]  # fmt: skip
    assert list(network.buffers(float)) == [
        f"norms.0.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")
    ]


# --- planted mistakes


def wrong(network: Network, reference: Any, match: str = "is off by") -> None:
    with pytest.raises(AssertionError, match=match):
        check_against_torch(network, reference, batch=6, density=0.6, steps=2)


def test_catches_another_order_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels before channels, as programs with channels last flatten them."""
    forward = lenet_module.Linear.forward

    def planted(self: Any, params: Any, x: np.ndarray, run: Any, **options: Any) -> Any:
        return forward(self, params, np.moveaxis(x, 0, 2).reshape(x.shape) if x.ndim == 4 else x, run, **options)

    monkeypatch.setattr(lenet_module.Linear, "forward", planted)
    wrong(LeNet5(), torch_lenet, "the loss is off by")


def test_catches_means_for_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(x: np.ndarray, kernel: int, *, margin: int = 0, **sizes: Any) -> Any:
        return pooling.average_forward(x, kernel, **sizes)

    monkeypatch.setattr(pooling, "max_forward", planted)
    monkeypatch.setattr(pooling, "max_backward", lambda dy, cache, **_: pooling.average_backward(dy, cache))
    wrong(LeNet5(), torch_lenet, "the loss is off by")


def test_catches_a_gradient_that_is_not_rectified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu, "backward", lambda dy, cache, in_place=False: (dy, None))
    wrong(LeNet5(), torch_lenet, "the gradient of .* is off by")


def test_catches_biases_in_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Any, params: Any, x: np.ndarray, run: Any, **options: Any) -> Any:
        return forward(self, params, x, lenet_module.Pass("train"), **options)

    forward = lenet_module.Linear.forward
    monkeypatch.setattr(lenet_module.Linear, "forward", planted)
    with pytest.raises(AssertionError):
        check_flow(LeNet5(), torch_lenet)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": False}, "the loss is off by"),
        ({"momentum": 0.9}, "running_mean is off by"),
        ({"eps": 1e-3}, "the loss is off by"),
        ({"rectify": False}, "the loss is off by"),
    ],
)
@pytest.mark.parametrize(("network", "reference"), NETWORKS[1:])
def test_catches_a_batch_norm_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, network: Network, reference: Any, options: dict[str, Any], match: str
) -> None:
    forward = batch_norm.forward

    def planted(params: Any, name: str, x: Any, **given: Any) -> Any:
        if options.get("train") is False and given["train"]:
            return (*forward(params, name, x, **{**given, "train": False})[:2], forward(params, name, x, **given)[2])
        return forward(params, name, x, **{**given, **options})

    monkeypatch.setattr(batch_norm, "forward", planted)
    wrong(network, reference, match)


def test_catches_statistics_that_move_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = batch_norm.forward

    def planted(params: Any, name: str, x: Any, *, train: bool, **given: Any) -> Any:
        y, cache, buffers = forward(params, name, x, train=True, **given)
        params.update(buffers)
        return y, cache, {}

    for network, reference in NETWORKS[1:]:
        with monkeypatch.context() as patch:
            patch.setattr(batch_norm, "forward", planted)
            with pytest.raises(AssertionError):
                check_against_torch(network, reference, batch=6, steps=0)


def test_catches_a_variance_that_is_not_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = batch_norm.forward

    def planted(params: Any, name: str, x: Any, **given: Any) -> Any:
        y, cache, buffers = forward(params, name, x, **given)
        if buffers:
            of = batch_norm.names(name)
            n = (x.image if hasattr(x, "image") else x)[0].size
            batch = (buffers[of.running_var] - 0.9 * params[of.running_var]) * (n - 1) / n
            buffers[of.running_var] = 0.9 * params[of.running_var] + batch
        return y, cache, buffers

    monkeypatch.setattr(batch_norm, "forward", planted)
    for network, reference in NETWORKS[1:]:
        wrong(network, reference, "running_var is off by")


def test_catches_a_stride_in_another_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of all parameters are the same."""
    wrong(SmallConv(SMALL.input_shape, SMALL.widths, SMALL.strides[::-1], SMALL.classes), torch_small_conv)


def test_catches_the_sum_for_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pooling.global_average_forward

    def planted(x: np.ndarray) -> Any:
        y, shape = forward(x)
        return y * (shape[1] * shape[2]), shape

    monkeypatch.setattr(pooling, "global_average_forward", planted)
    wrong(SMALL, torch_small_conv, "the loss is off by")


# --- what they do not take


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LeNet5(classes=0), "classes is 0"),
        (lambda: LeNet5(label_smoothing=-0.1), "the label smoothing is -0.1"),
        (lambda: SmallConv(label_smoothing=2), "the label smoothing is 2"),
        (lambda: SmallConv(widths=(8,)), "there are 1 widths and 3 strides"),
        (lambda: SmallConv(widths=(), strides=()), "at least one unit"),
        (lambda: SmallConv(widths=(8, 0, 8)), r"widths is \(8, 0, 8\)"),
        (lambda: SmallConv((28, 28)), r"the shape of an image is \(28, 28\)"),
        (lambda: LeNet5(initial="normal"), "the initial distribution is 'normal'"),  # type: ignore[arg-type]
        (lambda: NormMLP((3,)), "give two or more whole numbers above 0"),
        (lambda: NormMLP((3, 2), label_smoothing=1.1), "the label smoothing is 1.1"),
    ],
)
def test_options_that_are_none(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("network", "_"), NETWORKS)
def test_operands_that_do_not_fit(network: Network, _: Any) -> None:
    params = drawn(network, 0)
    x, labels = batch_of(network, 4, 0)
    for bad, labels_of, message in [
        (x[1:] if len(x) > 1 else x[:, 1:], labels, "x has shape"),
        (x[..., :0], labels[:0], "n of at least 1"),
        (x, labels[:3], "the targets"),
        (x, labels + 10, "the targets"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            network.loss_and_grads(params, bad, labels_of)
        assert "\n" not in str(caught.value)


def test_lists_become_hashable() -> None:
    """As TOML has them."""
    assert hash(SmallConv([1, 8, 8], [4], [2])) == hash(SmallConv((1, 8, 8), (4,), (2,)))  # type: ignore[arg-type]
    assert hash(NormMLP([4, 3, 2])) == hash(NormMLP((4, 3, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("network", "groups"),
    [
        (LeNet5(), {"conv1": (20, 25), "conv2": (50, 16), "fc1": (500, 1)}),
        (SmallConv(), {"conv1": (32, 9), "conv2": (64, 9), "conv3": (64, 1)}),
        (NormMLP((6, 5, 4, 3)), {"layers.0": (5, 1), "layers.1": (4, 1)}),
    ],
)
def test_each_layer_reads_the_one_before(network: Network, groups: dict[str, tuple[int, int]]) -> None:
    """So that groups of units are known: how many there are, and the columns of each in the layer that reads it."""
    found = unit_groups(network.specs())
    assert {name: (group.units, *group.columns.values()) for name, group in found.items()} == groups
    for name, spec in network.specs().items():
        assert spec.layer
        assert spec.source in ("", *groups), name
