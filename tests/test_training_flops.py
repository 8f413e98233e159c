"""Operations that runs count as executed, against closed forms; and the formulas of the literature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.methods import Allocation, Static, TopKAST
from refimpl.models.language_model import LanguageModel
from refimpl.testing.training import tiny_config, tiny_corpus
from refimpl.training import flop_account, flops, published
from refimpl.training.loop import Observer, Run
from refimpl.training.report import report
from refimpl.training.run_folder import RunFolder
from refimpl.training.trainer import StepResult
from refimpl.weights import ParamSpec, values_of

TOKENS = 64 * 4  # predictions of an epoch of the tiny corpus: 65 rows in 4 columns


def trained(method: dict[str, Any], optimizer: dict[str, Any] | None = None, observer: Observer | None = None) -> Run:
    """Return a run that has trained for two epochs."""
    run = Run(tiny_config(method=method, optimizer=optimizer or {}), tiny_corpus())
    assert run.train(observer) == "finished"
    return run


def executed(run: Run) -> float:
    """Return all operations of a run so far."""
    return flops.total(run.state.flops["executed"])


def forward_of(run: Run) -> tuple[float, float]:
    """Return f_S and f_D, the forward operations for a token: 2 for each entry but those that are looked up."""
    names = [name for name in run.state.params if "weight" in name and name != "encoder.weight"]
    stored = sum(values_of(run.state.params[name]).size for name in names)
    whole = sum(run.trainer.specs[name].size for name in names)
    return 2.0 * stored, 2.0 * whole


@pytest.mark.parametrize("name", ["dense", "static", "set", "selfish"])
def test_three_forward_passes_a_step(name: str) -> None:
    """3f_S; backward of the first LSTM layer has an input gradient, for the embedding is trained."""
    run = trained({"name": name})
    sparse, dense = forward_of(run)
    assert executed(run) == 2 * TOKENS * 3 * sparse
    assert (sparse == dense) == (name == "dense")


class CountExchanges(Observer):
    """Sums up the tokens of the batches whose gradients decided an exchange."""

    def __init__(self) -> None:
        self.tokens = 0

    def stepped(self, run: Run, result: StepResult) -> None:
        """Count the batch."""
        if result.exchanges:
            self.tokens += run.batches[run.state.window - 1][0].size


@pytest.mark.parametrize("when", ["instead", "after"])
def test_rigl_adds_a_dense_weight_gradient_to_each_exchange(when: str) -> None:
    counted = CountExchanges()
    method = {"name": "rigl", "interval": 4, "end_fraction": 0.75, "convention": {"exchange_step": when}}
    run = trained(method, observer=counted)
    sparse, dense = forward_of(run)
    assert counted.tokens == 20 * 4  # steps 4, 8, 12 and 16 of 26; the end at 20 (19.5 rounded) has none; none is short
    assert executed(run) == 2 * TOKENS * 3 * sparse + counted.tokens * (dense - sparse)


def test_topkast_counts_its_two_sets() -> None:
    run = trained({"name": "topkast", "sparsity": 0.6, "backward_sparsity": 0.3, "refresh": 3})
    used, graded = run.trainer.used(), run.trainer.graded()
    assert {name: round(spec.size * 0.4) for name, spec in run.trainer.specs.items() if spec.prunable} == used
    assert {name: round(spec.size * 0.7) for name, spec in run.trainer.specs.items() if spec.prunable} == graded
    forward, backward = (2.0 * (sum(n.values()) - n["encoder.weight"]) for n in (used, graded))
    assert executed(run) == 2 * TOKENS * (2 * forward + backward)


def test_whole_gradients_that_conventions_ask_for_are_counted() -> None:
    """Clipping by the dense norm evaluates every gradient everywhere; so does an average that leaks."""
    clipping = trained({"name": "static", "convention": {"clip_norm": "dense"}}, {"clip": 0.1})
    sparse, dense = forward_of(clipping)
    assert executed(clipping) == 2 * TOKENS * (2 * sparse + dense)
    unused = trained({"name": "static", "convention": {"clip_norm": "dense"}})
    assert executed(unused) == 2 * TOKENS * 3 * sparse
    leaking = Run(tiny_config(method={"name": "static"}, optimizer={"name": "nt-asgd", "leak": True}), tiny_corpus())
    leaking.trainer.start_averaging()
    leaking.train()
    assert executed(leaking) == 2 * TOKENS * (2 * sparse + dense)


def test_a_first_layer_has_no_input_gradient() -> None:
    first = ParamSpec("first", (4, 3), "linear", True, input_gradient=False)
    second = ParamSpec("second", (5, 4), "linear", True, columns_per_sample=7.0)
    specs = {"first": first, "second": second}
    full = {"first": 12, "second": 20}
    assert flops.step(specs, full, full, samples=10) == 10 * (2 * 2 * 12 + 7 * 3 * 2 * 20)
    assert flops.forward(specs, full) == 2 * 12 + 7 * 2 * 20


def test_a_tied_decoder_is_multiplied_and_looked_up() -> None:
    specs = LanguageModel(40, 8, 8, 1, tied=True).specs()
    sizes = {name: spec.size for name, spec in specs.items() if spec.kind != "bias"}
    assert flops.forward(specs, sizes) == 2 * (40 * 8 + 2 * 32 * 8)


def test_the_papers_lstm() -> None:
    """2 × 1500 units, 10,000 words: 51 M multiplied entries, 7.14e10 operations a mini-batch of 35 × 20 tokens."""
    specs = LanguageModel(10_000, 1500, 1500, 2).specs()
    whole = {name: spec.size for name, spec in specs.items() if spec.kind != "bias"}
    assert flops.forward(specs, whole) * 35 * 20 == 2 * (4 * 6000 * 1500 + 10_000 * 1500) * 700 == 7.14e10
    third = {name: round(size * 0.33) for name, size in whole.items()}
    assert flops.forward(specs, third) / flops.forward(specs, whole) == pytest.approx(0.33, abs=1e-12)


def test_the_sets_that_are_counted() -> None:
    """A counter that took S for B, or A for S, would give other numbers above: the three differ."""
    run = Run(tiny_config(method={"name": "static"}), tiny_corpus())
    for method in (Static(Allocation(0.4)), TopKAST(Allocation(0.4), exploration=0.1)):
        params = run.trainer.model.init(0, np.float64, method.supports(run.trainer.specs, seed=0))
        run.trainer.method, run.state.params = method, params
        used, graded = run.trainer.used(), run.trainer.graded()
        stored = {name: values_of(params[name]).size for name in used}
        if method.name == "topkast":
            assert all(used[name] < graded[name] < stored[name] for name in used)
        else:
            assert used == graded == stored


# --- the account ---


def test_terms_say_what_operations_were_for() -> None:
    method = {"name": "rigl", "interval": 4, "end_fraction": 0.75, "convention": {"clip_norm": "dense"}}
    run = trained(method, {"clip": 0.1})
    sparse, dense = forward_of(run)
    steps, exchanges = 2 * TOKENS, 4 * 20  # in tokens
    assert run.state.flops["executed"] == {
        "forward": steps * sparse,
        "input_gradient": steps * sparse,
        "weight_gradient": steps * sparse,
        "growth": exchanges * (dense - sparse),
        "dense_norm": (steps - exchanges) * (dense - sparse),
    }
    assert run.state.flops["samples"] == {"executed": steps, "published": steps + exchanges}
    assert set(run.state.flops["executed"]) < set(flops.TERMS)


def test_a_gradient_is_counted_once_for_several_reasons() -> None:
    """Growth after the step and the dense norm need the same one; what grows comes first."""
    specs = {"w": ParamSpec("w", (4, 5), "linear", True), "v": ParamSpec("v", (5, 2), "linear", True)}
    sets = {"w": 5, "v": 4}
    terms = flops.step_terms(specs, sets, sets, 3, {"growth": ["w"], "dense_norm": ["w", "v"]})
    assert (terms["growth"], terms["dense_norm"]) == (3 * 2 * 15, 3 * 2 * 6)
    method = {"name": "rigl", "interval": 4, "convention": {"clip_norm": "dense", "exchange_step": "after"}}
    run = trained(method, {"clip": 0.1})
    _, dense = forward_of(run)
    account = run.state.flops["executed"]
    assert sum(account[term] for term in ("weight_gradient", "growth", "dense_norm")) == 2 * TOKENS * dense


@pytest.mark.parametrize("name", ["dense", "set", "rigl", "topkast"])
def test_books_balance(name: str) -> None:
    """Executed = published + differences, to the last operation."""
    account = trained({"name": name, "interval": 4, "backward_sparsity": 0.3, "refresh": 3}).state.flops
    executed, formula, between = (flops.total(account[kind]) for kind in ("executed", "published", "differences"))
    assert executed == formula + between
    assert (between != 0) == (name == "rigl")


def test_metrics_and_report_show_the_account(tmp_path: Path) -> None:
    config = tiny_config(method={"name": "rigl", "interval": 4})
    corpus = tiny_corpus()
    folder = RunFolder.create(tmp_path / "run", config, {"sha256": corpus.sha256})
    run = Run(config, corpus, folder)
    run.train()
    found = report(run, repeats=0)
    run.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"][-1]
    account = run.state.flops
    assert record["flops_terms"] == found.flops_terms == account["executed"]
    assert record["flops"] == executed(run)
    sparse, dense = forward_of(run)
    assert found.flops_training == executed(run) / (2 * TOKENS * 3 * dense)
    assert found.flops_published == pytest.approx(flops.total(account["published"]) / dense / 3 / 592)
    assert account["samples"]["published"] == 592 == 512 + 80
    assert found.flops_inference == sparse / dense
    assert "as published: (3 f_S dT + 2 f_S + f_D) / (dT + 1)" in found.text()


def test_the_counter_forgets_nothing_when_sets_change() -> None:
    """Terms are kept between steps; another support, another reason or another batch makes them anew."""
    specs = {"w": ParamSpec("w", (4, 5), "linear", True)}
    formula = published.FORMULAS["rigl"]
    steps: list[tuple[int, int, int, dict[str, list[str]]]] = [
        (5, 5, 1, {}), (5, 5, 2, {}), (6, 5, 1, {}), (6, 7, 1, {}), (6, 7, 1, {"growth": ["w"]}),
        (6, 7, 1, {"dense_norm": ["w"]}), (6, 7, 1, {}), (5, 5, 1, {}),
    ]  # fmt: skip
    together, apart = flop_account.new_account(), flop_account.new_account()
    counter = flop_account.StepCounter(formula, specs)
    for used, graded, samples, whole in steps:
        counter.add(together, {"w": used}, {"w": graded}, samples, whole)
        flop_account.StepCounter(formula, specs).add(apart, {"w": used}, {"w": graded}, samples, whole)
    assert together == apart


# --- planted mistakes ---


def _inputs_twice(specs: Any, used: Any, graded: Any, samples: int, whole: Any = None) -> dict[str, float]:
    terms = _step_terms(specs, used, graded, samples, whole)
    return terms | {"input_gradient": terms["forward"] + terms["input_gradient"]}


def _gradient_on_a(specs: Any, used: Any, graded: Any, samples: int, whole: Any = None) -> dict[str, float]:
    return _step_terms(specs, used, used, samples, whole)


def _growth_over_all(specs: Any, used: Any, graded: Any, samples: int, whole: Any = None) -> dict[str, float]:
    terms = _step_terms(specs, used, graded, samples, whole)
    return terms | {reason: terms[reason] + terms["weight_gradient"] for reason in whole or {}}


_step_terms = flops.step_terms


@pytest.mark.parametrize("mutant", [_inputs_twice, _gradient_on_a, _growth_over_all])
def test_catches_a_wrong_count(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "step_terms", mutant)

    def checks() -> None:
        test_rigl_adds_a_dense_weight_gradient_to_each_exchange("instead")
        test_topkast_counts_its_two_sets()

    with pytest.raises(AssertionError):
        checks()
