"""SNFS: the momentum against a dense one, the total, shares and ranks by momentum."""

import tracemalloc

import numpy as np
import pytest
from gradient_cases import RandomBlocks
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import snfs as snfs_module
from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.onestep import ArrayGradient
from refimpl.methods.schedule import Constant
from refimpl.methods.snfs import SNFS
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)
SHAPES = {"a": (6, 5), "b": (4, 2, 3, 1), "c": (9, 4)}
SPECS = {name: ParamSpec(name, shape, "linear", True, layer="x") for name, shape in SHAPES.items()}


def count(specs, density):
    return sum(round(density * spec.size) for spec in specs.values() if spec.prunable)


@pytest.mark.parametrize("interval", [None, 3])
@pytest.mark.parametrize("regrow", ["keep", "forbid"])
def test_whole_runs(interval, regrow):
    def make(density, total, epoch):
        conventions = Conventions(regrow=regrow)
        return SNFS(Allocation(density), 0.3, total_steps=total, interval=interval, conventions=conventions)

    check_run(make, "dynamic", counts=count)


def test_whole_runs_in_which_tensors_become_dense():
    check_run(
        lambda d, total, epoch: SNFS(Allocation(d), 0.5, total_steps=total, interval=2),
        "dynamic", counts=count, density=0.9,
    )  # fmt: skip


def test_it_takes_every_step_and_asks_for_every_gradient():
    method = SNFS(Allocation(0.5), 0.3, total_steps=10, interval=2)
    method.supports(SPECS, seed=0)
    assert [method.needs_gradient(t) and not method.replaces_step(t) for t in (1, 2, 3)] == [True] * 3
    assert [method.exchange_due(step=t, epoch_end=False) for t in (1, 2, 3)] == [False, True, False]
    by_epoch, _ = start(0)
    assert by_epoch.exchange_due(step=5, epoch_end=True)
    assert not by_epoch.exchange_due(step=5, epoch_end=False)


# --- the momentum --------------------------------------------


def start(seed, density=0.3, kind=SNFS, fraction=0.4, **options):
    method = kind(Allocation(density, "erk"), Constant(fraction), **options)
    rng = np.random.default_rng(seed)
    params = {
        name: SparseWeight(support, rng.standard_normal(support.nnz))
        for name, support in method.supports(SPECS, seed=seed).items()
    }
    return method, params


def gradients_of(seed, step):
    rng = np.random.default_rng([seed, step])
    scales = {name: 10.0 ** rng.integers(-2, 2) for name in SHAPES}
    return {name: scales[name] * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def check_momentum(kind):
    """Against SGD's momentum in torch over a dense parameter that does not move, of which M is the 1 − β-fold."""
    torch = pytest.importorskip("torch")
    method, params = start(0, kind=kind, decay=0.8)
    theirs = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=0.0, momentum=0.8)
    for step in range(1, 8):
        gradients = gradients_of(0, step)
        method.observe(params, {name: ArrayGradient(g, 2) for name, g in gradients.items()}, step=step)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradients[name])
        optimizer.step()
    for name, parameter in theirs.items():
        expected = 0.2 * optimizer.state[parameter]["momentum_buffer"].numpy()
        # Seven steps of three roundings each on numbers below the sum of the magnitudes.
        bound = 30 * np.finfo(float).eps * sum(np.abs(gradients_of(0, t)[name]) for t in range(1, 8))
        difference = method.momentum[name].reshape(expected.shape) - expected
        assert (np.abs(difference) <= bound).all(), "the momentum is another than a dense one"


def test_the_momentum_is_a_dense_one():
    check_momentum(SNFS)


# --- one exchange --------------------------------------------


def expected_exchange(params, momentum, fraction, forbid):
    """Write the exchange out over dense arrays; return what is dropped, the real shares, and the room."""
    dropped, contribution, room = {}, [], []
    for name, w in params.items():
        order = sorted(range(w.nnz), key=lambda i: (abs(w.values[i]), -i))
        flat = w.support.flat
        dropped[name] = {int(flat[i]) for i in order[: int(fraction * w.nnz)]}
        contribution.append(np.abs(momentum[name].reshape(-1)[flat]).mean())
        room.append(w.support.size - w.nnz + (0 if forbid else len(dropped[name])))
    total = sum(map(len, dropped.values()))
    counts, open_ = np.zeros(len(room)), np.array(room) > 0
    while True:  # in real numbers: what a tensor has no room for goes to the others
        share = np.where(open_, contribution, 0)
        quota = (total - counts[~open_].sum()) * share / max(share.sum(), 1e-300)
        full = open_ & (quota > np.array(room))
        if not full.any():
            break
        counts[full], open_ = np.array(room)[full], open_ & ~full
    return dropped, np.where(open_, quota, counts), room


