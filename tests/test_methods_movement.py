"""Movement pruning: what is kept is learned, by scores.

Masks are found again by sorting, scores as the sum that they are, the gradient of the penalty by torch's autograd;
planted mistakes show that the checks see what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import PRUNABLE, SPECS, TOTAL, caught, count_of_each, drawn, picture, promises, quick, sigma

from refimpl.methods.allocation import Allocation, count_at
from refimpl.methods.movement import SCORES, Movement
from refimpl.optim import SGD, Adam
from refimpl.testing.bounds import gamma
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights import Params, SparseWeight, support_of, values_of

U = 2.0**-53


def scored(make: Callable[..., Any], **options: Any) -> Any:
    """Return a method at density 0.4, from step 2 to step 12."""
    return make(Allocation(0.4), begin_step=2, end_step=12, **options)


def check_masks(make: Callable[..., Any], interval: int = 1) -> None:
    """Watch a run: A is the K(t) largest scores as of the last renewal, and all before the first."""
    method = scored(make, interval=interval, scores_lr=2.0)
    trainer = trainer_of(method)
    expected = {name: np.ones(spec.size, bool) for name, spec in PRUNABLE.items()}

    def watch(t: Any) -> None:
        step = t.state.step
        if t.state.window and step >= 2 and ((step - 2) % interval == 0 or step == 12):
            left = max(Fraction(0), 1 - Fraction(step - 2, 10))
            for name, spec in PRUNABLE.items():
                density = Fraction(0.4) + (1 - Fraction(0.4)) * left**3
                scores = values_of(t.state.params[name + SCORES]).reshape(-1)
                best = sorted(range(spec.size), key=lambda p: -scores[p])[: round(density * spec.size)]
                expected[name] = np.isin(np.arange(spec.size), best)
        for name, weight in method.view(t.state.params).items():
            if name in PRUNABLE:
                mask = support_of(weight).mask().reshape(-1)
                assert np.array_equal(mask, expected[name]), f"after step {step} A of {name} is another"
                full = values_of(t.state.params[name])
                assert np.array_equal(picture(weight), np.where(mask.reshape(full.shape), full, 0)), "other values"

    train(trainer, 18, watch)
    assert [method.settled(t) for t in (11, 12)] == [False, True]


@pytest.mark.parametrize("interval", [1, 4])
def test_the_mask_is_of_the_largest_scores(interval: int) -> None:
    check_masks(Movement, interval)


class ByMagnitudeOfScores(Movement):
    def choose(self, params: Params, step: int) -> Any:
        scores = {name + SCORES: np.abs(values_of(params[name + SCORES])) for name in self.density}
        return super().choose(params | scores, step)


class ByMagnitudeOfWeights(Movement):
    def choose(self, params: Params, step: int) -> Any:
        scores = {name + SCORES: np.abs(values_of(params[name])) for name in self.density}
        return super().choose(params | scores, step)


class StopsAtTheEnd(Movement):
    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        return super().exchange_due(step=step, epoch_end=epoch_end) and step < 12


@pytest.mark.parametrize("planted", [ByMagnitudeOfScores, ByMagnitudeOfWeights, StopsAtTheEnd])
def test_wrong_masks_are_caught(planted: type[Movement]) -> None:
    caught(check_masks, planted, match="is another")


def check_scores(make: Any) -> None:
    r"""Check :math:`S = -\eta_S \sum_t G_t \odot W_t` under plain gradient descent, and what moves besides."""
    log: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    class Watched(make):
        def observe(self, params: Params, grads: Any, *, step: int) -> None:
            used = {name: support_of(self.view(params)[name]).mask() for name in PRUNABLE}
            gradients = {name: grads[name].dense() for name in PRUNABLE}
            log.append((gradients, {name: values_of(params[name]).copy() for name in PRUNABLE}, used))

    trainer = trainer_of(scored(Watched, scores_lr=3.0), optimizer=SGD())
    steps = 20
    train(trainer, steps)
    for name in PRUNABLE:
        terms = np.array([3.0 * 0.05 * g[name].astype(np.longdouble) * w[name] for g, w, _ in log])
        bound = gamma(steps + 4, np.float64) * np.abs(terms).sum(axis=0)
        error = np.abs(values_of(trainer.state.params[name + SCORES]) + terms.sum(axis=0))
        assert (error <= bound).all(), f"the scores of {name} are not the sum that they should be"
        later = [w[name] for _, w, _ in log[1:]] + [values_of(trainer.state.params[name])]
        for (g, w, used), after in zip(log, later, strict=True):
            moved = after != w[name]
            assert not moved[~used[name]].any(), f"weights of {name} moved that are not in use"
            here = np.abs(after - (w[name] - 0.05 * g[name]))[used[name]]
            assert (here <= 3 * U * (np.abs(w[name]) + np.abs(g[name]))[used[name]]).all(), f"{name} moved otherwise"


def test_scores_are_the_movement() -> None:
    check_scores(Movement)


class MaskedScores(Movement):
    """Lets the scores of what is not in use stand still."""

    def pull(self, params: Params, grads: Any) -> dict[str, np.ndarray]:
        pulled = super().pull(params, grads)
        for name in self.density:
            pulled[name + SCORES] = pulled[name + SCORES] * support_of(self.view(params)[name]).mask()
        return pulled


class MovesEverything(Movement):
    """Lets the gradient move weights that are not in use."""

    def update_support(self, name: str, params: Params) -> None:
        return None

    def pull(self, params: Params, grads: Any) -> dict[str, np.ndarray]:
        return super().pull(params, grads) | {name: grads[name].dense() for name in PRUNABLE}


class OfTheView(Movement):
    """Multiplies with M ⊙ W in place of W."""

    def pull(self, params: Params, grads: Any) -> dict[str, np.ndarray]:
        pulled = super().pull(params, grads)
        for name in self.density:
            pulled[name + SCORES] = grads[name].dense() * picture(self.view(params)[name])
        return pulled


class OtherSign(Movement):
    def pull(self, params: Params, grads: Any) -> dict[str, np.ndarray]:
        pulled = super().pull(params, grads)
        return pulled | {name + SCORES: -pulled[name + SCORES] for name in self.density}


class SameRate(Movement):
    def lr_scale(self, name: str) -> float:
        return 1.0


class RateOfWeights(Movement):
    def lr_scale(self, name: str) -> float:
        return self.scores_lr


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (MaskedScores, "not the sum"),
        (OfTheView, "not the sum"),
        (OtherSign, "not the sum"),
        (SameRate, "not the sum"),
        (MovesEverything, "not in use"),
        (RateOfWeights, "moved otherwise"),
    ],
)
def test_wrong_scores_are_caught(planted: type[Movement], match: str) -> None:
    caught(check_scores, planted, match=match)


@pytest.mark.parametrize("optimizer", [SGD(0.9, weight_decay=0.1), Adam(weight_decay=0.1)])
def test_neither_momentum_nor_decay_moves_what_is_not_in_use(optimizer: Any) -> None:
    method = scored(Movement, interval=5)
    trainer = trainer_of(method, optimizer=optimizer)
    train(trainer, 7)
    used = {name: support_of(method.view(trainer.state.params)[name]).mask() for name in PRUNABLE}
    before = {name: values_of(trainer.state.params[name]).copy() for name in PRUNABLE}
    train(trainer, 3)
    for name in PRUNABLE:
        moved = values_of(trainer.state.params[name]) != before[name]
        np.testing.assert_array_equal(moved, used[name])


def test_frozen_weights_still_change_the_mask() -> None:
    class Frozen(Movement):
        def lr_scale(self, name: str) -> float:
            return super().lr_scale(name) if name.endswith(SCORES) else 0.0

    method = scored(Frozen, scores_lr=1.0)
    trainer = trainer_of(method, optimizer=SGD())
    before = {name: values_of(trainer.state.params[name]).copy() for name in PRUNABLE}
    masks = []
    train(trainer, 20, lambda t: masks.append({n: support_of(method.view(t.state.params)[n]) for n in PRUNABLE}))
    assert any(masks[-1][name] != masks[14][name] for name in PRUNABLE)
    for name in PRUNABLE:
        np.testing.assert_array_equal(values_of(trainer.state.params[name]), before[name])
        assert masks[-1][name].nnz == count_at(0.4, PRUNABLE[name].size)


def test_a_weight_that_moves_away_from_zero_gains() -> None:
    method = scored(Movement)
    method.supports(SPECS, seed=0)
    params = method.start(drawn(0), SPECS, seed=0)
    grads = drawn(1)
    pulled = method.pull(params, promises(grads))
    for name in PRUNABLE:
        w = values_of(params[name])
        gains = -pulled[name + SCORES] > 0
        np.testing.assert_array_equal(gains, np.abs(w - 1e-6 * grads[name]) > np.abs(w))


# --- the soft form


@quick
@given(st.integers(0, 2**32), st.floats(0.05, 0.9), st.floats(-8, 2))
def test_the_soft_mask_is_what_is_above_the_threshold(seed: int, tau: float, centre: float) -> None:
    method = scored(Movement, form="soft", threshold=tau)
    method.supports(SPECS, seed=0)
    params = method.start(drawn(seed), SPECS, seed=0)
    rng = np.random.default_rng(seed)
    for name in PRUNABLE:
        values_of(params[name + SCORES])[...] = rng.normal(centre, 1.5, PRUNABLE[name].shape)
    assert method.exchange(params, step=2, seed=0) == {}
    for name, spec in PRUNABLE.items():
        scores = values_of(params[name + SCORES])
        least = int(0.005 * spec.size) + 1
        above = sigma(scores) > tau
        mask = support_of(method.view(params)[name]).mask()
        if np.count_nonzero(above) >= least:
            np.testing.assert_array_equal(mask, above)
        else:
            assert set(np.flatnonzero(mask)) == set(np.argsort(-scores, axis=None)[:least])


def test_all_weights_are_used_before_the_first_renewal() -> None:
    method = Movement(Allocation(0.4), begin_step=0, end_step=9, form="soft", threshold=0.7)
    for _ in range(2):  # a method may begin anew
        trainer = trainer_of(method)
        assert all(isinstance(w, np.ndarray) for w in method.view(trainer.state.params).values())
        train(trainer, 1)
        assert all(isinstance(method.view(trainer.state.params)[name], SparseWeight) for name in PRUNABLE)


def test_the_soft_floor_of_a_large_tensor() -> None:
    from refimpl.weights import ParamSpec

    specs = {"w": ParamSpec("w", (50, 31), "linear", True)}
    method = scored(Movement, form="soft")
    method.supports(specs, seed=0)
    params = method.start({"w": np.ones((50, 31))}, specs, seed=0)
    values_of(params["w" + SCORES])[...] = -50 - np.arange(1550.0).reshape(50, 31)
    method.exchange(params, step=2, seed=0)
    np.testing.assert_array_equal(support_of(method.view(params)["w"]).flat, np.arange(8))  # trunc(7.75) + 1


def check_penalty(make: Callable[..., Any]) -> None:
    """Compare the gradient of the penalty with torch's, of the mean over all scores."""
    torch = pytest.importorskip("torch")
    method = scored(make, form="soft", penalty=200.0)
    method.supports(SPECS, seed=0)
    params = method.start(drawn(0), SPECS, seed=0)
    rng = np.random.default_rng(2)
    for name in PRUNABLE:
        values_of(params[name + SCORES])[...] = rng.normal(0, 2, PRUNABLE[name].shape)
    pulled = method.pull(params, promises({name: np.zeros(spec.shape) for name, spec in SPECS.items()}))
    scores = {name: torch.from_numpy(values_of(params[name + SCORES]).copy()).requires_grad_() for name in PRUNABLE}
    (200.0 * torch.sigmoid(torch.cat([s.reshape(-1) for s in scores.values()])).mean()).backward()
    for name, s in scores.items():
        error = np.abs(pulled[name + SCORES] - s.grad.numpy())
        # The derivative is a product of numbers below 1, known to a few units each; 1 - sigma cancels in torch's.
        assert (error <= 8 * U * 200.0 / TOTAL).all(), f"the penalty on the scores of {name} is another"


