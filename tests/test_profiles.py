"""Every profile against its system's exchange, written out from the description of that system in another style."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import profile
from refimpl.methods.onestep import Fate, exchange_masks

seeds = st.integers(0, 2**32 - 1)
fractions = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.35, 0.5, 1.0]))
f32 = np.float32


def problem(seed, dtype=f32, scale=1.0):
    """Return weights without ties, 0 outside their mask, the mask, a gradient, and the sparsity that was asked for."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 12)), int(rng.integers(1, 12)))
    mask = rng.random(shape) < rng.uniform(0.1, 0.9)
    mask.flat[int(rng.integers(mask.size))] = True
    weight, gradient = distinct(rng, shape, dtype), scale * distinct(rng, shape, dtype)
    return weight * mask, mask, gradient.astype(dtype), 1 - mask.sum() / mask.size


def distinct(rng, shape, dtype):
    """Return numbers of both signs, no two of the same magnitude, none near 0."""
    size = int(np.prod(shape))
    return (rng.permutation(np.arange(1, size + 1)) / size * rng.choice([-1, 1], size)).reshape(shape).astype(dtype)


# --- transcriptions: masks in, masks out ----------------------------------------


def rigl_tf(w, m, g, f, s, noise):
    n_prune = int(f32(f32(m.sum()) * f32(f)))
    n_keep = int(m.sum()) - n_prune
    score = (np.abs(m * w) + noise).reshape(-1).tolist()
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    kept = set(order[:n_keep])
    grow = np.abs(g).reshape(-1).tolist()
    low = min(grow) - 1
    lifted = [low if i in kept else v for i, v in enumerate(grow)]
    grown = sorted(range(len(grow)), key=lambda i: (-lifted[i], i))[:n_prune]
    new = np.array([i in kept or i in grown for i in range(len(score))]).reshape(m.shape)
    return new, np.where(new & ~m & np.isin(np.arange(m.size), grown).reshape(m.shape), 0, w)


def rigl_torch(w, m, g, f, s):
    torch = pytest.importorskip("torch")
    w, m, g = torch.tensor(w), torch.tensor(m), torch.tensor(g)
    n_total, n_ones = m.numel(), int(m.sum())
    n_prune = int(n_ones * f)
    _, index = torch.topk(w.abs().view(-1), k=n_total)
    new_values = torch.where(torch.arange(n_total) < n_ones - n_prune, 1.0, 0.0)
    mask1 = new_values.scatter(0, index, new_values)
    score = g.abs().view(-1)
    lifted = torch.where(mask1 == 1, torch.ones_like(mask1) * (score.min() - 1), score.to(mask1.dtype))
    _, index = torch.topk(lifted, k=n_total)
    new_values = torch.where(torch.arange(n_total) < n_prune, 1.0, 0.0)
    mask2 = new_values.scatter(0, index, new_values).view(m.shape)
    new = (mask1.view(m.shape) + mask2) > 0
    value = torch.where((mask2 == 1) & ~m, torch.zeros_like(w), w)
    return new.numpy(), (value * new).numpy()


def jaxpruner(w, m, g, f, s):
    n, one = f32(m.size), f32(1)

    def at(scores, sparsity):
        k = max(1, int(np.rint(n * (one - sparsity))))
        order = np.argsort(-scores.reshape(-1), kind="stable")
        out = np.zeros(m.size, bool)
        out[order[:k]] = True
        return out.reshape(m.shape)

    sparsity = one - f32(m.sum()) / n
    drop = np.abs(w)
    drop = np.where(m, drop, drop.min() - f32(1e-5)).astype(f32)
    density = f32(m.sum()) / n
    kept = at(drop, one - density * (one - f32(f)))
    grow = np.abs(g)
    new = at(np.where(kept, grow.max() + f32(1e-5), grow).astype(f32), sparsity)
    return new, np.where(new & m, w, 0)


def itop(w, m, g, f, s):
    torch = pytest.importorskip("torch")
    w, m, g = torch.tensor(w), torch.tensor(m).float(), torch.tensor(g)
    n_nonzero = int(m.sum())
    num_remove = math.ceil(f * n_nonzero)
    if num_remove == 0:
        death = w != 0
    else:
        x, _ = torch.sort(w.abs().view(-1))
        death = w.abs() > x[m.numel() - n_nonzero + num_remove - 1].item()
    total = n_nonzero - int(death.sum())
    new = death.clone()
    _, index = torch.sort((g * (~death)).abs().flatten(), descending=True)
    new.view(-1)[index[:total]] = True
    return new.numpy(), (w * new).numpy()


