"""Operations by phase: of a plan, of a run, closed forms; published schedules as recipes; data that are not there."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_datasets_images import write_idx
from test_training_classification import part

from refimpl.analysis import flops_by_phase
from refimpl.analysis.flops_by_phase import PhaseTable, of_forecast, of_run
from refimpl.cli import FAILED, main
from refimpl.datasets import CATALOGUE
from refimpl.datasets.sizes import IMAGE_SIZES
from refimpl.methods import Allocation, Dense
from refimpl.methods.acdc import ACDC
from refimpl.methods.phases import Phases
from refimpl.testing.quadratic import QuadraticModel
from refimpl.training import flops, published
from refimpl.training.build import make_method
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.corpora import open_corpus
from refimpl.training.loop import Observer, Run
from refimpl.training.simulate import planned, planned_run
from refimpl.training.start import start
from refimpl.training.workload import Workload, images_left, published_sizes

pytestmark = pytest.mark.usefixtures("own_folder")

# --- plans


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=9), st.sampled_from([0.1, 0.2, 0.5]), st.integers(1, 3))
def test_the_phases_of_a_plan(lengths: list[int], density: float, cut: int) -> None:
    """Dense phases cost what dense training does, compressed ones what static training at their density would."""
    check_phases(lengths, density, cut)


def check_phases(lengths: list[int], density: float, cut: int) -> None:
    lengths = lengths[: len(lengths) // 2 * 2]  # dense first, compressed last
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    phases, epochs, steps = Phases(tuple(starts[1::2]), tuple(starts[2::2])), sum(lengths), 5
    model: Any = QuadraticModel()
    method = ACDC(Allocation(density), phases, epoch_steps=steps, scope="local")
    found = planned(model, method, Workload((3,) * (steps - 1) + (1,), epochs * steps - cut))  # the last is cut short
    table = of_forecast(found)
    assert [(p.start, p.stop) for p in table.phases] == list(zip(starts, [*starts[1:], epochs], strict=True))
    assert [p.kind for p in table.phases] == ["dense", "compressed"] * (len(lengths) // 2)
    whole = {name: spec.size for name, spec in found.specs.items()}
    compressed = flops.step(found.specs, found.last.used, found.last.used, 1)
    dense = flops.step(found.specs, whole, whole, 1)
    samples = [length * (3 * (steps - 1) + 1) for length in lengths]
    samples[-1] -= sum(((3,) * (steps - 1) + (1,))[-cut:])
    for phase, count in zip(table.phases, samples, strict=True):
        assert phase.executed == count * (dense if phase.kind == "dense" else compressed)
        assert phase.dense == count * dense
        assert phase.fraction == phase.executed / phase.dense
    assert table.executed == flops.total(found.total["executed"]) == sum(p.executed for p in table.phases)
    assert table.fraction == table.executed / (dense * sum(samples))
    assert table.share("dense") + table.share("compressed") == pytest.approx(1, rel=1e-15)
    kinds: Any = [(phase.kind, count) for phase, count in zip(table.phases, samples, strict=True)]
    f_s, f_d = (Fraction(flops.forward(found.specs, used)) for used in (found.last.used, whole))
    mean = Fraction(flops.total(found.total["published"])) / sum(samples)
    assert mean == published.acdc(f_d, f_s, kinds)


def test_a_run_in_the_middle_has_the_phases_so_far() -> None:
    phases = Phases((2, 6), (4,))
    whole = phases.until(8)
    assert phases.within(8) == whole
    assert phases.within(5) == [*whole[:2], whole[2]._replace(stop=5)]
    assert phases.within(4) == whole[:2]
    assert phases.within(1) == [whole[0]._replace(stop=1)]


def test_methods_without_phases_have_no_table() -> None:
    model: Any = QuadraticModel()
    with pytest.raises(ValueError, match="has no dense and compressed phases; give a run of AC/DC"):
        of_forecast(planned(model, Dense(), Workload((1,) * 4, 8)))


# --- runs

SMALL = (
    "model=resnet", "depth=8", "width=4", "task=classification", "batch_size=7", "eval_batch_size=4", "epochs=5",
    "optimizer=sgd", "lr=0.05", "method=acdc", "sparsity=0.5", "allocation=uniform", "compress=[1, 3]",
    "decompress=[2]",
)  # fmt: skip


def small(folder: Path, *more: str) -> Config:
    """Return the configuration of a small run on images in a folder."""
    where = write_idx(folder / "images", part(40, 0, (1, 6, 5)), part(9, 2, (1, 6, 5)))
    return override(load_recipe("mlp-fashion-mnist-dense"), ["sizes=[300, 100]", *SMALL, f"data.corpus={where}", *more])


@pytest.mark.parametrize(
    "more", [(), ("scope=local",), ("max_steps=28",), ("pattern=2:4", "method.density.conv1.weight=1")]
)
def test_the_phases_of_a_run(tmp_path: Path, more: tuple[str, ...]) -> None:
    """A residual network, with batch norm: what was executed is what was planned, epoch by epoch."""
    run = start(small(tmp_path, *more), tmp_path / "run")
    run.train()
    run.close()
    table = of_run(tmp_path / "run")
    assert table.executed == flops.total(run.state.flops["executed"])
    assert [(p.kind, p.start, p.stop) for p in table.phases] == [
        ("dense", 0, 1), ("compressed", 1, 2), ("dense", 2, 3), ("compressed", 3, 5),
    ]  # fmt: skip
    assert [p.fraction for p in table.phases if p.kind == "dense"] == [1, 1]
    assert all(0.3 < p.fraction < 0.8 for p in table.phases if p.kind == "compressed")
    found = planned_run(run.config)
    if "scope=local" in more or "pattern=2:4" in more:
        assert found.total == run.state.flops
        assert of_forecast(found) == table
    # Of all tensors ranked together a plan knows who wins by the initial weights alone.
    assert sum(found.last.used.values()) == sum(run.trainer.used().values())


@pytest.mark.parametrize(
    "method",
    [
        ("rigl", "interval=4", "allocation=erk"),
        ("topkast", "refresh=4", "backward_sparsity=0.3"),
        ("snip", "scope=local"),
        ("gmp", "interval=4"),
    ],
)
@pytest.mark.parametrize("model", [("resnet", "depth=8", "width=4", "shortcut=B"), ("small-conv", "widths=[8, 4]")])
def test_convolutions_of_other_methods(tmp_path: Path, method: tuple[str, ...], model: tuple[str, ...]) -> None:
    """What is planned for a run of a convolutional network is what it executes, term by term."""
    plain = ["depth='auto'", "width='auto'", "compress='auto'", "decompress='auto'"]
    settings_ = [*plain, f"method={method[0]}", *method[1:], f"model={model[0]}", *model[1:]]
    run = Run(small(tmp_path, *settings_))
    run.train()
    assert planned_run(run.config).total == run.state.flops


class Stopping(Observer):
    """Stops a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, run: Run, result: Any) -> None:
        """Ask to stop."""
        run.stop_asked = run.state.step >= self.step


