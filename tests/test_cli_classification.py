"""The command line on images: training, evaluating, plotting, exporting and importing a classifier, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import tree, write_text
from test_datasets_images import NAMES, idx, write_idx
from test_training_classification import part

from refimpl.cli import main
from refimpl.plots import draw, read_run
from refimpl.training.config import load_recipe, recipes
from refimpl.training.metrics import read_metrics
from refimpl.training.report import report
from refimpl.training.start import resume

TINY = (
    "sizes=[8]", "batch_size=7", "eval_batch_size=4", "epochs=3", "lr=0.05", "sparsity=0.5", "threads=1",
)  # fmt: skip
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("own_folder")


def write(folder: Path) -> Path:
    return write_idx(folder, part(40, 0), part(9, 2))


def train(*settings: str, recipe: str = "mlp-fashion-mnist-set", data: str = "images") -> list[str]:
    return ["train", recipe, "--data", data, "--out", "run", "--set", *TINY, *settings]


def test_the_commands_from_training_to_import(capsys: Capture, tmp_path: Path) -> None:
    write(tmp_path / "images")
    assert main(train()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "images: images, 36 + 4 + 9 (train, valid, test) of 1 x 6 x 5, 3 classes" in out
    assert "model: MLP, 30-8-3; method set, sparsity 0.5; optimizer sgd" in out
    assert (
        out.count("validation accuracy 0.") + out.count("validation accuracy 1.") == 4
    )  # three epochs, and the report
    assert "images/s" in out
    assert "(best checkpoint; set, 18 of 18 steps, 108 images)" in out
    assert "perplexity" not in out
    facts = json.loads(Path("run/config.json").read_text())["data"]
    assert facts["images"] == {"train": 36, "valid": 4, "test": 9}
    assert (facts["shape"], facts["classes"]) == ([1, 6, 5], 3)

    assert main(["eval", "run"]) == 0
    shown = capsys.readouterr().out
    again = resume("run")
    scores = report(again, repeats=0).scores
    again.close()
    assert f"validation accuracy {scores.valid['accuracy']:.4f}, test accuracy {scores.test['accuracy']:.4f}" in shown
    epochs = [r for r in read_metrics("run/metrics.jsonl") if r["kind"] == "epoch"]
    assert min(r["valid_loss"] for r in epochs) == scores.valid["loss"]
    assert all("valid_perplexity" not in r and "images_per_second" in r for r in epochs)

    assert main(["export", "run", "--to", "npz", "--out", "model.npz"]) == 0
    assert main(["import", "model.npz", "--out", "imported"]) == 0
    assert "refimpl eval and export work on it" in capsys.readouterr().out
    assert main(["eval", "imported"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == shown.splitlines()[-1]


def test_a_figure_has_accuracy_in_place_of_perplexity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "images")
    assert main(train()) == 0
    assert main(["plot", "run"]) == 0
    titles = [axis.get_title() for axis in draw([read_run("run")]).axes if axis.axison]
    assert titles == ["Loss", "Validation accuracy", "Weights moved by each exchange"]
    texts = [{"kind": "epoch", "step": 3, "valid_loss": 4.0, "valid_perplexity": 54.6}]
    both = draw([read_run("run"), type(read_run("run")).of("text", texts)])
    assert [axis.get_title() for axis in both.axes if axis.axison][1:3] == [
        "Validation perplexity",
        "Validation accuracy",
    ]
    assert both.axes[0].get_ylabel() == "nats per token or image"


def fails(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail and touch nothing; return its one line."""
    before = tree(Path())
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("refimpl: error: ")
    assert err.count("\n") == 1
    assert tree(Path()) == before
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (train("task=language-model"), "task is 'language-model' and model.name is 'mlp'"),
        (train("model=lstm"), "model.sizes is given and model.name is 'lstm', which has no such option"),
        (train("hidden_size=5"), "model.hidden_size is given and model.name is 'mlp', which has no such option"),
        (train("sizes=[]"), "model.sizes is []; give a list of one or more entries, each an integer of at least 1"),
        (train("sizes=[3, 0]"), "model.sizes[1] is 0; give an integer of at least 1"),
        (train("sizes=3"), "model.sizes is 3; give a list"),
        (train("batch_size=37"), "training.batch_size is 37, more than the 36 training images"),
        (train("valid_fraction=1"), "data.valid_fraction is 1; give a number in (0, 1)"),
        (train("valid_fraction=0.001"), "sets aside 0 of the 40 training images"),
        (train("augment=1"), "data.augment is 1; give true or false"),
        (train(data="text"), "'text' holds a text, and task is 'classification'"),
        (train(data="default"), "data.corpus is 'default', which is a text"),
        (train(data="absent"), "`refimpl fetch fashion-mnist` downloads some"),
        (train(data="data/cifar-10"), "`refimpl fetch cifar-10 --out data/cifar-10` downloads those images"),
        (["train", "mlp-fashion-mnist-dense"], "`refimpl fetch fashion-mnist --out data/fashion-mnist` downloads"),
        (["train", "--data", "images"], "'images' holds images, and task is 'language-model'"),
        (["train", "--data", "text", "--set", "augment=true"], "data.augment is true and task is 'language-model'"),
    ],
)
def test_what_cannot_be(arguments: list[str], says: str, capsys: Capture, tmp_path: Path) -> None:
    write(tmp_path / "images")
    write_text(tmp_path / "text")
    assert says in fails(capsys, *arguments)


def test_images_that_cannot_be(capsys: Capture, tmp_path: Path) -> None:
    write(tmp_path / "images")
    path = tmp_path / "images" / NAMES[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is truncated or damaged" in fails(capsys, *train())


def test_a_run_of_other_images_or_of_no_text(capsys: Capture, tmp_path: Path) -> None:
    write(tmp_path / "images")
    assert main(train()) == 0
    capsys.readouterr()
    assert "makes up no text; give the run of a language model" in fails(capsys, "sample", "run")
    shutil.copytree("images", "other")
    (tmp_path / "other" / NAMES[3]).write_bytes(idx(np.zeros(9)))
    for arguments in (["eval", "run", "--data", "other"], ["train", "--resume", "run", "--data", "other"]):
        assert "give the same data" in fails(capsys, *arguments)
    write_idx(tmp_path / "wide", part(40, 0, (1, 6, 6)), part(9, 2, (1, 6, 6)))
    assert main(["export", "run", "--to", "npz", "--out", "m.npz"]) == 0
    capsys.readouterr()
    said = fails(capsys, "import", "m.npz", "--out", "new", "--data", "wide")
    assert "'layers.0.weight' has shape (8, 30) and the model's has (8, 36)" in said


@pytest.mark.parametrize("name", [name for name, _ in recipes() if name.startswith("mlp-")])
def test_recipes_of_classifiers(name: str) -> None:
    settings = load_recipe(name)
    assert settings.task == "classification"
    assert settings.data.corpus in ("data/fashion-mnist", "data/cifar-10")
