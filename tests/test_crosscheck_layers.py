"""Layers and the language model against torch, in float64, weights copied by name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from refimpl import kernels
from refimpl.layers import cross_entropy, embedding, lstm
from refimpl.models.language_model import LanguageModel
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, SparseWeight, Support

torch = pytest.importorskip("torch")


@pytest.fixture(params=kernels.TIERS, autouse=True, scope="module")
def _tier(request: pytest.FixtureRequest) -> Iterator[None]:
    threads, ours = torch.get_num_threads(), kernels.threads.get()
    torch.set_num_threads(1)
    kernels.threads.set_count(1)
    with kernels.use(request.param):
        yield
    torch.set_num_threads(threads)
    kernels.threads.set_count(ours)


def close(ours: Any, theirs: Any, what: str, relative: float = 1e-12) -> None:
    """Compare with the greatest number of the tensor as the scale."""
    expected = theirs.detach().numpy()
    scale = float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=relative * scale, err_msg=what)


def dense(params: Params) -> dict[str, np.ndarray]:
    return {name: w.dense() if isinstance(w, SparseWeight) else w for name, w in params.items()}


def tensors(params: Params) -> dict[str, Any]:
    return {name: torch.tensor(w, requires_grad=True) for name, w in dense(params).items()}


def compare_gradients(grads: Grads, params: Params, theirs: dict[str, Any], relative: float) -> None:
    """Compare in full, and on the supports of what is sparse."""
    assert grads.keys() == theirs.keys()
    for name, gradient in grads.items():
        if isinstance(gradient, np.ndarray):
            close(gradient, theirs[name], name, relative)
            continue
        close(gradient.dense(), theirs[name], name, relative)
        weight = params[name]
        if isinstance(weight, SparseWeight):
            on = theirs[name].reshape(-1)[torch.tensor(weight.support.flat)]
            close(gradient.on(weight.support), on, f"{name} on its support", relative)


def sparsened(params: Params, rng: np.random.Generator) -> Params:
    return {
        name: SparseWeight.from_dense(w, Support.from_mask(rng.random(w.shape) < 0.4))
        if isinstance(w, np.ndarray) and w.ndim == 2 else w
        for name, w in params.items()
    }  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("inputs", "hidden", "steps", "batch"), [(1, 1, 1, 1), (3, 4, 5, 3), (7, 5, 4, 2)])
def test_lstm(inputs: int, hidden: int, steps: int, batch: int, sparse: bool) -> None:
    """Two layers over two windows, with carried state that is a constant of the second window."""
    rng = np.random.default_rng(hidden)
    theirs = torch.nn.LSTM(inputs, hidden, num_layers=2).double()
    params: Params = {f"rnn.{n}": rng.uniform(-1, 1, tuple(p.shape)) for n, p in theirs.named_parameters()}
    if sparse:
        params = sparsened(params, rng)
    theirs.load_state_dict({n.removeprefix("rnn."): torch.tensor(w) for n, w in dense(params).items()})
    states = [lstm.State(*rng.uniform(-1, 1, (2, hidden, batch))) for _ in range(2)]
    h, c = (torch.tensor(np.stack([s[k].T for s in states])) for k in (0, 1))
    for window in range(2):
        x, dy = rng.standard_normal((steps, inputs, batch)), rng.standard_normal((steps, hidden, batch))
        x_torch = torch.tensor(x.transpose(0, 2, 1).copy(), requires_grad=True)
        theirs.zero_grad()
        y_torch, (h, c) = theirs(x_torch, (h.detach(), c.detach()))
        y_torch.backward(torch.tensor(dy.transpose(0, 2, 1).copy()))

        y, caches = x, []
        for k in range(2):
            y, states[k], cache = lstm.forward(params, k, y, states[k])
            caches.append(cache)
        grads: Grads = {}
        d: Any = dy
        for cache in reversed(caches):
            d = lstm.backward(d, cache, grads)
        close(y.transpose(0, 2, 1), y_torch, f"output of window {window}")
        for k in range(2):
            close(states[k].h.T, h[k], f"h of layer {k}")
            close(states[k].c.T, c[k], f"c of layer {k}")
        close(d.transpose(0, 2, 1), x_torch.grad, "gradient of the input")
        compare_gradients(grads, params, {f"rnn.{n}": p.grad for n, p in theirs.named_parameters()}, 1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    params: Params = {"w": rng.standard_normal((9, 4))}
    if sparse:
        params = sparsened(params, rng)
    tokens, dx = rng.integers(0, 9, (4, 2)), rng.standard_normal((4, 4, 2))
    theirs = torch.nn.Embedding(9, 4, _weight=torch.tensor(dense(params)["w"]))
    y = theirs(torch.tensor(tokens))
    y.backward(torch.tensor(dx.transpose(0, 2, 1).copy()))
    x, cache = embedding.forward(params, "w", tokens)
    grads: Grads = {}
    embedding.backward(dx, cache, grads)
    np.testing.assert_array_equal(x.transpose(0, 2, 1), y.detach().numpy())
    compare_gradients(grads, params, {"w": theirs.weight.grad}, 1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_cross_entropy(sparse: bool, tied: bool, size: float) -> None:
    """Decoder and loss on features that, when tied, come from the decoder's own rows."""
    rng = np.random.default_rng(1)
    params: Params = {"w": rng.standard_normal((11, 3)), "b": rng.standard_normal(11)}
    if sparse:
        params = sparsened(params, rng)
    tokens, targets = rng.integers(0, 11, (2, 4, 2))
    x = size * rng.standard_normal((4, 3, 2))
    weights = tensors(params)
    x_torch = torch.tensor(x.transpose(0, 2, 1).copy(), requires_grad=True)
    functional = torch.nn.functional
    features = x_torch + functional.embedding(torch.tensor(tokens), weights["w"]) if tied else x_torch
    logits = functional.linear(features, weights["w"], weights["b"])
    theirs = functional.cross_entropy(logits.reshape(-1, 11), torch.tensor(targets.reshape(-1)))
    theirs.backward()

    looked_up, cache = embedding.forward(params, "w", tokens)
    loss, decoded = cross_entropy.forward(params, "w", "b", x + looked_up if tied else x, targets)
    grads: Grads = {}
    dx = cross_entropy.backward(decoded, grads)
    if tied:
        embedding.backward(dx, cache, grads)
    assert loss == pytest.approx(theirs.item(), rel=1e-12)
    # A logit of some hundreds is right to some hundred roundings, and so is then the logarithm of a probability.
    close(dx.transpose(0, 2, 1), x_torch.grad, "gradient of the features", 1e-12)
    compare_gradients(grads, params, {name: w.grad for name, w in weights.items()}, 1e-12)


