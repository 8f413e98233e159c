"""The task of a language model: to predict each next token of a text, read in columns with carried state."""

from __future__ import annotations

from typing import ClassVar

from refimpl.datasets import Corpus, Windows, batchify, windows
from refimpl.training.build import make_language_model
from refimpl.training.config import Config
from refimpl.training.evaluate import mean_loss, perplexity
from refimpl.training.probe import LanguageProbe
from refimpl.training.task import PartName
from refimpl.weights import Params


class LanguageTask:
    """Windows over the columns of a text, in reading order in every epoch; see `refimpl.training.task.Task`.

    Parameters
    ----------
    config : Config
    corpus : Corpus

    Raises
    ------
    ValueError
        If a text is shorter than one batch or window.
    """

    kind: ClassVar[str] = "text"
    unit: ClassVar[str] = "tokens"
    measure: ClassVar[str] = "perplexity"

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.windows = windows(batchify(corpus.train, config.training.batch_size), config.training.bptt)
        for name, text in (("validation", corpus.valid), ("test", corpus.test)):
            columns = config.data.eval_batch_size
            if text.size < 2 * columns:  # each column predicts all its tokens but the first
                raise ValueError(
                    f"the {name} text has {text.size} tokens, too few for data.eval_batch_size = {columns}; "
                    f"choose half as many columns as there are tokens at most, or give a longer text"
                )
        self.model = make_language_model(config, corpus.vocabulary_size)
        self.steps_per_epoch = len(self.windows)

    def batches(self, epoch: int) -> Windows:
        """Return the windows: the same in every epoch."""
        return self.windows

    def probe(self) -> LanguageProbe:
        """Return what a method may ask about the first window."""
        return LanguageProbe(self.model, *self.windows[0], self.config.seed)

    def samples(self, steps: int) -> int:
        """Return how many tokens that many steps predict."""
        rows, batch = self.windows.rows.shape
        epochs, left = divmod(steps, self.steps_per_epoch)
        return (epochs * (rows - 1) + min(left * self.windows.bptt, rows - 1)) * batch

    def evaluate(self, params: Params, part: PartName) -> dict[str, float]:
        """Return loss and perplexity on the validation or the test text."""
        text = self.corpus.valid if part == "valid" else self.corpus.test
        loss = mean_loss(self.model, params, text, self.config.data.eval_batch_size)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def describe(self) -> tuple[str, str]:
        """Return what the text and the model are."""
        corpus, model = self.corpus, self.config.model
        sizes = f"{corpus.train.size:,} + {corpus.valid.size:,} + {corpus.test.size:,} tokens (train, valid, test)"
        return (
            f"text: {corpus.name}, {sizes}, {corpus.vocabulary_size:,} distinct words",
            f"LSTM, {model.layers} x {model.hidden_size}, embedding {model.embedding_size}",
        )
