"""Densities, counts and random supports."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import Allocation, Conventions, density_from_sparsity, method_class, profile
from refimpl.methods.allocation import count_at, densities, initial_supports
from refimpl.methods.conventions import rounded
from refimpl.methods.pools import Pool, pools_of
from refimpl.methods.random_support import bernoulli_support, draw_distinct, exact_support
from refimpl.weights.parameters import ParamSpec


def specs_of(**shapes):
    return {name: ParamSpec(name, shape, "linear", prunable=True) for name, shape in shapes.items()}


LSTM = specs_of(
    embedding=(10_000, 1500), ih0=(6000, 1500), hh0=(6000, 1500), ih1=(6000, 1500), hh1=(6000, 1500),
    decoder=(10_000, 1500),
)  # fmt: skip
RHN = specs_of(embedding=(10_000, 830), W=(1660, 830), **{f"R{i}": (1660, 830) for i in range(10)})


def test_er_at_the_shapes_of_the_stacked_lstm():
    found = densities(LSTM, Allocation(0.33, "er"))
    assert round(found["embedding"], 4) == round(found["decoder"], 4) == 0.3151
    assert {round(found[name], 4) for name in ("ih0", "hh0", "ih1", "hh1")} == {0.3425}
    assert abs(found["ih0"] * 6000 * 1500 / 7500 - 410.94) < 0.005  # epsilon


def test_er_at_the_shapes_of_the_recurrent_highway_network():
    found = densities(RHN, Allocation(0.472, "er"))
    assert round(found["embedding"], 4) == 0.3780
    assert {round(p, 4) for name, p in found.items() if name != "embedding"} == {0.5235}
    assert abs(found["W"] * 1660 * 830 / 2490 - 289.67) < 0.005


def test_er_at_the_shapes_of_the_ordered_neurons_lstm():
    # The master gates add two rows for each chunk of ten units to the four gates.
    layers = [(400, 1150), (1150, 1150), (1150, 400)]
    shapes = {"embedding": (10_000, 400)}
    for k, (inputs, hidden) in enumerate(layers):
        rows = 4 * hidden + 2 * (hidden // 10)
        shapes |= {f"ih{k}": (rows, inputs), f"hh{k}": (rows, hidden)}
    found = densities(specs_of(**shapes), Allocation(0.45, "er"))
    assert abs(found["embedding"] - 0.7662) < 5e-5
    assert abs(found["ih0"] - 0.798) < 5e-4
    assert {round(found[name], 4) for name in ("hh0", "ih1", "hh1")} == {0.3173}
    assert abs(found["hh2"] - 0.912) < 5e-4
    assert abs(found["embedding"] * 10_000 * 400 / 10_400 - 294.69) < 0.005


shapes = st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6)


@given(shapes, st.floats(0.01, 1), st.sampled_from(["uniform", "er", "erk"]))
def test_the_total_is_the_target_and_no_density_exceeds_one(drawn, rho, rule):
    specs = specs_of(**{f"w{i}": shape for i, shape in enumerate(drawn)})
    found = densities(specs, Allocation(rho, rule))
    assert list(found) == list(specs)
    assert all(0 < p <= 1 for p in found.values())
    total = sum(spec.size for spec in specs.values())
    stored = sum(found[name] * spec.size for name, spec in specs.items())
    assert abs(stored - rho * total) <= 1e-9 * total
    raw = {
        name: sum(shape) / math.prod(shape)
        for name, spec in specs.items()
        for shape in [spec.shape[:2] if rule == "er" else spec.shape]
    }
    if rule != "uniform":  # below the cap all have one epsilon, and those at it ask for no less
        open_ = [found[name] / raw[name] for name in specs if found[name] < 1]
        if open_:
            assert max(open_) - min(open_) <= 1e-9 * max(open_)
            assert all(max(open_) * raw[name] >= 1 - 1e-9 for name in specs if found[name] == 1)


@given(shapes.map(lambda drawn: [shape[:2] for shape in drawn]), st.floats(0.01, 1))
def test_erk_is_er_for_matrices(drawn, rho):
    specs = specs_of(**{f"w{i}": shape for i, shape in enumerate(drawn)})
    assert densities(specs, Allocation(rho, "er")) == densities(specs, Allocation(rho, "erk"))


def test_without_a_cap_densities_saturate_and_it_is_said(caplog):
    # LeNet-like convolutions at density 0.2: the first would need a density above 1.
    specs = specs_of(conv1=(6, 1, 5, 5), conv2=(16, 6, 5, 5), fc=(120, 400))
    capped = densities(specs, Allocation(0.2, "er"))
    plain = densities(specs, Allocation(0.2, "er"), Conventions(er_cap=False))
    assert plain["conv1"] == 1 == capped["conv1"]
    assert plain["fc"] < capped["fc"]
    assert "saturates" in caplog.text


def test_fixed_densities_stand_outside_the_rule():
    specs = {**specs_of(a=(20, 30), b=(40, 10), c=(5, 80)), "bias": ParamSpec("bias", (20,), "bias")}
    found = densities(specs, Allocation(0.2, "er", fixed={"c": 1.0}))
    assert found["c"] == 1
    assert "bias" not in found
    without = densities(specs_of(a=(20, 30), b=(40, 10)), Allocation(0.2, "er"))
    assert {name: found[name] for name in ("a", "b")} == without
    assert set(initial_supports(specs, Allocation(0.2, "er", fixed={"c": 1.0}), seed=0)) == {"a", "b"}


@pytest.mark.parametrize("sparsity", [1, -0.1, 1.5, float("nan"), float("inf")])
def test_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match="give a number from 0"):
        density_from_sparsity(sparsity)


def test_bad_allocations():
    for bad in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="density of the model"):
            Allocation(bad)
        with pytest.raises(ValueError, match="density of w"):
            Allocation(0.5, fixed={"w": bad})
    with pytest.raises(ValueError, match="'uniform', 'er' or 'erk'"):
        Allocation(0.5, "ERK")
    with pytest.raises(ValueError, match="no prunable parameter"):
        densities(specs_of(w=(3, 4)), Allocation(0.5, fixed={"v": 0.5}))
    with pytest.raises(ValueError, match="none of the model's parameters"):
        densities({"b": ParamSpec("b", (3,), "bias")}, Allocation(0.5))
    with pytest.raises(ValueError, match="small of 12 entries would keep none"):
        initial_supports(specs_of(big=(99, 99), small=(3, 4)), Allocation(0.01), seed=0)
    with pytest.raises(ValueError, match="would keep none"):
        initial_supports(
            specs_of(w=(2, 2)), Allocation(1e-9), seed=0, conventions=Conventions(initial_count="bernoulli")
        )


def test_counts():
    # 1 - 0.9 is below 0.1 in binary: truncation keeps 99 of 1000, rounding to nearest 100.
    assert count_at(1 - 0.9, 1000) == 100
    assert count_at(1 - 0.9, 1000, Conventions(initial_rounding="floor")) == 99
    assert [rounded(x, "half-even") for x in (0.5, 1.5, 2.5, 2.51)] == [0, 2, 2, 3]
    assert (rounded(2.01, "ceil"), rounded(2.99, "floor")) == (3, 2)


@given(st.integers(1, 200), st.data())
def test_draw_distinct(size, data):
    count = data.draw(st.integers(0, size))
    drawn = draw_distinct(size, count, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert drawn.size == count == np.unique(drawn).size
    assert (np.diff(drawn) > 0).all()
    assert not count or (drawn[0] >= 0 and drawn[-1] < size)
    with pytest.raises(ValueError, match="distinct places"):
        draw_distinct(size, size + 1, np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_subset_is_equally_likely(count):
    rng, trials = np.random.default_rng(count), 6000
    seen: dict[tuple, int] = {}
    for _ in range(trials):
        key = tuple(draw_distinct(6, count, rng).tolist())
        seen[key] = seen.get(key, 0) + 1
    sets = math.comb(6, count)
    expected = trials / sets
    statistic = sum((n - expected) ** 2 / expected for n in seen.values())
    assert len(seen) == sets
    assert statistic < sets - 1 + 4 * math.sqrt(2 * (sets - 1))


def test_supports_of_a_seed():
    specs = specs_of(a=(30, 20), b=(10, 50))
    first = initial_supports(specs, Allocation(0.3), seed=1)
    assert first == initial_supports(specs, Allocation(0.3), seed=1)
    assert first != initial_supports(specs, Allocation(0.3), seed=2)
    assert {name: s.nnz for name, s in first.items()} == {"a": 180, "b": 150}
    alone = initial_supports(specs_of(b=(10, 50)), Allocation(0.3), seed=1)  # other tensors do not matter
    assert alone["b"] == first["b"]
    assert initial_supports(specs, Allocation(1.0), seed=1) == {}
    twins = initial_supports(specs_of(a=(30, 20), b=(30, 20)), Allocation(0.3), seed=1)
    assert twins["a"] != twins["b"]


def test_bernoulli_supports_have_binomial_counts():
    rng = np.random.default_rng(0)
    counts = np.array([bernoulli_support((20, 10), 0.3, rng).nnz for _ in range(4000)])
    assert abs(counts.mean() - 60) < 4 * math.sqrt(42 / 4000)
    assert abs(counts.var() - 42) < 4 * 42 * math.sqrt(2 / 4000)
    assert exact_support((20, 10), 60, rng).nnz == 60


def test_conventions_and_names():
    assert profile("default") == Conventions()
    assert profile("selfish-authors").growth_count == "bernoulli"
    with pytest.raises(ValueError, match="did you mean 'selfish-authors'"):
        profile("selfish_authors")
    with pytest.raises(ValueError, match="did you mean 'rigl'"):
        method_class("rig-l")
    with pytest.raises(ValueError, match="give one of 'keep', 'reset', 'forbid'"):
        Conventions(regrow="no")
    with pytest.raises(ValueError, match="grown_value"):
        Conventions(grown_value=float("nan"))
    assert Conventions(regrow="reset", grown_value=0.5).value_rule.regrown == "reset"


@settings(deadline=None)
@given(st.sampled_from(["matrix", "gate", "layer"]))
def test_pools_partition_the_tensors(scope):
    blocks = {g: slice(3 * i, 3 * i + 3) for i, g in enumerate("ifgo")}
    specs = {
        "ih": ParamSpec("ih", (12, 5), "linear", True, blocks, layer="rnn.0"),
        "hh": ParamSpec("hh", (12, 3), "recurrent", True, blocks, layer="rnn.0"),
        "decoder": ParamSpec("decoder", (7, 3), "linear", True),
    }
    pools = pools_of(specs, list(specs), scope)
    assert len(pools) == {"matrix": 3, "gate": 9, "layer": 2}[scope]
    places = [(s.name, p) for pool in pools for s in pool.segments for p in range(s.start, s.stop)]
    assert sorted(places) == sorted((name, p) for name, spec in specs.items() for p in range(spec.size))
    assert sum(pool.size for pool in pools) == len(places)
    assert [Pool.from_json(pool.as_json()) for pool in pools] == pools
    specs["ih"].blocks["o"] = slice(9, 11)
    if scope == "gate":
        with pytest.raises(ValueError, match="do not partition its 12 rows"):
            pools_of(specs, list(specs), scope)
