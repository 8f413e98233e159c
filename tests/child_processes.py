"""Running Python code in processes of its own: what is decided when Python starts can be tested in no other way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLEARED = ("OPENBLAS_CORETYPE", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_THREADING_LAYER", "NUMBA_NUM_THREADS")


def environment(cache: Path | None = None, **settings: str) -> dict[str, str]:
    """Return this process's environment without what steers Numba, and with ``settings``."""
    inherited = {name: value for name, value in os.environ.items() if name not in CLEARED}
    inherited |= {"REFIMPL_KERNELS": "cpu", "PYTHONUNBUFFERED": "1"}
    return inherited | ({} if cache is None else {"REFIMPL_CACHE": str(cache)}) | settings


def start(code: str, cache: Path | None = None, **settings: str) -> subprocess.Popen[str]:
    """Start a process."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(cache, **settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a process wrote to stdout and stderr; it must have succeeded."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, errors


def run(code: str, cache: Path | None = None, **settings: str) -> tuple[str, str]:
    """Run a process to its end."""
    return finish(start(code, cache, **settings))
