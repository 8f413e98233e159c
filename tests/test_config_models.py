"""Models for images in a configuration, and the learning rates that their papers train them with."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_training_classification import images

from refimpl.datasets.images import PADDING, random_crop, random_flip
from refimpl.models.mlp import MLP
from refimpl.optim import Constant, LinearWarmup
from refimpl.rng import generator
from refimpl.training.build import make_learning_rate
from refimpl.training.build_network import make_network
from refimpl.training.classification import ClassificationTask
from refimpl.training.config import Config, load_recipe, override, recipes
from refimpl.training.model_section import MODELS, OPTIONS, Model

SMALL, LARGE = (3, 32, 32), (3, 224, 224)


def classifier(*settings: str) -> Config:
    return override(Config(), ["task=classification", *settings])


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shape", "says"),
    [
        (["model=mlp"], (1, 28, 28), "MLP, 784-300-100-10"),
        (["model=norm-mlp", "sizes=[50]"], (1, 28, 28), "MLP with batch norm, 784-50-10"),
        (["model=lenet-5"], (1, 28, 28), "LeNet-5"),
        (["model=small-conv", "widths=[16]"], SMALL, "small conv net, 16"),
        (["model=resnet"], SMALL, "ResNet-20"),
        (["model=resnet", "depth=32", "width=64"], SMALL, "ResNet-32"),
        (["model=resnet", "depth=50"], LARGE, "ResNet-50"),
        (["model=wide-resnet", "depth=16", "widen=2", "dropout=0.3"], SMALL, "WRN-16-2"),
        (["model=mobilenet-v1"], LARGE, "MobileNetV1"),
    ],
)
def test_each_name_stands_for_its_network(settings: list[str], shape: tuple[int, ...], says: str) -> None:
    network = make_network(classifier(*settings), shape, 10)
    assert network.describe().startswith(says)
    assert math.prod(network.input_shape) == math.prod(shape)
    weight, bias = network.output
    specs = network.specs()
    assert specs[weight].shape[0] == specs[bias].shape[0] == 10
    assert not network.specs().keys() & network.buffers("float32").keys()


def test_every_name_and_every_option_is_known() -> None:
    named = {name for names in MODELS.values() for name in names}
    assert OPTIONS.keys() == named
    assert set().union(*OPTIONS.values()) == {f.name for f in fields(Model)} - {"name"}


def test_options_reach_the_network() -> None:
    resnet = make_network(classifier("model=resnet", "width=64", "shortcut=B", "initial=torch"), SMALL, 10)
    assert (resnet.width, resnet.shortcut, resnet.initial, resnet.form) == (64, "B", "torch", "cifar")  # type: ignore[attr-defined]
    wide = make_network(classifier("model=wide-resnet", "form=acdc", "dropout=0.3", "widen=4"), SMALL, 10)
    assert (wide.depth, wide.widen, wide.dropout, wide.form) == (28, 4, 0.3, "acdc")  # type: ignore[attr-defined]
    small = make_network(classifier("model=small-conv", "widths=[16, 32, 32, 32]"), SMALL, 10)
    assert small.strides == (2, 2, 1, 1)  # type: ignore[attr-defined]
    mobile = make_network(classifier("model=mobilenet-v1", "width_multiplier=0.5"), LARGE, 10)
    assert mobile.width_multiplier == 0.5  # type: ignore[attr-defined]
    for name in MODELS["classification"]:
        shape = (1, 28, 28)
        smoothed = make_network(classifier(f"model={name}", "label_smoothing=0.1"), shape, 10)
        assert smoothed.label_smoothing == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model=resnet", "depth=21"], "model.depth is 21; of a resnet give 6 n \\+ 2"),
        (["model=resnet", "depth=2"], "model.depth is 2;"),
        (["model=resnet", "depth=50", "form=cifar"], None),
        (["model=resnet", "depth=18", "form=cifar"], "model.depth is 18; of a resnet give 6 n \\+ 2"),
        (["model=resnet", "depth=20", "form=imagenet"], "model.depth is 20; of a resnet for ImageNet give one of"),
        (["model=resnet", "form=acdc"], "model.form is 'acdc' and model.name is 'resnet'; give 'cifar' or 'imagenet'"),
        (["model=wide-resnet", "depth=20"], "model.depth is 20; of a wide-resnet give 6 n \\+ 4"),
        (["model=wide-resnet", "form=cifar"], "give 'paper' or 'acdc'"),
        (["model=mlp", "depth=20"], "model.depth is given and model.name is 'mlp', which has no such option"),
        (["model=small-conv", "sizes=[3]"], "model.sizes is given and model.name is 'small-conv'"),
        (["model=small-conv", "widths=[3]", "strides=[1, 1]"], "model.strides lists 2 convolutions and model.widths 1"),
        (["model=lenet5"], "model.name is 'lenet5'.*the nearest is 'lenet-5'"),
        (["task=language-model", "model=resnet"], "give task=classification for that model"),
        (
            ["task=language-model", "label_smoothing=0.1"],
            "training.label_smoothing is 0.1 and task is 'language-model'",
        ),
        (["model=mlp", "warmup_epochs=2"], "optimizer.warmup_epochs is 2 .*; give schedule=epoch-cosine"),
        (["model=mlp", "milestones=[3]"], "optimizer.milestones is \\(3,\\) .*; give schedule=milestones"),
    ],
)
def test_options_that_do_not_fit(settings: list[str], says: str | None) -> None:
    if says is None:
        assert classifier(*settings).model.depth == 50
        return
    with pytest.raises(ValueError, match=says) as caught:
        classifier(*settings)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused_before_anything_is_built() -> None:
    with pytest.raises(
        ValueError, match=r"the images are 1 x 6 x 5 .*'lenet-5', which takes 1 x 28 x 28; give"
    ) as caught:
        ClassificationTask(classifier("model=lenet-5"), images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n, _ in recipes() if load_recipe(n).task == "classification"])
def test_recipes_build(name: str) -> None:
    config = load_recipe(name)
    shape = LARGE if "imagenet" in name else (1, 28, 28) if "mnist" in name else SMALL
    network = make_network(config, shape, 10)
    assert any(spec.prunable for spec in network.specs().values())
    epochs = config.training.epochs
    rates = [make_learning_rate(config, 7, 7 * epochs)(7 * e, e) for e in range(epochs)]
    assert min(rates) > 0
    assert max(rates) <= config.optimizer.lr


@pytest.mark.parametrize("flip", [True, False])
def test_augmented_images_are_mirrored_if_that_is_asked_for(flip: bool) -> None:
    data, settings = images(), ["batch_size=40", "augment=true", f"flip={str(flip).lower()}", "dtype=float64"]
    batches = ClassificationTask(classifier("model=mlp", *settings), data).batches(0)
    rng = generator(Config().seed, "augment", 0)
    expected = random_crop(data.train.pixels[batches.order], PADDING, rng=rng)
    if flip:
        expected = random_flip(expected, rng=rng)
    assert np.array_equal(batches[0][0], data.standardised(expected, np.float64))


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    plain, smooth = MLP((3, 2)), MLP((3, 2), 0.2)
    params = plain.init(0, "float64")
    x, labels = np.random.default_rng(0).standard_normal((3, 5)), np.array([0, 1, 1, 0, 1])
    scores = plain.logits(params, x)
    assert np.array_equal(scores, smooth.logits(params, x))
    log_p = scores - np.log(np.exp(scores).sum(0))
    expected = -(0.8 * log_p[labels, np.arange(5)] + 0.2 * log_p.mean(0)).mean()
    assert abs(smooth.loss(params, x, labels) - expected) < 1e-14
    loss, grads, _ = smooth.loss_and_grads(params, x, labels)
    assert loss == smooth.loss(params, x, labels)
    d = (np.exp(log_p) - 0.8 * np.eye(2)[labels].T - 0.1) / 5
    assert np.abs(np.asarray(grads["layers.0.bias"]) - d.sum(1)).max() < 1e-14


# --- learning rates -----------------------------------------------------------------------------------------


def rates(epochs: int, *settings: str, steps: int = 3) -> list[float]:
    config = classifier("model=mlp", "optimizer=sgd", "lr=0.5", *settings)
    rate = make_learning_rate(config, steps, epochs * steps)
    return [rate(step, step // steps) for step in range(epochs * steps)]


@given(st.integers(1, 30), st.data())
def test_the_cosine_by_epochs_is_that_of_acdcs_authors(epochs: int, data: st.DataObject) -> None:
    w = data.draw(st.integers(0, epochs - 1))
    found = rates(epochs, "schedule=epoch-cosine", f"warmup_epochs={w}")
    for step, rate in enumerate(found):
        e = step // 3
        expected = 0.5 * (e + 1) / w if e < w else 0.25 * (1 + math.cos(math.pi * (e - w) / (epochs - w)))
        assert abs(rate - expected) <= 1e-15
    assert found[-1] > 0


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.1, 1))
def test_milestones(epochs: int, milestones: list[int], decay: float) -> None:
    found = rates(epochs, "schedule=milestones", f"milestones={milestones}", f"decay={decay}")
    expected = [0.5 * decay ** sum(m <= step // 3 for m in milestones) for step in range(3 * epochs)]
    assert found == expected


def test_milestones_of_acdcs_wide_resnet_and_by_default() -> None:
    found = rates(200, "schedule=milestones", "milestones=[76, 116, 156]", "decay=0.1", "lr=0.08", steps=1)
    assert [round(found[e], 10) for e in (0, 75, 76, 115, 116, 156, 199)] == [
        0.08, 0.08, 0.008, 0.008, 0.0008, 0.00008, 0.00008
    ]  # fmt: skip
    auto = rates(8, "schedule=milestones", "decay=0.1", steps=1)
    assert auto == [0.5] * 4 + [0.5 * 0.1] * 2 + [0.5 * 0.1**2] * 2


def test_a_warm_up_leaves_the_rest_of_the_run_to_the_cosine() -> None:
    found = rates(4, "schedule=cosine", "warmup=3")
    assert found[:3] == [0.125, 0.25, 0.375]
    assert found[3] == 0.5
    assert abs(found[11] - 0.25 * (1 + math.cos(math.pi * 8 / 9))) < 1e-15
    with pytest.raises(ValueError, match="warmup_epochs is 4 and epochs of the run are 4; give fewer"):
        rates(4, "schedule=epoch-cosine", "warmup_epochs=4")


def test_warm_ups_reach_the_full_rate_after_their_last_step_or_in_it() -> None:
    assert [LinearWarmup(4, Constant(8), "last")(t) for t in range(6)] == [2, 4, 6, 8, 8, 8]
    assert [LinearWarmup(3, Constant(8), "after")(t) for t in range(5)] == [2, 4, 6, 8, 8]
    assert LinearWarmup(0, Constant(8), "last")(0) == 8
    with pytest.raises(ValueError, match="full"):
        LinearWarmup(1, Constant(8), "first")  # type: ignore[arg-type]
