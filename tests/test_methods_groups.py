"""Groups and who wins in them: counts, ties, scores in the place of values, and planted mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import PRUNABLE, SPECS, caught, drawn, of_pool, quick, stored

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.groups import Group, counts_of, groups_of, keep_best
from refimpl.methods.pools import Pool
from refimpl.methods.pruning import prune
from refimpl.weights import Params, SparseWeight, Support, as_sparse, support_of


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=8), min_size=1, max_size=4), st.data())
def test_ties_go_to_what_comes_first(scores: list[list[int]], data: st.DataObject) -> None:
    """Against a sort of all (score, tensor, position)."""
    count = data.draw(st.integers(1, sum(map(len, scores))))
    order = sorted((-s, k, p) for k, own in enumerate(scores) for p, s in enumerate(own))[:count]
    expected = [sorted(p for _, k, p in order if k == tensor) for tensor in range(len(scores))]
    arrays: Params = {f"w{k}": np.array(own, float) for k, own in enumerate(scores)}
    pool = Pool.chain("all", [(f"w{k}", 0, len(own)) for k, own in enumerate(scores)])
    if all(expected):
        found = keep_best(arrays, [pool], {"all": count})
        assert found.keys() == {f"w{k}" for k, own in enumerate(scores) if len(expected[k]) < len(own)}
        for k, own in enumerate(expected):
            kept = found[f"w{k}"].new if f"w{k}" in found else support_of(arrays[f"w{k}"])
            assert kept.flat.tolist() == own
    else:
        with pytest.raises(ValueError, match=r"w\d would keep no weight.*scope 'local'") as refused:
            keep_best(arrays, [pool], {"all": count})
        assert str(refused.value).startswith(f"w{expected.index([])} ")


def check_scores(keep: Callable[..., Any], seed: int, pool: Any, tied: bool) -> None:
    """Rank stored entries by scores of their own, whose signs count; compare with a sort of each pool."""
    rng = np.random.default_rng([seed, 7])
    conventions = Conventions(pool=pool)
    groups = groups_of(SPECS, Allocation(0.4), "local", conventions)
    scored: Params = {}
    for name, score in drawn(seed, tied).items():
        support = Support.from_mask(rng.random(score.shape) < 0.8)
        scored[name] = SparseWeight.from_dense(score, support)
    kept = counts_of(groups, conventions)
    found = keep(scored, [group.pool for group in groups], kept)
    after = {name: found[name].new if name in found else support_of(scored[name]) for name in PRUNABLE}
    expected = set()
    for part in of_pool(stored(scored), pool):
        size = sum(len(part_) for part_ in of_pool(_places(), pool) if next(iter(part)) in part_)
        expected |= set(sorted(part, key=lambda place: -part[place])[: round(0.4 * size)])
    assert {(name, int(p)) for name in PRUNABLE for p in after[name].flat} == expected, "others stayed than the best"


def _places() -> dict[tuple[str, int], float]:
    return {(name, p): 0.0 for name, spec in PRUNABLE.items() for p in range(spec.size)}


@quick
@given(st.integers(0, 2**32), st.sampled_from(["matrix", "gate", "layer"]), st.booleans())
def test_the_best_scores_stay(seed: int, pool: str, tied: bool) -> None:
    check_scores(keep_best, seed, pool, tied)


def _worst(scored: Params, *arguments: Any) -> Any:
    return keep_best(scored, *arguments, score=np.negative)


def _one_more(scored: Params, pools: Any, kept: dict[str, int]) -> Any:
    return keep_best(scored, pools, {label: count + 1 for label, count in kept.items()})


def _last_of_ties(scored: Params, *arguments: Any) -> Any:
    nudged: Params = {n: SparseWeight(s.support, s.values + 1e-9 * np.arange(s.nnz)) for n, s in _sparse(scored)}
    return keep_best(nudged, *arguments)


def _sparse(scored: Params) -> list[tuple[str, SparseWeight]]:
    return [(name, as_sparse(weight)) for name, weight in scored.items()]


@pytest.mark.parametrize("planted", [prune, _worst, _one_more, _last_of_ties])
def test_mistakes_are_caught(planted: Callable[..., Any]) -> None:
    caught(check_scores, planted, 3, "gate", True, match="others stayed")


@quick
@given(st.integers(0, 2**32), st.booleans())
def test_pruning_is_the_case_of_magnitudes(seed: int, tied: bool) -> None:
    groups = groups_of(SPECS, Allocation(0.3), "local", Conventions())
    params, pools, kept = drawn(seed, tied), [group.pool for group in groups], counts_of(groups, Conventions())
    magnitudes: Params = {name: np.abs(w) for name, w in params.items()}
    one, other = prune(params, pools, kept), keep_best(magnitudes, pools, kept)
    assert {name: e.new for name, e in one.items()} == {name: e.new for name, e in other.items()}


def test_groups_of_each_scope() -> None:
    allocation = Allocation(0.5, fixed={"encoder.weight": 1.0, "fc.weight": 0.25})
    shared = [name for name in PRUNABLE if name not in allocation.fixed]
    alone = {group.pool.label: group for group in groups_of(SPECS, allocation, "local", Conventions())}
    assert alone.keys() == {*shared, "fc.weight"}
    together = {group.pool.label: group for group in groups_of(SPECS, allocation, "global", Conventions())}
    assert together.keys() == {"global", "fc.weight"}
    assert [s.name for s in together["global"].pool.segments] == shared
    assert together["global"].densities == (0.5,) * len(shared)
    for group in together.values():
        assert Group.from_json(group.as_json()) == group


def test_a_pool_of_several_densities_counts_each() -> None:
    group = Group(Pool.chain("p", [("a", 0, 5), ("b", 0, 5)]), (0.3, 0.7))
    assert group.count(Conventions(initial_rounding="floor")) == 1 + 3
    same = Group(group.pool, (0.3, 0.3))
    assert same.count(Conventions(initial_rounding="floor")) == 3, "counted as one, not each segment rounded"
    assert same.count(Conventions(), lambda density: density / 3) == 1
    with pytest.raises(ValueError, match="the pool 'p' of 10 entries would keep none"):
        same.count(Conventions(), lambda density: density / 100)
