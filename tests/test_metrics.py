"""The record of a run: whole lines only, cut back to any length that it had."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.training.metrics import MetricsWriter, read_metrics

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
ENTRIES = st.integers() | st.text(max_size=4)
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), ENTRIES, max_size=3), max_size=6)


@SHARED_FOLDER
@given(records=RECORDS, torn=st.binary(max_size=20).filter(lambda b: b"\n" not in b), data=st.data())
def test_metrics_can_be_cut_back_to_any_length_they_had(
    tmp_path: Path, records: list[dict[str, Any]], torn: bytes, data: st.DataObject
) -> None:
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    with MetricsWriter(path) as writer:
        lengths = [writer.length]
        for record in records:
            writer.append(record)
            lengths.append(writer.length)
    assert lengths[-1] == path.stat().st_size
    with open(path, "ab") as file:
        file.write(torn)
    assert read_metrics(path) == records
    kept = data.draw(st.integers(0, len(records)))
    with MetricsWriter(path) as writer:
        assert writer.length == lengths[-1]
        writer.truncate(lengths[kept])
        assert writer.length == lengths[kept]
        writer.append({"next": 1})
    assert read_metrics(path) == [*records[:kept], {"next": 1}]


def test_metrics_refuse_a_length_that_they_never_had(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.append({"step": 1})
        before = writer.path.read_bytes()
        with pytest.raises(ValueError, match="records are missing"):
            writer.truncate(writer.length + 1)
        for inside in (-1, 1, writer.length - 1):
            with pytest.raises(ValueError, match="no record that ends at byte"):
                writer.truncate(inside)
    assert writer.path.read_bytes() == before


def test_metrics_are_standard_json_and_lines_stay_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        text = "a\nb\u2028c\x85"
        writer.append({"loss": float("nan"), "x": [np.float32(0.5), float("-inf")], "text": text})
        writer.append({"n": np.int64(3), "a": np.arange(2), "deep": {"v": np.inf}})
        writer.sync()
    lines = path.read_text("utf-8").split("\n")
    assert len(lines) == 3
    assert "NaN" not in lines[0]
    assert read_metrics(path) == [
        {"loss": None, "x": [0.5, None], "text": "a\nb\u2028c\x85"},
        {"n": 3, "a": [0, 1], "deep": {"v": None}},
    ]


def test_long_torn_lines_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    with MetricsWriter(path) as writer:
        assert writer.length == 9
    assert path.read_bytes() == b'{"a": 1}\n'


def test_bad_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no metrics"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is not a JSON object"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    class Full:
        """A file that takes five bytes of a line and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 5

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left = 0
            return int(self.file.write(data[:5]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.append({"step": 1})
        whole = writer._file
        writer._file = Full(whole)  # type: ignore[assignment]
        with pytest.raises(OSError, match=r"^could not append to .*No space left"):
            writer.append({"step": 2})
        writer._file = whole
        writer.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
