"""Methods side by side: the rows, what is not trained again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import TINY, write_text

from refimpl.cli import main
from refimpl.methods import METHODS
from refimpl.rng import Draws
from refimpl.training.adopt import begin_with
from refimpl.training.compare import compare, configured, names, table
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.loop import Run
from refimpl.training.report import best_params
from refimpl.training.start import resume
from refimpl.weights import SparseWeight

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def base(tmp_path: Path) -> Config:
    write_text(tmp_path / "text")
    return override(load_recipe("selfish-lstm"), [*TINY, "data.corpus=text", "threads=1"])


def test_every_method_trains_and_has_a_row(base: Config) -> None:
    rows = compare(base, names(), [1], "runs", settings=["interval=5", "scope=local", "scoring_rounds=3"])
    assert [row.method for row in rows] == names()
    by_name = {row.method: row for row in rows}
    for name, row in by_name.items():
        assert np.isfinite(row.loss)
        assert row.measure == "perplexity"
        assert row.step_ms > 0
        if name not in ("dense", "str", "iss"):
            assert abs(row.sparsity - 0.5) < 0.01, name
            if name not in ("dsr", "snfs", "granet"):  # in these, tensors of different cost exchange entries
                assert abs(row.flops_inference - 0.5) < 0.01, name
    dense = by_name["dense"]
    assert (dense.sparsity, dense.flops_training, dense.flops_inference, dense.explored) == (0, 1, 1, 1)
    assert by_name["static"].explored == pytest.approx(0.5, abs=0.01)
    assert by_name["set"].explored > by_name["static"].explored
    assert by_name["gmp"].explored == 1
    text = table(rows)
    assert all(f"\n{name} " in text for name in names())


def test_what_is_there_is_not_trained_again(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(base, ["static"], [1], "runs")
    trained = []
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda run, *rest: (trained.append(run.config.seed), train(run, *rest))[1])
    again = compare(base, ["static"], [1, 2], "runs")
    assert trained == [2]
    assert again[0] == first[0]
    with pytest.raises(ValueError, match="holds a run with other settings"):
        compare(override(base, ["lr=0.5"]), ["static"], [1], "runs")


def test_a_comparison_that_was_stopped_goes_on(base: Config) -> None:
    straight = compare(base, ["rigl"], [1], "straight")[0]

    class StopsOnce:
        """Asks the first run that it sees to stop."""

        asked = False

        def __call__(self, name: str, seed: int) -> StopsOnce:
            return self

        def started(self, run: Run) -> None:
            run.stop_asked = not self.asked
            self.asked = True

        def stepped(self, run: Run, result: object) -> None:
            pass

        evaluated = stepped
        finished = started

    stops = StopsOnce()
    with pytest.raises(KeyboardInterrupt):
        compare(base, ["rigl"], [1], "runs", observer=stops)  # type: ignore[arg-type]
    row = compare(base, ["rigl"], [1], "runs")[0]
    assert (row.loss, row.score, row.explored, row.flops_training) == (
        straight.loss, straight.score, straight.explored, straight.flops_training,
    )  # fmt: skip


def test_what_is_refused(base: Config) -> None:
    with pytest.raises(ValueError, match="nearest is 'rigl'"):
        configured(base, "rigel")
    with pytest.raises(ValueError, match="which imp cannot divide into rounds"):
        configured(override(base, ["epochs=5"]), "imp")
    assert configured(override(base, ["epochs=6"]), "imp").method.rounds == 3
    with pytest.raises(ValueError, match="imp cannot divide"):  # before the first run begins
        compare(override(base, ["epochs=5"]), ["static", "imp"], [1], "none")
    assert not Path("none").exists()


def test_the_command(base: Config, capsys: Capture) -> None:
    words = ["compare", "selfish-lstm", "--methods", "dense,set", "--data", "text", "--out", "runs", "--set", *TINY]
    assert main([*words, "--json", "rows.json"]) == 0
    out = capsys.readouterr().out
    assert "\nset, seed 1111\n" in out
    assert out.splitlines()[-1].startswith("set  ")
    rows = json.loads(Path("rows.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "set"]
    assert main([*words, "--plot", "figure.doc"]) == 2
    assert "ends in .png, .pdf or .svg" in capsys.readouterr().err
    assert main([*words, "--seeds", "1,x"]) == 2
    assert "--seeds is '1,x'" in capsys.readouterr().err


def test_the_figure(base: Config) -> None:
    pytest.importorskip("matplotlib")
    from refimpl.plots import save
    from refimpl.plots_compare import draw

    rows = compare(base, ["dense", "static"], [1, 2], "runs")
    figure = draw(rows)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["dense", "static"]
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert points == [[[row.flops_training, row.score] for row in rows if row.method == m] for m in ("dense", "static")]
    low, high = axes.get_ylim()
    assert low > high  # a lower perplexity is better, and stands higher
    save(figure, "figure.png")
    assert Path("figure.png").stat().st_size > 1000


def test_the_list_of_methods(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*METHODS, "power=2"]
    assert all(line.endswith((".", "?")) for line in lines)


@pytest.mark.parametrize("name", ["set", "str", "movement", "imp", "topkast", "gmp"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_given_weights_are_what_the_model_sees(base: Config, name: str, power: float) -> None:
    config = override(configured(base, name), [f"power={power}", "dtype=float64"])
    trained = Run(override(base, ["method=static", "dtype=float64", "max_steps=5"]))
    trained.train()
    given = best_params(trained)
    run = Run(config)
    begin_with(run, given)
    for key, weight in run.trainer.method.view(run.state.params).items():
        if name in ("set", "imp", "gmp"):  # the others use a part of what is stored
            seen = weight.dense() if isinstance(weight, SparseWeight) else weight
            wanted = given[key].dense() if isinstance(given[key], SparseWeight) else given[key]
            np.testing.assert_allclose(seen, wanted, rtol=1e-14, atol=0)
    assert run.train() == "finished"


def test_deepr_refuses_given_weights(base: Config) -> None:
    given = best_params(Run(override(base, ["method=static"])))
    with pytest.raises(ValueError, match="DeepR cannot begin with given weights"):
        begin_with(Run(configured(base, "deepr")), given)


def test_a_stopped_run_resumes_with_every_method(base: Config) -> None:
    # Whole runs of each method resume bit for bit in test_method_runs; here the files are those of a real run.
    from refimpl.training.start import start

    for name in ("imp", "snfs", "itop", "movement", "str"):
        config = override(configured(base, name), ["interval=5", "scope=local"])
        straight = Run(config)
        straight.train()
        run = start(config, f"runs/{name}")
        run.stop_asked = False
        for _ in range(7):
            run.trainer.step(*run.batches[run.state.window])
        run._save()
        run.close()
        resumed = resume(f"runs/{name}")
        resumed.train()
        for key, weight in straight.trainer.evaluated().items():
            other = resumed.trainer.evaluated()[key]
            a, b = (w.dense() if isinstance(w, SparseWeight) else w for w in (weight, other))
            assert np.array_equal(a, b), (name, key)
        resumed.close()


@pytest.mark.parametrize("name", ["gmp", "one-shot", "imp", "acdc"])
def test_the_best_model_has_the_final_density_however_low_the_loss_was_before(
    base: Config, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refimpl.training.language import LanguageTask
    from refimpl.training.start import start

    losses = iter(range(1, 100))  # of the validation text: rising, so that the first, dense, model has the lowest
    monkeypatch.setattr(LanguageTask, "evaluate", lambda task, params, part: {"loss": float(next(losses))})
    monkeypatch.setattr("refimpl.training.loop.perplexity", lambda loss: loss, raising=False)
    run = start(override(configured(base, name), ["epochs=4", "interval=5", "scope=local"]), "run")
    run.train()
    prunable = [key for key, spec in run.trainer.specs.items() if spec.prunable]
    stored = {key: weight for key, weight in best_params(run).items() if key in prunable}
    assert all(isinstance(weight, SparseWeight) for weight in stored.values())
    assert abs(sum(w.nnz for w in stored.values()) / sum(w.support.size for w in stored.values()) - 0.5) < 0.02
    run.close()


def test_after_a_rewind_the_learning_rate_and_the_draws_begin_again(
    base: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("refimpl.training.trainer.Draws", lambda seed, step: drawn.append(step) or Draws(seed, step))
    run = Run(override(configured(base, "imp"), ["schedule=cosine", "dropout_output=0.5", "scope=local"]))
    seen: list[tuple[int, float]] = []
    rate = run.trainer.learning_rate
    run.trainer.learning_rate = lambda step, epoch: seen.append((step, rate(step, epoch))) or rate(step, epoch)
    run.train()
    half = run.total_steps // 2
    rates = dict.fromkeys(seen)  # metrics ask again for the last of an epoch
    assert [s for s, _ in rates] == list(range(half))  # the second round asks for the same, from step 0 on
    assert drawn == [*range(1, half + 1), *range(1, half + 1)]
    cosine = Run(override(configured(base, "dense"), ["schedule=cosine", "epochs=1"])).trainer.learning_rate
    assert [lr for s, lr in rates] == [cosine(s, 0) for s, _ in rates]  # and each round runs through the whole schedule
