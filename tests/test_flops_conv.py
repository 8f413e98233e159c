"""Operations of convolutional networks: closed forms, a count by brute force, and the published numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import conv_shapes
import pytest
from conv_shapes import Layer, products
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import Allocation, profile
from refimpl.methods.acdc import ACDC
from refimpl.methods.allocation import shares
from refimpl.models.conv_units import Conv, ConvUnit
from refimpl.models.mobilenet import MobileNetV1
from refimpl.models.resnet import ResNet
from refimpl.models.wide_resnet import WideResNet
from refimpl.training import countings, flops, published
from refimpl.training.build import make_method
from refimpl.training.config import load_recipe, override
from refimpl.training.countings import Counting, countings_of
from refimpl.training.simulate import Forecast, planned_run
from refimpl.weights import ParamSpec

Specs = dict[str, ParamSpec]

NETWORKS: dict[str, tuple[str, Callable[[], Any], list[Layer]]] = {
    "ResNet-50": ("resnet", lambda: ResNet(50), conv_shapes.resnet50()),
    "MobileNetV1": ("mobilenet-v1", MobileNetV1, conv_shapes.mobilenet()),
    "ResNet-20": ("resnet", lambda: ResNet(20, shortcut="B"), conv_shapes.resnet20(convolved_shortcuts=True)),
    "ResNet-20 A": ("resnet", lambda: ResNet(20), conv_shapes.resnet20(convolved_shortcuts=False)),
    "WRN-28-10": ("wide-resnet", lambda: WideResNet(form="acdc"), conv_shapes.wide_resnet()),
}


def parted(specs: Specs) -> tuple[Specs, Specs]:
    """Return the linear maps, and the other parameters."""
    linear = {name: specs[name] for name in flops.multiplied(specs)}
    return linear, {name: spec for name, spec in specs.items() if name not in linear}


def whole(specs: Specs) -> dict[str, int]:
    """Return the sizes of all weights."""
    return {name: spec.size for name, spec in specs.items()}


# --- one convolution


def windows_by_hand(side: int, kernel: int, stride: int, padding: int) -> int:
    """Count the places of a window on a padded image, one by one."""
    starts = [start for start in range(side + 2 * padding) if start % stride == 0]
    fits = [start for start in starts if start + kernel <= side + 2 * padding]
    return len(list(product(fits, fits)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.integers(1, 3),
    st.integers(0, 2), st.integers(5, 12), st.booleans(),
)  # fmt: skip
def test_a_convolution_costs_its_weights_at_each_place(
    outputs: int, inputs: int, groups: int, kernel: int, stride: int, padding: int, side: int, first: bool
) -> None:
    check_convolution(outputs, inputs, groups, kernel, stride, padding, side, first)


def check_convolution(
    outputs: int, inputs: int, groups: int, kernel: int, stride: int, padding: int, side: int, first: bool
) -> None:
    """Groups are in the shape already: a weight (O, I / groups, k, k) meets one input channel at each place."""
    shape = (outputs * groups, inputs, kernel, kernel)
    unit = ConvUnit.of(Conv("c", shape, (side, side), stride, padding, groups, bias=True, first=first), "n")
    specs = {spec.name: spec for spec in unit.specs()}
    places, weights = windows_by_hand(side, kernel, stride, padding), outputs * groups * inputs * kernel**2
    assert flops.multiplied(specs) == ["c.weight"]  # nor biases, nor batch norm
    linear, _ = parted(specs)
    assert flops.forward(linear, whole(linear)) == 2 * weights * places
    assert flops.step(linear, whole(linear), whole(linear), 7) == (2 if first else 3) * 7 * 2 * weights * places
    half = {"c.weight": weights // 2}
    assert flops.step(linear, half, half, 1) == (2 if first else 3) * 2 * (weights // 2) * places


STRIDED = (2, 3, 2, 3, 2, 1, 8, True)


# --- the published networks


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_have_the_published_shapes(name: str) -> None:
    _, make, table = NETWORKS[name]
    linear, _ = parted(make().specs())
    assert [(spec.shape, spec.columns_per_sample) for spec in linear.values()] == [
        (layer.shape, layer.side**2) for layer in table
    ]
    assert [spec.input_gradient for spec in linear.values()] == [False] + [True] * (len(table) - 1)
    assert all(spec.prunable for spec in linear.values())
    assert flops.forward(linear, whole(linear)) == products(table)


PUBLISHED = {
    # weights that the authors' programs prune, in how many tensors, and the operations that they print
    "ResNet-50": (25_502_912, 54, 8_212_112_872, "8.2121e+09"),
    "MobileNetV1": (4_209_088, 28, 1_152_659_944, "1.1527e+09"),
    "WRN-28-10": (36_518_832, 29, 11_910_673_508, "1.1911e+10"),
    "ResNet-20": (270_896, 22, 82_220_298, "8.2220e+07"),
}


def by_hand(name: str, table: list[Layer]) -> int:
    """Return the operations of one image as AC/DC's authors count them."""
    convolutions, linear = table[:-1], table[-1]
    biases = linear.shape[0]
    if name == "WRN-28-10":  # convolutions have biases; norms come before them; the rest is no module
        biases += sum(layer.outputs for layer in convolutions)
        inside = [layer for layer in convolutions if "shortcut" not in layer.name]
        return products(table) + biases + 2 * sum(layer.outputs for layer in inside)
    norms = sum(layer.outputs for layer in convolutions)
    rectified = sum(layer.outputs for layer in convolutions if "downsample" not in layer.name)
    pooled = linear.shape[1] * convolutions[-1].side ** 2 + (9 * 64 * 56**2 if name == "ResNet-50" else 0)
    return products(table) + biases + 2 * norms + rectified + pooled


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_operations_that_the_authors_print(name: str) -> None:
    weights, tensors, operations, printed = PUBLISHED[name]
    known, make, table = NETWORKS[name]
    linear, others = parted(make().specs())
    assert (sum(whole(linear).values()), len(linear)) == (weights, tensors)
    counting = countings_of(known, linear, others)[0]
    assert counting.whose == "AC/DC's authors"
    assert counting.dense == operations == by_hand(name, table)
    assert f"{operations:.4e}" == printed


