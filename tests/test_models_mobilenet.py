"""MobileNetV1: its counts, torch in every gradient and statistic, its flow, and mistakes that these see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from network_cases import Ops, check_against_torch, check_flow, check_learns, check_start

from refimpl import kernels
from refimpl.kernels import threads
from refimpl.methods.iss import unit_groups
from refimpl.models import mobilenet
from refimpl.models.conv_units import Conv, ConvUnit
from refimpl.models.mobilenet import MobileNetV1
from refimpl.weights import Support

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

SMALL = MobileNetV1((3, 32, 32), classes=5, width_multiplier=1 / 16)


@pytest.fixture(autouse=True)
def _spec() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    before = threads.get()
    threads.set_count(1)
    with kernels.use("spec"):
        yield
    threads.set_count(before)


def torch_mobilenet(o: Ops, x: Any) -> Any:
    """As it is written in torch; channels follow from the parameters."""

    def unit(conv: str, norm: str, x: Any, **geometry: int) -> Any:
        return o.relu(o.norm(norm, o.conv(conv, x, **geometry)))

    x = unit("model.0.0", "model.0.1", x, stride=2, padding=1)
    for k, stride in enumerate(STRIDES, 1):
        x = unit(f"model.{k}.0", f"model.{k}.1", x, stride=stride, padding=1, groups=x.shape[1])
        x = unit(f"model.{k}.3", f"model.{k}.4", x)
    return o.dense("fc", x.mean((2, 3)))


def test_counts() -> None:
    """The weights that can be pruned, and the operations of a forward pass as AC/DC's authors count them: two for each
    multiplication of a map, two for each number that is normalised and one for each that is rectified, those of the
    pool's window for each of its outputs, and the last map's bias.
    """
    specs = MobileNetV1().specs()
    weights = [spec for spec in specs.values() if spec.prunable]
    kinds = [("stem" if s.shape[1] == 3 else "dw" if s.shape[1] == 1 else "pw") if s.kind == "conv" else "fc"
             for s in weights]  # fmt: skip
    assert kinds == ["stem", *["dw", "pw"] * 13, "fc"]
    assert sum(spec.size for spec in weights) == 4_209_088
    maps = sum(2 * spec.columns_per_sample * spec.size for spec in weights)
    assert maps == 2 * 568_740_352
    normalised = sum(
        s.size * s.columns_per_sample for s in specs.values() if s.kind == "norm" and s.name.endswith(".weight")
    )
    total = maps + 3 * normalised + 7 * 7 * 1024 + 1000
    assert f"{total / 1e9:.4f}" == "1.1527"


def test_width_multiplier() -> None:
    """Channels of every layer, the image's and the classes left out."""
    for factor in (0.25, 0.5, 2.0):
        specs = MobileNetV1(width_multiplier=factor).specs()
        for name, spec in MobileNetV1().specs().items():
            rows, *rest = spec.shape
            wide = [round(factor * rows) if rows != 1000 else rows]
            wide += [n if n in (1, 3) else round(factor * n) for n in rest]
            assert specs[name].shape == tuple(wide), name


def test_units_that_are_read() -> None:
    """Depthwise channels have one reader each, the pointwise map above; the last pointwise ones are read by fc."""
    groups = unit_groups(MobileNetV1().specs())
    assert list(groups) == [*(f"model.{k}.0" for k in range(1, 14)), "model.13.3"]
    assert all(list(groups[f"model.{k}.0"].columns) == [f"model.{k}.3.weight"] for k in range(1, 14))
    assert list(groups["model.13.3"].columns) == ["fc.weight"]


