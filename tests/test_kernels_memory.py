"""The pool never gives the same bytes to two live arrays; the products take no dense memory."""

import gc
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from refimpl import kernels
from refimpl.kernels import memory
from refimpl.kernels.memory import ALIGNMENT
from refimpl.rng import generator
from refimpl.weights import LinearGrad, SparseWeight, Support


@given(st.lists(st.integers(0, 40), max_size=3), st.sampled_from([np.uint8, np.float32, np.float64, np.int64]))
def test_arrays_are_what_was_asked_for(shape, dtype):
    for make in (memory.empty, memory.zeros):
        array = make(tuple(shape), dtype)
        assert array.shape == tuple(shape)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.ctypes.data % ALIGNMENT == 0
        assert memory.is_aligned(array)
    assert not array.any()
    assert not memory.is_aligned(memory.empty((2,), np.uint8)[1:])


class Pool(RuleBasedStateMachine):
    """Arrays are made, viewed and forgotten in any order; each holds a number of its own that must stay."""

    arrays = Bundle("arrays")

    def __init__(self) -> None:
        super().__init__()
        self.next = 0
        self.live: dict[int, np.ndarray] = {}

    @rule(target=arrays, size=st.sampled_from([1, 7, 1000, 1024, 1030, 5000, 40_000]))
    def make(self, size):
        array = memory.empty((size,), np.float64)
        return self.hold(array)

    @rule(target=arrays, key=consumes(arrays), start=st.integers(0, 5))
    def view_outlives_the_array(self, key, start):
        """Only the view is kept: the block must stay with it."""
        return self.hold(self.live.pop(key)[start:])

    @rule(key=consumes(arrays))
    def forget(self, key):
        del self.live[key]

    @rule()
    def trim(self):
        memory.trim()

    def hold(self, array):
        self.next += 1
        array[...] = self.next
        self.live[self.next] = array
        return self.next

    @invariant()
    def every_array_holds_its_own_number(self):
        for number, array in self.live.items():
            assert (array == number).all()

    @invariant()
    def no_two_share_memory(self):
        spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in self.live.values() if a.size)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


TestPool = Pool.TestCase


def test_memory_is_used_again_when_the_last_view_is_gone():
    memory.trim()
    first = memory.empty((10_000,), np.float32)
    address, view = first.ctypes.data, first[10:20].reshape(2, 5)
    del first
    gc.collect()
    other = memory.empty((10_000,), np.float32)
    assert other.ctypes.data != address  # the view still keeps it
    view[...] = 1
    del view
    gc.collect()
    assert memory.empty((10_000,), np.float32).ctypes.data == address
    again = memory.empty((9_900,), np.float32)  # a slightly smaller one fits in the same block
    assert again.ctypes.data == address
    del other, again


def test_trim_gives_waiting_blocks_back_and_says_how_much():
    memory.trim()
    live = memory.empty((1000,), np.uint8)
    assert memory.trim() == 0
    del live
    gc.collect()
    held = memory.trim()
    assert 1000 <= held < 10_000
    assert memory.trim() == 0


# --- memory in proportion to the non-zeros ----------------------------------------------------------

SIZE, NNZ = 4000, 32_000  # density 0.002
DENSE_BYTES = SIZE * SIZE * 4


@pytest.fixture(scope="module")
def large() -> SparseWeight:
    flat = np.sort(generator(0, "large").choice(SIZE * SIZE, NNZ, replace=False))
    return SparseWeight(Support((SIZE, SIZE), flat), np.ones(NNZ, np.float32))


def peak_of(call) -> int:
    """Return the most bytes held at once during a call, with an empty pool and all kernels compiled."""
    call()
    memory.trim()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", kernels.TIERS)
@pytest.mark.parametrize("product", ["matmul", "matmul_t", "sddmm", "both", "embed", "norm"])
def test_products_take_memory_in_proportion_to_the_nonzeros(large, name, product):
    """No more than operands, results and a few numbers for each non-zero; a dense array would be 64 MB."""
    x = generator(0, "x").standard_normal((4, SIZE, 20)).astype(np.float32)
    tokens = np.arange(80).reshape(4, 20)

    def call():
        w = SparseWeight(Support(large.shape, large.support.flat), large.values)  # without plans: they are counted
        match product:
            case "matmul":
                return kernels.matmul(w, x)
            case "matmul_t":
                return kernels.matmul_t(w, x)
            case "sddmm":
                return kernels.sddmm(w.support, x, x)
            case "both":
                return kernels.matmul_t_sddmm(w, x, x)
            case "embed":
                return kernels.embed(w, tokens)
            case _:
                return LinearGrad(w.shape, x, x).on(w.support)

    with kernels.use(name):
        peak = peak_of(call)
    assert peak < 100 * NNZ + 4 * x.nbytes
    assert peak < DENSE_BYTES / 6


def test_the_dense_gradient_is_seen_in_blocks(large):
    x = generator(0, "x").standard_normal((4, SIZE, 20)).astype(np.float32)

    def call():
        return sum(float(block.sum()) for _, block in LinearGrad(large.shape, x, x).blocks())

    assert peak_of(call) < DENSE_BYTES / 4


def test_the_measurement_sees_a_dense_array(large):
    """The check of the check."""
    assert peak_of(lambda: large.dense()) >= DENSE_BYTES
