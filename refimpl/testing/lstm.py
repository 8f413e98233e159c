r"""The contract of a tier's LSTM kernels: forward and backward against a wider reference, each with a running
error bound.

The composition has no closed bound, so one is carried along: every quantity of the reference is a value with
the distance that rounding may have put between it and the tier's, and each operation hands that on and adds
its own. Backward starts from the activations that the tier itself recorded, a common state, so it is judged
on its own rounding and not on the forward pass's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.kernels import spec
from refimpl.kernels.spec import LSTMBackward
from refimpl.kernels.types import Matrix, is_sparse
from refimpl.rng import generator
from refimpl.testing.bounds import error_ratio, gamma, unit_roundoff, wider
from refimpl.testing.kernels import FUNCTION, arrange, flat_columns, poison_pool
from refimpl.weights import SparseWeight, Support

# (steps, batch): batches that fill no vector, one step, steps that do not fill a panel, a batch that is cut
WINDOWS = ((1, 1), (1, 7), (9, 3), (2, 33), (5, 20), (7, 20), (2, 130))


@dataclass(frozen=True)
class LSTMCase:
    """A layer, a window, and the gradients that arrive."""

    size: int
    inputs: int
    steps: int
    batch: int
    density: float = 0.4
    dense: str = ""  # which of "ih", "hh" is a dense array
    scale: float = 1.0
    dtype: Any = np.float64
    arrangement: str = "plain"
    seed: int = 0

    def weight(self, name: str) -> Matrix:
        """Return W_ih or W_hh."""
        shape = (4 * self.size, self.inputs if name == "ih" else self.size)
        values = self.numbers(name, *shape) * self.dtype(self.scale)
        if name in self.dense:
            return values
        mask = generator(self.seed, f"{name}/mask").random(shape) < self.density
        return SparseWeight.from_dense(values, Support.from_mask(mask))

    def numbers(self, stream: str, *shape: int) -> np.ndarray:
        """Return standard normal numbers."""
        numbers = generator(self.seed, stream).standard_normal(shape).astype(self.dtype)
        return arrange(numbers, self.arrangement) if stream in ("x", "dy") else numbers

    @property
    def forward_arguments(self) -> tuple[Any, ...]:
        """Return w_ih, w_hh, bias, x, h0, c0."""
        state = (self.size, self.batch)
        return (
            self.weight("ih"),
            self.weight("hh"),
            self.numbers("bias", 4 * self.size),
            self.numbers("x", self.steps, self.inputs, self.batch),
            np.tanh(self.numbers("h0", *state)),
            self.numbers("c0", *state),
        )

    @property
    def arriving(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dy, dh, dc."""
        state = (self.size, self.batch)
        return self.numbers("dy", self.steps, *state), self.numbers("dh", *state), self.numbers("dc", *state)


@st.composite
def lstm_cases(draw: st.DrawFn) -> LSTMCase:
    """Draw a case."""
    steps, batch = draw(st.sampled_from(WINDOWS))
    return LSTMCase(
        size=draw(st.sampled_from([1, 3, 16])),
        inputs=draw(st.sampled_from([1, 7, 16])),
        steps=steps,
        batch=batch,
        density=draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        dense=draw(st.sampled_from(["", "", "ih", "hh", "ih hh"])),
        scale=draw(st.sampled_from([0.1, 1.0])),
        dtype=draw(st.sampled_from([np.float32, np.float64])),
        arrangement=draw(st.sampled_from(["plain", "transposed", "sliced"])),
        seed=draw(st.integers(0, 2**32)),
    )


@dataclass(frozen=True)
class Known:
    """A value in the wider type, and how far the tier's may be from it."""

    value: np.ndarray
    error: np.ndarray

    def rounded(self, u: float, times: float = 1.0) -> Known:
        """Add the error of some roundings of a result that is known this well."""
        return Known(self.value, self.error + times * u * (np.abs(self.value) + self.error))

    def by(self, other: Known) -> Known:
        """Return the product, not yet rounded."""
        a, b = np.abs(self.value), np.abs(other.value)
        return Known(self.value * other.value, a * other.error + b * self.error + self.error * other.error)

    def plus(self, other: Known) -> Known:
        """Return the sum, not yet rounded."""
        return Known(self.value + other.value, self.error + other.error)

    def __getitem__(self, key: Any) -> Known:
        return Known(self.value[key], self.error[key])


