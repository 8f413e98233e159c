"""Removing dead units: a smaller model computes the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iss_cases import LM, NET, drawn, kill

from refimpl.methods.iss import ISS, dead_units
from refimpl.models.compact import compact
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.testing.quadratic import QuadraticModel
from refimpl.weights import SparseWeight, Support, values_of

EPS = np.finfo(float).eps


def check_compact_mlp(seed, dead, sparse):
    """Compare outputs to the bit: of small whole numbers every sum is exact, in any order."""
    rng = np.random.default_rng(seed)
    params = {name: rng.integers(-3, 4, spec.shape).astype(float) for name, spec in NET.specs().items()}
    if sparse:
        for name in [name for name, w in params.items() if w.ndim == 2]:
            params[name] = SparseWeight.from_dense(
                params[name], Support.from_mask(rng.random(params[name].shape) < 0.7)
            )
    kill(params, NET, [(f"layers.{k}", unit) for k, unit in dead])
    expected = dead_units(params, NET.specs())
    before = {name: np.array(values_of(w)) for name, w in params.items()}
    small, model = compact(params, NET)
    assert all(np.array_equal(values_of(params[name]), before[name]) for name in params)
    hidden = [max(1, 4 - expected["layers.0"].size), max(1, 3 - expected["layers.1"].size)]
    assert model.sizes == (5, *hidden, 2)
    assert {name: w.shape for name, w in small.items()} == {name: s.shape for name, s in model.specs().items()}
    x = rng.integers(-3, 4, (5, 6)).astype(float)
    assert np.array_equal(model.logits(small, x), NET.logits(params, x))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)).filter(lambda u: u != (1, 3))),
    st.booleans(),
)
def test_a_compact_perceptron_computes_the_same(seed, dead, sparse):
    check_compact_mlp(seed, dead, sparse)


def compact_lm(model, dead, seed=0, sparse=False):
    rng = np.random.default_rng(seed)
    params = drawn(model, seed, sparse)
    for weight in params.values():
        values_of(weight)[...] *= 0.5
    if model.tied:
        specs = model.specs() | {"encoder.weight": replace(model.specs()["encoder.weight"], source="rnn.1")}
        for layer, unit in dead:
            for name, spec in specs.items():
                if spec.kind == "bias":
                    continue
                w = params[name]
                if spec.layer == layer:
                    w[unit :: model.hidden_size] = 0
                if spec.source == layer:
                    w[:, unit] = 0
    else:
        kill(params, model, dead)
    small, smaller = compact(params, model)
    tokens = rng.integers(0, model.vocabulary, (3, 2))
    ours, _ = smaller.logits(small, tokens, smaller.zero_states(2, np.float64))
    theirs, _ = model.logits(params, tokens, model.zero_states(2, np.float64))
    # A pre-activation sums up to 12 products of numbers below 2; sigmoid and tanh have slopes of at most 1, and three
    # steps of two layers multiply an error by the weights' row sums (below 8) each: 12 eps 2 * 8^3 * 2, and a decoder.
    assert np.abs(ours - theirs).max() <= 12 * EPS * 2 * 8**3 * 2 * 8
    assert {name: w.shape for name, w in small.items()} == {name: s.shape for name, s in smaller.specs().items()}
    return small, smaller


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compact_language_model_computes_the_same(sparse):
    dead = [("rnn.0", 1), ("rnn.0", 2), ("rnn.1", 0)]
    _, smaller = compact_lm(LM, dead, sparse=sparse)
    assert smaller == replace(LM, hidden_size=3)  # the layer with the most units alive decides
    _, smaller = compact_lm(LM, [*dead, ("rnn.1", 3)], sparse=sparse)
    assert smaller.hidden_size == 2
    _, smaller = compact_lm(LM, dead[:2], sparse=sparse)
    assert smaller == LM


def test_a_tied_model_becomes_narrower_with_its_embedding():
    tied = LanguageModel(7, 4, 4, layers=2, tied=True)
    small, smaller = compact_lm(tied, [("rnn.0", 1), ("rnn.0", 3), ("rnn.1", 2)])
    assert (smaller.embedding_size, smaller.hidden_size) == (3, 3)
    assert small["encoder.weight"].shape == (7, 3)


def test_what_iss_takes_out_becomes_small_and_dense():
    params = drawn(LM, 6)
    dead = [("rnn.0", 1), ("rnn.1", 0)]
    kill(params, LM, dead)
    method = ISS()
    method.supports(LM.specs(), seed=0)
    for name, exchange in method.exchange(params, step=1, seed=0).items():
        params[name] = SparseWeight(exchange.new, exchange.carry(params[name].reshape(-1)))
    assert isinstance(params["decoder.weight"], SparseWeight)
    small, model = compact(params, LM)
    assert model.hidden_size == 3
    assert all(isinstance(w, np.ndarray) for w in small.values())


def test_nothing_dead_is_a_copy():
    params = drawn(NET, 0)
    small, model = compact(params, NET)
    assert model == NET
    for name in params:
        assert np.array_equal(params[name], small[name])
        assert not np.shares_memory(params[name], small[name])
    linear = MLP((3, 2))
    small, model = compact(drawn(linear, 0), linear)
    assert model == linear


def test_other_parameters_and_models_are_refused():
    with pytest.raises(ValueError, match="not those of the model"):
        compact(drawn(NET, 0), LM)
    with pytest.raises(ValueError, match="QuadraticModel"):
        compact({}, QuadraticModel())


def test_units_of_which_only_the_columns_are_zero_stay():
    """Pruning by columns alone would take out units that still hear: compact keeps what is not dead as a whole."""
    params = drawn(NET, 0)
    params["layers.1.weight"][:, 2] = 0
    assert compact(params, NET)[1] == NET
    assert dead_units(params, NET.specs())["layers.0"].size == 0
