"""Bad input through the command line: one line on stderr, exit code 2, nothing on disk touched."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import TINY, command, environment, last_checkpoint, tree, write_text

from refimpl.cli import main
from refimpl.training.config import load_recipe, override
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import start

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _with_a_text(own_folder: Path) -> None:
    write_text(own_folder / "text")


def fails(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail, and return its one line."""
    code: object
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    _, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("refimpl: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("refimpl: error: ").strip()


def train(*settings: str, recipe: str = "selfish-lstm", data: str = "text") -> list[str]:
    return ["train", recipe, "--data", data, "--out", "run", "--set", *TINY, *settings]


def small_run(*settings: str, path: str = "run") -> Path:
    """Make a run that has trained for six steps and kept two checkpoints."""
    config = override(
        load_recipe("selfish-lstm"), [*TINY, "data.corpus=text", "max_steps=6", "checkpoint_every=2", *settings]
    )
    run = start(config, path)
    run.train()
    run.close()
    return Path(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["sparsity=1"], "method.sparsity is 1; give a number in [0, 1)"),
        (["sparsity=-0.1"], "method.sparsity is -0.1; give a number in [0, 1)"),
        (["sparsity=nan"], "method.sparsity is nan; give a number in [0, 1)"),
        (["sparsty=0.5"], "there is no setting 'sparsty'; the nearest is 'method.sparsity'"),
        (["epochs=many"], "training.epochs is 'many'; give an integer"),
        (["epochs"], "'epochs' is not a setting; give key=value"),
        (["bptt=1000"], "bptt is 1000, but the text gives 110 rows at batch size 4"),
        (["batch_size=1000"], "batch_size is 1000, more than the 440 tokens of the text"),
        (["eval_batch_size=200"], "the validation text has 110 tokens, too few for data.eval_batch_size = 200"),
        (["tied=true", "hidden_size=9"], "model.tied is true but"),
        (["method.convention.tise=first"], "there is no convention 'tise'"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], says: str, capsys: Capture) -> None:
    assert says in fails(capsys, *train(*settings))
    assert not Path("run").exists()


def empty(folder: Path) -> None:
    (folder / "train.txt").write_text("")


def latin_1(folder: Path) -> None:
    (folder / "valid.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1"))


def without_test(folder: Path) -> None:
    (folder / "test.txt").unlink()


def one_word(folder: Path) -> None:
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("word " * 100)


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (empty, "train.txt is empty"),
        (latin_1, "valid.txt is not UTF-8: byte 0xe9 at offset 3"),
        (without_test, "lacks test.txt"),
        (one_word, "vocabulary of one word ('word')"),
        (nothing, "holds no text that is known"),
        (shutil.rmtree, "There is no folder text"),
    ],
)
def test_texts_that_cannot_be_learnt(spoil: Callable[[Path], None], says: str, capsys: Capture) -> None:
    spoil(Path("text"))
    assert says in fails(capsys, *train())
    assert not Path("run").exists()


def test_an_evaluation_text_that_is_too_short(capsys: Capture) -> None:
    Path("text/valid.txt").write_text("w1\n")
    said = fails(capsys, *train())
    assert "the validation text has 2 tokens, too few for data.eval_batch_size = 2" in said
    assert not Path("run").exists()


