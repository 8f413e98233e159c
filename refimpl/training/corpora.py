"""From a configuration to the data that it names, and what a run's folder remembers of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.datasets import CATALOGUE, Corpus, Images, load_default_corpus, load_image_folder, load_text_folder
from refimpl.datasets.image_files import find_layouts
from refimpl.datasets.sizes import IMAGE_SIZES
from refimpl.datasets.text import TEXT_FILES
from refimpl.training.config import Config
from refimpl.training.run_folder import RunFolder
from refimpl.training.task import Data


def open_corpus(config: Config) -> Data:
    """Load the text or the images of a configuration; if they are absent and can be downloaded, the error says how.

    Raises
    ------
    ValueError, FileNotFoundError
        As `refimpl.datasets.load_text_folder` and `load_image_folder` do, or if the folder holds what another task
        learns.
    """
    name, text = config.data.corpus, config.task == "language-model"
    if name == "default":
        if text:
            return load_default_corpus()
        raise ValueError(
            "data.corpus is 'default', which is a text, and task is 'classification'; give a folder of images with "
            "--data, such as the one that `refimpl fetch fashion-mnist` makes"
        )
    path = Path(name)
    known = None if text else IMAGE_SIZES.get(path.name)
    if known is not None and not known.readable:
        raise ValueError(
            f"data.corpus is {name!r}, and there is no reader of that data set's files: `refimpl flops` counts such a "
            f"run without them, and --data DIR trains it on a folder of images that can be read"
        )
    if not path.exists() and path.name in CATALOGUE:
        raise FileNotFoundError(
            f"there is no folder {str(path)!r}; `refimpl fetch {path.name} --out {path}` downloads "
            f"{'that text' if text else 'those images'}, and --data DIR takes {'it' if text else 'them'} from another "
            f"folder"
        )
    try:
        return load_text_folder(path) if text else load_image_folder(path, valid_fraction=config.data.valid_fraction)
    except FileNotFoundError:
        if text and find_layouts(path):
            raise ValueError(
                f"{name!r} holds images, and task is 'language-model'; give a folder with a text, or a recipe that "
                f"classifies, such as mlp-fashion-mnist-dense"
            ) from None
        if not text and any((path / file).is_file() for files in TEXT_FILES.values() for file in files):
            raise ValueError(
                f"{name!r} holds a text, and task is 'classification'; give a folder of images, or the recipe of a "
                f"language model, such as selfish-lstm"
            ) from None
        raise


def facts_of(corpus: Data) -> dict[str, Any]:
    """Return what ``config.json`` says of the data; with the vocabulary a model can be used without its text.

    No word has a space in it, so the vocabulary is one text with a space between words.
    """
    facts: dict[str, Any] = {"name": corpus.name, "sha256": corpus.sha256}
    if isinstance(corpus, Images):
        parts = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
        mean, deviation = corpus.statistics
        return {
            **facts,
            "images": {name: len(part.labels) for name, part in parts.items()},
            "shape": list(corpus.shape),
            "classes": corpus.classes,
            "standardised_by": {"mean": mean.tolist(), "standard_deviation": deviation.tolist()},
        }
    return {
        **facts,
        "tokens": {"train": corpus.train.size, "valid": corpus.valid.size, "test": corpus.test.size},
        "vocabulary_size": corpus.vocabulary_size,
        "vocabulary": " ".join(corpus.vocabulary),
    }


def vocabulary_of(folder: RunFolder) -> tuple[str, ...]:
    """Return the words of a language run's model, in the order of its embedding's rows."""
    words = folder.facts.get("data", {}).get("vocabulary")
    if words:
        return tuple(words.split(" "))
    corpus = open_corpus(folder.config)
    assert isinstance(corpus, Corpus)
    return corpus.vocabulary
