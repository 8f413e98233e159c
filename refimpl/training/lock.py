"""A lock on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

_log = logging.getLogger(__name__)

LOCK_NAME = ".lock"


class FolderLock:
    """Exclusive right to write into a folder.

    The system keeps the lock (``flock``; a locked byte on Windows), not the file, so nothing has to be
    cleaned up after a crash or a kill, and the file stays where it is.

    Parameters
    ----------
    folder : Path
        An existing folder.

    Raises
    ------
    ValueError
        If another process holds the lock, or this one does already.
    OSError
        If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._descriptor)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                self.release()
                raise ValueError(
                    f"a run is writing into {str(folder)!r}; wait until it ends, or choose another folder"
                ) from None
            _log.warning("the file system of %r has no locks (%s): run one process in it", str(folder), error)

    def release(self) -> None:
        """Give the right back; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
