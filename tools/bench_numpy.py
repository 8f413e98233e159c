"""The same training steps in plain NumPy on dense weights: the peer that has the best BLAS and no framework.

Written for speed as one would by hand: batch-major, all steps of the input product at once, arrays allocated once,
updates in place. Parameters are named as in PyTorch; activations (time, batch, features).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> None:
    r"""Replace ``x`` by :math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`, for which NumPy has a vectorised function."""
    x *= 0.5
    np.tanh(x, out=x)
    x += 1
    x *= 0.5


def clip(grads: Arrays, largest: float) -> float:
    """Return the factor that brings the global norm of all gradients down to ``largest``."""
    norm = float(np.sqrt(sum(float(np.vdot(g, g)) for g in grads.values())))
    return min(1.0, largest / (norm + 1e-6))


class LSTM:
    """A stack of LSTM layers over windows of one length.

    Parameters
    ----------
    params : dict
        Dense arrays by name, ``rnn.weight_ih_l0`` (4H, I) and so on; gates i, f, g, o.
    layers, steps, batch : int
    """

    def __init__(self, params: Arrays, layers: int, steps: int, batch: int) -> None:
        self.params, self.layers, self.steps, self.batch = params, layers, steps, batch
        size = params["rnn.weight_hh_l0"].shape[1]
        self.size = size
        dtype = params["rnn.weight_hh_l0"].dtype
        self.h = np.zeros((layers, steps + 1, batch, size), dtype)  # the first step is the state that enters
        self.c = np.zeros_like(self.h)
        self.tanh_c = np.empty((layers, steps, batch, size), dtype)
        self.gates = np.empty((layers, steps, batch, 4 * size), dtype)
        self.d_gates = np.empty((steps, batch, 4 * size), dtype)
        self.recurrent = np.empty((batch, 4 * size), dtype)
        self.x: list[np.ndarray] = []
        self.dx = [np.empty((steps, batch, params[f"rnn.weight_ih_l{k}"].shape[1]), dtype) for k in range(layers)]
        self.grads = {name: np.empty_like(array) for name, array in params.items() if name.startswith("rnn.")}

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Return the last layer's outputs (T, B, H) for inputs (T, B, I)."""
        self.x = []
        for k in range(self.layers):
            self.x.append(x)
            x = self._forward(k, x)
        return x

    def _forward(self, k: int, x: np.ndarray) -> np.ndarray:
        size, h, c, gates = self.size, self.h[k], self.c[k], self.gates[k]
        w_ih, w_hh, b_ih, b_hh = self._weights(k)
        np.matmul(x.reshape(-1, x.shape[2]), w_ih.T, out=gates.reshape(-1, 4 * size))
        gates += b_ih + b_hh
        for t in range(self.steps):
            a = gates[t]
            a += np.matmul(h[t], w_hh.T, out=self.recurrent)
            sigmoid(a[:, : 2 * size])
            np.tanh(a[:, 2 * size : 3 * size], out=a[:, 2 * size : 3 * size])
            sigmoid(a[:, 3 * size :])
            i, f, g, o = (a[:, q * size : (q + 1) * size] for q in range(4))
            np.multiply(f, c[t], out=c[t + 1])
            c[t + 1] += i * g
            np.tanh(c[t + 1], out=self.tanh_c[k, t])
            np.multiply(o, self.tanh_c[k, t], out=h[t + 1])
        return h[1:]

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Return the gradient of the inputs (T, B, I); those of the parameters are in ``grads``."""
        for k in reversed(range(self.layers)):
            dy = self._backward(k, dy)
        return dy

    def _backward(self, k: int, dy: np.ndarray) -> np.ndarray:
        size, c, d_gates = self.size, self.c[k], self.d_gates
        w_ih, w_hh, _, _ = self._weights(k)
        dh, dc = np.zeros((2, self.batch, size), dy.dtype)
        for t in reversed(range(self.steps)):
            i, f, g, o = (self.gates[k, t, :, q * size : (q + 1) * size] for q in range(4))
            tanh_c, d = self.tanh_c[k, t], d_gates[t]
            dh += dy[t]
            dc += dh * o * (1 - tanh_c * tanh_c)
            np.multiply(dc * g, i * (1 - i), out=d[:, :size])
            np.multiply(dc * c[t], f * (1 - f), out=d[:, size : 2 * size])
            np.multiply(dc * i, 1 - g * g, out=d[:, 2 * size : 3 * size])
            np.multiply(dh * tanh_c, o * (1 - o), out=d[:, 3 * size :])
            dc *= f
            np.matmul(d, w_hh, out=dh)
        flat = d_gates.reshape(-1, 4 * size)
        names = self._names(k)
        np.matmul(flat.T, self.x[k].reshape(flat.shape[0], -1), out=self.grads[names[0]])
        np.matmul(flat.T, self.h[k, :-1].reshape(-1, size), out=self.grads[names[1]])
        np.sum(flat, axis=0, out=self.grads[names[2]])
        self.grads[names[3]][...] = self.grads[names[2]]
        np.matmul(flat, w_ih, out=self.dx[k].reshape(flat.shape[0], -1))
        return self.dx[k]

    def carry(self) -> None:
        """Let the state after this window enter the next one."""
        self.h[:, 0] = self.h[:, -1]
        self.c[:, 0] = self.c[:, -1]

    def _names(self, k: int) -> list[str]:
        return [f"rnn.{part}_l{k}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def _weights(self, k: int) -> list[np.ndarray]:
        return [self.params[name] for name in self._names(k)]


def sgd(params: Arrays, grads: Arrays, lr: float, scale: float) -> None:
    """Take a step of plain SGD with clipped gradients, which are overwritten."""
    for name, gradient in grads.items():
        gradient *= -lr * scale
        params[name] += gradient


class Softmax:
    """Softmax cross-entropy over rows of scores."""

    @staticmethod
    def gradient(scores: np.ndarray, labels: np.ndarray) -> float:
        """Return the mean loss, and put its gradient in the place of the scores (N, classes)."""
        rows = np.arange(len(labels))
        scores -= scores.max(axis=1, keepdims=True)
        right = scores[rows, labels].copy()
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)
        loss = float(np.mean(np.log(total[:, 0]) - right))
        scores *= 1 / (total * len(labels))
        scores[rows, labels] -= scores.dtype.type(1 / len(labels))
        return loss


class LSTMStep:
    """A training step of stacked LSTMs whose outputs' gradient is given: forward, backward, clipping, SGD."""

    def __init__(self, params: Arrays, layers: int, x: np.ndarray, dy: np.ndarray, lr: float, largest: float) -> None:
        self.params, self.x, self.dy, self.lr, self.largest = params, x, dy, lr, largest
        self.lstm = LSTM(params, layers, x.shape[0], x.shape[1])

    def __call__(self) -> None:
        """Take one step."""
        self.lstm.forward(self.x)
        self.lstm.backward(self.dy)
        sgd(self.params, self.lstm.grads, self.lr, clip(self.lstm.grads, self.largest))


class LanguageModelStep:
    """A training step of embedding, stacked LSTM, decoder, and cross-entropy, with the state carried along.

    Only the rows of the embedding that were looked up have a gradient, and only they are touched.
    """

    def __init__(self, params: Arrays, layers: int, steps: int, batch: int, lr: float, largest: float) -> None:
        self.params, self.lr, self.largest = params, lr, largest
        self.lstm = LSTM(params, layers, steps, batch)
        weight = params["decoder.weight"]
        self.scores = np.empty((steps * batch, weight.shape[0]), weight.dtype)
        self.d_features = np.empty((steps, batch, weight.shape[1]), weight.dtype)
        self.grads = {"decoder.weight": np.empty_like(weight)}

    def __call__(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Take one step on a window of tokens (T, B) and return its loss."""
        params, scores, grads = self.params, self.scores, self.grads
        features = self.lstm.forward(params["encoder.weight"][tokens]).reshape(tokens.size, -1)
        np.matmul(features, params["decoder.weight"].T, out=scores)
        scores += params["decoder.bias"]
        loss = Softmax.gradient(scores, targets.reshape(-1))
        np.matmul(scores.T, features, out=grads["decoder.weight"])
        grads["decoder.bias"] = scores.sum(axis=0)
        np.matmul(scores, params["decoder.weight"], out=self.d_features.reshape(tokens.size, -1))
        dx = self.lstm.backward(self.d_features).reshape(tokens.size, -1)
        self.lstm.carry()
        order = np.argsort(tokens, axis=None, kind="stable")
        rows, first = np.unique(tokens.reshape(-1)[order], return_index=True)
        embedding = np.add.reduceat(dx[order], first, axis=0)
        together = {**grads, **self.lstm.grads, "encoder.weight": embedding}
        scale = clip(together, self.largest)
        params["encoder.weight"][rows] -= together.pop("encoder.weight") * (self.lr * scale)
        sgd(params, together, self.lr, scale)
        return loss


class MLPStep:
    """A training step of a multilayer perceptron with ReLU: cross-entropy, SGD with momentum.

    Parameters
    ----------
    params : dict
        ``layers.0.weight`` (outputs, inputs), ``layers.0.bias``, and so on.
    x : ndarray, shape (batch, inputs)
    labels : ndarray of int, shape (batch,)
    lr, momentum : float
    """

    def __init__(self, params: Arrays, x: np.ndarray, labels: np.ndarray, lr: float, momentum: float) -> None:
        self.params, self.labels, self.lr, self.momentum = params, labels, lr, momentum
        self.depth = len(params) // 2
        weights = [params[f"layers.{k}.weight"] for k in range(self.depth)]
        self.y = [x, *(np.empty((len(x), w.shape[0]), x.dtype) for w in weights)]
        self.dy = [np.empty_like(y) for y in self.y]
        self.grads = {name: np.empty_like(array) for name, array in params.items()}
        self.buffers: Arrays = {}

    def __call__(self) -> float:
        """Take one step and return the loss before it."""
        y, dy, params, grads = self.y, self.dy, self.params, self.grads
        last = self.depth - 1
        for k in range(self.depth):
            np.matmul(y[k], params[f"layers.{k}.weight"].T, out=y[k + 1])
            y[k + 1] += params[f"layers.{k}.bias"]
            if k < last:
                np.maximum(y[k + 1], 0, out=y[k + 1])
        dy[-1][...] = y[-1]
        loss = Softmax.gradient(dy[-1], self.labels)
        for k in reversed(range(self.depth)):
            np.matmul(dy[k + 1].T, y[k], out=grads[f"layers.{k}.weight"])
            np.sum(dy[k + 1], axis=0, out=grads[f"layers.{k}.bias"])
            if k:
                np.matmul(dy[k + 1], params[f"layers.{k}.weight"], out=dy[k])
                dy[k] *= y[k] > 0
        self._update()
        return loss

    def _update(self) -> None:
        if not self.buffers:
            self.buffers = {name: g.copy() for name, g in self.grads.items()}
        else:
            for name, buffer in self.buffers.items():
                buffer *= self.momentum
                buffer += self.grads[name]
        for name, array in self.params.items():
            array -= np.multiply(self.buffers[name], self.lr, out=self.grads[name])


def dense_arrays(params: Any) -> Arrays:
    """Return dense copies of parameters, some of which may be sparse weights."""
    return {name: np.array(w) if isinstance(w, np.ndarray) else w.dense() for name, w in params.items()}