def test_the_penalty_is_of_the_mean() -> None:
    check_penalty(Movement)


def test_a_penalty_of_each_tensors_mean_is_caught() -> None:
    class OfEach(Movement):
        def _penalty_gradient(self, name: str, params: Params) -> Any:
            scores = values_of(params[name + SCORES])
            return self.penalty / scores.size / len(self.density) * sigma(scores) * sigma(-scores)

    caught(check_penalty, OfEach, match="is another")


# --- runs, states, errors


@pytest.mark.parametrize("interval", [1, 4])
def test_whole_runs_of_movement(interval: int) -> None:
    def make(density: float, steps: int, epoch: int) -> Movement:
        return Movement(Allocation(density), begin_step=2, end_step=15, interval=interval, scores_lr=0.5)

    check_run(make, "hidden", counts=count_of_each)


def test_whole_runs_of_the_soft_form() -> None:
    def make(density: float, steps: int, epoch: int) -> Movement:
        return Movement(
            Allocation(density), begin_step=2, end_step=15, form="soft", threshold=0.4, penalty=50.0, scores_lr=5.0
        )

    check_run(make, "hidden")
    trainer = trainer_of(make(0.4, 24, 6))
    train(trainer, 24)
    assert sum(trainer.used().values()) < TOTAL


def test_a_state_is_needed_for_nothing_but_itself() -> None:
    trainer = trainer_of(scored(Movement))
    train(trainer, 8)
    other = scored(Movement)
    other.load_state_dict(trainer.method.state_dict(), trainer.method.state_arrays())
    for _ in range(2):
        one, two = (method.view(trainer.state.params) for method in (trainer.method, other))
        assert one.keys() == two.keys() == SPECS.keys()
        assert all(support_of(one[name]) == support_of(two[name]) for name in PRUNABLE)
        for method in (trainer.method, other):
            method.exchange(trainer.state.params, step=12, seed=0)


