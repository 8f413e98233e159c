"""The embedded default corpus: the English that every CPython carries in its help topics and docstrings.

It lets a first training run start without a download. The text depends on the Python version and on which
optional parts of the standard library are installed, so its sha256 is reported, never checked.
"""

import ast
import gc
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np

from refimpl.datasets.text import EOS, UNK, Corpus, build_vocabulary

BLOCK_TOKENS = 500
BLOCKS_IN_CYCLE = 20
MIN_COUNT = 3

SKIPPED = frozenset(
    # Tests speak to their authors; these applications and generated tables hold hardly a docstring, and
    # some distributions leave them out; pydoc_data is read as the topics it holds.
    ("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data")
)

Paragraph = tuple[str, ...]
"""Sentences, each a string of lowercase tokens separated by single spaces."""

_TOKEN = re.compile(r"\w+(?:'\w+)?|([^\w\s])\1*")
_BLANK_LINES = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[\"'(`A-Z])")
_ALPHANUMERIC = re.compile(r"[^\W_]")


def load_default_corpus() -> Corpus:
    """Load the help topics of `pydoc_data` and the docstrings of the standard library as a corpus.

    The text is made in four steps, each deterministic for one installation of Python.

    1. *Documents*: the topics by name; then the docstrings of modules, classes and their functions, read
       from the sources with `ast`, files in sorted order. Only modules in `sys.stdlib_module_names` count,
       without those in `SKIPPED`; a file that cannot be read, decoded or parsed is passed over.
    2. *Paragraphs and sentences*: see `normalise`. Of equal paragraphs only the first stays, so that no
       docstring is both trained and tested on.
    3. *Split*: whole paragraphs fill blocks of at least 500 tokens; of every 20 blocks the 10th is valid, the
       20th is test and the others are train, which is about 5, 5 and 90 %.
    4. *Vocabulary*: the words seen at least 3 times in train, and `<eos>` at the end of every sentence;
       all other words are `<unk>`.

    Returns
    -------
    Corpus
        About 380,000 tokens with a vocabulary of about 5,000 words on CPython 3.11. Its sha256 is that of
        the normalised text before any word becomes `<unk>`, UTF-8, one sentence a line, train then valid
        then test.

    Raises
    ------
    FileNotFoundError
        If this Python carries neither topics nor sources, or too little of both to be split.

    Notes
    -----
    Nearly all of the time, 1 to 2 seconds, goes into parsing about 8 MB of sources; nothing is cached.
    Where the standard library comes as a zip file or frozen, its sources are absent and the topics are used
    alone.
    """
    documents = chain(_topics(), _docstrings(_stdlib_folder()))
    splits = split_paragraphs(unique_paragraphs(documents))
    if not all(splits):
        raise FileNotFoundError(
            f"The Python at {sys.prefix} lacks its help topics (pydoc_data.topics) and the sources of its "
            f"standard library, or most of both, so there is no default corpus; give a folder with a text."
        )

    texts = ["".join(f"{sentence}\n" for paragraph in split for sentence in paragraph) for split in splits]
    sha256 = hashlib.sha256("".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    streams = [text.replace("\n", f" {EOS} ").split(" ")[:-1] for text in texts]

    counts = Counter(streams[0])
    frequent = Counter({word: count for word, count in counts.items() if count >= MIN_COUNT})
    frequent[UNK] = counts.total() - frequent.total()
    vocabulary = build_vocabulary(frequent)
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = index[UNK]
    train, valid, test = (
        np.fromiter((index.get(word, unknown) for word in stream), np.int32, len(stream)) for stream in streams
    )
    return Corpus("python-docs", train, valid, test, vocabulary, sha256)


def normalise(document: str) -> Iterator[Paragraph]:
    """Cut a document into paragraphs of sentences of lowercase tokens.

    Paragraphs end at blank lines. Within one, lines without a letter or digit (rules) and rows of tables
    (beginning with ``|``) are dropped, and so is everything from the first line that begins with ``>>>``:
    an interactive session is not English. A sentence ends at white space that has ``.``, ``!``, ``?`` or
    ``:`` before it and a capital, a quotation mark or a parenthesis after it. A token is a run of letters,
    digits and underscores, with ``'`` and more of them if any (``don't``, ``python's``), or a run of one
    punctuation mark (``.``, ``...``, ``**``).
    """
    for text in _BLANK_LINES.split(document):
        lines = []
        for line in map(str.strip, text.split("\n")):
            if line.startswith(">>>"):
                break
            if _ALPHANUMERIC.search(line) and not line.startswith("|"):
                lines.append(line)
        sentences = _SENTENCE_END.split(" ".join(lines))
        tokens = (" ".join(match.group() for match in _TOKEN.finditer(s.lower())) for s in sentences)
        if paragraph := tuple(sentence for sentence in tokens if sentence):
            yield paragraph


def unique_paragraphs(documents: Iterable[str]) -> list[Paragraph]:
    """Normalise documents into paragraphs and keep the first of equal ones, in order."""
    return list(dict.fromkeys(chain.from_iterable(map(normalise, documents))))


def split_paragraphs(
    paragraphs: Iterable[Paragraph],
) -> tuple[list[Paragraph], list[Paragraph], list[Paragraph]]:
    """Deal blocks of whole paragraphs out to train, valid and test.

    A block is closed by the paragraph that brings it to `BLOCK_TOKENS` tokens (`<eos>` included). Of every
    `BLOCKS_IN_CYCLE` blocks the middle one is valid, the last is test and the others are train.
    """
    train: list[Paragraph] = []
    valid: list[Paragraph] = []
    test: list[Paragraph] = []
    block = tokens = 0
    for paragraph in paragraphs:
        position = block % BLOCKS_IN_CYCLE + 1
        split = {BLOCKS_IN_CYCLE // 2: valid, BLOCKS_IN_CYCLE: test}.get(position, train)
        split.append(paragraph)
        tokens += sum(sentence.count(" ") + 2 for sentence in paragraph)
        if tokens >= BLOCK_TOKENS:
            block, tokens = block + 1, 0
    return train, valid, test


def _topics() -> list[str]:
    """Return the help topics of `pydoc`, by name; none where they are not installed or of another form."""
    try:
        topics = getattr(import_module("pydoc_data.topics"), "topics", None)
    except ImportError:
        return []
    if not isinstance(topics, Mapping):
        return []
    return [text for _, text in sorted(topics.items()) if isinstance(text, str)]


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _docstrings(stdlib: Path) -> Iterator[str]:
    """Yield the docstrings in the sources under `stdlib`, file by file and in the order of each file."""
    with warnings.catch_warnings(), _paused_garbage_collector():
        # Somebody else's invalid escape sequences are no concern of whoever trains on the text.
        warnings.simplefilter("ignore")
        for file in _sources(stdlib):
            try:
                tree = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            yield from _docstrings_of(tree)


@contextmanager
def _paused_garbage_collector() -> Iterator[None]:
    """Keep the cycle collector from walking syntax trees while they grow, which doubles the time to parse."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sources(stdlib: Path) -> Iterator[Path]:
    """Yield the Python files of the standard library's modules in sorted order."""
    if not stdlib.is_dir():
        return
    for entry in sorted(os.listdir(stdlib)):
        name = entry.removesuffix(".py")
        if name not in sys.stdlib_module_names or name in SKIPPED:
            continue
        if entry != name:
            yield stdlib / entry
        for folder, subfolders, files in os.walk(stdlib / entry):
            subfolders[:] = sorted(subfolder for subfolder in subfolders if subfolder not in SKIPPED)
            yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module and of what it defines, except inside functions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield text
    if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try | ast.ExceptHandler | ast.With):
        for child in ast.iter_child_nodes(node):
            yield from _docstrings_of(child)
