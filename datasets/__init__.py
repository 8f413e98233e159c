"""Data to train on: text folders, an embedded default corpus, batches, and verified downloads.

This package stands beside the rest of the library: it imports none of it and needs only NumPy and tqdm.
"""

from refimpl.datasets.batches import Windows, batchify, windows
from refimpl.datasets.catalogue import CATALOGUE, RemoteDataset, RemoteFile
from refimpl.datasets.default_corpus import load_default_corpus
from refimpl.datasets.fetch import fetch
from refimpl.datasets.text import EOS, UNK, Corpus, load_text_folder

__all__ = [
    "CATALOGUE",
    "EOS",
    "UNK",
    "Corpus",
    "RemoteDataset",
    "RemoteFile",
    "Windows",
    "batchify",
    "fetch",
    "load_default_corpus",
    "load_text_folder",
    "windows",
]
