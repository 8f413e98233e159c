"""What profiles do before training, along schedules and to whole tensors, against other programs' rules."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import Conventions, profile
from refimpl.methods.allocation import Allocation, initial_supports
from refimpl.methods.onestep import (
    allocate,
    allocate_counts,
    drop_fraction,
    exchange_due,
    gmp_sparsity,
    initial_mask,
    nm_mask,
    prune_mask,
    prune_masks,
)
from refimpl.methods.schedule import Cosine, EverySteps
from refimpl.weights.parameters import ParamSpec

seeds = st.integers(0, 2**32 - 1)

# --- the start ----------------------------------------


@given(seeds, st.floats(0.01, 0.94), st.integers(20, 60))
@settings(max_examples=60, deadline=None)
def test_initial_masks_of_other_programs(seed, s, n):
    rng = np.random.default_rng(seed)
    uniforms, permutation = rng.random(n), rng.permutation(n)
    zeros = math.floor(s * n)
    torch_like = np.ones(n, bool)
    torch_like[permutation[:zeros]] = False
    found = initial_mask((n,), s, profile("rigl-torch"), permutation=permutation)
    np.testing.assert_array_equal(found, torch_like)
    ones = np.ones(n)
    ones[:zeros] = 0
    shuffled = ones[np.argsort(permutation)]  # what a shuffle that carries place p to permutation[p] makes
    np.testing.assert_array_equal(
        initial_mask((n,), s, profile("rigl-tf"), permutation=permutation), shuffled.astype(bool)
    )
    np.testing.assert_array_equal(initial_mask((n,), s, profile("itop"), uniforms=uniforms), uniforms < 1 - s)
    kept = int(np.float32(np.float32(1 - np.float32(s)) * np.float32(n)))
    top = np.isin(np.arange(n), np.argsort(-uniforms)[:kept])
    np.testing.assert_array_equal(initial_mask((n,), s, profile("cerebras"), uniforms=uniforms), top)
    places = rng.integers(n, size=round((1 - s) * n))
    drawn = initial_mask((n,), s, profile("set-original"), places=places)
    assert np.flatnonzero(drawn).tolist() == sorted(set(places.tolist()))
    magnitudes = rng.random(n)
    lowest = np.argsort(magnitudes)[: n - int(n * (1 - s))]
    assert not initial_mask((n,), s, profile("sparsimony"), scores=magnitudes)[lowest].any()


@given(st.floats(0, 0.99), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_counts_follow_the_sparsity_that_was_given(s, shapes):
    floor = allocate_counts(shapes, s, conventions=profile("rigl-tf"))
    assert list(floor.values()) == [a * b - math.floor(s * (a * b)) for a, b in shapes]
    assert allocate_counts([(2, 5)], 0.1, conventions=profile("rigl-tf")) == {"0": 9}  # 1 - (1 - 0.1) is below 0.1
    half_even = allocate_counts(shapes, s)
    assert list(half_even.values()) == [round((1 - s) * (a * b)) for a, b in shapes]


def test_supports_of_models_follow_the_conventions_of_the_start():
    specs = {"w": ParamSpec("w", (20, 30), "linear", True), "b": ParamSpec("b", (30,), "bias")}
    asked = Allocation(0.5)
    with_replacement = initial_supports(specs, asked, seed=0, conventions=profile("set-original"))["w"]
    # Of 300 draws among 600 places about 600 (1 - exp(-1/2)) = 236 differ, with a standard deviation below 10.
    assert 196 < with_replacement.nnz < 276
    again = initial_supports(specs, asked, seed=0, conventions=profile("set-original"))["w"]
    assert with_replacement == again
    assert initial_supports(specs, asked, seed=0)["w"].nnz == 300
    few = Allocation(1 - 0.9995)
    for name, nnz in (("cerebras", 0), ("jaxpruner", 1)):
        assert initial_supports(specs, few, seed=0, conventions=profile(name))["w"].nnz == nnz
    with pytest.raises(ValueError, match="would keep none"):
        initial_supports(specs, few, seed=0)


def test_a_search_for_epsilon_that_moves_once_too_often():
    shapes = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
    raw, size = {k: sum(v) / math.prod(v) for k, v in shapes.items()}, {k: math.prod(v) for k, v in shapes.items()}
    total, wanted = sum(map(sum, shapes.values())), 0.05 * sum(size.values())
    epsilon, noise = 10.0, 0.5
    found = 0.0
    while abs(found - wanted) >= 5:
        found = epsilon * total
        epsilon *= 1 - noise if found > wanted else 1 + noise
        noise *= 0.95
    expected = {name: min(1, epsilon * raw[name]) for name in shapes}
    assert allocate(shapes, 0.95, "erk", profile("sparse-learning")) == pytest.approx(expected, rel=1e-9)


# --- pruning ----------------------------------------


@given(seeds, st.lists(st.one_of(st.floats(0, 0.6), st.integers(0, 3)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_iterated_pruning_is_that_of_torch(seed, amounts):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(seed)
    weights = (rng.permutation(np.arange(1, 43)) * rng.choice([-1, 1], 42)).reshape(6, 7).astype(np.float64)
    module = torch.nn.Linear(7, 6, bias=False, dtype=torch.float64)
    module.weight.data = torch.tensor(weights)
    mask = np.ones((6, 7), bool)
    for amount in amounts:
        prune.l1_unstructured(module, "weight", amount)
        mask = prune_mask(weights, mask, amount, profile("torch-prune"))
        np.testing.assert_array_equal(mask, module.weight_mask.numpy() == 1)


def test_global_pruning_is_that_of_torch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((5, 6)), "b": 0.3 * rng.standard_normal((4, 5))}
    modules = {name: torch.nn.Linear(*w.shape[::-1], bias=False, dtype=torch.float64) for name, w in weights.items()}
    for name, module in modules.items():
        module.weight.data = torch.tensor(weights[name])
    prune.global_unstructured(
        [(module, "weight") for module in modules.values()], pruning_method=prune.L1Unstructured, amount=0.43
    )
    ones = {name: np.ones(w.shape, bool) for name, w in weights.items()}
    masks = prune_masks(weights, ones, 0.43, profile("torch-prune"))
    for name, module in modules.items():
        np.testing.assert_array_equal(masks[name], module.weight_mask.numpy() == 1)


def test_global_scores_by_their_norm():
    weights = {"a": np.array([[100.0, 50.0]]), "b": np.array([[3.0, 0.2, 0.1, 0.3]])}
    ones = {name: np.ones(w.shape, bool) for name, w in weights.items()}
    plain = prune_masks(weights, ones, 0.67)
    assert plain["a"].all()
    assert not plain["b"].any()
    normed = prune_masks(weights, ones, 0.67, Conventions(global_scores="unit-norm"))
    assert normed["a"].tolist() == [[True, False]]
    assert normed["b"].tolist() == [[True, False, False, False]]


def test_pruned_entries_return_only_where_they_may():
    weights, mask = np.array([[5.0, 4, 1, 2]]), np.array([[False, True, True, True]])
    assert prune_mask(weights, mask, 0.5).tolist() == [[False, True, False, True]]
    assert prune_mask(weights, mask, 0.5, profile("sparsimony")).tolist() == [[True, True, False, False]]
    for wrong, message in ((1.5, "amount to prune is 1.5"), (-1, "cannot be pruned"), (1.0, "would leave none")):
        with pytest.raises(ValueError, match=message):
            prune_mask(weights, mask, wrong)
    with pytest.raises(ValueError, match="NaN"):
        prune_mask(weights * np.nan, mask, 0.5)


@given(seeds, st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 4)]), st.sampled_from([0, 1, -1]))
@settings(max_examples=40, deadline=None)
def test_masks_of_n_in_m(seed, pattern, axis):
    n, m = pattern
    weights = np.random.default_rng(seed).integers(-2, 3, (8, 4, 12)).astype(float)
    for name, up in (("default", -1), ("jaxpruner", 1)):  # of equals the lower, or the higher position
        mask = nm_mask(weights, n, m, profile(name), axis=axis)
        rows = np.moveaxis(np.abs(weights), axis, -1).reshape(-1, m)
        for row, kept in zip(rows, np.moveaxis(mask, axis, -1).reshape(-1, m)):
            ranked = sorted(range(m), key=lambda i: (row[i], up * i))
            assert np.flatnonzero(kept).tolist() == sorted(ranked[m - n :])
    for wrong in ((0, 4), (5, 4), (2, 5)):
        with pytest.raises(ValueError, match="does not fit an axis of"):
            nm_mask(weights, *wrong, axis=axis)
    with pytest.raises(ValueError, match="NaN"):
        nm_mask(weights * np.nan, n, m)


@given(st.integers(0, 60), st.floats(0.1, 0.99), st.integers(0, 20), st.integers(1, 30))
def test_gradual_sparsity(t, s, begin, length):
    end = begin + length
    options = {"final": s, "begin": begin, "end": end}
    x = min(max(t - begin, 0), length) / length
    assert gmp_sparsity(t, **options) == pytest.approx(s - s * (1 - x) ** 3, abs=1e-15)
    p = min(max(t + 1 - begin, 0), end - begin) / (end - begin)
    assert gmp_sparsity(t, conventions=profile("jaxpruner"), **options) == pytest.approx(
        s * (1 - (1 - p) ** 3), abs=1e-15
    )
    if t >= begin:
        x = (t - begin) / end
        expected = s + (0.1 - s) * (1 - x) ** 3
        found = gmp_sparsity(t, conventions=profile("sparsimony"), initial=0.1, **options)
        assert found == pytest.approx(expected, abs=1e-13)
    if begin <= t <= end:
        expected = s * (1 - (1 - (t - begin) / (end - begin + 1)) ** 3)
        assert gmp_sparsity(t, conventions=profile("itop"), **options) == pytest.approx(expected, abs=1e-15)
    assert gmp_sparsity(begin, initial=0.2, **options) == pytest.approx(0.2, abs=1e-15)
    assert gmp_sparsity(end, initial=0.2, **options) == s


# --- time ----------------------------------------


def test_drop_fractions_that_were_observed():
    def at(step, name, **options):
        return drop_fraction(step, initial=0.3, end=750, total=1000, conventions=profile(name), **options)

    assert at(600, "rigl-tf") == pytest.approx(0.0286, abs=5e-5)
    assert at(600, "itop") == pytest.approx(0.1069, abs=5e-5)
    assert at(600, "rigl-tf", begin=200) == pytest.approx(0, abs=1e-8)  # over 550 steps that count from 0
    assert at(1000, "rigl-torch") == pytest.approx(0.075)
    assert at(1000, "sparsimony") == pytest.approx(0.075)
    assert at(1000, "default") == at(750, "default") == at(1000, "jaxpruner") == 0
    assert at(475, "sparseml", begin=200) == pytest.approx(0.15)  # half of 200 to 750
    assert at(100, "default", shape="constant") == 0.3
    assert at(375, "default", shape="linear") == at(375, "default", shape="power") == pytest.approx(0.15)
    single = at(600, "rigl-tf")
    one, pi = np.float32(1), np.float32(math.pi)
    assert single == float(
        np.float32(0.3) / np.float32(2) * (one + np.cos(pi * np.float32(600) / np.float32(750)))
    ) != at(600, "default")  # fmt: skip


def test_itops_fractions_are_those_of_torch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, 0.005)
    for t in range(60):
        found = drop_fraction(t, initial=0.5, end=30, total=40, conventions=profile("itop"))
        assert found == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


WINDOWS = {  # interval 3, from 4 to 12 or, where the end can matter, to 13; asked from 0 to 16
    "default": [6, 9],
    "rigl-tf": [4, 7, 10, 13],
    "rigl-torch": [6, 9],
    "jaxpruner": [6, 9, 12],
    "itop": [6, 9, 12, 15],
    "cerebras": [4, 7, 10],
    "sparsimony": [6, 9, 12],
    "sparseml": [4, 7, 10, 13],
}
FROM_BEGIN = ("rigl-tf", "cerebras", "sparseml")


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    last, due = None, []
    end = 13 if name in FROM_BEGIN else 12
    by_method = EverySteps.by(profile(name), 3, end, 4)
    for t in range(17):
        if exchange_due(t, interval=3, begin=4, end=end, last=last, conventions=profile(name)):
            last = t
            due.append(t)
        assert by_method(step=t, epoch_end=False) == (last == t)
    assert due == WINDOWS[name]


def test_step_zero():
    def at_zero(name):
        return exchange_due(0, interval=3, conventions=profile(name))

    assert [name for name in WINDOWS if at_zero(name)] == ["rigl-tf", "jaxpruner", "sparseml"]


def test_cosines_by_conventions():
    assert Cosine.by(Conventions(), 0.3, 750) == Cosine(0.3, 750)
    assert Cosine.by(profile("selfish-authors"), 0.5, 90, total=100) == Cosine(0.5, 100, 0.005, "recursive", "rise")
