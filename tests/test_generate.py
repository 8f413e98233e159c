"""Sampling: the distribution, the temperature, prompts, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.generate import _draw, decode, encode_prompt, sample
from refimpl.models.language_model import LanguageModel
from refimpl.rng import generator
from refimpl.weights import Params, Support, values_of

MODEL = LanguageModel(vocabulary=7, embedding_size=4, hidden_size=5, layers=2, dropout_hidden=0.5, weight_drop=0.5)


def params(seed: int = 0, density: float = 0.5) -> Params:
    rng = np.random.default_rng(seed)
    specs = {name: spec for name, spec in MODEL.specs().items() if spec.prunable}
    supports = {name: Support.from_mask(rng.random(spec.shape) < density) for name, spec in specs.items()}
    drawn = MODEL.init(seed, np.float64, supports)
    # Larger weights than initial ones, so that the words differ in probability.
    for weight in drawn.values():
        values_of(weight)[...] *= 8
    return drawn


def probabilities(p: Params, tokens: list[int]) -> np.ndarray:
    """Return the distribution of the word after ``tokens``, read as one window."""
    with kernels.use("spec"):
        scores, _ = MODEL.logits(p, np.array(tokens, np.int32)[:, None], MODEL.zero_states(1, np.float64))
    exponentials = np.exp(scores[-1, :, 0])
    return exponentials / exponentials.sum()


@given(seed=st.integers(0, 50), prompt=st.lists(st.integers(0, 6), max_size=4), words=st.integers(0, 6))
@settings(max_examples=25)
def test_temperature_0_takes_the_likeliest_word_after_everything_read_so_far(
    seed: int, prompt: list[int], words: int
) -> None:
    p = params(seed)
    drawn = sample(MODEL, p, words=words, prompt=prompt, temperature=0, start=3)
    read = prompt or [3]
    for token in drawn:
        assert token == probabilities(p, read).argmax()
        read = [*read, token]
    assert len(drawn) == words


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_words_come_as_often_as_the_model_says(temperature: float) -> None:
    p = params(1)
    expected = probabilities(p, [2, 5]) ** (1 / temperature)
    expected /= expected.sum()
    n = 1000
    counts = np.zeros(7)
    rng = generator(4, "test")
    for _ in range(n):
        counts[sample(MODEL, p, words=1, prompt=[2, 5], temperature=temperature, rng=rng)[0]] += 1
    # Five standard deviations of a binomial count, and one word for rounding.
    assert (np.abs(counts - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected)) + 1).all()


@given(
    scores=st.lists(st.floats(-2000, 2000), min_size=1, max_size=9),
    temperature=st.floats(1e-300, 1e300) | st.just(0.0),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_word_is_drawn_whatever_the_scores(scores: list[float], temperature: float, seed: int) -> None:
    with np.errstate(over="ignore"):
        word = _draw(np.array(scores), temperature, generator(seed, "draw"))
    assert 0 <= word < len(scores)
    if temperature <= 1e-200:  # any other word's weight underflows, if it is not equally likely
        assert scores[word] == max(scores)


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    a, b, c = (sample(MODEL, params(), words=40, rng=generator(seed, "sample")) for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_an_impossible_word_is_never_drawn() -> None:
    scores = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    drawn = {_draw(scores, 1.0, generator(seed, "draw")) for seed in range(60)}
    assert drawn == {1, 3}

    class Zero(np.random.Generator):
        def random(self, *arguments: Any, **options: Any) -> Any:
            return 0.0  # the one number at which the first word, of probability 0, is nearest

    assert _draw(scores, 1.0, Zero(np.random.PCG64())) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"words": -1}, "words is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"prompt": [0, 7]}, "token 7 is outside the vocabulary; give ids from 0 to 6"),
        ({"start": -1}, "token -1"),
    ],
)
def test_what_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sample(MODEL, params(), **{"words": 1, **options})


def test_a_prompt_in_words_and_back() -> None:
    vocabulary = ("the", "<eos>", "cat", "<unk>")
    assert encode_prompt("  the cat\tsat ", vocabulary) == [0, 2, 3]
    assert encode_prompt("", vocabulary) == []
    assert decode([0, 2, 1, 0, 3], vocabulary) == "the cat\nthe <unk>"
    with pytest.raises(ValueError, match="does not know 'sat', 'mat'"):
        encode_prompt("the sat mat sat", vocabulary[:3])
