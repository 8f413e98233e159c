"""The runs of the comparison: each in a folder of its own, and what came of it.

AC/DC gives three models: the sparse one, its dense twin, and the twin trained on to the end. GMP, RigL and dense
training have the same recipe, data, epochs and seeds. GMP ranks all tensors together, as AC/DC does, and prunes from a
tenth to seven tenths of the run; RigL has the distribution ERK. Both act about fifty times a run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refimpl.analysis.masks import SupportKeeper
from refimpl.analysis.models import agreement_of
from refimpl.analysis.twins import Agreement
from refimpl.analysis.watch import PhaseTimes, Several, seconds_by_phase
from refimpl.analysis.zeros import ZeroWatcher
from refimpl.datasets import Images
from refimpl.training import finetune, flop_account, twin
from refimpl.training.atomic import replacing
from refimpl.training.config import Config, differences, override
from refimpl.training.loop import Observer, Run, stopping_on_signals
from refimpl.training.report import report, scores_of
from refimpl.training.run_folder import CONFIG_NAME, RunFolder
from refimpl.training.start import resume, start

OUTCOMES = "outcomes.json"
STEPS = 15
"""Steps, sparse and dense in turn, of which the ratio of their times is the medians'."""
MODELS = ("dense", "AC/DC, sparse", "AC/DC, dense twin", "AC/DC, twin fine-tuned", "GMP", "RigL")
Watch = Callable[[str], Observer]


