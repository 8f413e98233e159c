"""The two models that a run of AC/DC leaves, and how far they agree, image by image.

The sparse one is the run's best checkpoint, ``checkpoints/best.npz``; its dense twin is the best of the dense epochs,
``checkpoints/best-dense.npz``. See `refimpl.analysis.twins` for the measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from refimpl.analysis.twins import Agreement, agreement
from refimpl.datasets import ImageBatches, Images, Part
from refimpl.kernels import threads
from refimpl.training import twin
from refimpl.training.corpora import open_corpus
from refimpl.training.run_folder import RunFolder
from refimpl.training.task import PartName, Task, make_task
from refimpl.weights import Params, values_of


def logits_of(task: Task, params: Params, images: Images, part: Part, batch: int) -> np.ndarray:
    """Return the scores of a part's images in evaluation mode, in their order.

    Parameters
    ----------
    task : Task
        Of a classifier.
    params : Params
        To evaluate with: with the buffers.
    images : Images
        Whose statistics standardise.
    part : Part
    batch : int
        Images that are evaluated together.

    Returns
    -------
    ndarray, shape (classes, n)
    """
    count = len(part.labels)
    dtype = values_of(next(iter(params.values()))).dtype
    batches = ImageBatches(images, part, np.arange(count), min(batch, count), dtype)
    model: Any = task.model
    with threads.one_blas_thread():
        return np.concatenate([model.logits(params, inputs) for inputs, _ in batches], axis=1)


def agreement_of(
    run: str | Path, other: str | Path | None = None, *, corpus: Images | None = None, part: PartName = "test"
) -> Agreement:
    """Compare two models that were trained on one task, image by image.

    Parameters
    ----------
    run : path-like
        A run's folder, of which the best model is taken.
    other : path-like, optional
        The folder of another run on the same data, with the same network: its best model. By default the dense twin of
        the first run's model.
    corpus : Images, optional
        By default those that the first run's configuration names.
    part : {"test", "valid"}
        Of which images.

    Raises
    ------
    FileNotFoundError
        If a run or a model is not there.
    ValueError
        If the runs are on a text, or on other data than these.
    """
    folder = RunFolder.open(run)
    images = open_corpus(folder.config) if corpus is None else corpus
    if not isinstance(images, Images):
        raise ValueError(f"the run in {str(run)!r} learns a text; agreement is that of classifiers of images")
    second = RunFolder.open(run if other is None else other)
    for one in (folder, second):
        one.check_data(images.sha256)
    models = [folder.best(), second.best_dense() if other is None else second.best()]
    task = make_task(folder.config, images)
    held_out, batch = (images.test if part == "test" else images.valid), folder.config.data.eval_batch_size
    a, b = (logits_of(task, twin.params_of(model), images, held_out, batch) for model in models)
    return agreement(a, b, held_out.labels.astype(np.int64))
