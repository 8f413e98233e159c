"""The same training steps in PyTorch, written as its users write them. Imported only where torch is installed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = dict[str, np.ndarray]


def name_of(allocator: str) -> str:
    """Return how torch is called in the records of a process with this allocator."""
    return "torch-dense-tuned" if allocator == "tuned" else "torch-dense"


class LanguageModel(nn.Module):
    """Embedding, stacked LSTM, decoder; parameters are named as in ``refimpl.models.language_model``."""

    def __init__(self, vocabulary: int, size: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, size)
        self.rnn = nn.LSTM(size, size, layers)
        self.decoder = nn.Linear(size, vocabulary)

    def forward(self, tokens: Any, state: Any) -> tuple[Any, Any]:
        """Return the scores (T B, V) and the new state."""
        features, state = self.rnn(self.encoder(tokens), state)
        return self.decoder(features.flatten(0, 1)), state


class MLP(nn.Module):
    """Linear maps with rectifiers between them; parameters are named as in ``refimpl.models.mlp``."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Any) -> Any:
        """Return the scores (batch, classes)."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def load(module: nn.Module, params: Arrays, prefix: str = "") -> nn.Module:
    """Give a module the parameters whose names begin with ``prefix``."""
    dtype = next(iter(params.values())).dtype
    state = {name[len(prefix) :]: torch.tensor(w) for name, w in params.items() if name.startswith(prefix)}
    module.to(torch.float64 if dtype == np.float64 else torch.float32).load_state_dict(state)
    return module


class LSTMStep:
    """A training step of stacked LSTMs whose outputs' gradient is given: forward, backward, clipping, SGD."""

    def __init__(self, params: Arrays, layers: int, x: np.ndarray, dy: np.ndarray, lr: float, largest: float) -> None:
        size = x.shape[2]
        self.model = load(nn.LSTM(size, size, layers), params, "rnn.")
        self.x = torch.tensor(x, requires_grad=True)  # its gradient would go to the embedding
        self.dy = torch.tensor(dy)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.largest = largest

    def __call__(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        self.model(self.x)[0].backward(self.dy)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.largest)
        self.optimizer.step()


class LanguageModelStep:
    """A training step of embedding, stacked LSTM, decoder, and cross-entropy, with the state carried along."""

    def __init__(self, params: Arrays, layers: int, batch: int, lr: float, largest: float) -> None:
        vocabulary, size = params["encoder.weight"].shape
        self.model = load(LanguageModel(vocabulary, size, layers), params)
        zeros = torch.zeros(layers, batch, size, dtype=next(self.model.parameters()).dtype)
        self.state = (zeros, zeros)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.largest = largest

    def __call__(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Take one step on a window of tokens (T, B) and return its loss."""
        self.optimizer.zero_grad()
        scores, state = self.model(torch.from_numpy(tokens), self.state)
        loss = nn.functional.cross_entropy(scores, torch.from_numpy(targets).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.largest)
        self.optimizer.step()
        self.state = tuple(part.detach() for part in state)
        return loss.item()


class MLPStep:
    """A training step of a multilayer perceptron: cross-entropy, SGD with momentum."""

    def __init__(self, params: Arrays, x: np.ndarray, labels: np.ndarray, lr: float, momentum: float) -> None:
        weights = [w for name, w in params.items() if name.endswith("weight")]
        sizes = (weights[0].shape[1], *(w.shape[0] for w in weights))
        self.model = load(MLP(sizes), params)
        self.x, self.labels = torch.from_numpy(x), torch.from_numpy(labels)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def __call__(self) -> float:
        """Take one step and return the loss before it."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()
