"""The scores that need gradients and Hessian products, against torch and closed forms; edges and temperature."""

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_cases import (
    SECOND_ORDER,
    Arrays,
    MLPProbe,
    check_best_stay,
    language_case,
    mlp_case,
    total_of,
    weights_of,
)

from refimpl.methods import grasp as grasp_module
from refimpl.methods.allocation import Allocation
from refimpl.methods.grasp import GraSP, hessian_gradient
from refimpl.methods.snip import SNIP
from refimpl.models.mlp import MLP
from refimpl.weights import Params, SparseWeight, Support, support_of, values_of

SEEDS = st.integers(0, 2**32 - 1)


def torch_loss(model: Any, probe: Any, params: Params, temperature: float) -> tuple[Any, dict[str, Any]]:
    """Return the loss at logits / T and its leaves, written as one would write it there."""
    torch = pytest.importorskip("torch")
    w = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in params.items()}
    if isinstance(model, MLP):
        h = torch.tensor(probe.x)
        for k in range(model.layers):
            h = w[f"layers.{k}.weight"] @ h + w[f"layers.{k}.bias"][:, None]
            h = h.relu() if k < model.layers - 1 else h
        logits, labels = h.T, torch.tensor(probe.labels)
    else:
        x = w["encoder.weight"][torch.tensor(probe.tokens)]  # (T, B, E)
        for k in range(model.layers):
            h = c = torch.zeros(x.shape[1], model.hidden_size, dtype=torch.float64)
            out = []
            for now in x:
                gates = now @ w[f"rnn.weight_ih_l{k}"].T + h @ w[f"rnn.weight_hh_l{k}"].T
                i, f, g, o = (gates + w[f"rnn.bias_ih_l{k}"] + w[f"rnn.bias_hh_l{k}"]).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                out.append(h)
            x = torch.stack(out)
        logits = (x @ w[model.decoder].T + w["decoder.bias"]).flatten(0, 1)
        labels = torch.tensor(probe.targets).flatten()
    return torch.nn.functional.cross_entropy(logits / temperature, labels), w


def torch_gradient(model: Any, probe: Any, params: Params) -> Arrays:
    loss, w = torch_loss(model, probe, params, 1.0)
    loss.backward()
    return {name: own.grad.numpy() for name, own in w.items()}


def torch_product(model: Any, probe: Any, params: Params, temperature: float) -> Arrays:
    """Return Hg over the prunable tensors by differentiating the gradient."""
    torch = pytest.importorskip("torch")
    loss, w = torch_loss(model, probe, params, temperature)
    names = weights_of(model.specs())
    gradient = torch.autograd.grad(loss, [w[name] for name in names], create_graph=True)
    along = sum((g.detach() * g).sum() for g in gradient)
    return dict(zip(names, (h.numpy() for h in torch.autograd.grad(along, [w[name] for name in names])), strict=True))


