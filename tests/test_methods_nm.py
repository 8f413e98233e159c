"""N:M patterns and SR-STE: exact groups, the decay of what is left out, and planted mistakes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.allocation import Allocation
from refimpl.methods.nm import check_nm, nm_flat, nm_keep, nm_order
from refimpl.methods.srste import SRSTE
from refimpl.methods.ste import STE
from refimpl.optim import SGD, Adam
from refimpl.rng import generator
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import NOISE, QuadraticModel, train, trainer_of
from refimpl.weights import ParamSpec, SparseWeight

SPECS = QuadraticModel().specs()
PRUNABLE = [name for name, spec in SPECS.items() if spec.prunable]
LR = 0.05


# --- the pattern ---------------------------------------------


@st.composite
def scored(draw):
    m = draw(st.integers(1, 6))
    n = draw(st.integers(1, m))
    shape = (draw(st.integers(1, 5)), m * draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    return (rng.integers(0, 3, shape).astype(float) if draw(st.booleans()) else rng.standard_normal(shape)), n, m


def check_pattern(keep):
    @settings(max_examples=150, deadline=None, database=None)
    @given(scored())
    def law(case):
        scores, n, m = case
        mask = keep(scores, n, m)
        assert mask.shape == scores.shape
        assert mask.dtype == bool
        for row in range(scores.shape[0]):
            for start in range(0, scores.shape[1], m):
                group = range(start, start + m)
                best = sorted(group, key=lambda j: -scores[row, j])[:n]  # stable: of equal ones the first
                assert [j for j in group if mask[row, j]] == sorted(best)

    law()


def test_exactly_the_n_largest_of_each_group():
    check_pattern(nm_keep)


def higher_wins(scores, n, m):
    groups = scores.reshape(-1, m)
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, np.argsort(groups, axis=1, kind="stable")[:, m - n :], True, axis=1)
    return keep.reshape(scores.shape)


def smallest(scores, n, m):
    return nm_keep(-scores, n, m)


def zeroes_n(scores, n, m):
    return nm_keep(scores, max(m - n, 1), m)


def by_threshold(scores, n, m):
    groups = scores.reshape(-1, m)
    return (groups >= np.sort(groups, axis=1)[:, [m - n]]).reshape(scores.shape)


def down_the_rows(scores, n, m):
    return nm_keep(np.ascontiguousarray(scores.T).reshape(scores.shape), n, m)


@pytest.mark.parametrize("mistake", [higher_wins, smallest, zeroes_n, by_threshold, down_the_rows])
def test_mistakes_in_the_pattern_are_caught(mistake):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        check_pattern(mistake)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_a_convolution_is_grouped_by_channels(outputs, inputs, height, width, seed):
    shape = (outputs, 4 * inputs, height, width)
    w = np.random.default_rng(seed).standard_normal(shape)
    assert np.array_equal(
        w.reshape(outputs, -1)[:, nm_order(shape)], np.transpose(w, (0, 2, 3, 1)).reshape(outputs, -1)
    )
    mask = np.zeros(w.size, bool)
    mask[nm_flat(np.abs(w), 2, 4)] = True
    channels_last = np.transpose(mask.reshape(shape), (0, 2, 3, 1))
    assert (channels_last.reshape(-1, 4).sum(1) == 2).all()
    assert np.array_equal(nm_flat(np.abs(w), 2, 4), np.flatnonzero(mask))


def test_groups_of_a_convolution_with_few_channels_pass_from_one_position_to_the_next():
    w = np.arange(1.0, 9).reshape(1, 2, 2, 2)  # two channels, four positions
    kept = np.zeros(8, bool)
    kept[nm_flat(w, 2, 4)] = True
    # positions (0,0) and (0,1) of both channels are one group: 1, 5, 2, 6; the others are 3, 7, 4, 8
    assert set(w.reshape(-1)[kept]) == {5, 6, 7, 8}


def test_a_matrix_is_grouped_in_order():
    assert np.array_equal(nm_order((3, 8)), np.arange(8))


@pytest.mark.parametrize(
    ("shape", "n", "m", "says"),
    [
        ((3, 6), 2, 4, "groups of 4"),
        ((8,), 2, 4, "groups of 4"),
        ((3, 8), 0, 4, "1 <= N <= M"),
        ((3, 8), 5, 4, "1 <= N <= M"),
        ((3, 8), 1.5, 4, "whole numbers"),
        ((3, 8), True, 4, "whole numbers"),
    ],
)
def test_impossible_patterns_are_refused(shape, n, m, says):
    with pytest.raises(ValueError, match=says):
        check_nm(shape, n, m, "w")


def test_scores_that_are_nan_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        nm_keep(np.array([[1, np.nan, 2, 3]]), 2, 4)


# --- SR-STE --------------------------------------------------


def half(specs, density):
    return sum(spec.size for spec in specs.values() if spec.prunable) // 2


def test_whole_runs():
    check_run(
        lambda d, steps, epoch: SRSTE((2, 4) if d < 1 else (4, 4), penalty=0.01), "hidden", counts=half, density=0.5
    )
    check_run(
        lambda d, steps, epoch: STE(None if d < 1 else Allocation(1.0), pattern=(1, 2) if d < 1 else (2, 2)),
        "hidden",
        counts=half,
        density=0.5,
    )


@pytest.mark.parametrize("optimizer", [SGD(0.9, weight_decay=0.01), Adam()])
def test_without_the_penalty_it_is_ste_with_the_pattern(optimizer):
    runs = []
    for method in (SRSTE((1, 4), penalty=0.0), STE(None, pattern=(1, 4)), STE(Allocation(0.25), pattern=(1, 4))):
        trainer = trainer_of(method, optimizer=optimizer)
        train(trainer, 10)
        runs.append(trainer.state.params)
    for other in runs[1:]:
        assert all(np.array_equal(runs[0][name], other[name]) for name in SPECS)


def masked_run(steps, penalty, momentum=0.9, epoch=6):
    """SR-STE written out with dense masks and SGD; groups are found by sorting each by itself."""
    model = QuadraticModel()
    w = {name: np.array(array) for name, array in model.init(0, np.float64).items()}
    v = {name: np.zeros_like(array) for name, array in w.items()}

    def mask_of(array):
        last = np.moveaxis(array, 1, -1)  # input channels last; a matrix as it is
        mask = np.zeros(last.size)
        flat = np.abs(last.reshape(-1))
        for start in range(0, flat.size, 4):
            for j in sorted(range(start, start + 4), key=lambda j: -flat[j])[:2]:
                mask[j] = 1
        return np.moveaxis(mask.reshape(last.shape), -1, 1)

    for step in range(steps):
        m = {name: mask_of(w[name]) if name in PRUNABLE else np.ones_like(w[name]) for name in w}
        for name in w:
            noise = NOISE * generator(6, f"noise/{name}", step % epoch).standard_normal(w[name].shape)
            g = m[name] * w[name] - model.target(name) - noise + penalty * (1 - m[name]) * w[name]
            v[name] = momentum * v[name] + g
        for name in w:
            w[name] = w[name] - LR * v[name]
    return w


def check_srste_run(kind=SRSTE):
    trainer = trainer_of(kind((2, 4), penalty=0.3))
    train(trainer, 12)
    expected = masked_run(12, 0.3)
    for name, w in expected.items():
        # 12 steps of a handful of additions on numbers of size 1, in another order
        assert np.abs(trainer.state.params[name] - w).max() <= 12 * 10 * 4 * np.finfo(float).eps


def test_it_is_its_algorithm():
    check_srste_run()


class DecaysWhatIsUsed(SRSTE):
    def pull(self, params, grads):
        pulled = STE.pull(self, params, grads)
        for name, (a,) in self.chosen(params).items():
            pulled[name] = pulled[name] + self.penalty * params[name] * a.support.mask()
        return pulled


class Grows(SRSTE):
    def __init__(self, pattern, *, penalty):
        super().__init__(pattern, penalty=penalty)
        self.penalty = -penalty


class Decoupled(SRSTE):
    """Shrinks what is left out after the optimizer's step, past its momentum."""

    def pull(self, params, grads):
        return STE.pull(self, params, grads)

    def adjust(self, params, *, step, lr, seed):
        for name, (a,) in self.chosen(params).items():
            params[name][~a.support.mask()] *= 1 - lr * self.penalty


