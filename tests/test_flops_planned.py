"""Operations that are counted without training are those of the run, for every method, term by term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.methods import SET, Allocation, BaseMethod, Conventions, Dense, RigL, Selfish, Static, TopKAST
from refimpl.methods.deepr import DeepR
from refimpl.methods.dpf import DPF
from refimpl.methods.dsr import DSR
from refimpl.methods.gmp import GMP
from refimpl.methods.granet import GraNet
from refimpl.methods.grasp import GraSP
from refimpl.methods.imp import IMP
from refimpl.methods.iss import ISS
from refimpl.methods.itop import ITOP
from refimpl.methods.magnitude_init import MagnitudeInit
from refimpl.methods.mest import MEST
from refimpl.methods.movement import Movement
from refimpl.methods.oneshot import OneShot
from refimpl.methods.powerprop import Powerpropagation
from refimpl.methods.schedule import Constant
from refimpl.methods.snfs import SNFS
from refimpl.methods.snip import SNIP
from refimpl.methods.soft_threshold import STR
from refimpl.methods.srste import SRSTE
from refimpl.methods.ste import STE
from refimpl.methods.synflow import SynFlow
from refimpl.models.language_model import LanguageModel
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.testing.training import tiny_config, tiny_corpus
from refimpl.training import flops, planned_sizes, simulate
from refimpl.training.loop import Run
from refimpl.training.simulate import Workload, planned, planned_run
from refimpl.weights import values_of

EPOCHS, STEPS = 5, 6
TOTAL = EPOCHS * STEPS
FIFTH = Allocation(0.2)
HALVES = Constant(0.5)

EXACT: dict[str, Callable[[], BaseMethod]] = {
    "dense": Dense,
    "static": lambda: Static(FIFTH),
    "static erk": lambda: Static(Allocation(0.2, "erk")),
    "static fixed": lambda: Static(Allocation(0.2, fixed={"fc.weight": 1.0})),
    "set": lambda: SET(FIFTH, HALVES),
    "selfish": lambda: Selfish(FIFTH, HALVES),
    "rigl": lambda: RigL(Allocation(0.2, "erk"), HALVES, interval=4, end_step=21),
    "rigl after": lambda: RigL(FIFTH, HALVES, interval=4, conventions=Conventions(exchange_step="after")),
    "itop": lambda: ITOP(FIFTH, HALVES, total_steps=TOTAL, interval=4),
    "itop by gradient": lambda: ITOP(FIFTH, HALVES, total_steps=TOTAL, interval=4, growth="gradient"),
    "deepr": lambda: DeepR(FIFTH),
    "mest": lambda: MEST(FIFTH, soft_until_step=18, gradient_weight=0),
    "mest soft": lambda: MEST(FIFTH, soft_until_step=18, gradient_weight=0, form="EM&S"),
    "mest in steps": lambda: MEST(FIFTH, soft_until_step=18, interval=4, form="EM&S"),
    "magnitude-init": lambda: MagnitudeInit(FIFTH),
    "magnitude-init global": lambda: MagnitudeInit(FIFTH, scope="global"),
    "snip": lambda: SNIP(FIFTH, scope="local"),
    "topkast": lambda: TopKAST(FIFTH, exploration=0.2, refresh=4),
    "topkast that stops": lambda: TopKAST(FIFTH, exploration=0.2, refresh=4, stop_step=10),
    "ste": lambda: STE(FIFTH),
    "ste in a pattern": lambda: STE(None, pattern=(1, 4)),
    "sr-ste": SRSTE,
    "dpf": lambda: DPF(FIFTH, interval=4, end_step=18),
    "dpf from half": lambda: DPF(FIFTH, interval=4, end_step=18, initial_sparsity=0.5),
    "movement": lambda: Movement(FIFTH, begin_step=2, end_step=18),
    "movement at once": lambda: Movement(FIFTH, begin_step=0, end_step=18, interval=4),
    "one-shot": lambda: OneShot(FIFTH, at_step=7),
    "gmp": lambda: GMP(FIFTH, begin_step=3, end_step=20, interval=4),
    "gmp at once": lambda: GMP(FIFTH, begin_step=0, end_step=20, interval=4, initial_sparsity=0.5),
    "gmp by gates": lambda: GMP(FIFTH, begin_step=3, end_step=20, interval=4, conventions=Conventions(pool="gate")),
    "imp": lambda: IMP(FIFTH, rounds=3, round_steps=12, rewind_step=6, scope="local"),
    "powerpropagation": lambda: Powerpropagation(RigL(FIFTH, HALVES, interval=4), 2.0),
}
"""Methods whose sizes training cannot change."""

ABOUT: dict[str, Callable[[], BaseMethod]] = {
    "gmp": lambda: GMP(FIFTH, begin_step=3, end_step=20, interval=4, scope="global"),
    "imp": lambda: IMP(FIFTH, rounds=3, round_steps=12, rewind_step=6),
    "one-shot": lambda: OneShot(FIFTH, at_step=7, scope="global"),
    "dpf": lambda: DPF(FIFTH, interval=4, end_step=18, scope="global"),
    "gmp by layers": lambda: GMP(FIFTH, begin_step=3, end_step=20, interval=4, conventions=Conventions(pool="layer")),
    "set by layers": lambda: SET(FIFTH, HALVES, conventions=Conventions(pool="layer")),
    "granet": lambda: GraNet(FIFTH, HALVES, begin_step=2, end_step=20, interval=3),
    "snip": lambda: SNIP(FIFTH),
    "grasp": lambda: GraSP(FIFTH),
    "synflow": lambda: SynFlow(FIFTH, rounds=5),
    "dsr": lambda: DSR(FIFTH, interval=4),
    "snfs": lambda: SNFS(FIFTH, HALVES, interval=4),
    "str": lambda: STR(penalty=0.1),
    "iss": lambda: ISS(penalty=0.1),
    "deepr": lambda: DeepR(FIFTH, form="soft"),
    "movement": lambda: Movement(FIFTH, begin_step=2, end_step=18, form="soft"),
}
"""Methods whose sizes depend on the data or on training; what is planned says so."""


def forecast(make: Callable[[], BaseMethod]) -> simulate.Forecast:
    """Return what is planned for a run of the quadratic model."""
    model: Any = QuadraticModel()
    return planned(model, make(), Workload((1,) * STEPS, TOTAL), dtype=np.float64)


@pytest.mark.parametrize("name", EXACT)
def test_the_plan_is_the_run(name: str) -> None:
    trainer = trainer_of(EXACT[name](), steps_per_epoch=STEPS)
    epochs: list[dict[str, float]] = []

    def after(trainer: Any) -> None:
        if trainer.state.window == 0:
            epochs.append(dict(trainer.state.flops["executed"]))

    train(trainer, TOTAL, after)
    found = forecast(EXACT[name])
    assert found.total == trainer.state.flops
    sums = np.cumsum([flops.total(epoch["executed"]) for epoch in found.epochs])
    assert sums.tolist() == [flops.total(executed) for executed in epochs]
    assert not found.notes
    assert found.last.used == trainer.used()
    assert found.last.graded == trainer.graded()


@pytest.mark.parametrize("name", ABOUT)
def test_what_cannot_be_known_is_said(name: str) -> None:
    """The number of samples is right all the same, and so is the overall count where the method conserves one."""
    trainer = trainer_of(ABOUT[name](), steps_per_epoch=STEPS)
    train(trainer, TOTAL)
    found = forecast(ABOUT[name])
    assert len(found.notes) == 1
    assert found.total["samples"] == trainer.state.flops["samples"]
    assert found.total["executed"].keys() == trainer.state.flops["executed"].keys()
    if name not in ("str", "iss", "deepr", "movement"):
        assert sum(found.last.used.values()) == sum(trainer.used().values())


def test_passes_before_training_are_counted() -> None:
    """SNIP takes one gradient of the dense model, GraSP three, SynFlow one of ever fewer entries in each round."""
    specs = {name: spec for name, spec in QuadraticModel().specs().items() if spec.kind != "bias"}
    whole = {name: spec.size for name, spec in specs.items()}
    once = flops.step(specs, whole, whole, 1)
    for name, passes in (("snip", 1), ("grasp", 3)):
        trainer = trainer_of(ABOUT[name]())
        assert trainer.state.flops["executed"] == {"scoring": passes * once}
        assert trainer.state.flops["differences"] == {"scoring": passes * once}
        assert forecast(ABOUT[name]).total["executed"]["scoring"] == passes * once
    scoring = trainer_of(ABOUT["synflow"]()).state.flops["executed"]["scoring"]
    # Two time steps of a recurrent model, five rounds, of which the first is dense and the last is not sparser than d.
    assert 2 * once * (1 + 4 * 0.2) < scoring < 2 * once * 5
    local = SynFlow(FIFTH, rounds=5, scope="local")
    assert forecast(lambda: SynFlow(FIFTH, rounds=5, scope="local")).total["executed"]["scoring"] == pytest.approx(
        trainer_of(local).state.flops["executed"]["scoring"], rel=0.02
    )  # counts of a round are rounded in one of them


@pytest.mark.parametrize(
    "method",
    [
        {"name": "rigl", "interval": 4, "end_fraction": 0.75},
        {"name": "selfish"},
        {"name": "topkast", "sparsity": 0.6, "backward_sparsity": 0.3, "refresh": 3},
        {"name": "static", "convention": {"clip_norm": "dense"}},
    ],
)
def test_of_a_configuration(method: dict[str, Any]) -> None:
    """A text whose last window is short, and a run that stops within an epoch; by the text, or by its sizes."""
    config = tiny_config(
        method=method, optimizer={"clip": 0.1}, training={"epochs": 3, "max_steps": 30, "bptt": 6, "threads": 1}
    )
    corpus = tiny_corpus()
    run = Run(config, corpus)
    assert run.train() == "finished"
    found = planned_run(config, corpus)
    assert found.total == run.state.flops
    imagined = planned_run(config, vocabulary=corpus.vocabulary_size, tokens=corpus.train.size)
    assert imagined.total == found.total


def test_large_models_are_counted_at_once() -> None:
    """66 million weights: neither weights nor supports are drawn, or this would take minutes and gigabytes."""
    model = LanguageModel(10_000, 1500, 1500, 2)
    method = RigL(Allocation(0.1, "erk"), 0.3, interval=100, end_step=20_000)
    method.supports = None  # type: ignore[assignment, method-assign]
    found = planned(model, method, Workload((700,) * 1328, 26_560))
    assert found.total["samples"]["executed"] == 700 * 26_560


def test_an_impossible_text_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="the vocabulary is 0; give"):
        planned_run(config, vocabulary=0)
    with pytest.raises(ValueError, match="7 tokens is too short for 4 columns; give at least 8"):
        planned_run(config, vocabulary=10, tokens=7)
    assert planned_run(config, vocabulary=10, tokens=8).total["samples"]["executed"] == 2 * 4
    assert "1,000,000 tokens" in planned_run(config, vocabulary=10).notes[0]


class Uneven(QuadraticModel):
    """The same model with one tensor that starts close to zero."""

    def init(self, seed: int, dtype: Any, supports: Any = None) -> Any:
        """Draw the parameters."""
        drawn = super().init(seed, dtype, supports)
        values_of(drawn["rnn.weight_hh_l0"])[...] *= 1e-3
        return drawn


@pytest.mark.parametrize("name", ["gmp", "imp", "one-shot", "dpf"])
def test_tensors_that_start_small_are_given_their_share(name: str) -> None:
    """Ranked with the others, all of their first weights would go; trained ones need not."""
    model: Any = Uneven()
    found = planned(model, ABOUT[name](), Workload((1,) * STEPS, TOTAL))
    assert found.notes == [simulate.EMPTIED]
    for label, spec in found.specs.items():  # the count of all is rounded to half an entry, a share of it to one
        assert abs(found.last.used[label] - 0.2 * spec.size) < 1.5
    assert sum(found.last.used.values()) == sum(forecast(ABOUT[name]).last.used.values())


# --- planted mistakes ---


@pytest.mark.parametrize("name", ["gmp", "dpf", "movement", "imp", "one-shot", "topkast that stops"])
def test_catches_sets_that_do_not_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forecast(EXACT[name]).total
    monkeypatch.setattr(simulate._Known, "exchange", lambda self, number: None)
    assert forecast(EXACT[name]).total != right


def test_catches_sizes_of_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forecast(EXACT["gmp"]).total
    sizes_of = planned_sizes.sizes_of

    def late(method: BaseMethod, specs: flops.Specs, *, alike: bool) -> Any:
        at = sizes_of(method, specs, alike=alike)
        assert at is not None
        return lambda step: at(step - 1)

    monkeypatch.setattr(planned_sizes, "sizes_of", late)
    assert forecast(EXACT["gmp"]).total != right
