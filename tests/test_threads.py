"""The same bits on any number of threads, in processes of their own; BLAS kept out of the way; the threading layer."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_processes import environment, run, start
from cli_helpers import TINY, write_text
from threadpoolctl import threadpool_limits

from refimpl import processor
from refimpl.kernels import cpu, dense, threads
from refimpl.rng import generator
from refimpl.weights import SparseWeight, Support

# --- bits

ROWS, COLUMNS, STEPS, BATCH, SIZE = 300, 330, 9, 20, 100_000


def numbers(*shape: int) -> np.ndarray:
    """Return normal numbers, the same at every call."""
    return generator(0, "numbers").standard_normal(shape).astype(np.float32)


def weight(rows: int, columns: int) -> SparseWeight:
    """Return a sparse weight."""
    support = Support.from_mask(generator(1, "mask").random((rows, columns)) < 0.3)
    return SparseWeight(support, numbers(support.nnz) * np.float32(0.1))


W, X, DY = weight(ROWS, COLUMNS), numbers(STEPS, COLUMNS, BATCH), numbers(STEPS, ROWS, BATCH)
TOKENS = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
MANY = numbers(STEPS, 1000, BATCH)
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01, "scale": 0.5}
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "eps_inside": False, "scale": 0.5}


def lstm_forward() -> Any:
    size = 130
    state = np.zeros((size, BATCH), np.float32)
    return cpu.lstm_forward(weight(4 * size, 330), weight(4 * size, size), numbers(4 * size), X, state, state)


def lstm_backward() -> Any:
    trace, size = lstm_forward()[3], 130
    arriving = numbers(STEPS, size, BATCH), numbers(size, BATCH), numbers(size, BATCH)
    return cpu.lstm_backward(weight(4 * size, 330), weight(4 * size, size), trace, *arriving, True)


def in_place(kernel: Callable[..., Any], count: int, **options: Any) -> list[np.ndarray]:
    """Return the arrays that an optimizer's step has changed."""
    arrays = [numbers(SIZE), numbers(SIZE), *(np.abs(numbers(SIZE)) for _ in range(count))]
    kernel(*arrays, **options)
    return arrays


def softmax() -> Any:
    z = DY.copy()
    return cpu.softmax_cross_entropy(z, TOKENS, 0.25), z


CALLS: dict[str, Callable[[], Any]] = {
    "adam_step": lambda: in_place(cpu.adam_step, 2, lr=0.1, step=3, **ADAM),
    "embed": lambda: cpu.embed(W, TOKENS),
    "embed_gradient": lambda: cpu.embed_gradient(W.support, TOKENS, X),
    "from_panels": lambda: cpu.from_panels(cpu.to_panels(X), X.shape),
    "lstm_backward": lstm_backward,
    "lstm_forward": lstm_forward,
    "matmul": lambda: cpu.matmul(W, X, numbers(ROWS)),
    "matmul_t": lambda: cpu.matmul_t(W, DY),
    "matmul_t_sddmm": lambda: cpu.matmul_t_sddmm(W, DY, X),
    "relu": lambda: cpu.relu(MANY),
    "relu_backward": lambda: cpu.relu_backward(cpu.to_panels(MANY[::-1]), cpu.to_panels(MANY)),
    "sddmm": lambda: cpu.sddmm(W.support, DY, X),
    "sgd_step": lambda: in_place(cpu.sgd_step, 1, first=False, **SGD),
    "softmax_cross_entropy": softmax,
    "squared_norm": lambda: cpu.squared_norm(numbers(SIZE)),
    "sum_rows": lambda: cpu.sum_rows(cpu.to_panels(MANY)),
    "to_panels": lambda: cpu.to_panels(X),
}


def arrays_of(result: Any) -> list[np.ndarray]:
    """Return all arrays and numbers in what a kernel returns, in order."""
    if result is None:
        return []
    if isinstance(result, tuple | list):
        return [array for part in result for array in arrays_of(part)]
    return [np.asarray(result)] if isinstance(result, np.ndarray | float | int) else []


def digests() -> dict[str, str]:
    """Run every kernel and return a digest of what each computes."""
    found = {}
    for name, call in CALLS.items():
        arrays = arrays_of(call())
        assert sum(array.size for array in arrays) > 0
        found[name] = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
    return found


CHILD = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_threads
from refimpl.kernels.cpu import plan, runtime
plan.WORTH_SHARING = 2e6  # these are small, and are shared all the same
found = test_threads.digests()
kernels = [k for name in list(sys.modules) if name.startswith("refimpl.kernels.cpu")
           for k in vars(sys.modules[name]).values() if isinstance(k, runtime.Kernel)]