def dense_of(w: Matrix, dtype: Any) -> np.ndarray:
    """Return a weight as a dense array in the wider type."""
    return (w.dense() if isinstance(w, SparseWeight) else np.asarray(w)).astype(wider(dtype))


def _product(w: np.ndarray, x: Known, dtype: Any) -> Known:
    size = np.abs(w)
    error = size @ x.error + gamma(w.shape[1], dtype) * (size @ (np.abs(x.value) + x.error))
    return Known(w @ x.value, error)


def _exact(x: np.ndarray) -> Known:
    wide = x.astype(wider(x.dtype))
    return Known(wide, np.zeros_like(wide))


def _tanh(x: Known, u: float) -> Known:
    return Known(np.tanh(x.value), x.error).rounded(u, FUNCTION)


def _sigmoid(x: Known, u: float) -> Known:
    """Its slope is at most 1/4; its own error is absolute, since it may come from a hyperbolic tangent."""
    return Known(0.5 * np.tanh(0.5 * x.value) + 0.5, x.error / 4 + FUNCTION * u)


def _judge(name: str, got: np.ndarray | None, reference: Known, dtype: Any) -> None:
    assert got is not None, f"{name} is missing"
    assert got.dtype == dtype, f"{name} is {got.dtype}"
    both = 1 if np.finfo(wider(dtype)).eps < np.finfo(dtype).eps else 2  # the reference then rounds as much as the tier
    tiny = float(np.finfo(dtype).tiny)
    ratio = error_ratio(got, reference.value, both * reference.error + tiny)
    assert ratio <= 1, f"{name} is {ratio:.3g} times as far from the reference as rounding can carry it"


def check_lstm_forward(tier: Any, case: LSTMCase) -> None:
    """Outputs and last state of a window."""
    dtype, u = case.dtype, unit_roundoff(case.dtype)
    w_ih, w_hh, bias, x, h0, c0 = case.forward_arguments
    poison_pool()
    y, h_last, c_last, _ = tier.lstm_forward(w_ih, w_hh, bias, x, h0, c0)
    # both products and the bias are one sum, in whatever order
    both = np.concatenate([dense_of(w_ih, dtype), dense_of(w_hh, dtype), dense_of(bias, dtype)[:, None]], axis=1)
    h, c = _exact(h0), _exact(c0)
    one = np.ones((1, case.batch), wider(dtype))
    outputs = []
    for t in range(case.steps):
        stacked = Known(
            np.concatenate([x[t].astype(wider(dtype)), h.value, one]),
            np.concatenate([np.zeros(x[t].shape), h.error, np.zeros(one.shape)]),
        )
        a = _product(both, stacked, dtype)
        a_i, a_f, a_g, a_o = (a[k * case.size : (k + 1) * case.size] for k in range(4))
        i, f, o, g = _sigmoid(a_i, u), _sigmoid(a_f, u), _sigmoid(a_o, u), _tanh(a_g, u)
        c = f.by(c).rounded(u).plus(i.by(g).rounded(u)).rounded(u)
        h = o.by(_tanh(c, u)).rounded(u)
        outputs.append(h)
    _judge("y", y, Known(np.stack([h.value for h in outputs]), np.stack([h.error for h in outputs])), dtype)
    _judge("the last h", h_last, h, dtype)
    _judge("the last c", c_last, c, dtype)


