"""The same bits for any number of threads, for every kernel."""

import numpy as np
import pytest

from refimpl import kernels
from refimpl.kernels import cpu, dense, threads
from refimpl.kernels.cpu.plan import chunk_count, plan
from refimpl.testing.kernels import Case, poison_pool
from refimpl.testing.lstm import LSTMCase

COUNTS = (1, 2, 3)


@pytest.fixture(autouse=True)
def _the_count_is_restored(monkeypatch):
    monkeypatch.setattr(cpu.plan, "WORTH_SHARING", 1e6)  # these are small, and are shared all the same
    before = threads.get()
    yield
    threads.set_count(before)


def bits(function, *arguments):
    """Run a kernel on 1, 2 and 3 threads and return the bytes of all its results."""
    results = []
    for count in COUNTS:
        threads.set_count(count)
        poison_pool()
        out = function(*arguments)
        arrays = [a for a in (out if isinstance(out, tuple) else (out,)) if a is not None]
        results.append([np.ascontiguousarray(a).tobytes() for a in arrays])
    return results


def softmax(z, targets):
    z = z.copy()
    loss = cpu.softmax_cross_entropy(z, targets, 0.25)
    return z, np.array(loss)


CASE = Case(300, 330, 0.3, lead=(9,), batch=20, dtype=np.float32)  # over several panels, tiles and chunks
TOKENS = np.arange(180).reshape(9, 20)
PRODUCTS = {
    "matmul": lambda: (cpu.matmul, CASE.w, CASE.x, CASE.bias),
    "matmul_t": lambda: (cpu.matmul_t, CASE.w, CASE.dy),
    "sddmm": lambda: (cpu.sddmm, CASE.w.support, CASE.dy, CASE.x),
    "matmul_t_sddmm": lambda: (cpu.matmul_t_sddmm, CASE.w, CASE.dy, CASE.x),
    "sum_rows": lambda: (cpu.sum_rows, CASE.dy),
    "embed": lambda: (cpu.embed, CASE.w, TOKENS),
    "embed_gradient": lambda: (cpu.embed_gradient, CASE.w.support, TOKENS, CASE.x),
    "softmax": lambda: (softmax, CASE.dy[:, :200], TOKENS),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    one, *others = bits(*PRODUCTS[name]())
    assert all(other == one for other in others)


@pytest.mark.parametrize("orientation", ["rows", "columns"])
def test_values_move_to_tiles_and_back(monkeypatch, orientation):
    monkeypatch.setattr(cpu.plan, "WORTH_SHARING", 1e5)
    w, tiles = CASE.w, getattr(plan(CASE.w.support), orientation).cut(3)
    source = tiles.source if tiles.place is None else np.argsort(tiles.place)
    for count in COUNTS:
        threads.set_count(count)
        assert cpu.products.even_chunks(w.nnz).size == count + 1
        poison_pool()
        moved = cpu.products.in_tiles(w.values, tiles)
        assert np.array_equal(moved, w.values[source])
        assert np.array_equal(cpu.products.from_tiles(moved, tiles), w.values)


@pytest.mark.parametrize("batch", [128, 32])
def test_both_backward_products_of_one_panel(batch):
    """They go over the columns, whose values and gradients lie scattered over the pattern."""
    case = Case(300, 330, 0.3, lead=(), batch=batch, dtype=np.float32)
    assert not cpu.products._better_scattered(plan(case.w.support).columns, 4 * batch)
    one, *others = bits(cpu.matmul_t_sddmm, case.w, case.dy, case.x)
    assert all(other == one for other in others)


def test_the_products_above_are_cut_into_different_chunks():
    """Otherwise the test would say nothing."""
    cuts = set()
    for count in COUNTS:
        threads.set_count(count)
        chunks = chunk_count(2.0 * CASE.w.nnz * 180)
        cuts.add(tuple(plan(CASE.w.support).rows.chunks(chunks)))
    assert len(cuts) == len(COUNTS)


def test_lstm():
    case = LSTMCase(130, 60, 5, 20, density=0.5, scale=0.1, dtype=np.float32)
    w_ih, w_hh, *rest = case.forward_arguments
    assert 2 * w_hh.nnz * 20 > 1e6  # worth a second thread

    def window():
        *forward, trace = cpu.lstm_forward(w_ih, w_hh, *rest)
        return *forward, *cpu.lstm_backward(w_ih, w_hh, trace, *case.arriving, True)

    one, *others = bits(window)
    assert len(one) == 3 + 8
    assert all(other == one for other in others)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_products_over_several_blocks(transposed):
    case = Case(150, 1100, 0.0, lead=(), batch=1000, dtype=np.float32)
    a, b = case.numbers("a", 150, 1100), case.x
    if transposed:
        a = np.ascontiguousarray(a.T).T
    assert max(64, dense._BLOCK_FLOPS // (2 * 1100 * 1000)) < 150
    one, *others = bits(dense.gemm, a, b)
    assert all(other == one for other in others)


def test_setting_the_number_of_threads():
    threads.set_count(2)
    assert threads.get() == 2
    threads.set_count(0)
    assert threads.get() == threads.available() >= 1
    with pytest.raises(ValueError, match="the number of threads is -1; give 1 or more, or 0 for all"):
        threads.set_count(-1)
    assert threads.get() == threads.available()


@pytest.mark.parametrize("count", COUNTS)
def test_sharing_calls_each_item_once_and_passes_errors_on(count):
    threads.set_count(count)
    seen: list[int] = []
    threads.share(seen.append, range(20))
    assert sorted(seen) == list(range(20))

    def fails(item: int) -> None:
        if item == 3:
            raise KeyError(item)

    with pytest.raises(KeyError):
        threads.share(fails, range(5))


def test_blas_is_held_and_let_go():
    def counts():
        return [library["num_threads"] for library in threads._blas().info()]

    before = counts()
    with threads.one_blas_thread(), threads.one_blas_thread():
        assert set(counts()) <= {1}
    assert counts() == before
    with pytest.raises(KeyError), threads.one_blas_thread():
        raise KeyError
    assert counts() == before


def test_the_tier_runs_with_more_threads_than_there_are():
    threads.set_count(64)
    assert np.isfinite(kernels.matmul(CASE.w, CASE.x)).all()
