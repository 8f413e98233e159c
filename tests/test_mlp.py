"""The multilayer perceptron: every gradient as one layer, against torch, and what fills a panel never counts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.kernels import memory
from refimpl.models.mlp import MLP
from refimpl.optim import SGD
from refimpl.testing.kernels import poison_pool
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, SparseWeight, Support, add_to, support_of, values_of

EPS = float(np.finfo(float).eps)
# One column, padding, none, more than a narrow panel, and more than one panel of float64.
BATCHES = [1, 2, 3, 4, 41, 130]


pytestmark = pytest.mark.usefixtures("tier")


def draw(
    model: MLP, batch: int, density: dict[str, float], seed: int, dtype: Any = float
) -> tuple[Params, np.ndarray, np.ndarray]:
    """Draw parameters (sparse where a density is given), inputs and labels."""
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, spec in model.specs().items():
        w = rng.uniform(-1, 1, spec.shape).astype(dtype)
        sparse = name in density
        params[name] = (
            SparseWeight.from_dense(w, Support.from_mask(rng.random(w.shape) < density[name])) if sparse else w
        )
    return params, rng.uniform(-1, 1, (model.sizes[0], batch)).astype(dtype), rng.integers(0, model.sizes[-1], batch)


def evaluated(params: Params, grads: Grads) -> dict[str, np.ndarray]:
    """Evaluate the gradients in full."""
    assert grads.keys() == params.keys()
    return {name: np.array(g if isinstance(g, np.ndarray) else g.dense()) for name, g in grads.items()}


def make_mlp(rng: np.random.Generator, *, sizes: tuple[int, ...], batch: int) -> Layer:
    """Make a loss whose units stay on their side of the kink: large biases, small weights."""
    model = MLP(sizes)
    labels = rng.integers(0, sizes[-1], batch)
    x = rng.uniform(-1, 1, (sizes[0], batch))
    params: Params = {}
    for name, spec in model.specs().items():
        bias = rng.choice([-1, 1], spec.shape) * rng.uniform(2, 3, spec.shape)
        params[name] = bias if spec.kind == "bias" else rng.uniform(-0.05, 0.05, spec.shape)

    def inputs(p: Params) -> np.ndarray:
        return x.astype(p["layers.0.bias"].dtype)

    def forward(p: Params) -> tuple[float, Params]:
        return model.loss(p, inputs(p), labels), p

    def backward(dy: float, cache: Params, grads: Grads, input_gradient: bool) -> None:
        for name, gradient in model.loss_and_grads(cache, inputs(cache), labels)[1].items():
            add_to(grads, name, gradient)

    return Layer(forward, backward, params, sparse=tuple(name for name in params if "weight" in name))


def test_every_gradient() -> None:
    sizes: dict[str, Any] = {"sizes": [(3, 2), (2, 4, 3), (3, 4, 3, 2), (2, 3, 1)], "batch": [1, 2, 3, 4]}
    check_layer(make_mlp, sizes)


def torch_result(
    model: MLP, params: Params, x: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Return loss, scores and gradients of the same network, masked dense, from torch."""
    torch = pytest.importorskip("torch")
    layers: list[Any] = []
    for k in range(model.layers):
        layers += [torch.nn.Linear(*model.sizes[k : k + 2], dtype=torch.float64), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    linear = layers[::2]
    with torch.no_grad():
        for name, w in params.items():
            _, layer, kind = name.split(".")
            dense = w.dense() if isinstance(w, SparseWeight) else w
            getattr(linear[int(layer)], kind).copy_(torch.tensor(dense))
    scores = net(torch.tensor(x.T))
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(labels))
    loss.backward()
    grads = {name: getattr(linear[int(name.split(".")[1])], name.split(".")[2]).grad.numpy() for name in params}
    return loss.item(), scores.detach().numpy().T, grads


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("sizes", "density"),
    [
        ((6, 5, 4, 3), {}),
        ((6, 5, 4, 3), {"layers.0.weight": 0.5, "layers.1.weight": 0.3, "layers.2.weight": 0.6}),
        ((6, 5, 4, 3), {"layers.0.weight": 0.5, "layers.1.weight": 1.0}),
        ((6, 5, 4, 3), {"layers.1.weight": 0.5}),
        ((6, 5, 4, 3), {"layers.0.weight": 0.0, "layers.2.weight": 0.5}),
        ((7, 2), {"layers.0.weight": 0.5}),
        ((5, 4, 1), {"layers.0.weight": 0.5}),
    ],
)
def test_torch(sizes: tuple[int, ...], density: dict[str, float], batch: int) -> None:
    """Sums of at most 130 columns of numbers of order 10, in three layers: some hundred roundings of each."""
    model = MLP(sizes)
    params, x, labels = draw(model, batch, density, seed=batch)
    loss, scores, expected = torch_result(model, params, x, labels)
    bound = 1000 * EPS
    poison_pool()
    mine, grads, _ = model.loss_and_grads(params, x, labels)
    poison_pool()
    assert abs(model.loss(params, x, labels) - loss) <= bound
    assert abs(mine - loss) <= bound
    assert np.abs(model.logits(params, x) - scores).max() <= bound * 10
    for name, gradient in evaluated(params, grads).items():
        assert np.abs(gradient - expected[name]).max() <= bound * 10, name
        w, promise = params[name], grads[name]
        if isinstance(w, SparseWeight):
            assert not isinstance(promise, np.ndarray)
            stored = promise.on(w.support)
            assert np.abs(stored - expected[name].reshape(-1)[w.support.flat]).max(initial=0) <= bound * 10, name


