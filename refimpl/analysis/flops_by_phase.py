r"""What each phase of a run costs that alternates between a dense and a compressed model, and what all of them cost.

In a compressed phase at density :math:`\rho` a step executes :math:`\sum_l 2 c_l \rho_l n_l (2 + [l > 1])` operations
for each sample, as :mod:`refimpl.training.flops` counts them; in a dense phase :math:`\rho_l = 1`. With the phases'
shares :math:`e_p` of all samples, and their costs :math:`f_p` as fractions of dense training on as many samples, the
run as a whole takes

.. math:: \sum_p e_p f_p

of dense training; half of it in dense phases, as in AC/DC's schedules for ImageNet, gives
:math:`\tfrac12 + \tfrac12 \bar f`.

Two sources: a forecast (:func:`of_forecast`), which needs no training, and what a run recorded at the end of each epoch
(:func:`of_run`). They agree to the last operation where the counts follow from the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from refimpl.methods.phases import Kind, Phase, Phases
from refimpl.training import flops
from refimpl.training.build import make_method
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import RunFolder
from refimpl.training.simulate import Forecast
from refimpl.training.workload import of_facts


@dataclass(frozen=True)
class PhaseFlops:
    """One phase and its operations.

    Attributes
    ----------
    kind : {"dense", "compressed"}
    start, stop : int
        Its epochs, the first is 0; ``stop`` is no longer one of it.
    executed : float
        Operations of its training steps.
    dense : float
        Those of dense training on the same samples.
    """

    kind: Kind
    start: int
    stop: int
    executed: float
    dense: float

    @property
    def fraction(self) -> float:
        """Operations as a fraction of dense training's."""
        return self.executed / self.dense


@dataclass(frozen=True)
class PhaseTable:
    """The phases of a run, in order; of a run that goes on, as far as it got."""

    phases: tuple[PhaseFlops, ...]

    @property
    def executed(self) -> float:
        """Operations of all phases."""
        return sum(phase.executed for phase in self.phases)

    @property
    def fraction(self) -> float:
        """Operations of all phases as a fraction of dense training's."""
        return self.executed / sum(phase.dense for phase in self.phases)

    def share(self, kind: Kind) -> float:
        """Return which part of all operations the phases of one kind take."""
        return sum(phase.executed for phase in self.phases if phase.kind == kind) / self.executed


def of_forecast(found: Forecast) -> PhaseTable:
    """Return the phases of a forecast.

    Raises
    ------
    ValueError
        If its method has none.
    """
    executed = [flops.total(epoch["executed"]) for epoch in found.epochs]
    samples = [epoch["samples"]["executed"] for epoch in found.epochs]
    return _table(found.phases, executed, samples, found.specs)


def of_run(run: str | Path | RunFolder) -> PhaseTable:
    """Return the phases of a run, of which at least one epoch has ended.

    Parameters
    ----------
    run : path or RunFolder

    Raises
    ------
    ValueError, FileNotFoundError
        If it is no run, its method has no phases, or no epoch has ended.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    config = folder.config
    model, work = of_facts(config, folder.facts["data"])
    phases = getattr(make_method(config, work.steps, len(work.samples)), "phases", None)
    records = [record for record in read_metrics(folder.metrics_path) if record.get("kind") == "epoch"]
    if isinstance(phases, Phases) and not records:
        raise ValueError(f"no epoch of the run in {str(folder.path)!r} has ended yet; let it train for one")
    spent = [b - a for a, b in pairwise([0.0, *(record["flops"] for record in records)])]
    samples = [work.of_epoch(epoch) for epoch in range(len(records))]
    specs = model.specs()
    linear = {name: specs[name] for name in flops.multiplied(specs)}
    found = phases.within(len(records)) if isinstance(phases, Phases) else []
    return _table(found, spent, samples, linear)


def _table(
    phases: Sequence[Phase], executed: Sequence[float], samples: Sequence[float], specs: flops.Specs
) -> PhaseTable:
    if not phases:
        raise ValueError("the run's method has no dense and compressed phases; give a run of AC/DC")
    whole = {name: spec.size for name, spec in specs.items()}
    dense = flops.step(specs, whole, whole, 1)
    return PhaseTable(
        tuple(
            PhaseFlops(
                phase.kind,
                phase.start,
                phase.stop,
                sum(executed[phase.start : phase.stop]),
                dense * sum(samples[phase.start : phase.stop]),
            )
            for phase in phases
        )
    )
