"""Supports chosen before training by scores: who stays, the laws, and whole runs."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_cases import (
    METHODS,
    SECOND_ORDER,
    Arrays,
    MLPProbe,
    check_best_stay,
    kept,
    language_case,
    masks_of,
    mlp_case,
    total_of,
    weights_of,
)

from refimpl.methods.allocation import Allocation, densities
from refimpl.methods.conventions import Conventions
from refimpl.methods.grasp import GraSP, hessian_gradient
from refimpl.methods.magnitude_init import MagnitudeInit
from refimpl.methods.scored import times_gradient
from refimpl.methods.snip import SNIP
from refimpl.methods.synflow import SynFlow
from refimpl.optim import SGD
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, QuadraticProbe
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, Support, support_of, values_of

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def requests(draw: Any) -> tuple[Allocation, str, Conventions]:
    """Draw what is asked of the quadratic model: density, scope, fixed tensors, rounding."""
    names = weights_of(QuadraticModel().specs())
    fixed = draw(st.dictionaries(st.sampled_from(names), st.sampled_from([0.25, 0.5, 1.0]), max_size=2))
    allocation = Allocation(draw(st.floats(0.2, 1.0)), draw(st.sampled_from(["uniform", "erk"])), fixed)
    rounding = draw(st.sampled_from(["floor", "ceil", "half-even"]))
    return allocation, draw(st.sampled_from(["local", "global"])), Conventions(initial_rounding=rounding)


ROUND: dict[str, Any] = {"floor": np.floor, "ceil": np.ceil, "half-even": np.round}


@settings(max_examples=60)
@given(requests(), st.sampled_from(sorted(METHODS)), SEEDS)
def test_counts_are_exact_and_fixed_tensors_are_respected(request: Any, name: str, seed: int) -> None:
    allocation, scope, conventions = request
    model = QuadraticModel()
    specs = model.specs()
    params = model.init(seed % 1000, np.float64)
    before = {key: values_of(value).copy() for key, value in params.items()}
    method: Any = METHODS[name](allocation, scope=scope, conventions=conventions)
    out = method.start(params, specs, QuadraticProbe(model), seed=0)
    again = method.start(params, specs, QuadraticProbe(model), seed=1)

    def count(density: float, size: int) -> int:
        return int(ROUND[conventions.initial_rounding](density * size))

    for key, array in before.items():
        assert params[key] is not None
        assert np.array_equal(values_of(params[key]), array), f"{key} was changed"
        assert support_of(out[key]) == support_of(again[key])
        chosen = out[key]
        if isinstance(chosen, SparseWeight):
            assert np.array_equal(chosen.values, array.reshape(-1)[chosen.support.flat]), "values are those drawn"
        else:
            assert chosen is params[key]
    for key, density in allocation.fixed.items():
        assert support_of(out[key]).nnz == count(density, specs[key].size)
        assert isinstance(out[key], np.ndarray) == (density == 1)
    shared = [key for key in weights_of(specs) if key not in allocation.fixed]
    if scope == "local":
        shares = densities(specs, allocation, conventions)
        assert all(
            support_of(out[key]).nnz == min(specs[key].size, count(shares[key], specs[key].size)) for key in shared
        )
    else:
        size = sum(specs[key].size for key in shared)
        assert sum(support_of(out[key]).nnz for key in shared) == count(allocation.density, size)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    "pins", [{"first_layer": "dense-if-uniform"}, {"linear_layers": "dense"}, {"last_layer": "density-0.2"}]
)
def test_globally_neither_rule_nor_place_treats_a_tensor_apart(kind: str, pins: Any) -> None:
    """With a rule and conventions that would pin densities, and pools that are not whole tensors."""
    model = QuadraticModel()
    specs, params, probe = model.specs(), model.init(3, np.float64), QuadraticProbe(model)
    cases: list[tuple[Any, Conventions]] = [
        ("uniform", Conventions()),
        ("uniform", Conventions(pool="layer", **pins)),
        ("erk", Conventions(pool="gate", **pins)),
    ]
    outs = []
    for rule, conventions in cases:
        method = METHODS[kind](Allocation(0.2, rule), scope="global", conventions=conventions)
        outs.append(method.start(params, specs, probe, seed=0))
    plain, one, other = outs
    assert all(support_of(plain[name]) == support_of(one[name]) == support_of(other[name]) for name in specs)


@pytest.mark.parametrize("kind", METHODS)
def test_locally_each_tensor_competes_as_a_whole(kind: str) -> None:
    model = QuadraticModel()
    specs, params, probe = model.specs(), model.init(3, np.float64), QuadraticProbe(model)
    plain, gates, ties = (
        METHODS[kind](Allocation(0.4), scope="local", conventions=conventions).start(params, specs, probe, seed=0)
        for conventions in (Conventions(), Conventions(pool="gate"), Conventions(pool="layer", drop_ties="threshold"))
    )
    assert all(support_of(plain[name]) == support_of(gates[name]) == support_of(ties[name]) for name in specs)


@given(SEEDS, st.integers(-20, 20))
def test_snip_does_not_see_the_scale_of_the_loss(seed: int, exponent: int) -> None:
    """By powers of two, which round nothing."""
    model, params, probe = mlp_case(seed % 100)
    scaled = MLPProbe(model, probe.x, probe.labels, 2.0**exponent)
    specs = model.specs()
    one, other = (SNIP(Allocation(0.5)).start(params, specs, p, seed=0) for p in (probe, scaled))
    assert all(support_of(one[name]) == support_of(other[name]) for name in specs)


class Recording(MLPProbe):
    """Remembers what it was asked to let flow."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Params] = []

    def flow(self, params: Params) -> tuple[float, Any]:
        self.seen.append(params)
        return super().flow(params)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_synflow_narrows_in_rounds(scope: Any) -> None:
    model, params, probe = mlp_case(0, (10, 12, 9, 4))
    specs, rounds, density = model.specs(), 20, 0.2
    recording = Recording(model, probe.x, probe.labels)
    narrow: Params = {name: values_of(weight).astype(np.float32) for name, weight in params.items()}
    out = SynFlow(Allocation(density), rounds=rounds, scope=scope).start(narrow, specs, recording, seed=0)
    assert len(recording.seen) == rounds
    sets = [masks_of(seen, specs) for seen in [*recording.seen, out]]
    for k, (wide, small) in enumerate(pairwise(sets), 1):
        assert all((wide[name] >= small[name]).all() for name in small), "a round brought entries back"
        share = density ** (k / rounds)
        if scope == "global":
            assert sum(mask.sum() for mask in small.values()) == round(share * total_of(specs))
        else:
            assert all(small[name].sum() == round(share * specs[name].size) for name in small)
    for seen in recording.seen:
        assert all(values_of(seen[name]).dtype == np.float64 for name in weights_of(specs))
        assert all((values_of(seen[name]) >= 0).all() for name in weights_of(specs))
    assert all(values_of(out[name]).dtype == np.float32 for name in specs), "signs and type are the weights' own"


