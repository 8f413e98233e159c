"""Operations that runs count as executed, against closed forms; and the formulas of the literature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.methods import Allocation, Static, TopKAST
from refimpl.models.language_model import LanguageModel
from refimpl.testing.training import tiny_config, tiny_corpus
from refimpl.training import flops
from refimpl.training.loop import Observer, Run
from refimpl.training.trainer import StepResult
from refimpl.weights import ParamSpec, values_of

TOKENS = 64 * 4  # predictions of an epoch of the tiny corpus: 65 rows in 4 columns


def trained(method: dict[str, Any], optimizer: dict[str, Any] | None = None, observer: Observer | None = None) -> Run:
    """Return a run that has trained for two epochs."""
    run = Run(tiny_config(method=method, optimizer=optimizer or {}), tiny_corpus())
    assert run.train(observer) == "finished"
    return run


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
    assert run.state.flops == 2 * TOKENS * 3 * sparse
    assert (sparse == dense) == (name == "dense")


class CountExchanges(Observer):
    """Sums up the tokens of the batches whose gradients decided an exchange."""

    def __init__(self) -> None:
        self.tokens = 0

    def stepped(self, run: Run, result: StepResult) -> None:
        """Count the batch."""
        if result.exchanges:
            self.tokens += run.windows[run.state.window - 1][0].size


@pytest.mark.parametrize("when", ["instead", "after"])
def test_rigl_adds_a_dense_weight_gradient_to_each_exchange(when: str) -> None:
    counted = CountExchanges()
    method = {"name": "rigl", "interval": 4, "end_fraction": 0.75, "convention": {"exchange_step": when}}
    run = trained(method, observer=counted)
    sparse, dense = forward_of(run)
    assert counted.tokens == 20 * 4  # steps 4, 8, 12 and 16 of 26; the end at 20 (19.5 rounded) has none; none is short
    assert run.state.flops == 2 * TOKENS * 3 * sparse + counted.tokens * (dense - sparse)


def test_topkast_counts_its_two_sets() -> None:
    run = trained({"name": "topkast", "sparsity": 0.6, "backward_sparsity": 0.3, "refresh": 3})
    used, graded = run.trainer.used(), run.trainer.graded()
    assert {name: round(spec.size * 0.4) for name, spec in run.trainer.specs.items() if spec.prunable} == used
    assert {name: round(spec.size * 0.7) for name, spec in run.trainer.specs.items() if spec.prunable} == graded
    forward, backward = (2.0 * (sum(n.values()) - n["encoder.weight"]) for n in (used, graded))
    assert run.state.flops == 2 * TOKENS * (2 * forward + backward)


def test_whole_gradients_that_conventions_ask_for_are_counted() -> None:
    """Clipping by the dense norm evaluates every gradient everywhere; so does an average that leaks."""
    clipping = trained({"name": "static", "convention": {"clip_norm": "dense"}}, {"clip": 0.1})
    sparse, dense = forward_of(clipping)
    assert clipping.state.flops == 2 * TOKENS * (2 * sparse + dense)
    unused = trained({"name": "static", "convention": {"clip_norm": "dense"}})
    assert unused.state.flops == 2 * TOKENS * 3 * sparse
    leaking = Run(tiny_config(method={"name": "static"}, optimizer={"name": "nt-asgd", "leak": True}), tiny_corpus())
    leaking.trainer.start_averaging()
    leaking.train()
    assert leaking.state.flops == 2 * TOKENS * (2 * sparse + dense)


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


def test_published_formulas() -> None:
    r"""Dense 3f_D; static, SET and Selfish 3f_S; RigL (3f_S ΔT + 2f_S + f_D)/(ΔT + 1); Top-KAST 2f_A + f_B."""
    specs = LanguageModel(40, 9, 8, 2).specs()
    whole = {name: spec.size for name, spec in specs.items() if spec.kind != "bias"}
    stored = {name: size // 4 for name, size in whole.items()}
    wider = {name: size // 2 for name, size in whole.items()}
    f_d, f_s, f_b = (flops.forward(specs, counts) for counts in (whole, stored, wider))
    assert f_d == 2 * (whole["decoder.weight"] + sum(n for name, n in whole.items() if name.startswith("rnn")))
    assert flops.published_step(specs, "dense", whole, whole) == 3 * f_d
    for name in ("static", "set", "selfish"):
        assert flops.published_step(specs, name, stored, stored) == 3 * f_s
    for interval in (1, 100):
        expected = (3 * f_s * interval + 2 * f_s + f_d) / (interval + 1)
        assert flops.published_step(specs, "rigl", stored, stored, interval) == pytest.approx(expected, rel=1e-15)
    assert flops.published_step(specs, "topkast", stored, wider) == 2 * f_s + f_b


def test_rigl_as_published_and_as_executed() -> None:
    """The formula's period is ΔT + 1 batches, one of them the exchange's; here it is ΔT, with the exchange's."""
    specs = LanguageModel(40, 9, 8, 2).specs()
    whole = {name: spec.size for name, spec in specs.items() if spec.kind != "bias"}
    stored = {name: size // 4 for name, size in whole.items()}
    f_d, f_s = flops.forward(specs, whole), flops.forward(specs, stored)
    for interval in (2, 10):
        period = interval * flops.step(specs, stored, stored, 1) + flops.dense_gradient(specs, whole, stored, 1)
        assert period == 3 * f_s * (interval - 1) + 2 * f_s + f_d
        assert period / interval == flops.published_step(specs, "rigl", stored, stored, interval - 1)


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
