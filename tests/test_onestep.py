"""The functions on dense arrays: the same step as truly sparse weights take, and other programs' rules beyond that."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import SET, Allocation, Conventions, RigL, Selfish, Static, profile
from refimpl.methods.drop import by_magnitude, by_sign
from refimpl.methods.exchange import by_gradient, propose
from refimpl.methods.grow import grow_random
from refimpl.methods.onestep import (
    ArrayGradient,
    Fate,
    drop_fraction,
    exchange_due,
    exchange_masks,
    gmp_sparsity,
    initial_mask,
    method_step,
    step,
)
from refimpl.methods.pools import pools_of
from refimpl.methods.schedule import Constant
from refimpl.weights.carry import CarryRule
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)

shared = st.builds(
    Conventions,
    pool=st.sampled_from(["matrix", "gate"]),
    drop_rounding=st.sampled_from(["floor", "ceil", "half-even"]),
    drop_of=st.sampled_from(["dropped", "kept", "kept-of-density", "kept-of-sparsity"]),
    drop_width=st.sampled_from(["float64", "float32"]),
    drop_ties=st.sampled_from(["exact", "threshold"]),
    drop_none=st.sampled_from(["nothing", "zeros"]),
    signed_drop=st.sampled_from(["balanced", "set-original", "itop", "selfish-authors"]),
    kept_minimum=st.sampled_from(["refuse", "one"]),
    initial_rounding=st.sampled_from(["floor", "ceil", "half-even"]),
    initial_width=st.sampled_from(["float64", "float32"]),
    growth_count=st.sampled_from(["exact", "bernoulli"]),
    growth_target=st.sampled_from(["conserve", "initial", "density"]),
    regrow=st.sampled_from(["keep", "reset", "forbid"]),
    grown_value=st.sampled_from([0.0, 0.25]),
)
"""Conventions that dense arrays and sparse weights can both follow."""


def problem(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shape = (4 * int(rng.integers(1, 4)), int(rng.integers(1, 9)))
    mask = rng.random(shape) < rng.uniform(0.1, 0.9)
    mask.flat[0] = True
    tied = rng.random() < 0.5
    draw = (lambda: rng.integers(-3, 4, shape)) if tied else (lambda: rng.standard_normal(shape))
    return (draw() * mask).astype(dtype), mask, draw().astype(dtype), rng.standard_normal(shape).astype(dtype)


def on_supports(weights, mask, conventions, *, fraction, drop, gradient, rng, blocks, initial, slot):
    """The same exchange by the code that trains, which holds nothing dense."""
    weight = SparseWeight.from_dense(weights, Support.from_mask(mask))
    pools = pools_of({"w": ParamSpec("w", mask.shape, "linear", True, blocks)}, ["w"], conventions.pool)

    def at_random(growths):
        return [grow_random(g.candidates, g.want, rng, count=conventions.growth_count) for g in growths]

    counts = {pool.label: initial if len(pools) == 1 else initial[pool.label[2:-1]] for pool in pools}
    moved = propose(
        {"w": weight},
        pools,
        fraction=fraction,
        drop=drop,
        grow=at_random if gradient is None else by_gradient({"w": ArrayGradient(gradient, 2)}),
        conventions=conventions,
        initial_nnz=counts,
    )["w"]
    values = SparseWeight(moved.new, moved.carry(weight.values, conventions.value_rule)).dense()
    carried = moved.carry(slot.reshape(-1)[weight.support.flat], CarryRule(regrown=conventions.regrown))
    return moved, values, SparseWeight(moved.new, carried).dense()


def compare(seed, conventions, fraction, growth, dtype=np.float64):
    """Check that the dense step and the sparse exchange agree bit for bit, refusals included."""
    weights, mask, gradient, slot = problem(seed, dtype)
    h = mask.shape[0] // 4
    blocks = {name: slice(i * h, (i + 1) * h) for i, name in enumerate("ifgo")} if conventions.pool == "gate" else {}
    initial = {name: int(mask[rows].sum()) + 1 for name, rows in blocks.items()} or int(mask.sum()) + 1
    drop = by_sign if growth == "set" else by_magnitude
    if drop is by_sign and conventions.drop_of in ("kept-of-density", "kept-of-sparsity"):
        conventions = replace(conventions, drop_of="kept")
    options = {"fraction": fraction, "drop": drop, "blocks": blocks, "initial": initial, "slot": slot}
    options["gradient"] = gradient if growth == "rigl" else None
    try:
        moved, values, carried = on_supports(
            weights, mask, conventions, rng=np.random.default_rng(seed), **options
        )  # fmt: skip
    except ValueError as refused:
        moved = refused
    call = {
        "drop_fraction": fraction, "method": growth, "conventions": conventions, "gradient": options["gradient"],
        "rng": np.random.default_rng(seed), "blocks": blocks, "initial_nnz": initial, "slots": {"m": slot},
    }  # fmt: skip
    if isinstance(moved, ValueError):
        with pytest.raises(ValueError, match=r"growth needs|cannot be dropped"):
            exchange_masks(weights, mask, **call)
        return
    out = exchange_masks(weights, mask, **call)
    np.testing.assert_array_equal(out.mask, moved.new.mask())
    np.testing.assert_array_equal(out.weights, values)
    np.testing.assert_array_equal(out.slots["m"], carried)
    np.testing.assert_array_equal(np.flatnonzero(out.dropped), moved.dropped)
    np.testing.assert_array_equal(np.flatnonzero(out.grown), moved.grown)
    np.testing.assert_array_equal(np.flatnonzero(out.regrown), moved.regrown)


@given(seeds, shared, st.floats(0, 1), st.sampled_from(["rigl", "set", "random"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_dense_step_is_the_sparse_exchange(seed, conventions, fraction, growth, single):
    compare(seed, replace(conventions, set_criterion="sign"), fraction, growth, np.float32 if single else np.float64)


def caught():
    """Whether the comparison fails for some of fixed cases."""
    options = [
        Conventions(),
        Conventions(drop_ties="threshold", growth_target="initial", drop_rounding="ceil"),
        Conventions(regrow="reset", grown_value=0.5),
        Conventions(regrow="forbid", drop_of="kept-of-density", drop_width="float32", drop_rounding="half-even"),
    ]
    for seed in range(40):
        for conventions in options:
            for growth in ("rigl", "random"):
                try:
                    compare(seed, conventions, 0.37, growth)
                except (AssertionError, ValueError, pytest.fail.Exception):
                    return True
    return False


def higher_wins(scores, count, order, among=None):
    reverse = -np.arange(scores.size) if order is None else -order
    return RANKING(scores, count, reverse, among)


RANKING, KEPT, WANTED, VALUES, SLOTS, GROWTH = (
    step.best, step.kept_after, step.wanted, step.values, step.slots, step.growth,
)  # fmt: skip


def stale(given, new, grown, c):
    return VALUES(replace(given, mask=given.mask & ~grown), new, grown, replace(c, grown_from="stored"))


def signed(given, kept, want, c):
    score = None if given.score is None else np.maximum(given.score, 0)
    return GROWTH(replace(given, score=score), kept, want, c)


MISTAKES = {
    "ties to the higher position": ("best", higher_wins),
    "one fewer is kept": ("kept_after", lambda *a, **k: max(KEPT(*a, **k) - 1, 0)),
    "rounded the other way": ("kept_after", lambda n, f, c, **k: KEPT(n, f, replace(c, drop_rounding="ceil"), **k)),
    "one more grows": ("wanted", lambda *a: WANTED(*a) + 1),
    "conserves always": ("wanted", lambda g, k, c: WANTED(g, k, replace(c, growth_target="conserve"))),
    "slots keep what was dropped": ("slots", lambda g, n, r, w, c: SLOTS(g, n, r, w, replace(c, slot_masked="none"))),
    "values are not masked": ("values", lambda g, n, r, c: VALUES(g, n, r, replace(c, grown_value=9.0))),
    "growth by the signed gradient": ("growth", signed),
    "dropped entries may never return": ("growth", lambda g, k, w, c: GROWTH(g, k, w, replace(c, regrow="forbid"))),
}


def test_the_unplanted_step_passes():
    assert not caught()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(step, name, wrong)
    assert caught()


# --- any method's exchange ----------------------------------------


@given(seeds, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_method_on_anyones_arrays(seed, fraction):
    weights, mask, gradient, slot = problem(seed)
    method = RigL(Allocation(0.5), Constant(fraction))
    before = method.state_dict()
    arrays = {"w": weights, "bias": np.ones(3)}
    out = method_step(
        method, arrays, {"w": mask}, step=1, gradients={"w": gradient, "bias": np.ones(3)}, slots={"w": {"m": slot}}
    )
    by_hand = exchange_masks(weights, mask, drop_fraction=fraction, gradient=gradient, slots={"m": slot})
    np.testing.assert_array_equal(out["w"].mask, by_hand.mask)
    np.testing.assert_array_equal(out["w"].weights, by_hand.weights)
    np.testing.assert_array_equal(out["w"].slots["m"], by_hand.slots["m"])
    assert out["bias"].mask.all()
    assert (out["bias"].fate == Fate.KEPT).all()
    assert method.state_dict() == before
    tied = by_hand.fate == Fate.DROPPED_TIED
    same = np.where(by_hand.fate == Fate.GROWN_BY_SCORE, Fate.GROWN, by_hand.fate)
    np.testing.assert_array_equal(out["w"].fate, np.where(tied, Fate.DROPPED, same))


def test_methods_that_draw_or_do_nothing():
    weights, mask, _, _ = problem(3)
    for method in (Selfish(Allocation(0.5), Constant(0.5)), SET(Allocation(0.5), 0.5)):
        once, again = (method_step(method, {"w": weights}, {"w": mask}, step=7, seed=1)["w"] for _ in range(2))
        np.testing.assert_array_equal(once.mask, again.mask)
        assert once.mask.sum() == mask.sum()
        assert once.dropped.any()
    out = method_step(Static(Allocation(0.5)), {"w": weights}, {"w": mask}, step=7)["w"]
    np.testing.assert_array_equal(out.mask, mask)
    with pytest.raises(ValueError, match="mask of w has shape"):
        method_step(Static(Allocation(0.5)), {"w": weights}, {"w": mask[:1]}, step=7)


# --- growth by momentum, static, draws ----------------------------------------


def test_masked_momentum_grows_only_what_was_just_dropped():
    rng = np.random.default_rng(0)
    explored = {}
    for name, conventions in (
        ("itop", profile("itop")),
        ("as published", replace(profile("itop"), momentum_masking="never", growth_ranking="free")),
    ):
        weights, mask = rng.standard_normal((40, 50)), rng.random((40, 50)) < 0.2
        fired = mask.copy()
        for _ in range(10):
            momentum = rng.standard_normal(mask.shape)
            out = exchange_masks(
                weights * mask, mask, drop_fraction=0.3, method="snfs", conventions=conventions,
                slots={"momentum_buffer": momentum},
            )  # fmt: skip
            weights, mask = np.where(out.mask & mask, weights, rng.standard_normal(mask.shape)), out.mask
            fired |= mask
        explored[name] = fired.mean()
    assert explored["itop"] < 0.22
    assert explored["as published"] > 0.5


def test_adam_as_momentum_and_the_static_exchange():
    weights, mask = np.array([[3.0, 1.0, 0, 0]]), np.array([[True, True, False, False]])
    slots = {"exp_avg": np.array([[1.0, 1, 3, 2]]), "exp_avg_sq": np.array([[1.0, 1, 9, 1]])}
    out = exchange_masks(
        weights, mask, drop_fraction=0.5, method="snfs", conventions=profile("sparse-learning"), slots=slots
    )
    assert out.mask.tolist() == [[True, False, False, True]]  # 2/1 is more than 3/3
    with pytest.raises(ValueError, match="give slots="):
        exchange_masks(weights, mask, drop_fraction=0.5, method="snfs", slots=slots)
    out = exchange_masks(weights, mask, drop_fraction=0.5, method="static")
    assert out.fate.tolist() == [[Fate.KEPT, Fate.REGROWN, Fate.ABSENT, Fate.ABSENT]]


@given(seeds, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_uniforms_as_scores_and_as_coins(seed, fraction):
    weights, mask, _, _ = problem(seed)
    uniforms = np.random.default_rng(seed).random(mask.shape)
    out = exchange_masks(weights, mask, drop_fraction=fraction, uniforms=uniforms)
    free = np.flatnonzero(~(mask & ~out.dropped))
    largest = free[np.argsort(-uniforms.reshape(-1)[free])][: int(out.dropped.sum())]
    np.testing.assert_array_equal(np.flatnonzero(out.grown), np.sort(largest))
    coins = exchange_masks(
        weights, mask, drop_fraction=fraction, uniforms=uniforms, conventions=Conventions(growth_count="bernoulli")
    )
    share = out.dropped.sum() / max(free.size, 1)
    np.testing.assert_array_equal(coins.grown.reshape(-1)[free], uniforms.reshape(-1)[free] < share)


def test_the_order_of_equal_scores_is_an_argument():
    weights, mask = np.ones((1, 6)), np.array([[True, True, True, False, False, False]])
    order = np.array([[3, 2, 1, 6, 5, 4]])
    given_order = {"tie_order": order, "conventions": profile("rigl-torch"), "gradient": np.ones((1, 6))}
    out = exchange_masks(weights * mask, mask, drop_fraction=0.34, **given_order)
    assert out.fate.tolist() == [[Fate.REGROWN, Fate.KEPT, Fate.KEPT, Fate.ABSENT, Fate.ABSENT, Fate.ABSENT]]
    growth_only = {**given_order, "tie_order": {"grow": np.array([[6, 5, 4, 3, 2, 1]])}}
    out = exchange_masks(weights * mask, mask, drop_fraction=0.34, **growth_only)
    assert np.flatnonzero(out.dropped).tolist() == [2]
    assert np.flatnonzero(out.grown).tolist() == [5]
    assert out.fate[0, 2] == Fate.DROPPED_TIED


def test_a_stored_zero_loses_to_an_absent_entry_where_all_are_ranked():
    weights, mask = np.array([[0.0, 0.0, 0.0, 5.0]]), np.array([[False, False, True, True]])
    gradient = np.array([[0.0, 0, 0, 0]])
    out = exchange_masks(weights, mask, drop_fraction=0, gradient=gradient, conventions=profile("rigl-torch"))
    assert out.fate.tolist() == [[Fate.KEPT_THOUGH_ABSENT, Fate.ABSENT, Fate.DROPPED_TIED, Fate.KEPT]]
    out = exchange_masks(weights, mask, drop_fraction=0, gradient=gradient)
    np.testing.assert_array_equal(out.mask, mask)


# --- wrong inputs ----------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_fraction": 1.01, "rng": np.random.default_rng(0)}, "the drop fraction is 1.01"),
        ({"method": "rigl"}, "give gradient"),
        ({"method": "magic"}, "there is no exchange 'magic'"),
        ({"uniforms": np.ones((2, 2))}, "uniforms has shape"),
        ({"tie_order": np.ones(16), "ranks": [0, 1]}, "tie_order of drop has shape"),
        ({"slots": {"m": np.ones(3)}, "ranks": [0, 1]}, "m has shape"),
        ({"conventions": profile("rigl-tf"), "gradient": np.ones((4, 4))}, "give noise"),
        ({"conventions": profile("sparseml"), "gradient": np.ones((4, 4))}, "give sparsity"),
        ({"conventions": profile("set-original"), "ranks": [0, 1]}, "give fresh"),
        ({"gradient": np.where(np.eye(4), 1.0, np.nan)}, "NaN"),
        ({"gradient": np.ones((4, 4)), "want": 15}, "growth needs 15 free places but only 14"),
        ({"uniforms": np.ones((4, 4)), "want": 15}, "growth needs 15 free places but only 14"),
    ],
)
def test_wrong_inputs(options, message):
    weights = np.diag([1.0, 2, 3, 4])
    with pytest.raises(ValueError, match=message):
        exchange_masks(weights, weights != 0, **{"drop_fraction": 0.5, **options})


def test_wrong_inputs_of_the_start():
    with pytest.raises(ValueError, match="would keep none"):
        initial_mask((10,), 0.99, rng=np.random.default_rng(0))
    assert initial_mask((10,), 0.99, profile("jaxpruner"), rng=np.random.default_rng(0)).sum() == 1
    assert initial_mask((10,), 0.99, profile("cerebras"), rng=np.random.default_rng(0)).sum() == 0
    for options, message in (
        ({}, "needs draws"),
        ({"conventions": profile("sparsimony")}, "give scores"),
        ({"conventions": profile("sparseml"), "scores": np.ones(10)}, "give gradient"),
        ({"permutation": np.zeros(10, int)}, "each of the 10"),
        ({"uniforms": np.ones(9)}, "uniforms has shape"),
        ({"scores": np.full(10, np.nan)}, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            initial_mask((10,), 0.5, **options)
    with pytest.raises(ValueError, match="the sparsity is 1"):
        initial_mask((10,), 1.0, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="give at least 1"):
        exchange_due(3, interval=0)
    with pytest.raises(ValueError, match="the shape of the drop fraction"):
        drop_fraction(3, initial=0.3, end=10, shape="sine")
    with pytest.raises(ValueError, match="give a later end"):
        gmp_sparsity(3, final=0.5, begin=4, end=2)
