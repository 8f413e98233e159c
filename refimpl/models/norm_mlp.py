"""A multilayer perceptron with batch norm between its linear maps and their rectifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refimpl.layers import batch_norm, label_smoothing, linear
from refimpl.layers.batch_norm import Buffers
from refimpl.models.initial import draw
from refimpl.models.mlp import MLP
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support


@dataclass(frozen=True)
class NormMLP:
    r"""A classifier: :math:`h_0 = x`, :math:`h_{k+1} = \max(\mathrm{BN}_k(W_k h_k), 0)` for the hidden layers,
    :math:`z = W_L h_L + b`, and :math:`p(y \mid x) = \mathrm{softmax}(z)_y`.

    :math:`\mathrm{BN}_k` normalises each unit over the batch and has a scale and a shift of its own
    (:mod:`refimpl.layers.batch_norm`), so that a hidden layer needs no bias. Names are ``layers.K.weight`` for the
    linear maps, ``layers.K.bias`` for the last one alone, and ``norms.K`` for batch norm after map K. Weights and the
    bias begin as :math:`U(\pm 1/\sqrt{n})` for :math:`n` inputs, whatever the sparsity, scales as 1 and shifts as 0.

    Attributes
    ----------
    sizes : tuple of int
        Inputs, units of each hidden layer, classes, as those of :class:`~refimpl.models.mlp.MLP`.
    label_smoothing : float
        See :mod:`refimpl.layers.label_smoothing`.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, or one is not a whole number above 0; or the label smoothing is not from 0
        to 1.
    """

    sizes: tuple[int, ...]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MLP(self.sizes).sizes)  # which checks them
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"the label smoothing is {self.label_smoothing}; give a number from 0 to 1")

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
        return self._weight(self.layers - 1), f"layers.{self.layers - 1}.bias"

    def describe(self) -> str:
        """Return in a few words what it is."""
        return f"MLP with batch norm, {'-'.join(map(str, self.sizes))}"

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter that is trained."""
        specs = []
        for k in range(self.layers):
            (inputs, outputs), layer = self.sizes[k : k + 2], f"layers.{k}"
            specs.append(
                ParamSpec(
                    self._weight(k), (outputs, inputs), "linear", True, fan_in=inputs, fan_out=outputs,
                    input_gradient=k > 0, layer=layer, source=f"layers.{k - 1}" if k else "",
                )
            )  # fmt: skip
            if k < self.layers - 1:
                of = batch_norm.names(f"norms.{k}")
                specs += [ParamSpec(name, (outputs,), "norm", layer=layer) for name in (of.weight, of.bias)]
            else:
                specs.append(ParamSpec(self.output[1], (outputs,), "bias", fan_in=inputs, layer=layer))
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
        return draw(self.specs().values(), seed, dtype, supports)

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch."""
        buffers: Buffers = {}
        for k in range(self.layers - 1):
            buffers |= batch_norm.new_buffers(f"norms.{k}", self.sizes[k + 1], dtype)
        return buffers

    def forward(self, params: Params, x: np.ndarray, *, train: bool) -> tuple[np.ndarray, _Caches, Buffers]:
        """Return the scores of the classes, what backward needs, and the running statistics after the batch."""
        maps: list[linear.Cache] = []
        norms: list[batch_norm.Cache] = []
        buffers: Buffers = {}
        for k in range(self.layers - 1):
            x, mapped = linear.forward(params, self._weight(k), None, x)
            x, normed, after = batch_norm.forward(params, f"norms.{k}", x, train=train, rectify=True)
            maps.append(mapped)
            norms.append(normed)
            buffers |= after
        scores, mapped = linear.forward(params, *self.output, x)
        return scores, _Caches([*maps, mapped], norms), buffers

    def loss_and_grads(
        self, params: Params, x: np.ndarray, labels: np.ndarray, draws: Draws | None = None
    ) -> tuple[float, Grads, Buffers]:
        """Return the mean loss in nats, the gradients, and the running statistics after the batch.

        Parameters
        ----------
        params : Params
            The running statistics among them.
        x : ndarray, shape (features, batch)
        labels : ndarray of int, shape (batch,)
        draws : Draws, optional
            Not used: nothing here is random.
        """
        scores, caches, buffers = self.forward(params, self._checked(x), train=True)
        loss, dy = label_smoothing.forward(scores, labels, epsilon=self.label_smoothing)
        grads: Grads = {}
        dx = linear.backward(dy, caches.maps[-1], grads, input_gradient=self.layers > 1)
        for k in reversed(range(self.layers - 1)):
            assert dx is not None
            dy = batch_norm.backward(dx, caches.norms[k], grads).dx
            dx = linear.backward(dy, caches.maps[k], grads, input_gradient=k > 0)
        return loss, grads, buffers

    def flow(self, params: Params) -> tuple[float, Grads]:
        r"""Return :math:`R = 1^\top W_L \cdots W_0 1` and its gradients: that of the linear network of the weights,
        as :meth:`refimpl.models.mlp.MLP.flow` has it.
        """
        return MLP(self.sizes).flow(params)

    def logits(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the scores of the classes (classes, batch) for ``x`` (features, batch), by the running statistics."""
        return self.forward(params, self._checked(x), train=False)[0]

    def _checked(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[0] != self.sizes[0] or not x.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}; this network takes (features, batch) = ({self.sizes[0]}, n) with n of at "
                "least 1"
            )
        return x

    @staticmethod
    def _weight(layer: int) -> str:
        return f"layers.{layer}.weight"


class _Caches(NamedTuple):
    maps: list[linear.Cache]
    norms: list[batch_norm.Cache]
