"""DeepR: the count of the strict form, signs for the whole run, uniform awakening, and the walk of the dormant."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.deepr import AWAKENED, DeepR, signs
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight, values_of
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)
MODEL = QuadraticModel().specs()
PRUNABLE = [name for name, spec in MODEL.items() if spec.prunable]


def lively(density=0.4, kind=DeepR, **options):
    """Return a method under which connections die and wake in every few steps of a short run."""
    return kind(Allocation(density), penalty=0.05, temperature=0.01, **options)


def uniform_count(specs, density):
    return sum(round(density * spec.size) for spec in specs.values() if spec.prunable)


@pytest.mark.parametrize("pool", ["matrix", "gate", "layer"])
def test_whole_runs_of_the_strict_form(pool):
    conventions = Conventions(pool=pool, regrow="reset")
    check_run(lambda d, total, epoch: lively(d, conventions=conventions), "dynamic", counts=uniform_count)


def test_whole_runs_of_the_soft_form():
    check_run(lambda d, total, epoch: lively(d, form="soft"), "hidden")


# --- signs ---------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_signs_are_balanced_and_independent(seed):
    n = 1 << 20
    s, other = (signs(seed, name, np.arange(n)) for name in ("a", "b"))
    assert set(np.unique(s)) == {-1.0, 1.0}
    # Sums of n independent fair signs have the deviation sqrt(n); five of them are one in three million.
    lagged = [s[: n - lag] * s[lag:] for lag in (1, 2, 7, 64, 1000, 4096)]
    for product in [s, s * other, s * signs(seed + 1, "a", np.arange(n)), *lagged]:
        assert abs(product.sum()) < 5 * np.sqrt(n)


@given(seeds, st.lists(st.integers(0, 2**40), max_size=20))
def test_a_sign_depends_on_its_place_alone(seed, flat):
    flat = np.array(flat, np.int64)
    together = signs(seed, "w", flat, np.float32)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, [signs(seed, "w", flat[i : i + 1])[0] for i in range(flat.size)])


# --- strict: laws of a run -----------------------------------


def check_strict(kind, **options):
    """Train, and look at each weight after each step: the count, and one sign for each place in the whole run."""
    seen = {}

    def look(trainer):
        for name in PRUNABLE:
            weight = trainer.state.params[name]
            assert weight.nnz == round(0.4 * weight.support.size), "the count is not constant"
            assert weight.values.all(), "an active weight is 0"
            for place, value in zip(weight.support.flat, weight.values):
                first = seen.setdefault((name, place), np.sign(value))
                assert np.sign(value) == first, "a place has changed its sign"

    trainer = trainer_of(lively(kind=kind, **options), optimizer=SGD())
    look(trainer)
    train(trainer, 24, look)
    assert len(seen) > 1.3 * uniform_count(MODEL, 0.4), "hardly a place has become active in this run"


def test_the_count_and_the_signs_hold_in_a_run():
    check_strict(DeepR)


def test_values_start_with_the_signs_of_their_places_and_the_drawn_magnitudes():
    method = lively()
    drawn = QuadraticModel().init(3, np.float32, method.supports(MODEL, seed=3))
    before = {name: values_of(weight).copy() for name, weight in drawn.items()}
    begun = method.start(drawn, MODEL, seed=3)
    for name, weight in drawn.items():
        np.testing.assert_array_equal(values_of(weight), before[name])
        np.testing.assert_array_equal(np.abs(values_of(begun[name])), np.abs(before[name]))
    for name in PRUNABLE:
        assert (begun[name].values * signs(3, name, begun[name].support.flat) > 0).all()
    assert begun["fc.bias"] is drawn["fc.bias"]


# --- strict: one exchange ------------------------------------


def one_tensor(seed, shape=(5, 8), stored=12, kind=DeepR, conventions=DEFAULT):
    """Return a method, and a tensor some of whose weights are on the wrong side, or exactly 0."""
    method = kind(Allocation(stored / 40), conventions=conventions)
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=seed)["w"]
    values = np.random.default_rng(seed).standard_normal(support.nnz)
    values[::7] = 0
    return method, SparseWeight(support, values)


@given(seeds, st.integers(1, 10**6))
@settings(max_examples=100, deadline=None)
def test_one_exchange(seed, step):
    method, weight = one_tensor(seed)
    sign = signs(seed, "w", np.arange(40))
    theta = weight.dense().reshape(-1) * sign
    dies = {int(p) for p in weight.support.flat if theta[p] <= 0}
    exchange = method.exchange({"w": weight}, step=step, seed=seed).get("w")
    if exchange is None:
        assert not dies
        return
    assert {int(p) for p in exchange.dropped} == dies
    kept = {int(p) for p in weight.support.flat} - dies
    grown = {int(p) for p in exchange.grown}
    assert not grown & kept
    assert len(grown) == len(dies)
    values = method.values_after("w", weight, exchange, step=step, seed=seed)
    new = SparseWeight(exchange.new, values).dense().reshape(-1)
    for place in range(40):
        expected = weight.dense().reshape(-1)[place] if place in kept else AWAKENED * sign[place] * (place in grown)
        assert new[place] == expected


def check_uniform(kind=DeepR, conventions=DEFAULT):
    """Any of the dormant places, the just-dropped included, wakes as often as any other (chi-square)."""
    method, weight = one_tensor(0, kind=kind, conventions=conventions)
    kept = set(weight.support.flat) - set(method.exchange({"w": weight}, step=1, seed=0)["w"].dropped)
    dormant = np.array(sorted(set(range(40)) - kept))
    woken = np.zeros(40)
    for step in range(2000):
        woken[method.exchange({"w": weight}, step=step, seed=0)["w"].grown] += 1
    expected = woken.sum() / dormant.size
    statistic = ((woken[dormant] - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-6, dormant.size - 1), "places do not wake with equal chances"


def test_waking_is_uniform():
    check_uniform()


# --- the walk ------------------------------------------------


def check_walk(kind=DeepR):
    """Mean and variance of a strict step without gradient, over many entries."""
    shape, lr, alpha, temperature = (400, 500), 0.3, 0.02, 0.001
    method = kind(Allocation(0.5), penalty=alpha, temperature=temperature)
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=1)["w"]
    sign = signs(1, "w", support.flat)
    weight, bias = SparseWeight(support, sign.copy()), np.ones(3)
    moves = []
    for step in (1, 2):
        before = weight.values.copy()
        method.adjust({"w": weight, "b": bias}, step=step, lr=lr, seed=1)
        moves.append((weight.values - before) * sign)
    variance, n = 2 * lr * temperature, support.nnz
    for move in moves:
        assert abs(move.mean() + lr * alpha) < 5 * np.sqrt(variance / n), "the penalty is another"
        assert abs(move.var() / variance - 1) < 5 * np.sqrt(2 / n), "the noise has another variance"
    noise = [move + lr * alpha for move in moves]
    assert abs((noise[0] * noise[1]).mean()) < 5 * variance / np.sqrt(n), "the steps share their noise"
    assert (bias == 1).all()


def test_the_walk_of_the_strict_form():
    check_walk()


def check_soft_step(kind=DeepR):
    """One step of the trainer against the update written out over all places."""
    lr = 0.05
    trainer = trainer_of(lively(kind=kind, form="soft"), optimizer=SGD(), seed=2, lr=lambda step, epoch: lr)
    train(trainer, 2)
    method = trainer.method
    before = {name: trainer.state.params[name].copy() for name in PRUNABLE}
    window = np.array([trainer.state.window])
    _, grads, _ = trainer.model.loss_and_grads(method.view(trainer.state.params), window, window, [])
    step = trainer.state.step + 1
    trainer.step(window, window)
    for name in PRUNABLE:
        theta, sign = before[name], signs(2, name, np.arange(before[name].size)).reshape(before[name].shape)
        active = theta > 0
        noise = generator(2, f"rewiring/{name}", step).standard_normal(theta.size).reshape(theta.shape)
        jump = np.sqrt(2 * lr * method.temperature) * noise
        moved = theta + jump - np.where(active, lr * (sign * grads[name].dense() + method.penalty), 0)
        density = round(0.4 * theta.size) / theta.size
        least = -(1 - density) / density * method.temperature / method.penalty
        expected = np.maximum(moved, least)
        # Five roundings of numbers of this size, in another order.
        bound = 5 * np.finfo(float).eps * (np.abs(theta) + np.abs(jump) + lr * np.abs(grads[name].dense()) + 1)
        np.testing.assert_array_less(np.abs(trainer.state.params[name] - expected), bound)
        assert (~active).any()
        assert active.any()


def test_the_step_of_the_soft_form():
    check_soft_step()


def test_the_soft_form_starts_with_the_asked_density_and_its_view_has_the_signs():
    trainer = trainer_of(lively(form="soft"), seed=4)
    seen = trainer.method.view(trainer.state.params)
    for name in PRUNABLE:
        theta = trainer.state.params[name].reshape(-1)
        assert np.count_nonzero(theta > 0) == round(0.4 * theta.size)
        assert theta.min() >= trainer.method.least[name]
        expected = np.where(theta > 0, theta * signs(4, name, np.arange(theta.size)), 0)
        np.testing.assert_array_equal(seen[name].dense().reshape(-1), expected)


def check_balance(kind=DeepR):
    """Without gradients the law of the module is in balance: the active fraction stays the density."""
    shape, density, deviation = (100, 200), 0.25, 1 / 30  # of a step, the mean T/α being 1
    method = kind(Allocation(density), penalty=1.0, temperature=1.0, form="soft")
    specs = {"w": ParamSpec("w", shape, "linear", True)}
    method.supports(specs, seed=0)
    params = method.start({"w": np.random.default_rng(0).exponential(1.0, shape)}, specs, seed=0)
    for step in range(1, 1200):  # a walk of more than the mean
        method.view(params)
        method.adjust(params, step=step, lr=deviation**2 / 2, seed=0)
    # Five deviations of the number of active places, and a boundary that steps smear by less than their deviation.
    bound = 5 * np.sqrt(density * (1 - density) / params["w"].size) + density**2 * deviation
    assert abs(np.count_nonzero(params["w"] > 0) / params["w"].size - density) < bound


def test_the_soft_form_holds_its_density():
    check_balance()


# --- errors, memory ------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "penalty"),
        ({"temperature": float("nan")}, "temperature"),
        ({"form": "hard"}, "'strict' or 'soft'"),
        ({"form": "soft", "minimum": 0.0}, "below 0"),
        ({"form": "soft", "temperature": 0.0}, "above 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DeepR(Allocation(0.5), **options)


def test_nothing_dense_is_made_by_the_strict_form():
    shape = (4000, 4000)
    method = DeepR(Allocation(0.005))
    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    params = {"w": SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))}
    params = method.start(params, {}, seed=0)
    params["w"].values[::3] *= -1
    method.adjust(params, step=1, lr=0.1, seed=0)
    exchange = method.exchange(params, step=1, seed=0)["w"]
    method.values_after("w", params["w"], exchange, step=1, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * support.nnz < shape[0] * shape[1]


# --- planted mistakes ----------------------------------------


class SignsDrawnAgain(DeepR):
    def values_after(self, name, weight, exchange, *, step, seed):
        values = super().values_after(name, weight, exchange, step=step, seed=seed)
        return values * np.where(exchange.source < 0, generator(seed, "again", step).choice([-1, 1], values.size), 1)


class NoOneWakes(DeepR):
    def exchange(self, params, *, step, seed, gradients=None):
        found = super().exchange(params, step=step, seed=seed)
        empty = np.empty(0, np.int64)
        return {name: type(e).of(e.old, e.dropped, empty) for name, e in found.items()}


class LateExchange(DeepR):
    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return super().exchange_due(step=step, epoch_end=epoch_end) and step % 2 == 0


class DropsTheSmallest(DeepR):
    def exchange(self, params, *, step, seed, gradients=None):
        flipped = {
            name: SparseWeight(w.support, np.abs(w.values) * self._signs(name, w)) for name, w in params.items()
            if isinstance(w, SparseWeight)
        }  # fmt: skip
        return super().exchange(flipped, step=step, seed=seed)


@pytest.mark.parametrize("kind", [SignsDrawnAgain, NoOneWakes, LateExchange, DropsTheSmallest])
def test_mistakes_in_a_run_are_caught(kind):
    with pytest.raises(AssertionError):
        check_strict(kind)


def test_a_bias_in_waking_is_caught():
    with pytest.raises(AssertionError, match="equal chances"):
        check_uniform(conventions=replace(DEFAULT, regrow="forbid"))


class PenaltyWithoutSign(DeepR):
    def adjust(self, params, *, step, lr, seed):
        for name in self.names:
            params[name].values[...] += self._noise(name, params[name].values, step, lr, seed) - lr * self.penalty


class NoiseScaledByTheLearningRate(DeepR):
    def _noise(self, name, values, step, lr, seed):
        return super()._noise(name, values, step, lr, seed) * np.sqrt(lr)


class SameNoiseInEachStep(DeepR):
    def _noise(self, name, values, step, lr, seed):
        return super()._noise(name, values, 0, lr, seed)


@pytest.mark.parametrize("kind", [PenaltyWithoutSign, NoiseScaledByTheLearningRate, SameNoiseInEachStep])
def test_mistakes_in_the_walk_are_caught(kind):
    with pytest.raises(AssertionError):
        check_walk(kind)


class PenaltyOnTheDormant(DeepR):
    def adjust(self, params, *, step, lr, seed):
        super().adjust(params, step=step, lr=lr, seed=seed)
        for name in self.names:
            theta = params[name]
            theta[theta <= 0] = np.maximum(theta[theta <= 0] - lr * self.penalty, self.least[name])


class NoNoiseOnTheDormant(DeepR):
    def adjust(self, params, *, step, lr, seed):
        before = {name: params[name].copy() for name in self.names}
        super().adjust(params, step=step, lr=lr, seed=seed)
        for name, theta in before.items():
            params[name][theta <= 0] = theta[theta <= 0]


class GradientOfTheWeight(DeepR):
    def pull(self, params, grads):
        return super(DeepR, self).pull(params, grads)


class HalfTheRoomBelow(DeepR):
    def _least(self, density):
        return super()._least(density) / 2


class HotterNoise(DeepR):
    def _noise(self, name, values, step, lr, seed):
        return super()._noise(name, values, step, lr, seed) * np.sqrt(2)


@pytest.mark.parametrize("kind", [PenaltyOnTheDormant, NoNoiseOnTheDormant, HalfTheRoomBelow, HotterNoise])
def test_mistakes_in_the_balance_are_caught(kind):
    with pytest.raises(AssertionError):
        check_balance(kind)


@pytest.mark.parametrize("kind", [PenaltyOnTheDormant, NoNoiseOnTheDormant, GradientOfTheWeight])
def test_mistakes_in_the_soft_step_are_caught(kind):
    with pytest.raises(AssertionError):
        check_soft_step(kind)


def test_a_support_is_what_the_view_of_an_empty_tensor_has():
    method = DeepR(Allocation(0.5), form="soft")
    specs = {"w": ParamSpec("w", (3, 4), "linear", True)}
    method.supports(specs, seed=0)
    assert method.view({"w": -np.ones((3, 4))})["w"].support == Support.empty((3, 4))