@dataclass(frozen=True)
class Outcome:
    """One model.

    Attributes
    ----------
    model : str
        Of `MODELS`.
    target : float or None
        Sparsity that the run was asked for; None for dense training.
    seed : int
    epoch : int
        Epochs after which it was taken: the best one by validation loss.
    accuracy, valid : float
        On the test and the validation part.
    sparsity : float
        Exact: absent entries of all prunable weights.
    training, inference : float
        Operations executed in all training that led to the model, as a fraction of the whole dense run's, and of
        inference as a fraction of the dense model's.
    dense_ms, sparse_ms : float or None
        Median time of a training step while the model was dense, and while it was sparse.
    ratio : float or None
        Time of a step of the sparse model over that of the same model stored densely, measured in turn at the run's
        end: on a busy machine the best of these figures.
    seconds : float
        In all training steps that led to it.
    """

    model: str
    target: float | None
    seed: int
    epoch: int
    accuracy: float
    valid: float
    sparsity: float
    training: float
    inference: float
    dense_ms: float | None
    sparse_ms: float | None
    ratio: float | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes
    ----------
    base : Config
        The recipe of AC/DC, with what is the same for all.
    sparsities, seeds : sequence
    folder : Path
        Of the runs.
    images : Images
    gmp, rigl : sequence of str
        Settings of these methods, after those of the comparison.
    """

    base: Config
    sparsities: Sequence[float]
    seeds: Sequence[int]
    folder: Path
    images: Images
    gmp: Sequence[str] = ()
    rigl: Sequence[str] = ()

    def path(self, method: str, seed: int, sparsity: float | None = None) -> Path:
        """Return the folder of a run."""
        return self.folder / "-".join([method, *([] if sparsity is None else [f"{sparsity:g}"]), f"seed{seed}"])

    def config(self, method: str, seed: int, sparsity: float | None = None) -> Config:
        """Return the configuration of a run.

        Raises
        ------
        ValueError
            If the settings do not fit.
        """
        training = self.base.training
        steps = training.epochs * -(-len(self.images.train.labels) // training.batch_size)
        often = f"interval={max(1, min(steps, training.max_steps or steps) // 50)}"
        settings = {
            "dense": ["method=dense"],
            "acdc": ["method=acdc"],
            "gmp": ["method=gmp", "scope=global", "begin_fraction=0.1", "end_fraction=0.7", often, *self.gmp],
            "rigl": ["method=rigl", "allocation=erk", "drop_fraction=0.3", "end_fraction=0.75", often, *self.rigl],
        }[method]
        asked = [] if sparsity is None else [f"sparsity={sparsity}"]
        return override(self.base, [*settings, *asked, f"seed={seed}"])

    def configs(self) -> dict[tuple[str, float | None, int], Config]:
        """Return the configurations of all runs but the fine-tuning, in the order in which they are trained."""
        listed: dict[tuple[str, float | None, int], Config] = {}
        for seed in self.seeds:
            listed["dense", None, seed] = self.config("dense", seed)
            for sparsity in self.sparsities:
                for method in ("acdc", "gmp", "rigl"):
                    listed[method, sparsity, seed] = self.config(method, seed, sparsity)
        return listed


def run_all(plan: Plan, watch: Watch) -> list[Outcome]:
    """Train what has not been trained yet, and return what came of all.

    Parameters
    ----------
    plan : Plan
    watch : callable
        From a run's name to an observer that shows it.

    Raises
    ------
    ValueError
        If a setting does not fit, before the first run begins; or a folder holds another run.
    """
    found: list[Outcome] = []
    for (method, sparsity, seed), config in plan.configs().items():
        path = plan.path(method, seed, sparsity)
        found += outcomes(path, config, partial(start, config, path, plan.images), watch, plan)
        if method == "acdc":
            tuned = plan.path("acdc-finetuned", seed, sparsity)
            found += outcomes(
                tuned, None, partial(finetune.begin, path, tuned, corpus=plan.images), watch, plan, after=path
            )
    return found


def outcomes(
    path: Path, config: Config | None, begin: Callable[[], Run], watch: Watch, plan: Plan, *, after: Path | None = None
) -> list[Outcome]:
    """Return what came of a run, which is begun, gone on with, or read.

    Parameters
    ----------
    path : Path
        The run's folder.
    config : Config or None
        What the folder must hold if it is there; None does not look.
    begin : callable
        Makes the run in a folder that is not there yet.
    watch, plan
        As `run_all` takes them.
    after : Path, optional
        The folder of the run that this one goes on from.
    """
    known = (path / CONFIG_NAME).is_file()
    other = differences(RunFolder.open(path).config, config) if known and config is not None else {}
    if other:
        raise ValueError(
            f"{str(path)!r} holds a run with other settings ({', '.join(other)}); give another folder with --folder"
        )
    if (path / OUTCOMES).is_file():
        return [Outcome(**entry) for entry in json.loads((path / OUTCOMES).read_bytes())]
    run = resume(path, corpus=plan.images) if known else begin()
    try:
        times = PhaseTimes()
        with stopping_on_signals(run):
            if run.train(Several([times, SupportKeeper(), ZeroWatcher(), watch(path.name)])) == "stopped":
                raise KeyboardInterrupt
        made = _outcomes_of(run, times.entries, after)
        with replacing(path / OUTCOMES) as file:
            file.write(json.dumps([dataclasses.asdict(outcome) for outcome in made], indent=1).encode())
    finally:
        run.close()
    return made


def _outcomes_of(run: Run, times: dict[int, Any], after: Path | None) -> list[Outcome]:
    assert run.folder is not None
    found, seconds = report(run, repeats=STEPS), seconds_by_phase(times)
    stored, size = (sum(getattr(t, key) for t in found.tensors.values()) for key in ("nnz", "size"))
    method, config = found.method, run.config
    name = {"acdc": "AC/DC, sparse", "gmp": "GMP", "rigl": "RigL"}.get(method, "dense")
    before = 0.0
    if after is not None:
        name = "AC/DC, twin fine-tuned"
        before = _twin_of(after)["seconds"]
    made = Outcome(
        name,
        None if name == "dense" else config.method.sparsity,
        config.seed,
        run.folder.best().meta["epoch"],
        found.scores.test["accuracy"],
        found.scores.valid["accuracy"],
        1 - stored / size,
        found.flops_training,
        found.flops_inference,
        _median_ms(seconds["dense"]),
        _median_ms(seconds["compressed"]),
        found.step_seconds["sparse"] / found.step_seconds["dense"] if "sparse" in found.step_seconds else None,
        before + sum(map(sum, seconds.values())),
    )
    return [made, _twin(run, times, made)] if method == "acdc" else [made]


def _twin(run: Run, times: dict[int, Any], sparse: Outcome) -> Outcome:
    """Return the dense twin's outcome: what training had cost when it was saved."""
    assert run.folder is not None
    saved, specs = run.folder.best_dense(), run.trainer.specs
    scores = scores_of(run.task, twin.params_of(saved), run.config.training.threads)
    account = saved.meta["state"]["flops"]
    share = account["samples"]["executed"] / run.state.flops["samples"]["executed"]
    until = {epoch: entry for epoch, entry in times.items() if epoch < saved.meta["epoch"]}
    return dataclasses.replace(
        sparse,
        model="AC/DC, dense twin",
        epoch=saved.meta["epoch"],
        accuracy=scores.test["accuracy"],
        valid=scores.valid["accuracy"],
        sparsity=0.0,
        training=share * flop_account.fractions(account, specs)["executed"],
        inference=1.0,
        ratio=None,
        seconds=sum(map(sum, seconds_by_phase(until).values())),
    )


def _twin_of(path: Path) -> dict[str, Any]:
    entries = json.loads((path / OUTCOMES).read_bytes())
    return next(entry for entry in entries if entry["model"] == "AC/DC, dense twin")


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None


def agreements(plan: Plan, seed: int) -> dict[str, Agreement]:
    """Compare models of one seed on the test images: AC/DC's twins, before and after fine-tuning, GMP's and the dense.

    Parameters
    ----------
    plan : Plan
        Whose runs have finished.
    seed : int
    """
    found = {}
    for sparsity in plan.sparsities:
        run, tuned, gmp = (plan.path(name, seed, sparsity) for name in ("acdc", "acdc-finetuned", "gmp"))
        dense = plan.path("dense", seed)
        pairs = {"AC/DC, twin": (run, None), "AC/DC, fine-tuned": (run, tuned), "GMP, dense": (gmp, dense)}
        for name, (first, second) in pairs.items():
            found[f"{sparsity:g}: {name}"] = agreement_of(first, second, corpus=plan.images)
    return found