def cerebras(w, m, g, f, s):
    torch = pytest.importorskip("torch")
    w, m, g = torch.tensor(w), torch.tensor(m), torch.tensor(g)
    k = int(((1 - torch.tensor(f, dtype=torch.float32)) * m.sum().float()).item())
    drop = torch.zeros(m.numel(), dtype=torch.bool)
    drop[torch.topk(w.abs().view(-1), k).indices] = True
    target = int(((1 - torch.tensor(s, dtype=torch.float32)) * torch.tensor(float(m.numel()))).item())
    score = g.abs().view(-1).clone()
    score[drop] = -math.inf
    grown = torch.topk(score, max(0, target - k)).indices
    new = drop.clone()
    new[grown] = True
    new = new.view(m.shape)
    return new.numpy(), (w * (m & new)).numpy()


def sparsimony(w, m, g, f, s):
    torch = pytest.importorskip("torch")
    stored, m, g = torch.tensor(w), torch.tensor(m), torch.tensor(g)
    n = m.numel()
    current = (m == 0).sum() / torch.tensor(n)
    sparsity = round((f * (1 - current) + current).item(), 6)
    kept = int(n * (1 - sparsity))
    score = torch.where(m, stored.abs(), torch.full_like(stored, math.inf)).view(-1)
    new = m.clone().view(-1)
    new[torch.topk(score, int(m.sum()) - kept, largest=False).indices] = False
    grow = int(n * (1 - s)) - int(new.sum())
    if grow > 0:
        score = torch.where(new.view(m.shape), torch.full_like(g, -math.inf), g.abs()).view(-1)
        new[torch.topk(score, grow).indices] = True
    new = new.view(m.shape)
    return new.numpy(), stored.numpy()  # whatever is stored is what a grown weight has


def sparseml(w, m, g, f, s):
    n = m.size
    magnitudes, gradients = np.abs(w).reshape(-1), np.abs(g).reshape(-1)
    top = round((1 - (s + (1 - s) * f)) * n)
    score = gradients.copy()
    score[np.argsort(-magnitudes)[:top]] = np.finfo(f32).max
    zeros = round(s * n)
    if zeros < 1:
        return np.ones(m.shape, bool), w
    new = (score > np.sort(score)[zeros - 1]).reshape(m.shape)
    return new, np.where(new & m, w, 0)


WITNESSES = {
    "rigl-torch": rigl_torch,
    "jaxpruner": jaxpruner,
    "itop": itop,
    "cerebras": cerebras,
    "sparsimony": sparsimony,
    "sparseml": sparseml,
}


@pytest.mark.parametrize("name", WITNESSES)
@given(seed=seeds, f=fractions)
@settings(max_examples=60, deadline=None)
def test_an_update_of_rigl(name, seed, f):
    weight, mask, gradient, sparsity = problem(seed)
    if name == "sparsimony":  # what is stored outside the mask is revived
        weight = distinct(np.random.default_rng(seed + 1), mask.shape, f32)
    new, values = WITNESSES[name](weight, mask, gradient, f, sparsity)
    out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient, sparsity=sparsity, conventions=profile(name))
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)
    assert out.weights.dtype == f32
    laws(out, mask)


def laws(out, mask):
    """What holds of the account of any exchange."""
    fate = out.fate
    assert (out.mask == np.isin(fate, [Fate.KEPT, Fate.KEPT_THOUGH_ABSENT, *range(Fate.GROWN_BY_SCORE, 12)])).all()
    assert (np.isin(fate, [Fate.DROPPED, Fate.DROPPED_TIED, Fate.REGROWN, Fate.REGROWN_ANEW]) == out.dropped).all()
    assert (out.grown == (fate >= Fate.GROWN_BY_SCORE)).all()
    assert not (out.grown & mask & ~out.dropped).any()
    assert sum(out.counts().values()) == mask.size


