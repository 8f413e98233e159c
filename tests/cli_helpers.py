"""What the tests of the command line share: a tiny text, tiny settings, and ways to run a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from refimpl.training import checkpoint

TINY = (
    "hidden_size=8", "embedding_size=8", "layers=2", "batch_size=4", "bptt=5", "eval_batch_size=2",
    "lr=1.0", "sparsity=0.5", "epochs=2",
)  # fmt: skip


def write_text(folder: Path, words: int = 400, seed: int = 0) -> Path:
    """Write a random text over twenty words, in which each word is likely to be followed by the next one."""
    rng = np.random.default_rng(seed)
    names = [f"w{k}" for k in range(19)] + ["<unk>"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", words), ("valid", words // 4), ("test", words // 4)):
        at = np.cumsum(np.where(rng.random(count) < 0.7, 1, rng.integers(1, 20, count))) % 20
        lines = [" ".join(names[k] for k in at[start : start + 10]) for start in range(0, count, 10)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that runs on the definition's kernels, which need not be compiled."""
    return {**os.environ, "REFIMPL_KERNELS": "spec", "PYTHONUNBUFFERED": "1", **more}


def command(*arguments: object) -> list[str]:
    """Return the words of a command line."""
    return [sys.executable, "-m", "refimpl", *map(str, arguments)]


def refimpl(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300, check=False
    )


def last_checkpoint(run: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the newest checkpoint, with its bookkeeping as one more array."""
    path = sorted((run / "checkpoints").glob("step-*.npz"))[-1]
    arrays, meta = checkpoint.load(path)
    return {**arrays, "meta": np.array(repr(sorted(meta["state"].items())))}


def tree(path: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
