"""First test the checker: mistakes in recurrent layers, dropout and compositions must be caught."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refimpl import kernels
from refimpl.layers import cross_entropy, dropout, embedding, linear, lstm
from refimpl.models.language_model import LanguageModel
from refimpl.rng import generator
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, add_to

IH, HH, B_IH, B_HH = lstm.names(0)
LSTM_SIZES: dict[str, Any] = {"inputs": [2, 3], "hidden": [2, 3], "columns": [(3, 1), (3, 2)]}


@pytest.fixture(autouse=True, scope="module")
def _definition() -> Iterator[None]:
    """Run on the definition: mistakes are planted in its parts."""
    with kernels.use("spec"):
        yield


def caught(make: Callable[..., Layer], sizes: dict[str, Any], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check_layer(make, sizes, max_examples=5, shrink=False)


# --- LSTM -----------------------------------------------------------------------------------------------------


def lstm_with(
    mistake: Callable[..., Any], trace: Callable[[Any], Any] = lambda trace: trace, no_bias: bool = False
) -> Callable[..., Layer]:
    """Make a layer whose backward kernel's result goes through ``mistake(result, w_ih, w_hh, trace, dy)``."""

    def make(rng: np.random.Generator, *, inputs: int, hidden: int, columns: tuple[int, int]) -> Layer:
        steps, batch = columns
        state = lstm.State(rng.standard_normal((hidden, batch)), rng.standard_normal((hidden, batch)))

        def forward(p: Params, x: np.ndarray) -> tuple[np.ndarray, Any]:
            if no_bias:
                p = {**p, B_HH: np.zeros_like(p[B_HH])}
            y, _, cache = lstm.forward(p, 0, x, state)
            return y, cache

        def backward(dy: np.ndarray, cache: Any, grads: Grads, input_gradient: bool) -> Any:
            inner = kernels.lstm_backward

            def mistaken(w_ih: Any, w_hh: Any, kept: Any, dy: Any, *rest: Any) -> Any:
                return mistake(inner(w_ih, w_hh, trace(kept), dy, *rest), w_ih, w_hh, kept, dy)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "lstm_backward", mistaken)
                return lstm.backward(dy, cache, grads, input_gradient=input_gradient)

        shapes = {IH: (4 * hidden, inputs), HH: (4 * hidden, hidden), B_IH: (4 * hidden,), B_HH: (4 * hidden,)}
        params: Params = {name: rng.uniform(-1, 1, shape) for name, shape in shapes.items()}
        x = rng.standard_normal((steps, inputs, batch))
        return Layer(forward, backward, params, (x,), sparse=(IH, HH), complex_step=True)

    return make


def unchanged(result: Any, *_: Any) -> Any:
    return result


def swap(gates: np.ndarray, a: int, b: int) -> np.ndarray:
    blocks = np.split(gates, 4, axis=1)
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return np.concatenate(blocks, axis=1)


def stepwise(result: Any, w_ih: Any, w_hh: Any, trace: Any, dy: Any, *, through_cell: bool = True) -> Any:
    """Run backward one step at a time; without ``through_cell``, no gradient goes from cell to cell."""
    dh, dc = np.zeros_like(dy[0]), np.zeros_like(dy[0])
    d_gates: list[Any] = []
    dx: list[Any] = []
    for t in reversed(range(len(dy))):
        now = slice(t, t + 1)
        one = trace._replace(
            x=trace.x[now], gates=trace.gates[now], cells=trace.cells[t : t + 2], hidden=trace.hidden[t : t + 2]
        )
        step = kernels.spec.lstm_backward(w_ih, w_hh, one, dy[now], dh, dc, True)
        dh, dc = step.dh0, step.dc0 if through_cell else np.zeros_like(step.dc0)
        d_gates.insert(0, step.d_gates)
        dx.insert(0, step.dx)
    joined = np.concatenate(d_gates)
    return result._replace(
        d_gates=joined, d_bias=kernels.sum_rows(joined), dx=None if result.dx is None else np.concatenate(dx)
    )


def no_gradient_through_cells(*arguments: Any) -> Any:
    return stepwise(*arguments, through_cell=False)


def gates_swapped_afterwards(result: Any, *_: Any) -> Any:
    return result._replace(d_gates=swap(result.d_gates, 1, 3))


def without_first_step(result: Any, *_: Any) -> Any:
    return result._replace(d_gates=result.d_gates[1:], x=result.x[1:], h_prev=result.h_prev[1:])


def without_last_step_of_dy(result: Any, w_ih: Any, w_hh: Any, trace: Any, dy: Any) -> Any:
    dy = dy.copy()
    dy[-1] = 0
    nothing = np.zeros_like(dy[0])
    return kernels.spec.lstm_backward(w_ih, w_hh, trace, dy, nothing, nothing, result.dx is not None)


def hidden_of_the_same_step(result: Any, w_ih: Any, w_hh: Any, trace: Any, dy: Any) -> Any:
    return result._replace(h_prev=trace.hidden[1:])


def bias_of_one_step(result: Any, *_: Any) -> Any:
    return result._replace(d_bias=result.d_gates[-1].sum(axis=1))