def test_names() -> None:
    """Those of a torch.nn.Sequential of Sequentials: convolution, batch norm, rectifier, and again."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def unit(inputs: int, outputs: int, kernel: int, groups: int) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    blocks = [nn.Sequential(*unit(m, m, 3, m), *unit(m, n, 1, 1)) for m, n in pairwise(channels)]
    net = nn.ModuleDict({"model": nn.Sequential(nn.Sequential(*unit(3, 32, 3, 1)), *blocks), "fc": nn.Linear(1024, 7)})
    ours = MobileNetV1(classes=7)
    shapes = {name: spec.shape for name, spec in ours.specs().items()}
    shapes |= {name: b.shape for name, b in ours.buffers(np.float32).items()}
    assert shapes == {name: tuple(w.shape) for name, w in net.state_dict().items()}
    assert list(ours.specs()) == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_torch(density: float) -> None:
    check_against_torch(SMALL, torch_mobilenet, batch=6, density=density)


def test_compiled_kernels() -> None:
    network = MobileNetV1((3, 5, 5), classes=5, width_multiplier=1 / 16)
    with kernels.use("cpu"):
        check_against_torch(network, torch_mobilenet, batch=4, density=0.4, steps=1)


def test_torch_on_images_that_are_not_square() -> None:
    network = MobileNetV1((2, 39, 50), classes=3, width_multiplier=0.1, label_smoothing=0.1)
    check_against_torch(network, torch_mobilenet, batch=3, density=0.5, steps=1, seed=1)


def test_flow() -> None:
    check_flow(SMALL, torch_mobilenet)


def test_start() -> None:
    check_start(SMALL, supports=("model.0.0.weight", "model.3.0.weight", "model.4.3.weight", "fc.weight"))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_learns(density: float) -> None:
    check_learns(MobileNetV1((3, 32, 32), classes=5, width_multiplier=1 / 8), batch=8, density=density)


def test_whole_size() -> None:
    """A training step at 224 x 224 pixels, in float32, a tenth of the weights stored; then evaluation."""
    network = MobileNetV1()
    rng = np.random.default_rng(0)
    supports = {name: random_support(spec.shape, 0.1, rng) for name, spec in network.specs().items() if spec.prunable}
    params = {**network.init(0, np.float32, supports), **network.buffers(np.float32)}
    x = rng.standard_normal((3, 224, 224, 1)).astype(np.float32)
    loss, grads, buffers = network.loss_and_grads(params, x, np.array([7]))
    assert np.isfinite(loss)
    for name, support in supports.items():
        promise = grads[name]
        assert not isinstance(promise, np.ndarray)
        assert np.isfinite(promise.on(support)).all()
    scores = network.logits({**params, **buffers}, x)
    assert scores.shape == (1000, 1)
    assert np.isfinite(scores).all()


def random_support(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> Support:
    size = int(np.prod(shape))
    return Support(shape, np.sort(rng.choice(size, max(1, int(density * size)), replace=False)))


def stages_with(change: Callable[[int, ConvUnit], ConvUnit]) -> Any:
    """Return the network's list of stages with some changed."""
    right = MobileNetV1.stages.func  # type: ignore[attr-defined]

    def stages(self: MobileNetV1) -> Any:
        *units, head = right(self)
        return (*(change(k, unit) for k, unit in enumerate(units)), head)

    return property(stages)  # goes before what a network has cached


def unrectified(k: int, unit: ConvUnit) -> ConvUnit:
    return ConvUnit.of(unit.conv, unit.norm.name, rectify=False) if k == 1 else unit


def shares_statistics(k: int, unit: ConvUnit) -> ConvUnit:
    """Two norms under one name."""
    return ConvUnit.of(unit.conv, "model.1.1") if unit.norm.name == "model.1.4" else unit


def mean_of_all(k: int, unit: ConvUnit) -> ConvUnit:
    """Running statistics that forget at another rate."""
    norm = unit.norm
    return ConvUnit(unit.conv, type(norm)(norm.name, norm.channels, norm.image, norm.layer, momentum=0.9))


def no_padding_at_one_pixel(k: int, unit: ConvUnit) -> ConvUnit:
    """The pointwise convolutions' padding for the depthwise ones too."""
    conv = unit.conv
    if conv.groups == 1 or min(conv.image) < 5 or conv.stride > 1:
        return unit
    return ConvUnit(
        Conv(conv.name, conv.shape, conv.image, conv.stride, 0, conv.groups, conv.bias, conv.source), unit.norm
    )


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (unrectified, "the loss is off|the gradient"),
        (shares_statistics, "."),
        (mean_of_all, "running_mean is off"),
        (no_padding_at_one_pixel, "the loss is off"),
    ],
)
def test_catches_planted_units(monkeypatch: pytest.MonkeyPatch, planted: Any, match: str) -> None:
    monkeypatch.setattr(MobileNetV1, "stages", stages_with(planted))
    with pytest.raises((AssertionError, KeyError, ValueError), match=match):
        check_against_torch(SMALL, torch_mobilenet, batch=6, steps=1)


def test_catches_a_stride_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the block before; counts of weights do not see it, but those of operations and torch do."""
    blocks = list(mobilenet.BLOCKS)
    blocks[5], blocks[6] = (512, 1), (512, 2)
    monkeypatch.setattr(mobilenet, "BLOCKS", tuple(blocks))
    with pytest.raises(AssertionError):
        test_counts()
    with pytest.raises(AssertionError, match="the loss is off"):
        check_against_torch(replace(SMALL), torch_mobilenet, batch=6, steps=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"input_shape": (3, 224)}, r"the shape of an image is \(3, 224\)"),
        ({"width_multiplier": 0.0}, "the width multiplier is 0.0"),
        ({"width_multiplier": float("nan")}, "the width multiplier is nan"),
        ({"label_smoothing": 1.5}, "the label smoothing is 1.5"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        MobileNetV1(**options)
    assert "\n" not in str(caught.value)


def test_images_of_another_size() -> None:
    params = {**SMALL.init(0, np.float64), **SMALL.buffers(np.float64)}
    with pytest.raises(ValueError, match=r"x has shape \(3, 28, 28, 2\); this network takes .* \(3, 32, 32, n\)"):
        SMALL.logits(params, np.zeros((3, 28, 28, 2)))
