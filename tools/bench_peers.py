"""The packages that a benchmark compares with: which of them there are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Mapping

INSTALL = {
    "torch": "pip install 'refimpl[crosscheck]'",
    "sparse_dot_mkl": "pip install sparse-dot-mkl mkl",
    "sparseprop": "pip install --no-build-isolation sparseprop, after setuptools and pybind11",
}
"""How to install each of them. (NumPy and SciPy are there anyway.)"""

_PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, type(error).__name__, *str(error).split())
"""


def find(names: Iterable[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the packages that can be imported, and for each of the others the reason and what to do.

    Imports are tried in a process of their own, since a package may be there and yet not fit this machine.
    """
    missing = {name: f"is not installed ({INSTALL[name]})" for name in names if not _is_there(name)}
    there = [name for name in names if name not in missing]
    if there:
        command = [sys.executable, "-c", _PROBE, *there]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
        for line in out.splitlines():
            name, _, reason = line.partition(" ")
            if name in there:
                missing[name] = f"cannot be imported ({reason})"
    return [name for name in there if name not in missing], missing


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
