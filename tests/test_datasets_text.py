"""Text folders: counts, numbering, and every mistake that a folder can hold."""

import hashlib
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refimpl.datasets import EOS, UNK, Corpus, load_text_folder
from refimpl.datasets.text import TEXT_FILES

DATA = os.environ.get("REFIMPL_DATA")

# A no-break space and Unicode's line separators are parts of words: only "\n" and ASCII white space cut.
WORDS = st.text(st.sampled_from("abé\u00a0\u2028\u0085"), min_size=1, max_size=3)
LINES = st.lists(st.lists(WORDS, max_size=4), min_size=1, max_size=6).filter(any)


def write(
    folder: Path,
    train: bytes | str,
    valid: bytes | str = "a b\n",
    test: bytes | str = "b\n",
    layout: str = "text",
) -> Path:
    for name, text in zip(TEXT_FILES[layout], (train, valid, test)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def words_of(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    return [corpus.vocabulary[i] for i in tokens]


@given(st.tuples(LINES, LINES, LINES), st.booleans())
@example(([["a"], [], ["b", "a"]], [["c"]], [["b"]]), True)
def test_every_word_comes_back_in_order_with_one_eos_a_line(texts: tuple, final_newline: bool) -> None:
    if len({word for line in texts[0] for word in line}) < 2:
        texts[0][0] = ["a", "b"]
    files = ["\n".join(" ".join(line) for line in lines) for lines in texts]
    # A last line that is empty is only a line if a "\n" follows it.
    files = [file + "\n" if final_newline or not lines[-1] else file for file, lines in zip(files, texts)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_text_folder(write(Path(folder), *files))
    for lines, tokens in zip(texts, (corpus.train, corpus.valid, corpus.test)):
        assert tokens.dtype == np.int32
        assert words_of(corpus, tokens) == [word for line in lines for word in [*line, EOS]]
    assert corpus.sha256 == hashlib.sha256("".join(files).encode()).hexdigest()

    counts = Counter(words_of(corpus, corpus.train))
    keys = [(-counts[word], word) for word in corpus.vocabulary]
    assert keys == sorted(set(keys))
    assert set(corpus.vocabulary) == {EOS, *(word for lines in texts for line in lines for word in line)}


def test_white_space_and_carriage_returns_separate_words(tmp_path: Path) -> None:
    corpus = load_text_folder(write(tmp_path, "a\t b  a\r\n\r\n b\r\n"))
    assert words_of(corpus, corpus.train) == ["a", "b", "a", EOS, EOS, "b", EOS]


def test_numbers_follow_frequency_then_code_point_and_words_of_valid_come_last(tmp_path: Path) -> None:
    corpus = load_text_folder(write(tmp_path, "b a c c\na b\n", "z c y\n", "x\n"))
    assert corpus.vocabulary == (EOS, "a", "b", "c", "x", "y", "z")
    assert corpus.vocabulary_size == 7
    assert corpus.name == tmp_path.name


def test_decode_puts_line_breaks_for_eos(tmp_path: Path) -> None:
    corpus = load_text_folder(write(tmp_path, "b a c\n\na b\n"))
    assert corpus.decode(corpus.train) == "b a c\n\na b\n"


def test_vocabulary_from_train_maps_unknown_words_to_unk(tmp_path: Path) -> None:
    folder = write(tmp_path, f"a b {UNK}\n", "b z a\n", "y\n")
    corpus = load_text_folder(folder, vocabulary_from="train")
    assert set(corpus.vocabulary) == {"a", "b", UNK, EOS}
    assert words_of(corpus, corpus.valid) == ["b", UNK, "a", EOS]
    assert words_of(corpus, corpus.test) == [UNK, EOS]
    every = load_text_folder(folder)
    assert words_of(every, every.valid) == ["b", "z", "a", EOS]
    assert every.vocabulary[: corpus.vocabulary_size] == corpus.vocabulary
    np.testing.assert_array_equal(every.train, corpus.train)


def test_vocabulary_from_train_without_unk_names_the_word_and_the_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path, "a b\n", "a b\n", "b zebra\n")
    with pytest.raises(ValueError, match=r"test\.txt has 1 words .*'zebra'.*vocabulary_from='all'"):
        load_text_folder(folder, vocabulary_from="train")


@pytest.mark.parametrize("layout", TEXT_FILES)
def test_every_layout_is_known_by_its_files(tmp_path: Path, layout: str) -> None:
    corpus = load_text_folder(write(tmp_path, "a b\n", layout=layout))
    assert corpus.name == (tmp_path.name if layout == "text" else layout)
    assert corpus.train.size == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; give .*ptb\.train\.txt"):
        load_text_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a b\n")
    with pytest.raises(ValueError, match=r"train\.txt is a file; give the folder"):
        load_text_folder(tmp_path / "train.txt")


def test_a_folder_without_a_text_names_the_known_files(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a b")
    (tmp_path / "train.txt").mkdir()
    known = r"no text that is known.*ptb\.valid\.txt.*wiki\.test\.tokens.*train\.txt, valid\.txt, test\.txt"
    with pytest.raises(FileNotFoundError, match=known):
        load_text_folder(tmp_path)


def test_a_folder_with_one_file_too_few_names_it(tmp_path: Path) -> None:
    (write(tmp_path, "a b\n", layout="ptb") / "ptb.valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ptb\.train\.txt and ptb\.test\.txt but lacks ptb\.valid"):
        load_text_folder(tmp_path)


def test_a_folder_with_two_texts_is_refused(tmp_path: Path) -> None:
    write(write(tmp_path, "a b\n", layout="ptb"), "a b\n")
    with pytest.raises(ValueError, match=r"more than one text \(ptb and text\)"):
        load_text_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n\n"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_without_words_is_named(tmp_path: Path, content: str, which: int) -> None:
    texts = ["a b\n"] * 3
    texts[which] = content
    with pytest.raises(ValueError, match=rf"{TEXT_FILES['text'][which]} is empty"):
        load_text_folder(write(tmp_path, *texts))


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"valid\.txt is not UTF-8: byte 0xff at offset 5 "):
        load_text_folder(write(tmp_path, "a b\n", b"a \xc3\xa9 \xff\n"))


def test_a_vocabulary_of_one_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary of one word \('a'\)"):
        load_text_folder(write(tmp_path, "a a\na\n", "a\n", "a\n"))


def test_an_unknown_source_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary_from is 'valid'; give 'train' or 'all'"):
        load_text_folder(write(tmp_path, "a b\n"), vocabulary_from="valid")  # type: ignore[arg-type]


@pytest.mark.skipif(DATA is None, reason="REFIMPL_DATA names no folder with data")
@pytest.mark.parametrize(
    ("folder", "name", "tokens", "vocabulary_size"),
    [
        ("ptb", "ptb", (929_589, 73_760, 82_430), 10_000),
        ("wikitext-2", "wikitext", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_the_published_counts_come_out(
    folder: str, name: str, tokens: tuple[int, int, int], vocabulary_size: int
) -> None:
    assert DATA is not None
    corpus = load_text_folder(Path(DATA) / folder)
    assert corpus.name == name
    assert (corpus.train.size, corpus.valid.size, corpus.test.size) == tokens
    assert corpus.vocabulary_size == vocabulary_size
    assert {EOS, UNK} <= set(corpus.vocabulary)
    assert load_text_folder(Path(DATA) / folder, vocabulary_from="train").vocabulary == corpus.vocabulary
