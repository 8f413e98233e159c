"""Packages that are not needed for training: imported when they are used, and named when they are missing."""

from __future__ import annotations

from importlib import import_module, util
from types import ModuleType

EXTRAS: dict[str, tuple[str, str]] = {
    "plot": ("matplotlib", "figures of runs (refimpl plot)"),
    "crosscheck": ("torch", "PyTorch state dicts (refimpl export --to torch), comparisons with PyTorch"),
    "gpu": ("cupy", "kernels for NVIDIA GPUs"),
    "test": ("hypothesis", "the test suite, refimpl.testing"),
}
"""Name of each extra, the module that shows whether it is there, and what it is for."""


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Raises
    ------
    MissingExtraError
        If it cannot be imported; one sentence that says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"this needs {package}, which cannot be imported ({error}); install it with: pip install 'refimpl[{extra}]'"
        ) from error


def available(extra: str) -> bool:
    """Return whether the package of an extra can be found, without importing it."""
    try:
        return util.find_spec(EXTRAS[extra][0]) is not None
    except (ImportError, ValueError):
        return False