def test_synflow_holds_together_where_the_others_collapse() -> None:
    """To the last weight of each layer; in one round it would cut the network as SNIP and magnitudes do."""
    sizes = (30, 40, 40, 40, 5)
    model, params, probe = mlp_case(1, sizes, 20)
    specs = model.specs()
    for left in (4, 8, 40):
        allocation = Allocation(left / total_of(specs))
        out = SynFlow(allocation).start(params, specs, probe, seed=0)
        assert kept(out, specs) == left
        total, _ = model.flow({name: _magnitude(out[name]) for name in specs})
        assert total > 0, "no path is left from the inputs to the outputs"
        if left == model.layers:
            assert all(support_of(out[name]).nnz == 1 for name in weights_of(specs))
    few = Allocation(8 / total_of(specs))
    for method in (SNIP(few), MagnitudeInit(few, scope="global"), SynFlow(few, rounds=1)):
        with pytest.raises(ValueError, match=r"layers\.\d\.weight would keep no weight"):
            method.start(params, specs, probe, seed=0)


def _magnitude(weight: Any) -> Any:
    values = np.abs(values_of(weight))
    return SparseWeight(weight.support, values) if isinstance(weight, SparseWeight) else values


@given(SEEDS)
def test_products_are_the_same_in_blocks_and_on_a_support(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = QuadraticModel()
    params = model.init(seed % 50, np.float64)
    _, grads = QuadraticProbe(model).loss_and_grads(params)
    for name in weights_of(model.specs()):
        dense, gradient = params[name], grads[name]
        assert isinstance(dense, np.ndarray)
        assert not isinstance(gradient, np.ndarray)
        whole = times_gradient(dense, gradient)
        assert np.array_equal(whole, (dense * gradient.dense()).reshape(-1))
        support = Support.from_mask(rng.random(dense.shape) < 0.5)
        assert np.array_equal(times_gradient(SparseWeight.from_dense(dense, support), gradient), whole[support.flat])


# --- planted mistakes: on the quadratic model all scores are known ----------------------------------------


def known_scores(kind: str, params: Params, model: QuadraticModel) -> Arrays:
    """Return what the method must rank: H is the identity there, and R the sum of all magnitudes."""
    _, grads = QuadraticProbe(model).loss_and_grads(params)
    out = {}
    for name in weights_of(model.specs()):
        w, gradient = values_of(params[name]), grads[name]
        assert not isinstance(gradient, np.ndarray)
        product = w * gradient.dense()
        out[name] = {"snip": np.abs(product), "grasp": product}.get(kind, np.abs(w))
    return out


def check_known(kind: str, method: Any, seed: int = 0) -> None:
    model = QuadraticModel()
    specs = model.specs()
    params = model.init(seed, np.float64)
    out = method.start(params, specs, QuadraticProbe(model), seed=0)
    count = round(0.5 * total_of(specs))
    check_best_stay(out, specs, known_scores(kind, params, model), count, SECOND_ORDER if kind == "grasp" else 0.0)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_known_scores(kind: str, seed: int) -> None:
    method: Any = METHODS[kind]
    check_known(kind, method(Allocation(0.5), scope="global"), seed)


class WithoutTheWeight(SNIP):
    def scores(self, params: Params, specs: Any, probe: Any) -> Any:
        found = super().scores(params, specs, probe)
        return {name: own / np.abs(values_of(params[name])).reshape(-1) for name, own in found.items()}


class Signed(SNIP):
    def scores(self, params: Params, specs: Any, probe: Any) -> Any:
        _, grads = probe.loss_and_grads(params)
        return {name: times_gradient(params[name], grads[name]) for name in weights_of(specs)}


class Absolute(GraSP):
    def scores(self, params: Params, specs: Any, probe: Any) -> Any:
        return {name: np.abs(own) for name, own in super().scores(params, specs, probe).items()}


class Negated(GraSP):
    def scores(self, params: Params, specs: Any, probe: Any) -> Any:
        return {name: -own for name, own in super().scores(params, specs, probe).items()}


class BareProduct(GraSP):
    def scores(self, params: Params, specs: Any, probe: Any) -> Any:
        return hessian_gradient(params, weights_of(specs), probe)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("snip", WithoutTheWeight(Allocation(0.5))),
        ("snip", Signed(Allocation(0.5))),
        ("snip", SNIP(Allocation(0.5), scope="local")),
        ("snip", GraSP(Allocation(0.5))),
        ("grasp", Absolute(Allocation(0.5))),
        ("grasp", Negated(Allocation(0.5))),
        ("grasp", BareProduct(Allocation(0.5))),
        ("grasp", GraSP(Allocation(0.5), scope="local")),
        ("magnitude-init", MagnitudeInit(Allocation(0.5), scope="local")),
        ("synflow", SynFlow(Allocation(0.5), scope="local")),
    ],
)
def test_mistakes_are_caught(kind: str, mistake: Any) -> None:
    with pytest.raises(AssertionError):
        check_known(kind, mistake)


