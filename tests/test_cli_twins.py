"""The command line on a run with a dense twin: training, evaluating, fine-tuning, exporting; and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import tree
from test_datasets_images import draw, records, write_cifar, write_idx
from test_training_classification import part

from refimpl.cli import main
from refimpl.interchange import import_params
from refimpl.methods.phases import Phases
from refimpl.training import checkpoint
from refimpl.training.config import load_recipe
from refimpl.training.run_folder import RunFolder

Capture = pytest.CaptureFixture[str]
TINY = (
    "widths=[4, 4]", "batch_size=7", "eval_batch_size=4", "epochs=4", "compress=[1, 3]", "decompress=[2]", "warmup=0",
    "sparsity=0.5", "threads=1",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_folder")


def train(*settings: str, recipe: str = "acdc-fashion-mnist", data: str = "images") -> list[str]:
    return ["train", recipe, "--data", data, "--out", "run", "--set", *TINY, *settings]


def fails(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail and touch nothing; return its one line."""
    before = tree(Path())
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("refimpl: error: ")
    assert err.count("\n") == 1
    assert tree(Path()) == before
    return err


def test_from_training_to_the_twin_trained_on(capsys: Capture, tmp_path: Path) -> None:
    write_idx(tmp_path / "images", part(40, 0), part(9, 2))
    assert main(train()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "model: small conv net, 4-4; method acdc, sparsity 0.5" in out
    twin = RunFolder.open("run").best_dense()
    assert f"(its dense twin, of epoch {twin.meta['epoch']}, density 1)" in out

    assert main(["eval", "run"]) == 0
    text = capsys.readouterr().out
    assert main(["eval", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best, dense = found["models"]
    assert [m["model"] for m in found["models"]] == ["best", "dense twin"]
    assert (dense["density"], dense["step"]) == (1.0, twin.meta["step"])
    assert 0.4 < best["density"] < 0.6
    assert dense["valid"] == twin.meta["valid"]
    for model in found["models"]:
        assert f"test accuracy {model['test']['accuracy']:.4f}" in text
        assert f"sparsity {1 - model['density']:.4f}" in text
    assert main(["eval", "run", "--dense", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == [dense]

    assert main(["finetune", "run", "--out", "tuned"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"run: tuned, going on with the dense twin of run after step {twin.meta['step']}" in out
    assert f"trained on from the dense twin of run, of epoch {twin.meta['epoch']}" in out
    assert "(best checkpoint; dense, 24 of 24 steps" in out
    assert main(["train", "--resume", "tuned"]) == 0
    assert "tuned has finished: 24 steps" in capsys.readouterr().out
    assert main(["eval", "tuned"]) == 0
    assert "dense twin" not in capsys.readouterr().out

    assert main(["export", "run", "--to", "npz"]) == 0
    assert main(["export", "run", "--to", "npz", "--dense"]) == 0
    sparse, whole = (import_params(f"run/{name}").params for name in ("model.npz", "dense-model.npz"))
    assert sparse.keys() == whole.keys()
    names = checkpoint.unpack_params(twin.arrays)[0]
    assert all(np.array_equal(np.asarray(whole[n]), np.asarray(names[n])) for n in names)
    assert int(np.asarray(whole["bn1.num_batches_tracked"])) == twin.meta["step"]
    assert main(["import", "run/dense-model.npz", "--out", "taken", "--recipe", "dense-fashion-mnist",
                 "--data", "images", "--set", "widths=[4, 4]", "batch_size=7", "eval_batch_size=4"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["eval", "taken", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["valid"] == dense["valid"]


def test_runs_without_a_twin(capsys: Capture, tmp_path: Path) -> None:
    write_idx(tmp_path / "images", part(40, 0), part(9, 2))
    arguments = train("epochs=1", recipe="gmp-fashion-mnist")
    assert main([a for a in arguments if "compress" not in a]) == 0
    capsys.readouterr()
    for command in (["finetune", "run"], ["eval", "run", "--dense"], ["export", "run", "--to", "npz", "--dense"]):
        assert "'run' has no dense twin; give a run of acdc" in fails(capsys, *command)
    assert "'nowhere' is not a run" in fails(capsys, "finetune", "nowhere")


CANNOT_BE = [
    (train("model=lenet-5", "widths=[32, 64, 64]"), "the images are 1 x 6 x 5 (channels, height, width)"),
    (train("strides=[1]"), "model.strides lists 1 convolutions and model.widths 2"),
    (train("depth=20"), "model.depth is given and model.name is 'small-conv', which has no such option"),
    (train("compress=[1, 3]", "decompress=[3]"), "overlap"),
    (train("compress=[1, 1]"), "in ascending order"),
    (train("compress=[1]", "decompress=[2]"), "the last phase, from epoch 2, is dense"),
    (train("epochs=3"), "the last compressed phase begins at epoch 3, but the run has 3 epochs"),
    (train('compress="auto"'), "give both, or neither"),
    (train("pattern=2:4", "sparsity=0.5"), "conv1.weight"),
    (train("sparsity=0.9999", "scope=local"), "conv1.weight"),
    (train("schedule=epoch-cosine", "warmup_epochs=4"), "optimizer.warmup_epochs is 4 and epochs of the run are 4"),
    (train("label_smoothing=1.5"), "training.label_smoothing is 1.5; give a number in [0, 1]"),
    (train(data="cut"), "cut/test_batch.bin has 6,145 bytes, which is no whole number of records"),
    (train(data="odd"), "has the label 200 at record 3, and labels are 0 to 9"),
]


@pytest.mark.parametrize(("arguments", "says"), CANNOT_BE, ids=[says[:40] for _, says in CANNOT_BE])
def test_what_cannot_be(arguments: list[str], says: str, capsys: Capture, tmp_path: Path) -> None:
    write_idx(tmp_path / "images", part(40, 0), part(9, 2))
    colours = draw(20, (3, 32, 32), 10, 0), draw(5, (3, 32, 32), 10, 1)
    write_cifar(tmp_path / "odd", *colours)
    colours[0].labels[3] = 200
    (tmp_path / "odd" / "data_batch_1.bin").write_bytes(records(colours[0]))
    write_cifar(tmp_path / "cut", draw(20, (3, 32, 32), 10, 0), colours[1])
    path = tmp_path / "cut" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:6145])
    assert says in fails(capsys, *arguments)


def test_other_images_than_the_runs(capsys: Capture, tmp_path: Path) -> None:
    write_idx(tmp_path / "images", part(40, 0), part(9, 2))
    assert main(train()) == 0
    capsys.readouterr()
    write_idx(tmp_path / "wide", part(40, 0, (1, 6, 6)), part(9, 2, (1, 6, 6)))
    for command in (["finetune", "run", "--data", "wide"], ["eval", "run", "--data", "wide"]):
        assert "give the same data" in fails(capsys, *command)


@pytest.mark.parametrize("name", ["acdc", "gmp", "rigl", "static"])
def test_the_experiment_differs_from_its_baseline_in_the_method_only(name: str) -> None:
    own, dense = (load_recipe(f"{m}-fashion-mnist").to_dict() for m in (name, "dense"))
    assert own.pop("method") != dense.pop("method")
    assert own == dense


def test_recipes_have_the_phases_that_they_tell_of() -> None:
    fashion, cifar = (load_recipe(name).training.epochs for name in ("acdc-fashion-mnist", "acdc-resnet20-cifar"))
    assert Phases.spread(fashion) == Phases((2, 4, 7), (3, 5))
    assert Phases.spread(cifar) == Phases((2, 4, 6, 8, 10, 12, 14, 17), (3, 5, 7, 9, 11, 13, 15))


def test_the_recipe_for_cifar() -> None:
    own, dense = (load_recipe(f"{m}-resnet20-cifar").to_dict() for m in ("acdc", "dense"))
    assert own.pop("method") != dense.pop("method")
    assert own == dense
    assert (own["model"]["name"], own["model"]["depth"], own["data"]["augment"]) == ("resnet", 20, True)
