"""Memorisation of random labels: what a network remembers of images whose labels tell it nothing.

Some training images get labels drawn at random (`refimpl.datasets.random_labels`). A network that is right about such
an image by its *random* label has memorised it; one that is right by its *true* label has learned from the others what
the image is. Both are measured on these images at the end of each epoch, in evaluation mode, before the next phase
begins, so that the phases of AC/DC can be told apart.

Source: Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks",
NeurIPS 2021, its experiment with random labels; the two accuracies and the way of drawing as in its authors' program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.analysis.models import logits_of
from refimpl.analysis.watch import Ledger, phase_of, read_ledger
from refimpl.datasets import Images, Part, RandomLabels
from refimpl.training.loop import Run


@dataclass(frozen=True)
class Memory:
    """What is remembered at the end of an epoch.

    Attributes
    ----------
    epoch : int
        From 0.
    phase : {"dense", "compressed"}
    random, true : float
        Fractions of the chosen images whose prediction is the random label, and the true one.
    """

    epoch: int
    phase: str
    random: float
    true: float


class MemoryWatcher(Ledger):
    """Measures both accuracies at the end of each epoch; see `Ledger` and `read_memory`.

    Parameters
    ----------
    labels : RandomLabels
        Whose images the run is trained on.
    """

    file = "memory.json"

    def __init__(self, labels: RandomLabels) -> None:
        super().__init__()
        self.labels = labels

    def started(self, run: Run) -> None:
        """Refuse a run on other images.

        Raises
        ------
        ValueError
            If the run is not trained on the images with these labels, or mirrors and moves them.
        """
        if not isinstance(run.corpus, Images) or run.corpus.sha256 != self.labels.images.sha256:
            raise ValueError("the run is trained on other images than those with random labels; give it those")
        if run.config.data.augment:
            raise ValueError(
                "data.augment is true, so that no image is seen twice and memorising is another matter; set it to false"
            )
        super().started(run)

    def entry(self, run: Run) -> Any:
        """Measure."""
        labels = self.labels
        part = Part(labels.pixels, labels.random)
        batch = run.config.data.eval_batch_size
        found = logits_of(run.task, run.trainer.evaluated(), labels.images, part, batch).argmax(axis=0)
        return {
            "phase": phase_of(run.state.params, run.trainer.specs),
            "random": float((found == labels.random).mean()),
            "true": float((found == labels.true).mean()),
        }

    @property
    def epochs(self) -> list[Memory]:
        """What was measured."""
        return _epochs(self.entries)


def read_memory(run: str | Path) -> list[Memory]:
    """Return what a `MemoryWatcher` left in a run's folder.

    Raises
    ------
    FileNotFoundError
        If it left nothing.
    ValueError
        If the file is damaged.
    """
    return _epochs(read_ledger(Path(run) / MemoryWatcher.file))


def _epochs(entries: Mapping[int, Any]) -> list[Memory]:
    return [Memory(epoch, **entry) for epoch, entry in sorted(entries.items())]
