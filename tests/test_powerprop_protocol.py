"""Powerpropagation: where growth begins, and that no question of the protocol is forgotten."""

import inspect
import json
from unittest.mock import MagicMock

import numpy as np
import pytest

from refimpl.methods.allocation import Allocation
from refimpl.methods.base import BaseMethod, Method
from refimpl.methods.conventions import DEFAULT
from refimpl.methods.dense import Dense
from refimpl.methods.powerprop import Powerpropagation
from refimpl.methods.rigl import RigL
from refimpl.methods.schedule import Constant
from refimpl.methods.set import SET
from refimpl.methods.ste import STE
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.weights import Exchange, SparseWeight, Support, values_of

EPS = np.finfo(float).eps
SPECS = QuadraticModel().specs()
PRUNABLE = [name for name, spec in SPECS.items() if spec.prunable]


# --- growth --------------------------------------------------


def grown_then_trained(kind):
    """Return the value of each grown entry at its growth, and after some steps, with the mean |φ| of before."""
    method = kind(SET(Allocation(0.4), Constant(0.3)), 2.0)
    trainer = trainer_of(method)
    train(trainer, 5)
    before = {name: np.abs(values_of(trainer.state.params[name])).mean() for name in PRUNABLE}
    window = np.array([5])
    trainer.step(window, window)
    before = {name: np.abs(values_of(trainer.state.params[name])).mean() for name in PRUNABLE}
    exchanges = trainer.end_epoch(triggered=False)
    out = []
    for name, exchange in exchanges.items():
        new = np.flatnonzero(exchange.source == -1)
        out.append((name, new, trainer.state.params[name].values[new].copy(), before[name]))
    train(trainer, 3)
    return [(was, trainer.state.params[name].values[new], mean) for name, new, was, mean in out]


def check_growth(kind=Powerpropagation):
    for was, now, mean in grown_then_trained(kind):
        assert was.size
        assert np.allclose(np.abs(was), 0.1 * mean, rtol=4 * EPS, atol=0), "growth starts elsewhere"
        assert (was != now).all(), "what has grown does not learn"
    signs = np.sign(np.concatenate([was for was, _, _ in grown_then_trained(kind)]))
    assert 0.2 < (signs > 0).mean() < 0.8


def test_what_grows_can_learn():
    check_growth()


def test_growth_repeats():
    for (a, b, _), (c, d, _) in zip(grown_then_trained(Powerpropagation), grown_then_trained(Powerpropagation)):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)


def test_kept_and_regrown_entries_and_other_starts_are_left_alone():
    inner = SET(Allocation(0.4), Constant(0.3))
    inner.values_after = lambda name, weight, exchange, *, step, seed: np.full(exchange.new.nnz, 7.0)
    method = Powerpropagation(inner, 2.0)
    method.supports(SPECS, seed=0)
    weight = SparseWeight(Support((2, 4), [0, 1, 5]), np.ones(3))
    exchange = Exchange.of(weight.support, np.array([1]), np.array([1, 3]))
    assert np.array_equal(method.values_after("fc.weight", weight, exchange, step=1, seed=0), np.full(4, 7.0))


class GrowsAtZero(Powerpropagation):
    def values_after(self, name, weight, exchange, *, step, seed):
        return self.inner.values_after(name, weight, exchange, step=step, seed=seed)


def test_growth_at_zero_is_caught():
    with pytest.raises(AssertionError):
        check_growth(GrowsAtZero)


# --- the protocol --------------------------------------------


HOOKS = [name for name, member in vars(Method).items() if callable(member) and not name.startswith("_")]


def test_no_question_of_the_protocol_is_forgotten():
    base = [name for name, member in vars(BaseMethod).items() if callable(member) and not name.startswith("_")]
    assert len(HOOKS) > 15
    for name in {*HOOKS, *base}:
        assert name in vars(Powerpropagation), f"{name} is not passed on"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_question_reaches_the_method_inside(hook):
    inner = MagicMock(spec=BaseMethod(), conventions=DEFAULT)
    inner.view.return_value = {}
    inner.exchange.return_value = {"a": 1}
    method = Powerpropagation(inner, 2.0)
    sample = {"state": {"names": [], "inner": {}}, "params": {}, "grads": {}, "specs": {}, "seed": 3, "step": 5}
    arguments = {
        name: sample.get(name, MagicMock())
        for name in inspect.signature(getattr(BaseMethod, hook)).parameters
        if name != "self"
    }
    answer = getattr(method, hook)(**arguments)
    asked = getattr(inner, hook)
    asked.assert_called_once()
    if hook not in ("view", "state_dict", "start", "observe", "adjust", "load_state_dict"):
        assert answer is asked.return_value
    given = inspect.signature(getattr(BaseMethod, hook)).bind(None, *asked.call_args.args, **asked.call_args.kwargs)
    for name in ("step", "seed", "name", "lr", "epoch_end", "asgd_triggered", "weight", "exchange"):
        if name in arguments:
            assert given.arguments[name] is arguments[name], f"{name} is not passed on"


def test_what_else_the_method_inside_has_is_there():
    method = Powerpropagation(RigL(Allocation(0.4), Constant(0.3), interval=7), 2.0)
    assert method.when.interval == 7
    assert method.conventions is method.inner.conventions
    with pytest.raises(AttributeError):
        _ = method.nothing_of_this_name


def test_the_state_is_that_of_the_method_inside_and_fit_for_json():
    method = Powerpropagation(STE(Allocation(0.4)), 2.0)
    trainer = trainer_of(method)
    train(trainer, 2)
    state = json.loads(json.dumps(method.state_dict()))
    other = Powerpropagation(STE(Allocation(0.4)), 2.0)
    other.load_state_dict(state, method.state_arrays())
    for name, weight in method.view(trainer.state.params).items():
        assert np.array_equal(values_of(weight), values_of(other.view(trainer.state.params)[name]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Powerpropagation(Dense(), 0.5),
        lambda: Powerpropagation(Dense(), float("nan")),
        lambda: Powerpropagation(Dense(), float("inf")),
        lambda: Powerpropagation(Dense(), 2.0, grown=0.0),
    ],
)
def test_wrong_options_are_refused(make):
    with pytest.raises(ValueError, match=r"powerpropagation|grown"):
        make()
