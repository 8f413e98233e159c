"""The LSTM language model of the Selfish-RNN experiments: embedding, stacked LSTM, decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.layers import cross_entropy, dropout, embedding, linear, lstm
from refimpl.rng import Draws, generator
from refimpl.weights import Grads, LinearGrad, Params, ParamSpec, Support, add_to, draw_uniform, values_of

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
            source=f"rnn.{self.layers - 1}" if self.tied else "",
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

    def begin(self, batch: int, dtype: Any) -> States:
        """Return the state before the first token."""
        return self.zero_states(batch, dtype)

    def next_epoch(self, carried: States) -> States:
        """Return the state before the first token: an epoch reads the text from its beginning."""
        return self.zero_states(carried[0].h.shape[1], carried[0].h.dtype)

    def evaluated(self, params: Params, carried: States) -> Params:
        """Return the parameters alone: evaluation reads texts of its own, from their beginning."""
        return params

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

    def flow(self, params: Params, *, steps: int = 2) -> tuple[float, Grads]:
        r"""Return the flow R of the linear network of the weights and its gradients, as SynFlow needs them.

        SynFlow is published for feed-forward networks. This is the definition for this model: every token is read at
        once, the four gates of a layer are added instead of combined, nothing is squashed, biases are left out, and
        the outputs of all time steps are added:

        .. math::
            x_t = W_e^\top 1, \qquad
            h_t = \sum_{g \in \{i, f, g, o\}} \bigl(W_{ih}^g x_t + W_{hh}^g h_{t-1}\bigr), \quad h_0 = 0, \qquad
            R = \sum_{t=1}^{T} 1^\top W_d\, h_t^{(L)}

        A path passes the embedding, each :math:`W_{ih}` and the decoder once, a :math:`W_{hh}` up to T − 1 times.
        For magnitudes therefore :math:`\sum w \odot \partial R / \partial w` is R for each of the former (2R for a tied
        embedding), and at most (T − 1) R for :math:`W_{hh}`.

        Parameters
        ----------
        params : Params
            Dense or sparse; biases are not read. Float64: R grows with the product of all sizes.
        steps : int
            T; two are the fewest that let the recurrent weights carry flow.

        Returns
        -------
        flow : float
            R.
        grads : Grads
            Of the weights.
        """
        size, encoder = self.hidden_size, params["encoder.weight"]
        ones = np.ones((self.vocabulary, 1), values_of(encoder).dtype)
        x = np.stack([kernels.matmul_t(encoder, ones)] * steps)  # (T, E, 1)
        inputs, before = [], []
        for k in range(self.layers):
            ih, hh, *_ = lstm.names(k)
            driven = kernels.matmul(params[ih], x)  # (T, 4H, 1)
            h = np.zeros((steps + 1, size, 1), ones.dtype)
            for t in range(steps):
                gates = driven[t] + kernels.matmul(params[hh], h[t])
                h[t + 1] = gates.reshape(len(lstm.GATES), size, 1).sum(axis=0)
            inputs.append(x)
            before.append(h[:-1])
            x = h[1:]
        y, cache = linear.forward(params, self.decoder, None, x)

        grads: Grads = {}
        dy = linear.backward(np.ones(y.shape, ones.dtype), cache, grads)
        assert dy is not None
        for k in reversed(range(self.layers)):
            ih, hh, *_ = lstm.names(k)
            d_gates = np.empty((steps, len(lstm.GATES) * size, 1), ones.dtype)
            later = np.zeros((size, 1), ones.dtype)
            for t in reversed(range(steps)):
                d_gates[t] = np.tile(dy[t] + later, (len(lstm.GATES), 1))
                later = kernels.matmul_t(params[hh], d_gates[t])
            add_to(grads, ih, LinearGrad(params[ih].shape, d_gates, inputs[k]))
            add_to(grads, hh, LinearGrad(params[hh].shape, d_gates, before[k]))
            dy = kernels.matmul_t(params[ih], d_gates)
        add_to(grads, "encoder.weight", LinearGrad(encoder.shape, ones, dy.sum(axis=0)))
        return float(y.sum()), grads

    def logits(self, params: Params, tokens: np.ndarray, states: States) -> tuple[np.ndarray, States]:
        """Return the scores (T, V, B) of the next word after each token, and the state after the window."""
        features, states, _ = self.forward(params, tokens, states)
        y, _ = linear.forward(params, self.decoder, "decoder.bias", features)
        return y, states


class _Caches(NamedTuple):
    embedding: embedding.Cache
    masks: list[dropout.Cache]
    traces: list[lstm.Cache]
