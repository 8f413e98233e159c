"""Mistakes planted in residual networks, each of which the checks must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from network_cases import check_against_torch
from resnet_cases import check_residual_flow, resnet, wide

from refimpl import kernels
from refimpl.layers import dropout
from refimpl.layers.padded import image_of
from refimpl.models.conv_units import Conv, ConvUnit, MaxPool, Norm, Pass
from refimpl.models.resnet import Block, ResNet, Skip
from refimpl.models.wide_resnet import WideBlock, WideResNet
from refimpl.weights import values_of

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _definition() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    count = kernels.threads.get()
    kernels.threads.set_count(1)
    with kernels.use("spec"):
        yield
    kernels.threads.set_count(count)


def check_all() -> None:
    """The checks of the other files, on the smallest networks that have all parts; new ones, for stages are kept."""
    for network in (
        ResNet(8, 3, 2, input_shape=(2, 5, 4)),
        ResNet(8, 3, 2, input_shape=(2, 5, 4), shortcut="B", label_smoothing=0.1),
        ResNet(50, 3, 2, input_shape=(1, 33, 32)),
    ):
        check_against_torch(network, resnet(network), batch=3, density=0.6)
    check_residual_flow(network, resnet(network))
    for form in ("paper", "acdc"):
        other = WideResNet(10, 2, classes=3, input_shape=(2, 5, 4), form=form)
        check_against_torch(other, wide(other), batch=3)
        check_residual_flow(other, wide(other))


def after(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Change what a method returns: ``change(result, self, *arguments)``."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)

        def wrong(self: Any, *args: Any, **options: Any) -> Any:
            return change(right(self, *args, **options), self, *args)

        monkeypatch.setattr(owner, name, wrong)

    return patch


def before(owner: Any, name: str, change: Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Patch:
    """Change what a method is given: ``change(self, *arguments, **options)`` returns all of that."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)

        def wrong(self: Any, *args: Any, **options: Any) -> Any:
            me, given, named = change(self, *args, **options)
            return right(me, *given, **named)

        monkeypatch.setattr(owner, name, wrong)

    return patch


def _attribute(owner: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def _mode(wrong: str, where: str) -> Patch:
    """Run batch norm in another mode where the pass is in one."""

    def change(self: Norm, params: Any, x: Any, run: Pass, **options: Any) -> Any:
        if run.mode != where:
            return self, (params, x, run), options
        buffers = run.buffers if wrong != where else {}
        return self, (params, x, Pass(wrong, buffers, run.draws)), options  # type: ignore[arg-type]

    return before(Norm, "forward", change)


def _written_in_place(result: Any, self: Norm, params: Any, x: Any, run: Pass) -> Any:
    if run.mode == "train":
        values_of(params[f"{self.name}.running_mean"])[...] = run.buffers[f"{self.name}.running_mean"]
    return result


def _no_add(self: Norm, *args: Any, add: Any = None, **options: Any) -> Any:
    return self, args, options | {"add": None if add is None else 0 * image_of(add)}


def _rectified_first(right: Any) -> Any:
    def wrong(self: Norm, params: Any, x: Any, run: Pass, *, add: Any = None, margin: int = 0) -> Any:
        y, cache = right(self, params, x, run, add=None if add is None else 0 * image_of(add), margin=margin)
        if add is not None:
            image_of(y)[...] += image_of(add)
        return y, cache

    return wrong


def _center(self: Skip) -> slice:
    return slice(0, self.inputs)


def _first_stride(right: Any) -> Any:
    """The stride of a bottleneck in its first convolution, as in the paper."""

    def wrong(self: ResNet, name: str, inputs: int, channels: int, image: Any, stride: int) -> Block:
        block = right(self, name, inputs, channels, image, stride)
        conv1, conv2, conv3 = (unit.conv for unit in block.units)
        conv1 = replace(conv1, stride=stride)
        conv2 = replace(conv2, stride=1, image=conv1.output)
        units = tuple(ConvUnit.of(conv, f"{name}.bn{k + 1}") for k, conv in enumerate((conv1, conv2, conv3)))
        return replace(block, units=units)

    return wrong


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrapper(getattr(owner, name)))


def _zero(result: Any, *_: Any) -> Any:
    return 0 * image_of(result)


def _biased_flow(self: Conv, params: Any, x: Any, run: Pass, **options: Any) -> Any:
    return self, (params, x, replace(run, mode="train") if run.mode == "flow" else run), options


