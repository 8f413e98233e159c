"""STR: what is kept is learned, by a threshold.

Gradients are compared with torch's autograd and with differences, both away from kinks; planted mistakes show that the
checks see what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import PRUNABLE, SPECS, caught, drawn, picture, promises, quick, sigma

from refimpl.methods.soft_threshold import STR, THRESHOLD
from refimpl.testing.bounds import gamma
from refimpl.testing.derivatives import extrapolated_slope
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights import Params, SparseWeight, support_of, values_of

U = 2.0**-53


# --- the view


@quick
@given(st.integers(0, 2**32), st.floats(-6, 1))
def test_str_shrinks_by_the_threshold(seed: int, s: float) -> None:
    method = STR(initial_threshold=s)
    params = method.start(drawn(seed), SPECS, seed=0)
    seen = method.view(params)
    assert seen.keys() == SPECS.keys()
    assert seen["fc.bias"] is params["fc.bias"]
    for name in PRUNABLE:
        w, theta = values_of(params[name]), sigma(s)
        expected = np.sign(w) * np.maximum(0, np.abs(w) - theta)
        error = np.abs(picture(seen[name]) - expected)
        assert (error <= 8 * U * (theta + np.abs(w))).all()  # exp, its sum and quotient, the difference; on both sides
        support = support_of(seen[name])
        np.testing.assert_array_equal(support.mask(), np.abs(w) > theta)
        backward = method.gradient_support(name, params)
        assert support == (support if backward is None else backward)
        assert method.update_support(name, params) is None


def test_str_derives_the_same_set_once() -> None:
    method = STR(initial_threshold=-1.0)
    params = method.start(drawn(0), SPECS, seed=0)
    first = method.view(params)
    values_of(params["fc.weight"])[...] *= 1.001
    assert support_of(method.view(params)["fc.weight"]) is support_of(first["fc.weight"])
    values_of(params["fc.weight"])[...] *= 10
    assert support_of(method.view(params)["fc.weight"]) != support_of(first["fc.weight"])


def test_str_at_threshold_zero_is_dense_training() -> None:
    """The logistic function of −800 is 0 in float64, and so is its derivative."""
    from refimpl.methods.dense import Dense

    runs = [trainer_of(method) for method in (STR(initial_threshold=-800.0, penalty=0.0), Dense())]
    for trainer in runs:
        train(trainer, 20)
    for name, weight in runs[1].state.params.items():
        np.testing.assert_array_equal(runs[0].method.view(runs[0].state.params)[name], weight)


# --- gradients


def str_setting(make: Callable[..., Any], seed: int) -> tuple[Any, Params, dict[str, np.ndarray]]:
    """Return a method, parameters with thresholds of their own, and slopes c of the loss Σ c ⊙ W̃ + ½‖W̃‖²."""
    method = make(initial_threshold=-1.0, penalty=0.03)
    rng = np.random.default_rng([seed, 1])
    params = method.start(drawn(seed), SPECS, seed=0)
    for name in PRUNABLE:
        values_of(params[name + THRESHOLD])[...] = rng.uniform(-2, 0.3)
    return method, params, drawn(seed + 1)


def check_str_gradients(make: Callable[..., Any], seed: int) -> None:
    """Compare with torch's autograd, of the formula as the paper has it."""
    torch = pytest.importorskip("torch")
    method, params, slopes = str_setting(make, seed)
    seen = method.view(params)
    grads = promises({name: slopes[name] + picture(seen[name]) for name in SPECS})
    pulled = method.pull(params, grads)
    assert pulled.keys() == params.keys(), "other arrays get gradients than are trained"
    for name in SPECS:
        w = torch.from_numpy(values_of(params[name]).copy()).requires_grad_()
        if name not in PRUNABLE:
            np.testing.assert_array_equal(pulled[name], slopes[name] + values_of(params[name]))
            continue
        s = torch.from_numpy(values_of(params[name + THRESHOLD]).copy()).requires_grad_()
        soft = torch.sign(w) * torch.relu(torch.abs(w) - torch.sigmoid(s))
        loss = (torch.from_numpy(slopes[name]) * soft + soft**2 / 2).sum()
        (loss + 0.015 * ((w**2).sum() + (s**2).sum())).backward()
        size = np.abs(slopes[name]) + 2 * np.abs(values_of(params[name]))  # a bound of |G|, and of |λ w|
        # A dozen roundings on the way to an entry, and those of a sum of n terms, on either side.
        near = np.abs(pulled[name] - w.grad.numpy()) <= 2 * gamma(12, np.float64) * size
        assert near.all(), f"the gradient of {name} differs from torch's"
        bound = 2 * gamma(size.size + 12, np.float64) * (size.sum() + 1)
        assert abs(pulled[name + THRESHOLD] - s.grad.numpy()) <= bound, f"the gradient of s of {name} differs"


@pytest.mark.parametrize("seed", range(3))
def test_str_gradients_against_torch(seed: int) -> None:
    check_str_gradients(STR, seed)


class StraightThrough(STR):
    def _pulled(self, name: str, params: Params, grads: Any) -> tuple[np.ndarray, np.ndarray]:
        _, of_s = super()._pulled(name, params, grads)
        return grads[name].dense() + self.penalty * values_of(params[name]), of_s