def test_networks_that_are_not_published_are_not_counted_otherwise() -> None:
    linear, others = parted(ResNet(8, width=4).specs())
    assert not countings_of("small-conv", linear, others)
    assert [counting.whose for counting in countings_of("resnet", linear, others)] == ["AC/DC's authors"]


# --- AC/DC: fractions of inference and training


LARGE = "batch_size=4096"
"""A batch of which no fraction depends on the size, and an epoch has few: RigL's own."""


def forecast(recipe: str, *settings_: str) -> Forecast:
    """Return what is planned for a recipe."""
    return planned_run(override(load_recipe(recipe), [LARGE, *settings_]))


def counted(found: Forecast, network: str, whose: str) -> Counting:
    """Return one way in which a forecast's network is counted."""
    return {counting.whose: counting for counting in countings_of(network, found.specs, found.others)}[whose]


UNIFORM = {0.8: (0.2267, 0.613), 0.9: (0.1300, 0.565), 0.95: (0.0817, 0.541), 0.98: (0.0527, 0.526)}
"""By sparsity: operations of inference and of training by the authors' count, as fractions of dense."""


@pytest.mark.parametrize("sparsity", UNIFORM)
def test_acdc_on_resnet50_uniform(sparsity: float) -> None:
    found = forecast("acdc-resnet50-imagenet-uniform", f"sparsity={sparsity}")
    counting = counted(found, "resnet", "AC/DC's authors")
    inference = counting.forward(found.last.used) / counting.dense
    training = counting.training(found.formula, found.visits)
    assert (round(inference, 4), round(training, 3)) == UNIFORM[sparsity]
    assert training == pytest.approx((1 + inference) / 2, rel=1e-14)  # half of the epochs are dense
    assert 3 * counting.dense * found.total["samples"]["published"] == pytest.approx(3.156e18, rel=2e-4)


