"""Dense weights with a sparse forward pass: DPF and STE against their formulas, and planted mistakes."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_cases import PRUNABLE, SPECS, TOTAL, count_of_all, count_of_each, drawn

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.dpf import DPF
from refimpl.methods.ste import STE
from refimpl.models.mlp import MLP
from refimpl.rng import generator
from refimpl.testing.method_runs import check_run
from refimpl.testing.methods import check_method
from refimpl.testing.quadratic import NOISE, QuadraticModel, train, trainer_of
from refimpl.weights import ParamSpec, SparseWeight, Support, support_of

LR = 0.05


def test_whole_runs_of_dpf():
    check_run(
        lambda d, steps, epoch: DPF(Allocation(d), interval=4, end_step=steps - epoch - 1),
        "hidden",
        counts=count_of_each,
    )
    check_run(
        lambda d, steps, epoch: DPF(Allocation(d), interval=3, end_step=10, scope="global", initial_sparsity=0.2),
        "hidden",
        counts=count_of_all,
    )


def test_whole_runs_of_ste():
    check_run(lambda d, steps, epoch: STE(Allocation(d, "erk")), "hidden", counts=None)
    check_run(lambda d, steps, epoch: STE(Allocation(d), scope="global"), "hidden", counts=count_of_all)


@pytest.mark.parametrize("conventions", [Conventions(), Conventions(pool="gate")])
def test_single_exchanges(conventions):
    for make in (
        lambda density, fraction: DPF(Allocation(density), end_step=500, conventions=conventions),
        lambda density, fraction: STE(Allocation(density), conventions=conventions),
    ):
        check_method(make, growth=None, max_examples=15)


# --- the sets ------------------------------------------------


def used(method, params):
    """Return the places of A as (tensor, flat position)."""
    return {(name, int(p)) for name in PRUNABLE for p in support_of(method.view(params)[name]).flat}


def brute(params, names, count):
    """Return the ``count`` places of largest magnitude, the first of equal ones, by a stable sort of all."""
    places = [(name, p, abs(float(w))) for name in names for p, w in enumerate(params[name].reshape(-1))]
    return {(name, p) for name, p, _ in sorted(places, key=lambda place: -place[2])[:count]}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 0.95), st.booleans(), st.integers(0, 60))
def test_dpf_follows_the_cubic_to_the_entry(seed, density, tied, step):
    params = drawn(seed, tied)
    end, first = 50, Fraction(0.8)
    left = Fraction(max(end - step, 0), end)
    now = lambda d: float(Fraction(d) + (max(Fraction(d), first) - Fraction(d)) * left**3)  # noqa: E731

    method = DPF(Allocation(density), interval=10, end_step=end, initial_sparsity=float(1 - first))
    method.supports(SPECS, seed=0)
    method.exchange(params, step=step, seed=0)
    expected = set()
    for name in PRUNABLE:
        expected |= brute(params, [name], round(now(density) * SPECS[name].size))
    assert used(method, params) == expected

    method = DPF(Allocation(density), interval=10, end_step=end, initial_sparsity=float(1 - first), scope="global")
    method.supports(SPECS, seed=0)
    method.exchange(params, step=step, seed=0)
    assert used(method, params) == brute(params, PRUNABLE, round(now(density) * TOTAL))


def test_a_fixed_tensor_has_its_own_density_and_the_rest_one_threshold():
    params = drawn(1)
    method = STE(Allocation(0.25, fixed={"fc.weight": 1.0, "encoder.weight": 0.5}), scope="global")
    method.supports(SPECS, seed=0)
    rest = [name for name in PRUNABLE if name not in ("fc.weight", "encoder.weight")]
    count = round(0.25 * sum(SPECS[name].size for name in rest))
    expected = brute(params, rest, count) | brute(params, ["encoder.weight"], 24) | brute(params, ["fc.weight"], 40)
    assert used(method, params) == expected
    assert method.view(params)["fc.weight"] is params["fc.weight"]


def test_dpf_renews_at_the_interval_and_last_at_the_end():
    method = DPF(Allocation(0.5), interval=4, end_step=10)
    due = [step for step in range(1, 30) if method.exchange_due(step=step, epoch_end=False)]
    assert due == [4, 8, 10]
    assert not any(method.exchange_due(step=step, epoch_end=True) for step in range(30))
    assert [method.settled(step) for step in (9, 10, 11)] == [False, True, True]


def test_the_set_stays_between_renewals():
    method = DPF(Allocation(0.5), interval=4, end_step=10)
    seen, trainer = [], trainer_of(method)
    train(trainer, 16, lambda t: seen.append((t.state.step, used(method, t.state.params))))
    sets = dict(seen)
    assert len(sets[3]) == TOTAL
    assert sets[4] != sets[8] != sets[10]
    assert all(sets[a] == sets[b] for a, b in ((4, 5), (5, 7), (8, 9), (10, 11), (11, 16)))


def test_a_tensor_of_which_nothing_would_be_left_is_named():
    params = drawn(2)
    params["conv.weight"] = params["conv.weight"] * 1e-9
    method = STE(Allocation(0.2), scope="global")
    method.supports(SPECS, seed=0)
    with pytest.raises(ValueError, match=r"conv\.weight.*local"):
        method.view(params)
    with pytest.raises(ValueError, match="keep none"):
        STE(Allocation(0.001)).supports(SPECS, seed=0)
    with pytest.raises(ValueError, match="keep none"):
        DPF(Allocation(0.001), end_step=9).supports(SPECS, seed=0)


# --- whole runs, written out again with masks ----------------


def gradient(name, w, batch):
    """Return the gradient of the quadratic model, from its definition."""
    noise = NOISE * generator(6, f"noise/{name}", batch).standard_normal(w.shape)
    return w - QuadraticModel().target(name) - noise


def masked_run(steps, density_at, renewed, *, epoch=6, momentum=0.9, penalty=0.0):
    """Straight-through training with dense masks and SGD: nothing of the library's methods or trainer."""
    model = QuadraticModel()
    w = {name: np.array(array) for name, array in model.init(0, np.float64).items()}
    v = {name: np.zeros_like(array) for name, array in w.items()}

    def masks(step):
        out = {}
        for name in PRUNABLE:
            places = brute(w, [name], round(density_at(step) * w[name].size))
            mask = np.zeros(w[name].size)
            mask[[p for _, p in places]] = 1
            out[name] = mask.reshape(w[name].shape)
        return out

    m, history = masks(0), []
    for step in range(1, steps + 1):
        for name in w:
            mask = m.get(name, np.ones_like(w[name]))
            g = gradient(name, mask * w[name], (step - 1) % epoch)
            v[name] = momentum * v[name] + g + penalty * (1 - mask) * w[name]
        for name in w:
            w[name] = w[name] - LR * v[name]
        if renewed(step):
            m = masks(step)
        history.append({name: mask.copy() for name, mask in m.items()})
    return w, history