class AlongTheKernel(SRSTE):
    def choose(self, params, step):
        return {
            name: (np.flatnonzero(nm_keep(np.abs(params[name]).reshape(params[name].shape[0], -1), *self.pattern)),)
            for name in self.patterned
        }


@pytest.mark.parametrize("mutant", [DecaysWhatIsUsed, Grows, Decoupled, AlongTheKernel])
def test_mistakes_in_srste_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_srste_run(mutant)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-4, 0.5))
def test_without_a_gradient_only_what_is_left_out_shrinks(seed, penalty):
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(spec.shape) for name, spec in SPECS.items()}
    method = SRSTE((2, 4), penalty=penalty)
    method.supports(SPECS, seed=0)
    seen = method.view(params)
    pulled = method.pull(params, {name: np.zeros(spec.shape) for name, spec in SPECS.items()})
    for name in PRUNABLE:
        assert isinstance(seen[name], SparseWeight)
        used = seen[name].support.mask()
        assert (pulled[name][used] == 0).all()
        after = params[name] - 0.5 * pulled[name]
        assert (np.abs(after[~used]) < np.abs(params[name][~used])).all()
    assert (pulled["fc.bias"] == 0).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SRSTE((3, 2)), "1 <= N <= M"),
        (lambda: SRSTE(penalty=-1), "penalty"),
        (lambda: SRSTE(penalty=float("nan")), "penalty"),
        (lambda: STE(Allocation(0.3), pattern=(2, 4)), "density 0.5"),
        (lambda: STE(Allocation(0.5, "erk"), pattern=(2, 4)), "uniform"),
        (lambda: STE(Allocation(0.5, fixed={"a": 0.2}), pattern=(2, 4)), "fix it at 1"),
        (lambda: STE(None, pattern=(2, 4), scope="global"), "no global count"),
    ],
)
def test_wrong_options_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_tensor_that_does_not_divide_is_named_before_training():
    specs = {"w": ParamSpec("w", (4, 6), "linear", True), "v": ParamSpec("v", (4, 8), "linear", True)}
    with pytest.raises(ValueError, match="w of shape"):
        SRSTE().supports(specs, seed=0)
    method = STE(Allocation(0.5, fixed={"w": 1.0}), pattern=(2, 4))
    method.supports(specs, seed=0)
    params = {name: np.ones(spec.shape) for name, spec in specs.items()}
    assert method.view(params)["w"] is params["w"]
    assert isinstance(method.view(params)["v"], SparseWeight)