def _maximal_flow(self: MaxPool, params: Any, x: Any, run: Pass, **options: Any) -> Any:
    return self, (params, x, replace(run, mode="train")), options


MISTAKES: dict[str, Patch] = {
    "no gradient through a shortcut": after(Skip, "backward", _zero),
    "no gradient through a projection": after(
        ConvUnit, "backward", lambda dx, self, *_: 0 * dx if "downsample" in self.conv.name else dx
    ),
    "shortcut's gradient twice": after(Skip, "backward", lambda dx, *_: 2 * image_of(dx)),
    "shortcut forgotten": before(Norm, "forward", _no_add),
    "added after the rectifier": _wrap(Norm, "forward", _rectified_first),
    "last rectifier forgotten": _wrap(
        ResNet, "_basic",
        lambda right: lambda self, *args: replace(
            block := right(self, *args),
            units=(block.units[0], replace(block.units[1], norm=replace(block.units[1].norm, rectify=False))),
        ),
    ),
    "projection rectified": _wrap(
        ResNet, "_shortcut",
        lambda right: lambda self, *args: (
            replace(skip, norm=replace(skip.norm, rectify=True))
            if isinstance(skip := right(self, *args), ConvUnit) else skip
        ),
    ),
    "zero channels behind": _attribute(Skip, "_place", property(_center)),
    "stride in a bottleneck's first convolution": _wrap(ResNet, "_bottleneck", _first_stride),
    "statistics of the batch in evaluation": _mode("train", "evaluate"),
    "running statistics in training": _mode("evaluate", "train"),
    "statistics of the batch not kept": _mode("train", "train"),
    "buffers written in place": after(Norm, "forward", _written_in_place),
    "another momentum": _wrap(
        ConvUnit, "of",
        lambda right: lambda conv, norm, rectify=True: replace(
            unit := right(conv, norm, rectify=rectify), norm=replace(unit.norm, momentum=0.2)
        ),
    ),
    "biases in the flow": before(Conv, "forward", _biased_flow),
    "maximum in the flow": before(MaxPool, "forward", _maximal_flow),
    "block without its input's gradient": after(WideBlock, "backward", _zero),
    "wide shortcut without a gradient": after(
        Conv, "backward", lambda dx, self, *_: 0 * dx if "shortcut" in self.name else dx
    ),
    "first convolution gives a gradient, others not": after(
        Conv, "backward", lambda dx, self, *_: dx if dx is None or "layer1" not in self.name else 0 * dx
    ),
}  # fmt: skip


@pytest.mark.parametrize("patch", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_caught(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check_all()


def test_without_mistakes_nothing_is_caught() -> None:
    check_all()


def test_dropout_forgotten_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_models_wide_resnet import test_dropout_of_torch

    pytest.importorskip("torch")
    monkeypatch.setattr(dropout, "backward", lambda dy, cache: dy)
    for form in ("paper", "acdc"):
        with pytest.raises(AssertionError, match="gradient"):
            test_dropout_of_torch(form)


def test_dropout_in_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_models_wide_resnet import test_dropout_of_torch

    pytest.importorskip("torch")
    right = WideBlock.forward
    for form, other in (("paper", "acdc"), ("acdc", "paper")):

        def wrong(self: WideBlock, *args: Any, _form: str = other, **options: Any) -> Any:
            return right(replace(self, form=_form), *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(WideBlock, "forward", wrong)
        with pytest.raises(AssertionError):
            test_dropout_of_torch(form)


@pytest.mark.parametrize(
    "network",
    [ResNet(8, width=16, input_shape=(1, 4, 4)), WideResNet(10, 1, input_shape=(1, 4, 4))],
    ids=["after", "before"],
)
def test_a_sum_overwrites_nothing_that_was_given(network: ResNet | WideResNet) -> None:
    """A block adds its shortcut to what it made itself, in both directions."""
    block = network.stages[1]
    rng = np.random.default_rng(0)
    params = network.init(0, np.float64) | network.buffers(np.float64)
    for run in (Pass("train"), Pass("flow")):
        x, dy = rng.standard_normal((2, 16, 4, 4, 3))
        kept, given = x.copy(), dy.copy()
        y, cache = block.forward(params, x, run)
        made = image_of(y).copy()
        block.backward(dy, cache, {})
        assert np.array_equal(x, kept)
        assert np.array_equal(dy, given)
        assert np.array_equal(image_of(y), made)
        assert not np.shares_memory(image_of(y), x)
