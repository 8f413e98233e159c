"""The flow of the linear network of the weights: against torch, and the laws of conservation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.weights import Grads, LinearGrad, Params, SparseWeight, Support, add_to

EPS = float(np.finfo(float).eps)

pytestmark = pytest.mark.usefixtures("tier")

MLPS = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(lambda sizes: MLP(tuple(sizes)))
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def language_models(draw: Any) -> LanguageModel:
    """Draw a small language model."""
    tied, hidden = draw(st.booleans()), draw(st.integers(1, 5))
    embedding = hidden if tied else draw(st.integers(1, 5))
    return LanguageModel(draw(st.integers(1, 7)), embedding, hidden, draw(st.integers(1, 3)), tied)


def draw_params(model: Any, seed: int, *, magnitudes: bool) -> tuple[Params, dict[str, np.ndarray]]:
    """Return parameters, about half of them sparse, and the same ones as dense arrays."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    dense = {}
    for name, spec in model.specs().items():
        w = rng.uniform(0 if magnitudes else -1, 1, spec.shape)
        params[name] = w
        if spec.prunable and rng.random() < 0.6:
            mask = rng.random(spec.shape) < rng.choice([0.3, 0.9])
            params[name], w = SparseWeight.from_dense(w, Support.from_mask(mask)), w * mask
        dense[name] = w
    return params, dense


def weights_of(model: Any) -> list[str]:
    return [name for name, spec in model.specs().items() if spec.prunable]


def evaluated(grads: Grads) -> dict[str, np.ndarray]:
    return {name: g if isinstance(g, np.ndarray) else g.dense() for name, g in grads.items()}


