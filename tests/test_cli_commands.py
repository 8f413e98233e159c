"""The commands beside ``train``: what they print and write."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import TINY, tree, write_text

from refimpl import kernels
from refimpl.cli import main
from refimpl.cli.arguments import DATASETS, FORMATS, make_parser
from refimpl.datasets import CATALOGUE
from refimpl.extras import available
from refimpl.training import checkpoint
from refimpl.training.adopt import begin_with
from refimpl.training.config import load_recipe, override
from refimpl.training.loop import Run
from refimpl.training.report import best_params, report
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import resume, start
from refimpl.weights import SparseWeight, values_of

Capture = pytest.CaptureFixture[str]
COMMANDS = (
    "train", "finetune", "recipes", "methods", "compare", "conventions", "flops", "eval", "sample", "plot", "fetch",
    "info", "export", "import",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def run() -> Run:
    """A run of two epochs, closed, in the folder ``run``."""
    write_text(Path("text"))
    made = start(override(load_recipe("selfish-lstm"), [*TINY, "data.corpus=text", "dtype=float64"]), "run")
    made.train()
    made.close()
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_with_an_example(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"examples:\n  refimpl {name}" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_list_of_commands_is_quick_and_complete(capsys: Capture) -> None:
    code = (
        "import sys\nfrom refimpl.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'numpy', 'numba', 'scipy', 'tqdm'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert all(re.search(rf"^    {name}\b", process.stdout, re.M) for name in COMMANDS)
    assert tuple(CATALOGUE) == DATASETS  # written down so that help need not import them
    assert make_parser().prog == "refimpl"


def test_recipes(capsys: Capture) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^selfish-lstm +Selfish-RNN", out, re.M)
    assert re.search(r"^ptb-lstm-small-dense +Dense baseline", out, re.M)


def test_eval_gives_the_figures_of_the_report(run: Run, capsys: Capture) -> None:
    before = tree(Path("run"))
    assert main(["eval", "run", "--threads", "1"]) == 0
    again = resume("run")
    for weight in again.state.params.values():
        values_of(weight)[...] = 0  # it is the best checkpoint that counts, not the last state
    found = report(again, repeats=0).scores
    again.close()
    out = capsys.readouterr().out
    assert (
        f"validation perplexity {found.valid['perplexity']:.4f}, test perplexity {found.test['perplexity']:.4f}" in out
    )
    assert run.corpus.sha256 in out
    assert tree(Path("run")) == before


def test_sample_needs_no_text_and_depends_on_the_seed(run: Run, capsys: Capture) -> None:
    for path in Path("text").iterdir():
        path.unlink()
    said = []
    for seed in ("1", "1", "2"):
        assert main(["sample", "run", "--words", "30", "--seed", seed, "--prompt", "w3 zebra"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].startswith("w3 <unk>")
    assert set(said[0].split()) <= set(run.corpus.vocabulary)
    lines = said[0].count("\n") - 1
    assert 32 - 1 <= len(said[0].split()) + lines <= 32  # every word is there, a line break for <eos>


def test_info(capsys: Capture) -> None:
    with kernels.use("cpu"):
        assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("refimpl", "python", "numpy", "scipy", "numba", "processors", "threads", "BLAS", "kernels"):
        assert re.search(rf"^{name}  +\S", out, re.M), name
    assert re.search(r"^threading layer +\w+$", out, re.M)
    assert re.search(r"^compiled kernels +\S+, [\d.]+ MiB ", out, re.M)
    assert re.search(r"^extra plot +matplotlib is (there|not there; pip install 'refimpl\[plot\]'): ", out, re.M)


def test_plot(run: Run, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", "run"]) == 0
    assert capsys.readouterr().out.strip() == "run/figure.png"
    assert Path("run/figure.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "run", "run", "--out", "both.svg"]) == 0
    assert Path("both.svg").is_file()


# --- export and import --------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    if isinstance(a, SparseWeight) and isinstance(b, SparseWeight):
        return a.support == b.support and a.values.tobytes() == b.values.tobytes()
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("to", [f for f in FORMATS if f != "torch" or available("crosscheck")])
def test_a_run_comes_back_from_every_format(to: str, run: Run, capsys: Capture) -> None:
    assert main(["export", "run", "--to", to]) == 0
    file = capsys.readouterr().out.strip()
    assert main(["export", "run", "--to", to]) == 2
    assert "is there already" in capsys.readouterr().err

    assert main(["import", file, "--out", "again.npz"]) == 0
    weights, _ = checkpoint.unpack_params(checkpoint.load("again.npz")[0])
    best = best_params(run)
    assert weights.keys() == best.keys()
    assert all(same(weights[name], best[name]) for name in best)

    assert main(["import", file, "--out", "again"]) == 0
    arrays, _ = checkpoint.load("again/checkpoints/best.npz")
    assert all(same(w, best[name]) for name, w in checkpoint.unpack_params(arrays)[0].items())
    capsys.readouterr()
    assert main(["eval", "run"]) == main(["eval", "again"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    assert lines[0] == lines[1]

    further = resume("again")
    assert further.state.step == 0
    assert all(same(w, best[name]) for name, w in further.state.params.items())
    further.train()
    further.close()
    # Training must beat what was imported, or leave it the best.
    after = RunFolder.open("again").best()
    assert after.meta["valid_loss"] <= run.state.best


def test_a_dense_file_from_elsewhere_begins_a_sparse_run(run: Run, capsys: Capture) -> None:
    dense = {name: values_of(w).copy() for name, w in Run(override(run.config, ["method=dense"])).state.params.items()}
    np.savez("theirs.npz", **dense)  # type: ignore[arg-type]
    arguments = ["import", "theirs.npz", "--out", "theirs"]
    assert main(arguments) == 2
    assert "does not say how its model was made; give --recipe" in capsys.readouterr().err
    arguments += ["--recipe", "selfish-lstm", "--data", "text", "--set", *TINY]
    assert main([*arguments, "embedding_size=9"]) == 2
    assert "'encoder.weight' has shape (21, 8) and the model's has (21, 9)" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "'encoder.weight' is float64 and the run is float32; set dtype=float64" in capsys.readouterr().err
    assert not Path("theirs").exists()
    assert main([*arguments, "dtype=float64"]) == 0
    with resume("theirs").folder as folder:  # type: ignore[union-attr]
        assert folder.checkpoints()[0].name == "step-00000000.npz"
    made = resume("theirs")
    weight = made.state.params["rnn.weight_hh_l0"]
    assert isinstance(weight, SparseWeight)
    assert weight.density == 1
    made.close()


def test_an_optimizer_remembers_nothing_of_the_random_weights_that_were_replaced(run: Run) -> None:
    made = Run(override(run.config, ["optimizer=adam", "lr=0.01", "sparsity=0.9"]))
    best = best_params(run)
    begin_with(made, best)
    for name, weight in made.state.params.items():
        assert same(weight, best[name])
        assert not np.shares_memory(values_of(weight), values_of(best[name]))
        assert all(slot.shape == values_of(weight).shape for slot in made.state.slots[name].values() if slot.ndim)
    assert made.train() == "finished"


def test_weights_that_are_not_the_models(run: Run, capsys: Capture) -> None:
    params = best_params(run)
    arrays = {name: w.dense() if isinstance(w, SparseWeight) else w for name, w in params.items()}
    shape = ["--out", "new", "--recipe", "selfish-lstm", "--data", "text", "--set", *TINY, "dtype=float64"]
    for wrong, says in (
        ({**arrays, "extra": np.ones(3)}, "the weights hold 'extra', which the model does not have"),
        ({n: a for n, a in arrays.items() if n != "decoder.bias"}, "the weights lack 'decoder.bias'"),
    ):
        np.savez("wrong.npz", **wrong)  # type: ignore[arg-type]
        assert main(["import", "wrong.npz", *shape]) == 2
        assert says in capsys.readouterr().err
    np.savez("tied.npz", **{**arrays, "decoder.weight": arrays["encoder.weight"] + 1})  # type: ignore[arg-type]
    assert main(["import", "tied.npz", *shape, "tied=true"]) == 2
    assert "decoder.weight differs from encoder.weight in a tied model" in capsys.readouterr().err
    np.savez("tied.npz", **{**arrays, "decoder.weight": arrays["encoder.weight"]})  # type: ignore[arg-type]
    assert main(["import", "tied.npz", *shape, "tied=true"]) == 0


def test_another_text_than_the_models(run: Run, capsys: Capture) -> None:
    assert main(["export", "run", "--to", "npz"]) == 0
    text = Path("text/train.txt").read_text()
    Path("text/train.txt").write_text(text.replace("w3", "w33"))
    capsys.readouterr()
    assert main(["import", "run/model.npz", "--out", "new"]) == 2
    assert "was trained on other words than those of the text 'text'" in capsys.readouterr().err
    assert not Path("new").exists()


# --- fetch --------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror() -> Iterator[str]:
    """A server on loopback that answers every question with the same few bytes."""

    class Wrong(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"not the published file")

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_keeps_nothing_with_a_wrong_checksum(mirror: str, capsys: Capture) -> None:
    assert main(["fetch", "ptb", "--mirror", mirror]) == 2
    err = capsys.readouterr().err
    assert "refimpl: error: ptb.train.txt was not kept: its sha256 must be" in err.splitlines()[-1]
    assert list(Path("data/ptb").iterdir()) == []


def test_fetch_without_a_network(capsys: Capture) -> None:
    assert main(["fetch", "ptb", "--mirror", "http://127.0.0.1:9"]) == 2
    assert "refimpl: error: ptb.train.txt could not be downloaded" in capsys.readouterr().err.splitlines()[-1]
