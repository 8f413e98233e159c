"""``refimpl eval`` and ``refimpl sample``: what a run's best checkpoint is worth, and what it says."""

from __future__ import annotations

import argparse

from refimpl.training.run_folder import RunFolder


def evaluate(arguments: argparse.Namespace) -> int:
    """Print what the best checkpoint reaches on the validation and the test part: perplexity, or accuracy."""
    from refimpl.training.checkpoint import unpack_params
    from refimpl.training.config import override
    from refimpl.training.corpora import open_corpus
    from refimpl.training.report import scores_of
    from refimpl.training.task import make_task

    folder = RunFolder.open(arguments.run)
    best = folder.best()
    settings = [] if arguments.data is None else [f"data.corpus={arguments.data}"]
    settings += [] if arguments.threads is None else [f"threads={arguments.threads}"]
    config = override(folder.config, settings)
    corpus = open_corpus(config)
    folder.check_data(corpus.sha256)
    params, _ = unpack_params(best.arrays)
    task = make_task(config, corpus)
    found = scores_of(task, params, config.training.threads)
    valid, test = found.valid[task.measure], found.test[task.measure]
    print(f"{arguments.run}, best checkpoint: of step {best.meta['step']:,}")
    print(f"{task.kind}: {corpus.name}, sha256 {corpus.sha256}")
    print(f"validation {task.measure} {valid:.4f}, test {task.measure} {test:.4f}")
    return 0


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
