r"""Text from a trained language model, one word after the other.

.. math:: p(w \mid \text{words so far}) = \frac{p_w^{1/T}}{\sum_v p_v^{1/T}}

with p the model's softmax and T the temperature: at 1 the model's own distribution, towards 0 always its likeliest
word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from refimpl import kernels
from refimpl.datasets import EOS, UNK
from refimpl.models.language_model import LanguageModel
from refimpl.rng import generator
from refimpl.weights import Params, values_of


def sample(
    model: LanguageModel,
    params: Params,
    *,
    words: int,
    prompt: Sequence[int] = (),
    temperature: float = 1.0,
    start: int = 0,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Draw words that follow a prompt.

    Parameters
    ----------
    model : LanguageModel
        Whose words.
    params : dict of str to Weight
        Its parameters; nothing is dropped.
    words : int
        How many to draw.
    prompt : sequence of int
        Token ids that are read first. The result does not hold them.
    temperature : float
        T, at least 0; 0 takes the likeliest word every time (the lowest id of equal ones).
    start : int
        Token that is read in place of an empty prompt, as a rule that of ``<eos>``.
    rng : numpy.random.Generator, optional
        One number is drawn for each word. By default ``generator(0, "sample")``.

    Returns
    -------
    list of int
        Token ids, `words` of them.

    Raises
    ------
    ValueError
        If `words` or the temperature is negative, the temperature is not finite, or a token is outside the
        vocabulary.

    Notes
    -----
    The prompt and every word are read with the kernels of the ``spec`` tier: for one column they are as quick as
    compiled ones, and need not be compiled.
    """
    if words < 0:
        raise ValueError(f"words is {words}; give how many words to draw, 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a finite number of at least 0")
    tokens = list(prompt) or [start]
    outside = [token for token in tokens if not 0 <= token < model.vocabulary]
    if outside:
        raise ValueError(f"token {outside[0]} is outside the vocabulary; give ids from 0 to {model.vocabulary - 1}")
    rng = generator(0, "sample") if rng is None else rng
    states = model.zero_states(1, values_of(params["decoder.bias"]).dtype)
    drawn: list[int] = []
    with kernels.use("spec"):
        for token in tokens[:-1]:
            _, states, _ = model.forward(params, np.array([[token]], np.int32), states)
        token = tokens[-1]
        for _ in range(words):
            scores, states = model.logits(params, np.array([[token]], np.int32), states)
            token = _draw(scores[0, :, 0].astype(np.float64), temperature, rng)
            drawn.append(token)
    return drawn


def encode_prompt(text: str, vocabulary: Sequence[str]) -> list[int]:
    """Return the token ids of a prompt whose words are separated by white space; a word not known becomes ``<unk>``.

    Raises
    ------
    ValueError
        If words are not in a vocabulary that has no ``<unk>``; the sentence names them.
    """
    index = {word: i for i, word in enumerate(vocabulary)}
    words = text.split()
    unknown = [word for word in words if word not in index]
    if unknown and UNK not in index:
        raise ValueError(
            f"the model does not know {_listed(unknown)}, and its vocabulary has no {UNK}; "
            f"give other words (texts for training are often all in lower case)"
        )
    return [index[word] if word in index else index[UNK] for word in words]


def decode(tokens: Iterable[int], vocabulary: Sequence[str]) -> str:
    """Return the words of tokens joined by spaces, with a line break in place of each ``<eos>``."""
    text = " ".join("\n" if vocabulary[token] == EOS else vocabulary[token] for token in tokens)
    return text.replace(" \n", "\n").replace("\n ", "\n")


def _draw(scores: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Return one word by inverting the distribution function at one uniform number."""
    u = rng.random()
    if temperature == 0:
        return int(scores.argmax())
    p = np.exp((scores - scores.max()) / temperature)
    cumulated = np.cumsum(p)
    # Below u = 1 the search ends inside, and side="right" passes over words whose probability has underflowed to 0.
    return int(min(np.searchsorted(cumulated, u * cumulated[-1], side="right"), len(scores) - 1))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(repr(word) for word in dict.fromkeys(words))
