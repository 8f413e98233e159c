"""The laws of a method of sparse training, checked over random shapes, values and drop fractions.

For our methods and anyone's: whatever answers as :class:`refimpl.methods.base.Method` does can be checked.
What a method must do follows from the conventions that it declares; the expected sets are found here by
sorting dense pictures, with none of the library's own code for dropping and growing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from refimpl.methods.base import Method
from refimpl.methods.conventions import Conventions
from refimpl.methods.onestep import ArrayGradient
from refimpl.weights.carry import Exchange
from refimpl.weights.gradient import Grads
from refimpl.weights.parameters import Params, ParamSpec
from refimpl.weights.sparse import SparseWeight, support_of, values_of
from refimpl.weights.support import Support

Make = Callable[[float, float], Method]
"""``(density, drop fraction) -> a new method`` that drops this fraction in each exchange."""

Criterion = Literal["magnitude", "sign"]
Place = tuple[str, int]  # a tensor and a flat position in it


@dataclass(frozen=True)
class Case:
    """One random model and what is asked of the method."""

    specs: dict[str, ParamSpec]
    density: float
    drop_fraction: float
    step: int
    seed: int
    tied: bool

    def array(self, spec: ParamSpec, salt: int) -> np.ndarray:
        """Return signed numbers for a parameter, of different magnitudes unless the case is a tied one."""
        rng = np.random.default_rng([self.seed, salt, *spec.name.encode()])
        sign = rng.choice([-1.0, 1.0], spec.size)
        size = rng.integers(0, 4, spec.size) if self.tied else rng.random(spec.size) + 1e-3
        return (sign * size).reshape(spec.shape)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a small model: two stacked-gate matrices of one recurrent layer, a decoder and its bias, a convolution."""
    hidden, inputs, words = (draw(st.integers(2, 5)) for _ in range(3))
    gates = draw(st.sampled_from([2, 4]))
    blocks = {f"gate{i}": slice(i * hidden, (i + 1) * hidden) for i in range(gates)}
    rows = gates * hidden
    specs = [
        ParamSpec("rnn.weight_ih_l0", (rows, inputs), "linear", True, blocks, layer="rnn.0"),
        ParamSpec("rnn.weight_hh_l0", (rows, hidden), "recurrent", True, blocks, layer="rnn.0"),
        ParamSpec("decoder.weight", (words + 4, hidden), "linear", True),
        ParamSpec("decoder.bias", (words + 4,), "bias"),
        ParamSpec("conv.weight", (words + 1, inputs, 2, 1), "conv", True, columns_per_sample=4.0),
    ]
    return Case(
        specs={spec.name: spec for spec in specs},
        density=draw(st.floats(0.15, 0.9)),
        drop_fraction=draw(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0])),
        step=draw(st.integers(1, 1000)),
        seed=draw(st.integers(0, 2**32 - 1)),
        tied=draw(st.booleans()),
    )


def check_method(
    make: Make,
    *,
    growth: Literal["random", "gradient"] | None = "random",
    criterion: Criterion | None = "magnitude",
    max_examples: int = 40,
    shrink: bool = True,
) -> None:
    """Check a method against the laws of its kind.

    The laws: supports have the stated counts; an exchange changes no parameter and repeats exactly; what is
    dropped was stored, what grows was not kept, each pool has the stated count, and the sets are those that
    the criterion and the conventions say; a drop fraction of 0 changes nothing; permuting units permutes what
    is dropped; a method that takes up a saved state goes on identically; A ⊆ B ⊆ S.

    Parameters
    ----------
    make : callable
        ``(density, drop fraction) -> a new method``; its conventions are what it promises.
    growth : {"random", "gradient"} or None
        How it grows; None for a method whose exchange never changes what is stored.
    criterion : {"magnitude", "sign"} or None
        How it drops; None skips the comparison of the dropped sets.
    max_examples : int
        How many random models to try.
    shrink : bool
        Whether to look for a smaller model that breaks the law, before reporting it.

    Raises
    ------
    AssertionError
        If a law is broken; the message says which.
    """
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), phases=phases)
    @given(cases())
    def laws(case: Case) -> None:
        method, params = _start(make, case)
        _check_sets(method, case, params)
        _check_resume(make, method, case, params)
        if growth is None:
            assert _exchange(method, case, params) == {}, "a method that moves no connections returned an exchange"
            return
        _check_exchange(method, case, params, growth, criterion)
        full: Params = {
            name: SparseWeight(Support.full(w.shape), case.array(case.specs[name], 3).reshape(-1))
            if isinstance(w, SparseWeight) else w
            for name, w in params.items()
        }  # fmt: skip
        # On a full support only what has just been dropped can grow, so eligibility shows.
        _check_exchange(method, case, full, growth, criterion)
        _check_draws(method, case, full, growth)
        _check_nothing(make, case)
        if not case.tied:
            _check_permutation(method, case, params)

    laws()