def test_synflow_without_the_weight_or_with_signs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(weight: Any, gradient: Any) -> np.ndarray:
        return gradient.on(weight.support)

    for name, mistake in (("times_gradient", bare), ("_magnitude", lambda weight: weight)):
        with monkeypatch.context() as planted:
            planted.setattr(f"refimpl.methods.synflow.{name}", mistake)
            with pytest.raises((AssertionError, ValueError)):
                check_known("synflow", SynFlow(Allocation(0.5)))


# --- whole runs ----------------------------------------


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_whole_runs(kind: str, scope: Any) -> None:
    def counts(specs: Mapping[str, ParamSpec], density: float) -> int:
        sizes = [spec.size for spec in specs.values() if spec.prunable]
        return round(density * sum(sizes)) if scope == "global" else sum(round(density * n) for n in sizes)

    make: Any = METHODS[kind]
    check_run(
        lambda density, steps, epoch: make(Allocation(density), scope=scope), "static", counts=counts, density=0.5
    )


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_trains(kind: str, tied: bool) -> None:
    model, _, probe = language_case(0, tied=tied, dropout_output=0.2, weight_drop=0.1)
    method: Any = METHODS[kind](Allocation(0.7))
    trainer = Trainer.begin(
        model, method, SGD(0.0), lambda step, epoch: 1.0, probe=probe, batch=4, dtype=np.float32, seed=0
    )
    size = round(0.7 * total_of(model.specs()))
    assert abs(kept(trainer.state.params, model.specs()) - size) <= (3 if method.scope == "local" else 0)
    losses = [trainer.step(probe.tokens, probe.targets).loss for _ in range(30)]
    assert np.mean(losses[-5:]) < losses[0]
    assert all(values_of(weight).dtype == np.float32 for weight in trainer.state.params.values())


