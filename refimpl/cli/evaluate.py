"""``refimpl eval`` and ``refimpl sample``: what a run's best checkpoint is worth, and what it says."""

from __future__ import annotations

import argparse

from refimpl.training.run_folder import RunFolder


def evaluate(arguments: argparse.Namespace) -> int:
    """Print validation and test perplexity of the best checkpoint."""
    from refimpl.training.build import make_model
    from refimpl.training.checkpoint import unpack_params
    from refimpl.training.config import override
    from refimpl.training.report import evaluate as perplexities
    from refimpl.training.start import open_corpus

    folder = RunFolder.open(arguments.run)
    best = folder.best()
    settings = [] if arguments.data is None else [f"data.corpus={arguments.data}"]
    settings += [] if arguments.threads is None else [f"threads={arguments.threads}"]
    config = override(folder.config, settings)
    corpus = open_corpus(config)
    folder.check_data(corpus.sha256)
    params, _ = unpack_params(best.arrays)
    found = perplexities(config, make_model(config, corpus.vocabulary_size), params, corpus)
    print(f"{arguments.run}, best checkpoint: of step {best.meta['step']:,}")
    print(f"text: {corpus.name}, sha256 {corpus.sha256}")
    print(f"validation perplexity {found.valid:.4f}, test perplexity {found.test:.4f}")
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Print a prompt and the words that the best checkpoint makes follow it."""
    from refimpl.datasets import EOS
    from refimpl.generate import decode, encode_prompt
    from refimpl.generate import sample as draw
    from refimpl.rng import generator
    from refimpl.training.build import make_model
    from refimpl.training.checkpoint import unpack_params
    from refimpl.training.start import vocabulary_of

    folder = RunFolder.open(arguments.run)
    best = folder.best()
    vocabulary = vocabulary_of(folder)
    prompt = encode_prompt(arguments.prompt, vocabulary)
    tokens = draw(
        make_model(folder.config, len(vocabulary)),
        unpack_params(best.arrays)[0],
        words=arguments.words,
        prompt=prompt,
        temperature=arguments.temperature,
        start=vocabulary.index(EOS) if EOS in vocabulary else 0,
        rng=generator(arguments.seed, "sample"),
    )
    print(decode([*prompt, *tokens], vocabulary).strip("\n"))
    return 0
