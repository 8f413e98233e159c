"""MEST: the score on the support alone, the soft memory bound, and the count in the end."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.mest import MEST
from refimpl.testing.method_runs import check_run
from refimpl.testing.methods import check_method
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight

seeds = st.integers(0, 2**32 - 1)
SOFT = 15


def count(specs, density):
    return sum(round(density * spec.size) for spec in specs.values() if spec.prunable)


def quick(density, form="EM&S", kind=MEST, **options):
    options = {"extra_density": 0.1, "interval": 3, "soft_until_step": SOFT} | options
    return kind(Allocation(density), form=form, **options)


class OnlyOn:
    """A gradient that can be evaluated on a support, and in no other way."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def on(self, support):
        return self.array.reshape(-1)[support.flat]


# --- whole runs ----------------------------------------------


@pytest.mark.parametrize("form", ["EM", "EM&S"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_whole_runs(form, weight):
    check_run(lambda d, total, epoch: quick(d, form, gradient_weight=weight), "dynamic", counts=count)


@pytest.mark.parametrize("form", ["EM", "EM&S"])
@pytest.mark.parametrize("conventions", [Conventions(pool="gate"), Conventions(pool="layer", regrow="forbid")])
def test_whole_runs_of_other_conventions(form, conventions):
    check_run(
        lambda d, total, epoch: quick(d, form, interval=None, gradient_weight=0, conventions=conventions), "dynamic",
        counts=count,
    )  # fmt: skip


def test_a_falling_drop_fraction():
    check_run(
        lambda d, total, epoch: quick(d, drop_fraction=lambda step: 0.5 * (1 - step / SOFT)), "dynamic", counts=count
    )


@pytest.mark.parametrize("conventions", [Conventions(), Conventions(pool="gate"), Conventions(regrow="forbid")])
def test_the_laws_of_drop_and_grow(conventions):
    check_method(
        lambda density, fraction: MEST(
            Allocation(density), drop_fraction=fraction, gradient_weight=0, interval=3, soft_until_step=2000,
            conventions=conventions,
        ),
        max_examples=25,
    )  # fmt: skip


def check_counts(kind, density=0.3):
    """In each tensor: never more than its part of d + p, more than d in the soft phase, and d in the end."""
    peaks, ends = {}, {}

    def look(trainer):
        for name, weight in trainer.state.params.items():
            if isinstance(weight, SparseWeight):
                peaks[name] = max(peaks.get(name, 0), weight.nnz)
                ends[name] = weight.nnz
                soft = trainer.state.step < SOFT
                target = round(density * weight.support.size)
                held = target + int(0.1 / density * target) * soft
                assert weight.nnz == held, f"{weight.nnz} entries are held after step {trainer.state.step}, not {held}"

    trainer = trainer_of(quick(density, kind=kind))
    look(trainer)
    train(trainer, SOFT + 6, look)
    size = sum(spec.size for spec in trainer.specs.values() if spec.prunable)
    assert sum(ends.values()) == count(trainer.specs, density)
    assert sum(ends.values()) < sum(peaks.values()) <= size * (density + 0.1) + len(peaks)


def test_the_peak_and_the_final_count():
    check_counts(MEST)


def test_a_tensor_without_room_holds_all_its_places():
    method = quick(0.9, extra_density=0.5)
    supports = method.supports({"w": ParamSpec("w", (5, 8), "linear", True)}, seed=0)
    assert supports["w"].nnz == 40
    params = {"w": SparseWeight(supports["w"], np.arange(1.0, 41.0))}
    exchange = method.exchange(params, step=SOFT, seed=0, gradients={"w": OnlyOn(np.zeros((5, 8)))})["w"]
    assert exchange.new.flat.tolist() == list(range(4, 40))


def test_when():
    specs = {"w": ParamSpec("w", (5, 8), "linear", True)}
    due = {}
    for form in ("EM", "EM&S"):
        method = quick(0.3, form)
        method.supports(specs, seed=0)
        due[form] = [t for t in range(40) if method.exchange_due(step=t, epoch_end=False)]
        assert not any(method.exchange_due(step=t, epoch_end=True) or method.needs_gradient(t) for t in range(40))
        assert [method.settled(t) for t in (1, 14, 15)] == [form == "EM", form == "EM", True]
    assert due == {"EM": [3, 6, 9, 12], "EM&S": [3, 6, 9, 12, 15]}
    by_epoch = quick(0.3, interval=None, gradient_weight=0)
    by_epoch.supports(specs, seed=0)
    assert [t for t in (6, 12, 15, 18) if by_epoch.exchange_due(step=t, epoch_end=True)] == [6, 12]
    assert [t for t in range(40) if by_epoch.exchange_due(step=t, epoch_end=False)] == [15]


# --- one exchange --------------------------------------------


def check_exchange(kind, seed, form, step, weight):
    """Drop by sorting the scores of the stored entries; what grows was not kept, starts at 0, and fills up."""
    density, extra = 0.3, 0.15
    method = quick(density, form, kind, extra_density=extra, gradient_weight=weight)
    specs = {name: ParamSpec(name, shape, "linear", True) for name, shape in (("a", (6, 5)), ("b", (4, 2, 3)))}
    rng = np.random.default_rng(seed)
    params, gradients = {}, {}
    for name, support in method.supports(specs, seed=seed).items():
        params[name] = SparseWeight(support, rng.standard_normal(support.nnz))
        gradients[name] = OnlyOn(rng.standard_normal(support.shape))
    exchanges = method.exchange(params, step=step, seed=seed, gradients=gradients)
    for name, w in params.items():
        e = exchanges[name]
        target = round(density * w.support.size)
        flat = w.support.flat
        score = np.abs(w.values) + weight * np.abs(gradients[name].array.reshape(-1)[flat])
        order = sorted(range(w.nnz), key=lambda i: (score[i], -i))
        last = form == "EM&S" and step >= SOFT
        fraction = extra / (density + extra * (form == "EM&S"))
        gone = order[: w.nnz - target if last else int(fraction * w.nnz)]
        assert set(e.dropped.tolist()) == set(flat[gone].tolist()), "not the smallest scores were dropped"
        assert e.new.nnz == (target if last else w.nnz), "the count is another"
        values = method.values_after(name, w, e, step=step, seed=seed)
        new, kept = SparseWeight(e.new, values).dense().reshape(-1), np.delete(flat, gone)
        np.testing.assert_array_equal(new[kept], w.dense().reshape(-1)[kept])
        fresh = np.setdiff1d(e.grown, flat)
        assert not new[fresh].any(), "a new connection does not start at 0"


@given(seeds, st.sampled_from(["EM", "EM&S"]), st.sampled_from([3, 14, 15]), st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=100, deadline=None)
def test_one_exchange(seed, form, step, weight):
    check_exchange(MEST, seed, form, step, weight)


@pytest.mark.parametrize("form", ["EM", "EM&S"])
def test_nothing_dense_is_made(form):
    shape = (4000, 4000)
    method = MEST(
        Allocation(0.004), extra_density=0.001, interval=1, soft_until_step=9, form=form
    )  # fmt: skip

    class Gradient:
        def on(self, support):
            return np.ones(support.nnz)

    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    weight = SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))
    for step in (1, 9):
        method.exchange({"w": weight}, step=step, seed=0, gradients={"w": Gradient()})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert support.nnz <= shape[0] * shape[1] * 0.005
    assert peak < 150 * support.nnz < shape[0] * shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "EM-S"}, "'EM&S'"),
        ({"gradient_weight": -1.0}, "at least 0"),
        ({"extra_density": 1.5}, "from 0 to 1"),
        ({"interval": None}, "gradient_weight=0"),
        ({"form": "EM", "extra_density": 0.4}, "lower extra_density"),
        ({"drop_fraction": 1.5}, "drop fraction"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        quick(0.3, **options)


def test_a_score_needs_the_gradient():
    method = quick(0.3)
    support = method.supports({"w": ParamSpec("w", (5, 8), "linear", True)}, seed=0)["w"]
    with pytest.raises(ValueError, match="gradient of w"):
        method.exchange({"w": SparseWeight(support, np.ones(support.nnz))}, step=3, seed=0)


# --- planted mistakes ----------------------------------------


class NeverLeavesTheSoftBound(MEST):
    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return step < self.soft_until_step and super().exchange_due(step=step, epoch_end=epoch_end)


class GrowsAtTheEnd(MEST):
    def _down(self, scored):
        return {}


class StartsWithoutTheExtraEntries(MEST):
    def supports(self, specs, *, seed):
        form, self.form = self.form, "EM"
        drawn = super().supports(specs, seed=seed)
        self.form = form
        return drawn


@pytest.mark.parametrize("kind", [NeverLeavesTheSoftBound, GrowsAtTheEnd, StartsWithoutTheExtraEntries])
def test_mistakes_in_the_counts_are_caught(kind):
    with pytest.raises(AssertionError):
        check_counts(kind)


class GradientWithItsSign(MEST):
    def _scores(self, params, gradients):
        weights = {name: SparseWeight(w.support, np.abs(w.values)) for name, w in params.items()}
        return {
            name: SparseWeight(w.support, w.values + self.gradient_weight * gradients[name].on(w.support))
            for name, w in weights.items()
        }


class MagnitudeAlone(MEST):
    def _scores(self, params, gradients):
        return {name: SparseWeight(w.support, np.abs(w.values)) for name, w in params.items()}


class DenseGradient(MEST):
    def _scores(self, params, gradients):
        return super()._scores(params, {name: OnlyOn(g.dense()) for name, g in gradients.items()})


class DropsTheLargest(MEST):
    def _scores(self, params, gradients):
        scored = super()._scores(params, gradients)
        return {name: SparseWeight(w.support, 1 / w.values) for name, w in scored.items()}


@pytest.mark.parametrize("kind", [GradientWithItsSign, MagnitudeAlone, DenseGradient, DropsTheLargest])
@pytest.mark.parametrize("form", ["EM", "EM&S"])
def test_mistakes_in_the_score_are_caught(kind, form):
    with pytest.raises((AssertionError, AttributeError)):
        check_exchange(kind, 1, form, 3, 1.0)
