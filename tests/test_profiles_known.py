"""Every profile against numbers that were observed, and against its system's rules for state and allocation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import Conventions, profile
from refimpl.methods.allocation import Allocation, densities
from refimpl.methods.drop import by_sign
from refimpl.methods.onestep import Fate, allocate, allocate_counts, exchange_masks, initial_mask, prune_mask
from refimpl.weights.parameters import ParamSpec

f32 = np.float32


def distinct(rng, shape, dtype):
    """Return numbers of both signs, no two of the same magnitude, none near 0."""
    size = int(np.prod(shape))
    return (rng.permutation(np.arange(1, size + 1)) / size * rng.choice([-1, 1], size)).reshape(shape).astype(dtype)


# --- known numbers ----------------------------------------


def one_shot(name, n, s):
    conventions = profile(name)
    if name == "torch-prune":
        return int(prune_mask(np.arange(1.0, n + 1), np.ones(n, bool), s, conventions).sum())
    by_gradient = {"gradient": np.arange(n), "drop_fraction": 0.3} if name == "sparseml" else {}
    return int(initial_mask((n,), s, conventions, scores=np.arange(n), **by_gradient).sum())


@pytest.mark.parametrize(
    ("n", "s", "counts"),
    [
        (10, 0.99, (1, 1, 0, 0)),
        (25, 0.9, (3, 2, 3, 2)),
        (1000, 0.67, (330, 330, 330, 329)),
        (1000, 0.9, (100, 100, 100, 100)),
    ],
)
def test_counts_of_one_shot_masks(n, s, counts):
    names = ("rigl-tf", "jaxpruner", "torch-prune", "cerebras")
    assert tuple(one_shot(name, n, s) for name in names) == counts


def test_counts_that_were_observed():
    assert one_shot("sparsimony", 1000, 0.9) == 99  # 1 - 0.9 is below 0.1 in binary
    assert one_shot("cerebras", 10_000, 0.8) == 1999
    assert one_shot("jaxpruner", 15, 0.9) == 2  # 1.5 in float32, and below that in float64


def kept(name, n, n1, f, s=0.0):
    rng = np.random.default_rng(0)
    mask = np.arange(n) < n1
    weight = (distinct(rng, (n,), f32) * mask).astype(f32)
    out = exchange_masks(
        weight, mask, drop_fraction=f, gradient=distinct(rng, (n,), f32), sparsity=s,
        noise=np.zeros(n), conventions=profile(name),
    )  # fmt: skip
    return int((mask & ~out.dropped).sum()), int(out.mask.sum())


def test_kept_counts_that_were_observed():
    assert [kept("jaxpruner", 100, 10, f)[0] for f in (0.25, 0.35)] == [7, 6]
    assert kept("jaxpruner", 1536, 154, 0.3)[0] == 108
    assert [kept("sparsimony", 10_000, n1, 0.3, 0.8)[0] for n1 in (2000, 1999)] == [1400, 1399]
    assert kept("sparsimony", 1536, 154, 0.3, 0.9) == (107, 153)
    assert kept("cerebras", 10_000, 1999, 0.3, 0.8)[1] == kept("sparsimony", 10_000, 2000, 0.3, 0.8)[1] == 1999
    assert [kept(name, 1536, 154, 0.3, 0.9)[1] for name in ("rigl-tf", "rigl-torch", "jaxpruner", "itop")] == [154] * 4


def two_hundred(lopsided=False):
    """Return 111 negative and 89 positive weights, the pair closest to zero on either side."""
    values = np.concatenate([-np.arange(1, 112) - 0.5, np.arange(1, 90)]) / 100.0
    if lopsided:
        values = np.concatenate([-np.arange(1, 112), np.arange(1, 90) + 0.5]) / 100.0
    return np.random.default_rng(0).permutation(values)


@pytest.mark.parametrize(
    ("name", "negative", "positive"),
    [("set-original", 77, 62), ("itop", 29, 59), ("selfish-authors", 81, 59), ("sparse-learning", 30, 0)],
)
def test_what_the_programs_of_set_keep(name, negative, positive):
    values = two_hundred(lopsided=True)
    weight = np.zeros((20, 40))
    weight.flat[np.random.default_rng(1).permutation(800)[:200]] = values
    rng = np.random.default_rng(2)
    out = exchange_masks(
        weight, weight != 0, method="set", drop_fraction=0.3, rng=rng,
        conventions=replace(profile(name), set_criterion="sign"),
    )  # fmt: skip
    left = weight[(weight != 0) & ~out.dropped]
    assert ((left < 0).sum(), (left > 0).sum()) == (negative, positive)
    if name == "set-original":
        v = np.sort(values)
        assert left[left < 0].max() == v[76]
        assert left[left > 0].min() == v[138]
    if name == "selfish-authors":
        assert left.min() > -0.9  # the most negative have gone
    if name in ("itop", "sparse-learning"):
        assert left[left < 0].max() < -0.8


@given(st.lists(st.integers(-20, 20).filter(bool), min_size=1, max_size=30, unique=True), st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_the_original_arithmetic_of_set(numbers, zeta):
    values = np.array(numbers, float) + 0.25  # no two of the same magnitude
    v = sorted(values.tolist())
    first = min(range(len(v)), key=lambda i: (abs(v[i]), i))
    last = len(v) - min(range(len(v)), key=lambda i: (abs(v[::-1][i]), i))
    a, b = int((1 - zeta) * first), int(min(len(v) - 1, last + zeta * (len(v) - last)))
    stays = [x < v[a] or x > v[b] for x in values]
    dropped = by_sign(values, zeta, profile("set-original"))
    assert dropped.tolist() == [not x for x in stays]
    assert sum(stays) == a + len(v) - 1 - b < len(v)


def test_set_draws_fresh_values_also_where_it_just_dropped():
    weight, mask = np.array([[0.1, 0.8, -0.9, 0.9, 0.0]]), np.array([[True, True, True, True, False]])
    conventions = profile("set-original")
    out = exchange_masks(
        weight,
        mask,
        method="set",
        drop_fraction=0,
        ranks=[0, 2],
        fresh=np.array([[3.0, 4, 5, 6, 7]]),
        conventions=conventions,
        slots={"momentum": np.array([[4.0, 5, 6, 7, 8]])},
    )
    # Its arithmetic drops two even at a fraction of 0: those on and just above the smallest magnitude.
    assert out.fate.tolist() == [[Fate.REGROWN_ANEW, Fate.DROPPED, Fate.KEPT, Fate.KEPT, Fate.GROWN_BY_DRAW]]
    assert out.weights.tolist() == [[3.0 / 10, 0, -0.9, 0.9, 7.0 / 10]]
    assert out.slots["momentum"].tolist() == [[0, 0, 6, 7, 0]]


# --- optimizer state ----------------------------------------


SLOTS = {name: np.array([[1.0, 2.0, 3.0, 4.0]]) for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(
    ("name", "momentum", "first", "second"),
    [
        # entry 0 is dropped, 1 kept, 2 grows, 3 stays absent; each slot holds 1, 2, 3, 4
        ("default", [0, 2, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]),
        ("rigl-tf", [1, 2, 0, 4], [1, 2, 0, 4], [1, 2, 0, 4]),
        ("jaxpruner", [1, 2, 0, 4], [1, 2, 0, 4], [1, 2, 0, 4]),
        ("rigl-torch", [0, 2, 3, 0], [1, 2, 3, 4], [1, 2, 3, 4]),
        ("itop", [0, 2, 3, 0], [1, 2, 3, 4], [1, 2, 3, 4]),
        ("cerebras", [0, 2, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]),
        ("sparsimony", [0, 2, 3, 0], [0, 2, 3, 0], [0, 2, 3, 0]),
        ("sparse-learning", [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
        ("sparseml", [0, 2, 0, 0], [0, 2, 0, 0], [1, 2, 3, 4]),
    ],
)
def test_optimizer_state(name, momentum, first, second):
    weight, mask = np.array([[0.1, 0.9, 0.0, 0.0]]), np.array([[True, True, False, False]])
    out = exchange_masks(
        weight, mask, drop_fraction=0.5, gradient=np.array([[0.0, 0, 5, 1]]), noise=np.zeros((1, 4)), sparsity=0.5,
        slots=SLOTS, conventions=profile(name),
    )  # fmt: skip
    assert out.mask.tolist() == [[False, True, True, False]]
    assert [out.slots[slot].tolist() for slot in SLOTS] == [[momentum], [first], [second]]
    assert SLOTS["momentum_buffer"].tolist() == [[1, 2, 3, 4]]


# --- allocation ----------------------------------------

LENET = {"0": (300, 784), "1": (100, 300), "2": (10, 100)}
CONV = {"0": (32, 3, 3, 3), "1": (64, 32, 3, 3), "2": (128, 1024), "3": (10, 128)}


def rigl_erk(shapes, s, zeros, one):
    """The loop of the rigl family, with its zeros and the number of maxima that a round takes."""
    dense = set()
    while True:
        divisor = rhs = 0.0
        raw = {}
        for name, shape in shapes.items():
            n = math.prod(shape)
            absent = zeros(s * n)
            if name in dense:
                rhs -= absent
            else:
                rhs += n - absent
                raw[name] = sum(shape) / n
                divisor += raw[name] * n
        epsilon = rhs / divisor
        top = max(raw.values())
        if top * epsilon <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        for name in raw:
            if raw[name] == top:
                dense.add(name)
                if one:
                    break


@given(st.floats(0.05, 0.95), st.sampled_from([LENET, CONV]))
@settings(max_examples=60, deadline=None)
def test_erk_of_the_rigl_family(s, shapes):
    rules = {
        "rigl-tf": (math.floor, False), "jaxpruner": (math.floor, False), "itop": (lambda x: x, False),
        "sparsimony": (int, True), "default": (lambda x: x, False),
    }  # fmt: skip
    for name, (zeros, one) in rules.items():
        expected = rigl_erk(shapes, s, zeros, one)
        found = allocate(shapes, s, "erk", profile(name))
        # the same sums in another order: a few roundings of numbers of the size of the model
        for layer, density in expected.items():
            assert abs(found[layer] - density) <= 1e-12 * max(1, 1 / (1 - s))


def test_equal_maxima_go_together_or_one_by_one():
    shapes = {"a": (2, 2), "b": (2, 2), "c": (40, 40)}
    for s in np.linspace(0.05, 0.95, 19):
        for name, one in (("default", False), ("sparsimony", True)):
            found = allocate(shapes, s, "erk", profile(name))
            expected = rigl_erk(shapes, s, (lambda x: x) if not one else int, one)
            assert found == pytest.approx(expected, abs=1e-12)


def test_uncapped_er_falls_short_of_what_was_asked():
    counts = allocate_counts(CONV, 0.8, "er", profile("sparse-learning"))
    capped = allocate_counts(CONV, 0.8, "er", profile("default"))
    size = sum(math.prod(shape) for shape in CONV.values())
    assert abs(sum(capped.values()) - 0.2 * size) <= len(CONV)
    assert sum(counts.values()) < 0.2 * size


def test_clipped_erk_of_sparseml_loses_the_excess():
    raw = {name: sum(shape) / math.prod(shape) for name, shape in CONV.items()}
    size = {name: math.prod(shape) for name, shape in CONV.items()}
    c = 0.2 * sum(size.values()) / sum(raw[name] * size[name] for name in CONV)
    expected = {name: 1 - min(max(1 - c * raw[name], 0), 1) for name in CONV}
    assert allocate(CONV, 0.8, "erk", profile("sparseml")) == pytest.approx(expected, abs=1e-12)


def test_er_takes_the_fans_of_the_layout():
    oihw = {"a": (64, 32, 3, 3), "b": (10, 64)}
    hwio = {"a": (3, 3, 32, 64), "b": (64, 10)}
    ours, theirs = allocate(oihw, 0.9, "er"), allocate(hwio, 0.9, "er", profile("rigl-tf"))
    assert ours == pytest.approx(theirs, rel=1e-3)  # apart from the rounding of their zeros
    specs = {name: ParamSpec(name, shape, "conv", True) for name, shape in oihw.items()}
    assert densities(specs, Allocation(0.1, "er"), profile("rigl-tf")) == pytest.approx(theirs, abs=1e-12)
    with_kernel_axes = densities(specs, Allocation(0.1, "er"), Conventions(er_axes="last-two"))
    assert abs(with_kernel_axes["a"] - ours["a"]) > 0.005


def test_pins():
    pinned = profile("rigl-torch")
    convolutions = {"0": (8, 3, 3, 3), "1": (8, 8, 3, 3), "2": (10, 8)}
    assert allocate(convolutions, 0.9, conventions=pinned) == pytest.approx({"0": 1, "1": 0.1, "2": 1})
    last = allocate(convolutions, 0.9, conventions=Conventions(last_layer="density-0.2"))
    assert last == pytest.approx({"0": 0.1, "1": 0.1, "2": 0.2})
    assert allocate(convolutions, 0.9, conventions=pinned, fixed={"0": 0.5})["0"] == 0.5
