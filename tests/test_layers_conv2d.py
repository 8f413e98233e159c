"""Convolution: the laws of every layer, its definition by loops, torch, gradients as promises in bounded memory."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conv_cases import SIZES, by_loops, check_by_loops, draw, make_conv, sides
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.kernels.types import Inset
from refimpl.layers import conv2d, depthwise, linear, windows
from refimpl.layers.conv2d import ConvGrad
from refimpl.layers.windows import Windows
from refimpl.testing.layers import check_layer
from refimpl.weights import Grads, Params, SparseWeight, Support, gradient

# Few different panel widths, because the compiled tier makes one kernel for each.
FEW: dict[str, Any] = {
    **SIZES, "kernel": [(2, 2)], "stride": [1], "padding": [0], "extra": [(0, 1)], "batch": [2], "block": [1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Use one thread, and leave the size of the blocks as it was."""
    count, entries, small = kernels.threads.get(), windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES
    kernels.threads.set_count(1)
    with kernels.use("spec"):
        yield
    kernels.threads.set_count(count)
    windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES = entries, small


def test_conv() -> None:
    check_layer(make_conv, SIZES, max_examples=40)


def test_conv_compiled() -> None:
    with kernels.use("cpu"):
        check_layer(make_conv, FEW, max_examples=6)


# --- what it computes -----------------------------------------------------------------------------------------


SHAPES = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SIZES.items()})


@settings(max_examples=40)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_conv_by_loops(shape: dict[str, Any], seed: int) -> None:
    check_by_loops(seed, **shape)


