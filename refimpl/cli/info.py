"""``refimpl info``: what a run depends on besides its recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from refimpl.extras import EXTRAS, available


def info(arguments: argparse.Namespace) -> int:
    """Print facts about this installation and machine."""
    rows = [*_versions(), *_kernels(), *_extras()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    from refimpl.training.environment import environment

    facts = environment()
    yield "refimpl", facts["refimpl"]
    yield "python", facts["python"]
    yield "platform", f"{facts['platform']} ({facts['machine']})"
    yield from ((name, version or "not installed") for name, version in facts["libraries"].items())


def _kernels() -> Iterator[tuple[str, str]]:
    import numpy as np

    from refimpl import kernels
    from refimpl.kernels import threads
    from refimpl.processor import blas_hint
    from refimpl.training.environment import blas

    name = kernels.tier().__name__.rpartition(".")[2]
    yield "processors", f"{threads.available()} that this process may use"
    yield "threads", f"{threads.get()} (--threads, or REFIMPL_THREADS)"
    for library in blas():
        yield "BLAS", f"{library['name']} {library['version'] or ''}, kernel {library['kernel'] or 'unknown'}"
        hint = blas_hint(library["kernel"])
        if hint is not None:
            yield "BLAS hint", hint
    yield "kernels", f"{name} (of {', '.join(kernels.TIERS)}; REFIMPL_KERNELS chooses)"
    if name == "cpu":
        import numba

        kernels.sum_rows(np.ones((1, 4, 16), np.float32))  # the layer is chosen when first needed
        try:
            yield "threading layer", numba.threading_layer()
        except ValueError:  # nothing ran in parallel
            yield "threading layer", "not started"
        from refimpl.kernels.cpu import cache

        yield "compiled kernels", f"{cache.folder()}, {cache.size() / 2**20:.1f} MiB (REFIMPL_CACHE moves it)"


def _extras() -> Iterator[tuple[str, str]]:
    for extra, (package, purpose) in EXTRAS.items():
        there = f"{package} is there" if available(extra) else f"{package} is not there; pip install 'refimpl[{extra}]'"
        yield f"extra {extra}", f"{there}: {purpose}"