def close(a, b):
    """Agreement but for the order of a few additions in each of some 20 steps on numbers of size 1."""
    return all(np.abs(a[name] - b[name]).max() <= 200 * np.finfo(float).eps * 4 for name in b)


def dpf_density(step, final=0.4, end=13):
    return float(final + (1 - final) * (1 - Fraction(min(step, end), end)) ** 3)


def check_dpf_run(kind=DPF):
    trainer = trainer_of(kind(Allocation(0.4), interval=4, end_step=13))
    train(trainer, 20)
    w, _ = masked_run(20, dpf_density, lambda step: step in (4, 8, 12, 13))
    assert close(trainer.state.params, w), "this is not the run of DPF"


def test_dpf_is_its_algorithm():
    check_dpf_run()


def check_ste_run(kind=STE):
    trainer = trainer_of(kind(Allocation(0.4)))
    train(trainer, 12)
    w, _ = masked_run(12, lambda step: 0.4, lambda step: True)
    assert close(trainer.state.params, w), "this is not the run of STE"


def test_ste_is_its_algorithm():
    check_ste_run()


def test_pruned_weights_move_and_come_back_with_a_value():
    method = DPF(Allocation(0.4), interval=2, end_step=40)
    trainer = trainer_of(method)
    train(trainer, 20)
    out = {place for name in PRUNABLE for place in ((name, p) for p in range(SPECS[name].size))} - used(
        method, trainer.state.params
    )
    before = {name: w.copy() for name, w in trainer.state.params.items()}
    train(trainer, 10)
    moved = [before[name].flat[p] != trainer.state.params[name].flat[p] for name, p in out]
    assert all(moved)
    train(trainer, 10)
    method = STE(Allocation(0.4))
    trainer = trainer_of(method)
    returned, last, ever = set(), used(method, trainer.state.params), set()
    for _ in range(30):
        train(trainer, 1)
        now = used(method, trainer.state.params)
        returned |= now & ever
        ever |= last - now
        last = now
    back = returned & last
    assert back
    assert all(trainer.state.params[name].flat[p] != 0 for name, p in back)


class MaskedInPlace(DPF):
    """Zeroes what is pruned, so that nothing is fed back."""

    def adjust(self, params, *, step, lr, seed):
        for name, (a,) in self.chosen(params).items():
            kept = params[name].reshape(-1)[a.flat]
            params[name][...] = 0
            params[name].reshape(-1)[a.flat] = kept


class MaskedGradient(DPF):
    """Moves only what the forward pass used."""

    def pull(self, params, grads):
        pulled = super().pull(params, grads)
        for name, (a,) in self.chosen(params).items():
            pulled[name] = pulled[name] * a.support.mask()
        return pulled