def test_a_run_that_has_not_come_far(tmp_path: Path) -> None:
    run = start(small(tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match=r"no epoch of the run in '.*run' has ended yet; let it train for one"):
        of_run(tmp_path / "run")
    run.train(Stopping(8))  # an epoch is 6 steps
    table = of_run(tmp_path / "run")
    run.close()
    assert [(p.kind, p.start, p.stop, p.fraction) for p in table.phases] == [("dense", 0, 1, 1)]
    other = start(small(tmp_path, "method=static"), tmp_path / "static")
    other.train()
    other.close()
    with pytest.raises(ValueError, match="has no dense and compressed phases"):
        of_run(tmp_path / "static")


def test_the_figure_has_the_operations_as_areas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from refimpl.plots_flops import draw

    table = of_forecast(planned_run(small(tmp_path)))
    figure = draw(table, "a run")
    axes = figure.axes[0]
    areas = sorted(bar.get_width() * bar.get_height() for bar in axes.patches)
    assert areas == pytest.approx(sorted((p.stop - p.start) * p.fraction for p in table.phases), rel=1e-12)
    assert sorted(bar.get_x() for bar in axes.patches) == [p.start for p in table.phases]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"whole run: {table.fraction:.3f}" in texts
    assert any(text.startswith("dense: ") for text in texts)
    assert axes.get_title() == "a run"
    figure.savefig(tmp_path / "figure.png")


# --- published schedules

REGULAR: dict[str, int] = {"warmup": 10, "compressed": 5, "dense": 5, "last_dense": 10, "final": 15}
WIDE: dict[str, int] = {"warmup": 10, "compressed": 20, "dense": 20, "final": 30}
RECIPES: dict[str, tuple[int, dict[str, int], int]] = {
    # epochs, the lengths of the parts, and how many epochs are compressed
    "acdc-resnet50-imagenet": (100, REGULAR, 50),
    "acdc-resnet50-imagenet-uniform": (100, REGULAR, 50),
    "acdc-resnet50-imagenet-2of4": (100, REGULAR, 50),
    "acdc-resnet50-imagenet-150ep": (150, REGULAR, 75),
    "acdc-resnet50-imagenet-2x": (200, REGULAR, 100),
    "acdc-mobilenet-imagenet": (100, REGULAR, 50),
    "acdc-wrn28-10-cifar100-freq20": (200, WIDE, 110),
    "acdc-wrn28-10-cifar100-dense13": (225, {**WIDE, "dense": 13, "final": 50}, 150),
    "acdc-resnet20-cifar10-memorisation": (200, WIDE, 110),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_phases(name: str) -> None:
    epochs, lengths, compressed = RECIPES[name]
    config = load_recipe(name)
    assert config.training.epochs == epochs
    method = make_method(config, 10 * epochs, 10)
    assert isinstance(method, ACDC)
    assert method.phases == Phases.regular(epochs, **lengths)
    assert sum(p.length for p in method.phases.until(epochs) if p.kind == "compressed") == compressed
    assert method.reset_momentum
    assert method.count == "strict-threshold"
    options, imagenet = config.optimizer, "imagenet" in name
    assert (options.name, options.nesterov) == ("sgd", "wrn" in name)
    assert config.training.batch_size == (256 if imagenet else 128)
    assert config.training.label_smoothing == 0


def test_recipes_of_one_experiment_differ_in_what_they_say() -> None:
    """The dense baseline of a network and its AC/DC runs have one optimizer, one model and one length."""
    for dense, own in (
        ("dense-resnet50-imagenet", "acdc-resnet50-imagenet-uniform"),
        ("dense-mobilenet-imagenet", "acdc-mobilenet-imagenet"),
        ("dense-wrn28-10-cifar100", "acdc-wrn28-10-cifar100-freq20"),
    ):
        first, second = load_recipe(dense), load_recipe(own)
        assert (first.model, first.optimizer, first.training, first.data) == (
            second.model, second.optimizer, second.training, second.data,
        )  # fmt: skip


# --- data that are not there


def test_sizes_of_published_data() -> None:
    assert {name for name, sizes in IMAGE_SIZES.items() if sizes.readable} == {
        name for name in CATALOGUE if name not in ("ptb", "wikitext-2")
    }
    config = load_recipe("acdc-wrn28-10-cifar100-freq20")
    known = published_sizes(config)
    assert known is not None
    assert (images_left(config, known), known.classes) == (45_000, 100)
    config = load_recipe("acdc-resnet50-imagenet")
    known = published_sizes(config)
    assert known is not None
    assert (images_left(config, known), known.shape) == (1_281_167, (3, 224, 224))
    assert published_sizes(override(config, ["data.corpus=data/elsewhere"])) is None


def test_a_plan_without_the_images_is_the_plan_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same but for its note; a folder that is there is read."""
    config = small(tmp_path)
    with_them = planned_run(config)
    sizes = IMAGE_SIZES["mnist"]._replace(train=40, shape=(1, 6, 5), classes=3)
    monkeypatch.setitem(IMAGE_SIZES, "drawn", sizes)
    monkeypatch.setitem(IMAGE_SIZES, "images", sizes._replace(train=10**6))
    without = planned_run(override(config, ["data.corpus=nowhere/drawn"]))
    assert without.notes[0] == "no image was read: drawn has 36 of 1 x 6 x 5 to train on"
    assert (without.total, without.specs, without.epochs) == (with_them.total, with_them.specs, with_them.epochs)
    assert with_them.notes == without.notes[1:] == planned_run(config).notes


def test_training_on_what_no_reader_reads_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.corpus is 'data/imagenet', and there is no reader of that data set"):
        open_corpus(load_recipe("acdc-resnet50-imagenet"))
    assert main(["train", "acdc-resnet50-imagenet", "--out", "run"]) == FAILED
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "`refimpl flops` counts such a run without them" in captured.err
    assert not list(tmp_path.iterdir())


# --- the command


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what the command prints."""
    assert main(["flops", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_shows_phases_and_the_authors_counts(capsys: pytest.CaptureFixture[str]) -> None:
    name = "acdc-resnet50-imagenet-uniform"
    more = ("--set", "batch_size=100000", "sparsity=0.8")
    lines = shown(capsys, name, *more)
    assert "25,502,912 weights in 54 tensors, of which 25,502,912 in 54 are prunable" in lines
    assert re.search(r"AC/DC's authors  f_D = 8,212,112,872, .*\(fraction 0\.2267\); training 0\.613\d", lines)
    assert re.search(r"RigL's authors   f_D = 8,202,340,776, ", lines)
    assert len(re.findall(r"^compressed +\d+-\d+ ", lines, re.M)) == 8
    assert re.search(r"^dense +75-84 +\S+ +1\.0000 ", lines, re.M)
    assert re.search(r"^all +0-99 ", lines, re.M)
    assert "note: no image was read: imagenet has 1,281,167 of 3 x 224 x 224 to train on" in lines
    assert max(map(len, lines.splitlines())) <= 120
    found = json.loads(shown(capsys, name, *more, "--json"))
    assert [p["stop"] - p["start"] for p in found["phases"]] == [10, *[5] * 13, 10, 15]
    assert sum(p["executed"] for p in found["phases"]) == pytest.approx(sum(found["epochs"]), rel=1e-14)
    their = found["countings"]["AC/DC's authors"]
    assert their["dense"] == 8_212_112_872
    assert their["besides"] == {
        "bias": 1000, "normalisation": 22_227_968, "rectifiers": 9_608_704, "pooling": 1_906_688,
    }  # fmt: skip
    assert their["training_operations"] == pytest.approx(their["training"] * 3.156e18, rel=2e-4)


def test_the_command_without_phases_and_other_counts(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "mlp-fashion-mnist-set")
    assert "as in authors' programs" not in lines
    assert not re.search("^phase ", lines, re.M)
    found = json.loads(shown(capsys, "mlp-fashion-mnist-set", "--json"))
    assert found["countings"] == {}
    assert found["phases"] == []


# --- planted mistakes


def test_catches_records_that_are_taken_for_differences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A record has the operations of the run so far."""
    monkeypatch.setattr(flops_by_phase, "pairwise", lambda values: [(0.0, value) for value in values[1:]])
    with pytest.raises(AssertionError):
        test_the_phases_of_a_run(tmp_path, ("scope=local",))


@pytest.mark.parametrize(
    "mistake", ["the first layer's input gradient", "a phase too early", "the last phase left out"]
)
def test_catches_mistakes_in_the_table(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    kept = flops_by_phase._table

    def table(phases: Any, executed: Any, samples: Any, specs: Any) -> PhaseTable:
        if mistake == "a phase too early":
            phases = [p._replace(start=max(p.start - 1, 0), stop=p.stop - (p is not phases[-1])) for p in phases]
        if mistake == "the last phase left out":
            phases = phases[:-1]
        if mistake.startswith("the first"):
            from dataclasses import replace

            specs = {name: replace(spec, input_gradient=not spec.input_gradient) for name, spec in specs.items()}
        return kept(phases, executed, samples, specs)

    monkeypatch.setattr(flops_by_phase, "_table", table)
    with pytest.raises(AssertionError):
        check_phases([2, 1, 2, 3], 0.2, 1)


def test_catches_a_batch_that_is_counted_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last batch of an epoch has 1 image, not 7."""
    monkeypatch.setattr(Workload, "of_epoch", lambda self, epoch: self.samples[0] * len(self.samples))
    with pytest.raises(AssertionError):
        test_the_phases_of_a_run(tmp_path, ("scope=local",))