def _start(make: Make, case: Case) -> tuple[Method, Params]:
    method = make(case.density, case.drop_fraction)
    try:
        supports = method.supports(case.specs, seed=case.seed)
    except ValueError:
        assume(method.conventions.initial_count == "exact")  # a Bernoulli tensor may come out empty
        raise
    params: Params = {}
    for name, spec in case.specs.items():
        dense = case.array(spec, 1)
        if name in supports:
            assert spec.prunable, f"{name} is not prunable but was given a support"
            assert supports[name].shape == spec.shape, f"the support of {name} has another shape than the tensor"
            params[name] = SparseWeight.from_dense(dense, supports[name])
        else:
            params[name] = dense
    again = make(case.density, case.drop_fraction).supports(case.specs, seed=case.seed)
    assert again == supports, "the same seed gave other supports"
    return method, params


def _gradients(case: Case) -> dict[str, ArrayGradient]:
    return {
        name: ArrayGradient(case.array(spec, 2), 1 + case.seed % 7)
        for name, spec in case.specs.items()
        if spec.prunable
    }


def _bias_gradients(case: Case) -> dict[str, np.ndarray]:
    return {name: case.array(spec, 2) for name, spec in case.specs.items() if not spec.prunable}


def _exchange(method: Method, case: Case, params: Params) -> dict[str, Exchange]:
    """Run the exchange, and check that it left the parameters alone and repeats."""
    before = {name: (support_of(w), values_of(w).copy()) for name, w in params.items()}
    first, second = (
        method.exchange(params, step=case.step, seed=case.seed, gradients=_gradients(case)) for _ in range(2)
    )
    for name, weight in params.items():
        support, values = before[name]
        unchanged = support_of(weight) == support and np.array_equal(values_of(weight), values)
        assert unchanged, f"the exchange changed {name} itself"
    assert _same(first, second), "the same draws gave another result"
    return first


def _same(a: Mapping[str, Exchange], b: Mapping[str, Exchange]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].old == b[name].old
        and a[name].new == b[name].new
        and np.array_equal(a[name].dropped, b[name].dropped)
        and np.array_equal(a[name].grown, b[name].grown)
        for name in a
    )


def _check_sets(method: Method, case: Case, params: Params) -> None:
    """A ⊆ B ⊆ S, the view holds the stored values, and exact counts are exact."""
    seen = method.view(params)
    assert seen.keys() == params.keys(), "the view has other parameters than the model"
    for name, weight in params.items():
        stored, forward = support_of(weight), support_of(seen[name])
        backward = method.gradient_support(name, params)
        backward = stored if backward is None else backward
        assert forward in backward, f"the forward set of {name} is not within its gradient set"
        assert backward in stored, f"the gradient set of {name} is not within what is stored"
        dense = weight.dense() if isinstance(weight, SparseWeight) else weight
        picture = dense.reshape(-1)[forward.flat]
        assert np.array_equal(values_of(seen[name]).reshape(-1), picture), f"the view of {name} has other values"
    grads: Grads = {**_gradients(case), **_bias_gradients(case)}
    pulled = method.pull(params, grads)
    for name, weight in params.items():
        moved = method.update_support(name, params)
        size = values_of(weight).size if moved is None else moved.nnz
        assert pulled[name].size == size, f"the gradient of {name} is not aligned with what is updated"


