"""A run that is stopped or killed at any moment goes on to the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import TINY, command, environment, last_checkpoint, refimpl, write_text

from refimpl.training import checkpoint
from refimpl.training.metrics import read_metrics

SETTINGS = (
    *TINY, "epochs=5", "batch_size=2", "checkpoint_every=3", "dtype=float64", "dropout_hidden=0.3", "weight_drop=0.2",
    "nonmono=0", "lr=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("runs")
    write_text(path / "text", words=300)
    finished = refimpl(*train("straight"), cwd=path)
    assert finished.returncode == 0, finished.stderr
    return path


def train(out: str, *settings: str) -> list[str]:
    return ["train", "--data", "text", "--out", out, "--set", *SETTINGS, *settings]


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("newest", "best"):
        a, b = (
            last_checkpoint(run) if name == "newest" else checkpoint.load(run / "checkpoints/best.npz")[0]
            for run in (first, second)
        )
        assert a.keys() == b.keys()
        assert all(x.dtype == b[key].dtype and np.array_equal(x, b[key]) for key, x in a.items())
    # The records too, but for the seconds.
    c, d = (
        [{key: v for key, v in r.items() if key not in ("seconds", "tokens_per_second")} for r in read_metrics(path)]
        for path in (first / "metrics.jsonl", second / "metrics.jsonl")
    )
    assert c == d


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(folder: Path, number: signal.Signals) -> None:
    run = folder / number.name
    # Without checkpoints between epochs, what is there afterwards was saved because of the signal.
    process = begin(folder, *train(run.name, "checkpoint_every=0"))
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"to go on: refimpl train --resume {run.name}" in out
    assert "Traceback" not in err
    stopped = int(out.partition("stopped at step ")[2].split(" ")[0])
    assert (run / f"checkpoints/step-{stopped:08d}.npz").is_file()
    again = refimpl("train", "--resume", run.name, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"going on after step {stopped}" in again.stdout
    assert_equal_runs(folder / "straight", run)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(folder: Path) -> None:
    moments = random.Random(20210618)
    run, kills, killed = folder / "killed", 4, 0
    for attempt in range(kills + 1):
        arguments = ["train", "--resume", run.name] if (run / "config.json").exists() else train(run.name)
        process = begin(folder, *arguments)
        if attempt < kills:
            before = {p.name for p in (run / "checkpoints").glob("*")}
            wait_for(lambda: {p.name for p in (run / "checkpoints").glob("*")} != before, process)  # noqa: B023
            time.sleep(moments.uniform(0, 0.15))
            process.kill()
        out, err = process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, (out, err)
    assert killed >= 2
    assert_equal_runs(folder / "straight", run)


def test_ctrl_c_before_the_first_step_leaves_quietly(folder: Path) -> None:
    process = begin(folder, "train", "--out", "early")  # the default corpus takes a second to read
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert process.returncode == -signal.SIGINT or "Traceback" not in err
    assert not (folder / "early").exists()