@given(batch=st.integers(1, 9), seed=st.integers(0, 1000), labels=st.booleans())
@settings(max_examples=10)
def test_a_batch_is_the_mean_of_its_columns(batch: int, seed: int, labels: bool) -> None:
    """So what fills a panel has no part in it: neither its inputs, which are 0, nor its biases."""
    model = MLP((4, 3, 2))
    params, x, y = draw(model, batch, {"layers.0.weight": 0.6}, seed)
    poison_pool()
    loss, grads, _ = model.loss_and_grads(params, x, y)
    singles = [model.loss_and_grads(params, x[:, [b]], y[[b]]) for b in range(batch)]
    assert abs(loss - np.mean([single for single, *_ in singles])) <= 100 * EPS
    for name, gradient in evaluated(params, grads).items():
        mean = sum(evaluated(params, single)[name] for _, single, _ in singles) / batch
        assert np.abs(gradient - mean).max() <= 100 * EPS, name


@pytest.mark.parametrize("batch", [3, 4, 70])
def test_grouped_batches_are_the_same(batch: int) -> None:
    """To the bit; and a column labelled −1 does not count."""
    model = MLP((5, 4, 3))
    params, x, labels = draw(model, batch, {"layers.0.weight": 0.6, "layers.1.weight": 0.6}, seed=1)
    panels, grouped = model.group(x, labels)
    assert panels.ndim == 3
    assert np.count_nonzero(grouped >= 0) == batch
    loss, grads, _ = model.loss_and_grads(params, x, labels)
    again, regrads, _ = model.loss_and_grads(params, panels, grouped)
    assert (loss, model.loss(params, x, labels)) == (again, model.loss(params, panels, grouped))
    a, b = evaluated(params, grads), evaluated(params, regrads)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    fewer = grouped.copy()
    fewer[tuple(np.argwhere(grouped >= 0)[-1])] = -1
    loss, grads, _ = model.loss_and_grads(params, panels, fewer)
    kept = np.isin(np.arange(batch), _columns(model, labels, fewer, batch))
    expected, wanted, _ = model.loss_and_grads(params, x[:, kept], labels[kept])
    assert abs(loss - expected) <= 100 * EPS
    for name, gradient in evaluated(params, grads).items():
        assert np.abs(gradient - evaluated(params, wanted)[name]).max() <= 100 * EPS, name


def _columns(model: MLP, labels: np.ndarray, grouped: np.ndarray, batch: int) -> np.ndarray:
    """Return which columns of the batch count in panels."""
    numbers = np.broadcast_to(np.arange(batch, dtype=float), (model.sizes[0], batch))
    panels, _ = model.group(np.ascontiguousarray(numbers), labels)
    return panels[:, 0, :][grouped >= 0].astype(int)


def test_one_class_leaves_nothing_to_learn() -> None:
    model = MLP((4, 3, 1))
    params, x, labels = draw(model, 5, {"layers.0.weight": 0.5}, seed=2)
    loss, grads, _ = model.loss_and_grads(params, x, labels)
    assert loss == 0
    assert not any(gradient.any() for gradient in evaluated(params, grads).values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [1, 4, 6, 130])
def test_scores_are_exact_on_integers(dtype: Any, batch: int) -> None:
    """Small integers have no rounding: the definition by NumPy, to the bit, in the type that was given."""
    rng = np.random.default_rng(3)
    model = MLP((9, 7, 5, 3))
    params: Params = {}
    for name, spec in model.specs().items():
        w = rng.integers(-3, 4, spec.shape).astype(dtype)
        params[name] = SparseWeight.from_dense(w) if name in ("layers.0.weight", "layers.2.weight") else w
    x = rng.integers(-3, 4, (9, batch)).astype(dtype)
    h = x
    for k in range(3):
        weight = params[f"layers.{k}.weight"]
        h = (weight.dense() if isinstance(weight, SparseWeight) else weight) @ h + values_of(
            params[f"layers.{k}.bias"]
        )[:, None]
        h = np.maximum(h, 0) if k < 2 else h
    scores = model.logits(params, x)
    assert scores.dtype == dtype
    assert np.array_equal(scores, h)
    _, grads, _ = model.loss_and_grads(params, x, rng.integers(0, 3, batch))
    for name, gradient in grads.items():
        stored = gradient if isinstance(gradient, np.ndarray) else gradient.on(support_of(params[name]))
        assert stored.dtype == dtype, name


