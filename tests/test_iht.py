"""k-IHT and AC/DC on sparse least squares: what theory predicts, and the numbers that were measured elsewhere.

The measured problem is 400 rows, 200 unknowns, 10 of them not zero, η = 1/L; its draw is not known, so that figures are
compared over draws of our own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import iht
from refimpl.methods.iht import LeastSquares, alternate, hard_threshold, iterate
from refimpl.methods.phases import Phases

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import iht as tool

quick = settings(max_examples=40, deadline=None)
SEEDS = range(5)


@cache
def problem(seed: int) -> LeastSquares:
    return LeastSquares.draw(np.random.default_rng(seed))


# --- the operator


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20), st.data())
def test_the_k_largest_stay(entries: list[int], data: Any) -> None:
    k = data.draw(st.integers(0, len(entries)))
    theta = np.array(entries, float)
    kept = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))[:k]
    expected = [entries[i] if i in kept else 0 for i in range(len(entries))]
    found = hard_threshold(theta, k)
    assert found.tolist() == expected
    assert np.array_equal(hard_threshold(found, k), found)  # a projection
    others = theta[np.random.default_rng(k).permutation(theta.size)]  # no other choice of k entries is nearer
    assert ((theta - found) ** 2).sum() <= (np.sort(others**2)[: theta.size - k]).sum() + 1e-9


def test_the_gradient_is_that_of_the_loss() -> None:
    small = LeastSquares.draw(np.random.default_rng(1), rows=9, size=6, nonzero=2)
    theta, h = np.random.default_rng(2).standard_normal(6), 1e-4
    for i, unit in enumerate(np.eye(6)):  # exact for a quadratic, whatever h
        slope = (small.loss(theta + h * unit) - small.loss(theta - h * unit)) / (2 * h)
        assert slope == pytest.approx(small.gradient(theta)[i], rel=1e-8, abs=1e-8)
    assert small.loss(small.truth) == 0
    np.testing.assert_allclose(small.gradient(theta), small.hessian @ (theta - small.truth), rtol=1e-12, atol=1e-14)


# --- linear convergence, support recovery


def check_converges(run: Callable[..., iht.Path] = iterate) -> None:
    """Once the support stays, f falls by (1 − μ_S/L)² a step at least, until rounding is all that is left."""
    for seed in SEEDS:
        for k in (10, 20, 40):
            found = run(problem(seed), k, 120)
            assert problem(seed).recovered(found.theta), "the support was not recovered"
            assert np.count_nonzero(found.theta) <= k, "more entries than k"
            falling = found.losses[found.moved :]
            falling = falling[falling > 1e-24]
            assert falling.size > 3, "the support kept moving"
            rate = problem(seed).rate(found.theta)
            assert (falling[1:] <= rate * falling[:-1] * (1 + 1e-3)).all(), "slower than the spectrum says"
            assert falling[-1] / falling[-2] > 0.9 * rate  # nor faster, in the end


def test_convergence_is_linear_and_the_support_is_found() -> None:
    check_converges()


def test_measured_losses() -> None:
    """L/μ = 31. After 10 and 50 steps 8.1e-3 and 3.9e-14 (k = 10), 3.0e-2 and 8.2e-11 (20), 6.3e-2 and 7.4e-8 (40)."""
    measured = {10: (8.1e-3, 3.9e-14), 20: (3.0e-2, 8.2e-11), 40: (6.3e-2, 7.4e-8)}
    at = {k: [iterate(problem(seed), k, 50).losses[[10, 50]] for seed in SEEDS] for k in measured}
    for k, (early, late) in measured.items():
        drawn = np.log10(at[k])
        middle, spread = drawn.mean(axis=0), drawn.std(axis=0, ddof=1)
        assert (np.abs(middle - np.log10([early, late])) < 4 * spread).all()
    final = [np.log10(at[k])[:, 1].mean() for k in measured]
    assert final[0] < final[1] < final[2]
    conditions = [problem(seed).spectrum[-1] / problem(seed).spectrum[0] for seed in SEEDS]
    assert np.mean(conditions) == pytest.approx(31, rel=0.1)
    assert max(conditions) < 34 * 1.1  # (1 + √½)² / (1 − √½)² for ever larger matrices


def test_too_few_entries_leave_a_loss() -> None:
    found = iterate(problem(0), 5, 60)
    assert not problem(0).recovered(found.theta)
    assert found.losses[-1] > 1e-2


# --- the floor


def noisy(seed: int, k: int, variance: float, steps: int = 1500) -> iht.Path:
    return iterate(problem(seed), k, steps, variance=variance, rng=np.random.default_rng(7))


def check_floor(run: Callable[[int, int, float], iht.Path] = noisy) -> None:
    """From θ*, twice the noise of one draw puts every iterate twice as far away, whatever entries are chosen."""
    for k in (10, 20):
        paths = [run(1, k, variance) for variance in (0.0025, 0.01, 0.04)]
        floors = [path.floor(800) for path in paths]
        assert floors[1] / floors[0] == pytest.approx(4, rel=1e-9)
        assert floors[2] / floors[1] == pytest.approx(4, rel=1e-9)


def test_the_floor_is_in_proportion_to_the_variance() -> None:
    check_floor()


def test_measured_floors() -> None:
    """6.29e-5, 2.52e-4 and 1.007e-3 at σ² = 0.0025, 0.01 and 0.04, with k = 20."""
    floors = np.array([noisy(seed, 20, 0.01).floor(1000) for seed in SEEDS])
    assert abs(floors.mean() - 2.52e-4) < 4 * floors.std(ddof=1)
    assert floors.std() < 0.1 * floors.mean()


def test_the_floor_of_a_support_that_stays() -> None:
    """With k = k* nothing is to choose: the stationary loss is η σ²/(2 d) Σ 1/(2 − η λ) over the spectrum of H_SS."""
    one, variance = problem(2), 0.01
    on = np.flatnonzero(one.truth)
    spectrum = np.linalg.eigvalsh(one.hessian[np.ix_(on, on)])
    expected = one.lr * variance / (2 * one.truth.size) * (1 / (2 - one.lr * spectrum)).sum()
    path = noisy(2, 10, variance, 6000)
    # In each direction the loss decorrelates within 1/(2 η λ) steps or so; about 5,900 steps times 10 directions.
    independent = 5900 * (2 * one.lr * spectrum).clip(max=1).sum()
    assert path.floor(5900) == pytest.approx(expected, rel=4 * (2 / independent) ** 0.5)


# --- AC/DC


def test_alternating_finds_the_same_answer() -> None:
    """Phases of five steps, k = 20: 4e-31 was reached, and the support recovered."""
    for seed in SEEDS:
        found = alternate(problem(seed), 20, [("dense", 5), ("compressed", 5)] * 30)
        assert problem(seed).recovered(found.theta)
        assert found.losses[-1] < 1e-28
        assert np.count_nonzero(found.theta) <= 20


def test_alternating_is_the_loop() -> None:
    """Against the loop with masks, from the phases of a schedule."""
    phases = Phases.spread(20).until(20)
    one = problem(3)
    found = alternate(one, 15, [(phase.kind, 3 * phase.length) for phase in phases])
    theta, losses = np.zeros(200), [one.loss(np.zeros(200))]
    for kind, start, stop in phases:
        mask = np.ones(200)
        if kind == "compressed":
            mask[np.argsort(np.abs(theta))[:-15]] = 0
            theta = theta * mask
        for _ in range(3 * (stop - start)):
            theta = theta - one.lr * one.gradient(theta) * mask
            losses.append(one.loss(theta))
    assert np.array_equal(found.theta, theta)
    assert np.array_equal(found.losses, losses)


def test_without_projection_it_is_gradient_descent() -> None:
    one = problem(4)
    every = iterate(one, 200, 30)
    assert np.array_equal(every.losses, alternate(one, 3, [("dense", 30)]).losses)
    theta = np.zeros(200)
    for _ in range(30):
        theta = theta - one.lr * one.gradient(theta)
    assert np.array_equal(every.theta, theta)


# --- the tool


def test_the_tool_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--steps", "30"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("k = 10", "k = 40", "AC/DC", "0.04", "recovered"))
    pytest.importorskip("matplotlib")
    assert tool.main(["--steps", "30", "--plot", str(tmp_path / "iht.png")]) == 0
    assert (tmp_path / "iht.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        tool.main(["--steps", "0"])


# --- errors, and planted mistakes


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: hard_threshold(np.ones(4), 5), "k is 5; give how many of the 4 entries"),
        (lambda: hard_threshold(np.array([np.nan, 1.0]), 1), "NaN"),
        (lambda: iterate(problem(0), -1, 5), "k is -1"),
        (lambda: alternate(problem(0), 201, [("compressed", 1)]), "k is 201"),
        (lambda: iterate(problem(0), 5, 5, variance=0.1), "rng is None; give"),
        (lambda: iterate(problem(0), 5, 5, variance=-1.0), "variance of the noise is -1"),
        (lambda: LeastSquares.draw(np.random.default_rng(0), rows=5, size=10, nonzero=2), "5 rows, 10 unknowns"),
        (lambda: LeastSquares.draw(np.random.default_rng(0), nonzero=0), "give 1 <= nonzero"),
    ],
)
def test_bad_arguments(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


def test_catches_planted_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def signed(theta: np.ndarray, k: int) -> np.ndarray:
        return np.where(theta >= np.sort(theta)[-k], theta, 0)

    def one_more(theta: np.ndarray, k: int) -> np.ndarray:
        return hard_threshold(theta, k + 1)

    def by_half(theta: np.ndarray, k: int) -> np.ndarray:
        return hard_threshold(theta, k) * 0.5

    for planted in (signed, one_more, by_half):
        with monkeypatch.context() as patch:
            patch.setattr(iht, "hard_threshold", planted)
            with pytest.raises(AssertionError):
                check_converges()

    def half(self: LeastSquares, theta: np.ndarray) -> np.ndarray:
        return self.hessian @ (theta - self.truth) / 2

    with monkeypatch.context() as patch:
        patch.setattr(LeastSquares, "gradient", half)
        with pytest.raises(AssertionError, match="slower"):
            check_converges()

    def not_scaled(seed: int, k: int, variance: float) -> iht.Path:
        return iterate(problem(seed), k, 1500, variance=variance**2, rng=np.random.default_rng(7))

    def other_draws(seed: int, k: int, variance: float) -> iht.Path:
        return iterate(problem(seed), k, 1500, variance=variance, rng=np.random.default_rng(int(1e4 * variance)))

    for wrong in (not_scaled, other_draws):
        with pytest.raises(AssertionError):
            check_floor(wrong)
