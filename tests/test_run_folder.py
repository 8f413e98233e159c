"""The folder of a run: lock, checkpoints, and what is left when a process is killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl.training import checkpoint, lock
from refimpl.training.config import Config, override
from refimpl.training.metrics import MetricsWriter, read_metrics
from refimpl.training.run_folder import RunFolder

DATA = {"name": "toy", "sha256": "ab12", "vocabulary_size": 7}
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def create(path: Path, *changes: str) -> RunFolder:
    return RunFolder.create(path, override(Config(), changes), DATA)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# creating and opening


def test_a_new_run_says_what_it_depends_on(tmp_path: Path) -> None:
    with create(tmp_path / "a" / "run", "sparsity=0.9") as run:
        assert run.config.method.sparsity == 0.9
        assert run.latest_valid() is None
    written = json.loads((tmp_path / "a" / "run" / "config.json").read_text("utf-8"))
    assert written["config"]["method"]["sparsity"] == 0.9
    assert written["data"] == DATA
    surroundings = written["environment"]
    assert surroundings["libraries"]["numpy"] == np.__version__
    assert surroundings["refimpl"]
    assert surroundings["machine"]
    assert all({"name", "kernel", "threads"} <= set(entry) for entry in surroundings["blas"])
    with RunFolder.open(tmp_path / "a" / "run") as again:
        assert again.config == run.config
        assert again.facts == run.facts


def test_a_run_goes_into_a_new_or_empty_folder_only(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    create(tmp_path / "run").close()
    before = tree(tmp_path)
    for name, message in [("full", "other files"), ("file", "is a file"), ("run", "holds a run already")]:
        with pytest.raises(ValueError, match=message) as caught:
            create(tmp_path / name)
        assert name in str(caught.value)
        assert tree(tmp_path) == before
    create(tmp_path / "empty").close()


def test_what_a_killed_start_leaves_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.77.tmp").write_text("{")
    create(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_only_runs_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        RunFolder.open(tmp_path / "none", write=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        RunFolder.open(tmp_path, write=True)
    assert not os.listdir(tmp_path)
    for text in ("", "[]", "{}", '{"config": {"method": {"sparsity": 1}}}', '{"config": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json' cannot be read"):
            RunFolder.open(tmp_path, write=True)
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_data_must_be_the_same(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        run.check_data("ab12")
        with pytest.raises(ValueError, match=r"cd34.*ab12"):
            run.check_data("cd34")


# lock

HOLD = """
import sys, time
from refimpl.training.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], write=True)
print("ready", flush=True)
time.sleep(60)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create(path).close()
    process = start(HOLD, str(path))
    try:
        with pytest.raises(ValueError, match=r"^a run is writing into '.*run'; wait") as caught:
            RunFolder.open(path, write=True)
        assert str(path) in str(caught.value)
        RunFolder.open(path).close()  # reading is not refused
    finally:
        process.kill()  # SIGKILL: the process has no chance to release anything
        process.communicate()
    RunFolder.open(path, write=True).close()


def test_the_lock_ends_with_close(tmp_path: Path) -> None:
    first = create(tmp_path / "run")
    with pytest.raises(ValueError, match="a run is writing into"):
        RunFolder.open(tmp_path / "run", write=True)
    first.close()
    first.close()
    RunFolder.open(tmp_path / "run", write=True).close()


