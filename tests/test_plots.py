"""Figures: what is read from the metrics, and what stands in which panel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.plots import History, _smoothed, draw, read_run, save
from refimpl.training.config import Config
from refimpl.training.metrics import MetricsWriter
from refimpl.training.run_folder import RunFolder


def records(exchanges: bool = True) -> list[dict[str, Any]]:
    """Return the records of two epochs of ten steps, of which the second one had no finite loss at its end."""
    counts = {"a": {"dropped": 5, "grown": 5, "regrown": 1}, "b": {"dropped": 2, "grown": 3, "regrown": 0}}
    gates = {"rnn.weight_hh_l0": {"i": 0.3, "f": 0.2, "g": 0.4, "o": 0.1}}
    later = {"rnn.weight_hh_l0": {"i": 0.3, "f": 0.4, "g": 0.4, "o": 0.1}}
    made: list[dict[str, Any]] = []
    for epoch in (1, 2):
        made += [{"kind": "step", "step": 10 * epoch - 5, "loss": 6.0 - epoch}]
        made += [{"kind": "exchange", "step": 10 * epoch - 3, "weights": counts}] if exchanges else []
        made += [
            {
                "kind": "epoch", "epoch": epoch, "step": 10 * epoch, "train_loss": 5.0, "trigger": epoch == 2,
                "valid_loss": 5.0 if epoch == 1 else None, "valid_perplexity": 148.4 if epoch == 1 else None,
                "gate_density": ({} if not exchanges else gates if epoch == 1 else later),
                "exchanged": counts if exchanges and epoch == 1 else {},
            }
        ]  # fmt: skip
    return made


def test_a_history_is_what_the_records_say() -> None:
    run = History.of("run", records())
    assert run.train_loss.step.tolist() == [5, 15]
    assert run.train_loss.value.tolist() == [5, 4]
    assert run.valid_loss.step.tolist() == [10, 20]
    assert run.valid_loss.value[0] == 5
    assert np.isnan(run.valid_loss.value[1])
    assert run.gates["rnn.weight_hh_l0"]["f"].value.tolist() == [0.2, 0.4]
    assert run.updates["dropped"].step.tolist() == [7, 10, 17]
    assert run.updates["grown"].value.tolist() == [8, 8, 8]
    assert run.updates["regrown"].value.tolist() == [1, 1, 1]
    assert run.averaging_from == 20


def test_a_run_without_records_is_refused() -> None:
    with pytest.raises(ValueError, match="'run' has recorded nothing yet"):
        History.of("run", [])


def test_the_running_mean_starts_without_bias_and_steps_over_nan() -> None:
    assert _smoothed(np.array([2.0, np.nan, 2.0, 2.0])) == pytest.approx([2.0, 2.0, 2.0, 2.0])
    assert _smoothed(np.array([0.0, 1.0])) == pytest.approx([0, 1 / 1.9])


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", Config(), {}) as folder:
        with pytest.raises(ValueError, match="recorded nothing yet"):
            read_run(folder.path)
        with MetricsWriter(folder.metrics_path) as metrics:
            for record in records():
                metrics.append(record)
        assert read_run(tmp_path / "run").label == "run"


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title().partition("\n")[0]: axis for axis in figure.axes if axis.axison}


def test_every_panel_has_a_title_units_and_a_legend() -> None:
    pytest.importorskip("matplotlib")
    figure = draw([History.of("run", records())])
    found = panels(figure)
    assert list(found) == [
        "Loss (dotted: averaging begins)", "Validation perplexity", "Density of the gates of rnn.weight_hh_l0",
        "Weights moved by each exchange",
    ]  # fmt: skip
    for axis in found.values():
        assert axis.get_xlabel() == "training step"
        assert axis.get_ylabel()
        assert axis.get_legend() is not None
    gates = found["Density of the gates of rnn.weight_hh_l0"]
    assert [line.get_label() for line in gates.get_lines()] == ["i", "f", "g", "o"]
    assert gates.get_lines()[1].get_ydata().tolist() == [0.2, 0.4]


def test_several_runs_are_told_apart() -> None:
    pytest.importorskip("matplotlib")
    runs = [History.of("sparse", records()), History.of("dense", records(exchanges=False)), History.of("x", records())]
    found = panels(draw(runs))
    labels = [text.get_text() for text in found["Validation perplexity"].get_legend().get_texts()]
    assert labels == ["sparse, best 148.4", "dense, best 148.4", "x, best 148.4"]
    gates = found["Density of the gates of rnn.weight_hh_l0"]
    assert gates.get_title().endswith("\nsolid: sparse, dotted: x")
    assert {line.get_linestyle() for line in gates.get_lines()} == {"-", ":"}
    assert len(gates.get_legend().get_texts()) == 4


def test_dense_runs_have_no_gates_and_no_exchange() -> None:
    pytest.importorskip("matplotlib")
    found = panels(draw([History.of("dense", records(exchanges=False))]))
    assert list(found) == ["Loss (dotted: averaging begins)", "Validation perplexity", "Weights moved by each exchange"]
    assert "no exchange" in [text.get_text() for text in found["Weights moved by each exchange"].texts]


def test_a_figure_of_every_format(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = draw([History.of("run", records())])
    for ending, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        save(figure, tmp_path / "new" / f"figure.{ending}")
        assert (tmp_path / "new" / f"figure.{ending}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match=r"ends in \.png, \.pdf or \.svg"):
        save(figure, tmp_path / "figure.bmp")
    with pytest.raises(ValueError, match="no run is given"):
        draw([])
