"""Choosing a tier, and what the kernels say to operands that do not fit."""

import os
import subprocess
import sys

import numpy as np
import pytest

from refimpl import kernels
from refimpl.kernels import cpu, spec
from refimpl.weights import SparseWeight, Support

W = SparseWeight(Support((4, 6), [0, 3, 7, 8, 20]), np.arange(1.0, 6.0))
X, DY = np.ones((2, 6, 3)), np.ones((2, 4, 3))


def test_use_chooses_a_tier_inside_the_block_only():
    before = kernels.tier()
    with kernels.use("spec"):
        assert kernels.tier() is spec
        with kernels.use("cpu"):
            assert kernels.tier() is cpu
        assert kernels.tier() is spec
    assert kernels.tier() is before
    with pytest.raises(KeyError), kernels.use("spec"):
        raise KeyError
    assert kernels.tier() is before


def test_an_unknown_tier_is_an_error_and_changes_nothing():
    before = kernels.tier()
    with pytest.raises(ValueError, match=r"no kernels called 'tpu'.*one of cpu, spec"), kernels.use("tpu"):
        pass
    assert kernels.tier() is before


def run(setting: str) -> subprocess.CompletedProcess:
    code = (
        "import numpy, sys; from refimpl import kernels; from refimpl.weights import SparseWeight, Support;"
        "y = SparseWeight(Support.full((2, 3)), numpy.ones(6)) @ numpy.ones((3, 1));"
        "assert (y == 3).all(); print(kernels.tier().__name__, 'numba' in sys.modules)"
    )
    environment = os.environ | {"REFIMPL_KERNELS": setting}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_a_tier():
    """And the definition needs no compiler: Numba is not even imported."""
    done = run("spec")
    assert done.stdout.split() == ["refimpl.kernels.spec", "False"], done.stderr


def test_an_unknown_tier_in_the_environment_is_an_error():
    done = run("fast")
    assert done.returncode == 1
    assert "ValueError: there are no kernels called 'fast'" in done.stderr


def test_both_tiers_have_the_same_functions():
    for name in cpu.__all__:
        assert callable(getattr(spec, name))
        assert callable(getattr(kernels, name))


def lstm(steps=2, size=1, inputs=6, batch=3, rows=4, bias=4, h=(1, 3), c=(1, 3), dtype=np.float64):
    w_ih = SparseWeight(Support.full((rows, inputs)), np.ones(rows * inputs))
    w_hh = SparseWeight(Support.full((4 * size, size)), np.ones(4 * size * size))
    x = np.ones((steps, 6, batch), dtype)
    return kernels.lstm_forward(w_ih, w_hh, np.ones(bias), x, np.zeros(h), np.zeros(c))


def backward(dy=(2, 1, 3), dh=(1, 3), dc=(1, 3), dtype=np.float64):
    w_ih = SparseWeight(Support.full((4, 6)), np.ones(24))
    w_hh = SparseWeight(Support.full((4, 1)), np.ones(4))
    trace = kernels.lstm_forward(w_ih, w_hh, np.ones(4), X, np.zeros((1, 3)), np.zeros((1, 3)))[3]
    return kernels.lstm_backward(w_ih, w_hh, trace, np.ones(dy, dtype), np.ones(dh), np.ones(dc))


BAD = {
    "too few features": (
        lambda: W @ X[:, :5],
        r"X has shape \(2, 5, 3\); this weight takes \(\.\.\., 6, columns\)",
    ),
    "a vector": (lambda: W @ np.ones(6), r"X has shape \(6,\)"),
    "no column": (lambda: W @ np.ones((6, 0)), "one column or more"),
    "another type": (lambda: W @ X.astype(np.float32), "X is float32 and the weight float64"),
    "a short bias": (lambda: kernels.matmul(W, X, np.ones(3)), r"the bias is float64 of shape \(3,\)"),
    "a bias of another type": (lambda: kernels.matmul(W, X, np.ones(4, np.float32)), "the bias is float32"),
    "dY for X": (lambda: kernels.matmul_t(W, X), r"dY has shape \(2, 6, 3\)"),
    "dY of another type": (lambda: kernels.matmul_t(W, DY.astype(np.float32)), "dY is float32"),
    "other panels": (lambda: kernels.sddmm(W.support, DY, X[:1]), "all axes but the last but one"),
    "other columns": (lambda: kernels.sddmm(W.support, DY, X[..., :2]), "all axes but the last but one"),
    "two types": (lambda: kernels.sddmm(W.support, DY, X.astype(np.float32)), "they must agree in type"),
    "factors exchanged": (lambda: kernels.matmul_t_sddmm(W, X, DY), "dY has shape"),
    "a token too many": (
        lambda: kernels.embed(W, np.array([[4]])),
        "int64 from 4 to 4; they must be integers from 0 to 3",
    ),
    "a negative token": (lambda: kernels.embed(W, np.array([[-1, 2]])), "from -1 to 2"),
    "a token of a dense weight": (lambda: kernels.embed(W.dense(), np.array([[4]])), "from 0 to 3"),
    "tokens that are no integers": (lambda: kernels.embed(W, np.array([[1.0]])), "float64 from 1.0"),
    "the gradient of a token too many": (
        lambda: kernels.embed_gradient(W.support, np.array([[7]]), np.ones((1, 6, 1))),
        "from 7 to 7",
    ),
    "an embedding's gradient of another shape": (
        lambda: kernels.embed_gradient(W.support, np.array([[1]]), np.ones((1, 5, 1))),
        r"dX has shape \(1, 5, 1\)",
    ),
    "a label too many": (
        lambda: kernels.softmax_cross_entropy(X, np.full((2, 3), 6), 1.0),
        "the targets are int64 from 6",
    ),
    "labels of another shape": (
        lambda: kernels.softmax_cross_entropy(X, np.zeros((3, 2), int), 1.0),
        r"logits of shape \(2, 6, 3\) and targets \(3, 2\)",
    ),
    "an input of another size": (lambda: lstm(inputs=5), r"x has shape \(2, 6, 3\)"),
    "gates missing": (lambda: lstm(rows=3), "four rows for each.*got 3, 4"),
    "an LSTM's bias": (lambda: lstm(bias=3), r"bias of shape \(3,\)"),
    "a state of another batch": (lambda: lstm(h=(1, 2)), r"h0 has shape \(1, 2\)"),
    "a cell state of another size": (lambda: lstm(c=(2, 3)), r"c0 has shape \(2, 3\)"),
    "arriving gradients of another window": (lambda: backward(dy=(3, 1, 3)), r"dy has shape \(3, 1, 3\)"),
    "arriving gradients of another batch": (lambda: backward(dh=(1, 2)), r"dh has shape \(1, 2\)"),
    "arriving gradients of another size": (lambda: backward(dc=(2, 3)), r"dc has shape \(2, 3\)"),
    "arriving gradients of another type": (lambda: backward(dtype=np.float32), "dy is float32"),
    "an LSTM's input of another type": (lambda: lstm(dtype=np.float32), "x is float32"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", kernels.TIERS)
def test_operands_that_do_not_fit(name, what):
    """One sentence, from every tier alike; compiled code never sees them."""
    call, message = BAD[what]
    with kernels.use(name), pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
