"""``refimpl train``: what it shows, where it writes, and its report."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import TINY, command, environment, last_checkpoint, write_text

import refimpl as package
from refimpl.cli import main
from refimpl.training.config import load_recipe, override
from refimpl.training.metrics import read_metrics
from refimpl.training.report import report, step_seconds
from refimpl.training.start import free_folder, resume, start
from refimpl.weights import SparseWeight, values_of


@pytest.fixture(autouse=True)
def _with_a_text(own_folder: Path) -> None:
    write_text(own_folder / "text")


def config(*settings: str) -> Any:
    return override(load_recipe("selfish-lstm"), [*TINY, "data.corpus=text", *settings])


def test_a_run_says_what_it_does_and_ends_with_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "text", "--set", *TINY, "--seed", "5", "--dtype", "float64"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "text: text, 440 + 110 + 110 tokens (train, valid, test), 21 distinct words" in out
    assert re.search(r"sha256 [0-9a-f]{64}", out)
    assert "float64, seed 5" in out
    assert "run: runs/selfish-lstm-1" in out
    epochs = re.findall(r"^epoch (\d) of 2: train loss [\d.]+, .* validation perplexity [\d.]+,", out, re.M)
    assert epochs == ["1", "2"]
    assert re.search(r"validation perplexity [\d.]+, test perplexity [\d.]+ \(best checkpoint", out)
    assert re.search(r"rnn.weight_hh_l1 +32 x 8 +128 +0.5000( +0\.\d{3}){4}", out)
    assert "training   0.500 executed, 0.500 as published" in out
    assert re.search(r"sparse [\d.]+ ms, dense [\d.]+ ms, ratio [\d.]+", out)
    assert [r["kind"] for r in read_metrics("runs/selfish-lstm-1/metrics.jsonl")].count("epoch") == 2


def test_the_default_folder_is_the_first_that_is_free(tmp_path: Path) -> None:
    assert free_folder("selfish-lstm") == Path("runs/selfish-lstm-1")
    (tmp_path / "runs/selfish-lstm-1").mkdir(parents=True)
    (tmp_path / "runs/selfish-lstm-3").mkdir()
    assert free_folder("selfish-lstm") == Path("runs/selfish-lstm-2")
    assert free_folder("mine/own.toml") == Path("runs/own-1")


def test_a_folder_that_another_process_takes_is_left_to_it() -> None:
    names = iter([Path("theirs"), Path("ours")])
    start(config("max_steps=1"), "theirs").close()
    run = start(config("max_steps=1"), lambda: next(names))
    assert run.folder is not None
    assert run.folder.path == Path("ours")
    run.close()


def test_a_finished_run_that_is_resumed_says_so_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    start(config("max_steps=3"), "run").close()
    run = resume("run")
    run.train()
    run.close()
    before = last_checkpoint(Path("run"))
    assert main(["train", "--resume", "run"]) == 0
    out, _ = capsys.readouterr()
    assert "run has finished: 3 steps" in out
    assert "test perplexity" in out
    assert last_checkpoint(Path("run")).keys() == before.keys()


def test_a_run_on_a_terminal_draws_one_bar() -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 160))
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # what Linux says when the other end is closed
                return
            if not piece:
                return
            shown.append(piece)

    arguments = command("train", "--data", "text", "--out", "run", "--set", *TINY)
    thread = threading.Thread(target=read)
    thread.start()
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=writer, text=True) as process:
        os.close(writer)
        out, _ = process.communicate(timeout=120)
    thread.join(timeout=10)
    os.close(reader)
    bar = b"".join(shown).decode()
    assert process.returncode == 0
    assert "epoch 1/2" in bar
    assert re.search(r"\d+/44 steps, .* left, loss [\d.]+, perplexity [\d.]+, [\d,]+ tokens/s", bar), bar[-300:]
    assert "epoch 2 of 2: train loss" in out


# --- report -------------------------------------------------------------------------------------------------


def test_the_report_counts_what_the_definitions_say() -> None:
    run = package.Run(config("max_steps=25", "layers=1"))
    run.train()
    found = report(run, repeats=1)
    rows, batch = 440 // 4, 4
    # 22 windows an epoch: 21 of five time steps and one of four.
    assert run.steps_per_epoch == 22
    assert found.samples == ((rows - 1) + 3 * 5) * batch
    assert found.flops_training == pytest.approx(0.5, rel=0.01)  # counts are rounded
    assert found.flops_published == found.flops_inference
    assert set(found.tensors) == {"encoder.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "decoder.weight"}
    for name, t in found.tensors.items():
        params = run.trainer.evaluated()[name]
        assert isinstance(params, SparseWeight)
        mask = params.support.mask()
        assert (t.nnz, t.size, t.sparsity) == (mask.sum(), mask.size, 1 - mask.mean())
        assert t.gates == {gate: mask[8 * k : 8 * k + 8].mean() for k, gate in enumerate("ifgo") if "rnn" in name}
    assert set(found.step_seconds) == {"sparse", "dense"}
    assert found.to_dict()["scores"]["test"]["perplexity"] == found.scores.test["perplexity"]


@pytest.mark.parametrize(
    "settings",
    [
        ("method=rigl", "interval=3"),
        ("method=topkast", "refresh=2", "backward_sparsity=0.2", "optimizer=nt-asgd"),
        ("method=dense", "optimizer=adam", "lr=0.01"),
        ("optimizer=nt-asgd", "leak=true", "nonmono=0", "epochs=4", "lr=30"),
        ("tied=true",),
    ],
)
def test_measuring_leaves_the_run_as_it_is(settings: tuple[str, ...]) -> None:
    run = package.Run(config("max_steps=7", *settings))
    run.train()
    before = {name: values_of(w).copy() for name, w in run.state.params.items()}
    slots = {name: {key: a.copy() for key, a in of.items()} for name, of in run.state.slots.items()}
    kinds = step_seconds(run, repeats=1)
    assert set(kinds) == ({"dense"} if "method=dense" in settings else {"sparse", "dense"})
    assert run.state.step == 7
    for name, w in run.state.params.items():
        assert np.array_equal(values_of(w), before[name])
        assert all(np.array_equal(a, slots[name][key]) for key, a in run.state.slots[name].items())


def test_tokens_are_counted_by_windows() -> None:
    run = package.Run(config("epochs=3"))
    counted = 0
    for step in range(run.total_steps):
        run.state.step = step
        assert run.task.samples(step) == counted
        counted += run.batches[step % run.steps_per_epoch][0].size


# --- Python -------------------------------------------------------------------------------------------------


def test_the_package_exports_what_it_lists_and_imports_it_late() -> None:
    code = "import sys, refimpl; assert not {'numpy', 'numba'} & set(sys.modules); print(refimpl.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = package.trian
