"""One-shot magnitude pruning, and the pruning that all such methods share: counts and kept sets.

What is kept is found again here by sorting in plain Python. Planted mistakes show that the checks see what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import (
    PRUNABLE,
    SPECS,
    TOTAL,
    applied,
    best,
    caught,
    count_of_all,
    count_of_each,
    drawn,
    of_pool,
    quick,
    stored,
)

from refimpl.methods.allocation import Allocation, count_at
from refimpl.methods.conventions import Conventions
from refimpl.methods.drop import drop_smallest
from refimpl.methods.oneshot import OneShot
from refimpl.methods.pruning import prune
from refimpl.testing.method_runs import check_run
from refimpl.weights import Params, ParamSpec, SparseWeight, Support, support_of, values_of


def check_one_shot(make: Callable[..., Any], seed: int, density: float, scope: str, pool: Any, tied: bool) -> None:
    """Compare the kept set with a sort, within each pool or over all tensors."""
    method = make(Allocation(density), at_step=7, scope=scope, conventions=Conventions(pool=pool))
    method.supports(SPECS, seed=0)
    params = drawn(seed, tied)
    before = {name: values_of(w).copy() for name, w in params.items()}
    exchanges = method.exchange(params, step=7, seed=0)
    assert all(np.array_equal(values_of(params[name]), before[name]) for name in params), "the exchange wrote"
    kept = stored(applied(params, exchanges))
    values = stored(params)
    parts = [values] if scope == "global" else of_pool(values, pool)
    expected = set().union(*(best(part, round(density * len(part))) for part in parts))
    assert kept.keys() == expected, "other weights were kept than the largest"
    assert all(kept[place] == values[place] for place in kept), "a weight that stayed has another value"
    again = method.exchange(applied(params, exchanges), step=7, seed=0)
    assert again == {}, "pruned once more, more went"


@quick
@given(
    st.integers(0, 2**32), st.floats(0.3, 0.99), st.sampled_from(["local", "global"]),
    st.sampled_from(["matrix", "gate", "layer"]), st.booleans(),
)  # fmt: skip
def test_one_shot_keeps_the_largest(seed: int, density: float, scope: str, pool: str, tied: bool) -> None:
    check_one_shot(OneShot, seed, density, scope, pool, tied)


def in_place_of_prune(change: Callable[..., dict[str, Any]]) -> type[OneShot]:
    class Planted(OneShot):
        def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
            return change(self, params)

    return Planted


def _signed(method: OneShot, params: Params) -> dict[str, Any]:
    lowest = min(float(values_of(w).min()) for w in params.values())
    shifted: Params = {name: values_of(w) - lowest for name, w in params.items()}
    return prune(shifted, method.pools, method.kept(), method.conventions)


def _one_fewer(method: OneShot, params: Params) -> dict[str, Any]:
    return prune(params, method.pools, {k: n - 1 for k, n in method.kept().items()}, method.conventions)


def _ties_die(method: OneShot, params: Params) -> dict[str, Any]:
    return prune(params, method.pools, method.kept(), replace(method.conventions, drop_ties="threshold"))


def _normalized(method: OneShot, params: Params) -> dict[str, Any]:
    scaled: Params = {name: values_of(w) / np.linalg.norm(values_of(w)) for name, w in params.items()}
    return prune(scaled, method.pools, method.kept(), method.conventions)


def _each_alone(method: OneShot, params: Params) -> dict[str, Any]:
    alone = OneShot(method.allocation, at_step=7)
    alone.supports(SPECS, seed=0)
    return alone.exchange(params, step=7, seed=0)


@pytest.mark.parametrize(
    ("change", "scope", "tied"),
    [
        (_signed, "local", False),
        (_one_fewer, "local", False),
        (_ties_die, "local", True),
        (_normalized, "global", False),
        (_each_alone, "global", False),
    ],
)
def test_wrong_kept_sets_are_caught(change: Callable[..., dict[str, Any]], scope: str, tied: bool) -> None:
    caught(check_one_shot, in_place_of_prune(change), 3, 0.5, scope, "matrix", tied, match="kept|more went")


def test_one_shot_against_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as torch_prune

    params = drawn(5)
    for scope in ("local", "global"):
        method = OneShot(Allocation(0.25), at_step=1, scope=scope)
        method.supports(SPECS, seed=0)
        ours = applied(params, method.exchange(params, step=1, seed=0))
        modules = {}
        for name in PRUNABLE:
            modules[name] = torch.nn.Module()
            modules[name].weight = torch.nn.Parameter(torch.from_numpy(values_of(params[name]).copy()))
        if scope == "global":
            goes = TOTAL - count_at(0.25, TOTAL)
            torch_prune.global_unstructured(
                [(m, "weight") for m in modules.values()], torch_prune.L1Unstructured, amount=goes
            )
        else:
            for name, module in modules.items():
                size = PRUNABLE[name].size
                torch_prune.l1_unstructured(module, "weight", amount=size - count_at(0.25, size))
        for name, module in modules.items():
            np.testing.assert_array_equal(support_of(ours[name]).mask(), module.weight_mask.numpy().astype(bool))


def test_a_tensor_that_loses_nothing_stays_a_dense_array() -> None:
    params = drawn(1)
    params["rnn.weight_hh_l0"] = 1e3 * np.sign(values_of(params["rnn.weight_hh_l0"]))
    for options in ({"scope": "global"}, {"conventions": Conventions(pool="layer")}):
        method = OneShot(Allocation(0.6), at_step=1, **options)
        method.supports(SPECS, seed=0)
        gone = method.exchange(params, step=1, seed=0).keys()
        assert gone == PRUNABLE.keys() - {"rnn.weight_hh_l0"}


def test_global_scope_leaves_fixed_tensors_out() -> None:
    fixed = {"encoder.weight": 1.0, "fc.weight": 0.3}
    method = OneShot(Allocation(0.5, fixed=fixed), at_step=1, scope="global")
    method.supports(SPECS, seed=0)
    params = drawn(1)
    pruned = applied(params, method.exchange(params, step=1, seed=0))
    assert pruned["encoder.weight"] is params["encoder.weight"]
    assert support_of(pruned["fc.weight"]).nnz == 12
    rest = {place: v for place, v in stored(params).items() if place[0] not in fixed}
    kept = {place for place in stored(pruned) if place[0] not in fixed}
    assert kept == best(rest, round(0.5 * len(rest)))


def test_a_pattern_keeps_n_of_each_m() -> None:
    shapes, gates = {"a": (6, 8), "b": (3, 4, 1, 2)}, {"i": slice(0, 3), "f": slice(3, 6)}
    specs = {
        name: ParamSpec(name, shape, "linear", True, gates if name == "a" else {}) for name, shape in shapes.items()
    }
    rng = np.random.default_rng(0)
    params: Params = {name: rng.integers(-3, 4, shape).astype(float) for name, shape in shapes.items()}
    method = OneShot(Allocation(0.25), at_step=4, pattern=(1, 4), conventions=Conventions(pool="gate"))
    method.supports(specs, seed=0)
    pruned = applied(params, method.exchange(params, step=4, seed=0))
    a = support_of(pruned["a"]).mask()
    for row, group in np.ndindex(6, 2):
        part = slice(4 * group, 4 * group + 4)
        expected = np.zeros(4, bool)
        expected[np.argmax(np.abs(values_of(params["a"])[row, part]))] = True  # argmax names the first of equal ones
        np.testing.assert_array_equal(a[row, part], expected)
    b = support_of(pruned["b"]).mask()
    assert (b.sum(axis=1) == 1).all()  # over the input channels of each position
    assert method.exchange(pruned, step=4, seed=0) == {}


def test_when_the_pruning_is() -> None:
    method = OneShot(Allocation(0.5), at_step=9)
    assert [t for t in range(20) if method.exchange_due(step=t, epoch_end=False)] == [9]
    assert not method.exchange_due(step=9, epoch_end=True)
    assert [method.settled(t) for t in (8, 9, 10)] == [False, True, True]


# --- whole runs


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (lambda a: OneShot(a, at_step=8), count_of_each),
        (lambda a: OneShot(a, at_step=6, scope="global"), count_of_all),
    ],
)
def test_whole_runs(method: Callable[[Allocation], Any], counts: Any) -> None:
    check_run(lambda density, steps, epoch: method(Allocation(density)), "pruning", counts=counts)


def test_a_pattern_in_a_run() -> None:
    def make(density: float, steps: int, epoch: int) -> OneShot:
        return OneShot(Allocation(density, fixed={"conv.weight": 1.0}), at_step=7, pattern=(2, 4))

    counts = lambda specs, density: count_of_each(specs, 0.5) + SPECS["conv.weight"].size // 2  # noqa: E731
    check_run(make, "pruning", counts=counts, density=0.5, dense_at_one=False)


# --- errors


HALF = Allocation(0.5)
ALL: Any = "all"


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: OneShot(HALF, at_step=0), "after step 0; give a step of at least 1"),
        (lambda: OneShot(HALF, at_step=1, scope=ALL), "'all'; give 'local'"),
        (lambda: OneShot(Allocation(0.5, "erk"), at_step=1, scope="global"), "'erk'.*give the rule 'uniform'"),
        (lambda: OneShot(HALF, at_step=1, pattern=(3, 2)), "3:2; give"),
        (lambda: OneShot(HALF, at_step=1, pattern=(2, 4), scope="global"), "2:4.*give it with"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (OneShot(Allocation(0.001), at_step=1), "encoder.weight of 48 entries would keep none"),
        (OneShot(Allocation(0.3), at_step=1, pattern=(2, 4)), "keeps 0.5 of a tensor.*density 0.3"),
        (OneShot(Allocation(0.4), at_step=1, pattern=(2, 5)), "groups of 5"),
    ],
)
def test_what_cannot_work_is_refused_before_training(method: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        method.supports(SPECS, seed=0)


def test_a_tensor_that_would_be_emptied_and_weights_that_are_nan_are_refused() -> None:
    method = OneShot(HALF, at_step=1, scope="global")
    method.supports(SPECS, seed=0)
    params = drawn(0)
    params["rnn.weight_hh_l0"] = values_of(params["rnn.weight_hh_l0"]) * 1e-6
    with pytest.raises(ValueError, match=r"rnn\.weight_hh_l0 would keep no weight"):
        method.exchange(params, step=1, seed=0)
    params["rnn.weight_hh_l0"] = np.full((16, 4), np.nan)
    with pytest.raises(ValueError, match="NaN"):
        method.exchange(params, step=1, seed=0)


def test_a_pool_that_stores_less_is_left_alone() -> None:
    weight = SparseWeight(Support((4, 4), [1, 5, 9]), np.ones(3))
    method = OneShot(HALF, at_step=1)
    method.supports({"w": ParamSpec("w", (4, 4), "linear", True)}, seed=0)
    assert prune({"w": weight}, method.pools, {"w": 8}) == {}
    assert drop_smallest(weight.values, 0).size == 0
