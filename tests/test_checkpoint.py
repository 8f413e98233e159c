"""Checkpoints: exact round trips, and files that are damaged, foreign, or could not be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.training import atomic, checkpoint
from refimpl.weights.sparse import SparseWeight, support_of, values_of
from refimpl.weights.support import Support

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
NAMES = st.text("abcdefgh_.0123456789é ", min_size=1, max_size=10).filter(str.strip)
TYPES = st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint16, np.uint32, np.bool_])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = TYPES.flatmap(lambda kind: hnp.arrays(kind, SHAPES))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@SHARED_FOLDER
@given(
    arrays=st.dictionaries(NAMES.filter(lambda name: name != "meta"), ARRAYS, max_size=4),
    meta=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
)
def test_round_trip(tmp_path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    path = tmp_path / "c.npz"
    checkpoint.save(path, arrays, meta)
    loaded, loaded_meta = checkpoint.load(path)
    assert loaded_meta == meta
    assert loaded.keys() == arrays.keys()
    assert all(same_bits(loaded[name], arrays[name]) for name in arrays)
    assert os.listdir(tmp_path) == ["c.npz"]


def test_not_a_number_survives_in_arrays_and_meta(tmp_path: Path) -> None:
    odd = np.array([np.nan, -np.nan, -0.0, np.inf, 5e-324])
    given_meta = {"losses": [float("nan"), float("inf"), np.float64(0.1)], "count": np.int64(3)}
    checkpoint.save(tmp_path / "c.npz", {"x/y": odd}, given_meta)
    arrays, meta = checkpoint.load(tmp_path / "c.npz")
    assert same_bits(arrays["x/y"], odd)
    assert np.isnan(meta["losses"][0])
    assert meta["losses"][1:] == [float("inf"), 0.1]
    assert meta["count"] == 3


def test_the_same_state_gives_the_same_bytes_and_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {"w/values": np.arange(6.0).reshape(2, 3), "file": np.zeros(2)}
    for name in ("a.npz", "b.npz"):
        checkpoint.save(tmp_path / name, arrays, {"step": 3})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["w/values"], arrays["w/values"])


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    params: dict[str, Any] = {}
    slots: dict[str, dict[str, np.ndarray]] = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        shape = draw(hnp.array_shapes(max_dims=3, max_side=5))
        kind = draw(st.sampled_from([np.float32, np.float64]))
        mask = draw(st.none() | hnp.arrays(bool, shape))
        if mask is None:
            params[name] = draw(hnp.arrays(kind, shape))
            aligned: tuple[int, ...] = shape
        else:
            support = Support.from_mask(mask)
            aligned = (support.nnz,)
            params[name] = SparseWeight(support, draw(hnp.arrays(kind, aligned)))
        slots[name] = {}
        for slot in draw(st.lists(st.sampled_from(["age", "average", "momentum"]), unique=True)):
            slot_kind, slot_shape = st.sampled_from([kind, np.int32]), st.sampled_from([aligned, shape])
            slots[name][slot] = draw(hnp.arrays(draw(slot_kind), draw(slot_shape)))
    return params, slots


@SHARED_FOLDER
@given(state=states())
def test_parameters_and_slots_survive_bit_for_bit(tmp_path: Path, state: Any) -> None:
    params, slots = state
    carried = {"carried/h": np.ones((2, 3)), "values": np.zeros(1)}
    checkpoint.save(tmp_path / "c.npz", checkpoint.pack_params(params, slots) | carried, {})
    arrays, _ = checkpoint.load(tmp_path / "c.npz")
    loaded, loaded_slots = checkpoint.unpack_params(arrays)
    assert list(loaded) == list(params)
    for name, weight in params.items():
        again = loaded[name]
        assert type(again) is type(weight)
        assert support_of(again) == support_of(weight)
        assert same_bits(values_of(again), values_of(weight))
    assert loaded_slots.keys() == slots.keys()
    for name, of_one in slots.items():
        assert loaded_slots[name].keys() == of_one.keys()
        assert all(same_bits(loaded_slots[name][slot], of_one[slot]) for slot in of_one)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(1 << 16, np.uint16), ((1 << 16) + 2, np.uint32), (1 << 32, np.uint32), (1 << 33, np.int64)],
)
def test_positions_are_narrow_and_never_wrap(size: int, kind: type) -> None:
    weight = SparseWeight(Support((2, size // 2), [0, size - 1]), np.ones(2))
    arrays = checkpoint.pack_params({"w": weight}, {})
    assert arrays["w/indices"].dtype == kind
    assert arrays["w/indices"].tolist() == [0, size - 1]


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = SparseWeight(Support((2, 3), [1, 4]), np.ones(2))
    good = checkpoint.pack_params({"w": weight}, {"w": {"age": np.zeros(2)}})
    with pytest.raises(ValueError, match=r"'w'.*does not fit"):
        checkpoint.unpack_params(good | {"w/values": np.ones(3)})
    with pytest.raises(ValueError, match=r"'w'.*does not fit"):
        checkpoint.unpack_params(good | {"w/indices": np.array([4, 1])})
    with pytest.raises(ValueError, match=r"'w'.*does not fit"):
        checkpoint.unpack_params({key: array for key, array in good.items() if key != "w/shape"})
    with pytest.raises(ValueError, match="without '/'"):
        checkpoint.pack_params({"a/b": np.ones(2)}, {})
    with pytest.raises(ValueError, match="not among the parameters"):
        checkpoint.pack_params({"a": np.ones(2)}, {"b": {}})


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "c.npz"
    rng = np.random.default_rng(0)
    checkpoint.save(path, {"w/values": rng.normal(size=40), "b/values": np.zeros(3, np.float32)}, {"step": 7})
    return path


@SHARED_FOLDER
@given(data=st.data())
def test_truncation_is_found_at_every_offset(tmp_path: Path, example: Path, data: st.DataObject) -> None:
    whole = example.read_bytes()
    (tmp_path / "t.npz").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"^checkpoint '.*t\.npz' is .*; use an older checkpoint") as caught:
        checkpoint.load(tmp_path / "t.npz")
    assert "\n" not in str(caught.value)


@settings(SHARED_FOLDER, max_examples=300)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path, example: Path, data: st.DataObject) -> None:
    whole = bytearray(example.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "f.npz").write_bytes(whole)
    good, good_meta = checkpoint.load(example)
    try:
        arrays, meta = checkpoint.load(tmp_path / "f.npz")
    except ValueError as error:
        if "f.npz" not in str(error):
            raise
        return
    assert meta == good_meta
    assert arrays.keys() == good.keys()
    assert all(same_bits(arrays[name], good[name]) for name in good)


def test_checksums_come_first(tmp_path: Path, example: Path) -> None:
    old, new = b"(40,), }      ", b"(9999999999,), }"[:14]
    whole = example.read_bytes()
    assert whole.count(old) == 1
    (tmp_path / "huge.npz").write_bytes(whole.replace(old, new))  # a header that asks for 80 GB
    with pytest.raises(ValueError, match=r"the checksum of w/values\.npy is wrong"):
        checkpoint.load(tmp_path / "huge.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.npz")
    np.savez(tmp_path / "foreign.npz", w=np.ones(3))
    with pytest.raises(ValueError, match="no checkpoint of refimpl"):
        checkpoint.load(tmp_path / "foreign.npz")
    np.savez(tmp_path / "objects.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path / "objects.npz")
    np.savez(tmp_path / "list.npz", meta=np.array("[1, 2]"))
    with pytest.raises(ValueError, match="no checkpoint of refimpl"):
        checkpoint.load(tmp_path / "list.npz")


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", 99)
    checkpoint.save(tmp_path / "c.npz", {}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="schema 99 and this version of refimpl reads 1"):
        checkpoint.load(tmp_path / "c.npz")


def test_a_missing_array_is_noticed(tmp_path: Path, example: Path) -> None:
    with zipfile.ZipFile(example) as old, zipfile.ZipFile(tmp_path / "c.npz", "w") as new:
        for name in old.namelist():
            if name != "b/values.npy":
                new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="does not hold the arrays that it lists"):
        checkpoint.load(tmp_path / "c.npz")


@pytest.mark.parametrize(
    ("arrays", "meta", "error", "message"),
    [
        ({"meta": np.ones(1)}, {}, ValueError, "'meta'; give another name"),
        ({"": np.ones(1)}, {}, ValueError, "''; give another name"),
        ({"a\\b": np.ones(1)}, {}, ValueError, "give another name"),
        ({"a": np.array([None])}, {}, ValueError, "'a' holds Python objects"),
        ({"a": np.ones(1)}, {"x": object()}, TypeError, "meta holds a object object"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    tmp_path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "c.npz", arrays, meta)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, kind: BaseException
) -> None:
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"a": np.ones(3)}, {"step": 1})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise kind

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(type(kind)) as caught:
        checkpoint.save(path, {"a": np.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.npz"]
    if isinstance(kind, OSError):
        assert str(caught.value).startswith("could not write '")
        assert "No space left on device" in str(caught.value)
        assert getattr(caught.value, "errno", None) == errno.ENOSPC


FULL_DISK = """
import resource, sys, numpy as np
from refimpl.training import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    checkpoint.save(sys.argv[1], {"a": np.ones(int(sys.argv[2]))}, {"step": 2})
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
@pytest.mark.parametrize("count", [800, 100_000])
def test_a_disk_that_is_really_full(tmp_path: Path, count: int) -> None:
    path = tmp_path / "c.npz"
    checkpoint.save(path, {"a": np.ones(3)}, {"step": 1})
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("could not write '")
    assert len(done.stderr.strip().splitlines()) == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.npz"]