@pytest.mark.parametrize("name", [*WITNESSES, "default", "rigl-tf", "sparse-learning", "selfish-authors"])
def test_what_lies_outside_the_mask_does_not_count(name):
    for seed in range(20):
        weight, mask, gradient, sparsity = problem(seed)
        options = {
            "drop_fraction": 0.4, "gradient": gradient, "sparsity": sparsity, "noise": np.zeros(mask.shape),
            "conventions": profile(name),
        }  # fmt: skip
        out = exchange_masks(weight, mask, **options)
        stale = exchange_masks(np.where(mask, weight, 100), mask, **options)
        np.testing.assert_array_equal(out.mask, stale.mask)
        np.testing.assert_array_equal(out.fate, stale.fate)
        if name == "sparsimony":
            assert (stale.weights[out.grown & ~mask] == 100).all()
            assert (out.fate[out.grown & ~mask] == Fate.GROWN_STALE).all()
        else:
            assert (stale.weights[out.mask] == out.weights[out.mask]).all()


@given(seed=seeds, f=fractions, loud=st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_update_of_rigl_tf_with_its_noise(seed, f, loud):
    weight, mask, gradient, _ = problem(seed)
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.3 if loud else 1e-5, mask.shape).astype(f32)
    new, values = rigl_tf(weight, mask, gradient, f, None, noise)
    out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient, noise=noise, conventions=profile("rigl-tf"))
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)
    laws(out, mask)


def test_noise_keeps_an_absent_entry_with_its_stale_value():
    weight, mask = np.array([[1.0, 2e-5, 0.5, 0.0]], f32), np.array([[True, True, False, False]])
    noise = np.array([[0, 0, 4e-5, 0]], f32)
    out = exchange_masks(
        weight, mask, drop_fraction=0.0, gradient=np.ones((1, 4), f32), noise=noise, conventions=profile("rigl-tf")
    )
    assert out.fate.tolist() == [[Fate.KEPT, Fate.DROPPED, Fate.KEPT_THOUGH_ABSENT, Fate.ABSENT]]
    assert out.weights[0, 2] == 0.5
    assert out.mask.tolist() == [[True, False, True, False]]


@given(seed=seeds, f=fractions, big=st.booleans())
@settings(max_examples=100, deadline=None)
def test_jaxpruner_with_ties_and_large_gradients(seed, f, big):
    # Its ties are defined, and its kept entries are raised by 1e-5, which float32 loses from 256 on.
    rng = np.random.default_rng(seed)
    _, mask, _, sparsity = problem(seed)
    weight = (rng.integers(1, 4, mask.shape) * mask).astype(f32)
    gradient = (rng.integers(0, 4, mask.shape) * (300 if big else 1)).astype(f32)
    new, values = jaxpruner(weight, mask, gradient, f, sparsity)
    out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient, conventions=profile("jaxpruner"))
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)
    laws(out, mask)


def test_large_gradients_displace_what_was_kept():
    weight, mask = np.array([[0, 0, 3, 2]], f32), np.array([[False, False, True, True]])
    gradient = np.array([[512, 512, 0, 0]], f32)
    out = exchange_masks(weight, mask, drop_fraction=0.5, gradient=gradient, conventions=profile("jaxpruner"))
    assert out.fate.tolist() == [[Fate.GROWN_BY_SCORE, Fate.GROWN_BY_SCORE, Fate.DISPLACED, Fate.DROPPED]]
    out = exchange_masks(weight, mask, drop_fraction=0.5, gradient=gradient / 4, conventions=profile("jaxpruner"))
    assert out.fate.tolist() == [[Fate.GROWN_BY_SCORE, Fate.ABSENT, Fate.KEPT, Fate.DROPPED]]


@given(seed=seeds, f=fractions)
@settings(max_examples=60, deadline=None)
def test_itop_kills_ties_and_zeros_and_falls_short(seed, f):
    rng = np.random.default_rng(seed)
    _, mask, _, _ = problem(seed)
    weight = (rng.integers(-2, 3, mask.shape) * mask).astype(f32)
    gradient = np.where(rng.random(mask.shape) < 0.3, distinct(rng, mask.shape, f32), 0).astype(f32)
    conventions = profile("itop")
    out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient, conventions=conventions)
    removed = math.ceil(f * mask.sum())
    threshold = np.sort(np.abs(weight), axis=None)[mask.size - int(mask.sum()) + removed - 1] if removed else 0
    np.testing.assert_array_equal(~out.dropped & mask, np.abs(weight) > threshold)
    kept = mask & ~out.dropped
    scored = (gradient != 0) & ~kept
    wanted = int(mask.sum() - kept.sum())
    # With more free places that have a gradient than are wanted the count is right; otherwise all of them grow.
    assert (out.grown & scored).sum() == min(wanted, scored.sum())
    if scored.sum() >= wanted:
        assert out.grown.sum() == wanted


