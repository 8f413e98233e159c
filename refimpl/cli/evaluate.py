"""``refimpl eval`` and ``refimpl sample``: what a run's best models are worth, and what they say."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from refimpl.training.run_folder import Checkpoint, RunFolder

if TYPE_CHECKING:
    from refimpl.training.task import Task


def evaluate(arguments: argparse.Namespace) -> int:
    """Print what the best checkpoint, and a dense twin, reach on the validation and the test part."""
    from refimpl.training.config import override
    from refimpl.training.corpora import open_corpus
    from refimpl.training.task import make_task

    folder = RunFolder.open(arguments.run)
    settings = [] if arguments.data is None else [f"data.corpus={arguments.data}"]
    settings += [] if arguments.threads is None else [f"threads={arguments.threads}"]
    config = override(folder.config, settings)
    checkpoints = _chosen(folder, arguments.dense)
    corpus = open_corpus(config)
    folder.check_data(corpus.sha256)
    task = make_task(config, corpus)
    models = [_worth(name, found, task, config.training.threads) for name, found in checkpoints.items()]
    if arguments.json:
        data = {"name": corpus.name, "sha256": corpus.sha256}
        print(json.dumps({"run": arguments.run, "data": data, "measure": task.measure, "models": models}, indent=2))
        return 0
    for model in models:
        what = "best checkpoint" if model["model"] == "best" else "dense twin"
        sparsity = f", sparsity {1 - model['density']:.4f}" if len(models) > 1 or arguments.dense else ""
        print(f"{arguments.run}, {what}: of step {model['step']:,}{sparsity}")
        if model is models[0]:
            print(f"{task.kind}: {corpus.name}, sha256 {corpus.sha256}")
        valid, test = (model[part][task.measure] for part in ("valid", "test"))
        print(f"validation {task.measure} {valid:.4f}, test {task.measure} {test:.4f}")
    return 0


def _chosen(folder: RunFolder, dense: bool) -> dict[str, Checkpoint]:
    """Return the checkpoints to evaluate: the best and the dense twin, if there is one, or the twin alone."""
    if dense:
        return {"dense twin": folder.best_dense()}
    found = {"best": folder.best()}
    if folder.best_dense_path.is_file():
        found["dense twin"] = folder.best_dense()
    return found


def _worth(name: str, found: Checkpoint, task: Task, threads: int) -> dict[str, Any]:
    from refimpl.training import twin
    from refimpl.training.report import scores_of, tensor_reports

    params = twin.params_of(found)
    tensors = tensor_reports(task.model.specs(), params).values()
    scores = scores_of(task, params, threads)
    density = sum(t.nnz for t in tensors) / sum(t.size for t in tensors)
    return {"model": name, "step": found.meta["step"], "density": density, "valid": scores.valid, "test": scores.test}


def sample(arguments: argparse.Namespace) -> int:
    """Print a prompt and the words that the best checkpoint makes follow it."""
    from refimpl.datasets import EOS
    from refimpl.generate import decode, encode_prompt
    from refimpl.generate import sample as draw
    from refimpl.rng import generator
    from refimpl.training.build import make_language_model
    from refimpl.training.checkpoint import unpack_params
    from refimpl.training.corpora import vocabulary_of

    folder = RunFolder.open(arguments.run)
    if folder.config.task != "language-model":
        raise ValueError(
            f"{arguments.run!r} is a run of task {folder.config.task!r}, whose model makes up no text; give the run of "
            f"a language model, or ask `refimpl eval {arguments.run}` what this one is worth"
        )
    best = folder.best()
    vocabulary = vocabulary_of(folder)
    prompt = encode_prompt(arguments.prompt, vocabulary)
    tokens = draw(
        make_language_model(folder.config, len(vocabulary)),
        unpack_params(best.arrays)[0],
        words=arguments.words,
        prompt=prompt,
        temperature=arguments.temperature,
        start=vocabulary.index(EOS) if EOS in vocabulary else 0,
        rng=generator(arguments.seed, "sample"),
    )
    print(decode([*prompt, *tokens], vocabulary).strip("\n"))
    return 0
