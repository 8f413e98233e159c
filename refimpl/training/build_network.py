"""From the table ``[model]`` of a configuration to the network that classifies, imported when it is asked for."""

from __future__ import annotations

import math

from refimpl.models.classifier import Network
from refimpl.training.config import Config


def make_network(config: Config, shape: tuple[int, ...], classes: int) -> Network:
    """Return the network of a configuration that classifies.

    Parameters
    ----------
    config : Config
    shape : tuple of int
        (channels, height, width) of an image.
    classes : int

    Raises
    ------
    ValueError
        If the network is made for images of another shape, or an option is not accepted.
    """
    network = _made(config, shape, classes)
    if len(network.input_shape) == 3 and network.input_shape != shape:
        given, wanted = (" x ".join(map(str, of)) for of in (shape, network.input_shape))
        raise ValueError(
            f"the images are {given} (channels, height, width) and model.name is {config.model.name!r}, which takes "
            f"{wanted}; give such images, or another model"
        )
    return network


def _made(config: Config, shape: tuple[int, ...], classes: int) -> Network:
    model, smoothing = config.model, config.training.label_smoothing
    match model.name:
        case "mlp":
            from refimpl.models.mlp import MLP

            return MLP((math.prod(shape), *model.sizes, classes), smoothing)
        case "norm-mlp":
            from refimpl.models.norm_mlp import NormMLP

            return NormMLP((math.prod(shape), *model.sizes, classes), smoothing)
        case "lenet-5":
            from refimpl.models.lenet import LeNet5

            return LeNet5(classes, smoothing)
        case "small-conv":
            from refimpl.models.small_conv import SmallConv

            strides = (2, 2)[: len(model.widths)] + (1,) * (len(model.widths) - 2)
            options = {"strides": strides, **model.given("strides", "initial")}
            return SmallConv(shape, model.widths, classes=classes, label_smoothing=smoothing, **options)
        case "resnet":
            from refimpl.models.resnet import ResNet

            options = model.given("width", "shortcut", "form", "initial")
            return ResNet(model.layers_deep, classes, input_shape=shape, label_smoothing=smoothing, **options)
        case "wide-resnet":
            from refimpl.models.wide_resnet import WideResNet

            options = model.given("form", "initial")
            return WideResNet(
                model.layers_deep, model.widen, classes, model.dropout, input_shape=shape, label_smoothing=smoothing,
                **options,
            )  # fmt: skip
        case "mobilenet-v1":
            from refimpl.models.mobilenet import MobileNetV1

            options = model.given("initial")
            return MobileNetV1(shape, classes, model.width_multiplier, smoothing, **options)
        case other:
            raise ValueError(f"model.name is {other!r}, which is no network for images; give another")