def test_the_layer_itself_passes() -> None:
    check_layer(lstm_with(unchanged), LSTM_SIZES, max_examples=5)
    check_layer(lstm_with(stepwise), LSTM_SIZES, max_examples=5)


@pytest.mark.parametrize(
    ("mistake", "tensor"),
    [
        (no_gradient_through_cells, "rnn.*"),
        (gates_swapped_afterwards, "rnn.weight"),
        (without_first_step, "rnn.weight"),
        (without_last_step_of_dy, "rnn.*"),
        (hidden_of_the_same_step, "rnn.weight_hh_l0"),
        (bias_of_one_step, "rnn.bias"),
    ],
)
def test_mistakes_in_the_lstm_backward(mistake: Callable[..., Any], tensor: str) -> None:
    caught(lstm_with(mistake), LSTM_SIZES, f"dense: the gradient of {tensor}.* along a random direction")


def test_gates_f_and_o_swapped_in_the_lstm_backward() -> None:
    make = lstm_with(unchanged, trace=lambda kept: kept._replace(gates=swap(kept.gates, 1, 3)))
    caught(make, LSTM_SIZES, "dense: the gradient of rnn.* along a random direction")


def test_a_bias_forgotten_in_the_lstm_forward() -> None:
    caught(lstm_with(unchanged, no_bias=True), LSTM_SIZES, f"gradient of {B_HH} is .* where the output changes by 0 ")


# --- dropout, and compositions --------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", [lambda dy, cache: dy, lambda dy, cache: dy * (cache > 0)])
def test_dropout_mask_not_applied_in_backward(mistake: Callable[..., Any]) -> None:
    def make(rng: np.random.Generator, *, locked: bool) -> Layer:
        return Layer(
            lambda p, x: dropout.forward(x, 0.5, locked=locked, rng=generator(0, "drop")),
            lambda dy, cache, grads, dx: mistake(dy, cache),
            {},
            (rng.standard_normal((2, 4, 3)),),
            optional_dx=False,
            complex_step=True,
        )

    caught(make, {"locked": [False, True]}, "gradient of input 0 is .* along a random direction")


def test_draws_that_are_not_repeated() -> None:
    stream = generator(0, "drop")

    def make(rng: np.random.Generator, *, p: float) -> Layer:
        forward: Any = lambda params, x: dropout.forward(x, p, rng=stream)  # noqa: E731
        return Layer(forward, lambda dy, cache, *_: dropout.backward(dy, cache), {}, (rng.standard_normal((2, 4, 3)),))

    caught(make, {"p": [0.5]}, "other bits|another forward pass")


@pytest.mark.parametrize("where", [embedding, cross_entropy])
def test_tied_gradient_overwritten(where: Any) -> None:
    """The whole model: embedding or decoder assigns the tied weight's gradient instead of adding it."""
    model = LanguageModel(5, 3, 3, layers=1, tied=True)

    def make(rng: np.random.Generator, *, steps: int) -> Layer:
        tokens, targets = rng.integers(0, 5, (2, steps, 2))
        states = model.zero_states(2, float)

        def forward(p: Params) -> tuple[float, Any]:
            loss, grads, _ = model.loss_and_grads(p, tokens, targets, states)
            return loss, grads

        def backward(dy: float, cache: Grads, grads: Grads, input_gradient: bool) -> None:
            for name, gradient in cache.items():
                add_to(grads, name, gradient)

        return Layer(forward, backward, model.init(int(rng.integers(100)), float))

    def overwrite(grads: Grads, name: str, gradient: Any) -> None:
        grads[name] = gradient

    def add_biases_only(grads: Grads, name: str, gradient: Any) -> None:
        if name == "decoder.bias":
            add_to(grads, name, gradient)

    with pytest.MonkeyPatch.context() as patch:
        if where is embedding:  # the last to give its gradient
            patch.setattr(embedding, "add_to", overwrite)
        else:  # the first: its gradient gets lost
            patch.setattr(linear, "add_to", add_biases_only)
        caught(make, {"steps": [3]}, r"dense: the gradient of encoder.weight is .* along a random direction")
    check_layer(make, {"steps": [3]}, max_examples=2)


@pytest.mark.parametrize("factor", [1 / 6, 6.0])
def test_loss_scaled_unlike_its_gradient(factor: float) -> None:
    """A sum where the gradient is of the mean, or the reverse."""

    def make(rng: np.random.Generator, *, words: int) -> Layer:
        targets = rng.integers(0, words, (3, 2))

        def forward(p: Params, x: np.ndarray) -> tuple[float, Any]:
            loss, cache = cross_entropy.forward(p, "w", None, x, targets)
            return factor * loss, cache

        params: Params = {"w": rng.standard_normal((words, 2))}
        return Layer(
            forward,
            lambda dy, cache, grads, dx: cross_entropy.backward(cache, grads),
            params,
            (rng.standard_normal((3, 2, 2)),),
            optional_dx=False,
        )

    caught(make, {"words": [4, 5]}, "gradient of w is .* along a random direction")