# --- what is refused ----------------------------------------


def test_what_is_refused() -> None:
    model, params, probe = mlp_case(0)
    specs = model.specs()
    for kind in METHODS.values():
        with pytest.raises(ValueError, match="'layer'; give 'local'"):
            kind(Allocation(0.5), scope="layer")
        method: Any = kind(Allocation(0.5))
        sparse = {**params, "layers.0.weight": SparseWeight(Support.full((8, 6)), np.ones(48))}
        with pytest.raises(ValueError, match=r"layers\.0\.weight is a sparse weight"):
            method.start(sparse, specs, probe, seed=0)
        broken = {**params, "layers.1.weight": np.full((5, 8), np.nan)}
        with pytest.raises(ValueError, match=r"a score of layers\.\d\.weight is NaN or infinite"):
            method.start(broken, specs, probe, seed=0)
        if kind is not MagnitudeInit:
            with pytest.raises(ValueError, match="call start with a probe"):
                method.start(params, specs, seed=0)
        with pytest.raises(ValueError, match="would keep none at density"):
            kind(Allocation(1e-4)).start(params, specs, probe, seed=0)
    with pytest.raises(ValueError, match="0 rounds"):
        SynFlow(Allocation(0.5), rounds=0)
    with pytest.raises(ValueError, match="temperature of GraSP is 0"):
        GraSP(Allocation(0.5), temperature=0.0)


def test_no_gradient_at_all() -> None:
    """Zero weights, or a loss that does not move, rank nothing: positions decide, and nothing is divided by zero."""
    model, params, probe = mlp_case(0)
    flat_probe = MLPProbe(model, probe.x, probe.labels, scale=0.0)
    zeros: Params = {name: np.zeros(spec.shape) for name, spec in model.specs().items()}
    for at, asked in ((params, flat_probe), (zeros, probe)):
        assert not any(own.any() for own in hessian_gradient(at, weights_of(model.specs()), asked).values())
