"""A convolutional classifier as a sequence of stages: what all of them have in common.

A network of this kind is a frozen dataclass that derives from :class:`ConvNet`, holds its options, and lists its
``stages``; forward and backward, initialisation, buffers, SynFlow's flow and evaluation follow from the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, get_args

import numpy as np

from refimpl.layers import label_smoothing
from refimpl.layers.batch_norm import Buffers
from refimpl.models.conv_units import Head, Image, Initial, Pass, draw
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support, values_of


class Stage(Protocol):
    """A part of a network that reads one image and returns one; see :mod:`refimpl.models.conv_units`."""

    @property
    def padding(self) -> int:
        """Zeros around its input, which it need not copy if it is given them."""

    def specs(self) -> list[ParamSpec]:
        """Describe its trained parameters, in the order of a PyTorch state dict."""

    def buffers(self, dtype: Any) -> Buffers:
        """Return its running statistics before the first batch."""

    def forward(self, params: Params, x: Image, run: Pass, *, margin: int = 0) -> tuple[Any, Any]:
        """Return its output, with a margin of zeros where it can make one, and what backward needs."""

    def backward(self, dy: Any, cache: Any, grads: Grads) -> Any:
        """Add the gradients of its parameters to ``grads`` and return that of its input; None from the first stage."""


class ConvNet:
    """A classifier of images: stages, the last of which is a `Head`, and softmax cross-entropy.

    A subclass is a frozen dataclass with these attributes.

    Attributes
    ----------
    input_shape : tuple of int
        (channels, height, width) of one image.
    classes : int
    label_smoothing : float
        See :mod:`refimpl.layers.label_smoothing`.
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.
    stages : tuple of Stage
        From the images to the scores.
    """

    input_shape: tuple[int, ...]
    classes: int
    label_smoothing: float
    initial: Initial

    def _check(self) -> None:
        """Raise ValueError unless the options that all networks have can be used; a list becomes hashable."""
        shape = self.input_shape
        if len(shape) != 3 or not all(is_size(n) for n in shape):
            raise ValueError(
                f"the shape of an image is {tuple(shape)}; give three whole numbers above 0: channels, height, width"
            )
        object.__setattr__(self, "input_shape", tuple(int(n) for n in shape))
        if not is_size(self.classes):
            raise ValueError(f"classes is {self.classes!r}; give a whole number above 0")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"the label smoothing is {self.label_smoothing}; give a number from 0 to 1")
        if self.initial not in get_args(Initial):
            raise ValueError(f"the initial distribution is {self.initial!r}; give one of {get_args(Initial)}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores."""
        raise NotImplementedError

    @property
    def output(self) -> tuple[str, str]:
        """Names of the weight and the bias that give the scores."""
        head = self.stages[-1]
        assert isinstance(head, Head)
        return head.names

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter that is trained, in the order of a PyTorch state dict."""
        return {spec.name: spec for stage in self.stages for spec in stage.specs()}

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters, as :func:`refimpl.models.initial.draw` says.

        Parameters
        ----------
        seed : int
        dtype : float32 or float64
        supports : mapping, optional
            Supports of the sparse weights; the others are dense arrays.
        """
        return draw(self.specs().values(), seed, dtype, supports, self.initial)

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch, by their names in a PyTorch state dict."""
        return {name: array for stage in self.stages for name, array in stage.buffers(dtype).items()}

    def loss_and_grads(
        self, params: Params, x: np.ndarray, labels: np.ndarray, draws: Draws | None = None
    ) -> tuple[float, Grads, Buffers]:
        """Return the mean loss in nats, the gradients of the parameters, and the buffers after the batch.

        Parameters
        ----------
        params : Params
            The buffers among them; nothing is changed.
        x : ndarray, shape (channels, height, width, batch)
        labels : ndarray of int, shape (batch,)
        draws : Draws, optional
            The step's random draws, for networks with dropout; without them nothing is dropped.
        """
        run = Pass("train", {}, draws)
        scores, caches = self._forward(params, x, run)
        loss, dy = label_smoothing.forward(scores, labels, epsilon=self.label_smoothing)
        grads: Grads = {}
        self._backward(dy, caches, grads)
        return loss, grads, run.buffers

    def flow(self, params: Params) -> tuple[float, Grads]:
        r"""Return SynFlow's R, the sum of the scores of an image of ones, and its gradients.

        The network is that of the weights alone: sums of residual blocks and means are kept, a maximum becomes the
        mean, and biases, batch norm, rectifiers and dropout are left out. Float64 for networks of many layers.
        Source: Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020.

        Parameters
        ----------
        params : Params
            Dense or sparse; only weights are read.
        """
        weight = values_of(params[self.output[0]])
        scores, caches = self._forward(params, np.ones((*self.input_shape, 1), weight.dtype), Pass("flow"))
        grads: Grads = {}
        self._backward(np.ones_like(scores), caches, grads)
        return float(scores.sum()), grads

    def logits(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the scores of the classes (classes, batch), by the running statistics.

        Parameters
        ----------
        params : Params
            The buffers among them.
        x : ndarray, shape (channels, height, width, batch)
        """
        return self._forward(params, x, Pass("evaluate"))[0]

    def _forward(self, params: Params, x: np.ndarray, run: Pass) -> tuple[np.ndarray, list[Any]]:
        """Return the scores and the stages' caches, which evaluation lets go."""
        if x.shape[:-1] != self.input_shape or not x.shape[-1]:
            raise ValueError(
                f"x has shape {x.shape}; this network takes (channels, height, width, batch) = "
                f"({', '.join(map(str, self.input_shape))}, n) with n of at least 1"
            )
        caches: list[Any] = []
        y: Any = x
        margins = [*(stage.padding for stage in self.stages[1:]), 0]
        for stage, margin in zip(self.stages, margins, strict=True):
            y, cache = stage.forward(params, y, run, margin=margin)
            if run.mode != "evaluate":
                caches.append(cache)
        return y, caches

    def _backward(self, dy: Any, caches: list[Any], grads: Grads) -> None:
        for stage in reversed(self.stages):
            dy = stage.backward(dy, caches.pop(), grads)


def is_size(n: Any) -> bool:
    """Tell whether a setting is a whole number above 0."""
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool) and bool(n > 0)