class DenseForward(DPF):
    """Masks nothing."""

    def view(self, params):
        self.chosen(params)
        return params


class MissesTheEnd(DPF):
    """Stops at the last multiple of the interval."""

    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return self.when(step=step, epoch_end=epoch_end)


class TooLinear(DPF):
    """A schedule of another power."""

    def density_at(self, final, step):
        return final + (1 - final) * (1 - min(step, self.end_step) / self.end_step)


@pytest.mark.parametrize("mutant", [MaskedInPlace, MaskedGradient, DenseForward, MissesTheEnd, TooLinear])
def test_mistakes_in_dpf_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_dpf_run(mutant)


class Late(STE):
    """Renews A every other step only."""

    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return not epoch_end and step % 2 == 0


class Smallest(STE):
    """Uses the smallest weights."""

    def magnitudes(self, name, params):
        return -super().magnitudes(name, params)


class Masked(STE):
    """No straight-through: what is not used has no gradient."""

    def pull(self, params, grads):
        pulled = super().pull(params, grads)
        for name, (a,) in self.chosen(params).items():
            pulled[name] = pulled[name] * a.support.mask()
        return pulled


@pytest.mark.parametrize("mutant", [Late, Smallest, Masked])
def test_mistakes_in_ste_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_ste_run(mutant)


def test_the_gradient_is_torchs_straight_through_gradient():
    torch = pytest.importorskip("torch")
    model = MLP((6, 7, 5))
    params = model.init(3, np.float64)
    method = STE(Allocation(0.3))
    method.supports(model.specs(), seed=0)
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((6, 8)), rng.integers(0, 5, 8)
    loss, grads, _ = model.loss_and_grads(method.view(params), x, labels)
    pulled = method.pull(params, grads)

    leaves = {name: torch.tensor(w, requires_grad=True) for name, w in params.items()}
    seen = {}
    for name, w in leaves.items():
        seen[name] = w
        if w.ndim == 2:
            count = round(0.3 * w.numel())
            mask = torch.zeros(w.numel(), dtype=torch.float64)
            mask[w.detach().abs().reshape(-1).topk(count).indices] = 1
            seen[name] = w + (mask.reshape(w.shape) * w - w).detach()
    hidden = torch.relu(seen["layers.0.weight"] @ torch.tensor(x) + seen["layers.0.bias"][:, None])
    scores = seen["layers.1.weight"] @ hidden + seen["layers.1.bias"][:, None]
    theirs = torch.nn.functional.cross_entropy(scores.T, torch.tensor(labels))
    theirs.backward()
    # The largest sum has 8 terms of size 1, after two products of up to 7; softmax adds a few roundings.
    bound = 100 * np.finfo(float).eps
    assert abs(float(theirs.detach()) - loss) <= bound * 4
    for name, leaf in leaves.items():
        assert np.abs(leaf.grad.numpy() - pulled[name]).max() <= bound


# --- what is refused -----------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DPF(Allocation(0.5), end_step=0), "end step"),
        (lambda: DPF(Allocation(0.5), end_step=5, interval=0), "interval"),
        (lambda: DPF(Allocation(0.5), end_step=5, initial_sparsity=1.0), "initial sparsity"),
        (lambda: DPF(Allocation(0.5), end_step=5, scope="layer"), "'local'"),
        (lambda: DPF(Allocation(0.5, "erk"), end_step=5, scope="global"), "uniform"),
        (lambda: STE(Allocation(0.5), scope="all"), "'global'"),
        (lambda: STE(None), "allocation or a pattern"),
    ],
)
def test_wrong_options_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_pool_of_two_tensors_shares_its_count():
    params = drawn(4)
    method = STE(Allocation(0.5), conventions=Conventions(pool="layer"))
    method.supports(SPECS, seed=0)
    layer = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    expected = brute(params, layer, 64)
    assert {place for place in used(method, params) if place[0] in layer} == expected


def test_sparse_weights_and_lost_states_are_refused():
    specs = {"w": ParamSpec("w", (2, 4), "linear", True)}
    for method in (STE(Allocation(0.5)), DPF(Allocation(0.5), end_step=1)):
        method.supports(specs, seed=0)
        weight = SparseWeight(Support.full((2, 4)), np.ones(8))
        with pytest.raises(ValueError, match="dense array"):
            method.exchange({"w": weight}, step=1, seed=0)
        method.exchange({"w": np.arange(8.0).reshape(2, 4)}, step=1, seed=0)
        saved = json.loads(json.dumps(method.state_dict()))
        with pytest.raises(ValueError, match="lacks the sets of w"):
            method.load_state_dict(saved, {})
    method = STE(Allocation(0.5))
    method.supports(specs, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        method.view({"w": np.full((2, 4), np.nan)})
