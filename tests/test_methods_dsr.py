"""DSR: the total, the threshold, shares by survivors, and that nothing just pruned grows back; and sharing out."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import dsr as dsr_module
from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.dsr import DSR, Doubling
from refimpl.methods.shares import share_out
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights.carry import Exchange
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)
SHAPES = {"a": (6, 5), "b": (4, 2, 3, 1), "c": (9, 4)}
SPECS = {name: ParamSpec(name, shape, "linear", True, layer="x") for name, shape in SHAPES.items()}


# --- sharing out ---------------------------------------------


@st.composite
def sharings(draw):
    n = draw(st.integers(1, 6))
    room = draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    shares = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0, 1e3), min_size=n, max_size=n))
    return draw(st.integers(0, sum(room))), shares, room


def real_shares(total, shares, room):
    """Fill the pools in fractions, without rounding: what is over is shared again."""
    out = [Fraction(0)] * len(room)
    open_ = [i for i, r in enumerate(room) if r]
    while open_:
        rest = total - sum(out[i] for i in range(len(room)) if i not in open_)
        weights = {i: Fraction(shares[i]) for i in open_}
        if not sum(weights.values()):
            weights = {i: Fraction(room[i]) for i in open_}
        quota = {i: rest * w / sum(weights.values()) for i, w in weights.items()}
        full = [i for i in open_ if quota[i] >= room[i]]
        if not full:
            return [out[i] if i not in open_ else quota[i] for i in range(len(room))]
        for i in full:
            out[i] = Fraction(room[i])
        open_ = [i for i in open_ if i not in full]
    return out


def check_sharing(share, case):
    total, shares, room = case
    counts = share(total, shares, room)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (counts <= room).all()
    for count, real in zip(counts, real_shares(total, shares, room)):
        assert abs(int(count) - real) < 1 + Fraction(1, 10**6), "a count is no rounding of its share"


@given(sharings())
@settings(max_examples=300)
def test_sharing_out(case):
    check_sharing(share_out, case)


def test_sharing_out_by_hand():
    np.testing.assert_array_equal(share_out(10, [1, 1, 2], [9, 9, 9]), [3, 2, 5])  # 2.5, 2.5, 5: the earlier is raised
    np.testing.assert_array_equal(share_out(10, [1, 1, 2], [9, 9, 3]), [4, 3, 3])
    np.testing.assert_array_equal(share_out(6, [0, 0, 5], [4, 8, 3]), [1, 2, 3])
    for wrong in ([1, np.nan], [1, -1]):
        with pytest.raises(ValueError, match="finite and at least 0"):
            share_out(1, wrong, [3, 3])
    with pytest.raises(ValueError, match="room for 6"):
        share_out(7, [1, 1], [3, 3])


# --- one exchange --------------------------------------------


def problem(seed, density=0.3, kind=DSR, **options):
    """Return a method and weights of its supports, of very different sizes in different tensors."""
    method = kind(Allocation(density, "erk"), **options)
    rng = np.random.default_rng(seed)
    params = {
        name: SparseWeight(support, rng.standard_normal(support.nnz) * 10.0 ** -rng.integers(0, 4))
        for name, support in method.supports(SPECS, seed=seed).items()
    }
    return method, params


def check_exchange(kind, seed, density, limit):
    method, params = problem(seed, density, kind, threshold=limit)
    exchanges = method.exchange(params, step=7, seed=seed)
    total = sum(w.nnz for w in params.values())
    assert sum(e.new.nnz for e in exchanges.values()) == total, "the total is not conserved"
    free = sum(w.support.size - w.nnz for w in params.values())
    gone = {name: set(exchanges[name].dropped.tolist()) for name in params}
    pruned = sum(len(g) for g in gone.values())
    flagged = {}
    for name, w in params.items():
        largest = int(np.argmax(np.abs(w.values)))
        flagged[name] = {int(p) for i, p in enumerate(w.support.flat) if abs(w.values[i]) < limit and i != largest}
        assert not exchanges[name].regrown.size, "what was just pruned grew back"
    if sum(map(len, flagged.values())) <= free:
        assert gone == flagged, "other entries were pruned than those below the threshold"
    else:
        assert pruned == free
        magnitudes = {(n, p): abs(w.dense().flat[p]) for n, w in params.items() for p in flagged[n]}
        cut = sorted(magnitudes.values())[free - 1] if free else -1
        assert all(magnitudes[n, p] <= cut for n in gone for p in gone[n]), "not the smallest were pruned"
    survivors = [w.nnz - len(gone[name]) for name, w in params.items()]
    room = [w.support.size - w.nnz for w in params.values()]
    want = real_shares(pruned, survivors, room)
    for name, share in zip(params, want):
        assert abs(exchanges[name].grown.size - share) < 1 + 1e-6, "growth is not shared out by the survivors"
    asked = int(0.2 * total)
    below = sum(map(len, flagged.values()))
    expected = 2 * limit if below < 0.9 * asked else limit / 2 if below > 1.1 * asked else limit
    assert method.threshold.after == expected, "the threshold was not adapted as the rule says"
    values = {name: method.values_after(name, w, exchanges[name], step=7, seed=seed) for name, w in params.items()}
    for name, e in exchanges.items():
        dense = SparseWeight(e.new, values[name]).dense().reshape(-1)
        assert not dense[e.grown].any(), "a new connection does not start at 0"
    again = method.exchange(params, step=7, seed=seed)
    assert all(again[name].new == e.new for name, e in exchanges.items()), "the exchange does not repeat"


CASES = (seeds, st.floats(0.15, 0.95), st.floats(1e-4, 3))


@given(*CASES)
@settings(max_examples=150, deadline=None)
def test_one_exchange(seed, density, limit):
    check_exchange(DSR, seed, density, limit)


@pytest.mark.parametrize("pool", ["gate", "layer"])
def test_other_pools(pool):
    method, params = problem(3, threshold=0.5, conventions=Conventions(pool=pool, regrow="keep"))
    exchanges = method.exchange(params, step=1, seed=0)
    assert sum(e.new.nnz for e in exchanges.values()) == sum(w.nnz for w in params.values())
    assert not any(e.regrown.size for e in exchanges.values())


# --- whole runs ----------------------------------------------


def quick(density, kind=DSR):
    return kind(Allocation(density), interval=2, threshold=0.02, growth_period=8)


@pytest.mark.parametrize("density", [0.4, 0.9])
def test_whole_runs(density):
    check_run(
        lambda d, total, epoch: quick(d), "dynamic", density=density,
        counts=lambda specs, d: sum(round(d * spec.size) for spec in specs.values() if spec.prunable),
    )  # fmt: skip


def test_layers_move_and_the_threshold_goes_by_powers_of_two():
    thresholds, counts = [], []

    def look(trainer):
        thresholds.append(trainer.method.threshold.after)
        counts.append(tuple(w.nnz for w in trainer.state.params.values() if isinstance(w, SparseWeight)))

    train(trainer_of(quick(0.4)), 24, look)
    exponents = np.log2(np.array(thresholds) / 0.02)
    np.testing.assert_array_equal(exponents, np.rint(exponents))
    assert np.abs(np.diff(exponents)).max() == 1
    assert len(set(counts)) > 3
    assert len({sum(c) for c in counts}) == 1


def test_the_interval_doubles():
    when = Doubling(10, 100, times=2)
    due = [step for step in range(1, 401) if when(step=step, epoch_end=False)]
    assert due == [*range(10, 100, 10), *range(100, 200, 20), *range(200, 401, 40)]
    assert not when(step=100, epoch_end=True)


@pytest.mark.parametrize(
    "options", [{"drop_fraction": 0}, {"drop_fraction": 1.5}, {"threshold": 0.0}, {"interval": 0}, {"growth_period": 0}]
)
def test_errors(options):
    with pytest.raises(ValueError, match=r"give"):
        DSR(Allocation(0.5), **options)


def test_a_nan_is_refused():
    method, params = problem(0)
    params["a"].values[2] = np.nan
    with pytest.raises(ValueError, match="is NaN"):
        method.exchange(params, step=1, seed=0)


def test_nothing_dense_is_made():
    shape = (4000, 4000)
    method = DSR(Allocation(0.005), threshold=0.3)
    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    params = {"w": SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))}
    method.exchange(params, step=1, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * support.nnz < shape[0] * shape[1]


# --- planted mistakes ----------------------------------------


def rounded_shares(total, shares, room):
    shares = np.asarray(shares, float)
    return np.minimum(np.rint(total * shares / shares.sum()).astype(int), room)


def equal_shares(total, shares, room):
    return share_out(total, np.ones(len(shares)), room)


@pytest.mark.parametrize("wrong", [rounded_shares, equal_shares])
def test_wrong_shares_are_caught(wrong, monkeypatch):
    def law(case):
        check_sharing(wrong, case)

    with pytest.raises((AssertionError, BaseExceptionGroup)):
        settings(max_examples=300, database=None)(given(sharings().filter(lambda c: any(c[1])))(law))()
    monkeypatch.setattr(dsr_module, "share_out", wrong)
    assert caught(DSR)


def caught(kind):
    """Tell whether the law of one exchange fails for some of these cases."""
    for seed in range(12):
        try:
            check_exchange(kind, seed, 0.3, 0.1)
        except (AssertionError, ValueError):
            return True
    return False


class LetsThePrunedReturn(DSR):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.conventions = Conventions()


class KeepsTheThreshold(DSR):
    def _adapted(self, limit, pruned, stored):
        return limit


class AdaptsTheOtherWay(DSR):
    def _adapted(self, limit, pruned, stored):
        return limit * limit / super()._adapted(limit, pruned, stored)


class GrowsWhereItPruned(DSR):
    def exchange(self, params, *, step, seed, gradients=None):
        out = super().exchange(params, step=step, seed=seed)
        free = {name: np.setdiff1d(np.arange(e.old.size), e.old.flat) for name, e in out.items()}
        return {name: Exchange.of(e.old, e.dropped, free[name][: e.dropped.size]) for name, e in out.items()}


def test_the_unmutated_method_passes():
    assert not caught(DSR)


@pytest.mark.parametrize("kind", [LetsThePrunedReturn, KeepsTheThreshold, AdaptsTheOtherWay, GrowsWhereItPruned])
def test_mistakes_are_caught(kind):
    assert caught(kind)


def test_a_tensor_with_all_weights_below_the_threshold_keeps_its_largest():
    method, params = problem(0, threshold=1e9)
    exchanges = method.exchange(params, step=1, seed=0)
    for name, w in params.items():
        largest = int(w.support.flat[np.argmax(np.abs(w.values))])
        assert largest not in exchanges[name].dropped
        assert Support(w.shape, [largest]) in exchanges[name].new
