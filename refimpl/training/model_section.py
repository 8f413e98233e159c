"""The table ``[model]`` of a run's configuration: the network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from refimpl.training.checks import Auto, Count, Positive, ProperFraction
from refimpl.training.sections import Section

ModelName = Literal[
    "lstm",
    "mlp", "norm-mlp",
    "lenet-5", "small-conv", "resnet", "wide-resnet", "mobilenet-v1",
]  # fmt: skip

MODELS: dict[str, tuple[str, ...]] = {
    "language-model": ("lstm",),
    "classification": ("mlp", "norm-mlp", "lenet-5", "small-conv", "resnet", "wide-resnet", "mobilenet-v1"),
}
"""Which models learn which task."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "lstm": (
        "embedding_size", "hidden_size", "layers", "tied", "dropout_embedding", "dropout_input", "dropout_hidden",
        "dropout_output", "weight_drop", "dropout_kind", "init_scale",
    ),
    "mlp": ("sizes",),
    "norm-mlp": ("sizes",),
    "lenet-5": (),
    "small-conv": ("widths", "strides", "initial"),
    "resnet": ("depth", "width", "shortcut", "form", "initial"),
    "wide-resnet": ("depth", "widen", "dropout", "form", "initial"),
    "mobilenet-v1": ("width_multiplier", "initial"),
}  # fmt: skip
"""Which options each model has."""

IMAGENET = (18, 34, 50, 101, 152)
"""Depths in which residual networks are published for ImageNet."""


