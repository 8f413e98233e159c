"""The LSTM language model of the Selfish-RNN experiments: embedding, stacked LSTM, decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.layers import cross_entropy, dropout, embedding, linear, lstm
from refimpl.rng import Draws, generator
from refimpl.weights import Grads, Params, ParamSpec, Support, draw_uniform

States = list[lstm.State]


@dataclass(frozen=True)
class LanguageModel:
    r"""A word-level language model: :math:`p(w_{t+1} \mid w_{\le t}) = \mathrm{softmax}(W_d h_t + b_d)`.

    Parameter names, shapes and initial distributions are those of PyTorch's word-language-model example, which the
    authors of Selfish-RNN started from: embedding and decoder :math:`U(\pm 0.1)`, decoder bias 0, LSTM
    :math:`U(\pm 1/\sqrt H)`.

    Attributes
    ----------
    vocabulary, embedding_size, hidden_size, layers : int
    tied : bool
        Whether the decoder is the embedding (``encoder.weight``); needs embedding_size = hidden_size.
    dropout_embedding : float
        Of whole words (rows of the embedding).
    dropout_input, dropout_hidden, dropout_output : float
        On the embedding's output, between LSTM layers, and before the decoder.
    dropout_kind : {"plain", "locked"}
        One draw for each number, or one for each feature and sequence.
    weight_drop : float
        Of entries of W_hh.
    init_scale : float
        Bound of the uniform distribution of embedding and decoder.
    """

    vocabulary: int
    embedding_size: int
    hidden_size: int
    layers: int = 2
    tied: bool = False
    dropout_embedding: float = 0.0
    dropout_input: float = 0.0
    dropout_hidden: float = 0.0
    dropout_output: float = 0.0
    dropout_kind: Literal["plain", "locked"] = "plain"
    weight_drop: float = 0.0
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.tied and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"a tied decoder needs equal embedding and hidden sizes; "
                f"they are {self.embedding_size} and {self.hidden_size}"
            )

    @property
    def decoder(self) -> str:
        """Name of the decoder's weight."""
        return "encoder.weight" if self.tied else "decoder.weight"

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter, in the order of a PyTorch state dict."""
        v, e, h = self.vocabulary, self.embedding_size, self.hidden_size
        gates = {gate: slice(k * h, (k + 1) * h) for k, gate in enumerate(lstm.GATES)}
        # A tied matrix is multiplied by every column in the decoder, an untied embedding is only looked up.
        lookup = ParamSpec(
            "encoder.weight",
            (v, e),
            "embedding",
            True,
            fan_in=v,
            fan_out=e,
            columns_per_sample=float(self.tied),
            layer="encoder",
        )
        specs = [lookup]
        for k in range(self.layers):
            ih, hh, b_ih, b_hh = lstm.names(k)
            size = e if k == 0 else h
            layer, below = f"rnn.{k}", f"rnn.{k - 1}" if k else "encoder"
            specs += [
                ParamSpec(ih, (4 * h, size), "linear", True, gates, size, 4 * h, layer=layer, source=below),
                ParamSpec(hh, (4 * h, h), "recurrent", True, gates, h, 4 * h, layer=layer, source=layer),
                ParamSpec(b_ih, (4 * h,), "bias", blocks=gates, layer=layer),
                ParamSpec(b_hh, (4 * h,), "bias", blocks=gates, layer=layer),
            ]
        if not self.tied:
            source = f"rnn.{self.layers - 1}"
            specs.append(
                ParamSpec("decoder.weight", (v, h), "linear", True, fan_in=h, fan_out=v, layer="decoder", source=source)
            )
        specs.append(ParamSpec("decoder.bias", (v,), "bias", layer="decoder"))
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
            bound = self.hidden_size**-0.5 if name.startswith("rnn.") else self.init_scale
            if name == "decoder.bias":
                params[name] = np.zeros(spec.shape, dtype)
                continue
            params[name] = draw_uniform(generator(seed, f"init/{name}"), spec.shape, bound, dtype, supports.get(name))
        return params

    def zero_states(self, batch: int, dtype: Any) -> States:
        """Return the state before the first token."""
        return [lstm.zero_state(self.hidden_size, batch, dtype) for _ in range(self.layers)]

    def forward(
        self, params: Params, tokens: np.ndarray, states: States, draws: Draws | None = None
    ) -> tuple[np.ndarray, States, _Caches]:
        """Run everything but the decoder.

        Parameters
        ----------
        tokens : ndarray of int, shape (T, B)
        states : list of lstm.State
            Of the step before the window.
        draws : Draws, optional
            The step's random draws; without them nothing is dropped, as in evaluation.

        Returns
        -------
        features : ndarray, shape (T, H, B)
        states : list of lstm.State
            Of the window's last step.
        caches : tuple
            For backward.
        """

        def rng(stream: str) -> np.random.Generator | None:
            return draws(stream) if draws else None

        def drop(x: np.ndarray, p: float, where: str) -> tuple[np.ndarray, dropout.Cache]:
            return dropout.forward(x, p, locked=self.dropout_kind == "locked", rng=rng(f"dropout/{where}"))

        x, embedded = embedding.forward(
            params, "encoder.weight", tokens, dropout=self.dropout_embedding, rng=rng("dropout/embedding")
        )
        x, dropped = drop(x, self.dropout_input, "input")
        masks, traces, last = [dropped], [], []
        for k in range(self.layers):
            x, state, trace = lstm.forward(
                params, k, x, states[k], weight_drop=self.weight_drop, rng=rng(f"weight-drop/{k}")
            )
            last.append(state)
            traces.append(trace)
            final = k == self.layers - 1
            x, dropped = drop(
                x, self.dropout_output if final else self.dropout_hidden, "output" if final else f"hidden/{k}"
            )
            masks.append(dropped)
        return x, last, _Caches(embedded, masks, traces)

    def loss(self, params: Params, tokens: np.ndarray, targets: np.ndarray, states: States) -> tuple[float, States]:
        """Return the mean loss in nats over a window, and the state after it, without dropout."""
        features, states, _ = self.forward(params, tokens, states)
        loss, _ = cross_entropy.forward(params, self.decoder, "decoder.bias", features, targets)
        return loss, states

    def loss_and_grads(
        self, params: Params, tokens: np.ndarray, targets: np.ndarray, states: States, draws: Draws | None = None
    ) -> tuple[float, Grads, States]:
        """Return the mean loss over a window, its gradients, and the state after it.

        Parameters
        ----------
        tokens, targets : ndarray of int, shape (T, B)
        states : list of lstm.State
            A constant: gradients stop here.
        draws : Draws, optional
            The step's random draws; without them nothing is dropped.
        """
        grads: Grads = {}
        features, states, caches = self.forward(params, tokens, states, draws)
        loss, decoded = cross_entropy.forward(params, self.decoder, "decoder.bias", features, targets)
        dx = cross_entropy.backward(decoded, grads)
        for k in reversed(range(self.layers)):
            dx = dropout.backward(dx, caches.masks[k + 1])
            below = lstm.backward(dx, caches.traces[k], grads)
            assert below is not None
            dx = below
        embedding.backward(dropout.backward(dx, caches.masks[0]), caches.embedding, grads)
        return loss, grads, states

    def logits(self, params: Params, tokens: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """Return the scores (T, V, B) of the next word after each token, and the state after the window."""
        features, states, _ = self.forward(params, tokens, states)
        y, _ = linear.forward(params, self.decoder, "decoder.bias", features)
        return y, states


class _Caches(NamedTuple):
    embedding: embedding.Cache
    masks: list[dropout.Cache]
    traces: list[lstm.Cache]