class NoDecayOfThresholds(STR):
    def _pulled(self, name: str, params: Params, grads: Any) -> tuple[np.ndarray, np.ndarray]:
        of_weight, of_s = super()._pulled(name, params, grads)
        return of_weight, of_s - self.penalty * values_of(params[name + THRESHOLD])


class NoDecayOfWeights(STR):
    def _pulled(self, name: str, params: Params, grads: Any) -> tuple[np.ndarray, np.ndarray]:
        of_weight, of_s = super()._pulled(name, params, grads)
        return of_weight - self.penalty * values_of(params[name]), of_s


class NoSlope(STR):
    """Takes the threshold itself for what is trained."""

    def _pulled(self, name: str, params: Params, grads: Any) -> tuple[np.ndarray, np.ndarray]:
        of_weight, of_s = super()._pulled(name, params, grads)
        s = values_of(params[name + THRESHOLD])
        decay = self.penalty * s
        return of_weight, decay + (of_s - decay) / (sigma(s) * sigma(-s))


class NoSign(STR):
    def _pulled(self, name: str, params: Params, grads: Any) -> tuple[np.ndarray, np.ndarray]:
        of_weight, _ = super()._pulled(name, params, grads)
        s = values_of(params[name + THRESHOLD])
        total = grads[name].on(support_of(self.view(params)[name])).sum()
        return of_weight, self.penalty * s - sigma(s) * sigma(-s) * total


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (StraightThrough, "gradient of encoder"),
        (NoDecayOfWeights, "gradient of encoder"),
        (NoDecayOfThresholds, "gradient of s"),
        (NoSlope, "gradient of s"),
        (NoSign, "gradient of s"),
    ],
)
def test_wrong_gradients_of_str_are_caught(planted: type[STR], match: str) -> None:
    caught(check_str_gradients, planted, 0, match=match)


def test_str_gradients_against_differences() -> None:
    """Along random directions that cross no kink within the steps of the differences."""
    method, params, slopes = str_setting(STR, 7)
    method.penalty = 0.0
    seen = method.view(params)
    pulled = method.pull(params, promises({name: slopes[name] + picture(seen[name]) for name in SPECS}))
    rng = np.random.default_rng(3)
    near = min(
        float(np.abs(np.abs(values_of(params[n])) - sigma(values_of(params[n + THRESHOLD]))).min()) for n in PRUNABLE
    )
    direction = {name: near * rng.uniform(-1, 1, values_of(w).shape) for name, w in params.items()}  # 1/8 of it at most

    def loss(h: float) -> float:
        moved = {name: values_of(w) + h * direction[name] for name, w in params.items()}
        view = STR().view(dict(moved))
        return sum(float((slopes[n] * picture(view[n]) + picture(view[n]) ** 2 / 2).sum()) for n in SPECS)

    slope, error = extrapolated_slope(loss)
    inner = sum(float((pulled[name] * direction[name]).sum()) for name in params)
    terms = np.concatenate([np.abs(pulled[name] * direction[name]).reshape(-1) for name in params])
    assert abs(slope - inner) <= error + gamma(terms.size + 12, np.float64) * terms.sum()


# --- runs


@pytest.mark.parametrize("s", [-3.0, -0.5])
def test_whole_runs_of_str(s: float) -> None:
    check_run(
        lambda density, steps, epoch: STR(initial_threshold=s, penalty=0.01), "hidden", dense_at_one=False
    )  # fmt: skip


def test_more_decay_is_more_sparsity() -> None:
    counts = []
    for penalty in (0.0, 0.1, 0.3):
        trainer = trainer_of(STR(initial_threshold=-4.0, penalty=penalty))
        train(trainer, 60)
        counts.append(sum(trainer.used().values()))
    assert counts[0] > counts[1] > counts[2]


def test_str_says_when_a_tensor_dies_and_lets_nan_through() -> None:
    method = STR(initial_threshold=9.0)
    params = method.start({name: 0.5 * w / np.abs(w).max() for name, w in drawn(0).items()}, SPECS, seed=0)
    with pytest.raises(ValueError, match=r"all weights of encoder\.weight are below its threshold 0\.9999"):
        method.view(params)
    method = STR()
    params = method.start(drawn(0), SPECS, seed=0)
    values_of(params["fc.weight"])[3, 2] = np.nan
    assert np.isnan(picture(method.view(params)["fc.weight"])[3, 2])
    with pytest.raises(ValueError, match=r"fc\.weight is a sparse weight"):
        method.view(params | {"fc.weight": SparseWeight.from_dense(np.ones((10, 4)))})


def test_float32_stays_float32() -> None:
    trainer = trainer_of(STR(initial_threshold=-2.0), dtype=np.float32)
    train(trainer, 8)
    assert all(values_of(w).dtype == np.float32 for w in trainer.state.params.values())
    assert all(values_of(w).dtype == np.float32 for w in trainer.evaluated().values())


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: STR(initial_threshold=float("nan")), "nan; give a finite number"),
        (lambda: STR(penalty=-1.0), "-1.0; give a finite number of at least 0"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()
