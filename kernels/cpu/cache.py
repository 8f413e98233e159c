"""Where compiled kernels are kept between processes.

Numba looks for changes in the file of a compiled function, but not in what that file imports: a kernel would go on
running with row kernels of an older version. So the folder is named by a digest of all sources of this package. It lies
outside the installed package, which may be read-only, and may be shared: Numba writes a kernel under another name and
renames it, and keeps an index for each processor type.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba.core import config as numba_config

SETTING = "REFIMPL_CACHE"


@lru_cache(maxsize=1)
def folder() -> Path:
    """Return the folder of this version's compiled kernels.

    It lies under ``REFIMPL_CACHE``, else in the user's cache folder, else in a temporary one.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()[:12]}"
    candidates = [base / name for base in _bases()]
    for candidate in candidates:
        try:
            candidate.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(candidate, os.W_OK):
            return candidate
    return Path(tempfile.mkdtemp(prefix=name))


def _bases() -> Iterator[Path]:
    if os.environ.get(SETTING):
        yield Path(os.environ[SETTING])
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "refimpl"
    elif sys.platform == "darwin":
        yield Path.home() / "Library" / "Caches" / "refimpl"
    else:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refimpl"
    yield Path(tempfile.gettempdir()) / f"refimpl-{os.environ.get('USER', 'user')}"


def size() -> int:
    """Return the bytes that this version's compiled kernels take."""
    return sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())


@contextmanager
def in_use() -> Iterator[None]:
    """Let functions that are decorated inside keep their compiled code in :func:`folder`."""
    config: Any = numba_config  # its attributes are made at run time
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder())
    try:
        yield
    finally:
        config.CACHE_DIR = before
