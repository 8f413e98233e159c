"""What a run depends on besides its configuration: the machine, the versions, the BLAS kernel."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import threadpoolctl

from refimpl import __version__

LIBRARIES = ("numpy", "scipy", "numba", "llvmlite", "threadpoolctl")


def environment() -> dict[str, Any]:
    """Return a description of this process that JSON can hold.

    Returns
    -------
    dict
        ``refimpl`` and ``python`` (versions), ``libraries`` (name to version, or ``None``), ``platform``,
        ``machine``, ``cpus`` (logical ones that this process may use), and ``blas``: one entry for each
        library that is loaded, with ``name``, ``version``, ``kernel`` (the processor that it believes to run
        on) and ``threads``.
    """
    return {
        "refimpl": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": _cpus(),
        "blas": blas(),
    }


def blas() -> list[dict[str, Any]]:
    """Return name, version, kernel and threads of each BLAS library that this process has loaded."""
    found = (info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas")
    return [
        {
            "name": info["internal_api"],
            "version": info.get("version"),
            "kernel": info.get("architecture"),
            "threads": info["num_threads"],
        }
        for info in found
    ]


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
