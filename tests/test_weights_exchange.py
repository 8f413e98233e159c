"""A change of support: exact sets, the same bits for what stays, the rule's number for what is new."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.rng import generator
from refimpl.weights import KEEP, CarryRule, Exchange, Support

DTYPES = st.sampled_from([np.float32, np.float64, np.int32])


@st.composite
def exchanges(draw):
    """Return an exchange and the sets that it was made of; some entries grow back where they were dropped."""
    rng = generator(draw(st.integers(0, 2**32)), "exchange")
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    every = np.arange(shape[0] * shape[1])
    old = every[rng.random(every.size) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))]
    dropped = old[rng.random(old.size) < draw(st.sampled_from([0.0, 0.5, 1.0]))]
    kept = np.setdiff1d(old, dropped)
    free = np.setdiff1d(every, kept)  # what was dropped may grow again
    grown = free[rng.random(free.size) < draw(st.sampled_from([0.0, 0.5, 1.0]))]
    made = Exchange.of(Support(shape, old), rng.permutation(dropped), rng.permutation(grown))
    return made, set(old.tolist()), set(dropped.tolist()), set(grown.tolist())


@given(exchanges())
def test_the_sets(case):
    exchange, old, dropped, grown = case
    assert set(exchange.new.flat.tolist()) == (old - dropped) | grown
    assert exchange.new.nnz == len(old) - len(dropped) + len(grown)
    assert exchange.dropped.tolist() == sorted(dropped)
    assert exchange.grown.tolist() == sorted(grown)
    assert set(exchange.regrown.tolist()) == dropped & grown
    assert exchange.counts() == {"dropped": len(dropped), "grown": len(grown), "regrown": len(dropped & grown)}
    assert set(exchange.old.flat.tolist()) == old
    assert exchange.new.shape == exchange.old.shape


@given(
    exchanges(),
    DTYPES,
    st.sampled_from(["keep", "reset"]),
    st.sampled_from([(), (2,)]),
    st.sampled_from([0.0, 7.0]),
)
def test_carrying(case, dtype, regrown, rest, number):
    exchange, old, dropped, grown = case
    before = generator(3, "aligned").integers(10, 2**20, (exchange.old.nnz, *rest)).astype(dtype)
    unchanged = before.copy()
    after = exchange.carry(before, CarryRule(number, regrown))
    assert np.array_equal(before, unchanged)
    assert not np.shares_memory(before, after)
    assert after.dtype == dtype
    assert after.shape == (exchange.new.nnz, *rest)
    held = dict(zip(exchange.old.flat.tolist(), before, strict=True))
    for flat, value in zip(exchange.new.flat.tolist(), after, strict=True):
        if flat in old - dropped or (flat in dropped & grown and regrown == "keep"):
            assert value.tobytes() == held[flat].tobytes()
        else:
            assert flat in grown
            assert (value == number).all()


@given(exchanges())
def test_bits_are_carried_and_not_numbers(case):
    """Also those of NaN with a payload, and the sign of zero."""
    exchange = case[0]
    bits = np.full(exchange.old.nnz, 0x7FF8_0000_DEAD_BEEF, np.uint64)
    bits[::2] = 1 << 63
    after = exchange.carry(bits.view(np.float64)).view(np.uint64)
    source = exchange.old.positions_of(exchange.new.flat)
    assert np.array_equal(after[source >= 0], bits[source[source >= 0]])


@given(exchanges())
def test_nothing_to_exchange_changes_nothing(case):
    support = case[0].old
    nothing = Exchange.of(support, [], [])
    values = np.arange(support.nnz, dtype=np.float64)
    assert nothing.new == support
    assert np.array_equal(nothing.carry(values), values)


@given(exchanges())
def test_the_way_back_restores_what_was_kept(case):
    exchange, _, dropped, grown = case
    added, gone = sorted(grown - dropped), sorted(dropped - grown)
    back = Exchange.of(exchange.new, added, gone)
    assert back.new == exchange.old
    values = np.arange(1.0, exchange.old.nnz + 1)
    again = back.carry(exchange.carry(values))
    lost = np.isin(exchange.old.flat, gone)
    assert np.array_equal(again, np.where(lost, 0, values))


def test_the_default_rule_grows_zeros_and_lets_what_grows_back_continue():
    exchange = Exchange.of(Support((2, 2), [0, 1, 2]), [1, 2], [2, 3])
    assert exchange.carry(np.array([5.0, 6.0, 7.0])).tolist() == [5, 7, 0]
    assert exchange.carry(np.array([5.0, 6.0, 7.0]), KEEP).tolist() == [5, 7, 0]
    assert exchange.carry(np.array([5.0, 6.0, 7.0]), CarryRule(1.0, "reset")).tolist() == [5, 1, 1]


@pytest.mark.parametrize(
    ("dropped", "grown", "message"),
    [
        ([3], [], "can only drop entries that are stored"),
        ([99], [], "can only drop entries that are stored"),
        ([-1], [], "can only drop entries that are stored"),
        ([1, 1], [], "drop an entry once"),
        ([], [0], "can only grow entries that are not kept"),
        ([1], [0], "can only grow entries that are not kept"),
        ([], [3, 3], "each once"),
        ([], [4], "within 0..3"),
        ([], [-1], "within 0..3"),
    ],
)
def test_errors(dropped, grown, message):
    with pytest.raises(ValueError, match=message):
        Exchange.of(Support((2, 2), [0, 1, 2]), dropped, grown)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_an_array_that_is_not_aligned_is_an_error(length):
    exchange = Exchange.of(Support((2, 2), [0, 1, 2]), [1], [3])
    with pytest.raises(ValueError, match=f"aligned with 3 entries is carried; got one of length {length}"):
        exchange.carry(np.zeros(length))