SCORED_BY_DRAWS = {name: WITNESSES[name] for name in ("jaxpruner", "cerebras", "sparsimony")}


@pytest.mark.parametrize("name", [*SCORED_BY_DRAWS, "rigl-tf"])
@given(seed=seeds, f=fractions)
@settings(max_examples=30, deadline=None)
def test_an_update_of_set_where_draws_are_the_scores(name, seed, f):
    weight, mask, _, sparsity = problem(seed)
    uniforms = np.random.default_rng(seed).random(mask.shape).astype(f32)
    noise = np.zeros(mask.shape, f32)
    if name == "rigl-tf":
        new, values = rigl_tf(weight, mask, uniforms, f, sparsity, noise)
    else:
        new, values = WITNESSES[name](weight, mask, uniforms, f, sparsity)
    out = exchange_masks(
        weight, mask, method="set", drop_fraction=f, uniforms=uniforms, sparsity=sparsity, noise=noise,
        conventions=profile(name),
    )  # fmt: skip
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)


# --- planted mistakes: a choice set back to the default is noticed ----------------------------------------

CHOICES = [
    *[("rigl-torch", knob) for knob in ("drop_scope",)],
    *[("jaxpruner", knob) for knob in ("drop_of", "drop_rounding", "drop_width", "kept_minimum", "growth_ranking")],
    *[("itop", knob) for knob in ("drop_rounding", "drop_ties", "drop_none", "growth_ranking")],
    *[("cerebras", knob) for knob in ("drop_of", "drop_width", "drop_scope", "initial_rounding", "initial_width")],
    *[("sparsimony", knob) for knob in ("drop_of", "drop_rounding", "initial_rounding", "growth_target", "grown_from")],
    *[("sparseml", knob) for knob in ("drop_of", "drop_rounding")],
]  # fmt: skip


def rich(seed):
    """Return a case in which every choice can matter: round fractions, stored zeros, large and vanishing gradients."""
    rng = np.random.default_rng(seed)
    weight, mask, gradient, sparsity = problem(seed, scale=1000.0 if seed % 2 else 1.0)
    if seed % 3 == 0:
        weight[mask & (rng.random(mask.shape) < 0.2)] = 0
    if seed % 5 == 0:
        gradient[rng.random(mask.shape) < 0.7] = 0
    return weight, mask, gradient, sparsity, float(rng.choice([0, 0.1, 0.25, 0.3, 0.4, 0.6, 0.7, 1]))


@pytest.mark.parametrize(("name", "knob"), CHOICES, ids=map("-".join, CHOICES))
def test_a_choice_that_is_set_back_is_noticed(name, knob):
    wrong = replace(profile(name), **{knob: getattr(profile("default"), knob)})
    for seed in range(400):
        weight, mask, gradient, sparsity, f = rich(seed)
        if name == "sparsimony":
            weight = distinct(np.random.default_rng(seed + 1), mask.shape, f32)
        new, values = WITNESSES[name](weight, mask, gradient, f, sparsity)
        try:
            out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient, sparsity=sparsity, conventions=wrong)
        except ValueError:
            return
        if not np.array_equal(out.mask, new) or not np.array_equal(out.weights, values):
            return
    pytest.fail(f"{name} without its {knob} gives the same masks")


def test_rigl_tf_counts_in_float32():
    mask = np.arange(200) < 90
    weight = distinct(np.random.default_rng(0), (200,), f32) * mask
    counts = []
    for conventions in (profile("rigl-tf"), replace(profile("rigl-tf"), drop_width="float64")):
        out = exchange_masks(
            weight, mask, drop_fraction=0.7, gradient=np.ones(200, f32), noise=np.zeros(200), conventions=conventions
        )
        counts.append(int(out.dropped.sum()))
    assert counts == [int(f32(f32(90) * f32(0.7))), int(90 * 0.7)] == [63, 62]
