"""What a run needs to know of what it learns, and nothing more: a text, images, or whatever comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from refimpl.datasets import Corpus, Images
from refimpl.methods.base import Probe
from refimpl.models.base import Model
from refimpl.training.config import Config
from refimpl.weights import Params

Data = Corpus | Images
Batch = tuple[np.ndarray, np.ndarray]
PartName = Literal["valid", "test"]


@dataclass(frozen=True)
class Scores:
    """What a model reaches on the two parts that it was not trained on.

    Attributes
    ----------
    valid, test : mapping of str to float
        By name: first ``"loss"``, in nats for each target, then the measure that people compare, ``"perplexity"`` or
        ``"accuracy"`` (a fraction).
    """

    valid: Mapping[str, float]
    test: Mapping[str, float]


class Task(Protocol):
    """Data, a model for them, and what both are worth.

    Attributes
    ----------
    kind : str
        What the data are called in reports: ``"text"``, ``"images"``.
    unit : str
        What samples are called in the plural: ``"tokens"``, ``"images"``. Operations are counted for each.
    measure : str
        Name of the score that reports show beside the loss.
    model : Model
    steps_per_epoch : int
        Batches in an epoch.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    measure: ClassVar[str]

    @property
    def model(self) -> Model:
        """The model that is trained."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""

    def batches(self, epoch: int) -> Sequence[Batch]:
        """Return the (inputs, targets) of an epoch, the first is 0, in the order in which they are trained on.

        They depend on nothing but the epoch's number (and the run's configuration), so that a run can be resumed in
        the middle of one and can go back to an earlier one.
        """

    def probe(self) -> Probe:
        """Return what a method may ask before training: about the first batch of the first epoch."""

    def samples(self, steps: int) -> int:
        """Return how many tokens or images that many steps are trained on."""

    def evaluate(self, params: Params, part: PartName) -> dict[str, float]:
        """Return the scores on a part of the data, the loss first; see `Scores`."""

    def describe(self) -> tuple[str, str]:
        """Return what the data and the model are, a line for each, as a run says when it begins."""


def make_task(config: Config, data: Data) -> Task:
    """Return the task of a configuration.

    Raises
    ------
    ValueError
        If the data are not of the task's kind, or too few for a batch.
    """
    from refimpl.training.classification import ClassificationTask
    from refimpl.training.language import LanguageTask

    if isinstance(data, Images):
        if config.task != "classification":
            raise ValueError(f"the data {data.name!r} are images and task is {config.task!r}; set task=classification")
        return ClassificationTask(config, data)
    if config.task != "language-model":
        raise ValueError(f"the data {data.name!r} are a text and task is {config.task!r}; give a folder of images")
    return LanguageTask(config, data)
