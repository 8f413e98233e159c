"""Word-level text corpora: read three files, give every word a number, add one `<eos>` a line."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

EOS = "<eos>"
UNK = "<unk>"

TEXT_FILES: dict[str, tuple[str, str, str]] = {
    "ptb": ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    "wikitext": ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    "text": ("train.txt", "valid.txt", "test.txt"),
}
"""Names of the train, valid and test files of every known layout of a folder, by the layout's name."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text split in three, as token ids.

    Attributes
    ----------
    name : str
        What the text is called in reports.
    train, valid, test : array of int32, shape (n_train,), (n_valid,), (n_test,)
        Token ids in reading order, each the index of its word in `vocabulary`.
    vocabulary : tuple of str
        The distinct words, by descending frequency in train; equally frequent ones by code point.
    sha256 : str
        Hexadecimal digest of the bytes of the train, valid and test text, in that order.
    """

    name: str
    train: npt.NDArray[np.int32]
    valid: npt.NDArray[np.int32]
    test: npt.NDArray[np.int32]
    vocabulary: tuple[str, ...]
    sha256: str

    @property
    def vocabulary_size(self) -> int:
        """Number of distinct words, `<eos>` and `<unk>` included where they occur."""
        return len(self.vocabulary)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of `tokens` joined by spaces, with a line break in place of each `<eos>`."""
        text = " ".join("\n" if word == EOS else word for word in map(self.vocabulary.__getitem__, tokens))
        return text.replace(" \n", "\n").replace("\n ", "\n")


def build_vocabulary(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Order words by descending count, and equally frequent ones by code point.

    The order depends on nothing but the counts. Words that only valid or test has count 0, so they come
    last and leave the numbers of the words of train alone.
    """
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def load_text_folder(path: str | PathLike[str], *, vocabulary_from: Literal["train", "all"] = "all") -> Corpus:
    r"""Load the train, valid and test text of a folder.

    A folder is known by its files' names: ``ptb.{train,valid,test}.txt`` (Penn Treebank),
    ``wiki.{train,valid,test}.tokens`` (WikiText-2 and WikiText-103) or ``{train,valid,test}.txt`` (any
    text). Lines end with ``"\n"`` and nothing else, since the published texts hold other characters that
    Python takes for line ends; words are separated by ASCII white space; every line, also an empty one, ends
    with one `<eos>`; an empty piece after the final ``"\n"`` is no line. Nothing is lowercased or replaced.

    Parameters
    ----------
    path : path
        The folder.
    vocabulary_from : {"all", "train"}
        Which files make the vocabulary. ``"all"``, as in the loaders that papers on these texts use, never
        meets an unknown word. With ``"train"`` a word that train lacks becomes `<unk>`, which train must
        hold. For the published PTB and WikiText-2 both give the same vocabulary.

    Returns
    -------
    Corpus
        Named ``"ptb"``, ``"wikitext"``, or as the folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or one or more of the three files are missing.
    ValueError
        If `path` is a file, the folder holds two of the known layouts, a file holds no word or is not
        UTF-8, the text has a single distinct word, train lacks a word and has no `<unk>` under
        ``vocabulary_from="train"``, or `vocabulary_from` is something else.

    Notes
    -----
    Sources: Mikolov et al. 2010 (the preprocessing of PTB), Merity et al. 2016, arXiv:1609.07843 (WikiText).
    """
    if vocabulary_from not in ("train", "all"):
        raise ValueError(f"vocabulary_from is {vocabulary_from!r}; give 'train' or 'all'.")
    folder = Path(path)
    name, files = _find_files(folder)

    sha256 = hashlib.sha256()
    streams: list[list[bytes]] = []
    for file in files:
        data = file.read_bytes()
        sha256.update(data)
        streams.append(_words(file, data))

    # Words stay bytes until each distinct one has been counted: a text of millions of words has thousands.
    counts = Counter({word.decode(): count for word, count in Counter(streams[0]).items()})
    for file, stream in zip(files[1:], streams[1:]):
        absent = sorted({word.decode() for word in set(stream)} - counts.keys())
        if absent and vocabulary_from == "train" and UNK not in counts:
            raise ValueError(
                f"{file} has {len(absent)} words that {files[0].name} lacks (such as {absent[0]!r}), and "
                f"{files[0].name} has no {UNK} to stand for them; use vocabulary_from='all' or put {UNK} "
                f"into the text."
            )
        if vocabulary_from == "all":
            counts.update(dict.fromkeys(absent, 0))
    if len(counts.keys() - {EOS}) < 2:
        only = next(iter(counts.keys() - {EOS}))
        raise ValueError(
            f"The text in {folder} has a vocabulary of one word ({only!r}), which leaves nothing to predict; "
            f"give a text with at least two different words."
        )

    vocabulary = build_vocabulary(counts)
    index = {word.encode(): i for i, word in enumerate(vocabulary)}
    train, valid, test = (_encode(stream, index) for stream in streams)
    return Corpus(name or folder.resolve().name, train, valid, test, vocabulary, sha256.hexdigest())


def _encode(words: list[bytes], index: Mapping[bytes, int]) -> npt.NDArray[np.int32]:
    """Number the words; one that is not in `index` gets the number of `<unk>`."""
    unknown = index.get(UNK.encode(), -1)
    return np.fromiter((index.get(word, unknown) for word in words), np.int32, len(words))


def _words(file: Path, data: bytes) -> list[bytes]:
    """Split a file's bytes into its words, with one `<eos>` at the end of every line."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} cannot be read; "
            f"save the file as UTF-8."
        ) from None
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    # bytes.split() knows only ASCII white space, unlike str.split(), which would cut at a no-break space.
    pieces = [line.split() for line in lines]
    if not any(pieces):
        raise ValueError(f"{file} is empty: it holds no word; give a file with text in it.")
    eos = (EOS.encode(),)
    return list(chain.from_iterable(chain(piece, eos) for piece in pieces))


def _find_files(folder: Path) -> tuple[str | None, tuple[Path, Path, Path]]:
    """Return the name that the layout gives the corpus, if any, and the three files."""
    known = "; ".join(", ".join(names) for names in TEXT_FILES.values())
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}; give one that holds one of these: {known}.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds one of these: {known}.")
    present = {layout: [name for name in names if (folder / name).is_file()] for layout, names in TEXT_FILES.items()}
    complete = [layout for layout, names in present.items() if len(names) == 3]
    if len(complete) > 1:
        raise ValueError(
            f"{folder} holds more than one text ({' and '.join(complete)}); give a folder with the three files of one."
        )
    if not complete:
        for layout, names in present.items():
            if names:
                missing = [name for name in TEXT_FILES[layout] if name not in names]
                raise FileNotFoundError(
                    f"{folder} holds {' and '.join(names)} but lacks {' and '.join(missing)}; "
                    f"put all three files there."
                )
        raise FileNotFoundError(f"{folder} holds no text that is known; put one of these there: {known}.")
    layout = complete[0]
    train, valid, test = (folder / name for name in TEXT_FILES[layout])
    return (None if layout == "text" else layout), (train, valid, test)
