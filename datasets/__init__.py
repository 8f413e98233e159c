"""Data to train on: folders of text or images, an embedded default corpus, batches, and verified downloads.

This package stands beside the rest of the library: it imports none of it and needs only NumPy and tqdm.
"""

from refimpl.datasets.batches import Windows, batchify, windows
from refimpl.datasets.catalogue import CATALOGUE, RemoteDataset, RemoteFile
from refimpl.datasets.default_corpus import load_default_corpus
from refimpl.datasets.fetch import fetch
from refimpl.datasets.image_files import load_image_folder
from refimpl.datasets.images import ImageBatches, Images, Part, random_crop, random_flip
from refimpl.datasets.text import EOS, UNK, Corpus, load_text_folder
from refimpl.datasets.variants import RandomLabels, first_images, random_labels

__all__ = [
    "CATALOGUE",
    "EOS",
    "UNK",
    "Corpus",
    "ImageBatches",
    "Images",
    "Part",
    "RandomLabels",
    "RemoteDataset",
    "RemoteFile",
    "Windows",
    "batchify",
    "fetch",
    "first_images",
    "load_default_corpus",
    "load_image_folder",
    "load_text_folder",
    "random_crop",
    "random_flip",
    "random_labels",
    "windows",
]