@dataclass(frozen=True)
class Model(Section):
    """Table ``[model]``: the network.

    Each option belongs to some kinds of network; for others it keeps its default. The data say how many inputs and
    classes there are.

    Attributes
    ----------
    name : str
        ``"lstm"``, for language: embedding, LSTM layers, decoder. For images: ``"mlp"``, linear maps with rectifiers
        between them; ``"norm-mlp"``, with batch norm too; ``"lenet-5"``; ``"small-conv"``, a few convolutions with
        batch norm; ``"resnet"``; ``"wide-resnet"``; ``"mobilenet-v1"``.
    sizes : list of int
        MLPs: units of each hidden layer.
    widths : list of int
        small-conv: channels that each convolution makes.
    strides : list of int, or "auto"
        small-conv: stride of each convolution (auto: 2 of the first two, 1 of the others).
    depth : int or "auto"
        Residual networks: layers with weights, as papers count them. ResNet: 6 n + 2 in its form for CIFAR (auto: 20);
        18, 34, 50, 101 or 152 in that for ImageNet. Wide ResNet: 6 n + 4 (auto: 28).
    width : int or "auto"
        ResNet: channels of its first stage (auto: 16, for ImageNet 64).
    shortcut : {"auto", "A", "B"}
        ResNet: what a shortcut does where the shape changes. A subsamples and adds channels of zeros, B is a
        convolution of 1 x 1 with batch norm (auto: A, for ImageNet B).
    form : {"auto", "cifar", "imagenet", "paper", "acdc"}
        ResNet: for small or for large images (auto: that in which the depth is published). Wide ResNet: that of its
        paper (auto), or that of AC/DC's authors, with biases among other things.
    widen : int
        Wide ResNet: factor of its widths 16, 32 and 64.
    dropout : float
        Wide ResNet: probability that a number between the two convolutions of a block is dropped.
    width_multiplier : float
        MobileNet: every layer has that many times the channels.
    initial : {"auto", "he", "torch"}
        Convolutional networks: initial distribution of the convolutions (auto: he, of MobileNet torch).
    embedding_size, hidden_size, layers : int
        LSTM: width of the embedding, units of each LSTM layer, number of LSTM layers.
    tied : bool
        LSTM: use the embedding as the decoder; the two sizes must then be equal.
    dropout_embedding : float
        LSTM: probability that a *word* is dropped from the embedding for a whole window.
    dropout_input, dropout_hidden, dropout_output : float
        LSTM: probability that a feature is dropped after the embedding, between LSTM layers, and before the
        decoder.
    weight_drop : float
        LSTM: probability that an entry of a recurrent weight is dropped for a whole window.
    dropout_kind : {"plain", "locked"}
        LSTM: draw a new mask for every time step, or one for the whole window.
    init_scale : float
        LSTM: embedding and decoder start uniform in ±``init_scale``; LSTM weights uniform in ±1/√``hidden_size``.
    """

    table: ClassVar[str] = "model"
    name: ModelName = "lstm"
    sizes: tuple[Count, ...] = (300, 100)
    widths: tuple[Count, ...] = (32, 64, 64)
    strides: tuple[Count, ...] | Auto = "auto"
    depth: Count | Auto = "auto"
    width: Count | Auto = "auto"
    shortcut: Literal["auto", "A", "B"] = "auto"
    form: Literal["auto", "cifar", "imagenet", "paper", "acdc"] = "auto"
    widen: Count = 10
    dropout: ProperFraction = 0.0
    width_multiplier: Positive = 1.0
    initial: Literal["auto", "he", "torch"] = "auto"
    embedding_size: Count = 200
    hidden_size: Count = 200
    layers: Count = 2
    tied: bool = False
    dropout_embedding: ProperFraction = 0.0
    dropout_input: ProperFraction = 0.0
    dropout_hidden: ProperFraction = 0.0
    dropout_output: ProperFraction = 0.0
    weight_drop: ProperFraction = 0.0
    dropout_kind: Literal["plain", "locked"] = "plain"
    init_scale: Positive = 0.1

    def check(self) -> None:
        """No network takes another's options, a tied decoder is the embedding, and blocks are whole."""
        for option in fields(self):
            stranger = option.name != "name" and option.name not in OPTIONS[self.name]
            if stranger and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"model.{option.name} is given and model.name is {self.name!r}, which has no such option; leave it "
                    f"out, or choose another model"
                )
        if self.tied and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"model.tied is true but model.embedding_size is {self.embedding_size} and model.hidden_size "
                f"is {self.hidden_size}; give both the same size or set model.tied to false"
            )
        if self.strides != "auto" and len(self.strides) != len(self.widths):
            raise ValueError(
                f"model.strides lists {len(self.strides)} convolutions and model.widths {len(self.widths)}; give one "
                "of each for every convolution"
            )
        if self.name == "resnet":
            self._check_form("cifar", "imagenet")
            form = self.form if self.form != "auto" else "imagenet" if self.layers_deep in IMAGENET else "cifar"
            if form == "imagenet" and self.layers_deep not in IMAGENET:
                raise ValueError(
                    f"model.depth is {self.layers_deep}; of a resnet for ImageNet give one of {list(IMAGENET)}"
                )
            if form == "cifar" and (self.layers_deep < 8 or self.layers_deep % 6 != 2):
                raise ValueError(
                    f"model.depth is {self.layers_deep}; of a resnet give 6 n + 2 for small images, such as 20, 32 or "
                    f"56, or for ImageNet one of {list(IMAGENET)}"
                )
        if self.name == "wide-resnet":
            self._check_form("paper", "acdc")
            if self.layers_deep < 10 or self.layers_deep % 6 != 4:
                raise ValueError(f"model.depth is {self.layers_deep}; of a wide-resnet give 6 n + 4: 16, 22, 28, 40")

    def _check_form(self, *known: str) -> None:
        if self.form not in ("auto", *known):
            raise ValueError(
                f"model.form is {self.form!r} and model.name is {self.name!r}; give {' or '.join(map(repr, known))}, "
                "or leave it out"
            )

    @property
    def layers_deep(self) -> int:
        """The depth, with what ``"auto"`` stands for."""
        if self.depth != "auto":
            return self.depth
        return 28 if self.name == "wide-resnet" else 20

    def given(self, *options: str) -> dict[str, Any]:
        """Return those of some options that are not ``"auto"``, by name."""
        found = {name: getattr(self, name) for name in options}
        return {name: value for name, value in found.items() if value != "auto"}
