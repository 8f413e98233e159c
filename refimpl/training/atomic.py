"""Files that are there in full or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
"""How a name ends while its file is being written; what a killed process left behind can be deleted."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside it, and rename it when all of it is on the disk.

    Readers see the old file or the new one, and so does whoever comes after a kill or a power failure: the
    data are synchronised before the rename, and the folder after it.

    Raises
    ------
    OSError
        If the file cannot be written, such as on a full disk. One sentence; the temporary file is gone and an
        older file of that name untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise failure(error, f"could not write {str(path)!r}", "what was there is untouched") from error
        raise
    sync_folder(path.parent)


def failure(error: OSError, what: str, state: str) -> OSError:
    """Return the error as one sentence, with its ``errno``."""
    reason = error.strerror or str(error)
    sentence = OSError(f"{what} ({reason}); {state}; make room or choose another place, then try again")
    sentence.errno = error.errno
    return sentence


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power failure, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
