"""``refimpl flops``: what it prints, what it needs, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import TINY, write_text

from refimpl.cli import FAILED, main
from refimpl.cli.flops import as_text
from refimpl.datasets import load_text_folder
from refimpl.methods import Allocation
from refimpl.methods.gmp import GMP
from refimpl.testing.quadratic import QuadraticModel
from refimpl.training import flop_account, flops
from refimpl.training.config import load_recipe, override
from refimpl.training.loop import Run
from refimpl.training.model_section import Model
from refimpl.training.simulate import Workload, planned, planned_run

RIGL = ("interval=4", "allocation=erk")


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what a command that succeeds prints."""
    assert main(["flops", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Return the same as data."""
    found: dict[str, Any] = json.loads(shown(capsys, *arguments, "--json"))
    return found


def test_what_is_printed_is_what_a_run_executes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text")
    config = override(load_recipe("ptb-lstm-small-rigl"), [*TINY, *RIGL, f"data.corpus={text}"])
    run = Run(config, load_text_folder(text))
    run.train()
    found = as_json(capsys, "ptb-lstm-small-rigl", "--set", *TINY, *RIGL, "--data", text)
    assert found["account"] == run.state.flops
    fractions = flop_account.fractions(run.state.flops, run.trainer.specs)
    assert {kind: found["training"][kind] for kind in fractions} == fractions
    assert found["inference"]["fraction"] * found["inference"]["dense"] == found["inference"]["sparse"]
    assert sum(found["epochs"]) == flops.total(run.state.flops["executed"])
    assert {name: t["forward"]["last"] for name, t in found["tensors"].items()} == run.trainer.used()
    assert sum(t["operations"] for t in found["tensors"].values()) == found["inference"]["sparse"]

    lines = shown(capsys, "ptb-lstm-small-rigl", "--set", *TINY, *RIGL, "--data", text)
    assert f"executed   {fractions['executed']:.4f}" in lines
    assert f"published  {fractions['published']:.4f}   (3 f_S dT + 2 f_S + f_D) / (dT + 1); verified" in lines
    for term in ("forward", "input_gradient", "weight_gradient", "growth", "exchange_batch", "shared_batch"):
        assert re.search(rf"^  {term} ", lines, re.M), term
    for name in found["tensors"]:
        assert re.search(rf"^{re.escape(name)} ", lines, re.M), name
    assert max(map(len, lines.splitlines())) <= 120


def test_without_the_text_its_sizes_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text")
    corpus = load_text_folder(text)
    sizes = ("--vocabulary", corpus.vocabulary_size, "--tokens", corpus.train.size)
    by_size = as_json(capsys, "ptb-lstm-small-set", "--set", *TINY, *sizes)
    assert by_size == as_json(capsys, "ptb-lstm-small-set", "--set", *TINY, "--data", text)
    assert not by_size["notes"]
    assumed = shown(capsys, "ptb-lstm-small-set", "--set", *TINY, "--vocabulary", 20)
    assert "note: the training text is taken to have 1,000,000 tokens" in assumed


def test_dense_training_is_the_measure(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "ptb-lstm-small-dense", "--set", *TINY, "--vocabulary", 20, "--tokens", 400)
    assert found["training"]["executed"] == found["training"]["published"] == found["inference"]["fraction"] == 1
    assert found["account"]["differences"] == {}


def test_gmp_is_shown_in_both_published_forms_and_by_epoch() -> None:
    model: Any = QuadraticModel()
    method = GMP(Allocation(0.2), begin_step=10, end_step=100, interval=5)
    found = planned(model, method, Workload((1,) * 6, 120))
    lines = as_text("mine", load_recipe("selfish-lstm"), found)
    dense, sparse = (next(line for line in lines if form in line) for form in ("mean s) + f_D", "mean(1 - s_t)"))
    f_d, samples = found.dense, 120
    mean = sum(epoch["published"]["forward"] for epoch in found.epochs) / samples  # of f_S(t)
    assert f" {(2 * mean + f_d) / (3 * f_d):.4f} " in dense
    assert f" {mean / f_d:.4f} " in sparse
    by_epoch = next(line for line in lines if line.startswith("  by epoch")).split()[2:]
    assert by_epoch[0] == "1.000"
    assert by_epoch[-2] == "..."
    assert len(by_epoch) == 13


def test_a_vocabulary_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="task is 'classification', which has none; give the data"):
        planned_run(replace(load_recipe("selfish-lstm"), **IMAGES), vocabulary=10)


IMAGES: dict[str, Any] = {"task": "classification", "model": Model(name="mlp")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ptb-lstm-rigl"], "no folder 'data/ptb'.*fetch ptb.*--vocabulary N says how many words"),
        (["ptb-lstm-rigl", "--tokens", "10"], "--tokens is given without --vocabulary; give both"),
        (["ptb-lstm-rigl", "--vocabulary", "0"], "the vocabulary is 0; give"),
        (["ptb-lstm-rigl", "--vocabulary", "9", "--tokens", "9"], "too short for 20 columns; give at least 40"),
        (["ptb-lstm-rigl", "--vocabulary", "9", "--set", "sparsity=2"], "method.sparsity is 2"),
        (["ptb-lstm-rigel", "--vocabulary", "9"], "there is no recipe 'ptb-lstm-rigel'"),
    ],
)
def test_refusals(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["flops", *arguments]) == FAILED
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    assert re.search(expected, captured.err)
    assert not list(tmp_path.iterdir())
