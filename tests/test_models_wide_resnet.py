"""Wide residual networks: torch's gradients and statistics with dropout and without, counts, flow, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from network_cases import batch_of, check_against_torch, check_learns, check_start, drawn, evaluated
from resnet_cases import check_residual_flow, wide

from refimpl import kernels
from refimpl.models.wide_resnet import WideResNet
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, values_of


@pytest.fixture(autouse=True)
def _definition() -> Iterator[None]:
    """Compile nothing, and use one thread."""
    count = kernels.threads.get()
    kernels.threads.set_count(1)
    with kernels.use("spec"):
        yield
    kernels.threads.set_count(count)


SMALL = {
    "paper": WideResNet(10, 1, classes=4, input_shape=(3, 9, 8)),  # the first stage keeps its 16 channels: an identity
    "paper, wider": WideResNet(16, 2, classes=3, input_shape=(1, 8, 8), label_smoothing=0.1),
    "acdc": WideResNet(16, 2, classes=3, input_shape=(2, 8, 8), form="acdc"),
}


@dataclass(frozen=True)
class Drawing:
    """A network with the draws of one step given."""

    network: WideResNet
    draws: Draws

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def loss_and_grads(self, params: Params, x: np.ndarray, labels: np.ndarray) -> tuple[float, Grads, Any]:
        return self.network.loss_and_grads(params, x, labels, self.draws)


@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
def test_of_torch(network: WideResNet) -> None:
    """Every second weight is sparse."""
    check_against_torch(network, wide(network), batch=3, density=0.3)


@pytest.mark.parametrize("form", ["paper", "acdc"])
def test_dropout_of_torch(form: Any) -> None:
    network = WideResNet(10, 2, classes=3, dropout=0.4, input_shape=(3, 8, 8), form=form)
    draws = Draws(11, 7)
    check_against_torch(Drawing(network, draws), wide(network, draws), batch=3, density=0.5)  # type: ignore[arg-type]


def test_dropout_draws_anew_each_step_and_nothing_without_draws() -> None:
    network = WideResNet(10, 1, classes=3, dropout=0.3, input_shape=(1, 4, 4))
    params = drawn(network, 0)
    x, labels = batch_of(network, 2, 0)
    losses = [network.loss_and_grads(params, x, labels, Draws(0, step))[0] for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    still = WideResNet(10, 1, classes=3, input_shape=(1, 4, 4))
    ours, theirs = network.loss_and_grads(params, x, labels), still.loss_and_grads(params, x, labels, Draws(0, 1))
    assert ours[0] == theirs[0]
    assert all(np.array_equal(g, evaluated(theirs[1])[name]) for name, g in evaluated(ours[1]).items())
    assert np.array_equal(network.logits(params, x), still.logits(params, x))


@pytest.mark.parametrize("network", [SMALL["paper"], SMALL["acdc"]], ids=["paper", "acdc"])
def test_flow(network: WideResNet) -> None:
    check_residual_flow(network, wide(network))


def test_counts_of_wrn_28_10() -> None:
    """As in AC/DC: 11.911 GFLOPs in the form that its authors train, by their counting, in which a rectifier that is a
    function costs nothing: two operations for each product and each number that is normalised, one for each bias.
    """
    network = WideResNet(28, 10, form="acdc")
    specs = network.specs()
    prunable = [spec for spec in specs.values() if spec.prunable]
    assert (len(prunable), sum(spec.size for spec in prunable)) == (29, 36_518_832)
    assert (specs["conv1.weight"].prunable, specs["layer2.0.shortcut.0.weight"].prunable) == (True, True)
    scales = [spec for name, spec in specs.items() if spec.kind == "norm" and name.endswith("weight")]
    biases = [spec for spec in specs.values() if spec.kind == "bias"]
    operations = sum(2 * spec.size * spec.columns_per_sample for spec in (*prunable, *scales))
    operations += sum(spec.size * spec.columns_per_sample for spec in biases)
    assert f"{operations / 1e9:.3f}" == "11.911"
    paper = [spec for spec in WideResNet(28, 10).specs().values() if spec.prunable]
    assert sum(spec.size for spec in paper) == 36_518_832
    assert sum(spec.size * spec.columns_per_sample for spec in paper) == 5_243_386_368


def test_names() -> None:
    names = list(SMALL["acdc"].specs())
    assert names[:2] == ["conv1.weight", "conv1.bias"]
    block = [name.removeprefix("layer2.0.") for name in names if name.startswith("layer2.0.")]
    assert block == [
        "bn1.weight", "bn1.bias", "conv1.weight", "conv1.bias", "bn2.weight", "bn2.bias", "conv2.weight", "conv2.bias",
        "shortcut.0.weight", "shortcut.0.bias",
    ]  # fmt: skip
    assert names[-4:] == ["bn1.weight", "bn1.bias", "linear.weight", "linear.bias"]
    assert "conv1.bias" not in SMALL["paper"].specs()
    assert "layer1.0.shortcut.0.weight" not in SMALL["paper"].specs()
    assert "bn1.running_var" in SMALL["paper"].buffers(np.float32)
    assert SMALL["paper"].output == ("linear.weight", "linear.bias")


def test_start() -> None:
    check_start(SMALL["acdc"], supports=["layer1.0.conv2.weight", "layer1.0.shortcut.0.weight", "linear.weight"])
    assert not values_of(SMALL["paper"].init(0, np.float32)["bn1.bias"]).any()


def test_learns() -> None:
    check_learns(WideResNet(10, 1, classes=4, input_shape=(3, 8, 8)), batch=16, steps=12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 20}, "6 n . 4 layers"),
        ({"depth": 4}, "6 n . 4 layers"),
        ({"widen": 0}, "by which channels are multiplied"),
        ({"dropout": 1.0}, "below 1"),
        ({"form": "ours"}, "'paper' or 'acdc'"),
        ({"classes": 0}, "whole number above 0"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WideResNet(**options)
