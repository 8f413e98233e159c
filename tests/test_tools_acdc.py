"""The comparison of AC/DC and the tool of memorisation: rows, budgets, what is not trained again, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_cases import Stops, write_idx

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import acdc
import acdc_runs
import memorisation
from acdc_runs import MODELS, Outcome, Plan, agreements, run_all

from refimpl.analysis.models import agreement_of
from refimpl.datasets import Images, load_image_folder
from refimpl.methods.phases import Phases
from refimpl.training.config import Config, differences, load_recipe, override
from refimpl.training.loop import Observer, Run
from refimpl.training.metrics import read_metrics

Capture = pytest.CaptureFixture[str]
TINY = (
    "sizes=[8,6]", "batch_size=9", "eval_batch_size=5", "epochs=5", "compress=[1,3]", "decompress=[2]", "threads=1",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(autouse=True)
def _two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acdc_runs, "STEPS", 1)


@pytest.fixture
def data(tmp_path: Path) -> Images:
    return load_image_folder(write_idx(tmp_path / "data"))


def base(*more: str) -> Config:
    return override(load_recipe("mlp-fashion-mnist-acdc"), ["data.corpus=data", *TINY, *more])


def plan(data: Images, **more: Any) -> Plan:
    return dataclasses.replace(Plan(base(), [0.5, 0.8], [1, 2], Path("runs"), data), **more)


def quiet(name: str) -> Observer:
    return Observer()


def stops(steps: int, name: str) -> Observer:
    return Stops(steps)


def test_all_runs_have_one_budget_and_differ_in_the_method_alone(data: Images) -> None:
    made = plan(data)
    configs = made.configs()
    assert list(configs)[:4] == [("dense", None, 1), ("acdc", 0.5, 1), ("gmp", 0.5, 1), ("rigl", 0.5, 1)]
    assert len(configs) == 2 * (1 + 2 * 3)
    for (method, sparsity, seed), config in configs.items():
        other = differences(base(), config)
        assert all(key == "seed" or key.startswith("method.") for key in other)
        assert (config.method.name, config.seed) == (method, seed)
        assert sparsity in (None, config.method.sparsity)
        run = Run(config, data)
        assert run.total_steps == 5 * 6
        if method in ("gmp", "rigl"):
            assert config.method.interval == 1
    long = override(base(), ["epochs=100", "compress=[1,3]"])
    assert plan(data, base=long).config("rigl", 1, 0.5).method.interval == 12  # 600 steps, 50 times


def test_rows_are_those_of_the_runs(data: Images) -> None:
    made = plan(data, sparsities=[0.5], seeds=[1])
    found = run_all(made, quiet)
    assert sorted(o.model for o in found) == sorted(MODELS)
    rows = {o.model: o for o in found}
    for outcome in found:
        assert outcome.seed == 1
        assert 0 <= outcome.accuracy <= 1
        assert outcome.seconds > 0
        assert 1 <= outcome.epoch <= 5
    dense, sparse = rows["dense"], rows["AC/DC, sparse"]
    twin, tuned = rows["AC/DC, dense twin"], rows["AC/DC, twin fine-tuned"]
    assert (dense.target, dense.sparsity, dense.training, dense.inference, dense.sparse_ms) == (None, 0, 1, 1, None)
    assert (twin.sparsity, twin.inference, tuned.sparsity, tuned.inference) == (0, 1, 0, 1)
    for model in ("AC/DC, sparse", "GMP", "RigL"):
        assert rows[model].sparsity == pytest.approx(0.5, abs=0.01)
    # the operations of the runs, from their metrics: AC/DC up to the twin, and to the end
    spent = {
        name: {r["epoch"]: r["flops"] for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "epoch"}
        for name, path in {
            "dense": made.path("dense", 1), "acdc": made.path("acdc", 1, 0.5),
            "tuned": made.path("acdc-finetuned", 1, 0.5),
        }.items()
    }  # fmt: skip
    whole = spent["dense"][5]
    assert sparse.training == pytest.approx(spent["acdc"][5] / whole, rel=1e-12)
    assert twin.training == pytest.approx(spent["acdc"][twin.epoch] / whole, rel=1e-12)
    assert tuned.training == pytest.approx(spent["tuned"][5] / whole, rel=1e-12)
    assert twin.epoch in (1, 3)  # dense were the first epoch and the third
    assert tuned.training == pytest.approx(twin.training + (5 - twin.epoch) / 5, rel=1e-12)
    assert sparse.dense_ms is not None
    assert sparse.sparse_ms is not None
    assert rows["RigL"].dense_ms is None
    assert [o.ratio is None for o in (dense, twin, tuned, sparse, rows["GMP"])] == [True] * 3 + [False] * 2
    assert tuned.seconds > twin.seconds
    assert sparse.seconds > twin.seconds
    pairs = agreements(made, 1)
    assert list(pairs) == ["0.5: AC/DC, twin", "0.5: AC/DC, fine-tuned", "0.5: GMP, dense"]
    assert pairs["0.5: AC/DC, twin"].accuracies == (sparse.accuracy, twin.accuracy)
    run, finetuned = made.path("acdc", 1, 0.5), made.path("acdc-finetuned", 1, 0.5)
    assert pairs["0.5: AC/DC, fine-tuned"] == agreement_of(run, finetuned, corpus=data)
    assert pairs["0.5: GMP, dense"] == agreement_of(made.path("gmp", 1, 0.5), made.path("dense", 1), corpus=data)


def test_what_is_there_is_not_trained_again(data: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(data, sparsities=[0.5], seeds=[1])
    first = run_all(made, quiet)
    trained: list[str] = []
    train = Run.train

    def noted(run: Run, *rest: Any) -> Any:
        assert run.folder is not None
        trained.append(run.folder.path.name)
        return train(run, *rest)

    monkeypatch.setattr(Run, "train", noted)
    assert run_all(made, quiet) == first
    assert trained == []
    (made.path("gmp", 1, 0.5) / acdc_runs.OUTCOMES).unlink()
    shutil.rmtree(made.path("rigl", 1, 0.5))
    assert [o.accuracy for o in run_all(made, quiet)] == [o.accuracy for o in first]
    assert trained == ["gmp-0.5-seed1", "rigl-0.5-seed1"]  # the first had finished, and takes no step
    with pytest.raises(ValueError, match=r"holds a run with other settings \(optimizer.lr\); give another folder"):
        run_all(dataclasses.replace(made, base=base("lr=0.5")), quiet)


def test_a_comparison_that_was_stopped_goes_on(data: Images) -> None:
    straight = run_all(plan(data, sparsities=[0.5], seeds=[1], folder=Path("straight")), quiet)
    made = plan(data, sparsities=[0.5], seeds=[1])
    for steps in (8, 15, 20):
        with pytest.raises(KeyboardInterrupt):
            run_all(made, partial(stops, steps))
    for a, b in zip(straight, run_all(made, quiet), strict=True):
        times: dict[str, Any] = {"dense_ms": None, "sparse_ms": None, "ratio": None, "seconds": 0.0}
        assert dataclasses.replace(a, **times) == dataclasses.replace(b, **times)
    for kind in ("supports/epoch-00003.npz", "zeros.json"):
        first, second = (Path(folder, "acdc-0.5-seed1", kind).read_bytes() for folder in ("straight", "runs"))
        assert first == second


def outcome(model: str, target: float | None, seed: int, accuracy: float) -> Outcome:
    return Outcome(model, target, seed, 5, accuracy, 0.5, 0.8, 0.25, 0.2, None, 1.5 * seed, seed / 4, 60.0)


def test_the_table() -> None:
    rows = [
        outcome("GMP", 0.9, 1, 0.8), outcome("AC/DC, sparse", 0.9, 1, 0.85), outcome("dense", None, 1, 0.9),
        outcome("AC/DC, sparse", 0.9, 2, 0.87), outcome("AC/DC, sparse", 0.8, 1, 0.88),
    ]  # fmt: skip
    head, ruled, *lines = acdc.table(rows).splitlines()
    assert head.count("|") == ruled.count("|") == 11
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cell[:2] for cell in cells] == [
        ["", "dense"], ["0.8", "AC/DC, sparse"], ["0.9", "AC/DC, sparse"], ["0.9", "GMP"],
    ]  # fmt: skip
    assert cells[2] == ["0.9", "AC/DC, sparse", "5, 5", "0.8600 ± 0.0141", "0.250", "0.200", "-", "2.2", "0.38", "1.0"]
    assert cells[3][3] == "0.8000"
    shown = acdc.points(rows)
    assert shown["AC/DC, sparse"] == [(0.8, 0.25, [0.88]), (0.9, 0.25, [0.85, 0.87])]
    assert shown["dense"] == [(None, 0.25, [0.9])]


def test_catches_a_spread_over_something_else() -> None:
    values = [0.85, 0.87]
    assert acdc.spread(values, ".4f") == "0.8600 ± 0.0141"
    assert acdc.spread(values, ".4f") != f"{np.mean(values):.4f} ± {np.std(values):.4f}"  # of the seeds as a sample


def test_the_command(data: Images, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    words = ["mlp-fashion-mnist-acdc", "--data", "data", "--sparsity", "0.5", "--seeds", "1", "--folder", "runs"]
    words += ["--images", "40", "--json", "out.json", "--figures", "figures", "--set", *TINY]
    assert acdc.main(words) == 0
    out = capsys.readouterr().out
    assert "    python tools/acdc.py mlp-fashion-mnist-acdc --data data" in out
    assert "| 0.5 | AC/DC, twin fine-tuned |" in out
    assert "| 0.5: GMP, dense |" in out
    told = json.loads(Path("out.json").read_text())
    assert told["outcomes"][0]["model"] == "dense"
    assert set(told["agreement"]["0.5: AC/DC, twin"]) >= {"same", "cross_entropy"}
    assert sorted(path.name for path in Path("figures").iterdir()) == [
        "agreement.png", "comparison.png", "masks.png", "zeros.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--sparsity", "0.5,x"], "numbers with commas"),
        (["--seeds", "1.5"], "numbers with commas"),
        (["--sparsity", "1.5"], "method.sparsity is 1.5"),
        (["--images", "1000"], "give from 1 to 54"),
        (["--gmp", "intervall=3"], "the nearest is"),
    ],
)
def test_what_is_refused(data: Images, capsys: Capture, more: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        acdc.main(["mlp-fashion-mnist-acdc", "--data", "data", "--folder", "runs", "--set", *TINY, *more])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()


def test_other_recipes_are_refused(data: Images, capsys: Capture) -> None:
    for recipe, says in (
        ("mlp-fashion-mnist-set", "trains with 'set'; give one of AC/DC"), ("no-such", "there is no recipe")
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            acdc.main([recipe, "--data", "data"])
        assert says in capsys.readouterr().err


# --- memorisation


def test_phases_are_the_published_ones_in_small() -> None:
    published = Phases((10, 50, 90, 130, 170), (30, 70, 110, 150))
    assert memorisation.phases_of(200, 20) == published
    assert memorisation.phases_of(40, 4) == Phases((2, 10, 18, 26, 34), (6, 14, 22, 30))
    for epochs, length in ((12, 4), (10, 0), (10, -3)):
        with pytest.raises(ValueError, match="do not fit into"):
            memorisation.phases_of(epochs, length)
    for epochs in range(4, 60):
        for length in range(1, (epochs + 3) // 4):
            found = memorisation.phases_of(epochs, length).until(epochs)
            assert [phase.length for phase in found[1:-1]] == [length] * (len(found) - 2)
            assert found[-1].length >= length


def test_memorisation_is_measured(data: Images, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    words = ["--data", "data", "--sparsity", "0.5,0.8", "--images", "40", "--random", "9", "--epochs", "6"]
    words += ["--phase", "1", "--json", "out.json", "--plot", "out.png", "--set", *TINY]
    assert memorisation.main(words) == 0
    out = capsys.readouterr().out
    told = json.loads(Path("out.json").read_text())
    assert list(told["runs"]) == ["dense", "AC/DC, sparsity 0.5", "AC/DC, sparsity 0.8"]
    kinds = [epoch["phase"] for epoch in told["runs"]["AC/DC, sparsity 0.8"]]
    assert kinds == ["dense", "compressed", "dense", "compressed", "dense", "compressed"]
    last = told["runs"]["AC/DC, sparsity 0.5"][-1]
    assert f"| AC/DC, sparsity 0.5 | compressed, 6 | {last['random']:.3f} | {last['true']:.3f} |" in out
    assert Path("out.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        memorisation.main([*words, "--random", "41"])
    assert "give from 1 to 40" in capsys.readouterr().err
