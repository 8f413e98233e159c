"""Reference implementation of sparse neural-network training, without a deep-learning framework.

The names below are imported when they are first used, so that ``import refimpl`` is quick::

    import refimpl

    config = refimpl.override(refimpl.load_recipe("selfish-lstm"), ["sparsity=0.9", "epochs=1"])
    run = refimpl.start(config, "runs/first")
    run.train()
    print(refimpl.report(run).text())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from refimpl.datasets import Corpus, fetch, load_default_corpus, load_text_folder
    from refimpl.generate import sample
    from refimpl.kernels.threads import set_count as set_threads
    from refimpl.training.config import Config, load_recipe, override
    from refimpl.training.loop import Observer, Run
    from refimpl.training.report import evaluate, report
    from refimpl.training.run_folder import RunFolder
    from refimpl.training.start import resume, start
    from refimpl.weights import SparseWeight, Support

_HOME = {
    "Config": "refimpl.training.config",
    "Corpus": "refimpl.datasets",
    "Observer": "refimpl.training.loop",
    "Run": "refimpl.training.loop",
    "RunFolder": "refimpl.training.run_folder",
    "SparseWeight": "refimpl.weights",
    "Support": "refimpl.weights",
    "evaluate": "refimpl.training.report",
    "fetch": "refimpl.datasets",
    "load_default_corpus": "refimpl.datasets",
    "load_recipe": "refimpl.training.config",
    "load_text_folder": "refimpl.datasets",
    "override": "refimpl.training.config",
    "report": "refimpl.training.report",
    "resume": "refimpl.training.start",
    "sample": "refimpl.generate",
    "set_threads": "refimpl.kernels.threads",
    "start": "refimpl.training.start",
}

__all__ = [
    "Config",
    "Corpus",
    "Observer",
    "Run",
    "RunFolder",
    "SparseWeight",
    "Support",
    "__version__",
    "evaluate",
    "fetch",
    "load_default_corpus",
    "load_recipe",
    "load_text_folder",
    "override",
    "report",
    "resume",
    "sample",
    "set_threads",
    "start",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), "set_count" if name == "set_threads" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