in_parallel = {{k.name for k in kernels if k.parallel is not k.serial and k.parallel.overloads}}
print(json.dumps([found, len(in_parallel)]))
"""


def test_every_kernel_gives_the_same_bits_on_one_two_and_three_threads():
    """Numba is told to start three, however many processors there are."""
    assert set(CALLS) == set(cpu.__all__)
    one, *others = (json.loads(run(CHILD, NUMBA_NUM_THREADS="3", REFIMPL_THREADS=str(count))[0]) for count in (1, 2, 3))
    assert one[1] == 0
    for found, in_parallel in others:
        assert in_parallel > 5  # otherwise the test would say nothing
        assert found == one[0]


# --- BLAS


@pytest.fixture
def two_blas_threads():
    """Let BLAS have two threads, as it has of its own accord on a machine with two processors."""
    with threadpool_limits(2, user_api="blas"):
        if max(blas_threads()) < 2:
            pytest.skip("this BLAS has no threads")
        yield


def blas_threads() -> list[int]:
    """Return the number of threads that each BLAS would use now."""
    return [library["num_threads"] for library in threads._blas().info()] or [1]


@pytest.mark.parametrize("count", [1, 2])
def test_blas_has_one_thread_in_the_blocks_that_ours_share(monkeypatch, two_blas_threads, count):
    seen, real = [], np.matmul

    def matmul(*arguments, **options):
        seen.append(max(blas_threads()))
        return real(*arguments, **options)

    before = threads.get()
    threads.set_count(count)
    monkeypatch.setattr(np, "matmul", matmul)
    try:
        dense.gemm(numbers(300, 700), numbers(700, 1000))
    finally:
        threads.set_count(before)
    assert seen == [1, 1, 1]
    assert max(blas_threads()) == 2


def test_blas_has_one_thread_while_a_run_trains(monkeypatch, two_blas_threads, tmp_path):
    """Its threads go on spinning after a product: they would slow the kernels that follow."""
    from refimpl.training.config import load_recipe, override
    from refimpl.training.start import start as start_run

    seen = []

    def spied(real):
        def spy(*arguments):
            seen.append(max(blas_threads()))
            return real(*arguments)

        return spy

    for name in ("lstm_forward", "lstm_backward", "softmax_cross_entropy"):
        monkeypatch.setattr(cpu, name, spied(getattr(cpu, name)))
    settings = [f"data.corpus={write_text(tmp_path / 'text')}", *TINY, "epochs=1"]
    run_ = start_run(override(load_recipe("selfish-lstm"), settings), tmp_path / "run")
    try:
        run_.train()
    finally:
        run_.close()
    assert set(seen) == {1}
    assert max(blas_threads()) == 2


def test_two_threads_of_python_leave_blas_as_it_was(two_blas_threads):
    """In whatever order they come and go."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with threads.one_blas_thread():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    other = threading.Thread(target=first)
    other.start()
    first_in.wait(10)
    with threads.one_blas_thread():
        second_in.set()
        first_out.wait(10)
    other.join()
    assert max(blas_threads()) == 2
    with threads.one_blas_thread():
        assert max(blas_threads()) == 1
    assert max(blas_threads()) == 2


# --- settings


@pytest.mark.parametrize("text", ["two", "-1", "1.5"])
def test_a_count_in_the_environment_that_is_none(text):
    process = start("import refimpl.kernels", REFIMPL_THREADS=text)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"ValueError: REFIMPL_THREADS is {text!r}; give 1 or more, or 0 for all" in said.splitlines()[-1]


def test_the_command_line_says_so_in_one_line():
    command = [sys.executable, "-m", "refimpl", "info"]
    done = subprocess.run(command, env=environment(REFIMPL_THREADS="two"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: error: REFIMPL_THREADS is 'two'; give 1 or more")
    assert done.stderr.count("\n") == 1


LAYER = """
from refimpl.kernels import cpu, threads
import numba; assert numba.threading_layer() == "workqueue"
threads.set_count(1); threads.set_count(2); threads.set_count(2)
"""


@pytest.mark.parametrize("count", ["1", "2"])
def test_workqueue_is_warned_about_once(count):
    """As soon as a second thread is to be used."""
    _, said = run(LAYER, NUMBA_THREADING_LAYER="workqueue", REFIMPL_THREADS=count)
    assert said.count("no threading layer but workqueue") == 1
    assert "install GNU OpenMP (libgomp1), or pip install tbb, or run on one thread (REFIMPL_THREADS=1)" in said


def test_other_layers_and_one_thread_are_not_warned_about(monkeypatch, caplog):
    monkeypatch.setattr(threads, "_layer", "")
    monkeypatch.setattr(threads, "_warned", False)
    monkeypatch.setattr(threads, "_count", 2)
    threads.note_layer("omp")
    monkeypatch.setattr(threads, "_count", 1)
    threads.note_layer("workqueue")
    assert not caplog.records


AVX512 = frozenset({"avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
HINTS = [
    ("Haswell", AVX512, None, "OpenBLAS does not know this processor; OPENBLAS_CORETYPE=SkylakeX, set before"),
    ("Haswell", AVX512, "Haswell", "OPENBLAS_CORETYPE is Haswell; OPENBLAS_CORETYPE=SkylakeX, set before"),
    ("SkylakeX", AVX512, None, None),
    ("Haswell", frozenset({"avx2"}), None, None),
    ("Haswell", frozenset(), None, None),  # not Linux
    (None, AVX512, None, None),  # not OpenBLAS
]


@pytest.mark.parametrize(("kernel", "has", "chosen", "expected"), HINTS)
def test_whoever_runs_slow_blas_kernels_is_told(monkeypatch, kernel, has, chosen, expected):
    monkeypatch.setattr(processor, "instruction_sets", lambda: has)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if chosen:
        monkeypatch.setenv("OPENBLAS_CORETYPE", chosen)
    hint = processor.blas_hint(kernel)
    assert hint == expected if expected is None else hint.startswith(expected)