def test_a_state_without_its_places_is_refused() -> None:
    trainer = trainer_of(scored(Movement))
    train(trainer, 8)
    with pytest.raises(ValueError, match=r"lacks the sets of encoder\.weight"):
        scored(Movement).load_state_dict(trainer.method.state_dict())


HALF = Allocation(0.5)
FIRM: Any = "firm"


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: Movement(HALF, begin_step=3, end_step=2), "from step 3 to step 2; give"),
        (lambda: Movement(HALF, begin_step=0, end_step=2, interval=0), "0 steps; give at least 1"),
        (lambda: Movement(HALF, begin_step=0, end_step=2, form=FIRM), "'firm'; give 'hard' or 'soft'"),
        (lambda: Movement(HALF, begin_step=0, end_step=2, threshold=1.0), "1.0; give a number from 0"),
        (lambda: Movement(HALF, begin_step=0, end_step=2, penalty=1.0), "hard form has none; give 0"),
        (lambda: Movement(HALF, begin_step=0, end_step=2, scores_lr=float("inf")), "scores_lr.*give a finite"),
        (lambda: Movement(Allocation(1e-3), begin_step=0, end_step=2).supports(SPECS, seed=0), "would keep none"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


def test_scores_that_are_nan_are_refused() -> None:
    method = scored(Movement, form="soft")
    method.supports(SPECS, seed=0)
    params = method.start(drawn(0), SPECS, seed=0)
    values_of(params["fc.weight" + SCORES])[...] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        method.exchange(params, step=3, seed=0)


@pytest.mark.parametrize("options", [{}, {"form": "soft", "penalty": 9.0}])
def test_float32_stays_float32(options: Any) -> None:
    trainer = trainer_of(Movement(Allocation(0.4), begin_step=1, end_step=5, **options), dtype=np.float32)
    train(trainer, 8)
    assert all(values_of(w).dtype == np.float32 for w in trainer.state.params.values())
    assert all(values_of(w).dtype == np.float32 for w in trainer.evaluated().values())