def check_exchange(kind, seed, density, fraction, regrow="keep"):
    method, params = start(seed, density, kind, fraction, conventions=Conventions(regrow=regrow))
    for step in (1, 2):
        gradients = {name: ArrayGradient(g, 2) for name, g in gradients_of(seed, step).items()}
        method.observe(params, gradients, step=step)
    momentum = {name: 0.9 * 0.1 * gradients_of(seed, 1)[name] + 0.1 * gradients_of(seed, 2)[name] for name in SHAPES}
    dropped, shares, room = expected_exchange(params, momentum, fraction, regrow == "forbid")
    if sum(map(len, dropped.values())) > sum(room):
        with pytest.raises(ValueError, match="room"):
            method.exchange(params, step=2, seed=seed)
        return
    exchanges = method.exchange(params, step=2, seed=seed)
    assert sum(e.new.nnz for e in exchanges.values()) == sum(w.nnz for w in params.values()), "the total has changed"
    for name, share, limit in zip(params, shares, room):
        e, w = exchanges[name], params[name]
        assert set(e.dropped.tolist()) == dropped[name], "not the smallest weights were dropped"
        assert e.grown.size <= limit, "a tensor grew beyond its places"
        assert abs(e.grown.size - share) < 1 + 1e-6, "growth is not shared out by the mean momentum"
        score = np.abs(momentum[name].reshape(-1))
        kept = set(w.support.flat.tolist()) - dropped[name]
        barred = set(w.support.flat.tolist()) if regrow == "forbid" else kept
        free = sorted(set(range(w.support.size)) - barred, key=lambda p: -score[p])
        assert set(e.grown.tolist()) == set(free[: e.grown.size]), "growth is not where the momentum is largest"


@given(seeds, st.floats(0.15, 0.95), st.floats(0, 1), st.sampled_from(["keep", "forbid"]))
@settings(max_examples=150, deadline=None)
def test_one_exchange(seed, density, fraction, regrow):
    check_exchange(SNFS, seed, density, fraction, regrow)


@pytest.mark.parametrize("pool", ["gate", "layer"])
def test_other_pools(pool):
    method, params = start(1, conventions=Conventions(pool=pool))
    method.observe(params, {name: ArrayGradient(g) for name, g in gradients_of(1, 1).items()}, step=1)
    exchanges = method.exchange(params, step=1, seed=0)
    assert sum(e.new.nnz for e in exchanges.values()) == sum(w.nnz for w in params.values())


def test_tensors_gain_and_lose_in_a_run():
    counts = set()
    trainer = trainer_of(SNFS(Allocation(0.4), 0.3, total_steps=24, interval=2))
    train(
        trainer, 24, lambda t: counts.add(tuple(w.nnz for w in t.state.params.values() if isinstance(w, SparseWeight)))
    )
    assert len(counts) > 3
    assert len({sum(c) for c in counts}) == 1


def test_errors():
    with pytest.raises(ValueError, match="total_steps"):
        SNFS(Allocation(0.5), 0.3)
    with pytest.raises(ValueError, match="below 1"):
        SNFS(Allocation(0.5), 0.3, total_steps=9, decay=1.0)
    method, params = start(0)
    with pytest.raises(ValueError, match="observe"):
        method.exchange(params, step=1, seed=0)


def test_the_momentum_is_all_that_is_dense():
    shape = (2000, 2000)
    method = SNFS(Allocation(0.005), Constant(0.5))

    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    params = {"w": SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))}
    tracemalloc.start()
    method.observe(params, {"w": RandomBlocks(shape)}, step=1)
    method.exchange(params, step=1, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    momentum, block = 4 * 2000 * 2000, 4 * 25 * 2000
    assert momentum < peak < momentum + 150 * support.nnz + 5 * block + (1 << 20)


# --- planted mistakes ----------------------------------------


class MaskedMomentum(SNFS):
    def observe(self, params, grads, *, step):
        super().observe(params, grads, step=step)
        for name, m in self.momentum.items():
            m *= params[name].support.mask().reshape(m.shape)


class ForgetsTheFactor(SNFS):
    def observe(self, params, grads, *, step):
        for m in self.momentum.values():
            m /= self.decay
        super().observe(params, grads, step=step)


@pytest.mark.parametrize("kind", [MaskedMomentum, ForgetsTheFactor])
def test_a_wrong_momentum_is_caught(kind):
    with pytest.raises(AssertionError, match="another than a dense one"):
        check_momentum(kind)


def caught(kind):
    for seed in range(10):
        for density, fraction in ((0.3, 0.4), (0.9, 0.6)):
            try:
                check_exchange(kind, seed, density, fraction)
            except (AssertionError, ValueError):
                return True
    return False


class LandsOnWhatIsThere(SNFS):
    """Zero-score picks land on active places: the count decays."""

    def exchange(self, params, *, step, seed, gradients=None):
        out = super().exchange(params, step=step, seed=seed)
        return {name: type(e).of(e.old, e.dropped, e.grown[: e.grown.size // 2]) for name, e in out.items()}


def test_the_unmutated_method_passes():
    assert not caught(SNFS)


def test_mistakes_in_the_exchange_are_caught(monkeypatch):
    assert caught(MaskedMomentum)
    assert caught(LandsOnWhatIsThere)
    shares = snfs_module.share_out
    for wrong in (
        lambda total, share, room: shares(total, np.ones(len(share)), room),
        lambda total, share, room: np.floor(total * np.array(share) / np.sum(share)).astype(int),
    ):
        monkeypatch.setattr(snfs_module, "share_out", wrong)
        assert caught(SNFS)
    monkeypatch.setattr(snfs_module, "share_out", shares)
    monkeypatch.setattr(snfs_module, "_on", lambda m, s: SparseWeight(Support(s.shape, s.flat), np.ones(s.nnz)))
    assert caught(SNFS)