def test_acdc_on_resnet50_twice_as_long_and_in_a_pattern() -> None:
    """Of the dense training of 100 epochs 1.13 and 1.08; all 54 weights 2:4 would be 0.502, with conv1 dense more."""
    for sparsity, expected in ((0.9, 1.13), (0.95, 1.08)):
        found = forecast("acdc-resnet50-imagenet-2x", f"sparsity={sparsity}")
        training = counted(found, "resnet", "AC/DC's authors").training(found.formula, found.visits)
        assert round(2 * training, 2) == expected
    found = forecast("acdc-resnet50-imagenet-2of4")
    counting = counted(found, "resnet", "AC/DC's authors")
    halves = {name: spec.size // 2 for name, spec in found.specs.items()}
    inference = counting.forward(halves) / counting.dense
    assert round(inference, 3) == 0.502
    assert round((1 + inference) / 2, 2) == 0.75
    stem = found.specs["conv1.weight"]
    assert counting.forward(found.last.used) - counting.forward(halves) == stem.size * stem.columns_per_sample


@pytest.mark.parametrize(("sparsity", "kept"), [(0.8, 5_100_582), (0.9, 2_550_291), (0.95, 1_275_145), (0.98, 510_058)])
def test_acdc_keeps_as_many_of_resnet50_as_its_authors(sparsity: float, kept: int) -> None:
    """One threshold for all tensors, and a strict one, unless weights tie."""
    method = make_method(override(load_recipe("acdc-resnet50-imagenet"), [f"sparsity={sparsity}"]), 100, 1)
    method.supports(ResNet(50).specs(), seed=0)
    assert isinstance(method, ACDC)
    assert method.kept() == {"global": kept}


def test_acdc_on_resnet20_leaves_two_shortcuts_dense() -> None:
    """At 90 % of what its authors prune, 0.886 of all parameters of the network are zero, as they print."""
    method = make_method(load_recipe("acdc-resnet20-cifar10-memorisation"), 200, 1)
    specs = ResNet(20, shortcut="B").specs()
    method.supports(specs, seed=0)
    assert isinstance(method, ACDC)
    assert method.kept() == {"global": 26_833}
    assert sum(spec.size for spec in specs.values()) == 272_474
    assert round((268_336 - 26_833) / 272_474, 3) == 0.886


# --- RigL: the counter of its authors

RIGL = {
    # sparsity: inference, training of 5 times the length; by the two allocations
    ("erk", 0.8): ("0.42", "2.09"), ("uniform", 0.8): ("0.23", "1.14"),
    ("erk", 0.9): ("0.24", "1.23"), ("uniform", 0.9): ("0.13", "0.66"),
    ("erk", 0.95): ("0.12", "0.63"), ("uniform", 0.95): ("0.08", "0.42"),
    ("erk", 0.965): ("0.09", "0.45"), ("uniform", 0.965): ("0.07", "0.34"),
    ("erk", 0.99): ("0.05", "0.29"),
}  # fmt: skip
"""The table of extended training in the authors' repository."""


def rigl_counting(name: str) -> Counting:
    """Return how RigL's authors count a network."""
    known, make, _ = NETWORKS[name]
    return {counting.whose: counting for counting in countings_of(known, *parted(make().specs()))}["RigL's authors"]


def rigl_forward(counting: Counting, rule: Any, sparsity: float, fixed: dict[str, float]) -> float:
    """Return their operations with their densities, which are not rounded to entries."""
    shapes = {name: spec.shape for name, spec in counting.specs.items()}
    shapes = {name: (*shape[2:], shape[1], shape[0]) for name, shape in shapes.items()}  # HWIO
    densities = shares(shapes, Allocation(1 - sparsity, rule, fixed), profile("rigl-tf"), sparsity=sparsity)
    used: Any = {name: densities[name] * spec.size for name, spec in counting.specs.items()}
    return counting.forward(used)


@pytest.mark.parametrize(("rule", "sparsity"), RIGL)
def test_rigl_on_resnet50(rule: str, sparsity: float) -> None:
    """The first convolution is dense where sparsity is uniform, and at 99 %; an exchange every 100 steps, always."""
    counting = rigl_counting("ResNet-50")
    fixed = {"conv1.weight": 1.0} if rule == "uniform" or sparsity == 0.99 else {}
    f_s, f_d = rigl_forward(counting, rule, sparsity, fixed), counting.dense
    training = published.rigl(f_s, f_d, 100) / published.dense(f_d)
    assert (f"{f_s / f_d:.2f}", f"{5 * training:.2f}") == RIGL[rule, sparsity]
    if sparsity == 0.99:
        assert f"{40 * training:.2f}" == "2.32"
    assert f"{f_d:.1e}" == "8.2e+09"
    assert f"{3 * f_d * 32_000 * 4096:.1e}" == "3.2e+18"


@pytest.mark.parametrize(("rule", "sparsity"), [key for key in RIGL if key[1] in (0.8, 0.9)])
def test_rigl_by_the_plan_of_a_run(rule: str, sparsity: float) -> None:
    """The same out of the counter of steps: entries are whole, and exchanges end at three quarters of the run.

    Training once as long is published as 0.42, 0.23, 0.13, and 0.24 where this is 0.245: a fifth of the published
    1.23, which is not below 0.245 either.
    """
    first = ["method.density.conv1.weight=1"] if rule == "uniform" else []
    found = forecast(
        "dense-resnet50-imagenet", "method=rigl", "interval=100", f"allocation={rule}", f"sparsity={sparsity}", *first
    )
    counting = counted(found, "resnet", "RigL's authors")
    assert f"{counting.forward(found.last.used) / counting.dense:.2f}" == RIGL[rule, sparsity][0]
    training = counting.training(found.formula, found.visits)
    assert training == pytest.approx(float(RIGL[rule, sparsity][1]) / 5, abs=0.0015)


MOBILENET = {0.0: 1141.544, 0.75: 330.769, 0.85: 222.666, 0.9: 168.614, 0.95: 114.563}
"""By sparsity of all but the first and the depthwise convolutions: millions of operations that the authors print."""


@pytest.mark.parametrize("sparsity", MOBILENET)
def test_rigl_on_mobilenet(sparsity: float) -> None:
    counting = rigl_counting("MobileNetV1")
    depthwise = {name for name, spec in counting.specs.items() if spec.kind == "conv" and spec.shape[1] == 1}
    assert len(depthwise) == 13
    fixed = dict.fromkeys([*depthwise, next(iter(counting.specs))], 1.0)
    assert round(rigl_forward(counting, "uniform", sparsity, fixed) / 1e6, 3) == MOBILENET[sparsity]


def test_rigl_on_mobilenet_erk() -> None:
    """At other sparsities their allocation of that time differs in some entries: 2 to 5 in 100,000 operations."""
    counting = rigl_counting("MobileNetV1")
    fixed = {name: 1.0 for name, spec in counting.specs.items() if spec.kind == "conv" and spec.shape[1] == 1}
    # The head is a 1 x 1 convolution there, whose kernel counts among its axes.
    head = list(counting.specs)[-1]
    wide = {**counting.specs, head: replace(counting.specs[head], shape=(1000, 1024, 1, 1))}
    assert round(rigl_forward(replace(counting, specs=wide), "erk", 0.75, fixed) / 1e6, 3) == 599.144


# --- planted mistakes


def test_catches_batch_norm_counted_as_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "multiplied", lambda specs: [n for n, spec in specs.items() if spec.kind != "bias"])
    with pytest.raises(AssertionError):
        test_the_networks_have_the_published_shapes("ResNet-50")
    with pytest.raises(AssertionError):
        check_convolution(*STRIDED)


