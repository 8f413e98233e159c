"""``refimpl train`` and ``refimpl finetune``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

from refimpl.cli import STOPPED, stop_if_interrupted
from refimpl.cli.progress import WORTH_SAYING, Progress, compile_seconds
from refimpl.kernels import threads
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.loop import Run, stopping_on_signals
from refimpl.training.report import report
from refimpl.training.start import free_folder, resume, start

DEFAULT_RECIPE = "selfish-lstm"


def train(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run, and report."""
    stop_if_interrupted()
    return finish(_resumed(arguments) if arguments.resume is not None else _started(arguments))


def fine_tune(arguments: argparse.Namespace) -> int:
    """Train a run's dense twin on, and report."""
    from refimpl.training.finetune import begin

    stop_if_interrupted()
    settings = [] if arguments.data is None else [f"data.corpus={arguments.data}"]
    settings += [] if arguments.threads is None else [f"threads={arguments.threads}"]
    run = begin(arguments.run, arguments.out, changes=settings)
    assert run.folder is not None
    introduce(run)
    step = f"after step {run.state.step:,}"
    print(f"run: {run.folder.path}, going on with the dense twin of {arguments.run} {step}", flush=True)
    return finish(run)


def finish(run: Run) -> int:
    """Train a run to its end and report; return the exit code."""
    assert run.folder is not None
    try:
        if run.done:
            print(f"{run.folder.path} has finished: {run.state.step:,} steps", flush=True)
        else:
            progress = Progress()
            try:
                with stopping_on_signals(run):
                    outcome = run.train(progress)
            finally:
                progress.close()
            if outcome == "stopped":
                print(f"stopped at step {run.state.step:,} of {run.total_steps:,}; the state is saved")
                print(f"to go on: refimpl train --resume {run.folder.path}", flush=True)
                return STOPPED
        print("\nmeasuring ...", flush=True)
        before = compile_seconds()
        found = report(run)
        took = compile_seconds() - before
        if took > WORTH_SAYING:
            print(f"kernels took {took:.1f} s more to compile or load")
        print(f"\n{found.text()}\n\nthe run is in {run.folder.path}", flush=True)
    finally:
        run.close()
    return 0


def configure(config: Config, arguments: argparse.Namespace) -> Config:
    """Return a configuration with the command line's settings in place."""
    config = override(config, settings_of(arguments))
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, corpus=arguments.data))
    return config


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Return all ``key=value`` of ``--set``, and of the options that are settings of their own."""
    settings = [setting for group in arguments.settings for setting in group]
    for key in ("seed", "threads", "dtype"):
        if getattr(arguments, key, None) is not None:
            settings.append(f"{key}={getattr(arguments, key)}")
    return settings


def introduce(run: Run) -> None:
    """Say what is trained on what, and where it goes."""
    options, method = run.config.training, run.config.method
    sparsity = "" if method.name == "dense" else f", sparsity {method.sparsity:g}"
    count = options.threads or threads.get()
    data, model = run.task.describe()
    print(data)
    print(f"{'':{len(run.task.kind) + 1}} sha256 {run.corpus.sha256}")
    print(f"model: {model}; method {method.name}{sparsity}; optimizer {run.config.optimizer.name}")
    print(f"numbers: {run.config.dtype}, seed {run.config.seed}, {count} thread{'s' if count > 1 else ''}")
    print(f"steps: {run.total_steps:,} ({run.steps_per_epoch:,} an epoch)")


def _started(arguments: argparse.Namespace) -> Run:
    recipe = arguments.recipe if arguments.recipe is not None else DEFAULT_RECIPE
    config = configure(load_recipe(recipe), arguments)
    run = start(config, partial(free_folder, recipe) if arguments.out is None else arguments.out)
    assert run.folder is not None
    introduce(run)
    print(f"run: {run.folder.path} (recipe {recipe})", flush=True)
    return run


def _resumed(arguments: argparse.Namespace) -> Run:
    for option in ("recipe", "out"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"{option} is given with --resume; a run has its recipe and folder, so leave it out")
    settings = settings_of(arguments)
    if arguments.data is not None:
        settings.append(f"data.corpus={arguments.data}")
    run = resume(arguments.resume, settings)
    introduce(run)
    print(f"run: {arguments.resume}, going on after step {run.state.step:,}", flush=True)
    return run