def activations(trace: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gates (T, 4H, B), cells and hidden (T + 1, H, B) as a tier recorded them."""
    if isinstance(trace, spec.LSTMTrace):
        return trace.gates, trace.cells, trace.hidden
    from refimpl.kernels.cpu.panels import unpack

    parts, states, size, width = trace.hidden.shape
    panels = trace.gates.reshape(parts, -1, *trace.gates.shape[1:])
    gates = [unpack(own, (states - 1, 4 * size, width)) for own in panels]
    return tuple(np.concatenate(list(a), axis=-1)[..., : trace.batch] for a in (gates, trace.cells, trace.hidden))  # type: ignore[return-value]


def check_lstm_backward(tier: Any, case: LSTMCase) -> None:
    """All gradients of a window, from the activations that the tier's forward pass recorded."""
    dtype, u = case.dtype, unit_roundoff(case.dtype)
    arguments = case.forward_arguments
    w_ih, w_hh = arguments[0], arguments[1]
    trace = tier.lstm_forward(*arguments)[3]
    gates, cells, hidden = (_exact(a.copy()) for a in activations(trace))
    arriving = case.arriving
    before = [a.copy() for a in arriving]
    poison_pool()
    result: LSTMBackward = tier.lstm_backward(w_ih, w_hh, trace, *arriving, True)
    assert all(np.array_equal(a, b) for a, b in zip(arriving, before, strict=True)), (
        "the arriving gradients were changed"
    )

    dy, dh, dc = (_exact(a) for a in arriving)
    one = Known(np.ones((), wider(dtype)), np.zeros(()))
    t_ih, t_hh = dense_of(w_ih, dtype).T, dense_of(w_hh, dtype).T

    def complement(x: Known) -> Known:  # 1 - x
        return one.plus(Known(-x.value, x.error)).rounded(u)

    da: list[Known] = []
    for t in reversed(range(case.steps)):
        i, f, g, o = (gates[t, k * case.size : (k + 1) * case.size] for k in range(4))
        tanh_c = _tanh(cells[t + 1], u)
        dh = dh.plus(dy[t]).rounded(u)
        slope = complement(tanh_c.by(tanh_c).rounded(u))
        dc = dc.plus(dh.by(o).by(slope).rounded(u, 2)).rounded(u)
        parts = (
            dc.by(g).by(i).by(complement(i)).rounded(u, 3),
            dc.by(cells[t]).by(f).by(complement(f)).rounded(u, 3),
            dc.by(i).by(complement(g.by(g).rounded(u))).rounded(u, 2),
            dh.by(tanh_c).by(o).by(complement(o)).rounded(u, 3),
        )
        da.insert(0, Known(np.concatenate([p.value for p in parts]), np.concatenate([p.error for p in parts])))
        dc = dc.by(f).rounded(u)
        dh = _product(t_hh, da[0], dtype)
    _judge("dh0", result.dh0, dh, dtype)
    _judge("dc0", result.dc0, dc, dtype)
    dx = [_product(t_ih, step, dtype) for step in da]
    _judge("dx", result.dx, Known(np.stack([d.value for d in dx]), np.stack([d.error for d in dx])), dtype)
    columns = Known(np.concatenate([d.value for d in da], axis=1), np.concatenate([d.error for d in da], axis=1))
    size = np.abs(columns.value) + columns.error
    n = gamma(columns.value.shape[1], dtype)
    d_bias = Known(columns.value.sum(axis=1), columns.error.sum(axis=1) + n * size.sum(axis=1))
    _judge("the bias's gradient", result.d_bias, d_bias, dtype)

    # the weight gradients by their two factors, multiplied here, and by number where the tier has them
    for name, factor, x in (
        ("W_ih", result.x, arguments[3]),
        ("W_hh", result.h_prev, hidden.value[:-1].astype(dtype)),
    ):
        other = flat_columns(np.ascontiguousarray(x)).T
        reference = Known(columns.value @ other, columns.error @ np.abs(other))
        got = flat_columns(result.d_gates) @ flat_columns(factor).T
        assert result.d_gates.dtype == factor.dtype == dtype
        _judge(f"the gradient of {name} by its factors", got, reference, got.dtype)
        if name == "W_ih" and result.dw_ih is not None:
            assert is_sparse(w_ih)
            bound = Known(reference.value, reference.error + n * (size @ np.abs(other)))
            flat = arguments[0].support.flat
            on_support = Known(bound.value.reshape(-1)[flat], bound.error.reshape(-1)[flat])
            _judge("the gradient of W_ih on its support", result.dw_ih, on_support, dtype)
    assert tier.lstm_backward(w_ih, w_hh, trace, *arriving, False).dx is None