def _check_resume(make: Make, method: Method, case: Case, params: Params) -> None:
    state = json.loads(json.dumps(method.state_dict()))
    arrays = {name: array.copy() for name, array in method.state_arrays().items()}
    resumed = make(case.density, case.drop_fraction)
    resumed.load_state_dict(state, arrays)
    moved: Params = {
        name: SparseWeight(w.support, -2 * w.values[::-1]) if isinstance(w, SparseWeight) else -2 * w[::-1]
        for name, w in params.items()
    }
    for name in params:
        a, b = (support_of(m.view(moved)[name]) for m in (method, resumed))
        assert a == b, f"after resuming, the forward set of {name} is another"
    outcomes = []
    for m in (method, resumed):
        try:
            outcomes.append(_exchange(m, case, moved))
        except ValueError:
            outcomes.append({})
    assert _same(*outcomes), "after resuming, the exchange is another"


def _check_nothing(make: Make, case: Case) -> None:
    method, params = _start(make, replace(case, drop_fraction=0.0))
    for name, e in _exchange(method, case, params).items():
        nothing = e.new == e.old and not e.dropped.size and not e.grown.size
        assert nothing, f"a drop fraction of 0 changed {name}"


def _pools(case: Case, names: list[str], conventions: Conventions) -> list[list[Place]]:
    """List the places of each pool, in order."""
    chunks: dict[str, list[Place]] = {}
    for name in names:
        spec = case.specs[name]
        columns = spec.size // spec.shape[0]
        for row in range(spec.shape[0]):
            label = name
            if conventions.pool == "gate" and spec.blocks:
                label += next(gate for gate, part in spec.blocks.items() if part.start <= row < part.stop)
            elif conventions.pool == "layer" and spec.layer:
                label = spec.layer
            chunks.setdefault(label, []).extend((name, row * columns + j) for j in range(columns))
    return list(chunks.values())


def _count(number: float, rounding: str) -> int:
    if rounding == "floor":
        return math.floor(number)
    return math.ceil(number) if rounding == "ceil" else round(number)


def _expected_drop(stored: dict[Place, float], fraction: float, criterion: Criterion, c: Conventions) -> set[Place]:
    """Find what is dropped, by sorting; ``stored`` is in order of place."""
    if criterion == "sign":
        signs = ({p: w for p, w in stored.items() if w < 0}, {p: w for p, w in stored.items() if w >= 0})
        return set().union(*(_expected_drop(part, fraction, "magnitude", c) for part in signs))
    order = {place: i for i, place in enumerate(stored)}
    ranked = sorted(stored, key=lambda place: (abs(stored[place]), -order[place]))
    count = _count(fraction * len(stored), c.drop_rounding)
    if count and c.drop_ties == "threshold":
        return {place for place in stored if abs(stored[place]) <= abs(stored[ranked[count - 1]])}
    return set(ranked[:count])


