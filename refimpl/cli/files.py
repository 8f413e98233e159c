"""``refimpl export`` and ``refimpl import``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.cli.train import configure
from refimpl.datasets import Corpus
from refimpl.interchange import export_params, import_params
from refimpl.training import checkpoint, twin
from refimpl.training.config import Config, load_recipe
from refimpl.training.corpora import open_corpus, vocabulary_of
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import start

DEFAULT_NAMES = {"torch": "model.pt", "scipy": "model-scipy", "npz": "model.npz"}


def export(arguments: argparse.Namespace) -> int:
    """Write the parameters of the best checkpoint, or of the dense twin, in another format."""
    folder = RunFolder.open(arguments.run)
    params = twin.params_of(folder.best_dense() if arguments.dense else folder.best())
    name = ("dense-" if arguments.dense else "") + DEFAULT_NAMES[arguments.to]
    out = Path(arguments.run, name) if arguments.out is None else Path(arguments.out)
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give another name with --out, or remove it")
    meta: dict[str, Any] = {"config": folder.config.to_dict()}
    if folder.config.task == "language-model":
        meta["vocabulary"] = " ".join(vocabulary_of(folder))
    aliases = {"decoder.weight": "encoder.weight"} if folder.config.model.tied else {}
    print(export_params(params, out, arguments.to, meta, aliases))
    return 0


def import_(arguments: argparse.Namespace) -> int:
    """Take up parameters as a checkpoint of their own, or as a new run at step 0."""
    out = Path(arguments.out)
    if out.suffix == ".npz":
        if out.exists():
            raise ValueError(f"{str(out)!r} is there already; give another name, or remove it")
        found = import_params(arguments.file)
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(out, checkpoint.pack_params(found.params, {}), found.meta)
        print(out)
        return 0
    RunFolder.check_new(out)
    found = import_params(arguments.file)
    config = _config(arguments, found.meta)
    corpus = open_corpus(config)
    words = found.meta.get("vocabulary")
    if words is not None and isinstance(corpus, Corpus) and tuple(words.split(" ")) != corpus.vocabulary:
        raise ValueError(
            f"the model in {arguments.file!r} was trained on other words than those of the text {corpus.name!r}; "
            f"give the text that it was trained on with --data"
        )
    start(config, out, corpus, params=found.params).close()
    commands = "eval, sample and export" if config.task == "language-model" else "eval and export"
    print(f"{out}: a run at step 0; refimpl {commands} work on it")
    print(f"to train on from these weights: refimpl train --resume {out}")
    return 0


def _config(arguments: argparse.Namespace, meta: Mapping[str, Any]) -> Config:
    """Return the configuration of the new run: the recipe's that is named, or the one in the file."""
    if arguments.recipe is not None:
        return configure(load_recipe(arguments.recipe), arguments)
    if "config" not in meta:
        raise ValueError(
            f"{arguments.file!r} does not say how its model was made; give --recipe, with --set for sizes that differ"
        )
    return configure(Config.from_dict(meta["config"]), arguments)
