"""The LSTM language model: its loss and every gradient as one layer, dropout, carried state, initial values."""

from typing import Any

import numpy as np
import pytest

from refimpl.layers import cross_entropy
from refimpl.models.language_model import LanguageModel, States
from refimpl.rng import Draws
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, SparseWeight, Support, add_to, values_of

EPS = float(np.finfo(float).eps)
DROPOUT: dict[str, float] = {
    "dropout_embedding": 0.2, "dropout_input": 0.3, "dropout_hidden": 0.4, "dropout_output": 0.5,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("tier")


def draw_states(rng: np.random.Generator, model: LanguageModel, batch: int) -> States:
    states = model.zero_states(batch, float)
    for state in states:
        for array in state:
            array[...] = rng.uniform(-1, 1, array.shape)
    return states


def draw_params(rng: np.random.Generator, model: LanguageModel, density: float | None = None) -> Params:
    """Draw numbers of order one, where the model's own would leave most gradients small."""
    params: Params = {}
    for name, spec in model.specs().items():
        w = rng.uniform(-1, 1, spec.shape)
        params[name] = w
        if density is not None and spec.prunable:
            params[name] = SparseWeight.from_dense(w, Support.from_mask(rng.random(w.shape) < density))
    return params


def make_model(
    rng: np.random.Generator,
    *,
    layers: int,
    tied: bool,
    columns: tuple[int, int],
    dropout_kind: Any = "plain",
    options: dict[str, Any],
) -> Layer:
    model = LanguageModel(5, 3 if tied else 2, 3, layers, tied, dropout_kind=dropout_kind, **options)
    tokens, targets = rng.integers(0, 5, (2, *columns))
    states = draw_states(rng, model, columns[1])

    draws = Draws(0, 9) if options else None

    def forward(params: Params) -> tuple[float, tuple[Params, float]]:
        features, _, _ = model.forward(params, tokens, states, draws)
        loss, _ = cross_entropy.forward(params, model.decoder, "decoder.bias", features, targets)
        return loss, (params, loss)

    def backward(dy: float, cache: tuple[Params, float], grads: Grads, input_gradient: bool) -> None:
        params, loss = cache
        same, own, _ = model.loss_and_grads(params, tokens, targets, states, draws)
        assert same == loss
        for name, gradient in own.items():
            add_to(grads, name, gradient)

    sparse = tuple(name for name, spec in model.specs().items() if spec.prunable)
    same_draws = "weight_drop" not in options
    return Layer(forward, backward, draw_params(rng, model), sparse=sparse, same_draws=same_draws)


# Few different panel widths, because the compiled tier makes one kernel for each.
COLUMNS = [(1, 1), (2, 2), (4, 1), (4, 2), (3, 2)]


def test_every_gradient() -> None:
    sizes: dict[str, Any] = {"layers": [1, 2, 3], "tied": [False, True], "columns": COLUMNS, "options": [{}]}
    check_layer(make_model, sizes, max_examples=6)


def test_every_gradient_with_dropout() -> None:
    sizes: dict[str, Any] = {
        "layers": [1, 2], "tied": [False, True], "columns": COLUMNS, "dropout_kind": ["plain", "locked"],
        "options": [DROPOUT, {"weight_drop": 0.5}, {**DROPOUT, "weight_drop": 0.3}],
    }  # fmt: skip
    check_layer(make_model, sizes, max_examples=8)


def setting(seed: int = 0, **options: Any) -> tuple[LanguageModel, np.random.Generator, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    model = LanguageModel(**{"vocabulary": 7, "embedding_size": 3, "hidden_size": 3, "layers": 2, **options})
    tokens, targets = rng.integers(0, 7, (2, 4, 2))
    return model, rng, tokens, targets


@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_that_of_the_logits(tied: bool, density: float | None) -> None:
    model, rng, tokens, targets = setting(tied=tied)
    params, states = draw_params(rng, model, density), draw_states(rng, model, 2)
    loss, end = model.loss(params, tokens, targets, states)
    trained, grads, same_end = model.loss_and_grads(params, tokens, targets, states)
    z, _ = model.logits(params, tokens, states)
    assert trained == loss
    assert grads.keys() == params.keys()
    for a, b in zip(end, same_end, strict=True):
        np.testing.assert_array_equal(a.h, b.h)
        np.testing.assert_array_equal(a.c, b.c)
    chosen = np.take_along_axis(z, targets[:, None, :], axis=1)[:, 0]
    by_hand = np.mean(np.log(np.exp(z).sum(axis=1)) - chosen)
    # Numbers of order one: a few roundings for each of the seven words and the logarithm.
    assert abs(loss - by_hand) <= 32 * EPS * max(1, np.abs(z).max())


@pytest.mark.parametrize("density", [None, 0.5])
def test_state_is_carried(density: float | None) -> None:
    """Two windows see what one long window sees; their losses average to its loss."""
    model, rng, tokens, targets = setting(seed=1)
    params, states = draw_params(rng, model, density), draw_states(rng, model, 2)
    whole, end = model.loss(params, tokens, targets, states)
    first, middle = model.loss(params, tokens[:2], targets[:2], states)
    second, last = model.loss(params, tokens[2:], targets[2:], middle)
    # Two layers of four steps, some 20 roundings each.
    assert abs((first + second) / 2 - whole) <= 160 * EPS
    for a, b in zip(end, last, strict=True):
        np.testing.assert_allclose(b.h, a.h, rtol=0, atol=160 * EPS)
        np.testing.assert_allclose(b.c, a.c, rtol=0, atol=160 * EPS)


@pytest.mark.parametrize("kind", ["plain", "locked"])
def test_draws(kind: Any) -> None:
    """A step's draws can be drawn again; another step's are others; without draws nothing is dropped."""
    model, rng, tokens, targets = setting(seed=2, dropout_kind=kind, weight_drop=0.3, **DROPOUT)
    plain, *_ = setting(seed=2)
    params, states = draw_params(rng, model), draw_states(rng, model, 2)

    def loss(m: LanguageModel, draws: Draws | None) -> float:
        return m.loss_and_grads(params, tokens, targets, states, draws)[0]

    assert loss(model, Draws(3, 4)) == loss(model, Draws(3, 4))
    assert len({loss(model, draws) for draws in (Draws(3, 4), Draws(3, 5), Draws(4, 4), None)}) == 4
    assert loss(model, None) == loss(plain, None) == loss(plain, Draws(3, 4))
    assert loss(model, None) == model.loss(params, tokens, targets, states)[0]


@pytest.mark.parametrize("option", [*DROPOUT, "weight_drop"])
def test_each_dropout_matters(option: str) -> None:
    model, rng, tokens, targets = setting(seed=3, **{option: 0.5})
    plain, *_ = setting(seed=3)
    params, states = draw_params(rng, model), draw_states(rng, model, 2)
    losses = {
        m.loss_and_grads(params, tokens, targets, states, Draws(0, step))[0] for m in (model, plain) for step in (0, 1)
    }
    assert len(losses) == 3  # two of the model with dropout, one of the other


def test_locked_dropout_uses_one_mask_in_a_window() -> None:
    model, rng, tokens, _ = setting(seed=4, dropout_kind="locked", **DROPOUT)
    _, _, caches = model.forward(draw_params(rng, model), tokens, model.zero_states(2, float), Draws(0, 0))
    assert all(mask is not None and mask.shape == (3, 2) for mask in caches.masks)
    drawn = [mask.tobytes() for mask in caches.masks if mask is not None]
    assert len(set(drawn)) == len(drawn) == 3  # before, between and after the layers, each its own


@pytest.mark.parametrize("tied", [False, True])
def test_specs_and_initial_values(tied: bool) -> None:
    model = LanguageModel(40, 16, 16, tied=tied)
    specs, params = model.specs(), model.init(5, np.float32)
    assert list(specs) == list(params)
    assert ("decoder.weight" in specs) is not tied
    for name, spec in specs.items():
        w = values_of(params[name])
        assert w.shape == spec.shape
        assert w.dtype == np.float32
        assert spec.prunable is (w.ndim == 2)
        bound = 0.0 if name == "decoder.bias" else 0.25 if name.startswith("rnn.") else 0.1
        assert np.abs(w).max() <= np.float32(bound)
        if bound:  # uniform: its standard deviation is bound / sqrt(3); 64 numbers or more
            assert 0.7 * bound / 3**0.5 < w.std() < 1.3 * bound / 3**0.5
    again, other = model.init(5, np.float32), model.init(6, np.float32)
    assert all(np.array_equal(values_of(params[n]), values_of(again[n])) for n in specs)
    assert not np.array_equal(values_of(params["encoder.weight"]), values_of(other["encoder.weight"]))
    blocks = specs["rnn.weight_hh_l1"].blocks
    assert {gate: (part.start, part.stop) for gate, part in blocks.items()} == {
        "i": (0, 16), "f": (16, 32), "g": (32, 48), "o": (48, 64),
    }  # fmt: skip


def test_initial_values_of_a_sparse_weight() -> None:
    """Only values that exist are drawn; on a full support they are the dense ones."""
    model = LanguageModel(9, 4, 4)
    dense = model.init(1, float)
    full = model.init(1, float, {name: Support.full(w.shape) for name, w in dense.items() if name != "decoder.bias"})
    for name, w in dense.items():
        np.testing.assert_array_equal(values_of(full[name]).reshape(w.shape), w)
    few = Support((16, 4), [3, 17, 60])
    sparse = model.init(1, float, {"rnn.weight_hh_l0": few})["rnn.weight_hh_l0"]
    assert isinstance(sparse, SparseWeight)
    assert sparse.support is few
    assert isinstance(model.init(1, float)["rnn.weight_hh_l0"], np.ndarray)


def test_a_tied_decoder_needs_equal_sizes() -> None:
    with pytest.raises(ValueError, match="they are 3 and 4"):
        LanguageModel(5, 3, 4, tied=True)