def torch_flow(model: Any, dense: dict[str, np.ndarray], steps: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return R and its gradients by automatic differentiation of the definition, one product at a time."""
    torch = pytest.importorskip("torch")
    w = {name: torch.tensor(dense[name], requires_grad=True) for name in weights_of(model)}
    if isinstance(model, MLP):
        x = torch.ones(model.sizes[0], dtype=torch.float64)
        for name in w:
            x = w[name] @ x
        total = x.sum()
    else:
        xs = [w["encoder.weight"].sum(0)] * steps
        for k in range(model.layers):
            h, out = torch.zeros(model.hidden_size, dtype=torch.float64), []
            for x in xs:
                h = sum((w[f"rnn.weight_ih_l{k}"] @ x + w[f"rnn.weight_hh_l{k}"] @ h).chunk(4))
                out.append(h)
            xs = out
        total = sum((w[model.decoder] @ x).sum() for x in xs)
    total.backward()
    return float(total.detach()), {name: own.grad.numpy() for name, own in w.items()}


def operations(model: Any, steps: int) -> int:
    """Return a bound of the roundings on the way of one term of R, or of one of its derivatives: there and back."""
    if isinstance(model, MLP):
        return 2 * sum(n + 1 for n in model.sizes)
    width = model.vocabulary + model.embedding_size + 5 * model.hidden_size + 8
    return 2 * (model.layers * steps + 2) * (width + steps)


def check_against_torch(model: Any, seed: int, steps: int = 2, flow: Any = None) -> None:
    """Compare R and its gradients with torch's; the error is bounded by the roundings times the flow of magnitudes."""
    params, dense = draw_params(model, seed, magnitudes=False)
    flow = flow or (lambda p: model.flow(p) if isinstance(model, MLP) else model.flow(p, steps=steps))
    total, grads = flow(params)
    found = evaluated(grads)
    expected, wanted = torch_flow(model, dense, steps)
    gauge, gauges = torch_flow(model, {name: np.abs(w) for name, w in dense.items()}, steps)
    unit = 2 * operations(model, steps) * EPS
    assert abs(total - expected) <= unit * gauge
    assert found.keys() == wanted.keys()
    for name, own in found.items():
        assert own.shape == wanted[name].shape
        assert (np.abs(own - wanted[name]) <= unit * gauges[name]).all(), name


@given(MLPS, SEEDS)
def test_mlp_against_torch(model: MLP, seed: int) -> None:
    check_against_torch(model, seed)


@settings(max_examples=60)
@given(language_models(), SEEDS, st.integers(1, 4))
def test_language_model_against_torch(model: LanguageModel, seed: int, steps: int) -> None:
    check_against_torch(model, seed, steps)


def check_conservation(model: Any, seed: int, steps: int = 2, flow: Any = None) -> None:
    """Check that R flows through every layer, and that what enters a hidden unit leaves it."""
    params, dense = draw_params(model, seed, magnitudes=True)
    flow = flow or (lambda p: model.flow(p) if isinstance(model, MLP) else model.flow(p, steps=steps))
    total, grads = flow(params)
    scores = {name: dense[name] * own for name, own in evaluated(grads).items()}
    slack = 4 * operations(model, steps) * EPS * total  # nothing cancels: all terms are of one sign
    if isinstance(model, MLP):
        for name in weights_of(model):
            assert abs(scores[name].sum() - total) <= slack, name
        for below, above in zip(weights_of(model), weights_of(model)[1:], strict=False):
            assert (np.abs(scores[below].sum(axis=1) - scores[above].sum(axis=0)) <= slack).all()
        return
    for name, spec in model.specs().items():
        if spec.kind == "recurrent":
            assert scores[name].sum() <= (steps - 1) * total + slack
        elif spec.prunable:
            passes = 2 if model.tied and name == "encoder.weight" else 1
            assert abs(scores[name].sum() - passes * total) <= passes * slack, name


@given(MLPS, SEEDS)
def test_conservation_in_an_mlp(model: MLP, seed: int) -> None:
    check_conservation(model, seed)


@settings(max_examples=60)
@given(language_models(), SEEDS, st.integers(1, 4))
def test_conservation_in_a_language_model(model: LanguageModel, seed: int, steps: int) -> None:
    check_conservation(model, seed, steps)


def test_a_path_by_hand() -> None:
    """One unit everywhere: R = e (4w) d + e (4w) (1 + 4u) d, and each derivative can be read off."""
    model = LanguageModel(1, 1, 1, 1)
    e, w, u, d = 2.0, 3.0, 5.0, 7.0
    params: Params = {"encoder.weight": np.array([[e]]), "decoder.weight": np.array([[d]])}
    params |= {"rnn.weight_ih_l0": np.full((4, 1), w), "rnn.weight_hh_l0": np.full((4, 1), u)}
    total, grads = model.flow(params)
    assert total == e * 4 * w * d * (2 + 4 * u)
    found = evaluated(grads)
    assert found["encoder.weight"] == total / e
    assert found["decoder.weight"] == total / d
    assert (found["rnn.weight_ih_l0"] == total / w / 4).all()
    assert (found["rnn.weight_hh_l0"] == e * 4 * w * d).all()
    _, alone = model.flow(params, steps=1)
    assert (evaluated(alone)["rnn.weight_hh_l0"] == 0).all()


def test_types_are_the_weights_own() -> None:
    for model in (MLP((3, 4, 2)), LanguageModel(5, 3, 4, 2)):
        params = model.init(0, np.float32)
        assert all(own.dtype == np.float32 for own in evaluated(model.flow(params)[1]).values())
        assert set(model.flow(params)[1]) == set(weights_of(model))


# --- planted mistakes ----------------------------------------


def last_step_only(model: LanguageModel, params: Params) -> tuple[float, Grads]:
    total, grads = model.flow(params)
    parts = {name: g for name, g in grads.items() if isinstance(g, LinearGrad)}
    for name, g in parts.items():
        if g.dy.ndim == 3:
            grads[name] = LinearGrad(g.shape, np.ascontiguousarray(g.dy[-1]), np.ascontiguousarray(g.x[-1]))
    return total, grads


def first_gate_only(model: LanguageModel, params: Params) -> tuple[float, Grads]:
    total, grads = model.flow(params)
    for name, g in grads.items():
        if name.startswith("rnn.") and isinstance(g, LinearGrad):
            dy = g.dy.copy()
            dy[:, model.hidden_size :] = 0
            grads[name] = LinearGrad(g.shape, dy, g.x)
    return total, grads


def with_biases(model: MLP, params: Params) -> tuple[float, Grads]:
    x, activities = np.ones((model.sizes[0], 1)), []
    for k in range(model.layers):
        activities.append(x)
        x = params[f"layers.{k}.weight"] @ x + params[f"layers.{k}.bias"][:, None]  # type: ignore[index]
    grads: Grads = {}
    dy = np.ones_like(x)
    for k in reversed(range(model.layers)):
        w = params[f"layers.{k}.weight"]
        add_to(grads, f"layers.{k}.weight", LinearGrad(w.shape, dy, activities[k]))
        dy = (w.dense() if isinstance(w, SparseWeight) else w).T @ dy
    return float(x.sum()), grads


@pytest.mark.parametrize("check", [check_against_torch, check_conservation])
@pytest.mark.parametrize(
    ("model", "mistake"),
    [
        (LanguageModel(5, 3, 4, 2), last_step_only),
        (LanguageModel(5, 3, 4, 2), first_gate_only),
        (MLP((3, 4, 2)), with_biases),
    ],
)
def test_mistakes_are_caught(check: Any, model: Any, mistake: Any) -> None:
    check(model, 1)
    with pytest.raises(AssertionError):
        check(model, 1, flow=lambda params: mistake(model, params))