CASES = {
    "mlp": mlp_case,
    "lstm": lambda seed: language_case(seed, tied=False),
    "tied lstm": lambda seed: language_case(seed, tied=True),
}
FIRST_ORDER = 1e-11
"""Float64 rounds at 1e-16; no path here has more than 10⁴ operations, and ten times that is for what cancels."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_snip_keeps_the_best_by_torch(case: Any, seed: int) -> None:
    model, params, probe = case(seed)
    specs = model.specs()
    gradient = torch_gradient(model, probe, params)
    scores = {name: np.abs(values_of(params[name]) * gradient[name]) for name in weights_of(specs)}
    found = SNIP(Allocation(0.7)).scores(params, specs, probe)
    for name, own in scores.items():
        assert np.abs(found[name] - own.reshape(-1)).max() <= FIRST_ORDER * own.max()
    pruned = SNIP(Allocation(0.7)).start(params, specs, probe, seed=0)
    check_best_stay(pruned, specs, scores, round(0.7 * total_of(specs)), FIRST_ORDER)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("seed", range(3))
def test_hessian_gradient_by_torch(case: Any, temperature: float, seed: int) -> None:
    model, params, probe = case(seed)
    expected = torch_product(model, probe, params, temperature)
    found = hessian_gradient(params, list(expected), probe, temperature)
    for name, own in expected.items():
        assert np.abs(found[name] - own.reshape(-1)).max() <= SECOND_ORDER * np.abs(own).max(), name
    specs = model.specs()
    pruned = GraSP(Allocation(0.4), temperature=temperature).start(params, specs, probe, seed=0)
    scores = {name: values_of(params[name]) * own for name, own in expected.items()}
    check_best_stay(pruned, specs, scores, round(0.4 * total_of(specs)), SECOND_ORDER)


@given(SEEDS)
def test_hessian_gradient_in_closed_form(seed: int) -> None:
    r"""For :math:`L = \frac12 w^\top A w + b^\top w` it is :math:`A (A w + b)`; only rounding remains."""
    rng = np.random.default_rng(seed)
    a, b, w = rng.standard_normal((6, 6)), rng.standard_normal(6), rng.standard_normal(6)
    a += a.T

    class Form:
        def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Any]:
            at = values_of(params["w"]).reshape(-1)
            return 0.0, {"w": (a @ at + b).reshape(2, 3)}

        def flow(self, params: Params) -> tuple[float, Any]:
            raise NotImplementedError

    g = a @ w + b
    found = hessian_gradient({"w": w.reshape(2, 3)}, ["w"], Form())["w"]
    step = grasp_module.STEP / grasp_module._SHORTER**3 * np.linalg.norm(w) / np.linalg.norm(g)
    eps = np.finfo(float).eps
    size = np.abs(a) @ (np.abs(w) + step * np.abs(g)) + np.abs(b)
    # Each of two gradients is off by 7 roundings of its terms, and by A times a rounding of w ± εg.
    bound = 10 * eps * size / step + 4 * eps * np.abs(a @ g)
    assert (np.abs(found - a @ g) <= bound).all()


def near_an_edge(distance: float) -> tuple[MLP, Params, MLPProbe]:
    """Make a network one of whose rectifiers is this far from its edge, on the side that g leads away from."""
    model, params, probe = mlp_case(3, (4, 6, 3), 1)
    weight = params["layers.0.weight"]
    assert isinstance(weight, np.ndarray)
    before = (weight @ probe.x)[:, 0]
    bias = 0.5 - before  # all other units far on
    bias[2] = distance - before[2]
    params["layers.0.bias"] = bias
    return model, params, probe


def test_a_rectifiers_edge_shortens_the_step(caplog: pytest.LogCaptureFixture) -> None:
    model, params, probe = near_an_edge(2e-7)
    names = weights_of(model.specs())
    expected = torch_product(model, probe, params, 1.0)
    asked = []

    class Counting(MLPProbe):
        def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Any]:
            asked.append(temperature)
            return super().loss_and_grads(params, temperature=temperature)

    found = hessian_gradient(params, names, Counting(model, probe.x, probe.labels))
    assert len(asked) > 3
    assert not caplog.records
    for name in names:
        assert (
            np.abs(found[name] - expected[name].reshape(-1)).max() <= 100 * SECOND_ORDER * np.abs(expected[name]).max()
        )  # the step is up to 8³ times shorter, and rounding that much larger


def test_an_edge_under_the_point_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, params, probe = near_an_edge(1e-14)
    with caplog.at_level(logging.WARNING):
        hessian_gradient(params, weights_of(model.specs()), probe)
    assert "rough" in caplog.text


def test_temperature_of_a_language_model_in_every_gradient() -> None:
    """Dense and sparse decoders, tied or not: all gradients, biases included, are those of logits / T."""
    for tied in (False, True):
        model, params, probe = language_case(0, tied=tied)
        for name in weights_of(model.specs()):
            support = Support.from_mask(np.random.default_rng(1).random(support_of(params[name]).shape) < 0.5)
            weight = params[name]
            assert isinstance(weight, np.ndarray)
            sparse = {**params, name: SparseWeight.from_dense(weight, support)}
            masked = {**params, name: weight * support.mask()}
            loss, w = torch_loss(model, probe, masked, 7.0)
            loss.backward()
            found, grads = probe.loss_and_grads(sparse, temperature=7.0)
            assert abs(found - float(loss.detach())) <= FIRST_ORDER * found
            assert grads.keys() == w.keys()
            for key, gradient in grads.items():
                own = gradient if isinstance(gradient, np.ndarray) else gradient.dense()
                assert np.abs(own - w[key].grad.numpy()).max() <= FIRST_ORDER * np.abs(own).max()


def test_moving_the_biases_too_would_be_noticed() -> None:
    """H g over all parameters is another product than that over the prunable ones."""
    model, params, probe = mlp_case(0)
    expected = torch_product(model, probe, params, 1.0)
    found = hessian_gradient(params, [*params], probe)
    assert max(np.abs(found[n] - own.reshape(-1)).max() / np.abs(own).max() for n, own in expected.items()) > 1e-3