def test_catches_a_stride_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "output", property(lambda self: self.image))
    for name in ("ResNet-50", "MobileNetV1"):
        with pytest.raises(AssertionError):
            test_the_networks_have_the_published_shapes(name)
    with pytest.raises(AssertionError):
        check_convolution(*STRIDED)


def test_catches_the_first_layers_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_all(specs: Specs, used: Any, graded: Any, samples: int, whole: Any = None) -> dict[str, float]:
        every = {name: replace(spec, input_gradient=True) for name, spec in specs.items()}
        return kept(every, used, graded, samples, whole)

    kept = flops.step_terms
    monkeypatch.setattr(flops, "step_terms", with_all)
    with pytest.raises(AssertionError):
        check_convolution(*STRIDED)


def test_catches_the_stride_in_the_other_convolution() -> None:
    """Of a bottleneck in the first 1 x 1, as in the paper; of a wide block in the first, as in its paper."""
    linear, others = parted(WideResNet(form="paper").specs())
    assert countings_of("wide-resnet", linear, others)[0].dense != PUBLISHED["WRN-28-10"][2]
    early = [
        layer._replace(side=layer.side // 2) if layer.name in ("layer2.0.conv1", "layer3.0.conv1") else layer
        for layer in conv_shapes.resnet50()
    ]
    assert by_hand("ResNet-50", early) != PUBLISHED["ResNet-50"][2]


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_in_shortcut", lambda name: False),  # a rectifier before each sum
        ("_pooling", lambda network, specs: 0.0),
        ("_numbers", lambda spec: spec.columns_per_sample),  # one channel
        ("_large", lambda specs: False),
    ],
)
def test_catches_what_is_counted_besides(monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any) -> None:
    monkeypatch.setattr(countings, name, mutant)
    with pytest.raises((AssertionError, KeyError)):
        test_weights_and_operations_that_the_authors_print("ResNet-50")


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_padded_twice", lambda network, specs: {}),
        ("_rectified", lambda spec: spec.shape[0] * spec.columns_per_sample),
    ],
)
def test_catches_rigls_counter_without_its_peculiarities(
    monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any
) -> None:
    """An image that is padded once makes 0.22 of the published 0.23."""
    monkeypatch.setattr(countings, name, mutant)
    with pytest.raises(AssertionError):
        test_rigl_on_mobilenet(0.75)
    if name == "_padded_twice":
        with pytest.raises(AssertionError):
            test_rigl_on_resnet50("uniform", 0.8)


def test_catches_training_without_what_no_sparsity_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    def training(self: Counting, formula: Any, visits: Any) -> float:
        return kept(replace(self, besides={}), formula, visits)

    kept = Counting.training
    monkeypatch.setattr(Counting, "training", training)
    with pytest.raises(AssertionError):
        test_acdc_on_resnet50_uniform(0.8)
