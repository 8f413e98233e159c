"""What a run of a configuration has to do, as far as operations depend on it, with or without its data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from refimpl.datasets.sizes import IMAGE_SIZES, ImageSizes
from refimpl.models.base import Model
from refimpl.models.classifier import Classifier
from refimpl.training.build import make_language_model
from refimpl.training.build_network import make_network
from refimpl.training.config import Config
from refimpl.training.corpora import open_corpus
from refimpl.training.task import Data, make_task

ASSUMED_TOKENS = 1_000_000
"""Length of a training text of which only the vocabulary is known."""


@dataclass(frozen=True)
class Workload:
    """What is trained on, as far as operations depend on it.

    Attributes
    ----------
    samples : tuple of int
        Tokens or images of each step of an epoch.
    steps : int
        Of the whole run.
    clips : bool
        Whether gradients are clipped.
    """

    samples: tuple[int, ...]
    steps: int
    clips: bool = False

    def of_epoch(self, epoch: int) -> int:
        """Return how many samples the steps of an epoch are trained on; the last may be cut short, the first is 0."""
        taken = self.steps - epoch * len(self.samples)
        return sum(self.samples[: max(taken, 0)])


def workload_of(
    config: Config, data: Data | None = None, *, vocabulary: int | None = None, tokens: int | None = None
) -> tuple[Model, Workload, list[str]]:
    """Return the model of a configuration, its workload, and what was taken for granted.

    Parameters
    ----------
    config : Config
    data : Corpus or Images, optional
        By default those that the configuration names, unless a vocabulary is given. Of a published data set whose
        folder is not there the size is known all the same.
    vocabulary, tokens : int, optional
        In place of a text: how many words it has, and how long its training part is.

    Raises
    ------
    ValueError, FileNotFoundError
        If the data are not there and unknown, or too short.
    """
    if vocabulary is not None:
        assumed = f"the training text is taken to have {ASSUMED_TOKENS:,} tokens; --tokens N says how many"
        model, work = of_text(config, vocabulary, ASSUMED_TOKENS if tokens is None else tokens)
        return model, work, [assumed] if tokens is None else []
    known = None if data is not None or config.task != "classification" else published_sizes(config)
    if known is not None:
        shape = " x ".join(map(str, known.shape))
        left = images_left(config, known)
        note = f"no image was read: {Path(config.data.corpus).name} has {left:,} of {shape} to train on"
        return *of_images(config, left, known.shape, known.classes), [note]
    task = make_task(config, open_corpus(config) if data is None else data)
    ends = [task.samples(step) for step in range(task.steps_per_epoch + 1)]
    return task.model, _work(config, ends), []


def of_facts(config: Config, facts: Mapping[str, Any]) -> tuple[Model, Workload]:
    """Return model and workload of a run, from what its folder remembers of its data."""
    if "images" in facts:
        return of_images(config, facts["images"]["train"], tuple(facts["shape"]), facts["classes"])
    return of_text(config, facts["vocabulary_size"], facts["tokens"]["train"])


def of_images(config: Config, count: int, shape: tuple[int, ...], classes: int) -> tuple[Model, Workload]:
    """Return model and workload for so many training images."""
    batch = config.training.batch_size
    if batch > count:
        raise ValueError(f"training.batch_size is {batch}, more than the {count} training images; choose a smaller one")
    ends = [min(start, count) for start in range(0, count + batch, batch)]
    return Classifier(make_network(config, shape, classes)), _work(config, ends)


def of_text(config: Config, vocabulary: int, tokens: int) -> tuple[Model, Workload]:
    """Return model and workload for a text of so many words and tokens."""
    if config.task != "language-model":
        raise ValueError(f"a vocabulary is given and task is {config.task!r}, which has none; give the data instead")
    if vocabulary < 1:
        raise ValueError(f"the vocabulary is {vocabulary}; give a number of words, at least 1")
    batch, bptt = config.training.batch_size, config.training.bptt
    rows = tokens // batch - 1  # the first predicts, and is not predicted
    if rows < 1:
        raise ValueError(f"a text of {tokens} tokens is too short for {batch} columns; give at least {2 * batch}")
    ends = [min(row, rows) * batch for row in range(0, rows + bptt, bptt)]
    return make_language_model(config, vocabulary), _work(config, ends)


def published_sizes(config: Config) -> ImageSizes | None:
    """Return the sizes of the images that a configuration names, if they are not there but known."""
    path = Path(config.data.corpus)
    known = IMAGE_SIZES.get(path.name)
    return known if known is not None and not (path.exists() and known.readable) else None


def images_left(config: Config, known: ImageSizes) -> int:
    """Return how many images are trained on: all but those that are set aside to validate with.

    Of a data set that cannot be read none is set aside: its runs are those of a paper, which trained on all.
    """
    return known.train - round(config.data.valid_fraction * known.train) if known.readable else known.train


def _work(config: Config, ends: list[int]) -> Workload:
    """Return the workload for so many samples trained on after each step of an epoch, the first number being 0."""
    options = config.training
    whole = options.epochs * (len(ends) - 1)
    steps = min(whole, options.max_steps) if options.max_steps else whole
    return Workload(tuple(stop - start for start, stop in pairwise(ends)), steps, clips=config.optimizer.clip > 0)
