"""The record of a run: one JSON object on each line, only ever appended to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from refimpl.training.atomic import failure


class MetricsWriter:
    """Appends records to a JSON-lines file.

    A checkpoint remembers `length`; a resumed run truncates the file to it, so that what was recorded after
    the checkpoint is recorded again and nothing stands twice. A last line that a killed run left incomplete
    is cut off when the file is opened.

    Parameters
    ----------
    path : path-like
        The file; created if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Unbuffered: a record is one write, and is in the hands of the system when `append` returns.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        size = os.fstat(self._file.fileno()).st_size
        self._length = _end_of_last_line(self.path, size)
        if self._length < size:
            self._file.truncate(self._length)

    @property
    def length(self) -> int:
        """Bytes of all records so far."""
        return self._length

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record. Numbers that are not finite become ``null``, which every reader knows.

        Raises
        ------
        OSError
            If it cannot be written, such as on a full disk; the file then ends with the record before.
        """
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._length)
            what = f"could not append to {str(self.path)!r}"
            raise failure(error, what, "the records before are kept") from error
        self._length += len(line)

    def sync(self) -> None:
        """Wait until all records are on the disk. Call it before a checkpoint that remembers `length`."""
        os.fsync(self._file.fileno())

    def truncate(self, to: int) -> None:
        """Drop all records after the first ``to`` bytes.

        Raises
        ------
        ValueError
            If the file is shorter than that, or a record would be cut in two.
        """
        if to > self._length:
            raise ValueError(
                f"{str(self.path)!r} has {self._length} bytes and its checkpoint remembers {to}; records are "
                f"missing, so bring the file back or resume from an older checkpoint"
            )
        if to < 0 or _end_of_last_line(self.path, to) != to:
            raise ValueError(f"{str(self.path)!r} has no record that ends at byte {to}; give another one")
        self._file.truncate(to)
        self._length = to

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all records of a file, also while a run appends to it: an incomplete last line is not there yet.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a complete line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no metrics {str(path)!r}; give the metrics.jsonl of a run")
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {str(path)!r} is not a JSON object; correct or remove it")
        records.append(record)
    return records


def _end_of_last_line(path: Path, size: int) -> int:
    """Return the length of the complete lines within the first ``size`` bytes."""
    with open(path, "rb") as file:
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