def _check_exchange(method: Method, case: Case, params: Params, growth: str, criterion: Criterion | None) -> None:
    c = method.conventions
    sparse = {name: w for name, w in params.items() if isinstance(w, SparseWeight)}
    begun = _initial_counts(method, case)
    stored_all = {(name, int(p)): float(v) for name, w in sparse.items() for p, v in zip(w.support.flat, w.values)}
    pools = _pools(case, list(sparse), c)
    stored = [{place: stored_all[place] for place in pool if place in stored_all} for pool in pools]
    try:
        exchanges = _exchange(method, case, params)
    except ValueError:
        assert c.regrow == "forbid", "the exchange failed although what was dropped may grow back"
        least = [len(_expected_drop(s, case.drop_fraction, criterion or "magnitude", c)) for s in stored]
        short = any(n > len(pool) - len(s) for n, pool, s in zip(least, pools, stored))
        assert short or c.drop_ties == "threshold" or c.growth_target == "initial", "the exchange failed without need"
        return
    assert exchanges.keys() == sparse.keys(), "the exchange does not cover the sparse tensors"
    dropped = {(name, int(p)) for name, e in exchanges.items() for p in e.dropped}
    grown = {(name, int(p)) for name, e in exchanges.items() for p in e.grown}
    new = {(name, int(p)) for name, e in exchanges.items() for p in e.new.flat}
    assert dropped <= stored_all.keys(), "an entry was dropped that was not stored"
    kept = stored_all.keys() - dropped
    assert not grown & kept, "an entry grew that was kept"
    assert new == kept | grown, "the new support is not what was kept and what grew"
    if c.regrow == "forbid":
        assert not grown & dropped, "a dropped entry grew back although the conventions forbid it"
    for pool, s, n0 in zip(pools, stored, begun):
        inside = set(pool)
        if criterion is not None:
            expected = _expected_drop(s, case.drop_fraction, criterion, c)
            assert dropped & inside == expected, "the dropped entries are not those that the criterion names"
        left = len(kept & inside)
        want = max(0, (n0 if c.growth_target == "initial" else len(s)) - left)
        if growth == "gradient" or c.growth_count == "exact":
            assert len(grown & inside) == want, "a pool grew another number than the conventions say"
        if growth == "gradient":
            free = [p for p in pool if p not in kept and not (c.regrow == "forbid" and p in dropped)]
            score = {p: abs(case.array(case.specs[p[0]], 2).reshape(-1)[p[1]]) for p in free}
            best = set(sorted(free, key=lambda p: -score[p])[:want])  # stable: of equal scores the lower place
            assert grown & inside == best, "growth did not take the places of largest gradient"


def _initial_counts(method: Method, case: Case) -> list[int]:
    """Return how many entries each pool had at the start, from the supports that the method draws again."""
    supports = method.supports(case.specs, seed=case.seed)
    places = {(name, int(p)) for name, s in supports.items() for p in s.flat}
    return [len(places & set(pool)) for pool in _pools(case, list(supports), method.conventions)]


def _check_draws(method: Method, case: Case, full: Params, growth: str) -> None:
    """Random growth depends on the seed, and reaches what has just been dropped unless that is forbidden."""
    if growth != "random" or method.conventions.regrow == "forbid":
        return
    runs = [method.exchange(full, step=case.step, seed=seed) for seed in range(4)]
    dropped = sum(e.dropped.size for e in runs[0].values())
    regrown = [np.concatenate([np.empty(0, np.int64), *(e.regrown for e in run.values())]) for run in runs]
    if method.conventions.growth_target == "conserve":
        assert all(r.size == dropped for r in regrown), "what was just dropped cannot grow back"
    elif dropped > 12 and all(0.3 * dropped < r.size < 0.7 * dropped for r in regrown):
        assert len({r.tobytes() for r in regrown}) > 1, "growth does not depend on the seed"


def _check_permutation(method: Method, case: Case, params: Params) -> None:
    """Permuting the units of every tensor permutes what is dropped."""
    rng = np.random.default_rng(case.seed)
    unit_orders: dict[int, np.ndarray] = {}
    moved: Params = {}
    to: dict[str, np.ndarray] = {}
    for name, weight in params.items():
        if not isinstance(weight, SparseWeight):
            moved[name] = weight
            continue
        spec = case.specs[name]
        size = next(iter(spec.blocks.values())).stop if spec.blocks else spec.shape[0]
        order = unit_orders.setdefault(size, rng.permutation(size))
        rows = np.concatenate([order + start for start in range(0, spec.shape[0], size)])
        source = np.arange(spec.size).reshape(spec.shape)[rows].reshape(-1)  # new place -> old place
        to[name] = np.argsort(source)
        mask = weight.support.mask().reshape(-1)[source]
        support = Support(spec.shape, np.flatnonzero(mask))
        moved[name] = SparseWeight(support, weight.dense().reshape(-1)[source][support.flat])
    try:
        plain, permuted = _exchange(method, case, params), _exchange(method, case, moved)
    except ValueError:
        return  # a shortage, which _check_exchange has judged
    for name, e in plain.items():
        same = np.array_equal(np.sort(to[name][e.dropped]), permuted[name].dropped)
        assert same, f"permuting the units of {name} did not permute what is dropped"
