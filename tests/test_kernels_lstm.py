"""The LSTM kernels of every tier against a wider reference, and mistakes that must be caught."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings

from refimpl import kernels
from refimpl.kernels import cpu, spec
from refimpl.testing.lstm import LSTMCase, check_lstm_backward, check_lstm_forward, lstm_cases
from refimpl.weights import SparseWeight


class Chosen:
    """What the layers call: the choice of the kernels by the weights and the trace."""

    lstm_forward = staticmethod(kernels.lstm_forward)
    lstm_backward = staticmethod(kernels.lstm_backward)


TIERS = pytest.mark.parametrize("name", kernels.TIERS)


@TIERS
@settings(max_examples=50)
@given(case=lstm_cases())
def test_forward(name, case):
    with kernels.use(name):
        check_lstm_forward(Chosen, case)


@TIERS
@settings(max_examples=50)
@given(case=lstm_cases())
def test_backward(name, case):
    with kernels.use(name):
        check_lstm_backward(Chosen, case)


@pytest.mark.parametrize(("dtype", "batch"), [(np.float32, 130), (np.float64, 33)])
def test_a_layer_whose_lines_are_cut_into_tiles(dtype, batch):
    case = LSTMCase(size=220, inputs=17, steps=2, batch=batch, density=0.95, scale=0.1, dtype=dtype)
    check_lstm_forward(cpu, case)
    check_lstm_backward(cpu, case)
    derived = cpu.lstm.plan(case.weight("hh").support)
    width = 80 if dtype == np.float32 else 36
    for lines in (derived.rows, derived.columns):
        assert len(lines.sorted_tiles(width * np.dtype(dtype).itemsize, 1).starts) >= 2


@pytest.mark.parametrize("size", [1, 16, 33])
def test_a_window_in_several_passes(monkeypatch, size):
    monkeypatch.setattr(cpu.lstm, "_PASS_BYTES", 1)
    case = LSTMCase(size=size, inputs=7, steps=9, batch=20, density=0.4)
    assert len(cpu.lstm._passes(3, 100)) == 3
    check_lstm_forward(cpu, case)
    check_lstm_backward(cpu, case)


@TIERS
@pytest.mark.parametrize("dense", ["", "ih", "hh", "ih hh"])
def test_density_one_and_dense_weights_are_within_the_bound_of_one_reference(name, dense):
    case = LSTMCase(16, 7, 5, 20, density=1.0, dense=dense)
    with kernels.use(name):
        check_lstm_forward(Chosen, case)
        check_lstm_backward(Chosen, case)


@TIERS
@pytest.mark.parametrize("where", ["x", "h0", "c0", "weight"])
def test_what_is_not_finite_is_not_hidden(name, where):
    """A NaN in one column of the batch reaches its own outputs and no other column."""
    case = LSTMCase(16, 7, 5, 20, density=1.0)
    w_ih, w_hh, bias, x, h0, c0 = case.forward_arguments
    if where == "weight":
        w_hh.values[0] = np.nan
    else:
        {"x": x[1], "h0": h0, "c0": c0}[where][2, 3] = np.nan
    with kernels.use(name):
        y, _, c, trace = kernels.lstm_forward(w_ih, w_hh, bias, x, h0, c0)
        result = kernels.lstm_backward(w_ih, w_hh, trace, *case.arriving)
    if where == "weight":
        assert np.isnan(y[0, 0]).all()
        assert np.isnan(y[-1]).all()
    else:
        other = np.arange(20) != 3
        assert np.isnan(y[-1][:, 3]).all() or where == "c0"
        assert np.isnan(c[2, 3])
        assert not np.isnan(y[..., other]).any()
        assert np.isnan(result.dx[0][:, 3]).all()
        assert not np.isnan(result.dx[..., other]).any()
    assert np.isnan(result.d_bias).any()


# --- planted mistakes: each a forward or backward pass that is wrong in one way ---------------------


def swap_forget_and_output(rows):
    i, f, g, o = np.split(rows, 4)
    return np.concatenate([i, o, g, f])


def swapped_weight(w):
    return SparseWeight.from_dense(swap_forget_and_output(w.dense()))


def swapped_forward(w_ih, w_hh, bias, *rest):
    return cpu.lstm_forward(swapped_weight(w_ih), swapped_weight(w_hh), swap_forget_and_output(bias), *rest)


def forward_without_bias(w_ih, w_hh, bias, *rest):
    return cpu.lstm_forward(w_ih, w_hh, np.zeros_like(bias), *rest)


def forward_without_state(w_ih, w_hh, bias, x, h0, c0):
    return cpu.lstm_forward(w_ih, w_hh, bias, x, np.zeros_like(h0), c0)


def forward_without_last_step(w_ih, w_hh, bias, x, h0, c0):
    y, h, c, trace = cpu.lstm_forward(w_ih, w_hh, bias, x[:-1], h0, c0)
    return np.concatenate([y, h[None]]), h, c, trace


def forward_with_a_step_twice(w_ih, w_hh, bias, x, h0, c0):
    return cpu.lstm_forward(w_ih, w_hh, bias, x[[0, 0, *range(2, len(x))]], h0, c0)


def forward_without_the_last_unit(w_ih, w_hh, bias, x, h0, c0):
    y, h, c, trace = cpu.lstm_forward(w_ih, w_hh, bias, x, h0, c0)
    y = y.copy()
    y[:, -1] = np.nan
    return y, h, c, trace


FORWARD_MISTAKES = [
    swapped_forward,
    forward_without_bias,
    forward_without_state,
    forward_without_last_step,
    forward_with_a_step_twice,
    forward_without_the_last_unit,
]


def backward_swapped(*arguments):
    result = cpu.lstm_backward(*arguments)
    panels, rows, width = result.d_gates.shape
    i, f, g, o = np.split(result.d_gates, 4, axis=1)
    return result._replace(d_gates=np.concatenate([i, o, g, f], axis=1).reshape(panels, rows, width))


def backward_without_last_state(w_ih, w_hh, trace, dy, dh, dc, input_gradient):
    return cpu.lstm_backward(w_ih, w_hh, trace, dy, np.zeros_like(dh), dc, input_gradient)


def backward_without_cell_state(w_ih, w_hh, trace, dy, dh, dc, input_gradient):
    return cpu.lstm_backward(w_ih, w_hh, trace, dy, dh, np.zeros_like(dc), input_gradient)


def backward_without_a_step(w_ih, w_hh, trace, dy, dh, dc, input_gradient):
    dy = dy.copy()
    dy[1] = 0
    return cpu.lstm_backward(w_ih, w_hh, trace, dy, dh, dc, input_gradient)


def backward_through_another_weight(w_ih, w_hh, trace, *rest):
    return cpu.lstm_backward(w_ih, swapped_weight(w_hh), trace, *rest)


def backward_with_outputs_for_inputs(*arguments):
    result = cpu.lstm_backward(*arguments)
    return result._replace(h_prev=np.roll(result.h_prev, 1, axis=2))


def backward_with_a_bias_missing(*arguments):
    result = cpu.lstm_backward(*arguments)
    result.d_bias[-1] = 0
    return result


BACKWARD_MISTAKES = [
    backward_swapped,
    backward_without_last_state,
    backward_without_cell_state,
    backward_without_a_step,
    backward_through_another_weight,
    backward_with_outputs_for_inputs,
    backward_with_a_bias_missing,
]

PLANTED = LSTMCase(16, 7, 5, 20, density=0.5)


@pytest.mark.parametrize("forward", FORWARD_MISTAKES, ids=lambda f: f.__name__)
def test_planted_mistakes_of_forward_are_caught(forward):
    check_lstm_forward(cpu, PLANTED)
    with pytest.raises(AssertionError):
        check_lstm_forward(SimpleNamespace(lstm_forward=forward), PLANTED)


@pytest.mark.parametrize("backward", BACKWARD_MISTAKES, ids=lambda f: f.__name__)
def test_planted_mistakes_of_backward_are_caught(backward):
    check_lstm_backward(cpu, PLANTED)
    with pytest.raises(AssertionError):
        check_lstm_backward(SimpleNamespace(lstm_forward=cpu.lstm_forward, lstm_backward=backward), PLANTED)


def test_spec_is_what_the_mixed_weights_run_on():
    case = LSTMCase(3, 7, 2, 33, dense="hh")
    assert isinstance(kernels.lstm_forward(*case.forward_arguments)[3], spec.LSTMTrace)