@pytest.mark.parametrize("batch", [3, 8])
def test_nothing_that_was_given_is_changed(batch: int) -> None:
    model = MLP((4, 3, 2))
    params, numbers, labels = draw(model, batch, {"layers.0.weight": 0.7}, seed=4)
    for x in (numbers, memory.zeros(numbers.shape, float)):
        before = [values_of(w).copy() for w in params.values()], x.copy(), labels.copy()
        first = model.loss_and_grads(params, x, labels)
        second = model.loss_and_grads(params, x, labels)
        assert first[0] == second[0]
        a, b = evaluated(params, first[1]), evaluated(params, second[1])
        assert all(a[name].tobytes() == b[name].tobytes() for name in a), "the first gradients outlive the second step"
        assert all(map(np.array_equal, before[0], map(values_of, params.values())))
        assert np.array_equal(before[1], x)
        assert np.array_equal(before[2], labels)


def test_init() -> None:
    """Names, shapes and distribution of ``torch.nn.Linear``; supports do not change the bound."""
    model = MLP((50, 40, 30))
    support = Support.from_mask(np.random.default_rng(0).random((40, 50)) < 0.5)
    params = model.init(3, np.float32, {"layers.0.weight": support})
    assert list(params) == list(model.specs()) == [f"layers.{k}.{kind}" for k in (0, 1) for kind in ("weight", "bias")]
    assert [spec.input_gradient for spec in model.specs().values() if spec.prunable] == [False, True]
    for name, w in params.items():
        numbers, bound = values_of(w), (50 if name.startswith("layers.0") else 40) ** -0.5
        assert w.shape == model.specs()[name].shape
        assert numbers.dtype == np.float32
        assert np.abs(numbers).max() <= bound
        # The mean of |U(-1, 1)| is 1/2 with standard deviation 1/sqrt(12 n); five of them.
        assert abs(np.abs(numbers).mean() / bound - 0.5) < 5 / np.sqrt(12 * numbers.size), name
    weight = params["layers.0.weight"]
    assert isinstance(weight, SparseWeight)
    assert weight.support is support
    again, other = model.init(3, np.float32), model.init(4, np.float32)
    assert np.array_equal(values_of(again["layers.1.weight"]), values_of(params["layers.1.weight"]))
    assert not np.array_equal(values_of(again["layers.1.weight"]), values_of(other["layers.1.weight"]))


def test_it_learns() -> None:
    """Labels that a line divides: momentum SGD on a sparse network classifies nearly all in 200 steps."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((8, 100)).astype(np.float32)
    labels = (x.sum(0) > 0).astype(int)
    model, optimizer = MLP((8, 16, 2)), SGD(momentum=0.9)
    params = model.init(0, np.float32, {"layers.0.weight": Support.from_mask(rng.random((16, 8)) < 0.5)})
    slots = {name: optimizer.init(values_of(w)) for name, w in params.items()}
    before = model.loss(params, x, labels)
    for step in range(1, 201):
        _, grads, _ = model.loss_and_grads(params, x, labels)
        for name, w in params.items():
            g = grads[name]
            stored = g if isinstance(g, np.ndarray) else g.on(support_of(w)).reshape(values_of(w).shape)
            optimizer.update(values_of(w), stored, slots[name], lr=0.1, step=step)
    assert model.loss(params, x, labels) < before / 4
    assert (model.logits(params, x).argmax(0) == labels).mean() > 0.9


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (3, -1, 2), (3, 2.0), (True, 2), "32", 3])
def test_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(ValueError, match="two or more whole numbers above 0"):
        MLP(sizes)


def test_operands_that_do_not_fit() -> None:
    model = MLP((4, 3, 2))
    params, x, labels = draw(model, 5, {"layers.0.weight": 0.5}, seed=6)
    cases: list[tuple[np.ndarray, np.ndarray, str]] = [
        (x[:3], labels, r"x has shape \(3, 5\); this network takes \(features, batch\) = \(4, n\)"),
        (x[:, :0], labels[:0], "n of at least 1"),
        (x[:, 0], labels, r"x has shape \(4,\)"),
        (x, labels[:4], r"labels of shape \(4,\) for 5 columns"),
        (x, labels[None], r"labels of shape \(1, 5\)"),
        (x, labels + 2, "the targets are int64 from"),
        (x, labels.astype(float), "the targets are float64"),
        (x.astype(np.float32), labels, "X is float32 and the weight float64"),
    ]
    for bad_x, bad_labels, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            model.loss_and_grads(params, bad_x, bad_labels)
        assert "\n" not in str(caught.value)


def test_sizes_may_be_a_list() -> None:
    assert hash(MLP([4, 3, 2])) == hash(MLP((4, 3, 2)))  # type: ignore[arg-type]