def test_two_starts_in_one_folder(tmp_path: Path) -> None:
    held = lock.FolderLock(tmp_path)  # another process between its mkdir and its config.json
    with pytest.raises(ValueError, match="a run is writing into"):
        create(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    held.release()


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(_: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", none)
    with caplog.at_level(logging.WARNING):
        create(tmp_path / "run").close()
    assert "has no locks" in caplog.text


# checkpoints


def names(run: RunFolder) -> list[str]:
    return sorted(os.listdir(run.checkpoints_path))


@SHARED_FOLDER
@given(data=st.data())
def test_the_last_ones_and_the_best_are_kept(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, 3))
    steps = sorted(data.draw(st.sets(st.integers(1, 10**9), min_size=1, max_size=6)))
    best = data.draw(st.sampled_from(steps))
    with create(tmp_path_factory.mktemp("runs") / "run", f"keep={keep}") as run:
        for step in steps:
            if step == best:
                run.save_best(step, {"a": np.array([step])}, {"loss": 1.0})
            run.save(step, {"a": np.array([step])}, {"loss": 1.0})
        expected = [f"step-{step:08d}.npz" for step in steps[-keep:]]
        assert names(run) == sorted([*expected, *(["best.npz"] if best in steps else [])])
        latest = run.latest_valid()
        assert latest is not None
        assert (latest.meta["step"], latest.arrays["a"].tolist()) == (steps[-1], [steps[-1]])
        assert run.best().arrays["a"].tolist() == [best]


def test_the_best_is_not_changed_by_later_saves(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        run.save_best(1, {"a": np.array([1])}, {})
        run.save(1, {"a": np.array([11])}, {})
        run.save(2, {"a": np.array([2])}, {})
        assert run.best().arrays["a"].tolist() == [1]
        assert names(run) == ["best.npz", "step-00000001.npz", "step-00000002.npz"]


def test_an_unreadable_newest_checkpoint_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with create(tmp_path / "run") as run:
        for step in (10, 20):
            run.save(step, {"a": np.array([step])}, {})
        newest = run.checkpoints()[-1]
        newest.write_bytes(newest.read_bytes()[:100])
        with caplog.at_level(logging.WARNING):
            found = run.latest_valid()
        assert found is not None
        assert found.meta["step"] == 10
        assert "step-00000020.npz' is truncated or damaged" in caplog.text
        assert "older checkpoint" in caplog.text
        run.save(15, {"a": np.array([15])}, {})  # the run went on from 10
        assert names(run) == ["step-00000010.npz", "step-00000015.npz"]
        for path in run.checkpoints():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match="none of the 2 checkpoints"):
            run.latest_valid()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with create(tmp_path / "a", "sparsity=0.9", "seed=3", "threads=2") as a, create(tmp_path / "b") as b:
        b.save(1, {}, {})
        stray = a.save_best(2, {}, {})
        (b.checkpoints_path / "step-00000002.npz").write_bytes(stray.read_bytes())
        (b.checkpoints_path / "best.npz").write_bytes(stray.read_bytes())
        for read in (b.latest_valid, b.best):
            with pytest.raises(ValueError, match="belongs to another configuration") as caught:
                read()
            text = str(caught.value)
            assert "method.sparsity (0.9 there, 0.8 here)" in text
            assert "seed (3 there, 1111 here)" in text
            assert "threads" not in text
    checkpoint.save(tmp_path / "b" / "checkpoints" / "step-00000003.npz", {}, {})
    with RunFolder.open(tmp_path / "b") as b, pytest.raises(ValueError, match="no proper configuration"):
        b.latest_valid()


def test_saving_needs_the_lock_and_best_needs_an_epoch(tmp_path: Path) -> None:
    create(tmp_path / "run").close()
    with RunFolder.open(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="write=True"):
            run.save(1, {}, {})
        with pytest.raises(FileNotFoundError, match="no best checkpoint"):
            run.best()


def test_a_full_disk_keeps_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with create(tmp_path / "run") as run:
        run.save_best(1, {"a": np.ones(3)}, {})
        run.save(2, {"a": np.ones(3)}, {})
        before = tree(tmp_path)
        monkeypatch.setattr(os, "fsync", full)
        for save in (run.save, run.save_best):
            with pytest.raises(OSError, match="No space left on device"):
                save(3, {"a": np.ones(3)}, {})
            assert tree(tmp_path) == before


WRITE = """
import sys, numpy as np
from refimpl.training.metrics import MetricsWriter
from refimpl.training.run_folder import RunFolder
with RunFolder.open(sys.argv[1], write=True) as run, MetricsWriter(run.metrics_path) as metrics:
    latest = run.latest_valid()
    step = latest.meta["step"] if latest else 0
    metrics.truncate(latest.meta["metrics_length"] if latest else 0)
    print("ready", flush=True)
    while True:
        step += 1
        metrics.append({"step": step, "note": "x" * (step % 50)})
        meta = {"metrics_length": metrics.length}
        if step % 3 == 0:
            run.save_best(step, {"a": np.full(20_000, step)}, meta)
        run.save(step, {"a": np.full(20_000, step)}, meta)
        metrics.append({"after": step})
"""


def test_killed_at_any_moment_it_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create(path).close()
    rng = np.random.default_rng(5)
    reached = 0
    for _ in range(5):
        process = start(WRITE, str(path))
        time.sleep(rng.uniform(0.01, 0.15))
        process.kill()
        process.communicate()
        with RunFolder.open(path, write=True) as run:
            latest = run.latest_valid()
            step = 0 if latest is None else latest.meta["step"]
            assert step >= reached
            reached = step
            if latest is not None:
                assert (latest.arrays["a"] == step).all()
                assert latest.path == run.checkpoints()[-1]  # nothing that has its final name is damaged
            if step >= 3:
                best = run.best()
                assert best.meta["step"] % 3 == 0
                assert step - 3 < best.meta["step"] <= step + 1
            assert not list(path.rglob("*.tmp"))
            with MetricsWriter(run.metrics_path) as metrics:
                metrics.truncate(latest.meta["metrics_length"] if latest else 0)
            steps = [record["step"] for record in read_metrics(run.metrics_path) if "step" in record]
            assert steps == list(range(1, step + 1))
    assert reached > 0
