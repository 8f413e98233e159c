"""The embedded corpus: deterministic, without leaks between its parts, content with what is installed."""

import gc
import hashlib
import inspect
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.datasets import EOS, UNK, Corpus, default_corpus, load_default_corpus
from refimpl.datasets.default_corpus import normalise, split_paragraphs, unique_paragraphs


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_default_corpus()


def test_its_parts_have_their_sizes_and_vocabulary(corpus: Corpus) -> None:
    parts = (corpus.train, corpus.valid, corpus.test)
    total = sum(part.size for part in parts)
    assert total > 60_000
    # Blocks are dealt out 18:1:1, and their lengths differ by a paragraph: far less than the margin here.
    for part, share in zip(parts, (0.9, 0.05, 0.05)):
        assert part.dtype == np.int32
        assert part.size / total == pytest.approx(share, abs=0.02)
        assert part.min() >= 0
        assert part.max() < corpus.vocabulary_size
        assert corpus.vocabulary[part[-1]] == EOS
    counts = np.bincount(corpus.train, minlength=corpus.vocabulary_size)
    keys = [(-count, word) for count, word in zip(counts.tolist(), corpus.vocabulary)]
    assert keys == sorted(set(keys))
    assert min(count for count, word in zip(counts, corpus.vocabulary) if word != UNK) == 3
    assert {EOS, UNK} <= set(corpus.vocabulary)


def fingerprint(corpus: Corpus) -> str:
    numbers = [part.tobytes() for part in (corpus.train, corpus.valid, corpus.test)]
    words = repr(corpus.vocabulary).encode()
    return corpus.sha256 + hashlib.sha256(b"".join([*numbers, words])).hexdigest()


def test_it_is_the_same_in_another_process_with_another_order_of_sets(corpus: Corpus) -> None:
    # The child takes this function's source, so that both sides compute the same thing.
    program = "import hashlib\nfrom refimpl.datasets import Corpus, load_default_corpus\n"
    program += inspect.getsource(fingerprint) + "print(fingerprint(load_default_corpus()))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == fingerprint(corpus)


def test_the_sha256_is_that_of_the_text_before_unk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_corpus, "_topics", lambda: [f"Word{i} and more." for i in range(5000)])
    monkeypatch.setattr(default_corpus, "_stdlib_folder", lambda: tmp_path)
    corpus = load_default_corpus()
    paragraphs = [(f"word{i} and more .",) for i in range(5000)]  # 5 tokens each: blocks of 100
    blocks = [paragraphs[i : i + 100] for i in range(0, 5000, 100)]
    by_part = {
        "train": [block for i, block in enumerate(blocks) if i % 20 not in (9, 19)],
        "valid": blocks[9::20],
        "test": blocks[19::20],
    }
    text = "".join(
        f"{sentence}\n"
        for part in ("train", "valid", "test")
        for block in by_part[part]
        for paragraph in block
        for sentence in paragraph
    )
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.vocabulary == (".", EOS, UNK, "and", "more")
    for part in ("train", "valid", "test"):
        assert corpus.decode(getattr(corpus, part)) == f"{UNK} and more .\n" * (100 * len(by_part[part]))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            "Title\n*****\n\nOne line,\n   joined.  Next?  yes",
            [("title",), ("one line , joined .", "next ? yes")],
        ),
        ("Don't stop: see os.path (Python's).", [("don't stop : see os . path ( python's ) .",)]),
        ("Note: The end... **bold** --flag", [("note :", "the end ... ** bold ** -- flag")]),
        ("Try it:\n>>> f(1)\n2\n\n>>> g()\n\nAfter.", [("try it :",), ("after .",)]),
        ("Table:\n+---+\n| a |\n+---+\n", [("table :",)]),
        ("Éa\u00a0b _x1", [("éa b _x1",)]),
        ("\n \n---\n", []),
    ],
)
def test_documents_are_normalised(document: str, expected: list[tuple[str, ...]]) -> None:
    assert list(normalise(document)) == expected


