"""Measuring in child processes: what a library reads only when it is loaded must be said before.

The C library reads its allocator's settings when a process starts; OpenBLAS chooses its kernels, and OpenMP and Numba
their largest number of threads, when they are loaded. So each table has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_task import Record, Task

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
"""Keeps glibc from giving large blocks back: torch then finds its activations' pages again at the next step."""

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "REFIMPL_THREADS")


class ChildError(RuntimeError):
    """A process that measured did not end well; it has said why."""


def fastest_blas() -> str | None:
    """Return the name of OpenBLAS's fastest kernels for this machine, where it is known for sure."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return None
    return "SkylakeX" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags) else None


def environment(threads: int, allocator: str = "default") -> dict[str, str]:
    """Return the environment of a process that measures."""
    out = {name: value for name, value in os.environ.items() if name not in TUNED}
    out |= dict.fromkeys(_THREADS, str(threads))
    kernels = fastest_blas()
    if kernels:
        out["OPENBLAS_CORETYPE"] = kernels
    if "MKL_RT" not in out:  # where pip puts it, and sparse_dot_mkl does not look
        found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
        out |= {"MKL_RT": str(found[0])} if found else {}
    return out | TUNED if allocator == "tuned" else out


def run(task: Task) -> list[Record]:
    """Measure a task in a process of its own, which prints its table, and return its records.

    Raises
    ------
    ChildError
        If the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        task.save(folder / "task.json")
        command = [sys.executable, str(Path(__file__).with_name("bench_child.py")), name]
        sys.stdout.flush()
        status = subprocess.run(command, env=environment(task.threads, task.allocator), check=False).returncode
        records = folder / "records.json"
        if status or not records.is_file():
            raise ChildError(f"the process that measured {task.case} ended with status {status}; see above")
        return list(_loads(records))


def _loads(path: Path) -> list[Record]:
    import json

    return json.loads(path.read_text("utf-8"))
