"""Powerpropagation: the transform, the chain rule around every method, and planted mistakes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.dense import Dense
from refimpl.methods.dpf import DPF
from refimpl.methods.drop import keep_largest
from refimpl.methods.gmp import GMP
from refimpl.methods.imp import IMP
from refimpl.methods.powerprop import ChainedGrad, Powerpropagation, powered, rooted, slope
from refimpl.methods.rigl import RigL
from refimpl.methods.schedule import Constant
from refimpl.methods.set import SET
from refimpl.methods.snip import SNIP
from refimpl.methods.soft_threshold import STR
from refimpl.methods.srste import SRSTE
from refimpl.methods.static import Static
from refimpl.methods.ste import STE
from refimpl.methods.topkast import TopKAST
from refimpl.models.mlp import MLP
from refimpl.optim import SGD
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, promise, train, trainer_of
from refimpl.weights import SparseWeight, Support, support_of, values_of

EPS = np.finfo(float).eps
SPECS = QuadraticModel().specs()
PRUNABLE = [name for name, spec in SPECS.items() if spec.prunable]

INNER = {
    "dense": lambda: Dense(),
    "static": lambda: Static(Allocation(0.4)),
    "set": lambda: SET(Allocation(0.4), Constant(0.3)),
    "rigl": lambda: RigL(Allocation(0.4), Constant(0.3), interval=3),
    "gmp": lambda: GMP(Allocation(0.4), begin_step=2, end_step=14, interval=3),
    "imp": lambda: IMP(Allocation(0.4), rounds=3, round_steps=6),
    "snip": lambda: SNIP(Allocation(0.4)),
    "topkast": lambda: TopKAST(Allocation(0.4), exploration=0.2, refresh=3, penalty=0.1),
    "ste": lambda: STE(Allocation(0.4)),
    "dpf": lambda: DPF(Allocation(0.4), interval=3, end_step=10),
    "sr-ste": lambda: SRSTE((2, 4), penalty=0.1),
}


def each(specs, density):
    return sum(count_at(d, specs[name].size) for name, d in densities(specs, Allocation(density)).items())


# --- the transform -------------------------------------------

numbers = st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-30)


def undone(w, power):
    """Bound the error of a root and its power.

    Two powers err by a few units in the last place each, of which the first is multiplied by a; the exponents 1/a and
    a − 1 are rounded, which is multiplied by log |w|; and there is one product.
    """
    size = np.abs(np.log(np.where(w == 0, 1, np.abs(w))))
    return (2 * power + 4 + size) * EPS * np.abs(w)


@given(numbers, st.floats(1, 5))
def test_the_root_is_undone_by_the_power(w, power):
    phi = rooted(np.array([w]), power)
    assert abs(powered(phi, power)[0] - w) <= undone(np.array([w]), power)[0]
    assert np.sign(phi[0]) == np.sign(w)


@given(st.lists(numbers, min_size=1, max_size=20))
def test_a_power_of_one_is_the_identity_to_the_bit(numbers):
    w = np.array(numbers)
    assert np.array_equal(rooted(w, 1.0), w)
    assert np.array_equal(powered(w, 1.0), w)
    assert np.array_equal(slope(w, 1.0), np.ones_like(w))


@given(st.permutations(range(1, 30)), st.floats(1, 5), st.integers(0, 29))
def test_the_largest_phi_are_the_largest_w(order, power, count):
    w = np.array(order) * np.where(np.arange(29) % 2, -1.0, 1.0) / 29
    phi = rooted(w, power)
    assert np.array_equal(keep_largest(np.abs(phi), count), keep_largest(np.abs(w), count))


@settings(max_examples=50)
@given(st.floats(0.05, 3), st.booleans(), st.floats(1, 5))
def test_the_slope_is_the_derivative(size, negative, power):
    phi = np.array([-size if negative else size])
    h = 1e-5 * size
    quotient = (powered(phi + h, power) - powered(phi - h, power)) / (2 * h)
    # Central difference: h² |w'''| / 6 and the rounding of w over h.
    third = power * (power - 1) * abs(power - 2) * size ** (power - 3)
    bound = h**2 * (2 * third + 1e-3 * slope(phi, power)[0]) + 20 * EPS * size**power / h
    assert abs(quotient - slope(phi, power))[0] <= bound


def test_nothing_is_nan_at_zero():
    zero = np.zeros(2)
    for power in (1.0, 1.5, 4.0):
        assert np.array_equal(powered(zero, power), zero)
        assert np.array_equal(rooted(zero, power), zero)
        assert np.isfinite(slope(zero, power)).all()


# --- around other methods ------------------------------------


@pytest.mark.parametrize("name", INNER)
def test_a_power_of_one_changes_no_bit_of_a_run(name):
    runs = []
    for method in (INNER[name](), Powerpropagation(INNER[name](), 1.0)):
        trainer = trainer_of(method)
        train(trainer, 18)
        runs.append(trainer)
    plain, wrapped = (trainer.state.params for trainer in runs)
    for key in plain:
        assert support_of(plain[key]) == support_of(wrapped[key])
        assert np.array_equal(values_of(plain[key]), values_of(wrapped[key]))
    for key, weight in runs[0].evaluated().items():
        assert np.array_equal(values_of(weight), values_of(runs[1].evaluated()[key]))


@pytest.mark.parametrize("name", INNER)
def test_whole_runs(name):
    counted = each if name in ("static", "set", "rigl", "topkast", "ste", "dpf") else None
    check_run(
        lambda d, steps, epoch: Powerpropagation(INNER[name](), 2.0),
        "free",
        counts=counted,
        dense_at_one=False,
        learns=name != "imp",
        optimizers=(SGD(0.9),),
        epochs=3,
    )


@pytest.mark.parametrize("name", ["dense", "static", "set", "topkast", "ste"])
@pytest.mark.parametrize("power", [2.0, 3.5])
def test_training_starts_from_the_same_network(name, power):
    plain, wrapped = (trainer_of(m) for m in (INNER[name](), Powerpropagation(INNER[name](), power)))
    ours, theirs = wrapped.method.view(wrapped.state.params), plain.method.view(plain.state.params)
    for key, weight in theirs.items():
        assert support_of(weight) == support_of(ours[key])
        error = np.abs(values_of(ours[key]) - values_of(weight))
        assert (error <= undone(values_of(weight), power)).all()
    assert np.array_equal(ours["fc.bias"], theirs["fc.bias"])


def test_scores_before_training_are_those_of_the_same_network():
    plain, wrapped = (trainer_of(m) for m in (SNIP(Allocation(0.4)), Powerpropagation(SNIP(Allocation(0.4)), 3.0)))
    for name in PRUNABLE:
        assert support_of(plain.state.params[name]) == support_of(wrapped.state.params[name])


def test_a_rewound_network_is_the_first_one_on_its_support():
    """A snapshot is taken in the terms in which it is put back."""
    method = Powerpropagation(IMP(Allocation(0.4), rounds=3, round_steps=6), 2.0)
    trainer = trainer_of(method)
    first = {name: np.array(values_of(w)) for name, w in method.view(trainer.state.params).items()}
    train(trainer, 6)
    seen = method.view(trainer.state.params)
    for name in PRUNABLE:
        assert isinstance(seen[name], SparseWeight)
        assert np.array_equal(seen[name].values, first[name].reshape(-1)[seen[name].support.flat])


def chain_case(kind, power, seed=0):
    model = MLP((6, 7, 5))
    method = Powerpropagation(kind(), power)
    supports = method.supports(model.specs(), seed=seed)
    params = method.start(model.init(seed, np.float64, supports), model.specs(), seed=seed)
    rng = np.random.default_rng(seed)
    return model, method, params, rng.standard_normal((6, 8)), rng.integers(0, 5, 8)


def check_chain(kind, power):
    """Compare with torch, where w = φ|φ|^(a-1) is differentiated by itself and goes straight through a mask."""
    torch = pytest.importorskip("torch")
    model, method, params, x, labels = chain_case(kind, power)
    seen = method.view(params)
    _, grads, _ = model.loss_and_grads(seen, x, labels)
    pulled = method.pull(params, grads)
    leaves, used = {}, {}
    for name, weight in params.items():
        dense = weight.dense() if isinstance(weight, SparseWeight) else weight
        leaves[name] = torch.tensor(dense, requires_grad=True)
        used[name] = leaves[name]
        if dense.ndim == 2:
            w = leaves[name] * leaves[name].abs() ** (power - 1)
            mask = torch.tensor(support_of(seen[name]).mask())
            used[name] = w + (mask * w - w).detach()
    hidden = torch.relu(used["layers.0.weight"] @ torch.tensor(x) + used["layers.0.bias"][:, None])
    scores = used["layers.1.weight"] @ hidden + used["layers.1.bias"][:, None]
    torch.nn.functional.cross_entropy(scores.T, torch.tensor(labels)).backward()
    for name, leaf in leaves.items():
        where = method.gradient_support(name, params)
        where = support_of(params[name]) if where is None else where
        expected = leaf.grad.numpy().reshape(-1)[where.flat]
        # Sums of up to 8 products of numbers of size 1, a softmax, and the slope of size a at most.
        assert np.abs(pulled[name].reshape(-1) - expected).max() <= 100 * EPS * power


KINDS = [Dense, lambda: Static(Allocation(0.4)), lambda: STE(Allocation(0.4)), lambda: TopKAST(Allocation(0.4))]


@pytest.mark.parametrize("kind", KINDS, ids=["dense", "static", "ste", "topkast"])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.3])
def test_gradients_are_torchs(kind, power):
    check_chain(kind, power)


def test_gradients_are_difference_quotients():
    model, method, params, x, labels = chain_case(lambda: Static(Allocation(0.6)), 2.0)
    _, grads, _ = model.loss_and_grads(method.view(params), x, labels)
    pulled = method.pull(params, grads)
    check_quotients(model, method, params, pulled, x, labels, every=5)


def check_quotients(model, method, params, pulled, x, labels, every):
    h = 1e-6
    for name, weight in params.items():
        values = values_of(weight).reshape(-1)
        for i in range(0, values.size, every):
            losses = []
            for sign in (1, -1):
                there = values[i]
                values[i] = there + sign * h
                losses.append(model.loss(method.view(params), x, labels))
                values[i] = there
            quotient = (losses[0] - losses[1]) / (2 * h)
            # rounding of a loss of size 2 over h, and h² times a third derivative of some tens
            assert abs(quotient - pulled[name].reshape(-1)[i]) <= 20 * EPS / h + 1000 * h**2


def test_a_method_that_moves_what_it_shows_has_the_slope_there():
    """STR shows thresholded weights: the slope is that at what the forward pass had, for its thresholds as well."""
    inner = lambda: STR(initial_threshold=-2.0, penalty=0.0)  # noqa: E731
    model, method, params, x, labels = chain_case(inner, 2.0)
    _, grads, _ = model.loss_and_grads(method.view(params), x, labels)
    check_quotients(model, method, params, method.pull(params, grads), x, labels, every=1)


def test_penalties_of_the_method_inside_are_in_terms_of_phi():
    method = Powerpropagation(SRSTE((2, 4), penalty=0.3), 2.0)
    method.supports(SPECS, seed=0)
    params = method.start(QuadraticModel().init(0, np.float64), SPECS, seed=0)
    zero = {name: promise(np.zeros(spec.shape)) for name, spec in SPECS.items()} | {"fc.bias": np.zeros(10)}
    pulled = method.pull(params, zero)
    for name in PRUNABLE:
        outside = ~support_of(method.view(params)[name]).mask()
        assert np.array_equal(pulled[name], 0.3 * params[name] * outside)


def test_a_gradient_answers_the_same_in_every_way():
    rng = np.random.default_rng(0)
    g, phi = rng.standard_normal((2, 5, 6))
    support = Support.from_mask(rng.random((5, 6)) < 0.5)
    stored = SparseWeight.from_dense(phi, support)
    for weight, there in ((phi, np.ones((5, 6), bool)), (stored, support.mask())):
        chained = ChainedGrad(promise(g), weight, lambda weight=weight: weight, 2.0)
        expected = np.where(there, g * slope(phi, 2.0), g)
        assert np.array_equal(chained.dense(), expected)
        assert np.array_equal(np.concatenate([b.copy() for _, b in chained.blocks()]), expected)
        for part in (support, Support.from_mask(rng.random((5, 6)) < 0.5), Support.full((5, 6))):
            assert np.array_equal(chained.on(part), expected.reshape(-1)[part.flat])


class OnlyOn:
    """A promise that cannot be evaluated as a whole."""

    def __init__(self, gradient):
        self.gradient = gradient
        self.shape = gradient.shape

    def on(self, support):
        assert support.density < 1
        return promise(self.gradient).on(support)

    def __getattr__(self, name):
        raise AssertionError(f"a step asked for {name} of a gradient")


def test_nothing_dense_is_made_of_a_sparse_weight():
    method = Powerpropagation(SET(Allocation(0.4), Constant(0.3)), 2.0)
    supports = method.supports(SPECS, seed=0)
    params = method.start(QuadraticModel().init(0, np.float64, supports), SPECS, seed=0)
    grads = {name: OnlyOn(np.ones(spec.shape)) for name, spec in SPECS.items()} | {"fc.bias": np.ones(10)}
    method.observe(params, grads, step=1)
    for name, gradient in method.pull(params, grads).items():
        assert gradient.size == values_of(params[name]).size


# --- planted mistakes ----------------------------------------


class StartsUntransformed(Powerpropagation):
    def start(self, params, specs, probe=None, *, seed):
        return self.inner.start(params, specs, probe, seed=seed)


class WithoutTheFactor(Powerpropagation):
    def pull(self, params, grads):
        return {name: g / self.power if name in self.names else g for name, g in super().pull(params, grads).items()}


class AtTheWeight(Powerpropagation):
    """Takes the slope at w instead of φ."""

    def pull(self, params, grads):
        return self.inner.pull(params, self._chained(grads, self.to_w(params), lambda: self.view(params)))


class BiasesToo(Powerpropagation):
    def supports(self, specs, *, seed):
        found = super().supports(specs, seed=seed)
        self.names = list(specs)
        return found


@pytest.mark.parametrize("mutant", [WithoutTheFactor, AtTheWeight, BiasesToo])
def test_mistakes_in_the_chain_rule_are_caught(mutant, monkeypatch):
    monkeypatch.setattr(f"{__name__}.Powerpropagation", mutant)
    with pytest.raises(AssertionError):
        check_chain(lambda: Static(Allocation(0.4)), 2.0)


def test_weights_that_are_not_transformed_are_caught(monkeypatch):
    monkeypatch.setattr(f"{__name__}.Powerpropagation", StartsUntransformed)
    with pytest.raises(AssertionError):
        test_training_starts_from_the_same_network("static", 2.0)
