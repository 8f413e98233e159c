"""The multilayer perceptron: linear maps with rectifiers between them, and softmax cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from refimpl import kernels
from refimpl.layers import label_smoothing, linear, relu
from refimpl.layers.batch_norm import Buffers
from refimpl.rng import Draws, generator
from refimpl.weights import Grads, Params, ParamSpec, Support, draw_uniform, values_of


@dataclass(frozen=True)
class MLP:
    r"""A classifier: :math:`h_0 = x`, :math:`h_{k+1} = \max(W_k h_k + b_k, 0)`, without the maximum in the last layer,
    and :math:`p(y \mid x) = \mathrm{softmax}(h_L)_y`.

    Names and initial distribution are those of a stack of ``torch.nn.Linear``: weights and biases
    :math:`U(\pm 1/\sqrt{n})` for :math:`n` inputs, whatever the sparsity.

    Attributes
    ----------
    sizes : tuple of int
        Inputs, units of each hidden layer, classes: layer ``k`` maps ``sizes[k]`` to ``sizes[k + 1]`` features.
    label_smoothing : float in [0, 1]
        Share of the training target that is spread over all classes; see `refimpl.layers.label_smoothing`.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, or one is not a whole number above 0.
    """

    sizes: tuple[int, ...]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        sizes = self.sizes
        whole = isinstance(sizes, (tuple, list)) and all(
            isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in sizes
        )
        if not whole or len(sizes) < 2:
            raise ValueError(f"sizes is {sizes!r}; give two or more whole numbers above 0: inputs, hidden ..., classes")
        object.__setattr__(self, "sizes", tuple(int(n) for n in sizes))  # a list, as TOML has it, becomes hashable

    @property
    def layers(self) -> int:
        """Number of linear maps."""
        return len(self.sizes) - 1

    @property
    def input_shape(self) -> tuple[int]:
        """Shape of one input: (features,)."""
        return (self.sizes[0],)

    @property
    def output(self) -> tuple[str, str]:
        """Names of the weight and the bias that give the scores."""
        return names(self.layers - 1)

    def describe(self) -> str:
        """Return in a few words what it is."""
        return f"MLP, {'-'.join(map(str, self.sizes))}"

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter, in the order of a PyTorch state dict."""
        specs = []
        for k in range(self.layers):
            (inputs, outputs), layer = self.sizes[k : k + 2], f"layers.{k}"
            weight, bias = names(k)
            specs += [
                ParamSpec(
                    weight, (outputs, inputs), "linear", True, fan_in=inputs, fan_out=outputs,
                    input_gradient=k > 0, layer=layer, source=f"layers.{k - 1}" if k else "",
                ),
                ParamSpec(bias, (outputs,), "bias", layer=layer),
            ]  # fmt: skip
        return {spec.name: spec for spec in specs}

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters; of a sparse weight only the values that exist are drawn.

        Parameters
        ----------
        seed : int
        dtype : float32 or float64
        supports : mapping, optional
            Supports of the sparse weights; the others are dense arrays.
        """
        supports = supports or {}
        params: Params = {}
        for name, spec in self.specs().items():
            bound = self.sizes[int(name.split(".")[1])] ** -0.5
            params[name] = draw_uniform(generator(seed, f"init/{name}"), spec.shape, bound, dtype, supports.get(name))
        return params

    def buffers(self, dtype: Any) -> Buffers:
        """Return no buffers: there is nothing but parameters."""
        return {}

    def forward(self, params: Params, panels: np.ndarray) -> tuple[np.ndarray, list[linear.Cache]]:
        """Return the scores of the classes, and what backward needs; all in the kernels' panels (P, F, w).

        The input of a layer's cache, but the first's, is the rectified output of the layer below.
        """
        caches = []
        for k in range(self.layers):
            panels, cache = linear.forward(params, *names(k), panels)
            caches.append(cache)
            if k < self.layers - 1:
                panels, _ = relu.forward(panels, in_place=True)
        return panels, caches

    def loss(self, params: Params, x: np.ndarray, labels: np.ndarray) -> float:
        """Return the mean loss in nats.

        Parameters
        ----------
        params : Params
        x : ndarray, shape (features, batch)
        labels : ndarray of int, shape (batch,)
            Or both as `group` returns them.
        """
        panels, grouped, scale = self._grouped(x, labels)
        scores, _ = self.forward(params, panels)
        return self._loss(scores, grouped, scale)[0]

    def loss_and_grads(
        self, params: Params, x: np.ndarray, labels: np.ndarray, draws: Draws | None = None
    ) -> tuple[float, Grads, Buffers]:
        """Return the mean loss in nats, the gradients of the parameters, and no buffers.

        Parameters
        ----------
        params : Params
        x : ndarray, shape (features, batch)
        labels : ndarray of int, shape (batch,)
            Or both as `group` returns them.
        draws : Draws, optional
            Not needed: nothing is drawn.
        """
        panels, grouped, scale = self._grouped(x, labels)
        scores, caches = self.forward(params, panels)
        loss, dy = self._loss(scores, grouped, scale)
        grads: Grads = {}
        sums = None  # of dy over its columns, for the bias
        for k in reversed(range(self.layers)):
            dx = linear.backward(dy, caches[k], grads, input_gradient=k > 0, bias_gradient=sums)
            if dx is not None:
                dy, sums = relu.backward(dx, caches[k].x, in_place=True)
        return loss, grads, {}

    def flow(self, params: Params) -> tuple[float, Grads]:
        r"""Return :math:`R = 1^\top W_L \cdots W_1 1` and its gradients, as SynFlow needs them for magnitudes.

        The linear network of the weights, without biases and rectifiers, for an input of ones.
        Source: Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020.

        Parameters
        ----------
        params : Params
            Dense or sparse; biases are not read. Float64 for networks of many layers.

        Returns
        -------
        flow : float
            R, the sum of the outputs.
        grads : Grads
            Of the weights.
        """
        x = np.ones((self.sizes[0], 1), values_of(params[names(0)[0]]).dtype)  # (C, 1)
        caches = []
        for k in range(self.layers):
            x, cache = linear.forward(params, names(k)[0], None, x)
            caches.append(cache)
        grads: Grads = {}
        dy = np.ones_like(x)
        for k in reversed(range(self.layers)):
            dx = linear.backward(dy, caches[k], grads, input_gradient=k > 0)
            if dx is not None:
                dy = dx
        return float(x.sum()), grads

    def logits(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the scores of the classes (classes, batch) for ``x`` (features, batch)."""
        scores, _ = self.forward(params, self._panels(x))
        return kernels.from_panels(scores, (self.sizes[-1], x.shape[1]))

    def group(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch in the kernels' panels, for `loss` and `loss_and_grads`, which otherwise do this first.

        Whoever lays out batches anyway, such as a loader that shuffles, saves a copy of ``x`` in each step.

        Parameters
        ----------
        x : ndarray, shape (features, batch)
        labels : ndarray of int, shape (batch,)

        Returns
        -------
        panels : ndarray, shape (P, features, w)
        labels : ndarray of int, shape (P, w)
            −1 for the columns that only fill a panel; they count neither in the loss nor in a gradient.
        """
        panels = self._panels(x)
        if labels.shape != x.shape[1:]:
            raise ValueError(f"there are labels of shape {labels.shape} for {x.shape[1]} columns; give one for each")
        if panels.shape == (1, *x.shape):
            return panels, labels[None]
        return panels, kernels.to_panels(labels[None, None], fill=-1, itemsize=x.itemsize)[:, 0, :]

    def _loss(self, scores: np.ndarray, labels: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
        """Return the mean loss, and the gradient of the scores, which may have taken their place."""
        if self.label_smoothing:
            return label_smoothing.forward(scores, labels, epsilon=self.label_smoothing)
        return kernels.softmax_cross_entropy(scores, labels, scale) * scale, scores

    def _panels(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[0] != self.sizes[0] or not x.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}; this network takes (features, batch) = ({self.sizes[0]}, n) with n of at "
                "least 1, or panels from group()"
            )
        return kernels.to_panels(x[None])

    def _grouped(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return panels, their labels, and the weight of a column in the mean."""
        if x.ndim == 3:  # panels already: one label for each column, of which some only fill
            counted = int(np.count_nonzero(labels >= 0))
        else:
            counted = labels.size
            x, labels = self.group(x, labels)
        return x, labels, 1.0 / max(counted, 1)


@lru_cache(maxsize=256)
def names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's weight and bias."""
    return f"layers.{layer}.weight", f"layers.{layer}.bias"