def test_a_missing_data_set_says_how_to_fetch_it(capsys: Capture) -> None:
    said = fails(capsys, "train", "ptb-lstm-small-selfish", "--out", "run")
    assert "`refimpl fetch ptb --out data/ptb` downloads that text" in said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "selfish-lstn"], "there is no recipe 'selfish-lstn'; the nearest is 'selfish-lstm'"),
        (["train", "absent.toml"], "there is no recipe file 'absent.toml'"),
        (["train", "--seed", "x"], "seed is 'x'; give an integer"),
        (["train", "--dtype", "float16"], "dtype is 'float16'; give 'float32' or 'float64'"),
        (["train", "--threads", "-1"], "training.threads is -1"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run: it is no folder"),
        (["train", "set", "--resume", "nowhere"], "recipe is given with --resume"),
        (["eval", "text"], "'text' is not a run: it has no config.json"),
        (["sample", "nowhere"], "'nowhere' is not a run"),
        (["plot", "nowhere"], "'nowhere' is not a run"),
        (["export", "nowhere", "--to", "npz"], "'nowhere' is not a run"),
        (["export", "nowhere", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["import", "nowhere", "--out", "run"], "there is no 'nowhere'"),
        (["fetch", "ptp"], "There is no data set 'ptp'"),
        (["fetsh"], "invalid choice: 'fetsh'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], says: str, capsys: Capture, tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert says in fails(capsys, *arguments)
    assert tree(tmp_path) == before


def test_a_folder_that_holds_a_run_or_anything_else(capsys: Capture, tmp_path: Path) -> None:
    small_run()
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    before = tree(tmp_path)
    assert "'run' holds a run already; resume that one" in fails(capsys, *train())
    assert "holds other files" in fails(capsys, "train", "--data", "text", "--out", "other", "--set", *TINY)
    assert tree(tmp_path) == before


def test_two_processes_in_one_folder(capsys: Capture) -> None:
    small_run()
    with RunFolder.open("run", write=True):
        assert "a run is writing into 'run'" in fails(capsys, "train", "--resume", "run")


def test_resuming_with_other_settings_or_another_text(capsys: Capture, tmp_path: Path) -> None:
    small_run()
    before = tree(tmp_path)
    said = fails(capsys, "train", "--resume", "run", "--seed", "3", "--set", "lr=2")
    assert "cannot change seed (from 1111 to 3), optimizer.lr (from 1.0 to 2.0)" in said
    write_text(tmp_path / "elsewhere", seed=1)
    assert "give the same data" in fails(capsys, "train", "--resume", "run", "--data", "elsewhere")
    assert "give the same data" in fails(capsys, "eval", "run", "--data", "elsewhere")
    shutil.rmtree("elsewhere")
    assert tree(tmp_path) == before


def test_a_truncated_checkpoint_is_passed_over_and_that_is_said(capsys: Capture) -> None:
    small_run()
    older, newest = RunFolder.open("run").checkpoints()
    straight, intact = last_checkpoint(Path("run")), newest.read_bytes()
    newest.write_bytes(intact[:-1000])
    assert main(["train", "--resume", "run"]) == 0
    out, err = capsys.readouterr()
    assert f"refimpl: warning: checkpoint '{newest}' is truncated or damaged" in err
    assert f"refimpl: warning: going on from the older checkpoint '{older}'" in err
    assert "going on after step 4" in out
    again = last_checkpoint(Path("run"))
    assert again.keys() == straight.keys()
    assert all(np.array_equal(array, again[name]) for name, array in straight.items())
    for path in (older, newest):
        path.write_bytes(intact[:-1000])
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 2
    _, err = capsys.readouterr()
    assert "none of the 2 checkpoints in 'run/checkpoints' can be read" in err.splitlines()[-1]


def test_a_checkpoint_of_another_recipe(capsys: Capture) -> None:
    small_run()
    small_run("method=static", path="theirs")
    shutil.copy("theirs/checkpoints/step-00000006.npz", "run/checkpoints/step-00000006.npz")
    shutil.copy("theirs/checkpoints/best.npz", "run/checkpoints/best.npz")
    for arguments in (["train", "--resume", "run"], ["eval", "run"], ["sample", "run"]):
        said = fails(capsys, *arguments)
        assert "belongs to another configuration: method.name ('static' there, 'selfish' here)" in said


def test_a_loss_that_explodes(capsys: Capture) -> None:
    said = fails(capsys, *train("lr=1e30", "clip=0", "dtype=float64"))
    assert "the loss is" in said
    assert "at step" in said
    assert "the state is in 'run/checkpoints/not-finite.npz'" in said
    assert Path("run/checkpoints/not-finite.npz").is_file()


def test_a_full_disk() -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

    process = subprocess.run(
        command(*train("checkpoint_every=2")), env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=small_files, timeout=120,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1
    assert "refimpl: error: could not write 'run/checkpoints/step-00000002.npz' (File too large)" in process.stderr
    assert [p.name for p in Path("run/checkpoints").iterdir()] == []
    # With room again, the run goes on.
    again = subprocess.run(command("train", "--resume", "run"), env=environment(), capture_output=True, check=False)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("matplotlib", ["plot", "run"], "plot"),
        ("torch", ["export", "run", "--to", "torch"], "crosscheck"),
    ],
)
def test_a_missing_extra_is_named(
    module: str, arguments: list[str], extra: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run("max_steps=22")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.figure", None)
    before = tree(Path("run"))
    said = fails(capsys, *arguments)
    assert f"this needs {module}" in said
    assert f"pip install 'refimpl[{extra}]'" in said
    assert tree(Path("run")) == before


def test_a_mistake_of_ours_is_not_taken_for_the_users(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[tuple[str, str]]:
        raise AssertionError("impossible")

    monkeypatch.setattr("refimpl.training.config.recipes", broken)
    assert main(["recipes"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_traceback_is_there_for_who_asks(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIMPL_DEBUG", "1")
    assert main(["eval", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("refimpl: error: 'nowhere' is not a run")