@settings(max_examples=30)
@given(SHAPES, st.integers(0, 2**32 - 1), st.booleans())
def test_conv_of_torch(shape: dict[str, Any], seed: int, sparse: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES = shape["block"], shape["small"]
    w, x = draw(rng, *(shape[key] for key in ("groups", "channels", "kernel", "padding", "extra", "batch")))
    b = rng.standard_normal(len(w))
    weight: Any = SparseWeight.from_dense(w, Support.from_mask(rng.random(w.shape) < 0.4)) if sparse else w
    options = {key: shape[key] for key in ("stride", "groups")}
    y, cache = conv2d.forward({"w": weight, "b": b}, "w", "b", x, padding=shape["padding"], **options)
    dy = rng.standard_normal(y.shape)
    grads: dict[str, Any] = {}
    dx = conv2d.backward(dy, cache, grads)

    leaves = [torch.tensor(a, requires_grad=True) for a in (weight.dense() if sparse else w, b, nchw(x))]
    (top, bottom), (left, right) = sides(shape["padding"])
    padded = torch.nn.functional.pad(leaves[2], (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(padded, leaves[0], leaves[1], **options)
    theirs.backward(torch.tensor(nchw(dy)))
    ours = {"y": nchw(y), "dw": grads["w"].dense(), "db": grads["b"], "dx": nchw(dx)}
    for (name, a), expected in zip(ours.items(), (theirs.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        np.testing.assert_allclose(a, expected.numpy(), rtol=0, atol=1e-12 * scale, err_msg=name)


def nchw(x: Any) -> np.ndarray:
    """Return images in torch's order."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 0))


def test_convolutions_that_are_linear_maps() -> None:
    """A kernel of one pixel is a linear map of each pixel, a kernel as large as the image one of the whole image."""
    rng = np.random.default_rng(0)
    for kernel, columns in (((1, 1), 5 * 4 * 3), ((5, 4), 3)):
        w, x = rng.integers(-4, 5, (6, 2, *kernel)).astype(float), rng.integers(-4, 5, (2, 5, 4, 3)).astype(float)
        for weight in (w, SparseWeight.from_dense(w * (w > 0))):
            y, _ = conv2d.forward({"w": weight}, "w", None, x)
            flat = weight if isinstance(weight, SparseWeight) else w.reshape(6, -1)
            expected, _ = linear.forward({"w": flat}, "w", None, x.reshape(-1, columns))
            np.testing.assert_array_equal(y.reshape(6, columns), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_groups_are_convolutions_side_by_side(sparse: bool) -> None:
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((6, 2, 3, 3)), rng.standard_normal((6, 5, 5, 2))
    w[4:] *= not sparse  # one group's rows are all empty
    as_given: Any = SparseWeight.from_dense if sparse else np.array
    y, _ = conv2d.forward({"w": as_given(w)}, "w", None, x, groups=3, padding=1)
    for g in range(3):
        own, _ = conv2d.forward({"w": as_given(w[2 * g : 2 * g + 2])}, "w", None, x[2 * g : 2 * g + 2], padding=1)
        np.testing.assert_array_equal(y[2 * g : 2 * g + 2], own)


def test_one_support_in_several_numbers_of_groups() -> None:
    """What is derived from a support for its groups is kept with it, for each number of groups by itself."""
    rng = np.random.default_rng(1)
    w = rng.integers(-4, 5, (4, 2, 2, 2)).astype(float)
    sparse = SparseWeight.from_dense(w)
    for groups in (1, 2, 4, 2):
        x = rng.integers(-4, 5, (2 * groups, 3, 3, 2)).astype(float)
        y, _ = conv2d.forward({"w": sparse}, "w", None, x, groups=groups)
        np.testing.assert_array_equal(y, by_loops(w, x, None, stride=1, padding=0, groups=groups)[0])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_is_a_convolution_in_groups(monkeypatch: pytest.MonkeyPatch, sparse: bool, multiplier: int) -> None:
    rng = np.random.default_rng(2)
    w, x = rng.integers(-4, 5, (4 * multiplier, 1, 3, 2)).astype(float), rng.integers(-4, 5, (4, 6, 5, 2)).astype(float)
    weight: Any = SparseWeight.from_dense(w, Support.from_mask(w > 0)) if sparse else w
    results = []
    for special in (True, False):
        if not special:
            monkeypatch.setattr(depthwise, "is_depthwise", lambda shape, groups: False)
        y, cache = conv2d.forward({"w": weight}, "w", None, x, groups=4, stride=2, padding=1)
        grads: dict[str, Any] = {}
        dx = conv2d.backward(np.arange(y.size).reshape(y.shape) % 7 - 3.0, cache, grads)
        assert dx is not None
        results.append([y, dx, grads["w"].dense(), grads["w"].on(Support.from_mask(w > 1))])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# --- gradients as promises, blocks and memory -----------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_blocks_of_the_gradient(monkeypatch: pytest.MonkeyPatch, groups: int, rows: int) -> None:
    """They ascend, are as small as asked for, and may end inside a group."""
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((8, 4 // groups, 2, 2)), rng.standard_normal((4, 4, 4, 2))
    y, cache = conv2d.forward({"w": w}, "w", None, x, groups=groups)
    grads: dict[str, Any] = {}
    conv2d.backward(y, cache, grads, input_gradient=False)
    expected = by_loops(w, x, y, stride=1, padding=0, groups=groups)[2]
    monkeypatch.setattr(gradient, "BLOCK_ENTRIES", rows * w[0].size)
    parts = [(part, block.copy()) for part, block in grads["w"].blocks()]
    is_one_block = depthwise.is_depthwise(w.shape, groups)
    assert all(len(block) <= rows for _, block in parts) or is_one_block
    assert [i for part, _ in parts for i in range(part.start, part.stop)] == list(range(8))
    joined = np.concatenate([block for _, block in parts]).reshape(w.shape)
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_what_is_known_is_not_computed_again() -> None:
    support, known = Support((1, 1, 1, 2), [1]), np.array([7.0])
    dy, x = np.ones((1, 1, 1, 1)), np.ones((1, 1, 2, 1))
    promise = ConvGrad((1, 1, 1, 2), dy, Inset(x, (0, 0)), Windows.of((1, 2), 1, 0), x.shape, known=(support, known))
    assert promise.on(support) is known
    assert promise.on(Support((1, 1, 1, 2), [1])).tolist() == [1]


def test_backward_leaves_the_gradient_of_a_sparse_weight_known() -> None:
    rng = np.random.default_rng(4)
    w = SparseWeight.from_dense(rng.standard_normal((4, 2, 3, 3)) * (rng.random((4, 2, 3, 3)) < 0.5))
    y, cache = conv2d.forward({"w": w}, "w", None, rng.standard_normal((4, 5, 5, 2)), groups=2)
    grads: dict[str, Any] = {}
    conv2d.backward(y, cache, grads)
    promise = grads["w"]
    assert promise.on(w.support) is promise.known[1]
    again = promise.on(Support(w.shape, w.support.flat))
    np.testing.assert_allclose(promise.known[1], again, rtol=0, atol=1e-12 * np.abs(again).max())


@pytest.mark.parametrize("sparse", [False, True])
def test_columns_are_never_held_as_a_whole(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    """Forward, backward and the gradient: images and a few blocks, far less than the columns."""
    monkeypatch.setattr(windows, "BLOCK_ENTRIES", 1 << 14)
    monkeypatch.setattr(conv2d, "SMALL_ENTRIES", 0)
    channels, side, batch = 8, 32, 16
    rng = np.random.default_rng(5)
    w = rng.standard_normal((channels, channels, 5, 5))
    support = Support.from_mask(rng.random(w.shape) < 0.1)
    params: Params = {"w": SparseWeight.from_dense(w, support) if sparse else w}
    x = rng.standard_normal((channels, side, side, batch))

    def step() -> None:
        grads: Grads = {}
        y, cache = conv2d.forward(params, "w", None, x, padding=2)
        conv2d.backward(y, cache, grads)
        promise = grads["w"]
        assert not isinstance(promise, np.ndarray)
        promise.on(Support(support.shape, support.flat))
        promise.dense()

    with kernels.use("cpu"):  # of a sparse weight the definition makes columns
        step()  # what is made once, outside the measurement
        kernels.memory.trim()
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    kernels.memory.trim()
    # In backward: y, padded x, padded dx and dx, of which the padded ones are (36 / 32)^2 times as large and any is
    # rounded up by 1/8; and four blocks or so (columns, their gradient, a copy of each).
    image, block = x.nbytes, 8 * (1 << 14)
    assert peak < 1.2 * (2 + 2 * (36 / 32) ** 2) * image + 8 * block
    assert peak < 25 * image / 3


def test_the_same_bits_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(6)
    w, x = rng.standard_normal((300, 20, 3, 3)), rng.standard_normal((20, 12, 12, 30))
    results = []
    for count in (1, 2):
        kernels.threads.set_count(count)
        y, cache = conv2d.forward({"w": w}, "w", None, x, padding=1)
        grads: dict[str, Any] = {}
        dx = conv2d.backward(y, cache, grads)
        assert dx is not None
        results.append((y.tobytes(), dx.tobytes(), grads["w"].dense().tobytes()))
    assert results[0] == results[1]


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "image", "options", "match"),
    [
        ((4, 3, 3, 3), (2, 5, 5, 1), {}, r"image has 2 channels; w of shape \(4, 3, 3, 3\) in 1 group.* reads 3"),
        ((4, 3, 3, 3), (3, 5, 5, 1), {"groups": 2}, "image has 3 channels.* in 2 group.* reads 6"),
        ((4, 1, 3, 3), (3, 5, 5, 1), {"groups": 3}, "w has 4 output channels.*divides them, not 3"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"groups": 0}, "divides them, not 0"),
        ((4, 1, 3, 6), (1, 5, 3, 1), {"padding": 1}, "kernel is 3 x 6 and the padded image 7 x 5 pixels"),
        ((4, 1, 3, 3), (1, 5, 5), {}, r"got an array of shape \(1, 5, 5\); give images as"),
        ((4, 9), (1, 5, 5, 1), {}, r"w has shape \(4, 9\); the weight of a convolution is"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"stride": 0}, "stride is 0; give a whole number from 1"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\); give"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"padding": -1}, "padding is -1; give a whole number from 0"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"padding": (1, 1, 1)}, r"padding is \(1, 1, 1\); give one number, or one or"),
        ((4, 1, 3, 3), (1, 5, 5, 1), {"padding": 0.5}, "padding is 0.5; give a whole number"),
    ],
)
def test_what_does_not_fit(shape: Any, image: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        conv2d.forward({"w": np.ones(shape)}, "w", None, np.ones(image), **options)


def test_a_bias_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); w of shape \(4, 1, 3, 3\) takes one of \(4,\)"):
        conv2d.forward({"w": np.ones((4, 1, 3, 3)), "b": np.ones(3)}, "w", "b", np.ones((1, 5, 5, 1)))