@given(st.lists(st.text(max_size=80), max_size=5))
def test_tokens_have_no_white_space_no_capitals_and_no_markers(documents: list[str]) -> None:
    paragraphs = unique_paragraphs(documents)
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert paragraph
        for sentence in paragraph:
            assert sentence.split() == sentence.split(" ")
            assert sentence == sentence.lower()
            assert not {EOS, UNK} & set(sentence.split(" "))


@given(st.lists(st.integers(1, 400), max_size=200))
def test_the_split_deals_out_every_paragraph_once_in_order(lengths: list[int]) -> None:
    paragraphs = [(" ".join([f"p{i}"] * length),) for i, length in enumerate(lengths)]
    parts = split_paragraphs(paragraphs)
    assert Counter(p for part in parts for p in part) == Counter(paragraphs)
    # An independent witness: where each paragraph starts, counting only closed blocks.
    expected: tuple[list, list, list] = ([], [], [])
    block, filled = 0, 0
    for paragraph, length in zip(paragraphs, lengths):
        expected[{9: 1, 19: 2}.get(block % 20, 0)].append(paragraph)
        filled += length + 1
        if filled >= 500:
            block, filled = block + 1, 0
    assert parts == expected


def test_no_paragraph_is_in_two_parts() -> None:
    documents = [f"Words of {i % 300} again and again." for i in range(3000)] * 3
    train, valid, test = (set(part) for part in split_paragraphs(unique_paragraphs(documents)))
    assert not train & valid
    assert not train & test
    assert not valid & test


def make_stdlib(folder: Path) -> Path:
    """A small standard library with everything that must be passed over."""
    files: dict[str, str | bytes] = {
        "abc.py": '"""Abc doc."""\nif True:\n  def f():\n    """F doc."""\n    def g():\n      """No."""\n',
        "json/__init__.py": '"""Json doc."""\nclass A:\n  """A doc."""\n  async def m(_):\n    "M doc."\n',
        "json/tool.py": 'x = 1\ntry:\n    pass\nexcept E:\n    def h():\n        "\\d H doc."\n',
        "json/tests/test_x.py": '"""No test."""\n',
        "test/test_y.py": '"""No test."""\n',
        "site-packages/numpy.py": '"""No package."""\n',
        "encodings/cp1.py": '"""No table."""\n',
        "bisect.py": '"""No: a syntax error."""\ndef\n',
        "numbers.py": b'"""No: not UTF-8 \xff."""\n',
        "json/notes.txt": '"""No."""',
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "json" / "broken.py").symlink_to(folder / "nowhere.py")
    return folder


def test_docstrings_come_from_the_library_alone_in_sorted_order(tmp_path: Path) -> None:
    expected = ["Abc doc.", "F doc.", "Json doc.", "A doc.", "M doc.", "\\d H doc."]
    assert list(default_corpus._docstrings(make_stdlib(tmp_path))) == expected
    assert gc.isenabled()


def test_the_collector_is_running_again_when_the_reader_stops_early(tmp_path: Path) -> None:
    docstrings: Iterator[str] = default_corpus._docstrings(make_stdlib(tmp_path))
    next(docstrings)
    del docstrings
    assert gc.isenabled()


def test_without_sources_the_topics_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus) -> None:
    pytest.importorskip("pydoc_data.topics")
    monkeypatch.setattr(default_corpus, "_stdlib_folder", lambda: tmp_path / "python.zip")
    topics_alone = load_default_corpus()
    assert 0 < topics_alone.train.size < corpus.train.size


def test_without_topics_the_sources_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(default_corpus, "_docstrings", lambda _: (f"Doc {i} of a module." for i in range(3000)))
    assert {"doc", "module"} <= set(load_default_corpus().vocabulary)


@pytest.mark.parametrize("topics", [None, "text", {"a": 1, "b": "Too short."}])
def test_without_both_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, topics: object) -> None:
    module = type(sys)("pydoc_data.topics")
    module.__dict__["topics"] = topics
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    monkeypatch.setattr(default_corpus, "_stdlib_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pydoc_data\.topics.*give a folder with a text\.$"):
        load_default_corpus()
