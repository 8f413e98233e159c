"""Where compiled kernels are kept between processes: one file for each compiled form of a function.

Numba's own cache (``cache=True``) would do all this but for three things. It looks for changes in the file of a
function, not in what that file imports, so a kernel would go on running with row kernels of an older version. All forms
of a function share one index file, so two processes that compile at once can note one form under the other's entry. And
a damaged file is an error at every call from then on. Here the folder is named by a digest of the sources, a file by
everything else that its code depends on; it is written under another name and renamed, and carries a checksum.

The folder lies outside the installed package, which may be read-only. Whatever goes wrong with it costs a compilation
and a warning, never a run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import stat
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

SETTING = "REFIMPL_CACHE"
SUFFIX = ".kernel"

log = logging.getLogger("refimpl.kernels")

counts: Counter[str] = Counter()
"""How many forms this process has ``"compiled"``, and how many ``"loaded"``."""

_NOTICE = {"notice": True}  # of a log record: no warning, whatever its level


def keep(function: Callable[..., Any], **options: Any) -> Any:
    """Return ``numba.njit(**options)(function)``, whose compiled code is kept for later processes."""
    dispatcher = numba.njit(**options)(function)
    dispatcher._cache = Store(function, options)  # where its own cache would be
    return dispatcher


class Store(NullCache):
    """The compiled forms of one function: what Numba's dispatcher asks before it compiles, and tells afterwards.

    Parameters
    ----------
    function : callable
    options : dict
        What it is compiled with.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self.options = repr(sorted(options.items()))
        self._begun: dict[Any, float] = {}

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(folder())

    def file(self, signature: Any, codegen: Any) -> Path:
        """Return where the form for these types and this processor is kept."""
        versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag)
        key = (self.options, str(signature), str(codegen.magic_tuple()), versions)
        return folder() / f"{self.name}-{_digest(repr(key).encode()).hex()[:20]}{SUFFIX}"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return what was kept, or None, in which case Numba compiles next.

        Numba would first make all that it can compile with known to its compiler, which takes longer than to load
        twenty kernels; they need no more than its memory management.
        """
        path = self.file(signature, target_context.codegen())
        try:
            form = _unpack(path.read_bytes())
            rtsys.initialize(target_context)
            result = CompileResult._rebuild(target_context, *form)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a damaged file can lead to
            log.warning("%s cannot be read (%s); it is compiled again", path, error)
        else:
            counts["loaded"] += 1
            return result
        _announce()
        self._begun[signature] = time.perf_counter()
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled."""
        counts["compiled"] += 1
        took = time.perf_counter() - self._begun.pop(signature, time.perf_counter())
        log.debug("compiled the kernel %s for %s in %.2f s", self.name, signature, took)
        if result.library.has_dynamic_globals:  # addresses of this process
            return
        path = self.file(signature, result.codegen)
        try:
            _write(path, _pack(result._reduce()))
        except OSError as error:
            _warn_not_kept(path.parent, error.strerror)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _pack(form: Any) -> bytes:
    data: bytes = dumps(form)
    return _digest(data) + data


def _unpack(content: bytes) -> Any:
    size = hashlib.sha256().digest_size
    if content[:size] != _digest(content[size:]):
        raise ValueError("its checksum is wrong")
    return pickle.loads(content[size:])


def _write(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted since
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


@lru_cache(maxsize=1)
def _announce() -> None:
    """Say before the first compilation what is going to take time.

    Aloud if this machine has compiled none yet: a program that has set up no logging shows warnings only.
    """
    where = folder()
    if any(where.glob(f"*{SUFFIX}")):
        log.info("compiling kernels for types or shapes that are new here; they are kept in %s", where, extra=_NOTICE)
    else:
        log.warning("compiling kernels for this machine: once, some seconds; they are kept in %s", where, extra=_NOTICE)


@lru_cache(maxsize=1)
def _warn_not_kept(where: Path, why: str | None) -> None:
    log.warning(
        "compiled kernels cannot be kept in %s (%s), so the next process compiles them again; set %s to a folder "
        "with room",
        where,
        why,
        SETTING,
    )


@lru_cache(maxsize=1)
def folder() -> Path:
    """Return the folder of this version's compiled kernels.

    It lies under ``REFIMPL_CACHE``, else in the user's cache folder, else in a temporary one.
    """
    here = Path(__file__).parent
    name = f"kernels-{version(here.parent, here)}"
    for candidate in (base / name for base in _bases()):
        try:
            candidate.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(candidate, os.W_OK):
            return candidate
    try:
        shared = Path(tempfile.gettempdir()) / f"refimpl-{_user()}"
        shared.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(shared):
            (shared / name).mkdir(exist_ok=True)
            return shared / name
        return Path(tempfile.mkdtemp(prefix=f"refimpl-{name}-"))
    except OSError:  # nothing can be written anywhere: the attempt to keep a kernel will say so
        return here / "__pycache__" / name


def version(*folders: Path) -> str:
    """Return a digest of all sources in some folders."""
    sources = [source for folder in folders for source in sorted(folder.glob("*.py"))]
    return _digest(b"".join(_digest(source.read_bytes()) for source in sources)).hex()[:12]


def _bases() -> Iterator[Path]:
    if os.environ.get(SETTING):
        yield Path(os.environ[SETTING])
    try:
        home = Path.home()
    except RuntimeError:  # a user that the system does not know
        return
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "refimpl"
    elif sys.platform == "darwin":
        yield home / "Library" / "Caches" / "refimpl"
    else:
        yield Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "refimpl"


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _is_ours(path: Path) -> bool:
    """Tell whether nobody else can write there: who can, could have this process run code of theirs."""
    if not hasattr(os, "getuid"):
        return True
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def size() -> int:
    """Return the bytes that this version's compiled kernels take."""
    return sum(path.stat().st_size for path in folder().glob(f"*{SUFFIX}"))