def state_dict_model(model: LanguageModel, params: Params) -> Any:
    """Build the same model of torch's modules; its state dict has our names."""

    class Model(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            e, h = model.embedding_size, model.hidden_size
            self.encoder = torch.nn.Embedding(model.vocabulary, e)
            self.rnn = torch.nn.LSTM(e, h, model.layers)
            self.decoder = torch.nn.Linear(h, model.vocabulary)
            if model.tied:
                self.decoder.weight = self.encoder.weight

        def forward(self, tokens: Any, targets: Any, state: Any) -> Any:
            y, state = self.rnn(self.encoder(tokens), state)
            logits = self.decoder(y).reshape(-1, model.vocabulary)
            return torch.nn.functional.cross_entropy(logits, targets.reshape(-1)), state

    theirs = Model().double()
    weights = {name: torch.tensor(w) for name, w in dense(params).items()}
    if model.tied:
        weights["decoder.weight"] = weights["encoder.weight"]
    theirs.load_state_dict(weights, strict=True)
    return theirs


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_language_model(layers: int, tied: bool, sparse: bool) -> None:
    """Loss, every gradient and the state, over three windows with carried state."""
    rng = np.random.default_rng(layers)
    model = LanguageModel(13, 4 if tied else 3, 4, layers, tied)
    params: Params = {name: rng.uniform(-1, 1, spec.shape) for name, spec in model.specs().items()}
    if sparse:
        params = sparsened(params, rng)
    theirs = state_dict_model(model, params)
    states = model.zero_states(2, float)
    h = c = torch.zeros((layers, 2, 4), dtype=torch.float64)
    for _ in range(3):
        tokens, targets = rng.integers(0, 13, (2, 4, 2))
        theirs.zero_grad()
        expected, (h, c) = theirs(torch.tensor(tokens), torch.tensor(targets), (h.detach(), c.detach()))
        expected.backward()
        loss, grads, states = model.loss_and_grads(params, tokens, targets, states)
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        for k, state in enumerate(states):
            close(state.h.T, h[k], f"h of layer {k}", 1e-10)
            close(state.c.T, c[k], f"c of layer {k}", 1e-10)
        compare_gradients(grads, params, {n: p.grad for n, p in theirs.named_parameters()}, 1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["plain", "locked"])
@pytest.mark.parametrize("tied", [False, True])
def test_language_model_with_dropout(tied: bool, kind: Any, sparse: bool) -> None:
    """The masks of one step, given to a model of torch's cells and left to its autograd."""
    rng = np.random.default_rng(3)
    model = LanguageModel(
        13, 4, 4, 2, tied, dropout_kind=kind, dropout_embedding=0.2, dropout_input=0.3, dropout_hidden=0.4,
        dropout_output=0.5, weight_drop=0.3,
    )  # fmt: skip
    params: Params = {name: rng.uniform(-1, 1, spec.shape) for name, spec in model.specs().items()}
    if sparse:
        params = sparsened(params, rng)
    tokens, targets = rng.integers(0, 13, (2, 4, 2))
    states = [lstm.State(*rng.uniform(-1, 1, (2, 4, 2))) for _ in range(2)]
    loss, grads, _ = model.loss_and_grads(params, tokens, targets, states, Draws(0, 1))
    _, _, caches = model.forward(params, tokens, states, Draws(0, 1))

    weights = tensors(params)
    words = torch.tensor(caches.embedding.scale.transpose(0, 2, 1))  # type: ignore[union-attr]
    x = torch.nn.functional.embedding(torch.tensor(tokens), weights["encoder.weight"]) * words

    def masked(x: Any, mask: Any) -> Any:
        return x * torch.tensor(np.broadcast_to(mask, (4, 4, 2)).transpose(0, 2, 1).copy())

    x = masked(x, caches.masks[0])
    for k, (trace, state) in enumerate(zip(caches.traces, states, strict=True)):
        ih, hh, b_ih, b_hh = (weights[name] for name in lstm.names(k))
        entries = np.zeros(hh.shape)
        weight = params[lstm.names(k)[1]]
        where = weight.support.mask() if isinstance(weight, SparseWeight) else np.ones(hh.shape, bool)
        assert trace.dropped is not None
        entries[where] = trace.dropped.reshape(-1)
        entries[~where] = 1  # zeros of the weight: their gradient is that of the product
        dropped = hh * torch.tensor(entries)
        h, c, outputs = torch.tensor(state.h.T.copy()), torch.tensor(state.c.T.copy()), []
        for t in range(4):
            h, c = torch.lstm_cell(x[t], (h, c), ih, dropped, b_ih, b_hh)
            outputs.append(h)
        x = masked(torch.stack(outputs), caches.masks[k + 1])
    logits = torch.nn.functional.linear(x, weights[model.decoder], weights["decoder.bias"])
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 13), torch.tensor(targets.reshape(-1)))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    compare_gradients(grads, params, {name: w.grad for name, w in weights.items()}, 1e-10)
