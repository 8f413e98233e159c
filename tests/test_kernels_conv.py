"""Sparse convolutions: the compiled kernels against their definition, exactly, and images in padding that is there."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conv_cases import by_loops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.kernels import conv, spec_conv
from refimpl.kernels.cpu import conv as compiled
from refimpl.kernels.types import Geometry, Inset
from refimpl.layers import conv2d
from refimpl.layers.padded import Padded
from refimpl.testing.convolutions import ConvCase, Convolution, check_convolution, results
from refimpl.weights import SparseWeight, Support


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    count = kernels.threads.get()
    kernels.threads.set_count(1)
    with kernels.use("cpu"):
        yield
    kernels.threads.set_count(count)


AXES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.sampled_from([4, 7]))
CASES = st.builds(
    ConvCase,
    axes=st.tuples(AXES, AXES),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.sampled_from([1, 3, 4]),
    margins=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make stretches of four or eight numbers alone: a kernel is compiled for each width."""
    monkeypatch.setattr(compiled, "_STRETCH_BYTES", 64)
    compiled.stretches.cache_clear()
    yield
    compiled.stretches.cache_clear()


@pytest.mark.usefixtures("narrow")
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), CASES)
def test_compiled_as_defined(seed: int, case: ConvCase) -> None:
    check_convolution(compiled, case, seed)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), CASES)
def test_the_definition_by_loops(seed: int, case: ConvCase) -> None:
    c = case.draw(seed)
    geometry = c.geometry
    images = []
    for inset, (height, width) in ((c.x, geometry.image), (c.dy, geometry.outputs)):
        (t, left) = inset.at
        images.append(inset.whole[:, t : t + height, left : left + width])
    p = geometry.padding
    sides = ((p[0], p[0]), (p[1], p[1]))
    y, dx, dw = by_loops(c.w.dense(), images[0], images[1], stride=geometry.stride, padding=sides, groups=1)
    ours = results(spec_conv, c)
    on = dw.reshape(-1)[c.w.support.flat]
    for a, b in zip(ours, (y + c.bias[:, None, None, None], y, on, dx, on), strict=True):
        np.testing.assert_array_equal(a, b)


WIDE = ConvCase(axes=((3, 1, 1, 9), (3, 1, 1, 16)), channels=(40, 24), batch=16, margins=(0, 1), density=0.3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_tiles_and_on_threads(monkeypatch: pytest.MonkeyPatch, stride: int, dtype: Any) -> None:
    """Many tiles, several stretches in a row, any number of threads: the numbers of the definition."""
    monkeypatch.setattr(compiled, "_TILE_BYTES", 4 << 10)
    monkeypatch.setattr(compiled, "_LEAST", 1)
    monkeypatch.setattr("refimpl.kernels.cpu.plan.WORTH_SHARING", 0.0)
    axes = ((3, stride, 1, 9), (3, stride, 1, 16))
    c = replace(WIDE, axes=axes, dtype=dtype).draw(5)
    expected = results(spec_conv, c)
    tiles = compiled._rows(c.w.support, c.geometry, c.x.whole.shape, 64, np.dtype(dtype).itemsize)
    assert len(tiles.starts) > 3
    for count in (1, 2, 3):
        kernels.threads.set_count(count)
        fresh = c._replace(w=SparseWeight(Support(c.w.shape, c.w.support.flat), c.w.values))
        for ours, by_definition in zip(results(compiled, fresh), expected, strict=True):
            np.testing.assert_array_equal(ours, by_definition)


def test_the_rounding_of_long_sums() -> None:
    """Real numbers, float32: within the bound of a sum in any order."""
    rng = np.random.default_rng(6)
    c = replace(WIDE, dtype=np.float32).draw(6)
    for array in (c.x.whole, c.dy.whole, c.w.values):
        array *= rng.standard_normal(array.shape).astype(np.float32)

    def of(change: Callable[[np.ndarray], np.ndarray]) -> Convolution:
        x, dy = (Inset(change(inset.whole), inset.at) for inset in (c.x, c.dy))
        return Convolution(SparseWeight(c.w.support, change(c.w.values)), x, dy, c.geometry, change(c.bias))

    wide, size = of(lambda a: a.astype(float)), of(lambda a: np.abs(a.astype(float)))
    terms = [24 * 9 + 1, 24 * 9, 9 * 16 * 16, 40 * 9, 9 * 16 * 16]
    for ours, exact, absolute, n in zip(
        results(compiled, c), results(spec_conv, wide), results(spec_conv, size), terms, strict=True
    ):
        unit = np.finfo(np.float32).eps / 2
        assert (np.abs(ours - exact) <= n * unit / (1 - n * unit) * absolute + 1e-300).all()


def test_padded_images_are_read_where_they_lie() -> None:
    """A margin as wide as the padding: the same numbers as without, and no copy of the images."""
    rng = np.random.default_rng(7)
    w = rng.standard_normal((8, 4, 3, 3)) * (rng.random((8, 4, 3, 3)) < 0.4)
    params: Any = {"w": SparseWeight.from_dense(w)}
    x, dy = rng.standard_normal((4, 6, 7, 4)), rng.standard_normal((8, 6, 7, 4))
    plain, cache = conv2d.forward(params, "w", None, x, padding=1)
    grads: Any = {}
    dx = conv2d.backward(dy, cache, grads)
    for margin in (1, 2):
        padded = []
        for array in (x, dy):
            one = Padded.empty(array.shape, float, margin)
            one.image[...] = array
            padded.append(one)
        y, cache = conv2d.forward(params, "w", None, padded[0], padding=1)
        assert cache.x.whole is padded[0].whole
        own: Any = {}
        np.testing.assert_array_equal(y, plain)
        np.testing.assert_array_equal(conv2d.backward(padded[1], cache, own), dx)
        np.testing.assert_array_equal(own["w"].on(params["w"].support), grads["w"].on(params["w"].support))
        np.testing.assert_array_equal(own["w"].dense(), grads["w"].dense())
        np.testing.assert_array_equal(padded[0].image, x)
        assert not padded[0].whole[:, :margin].any()
        assert not padded[0].whole[:, :, -margin:].any()
    narrow = Padded(x, 0)
    np.testing.assert_array_equal(conv2d.forward(params, "w", None, narrow, padding=1)[0], plain)


@pytest.mark.usefixtures("narrow")
def test_taps_that_see_nothing_but_padding() -> None:
    """Their gradient is 0, whatever stood in the memory before."""
    case = ConvCase(axes=((3, 3, 1, 1), (3, 1, 1, 4)), channels=(4, 3), batch=4, density=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.memory, "empty", lambda shape, dtype: np.full(shape, 7, dtype))
        check_convolution(compiled, case)


def test_an_exchange_makes_new_plans() -> None:
    """What is derived from a support belongs to it: another support of the same shape has its own."""
    case = ConvCase(axes=((3, 2, 1, 7), (3, 2, 1, 4)), channels=(4, 4), batch=4, density=0.3)
    c = case.draw(8)
    results(compiled, c)
    mixed = c._replace(w=case.draw(9).w)
    for ours, expected in zip(results(compiled, mixed), results(spec_conv, mixed), strict=True):
        np.testing.assert_array_equal(ours, expected)


# --- planted mistakes


def one_residue(*arguments: Any) -> Any:
    return inner_along(*arguments)[:1]


def first_pixel_off(kernel: int, stride: int, padding: int, image: int) -> Any:
    return [(taps, 0, seen, count, way) for taps, _, seen, count, way in inner_along(kernel, stride, padding, image)]


def unpadded(x: Inset, geometry: Geometry) -> Any:
    return compiled._walk(x, (0, 0), geometry.stride)


def stride_forgotten(x: Inset, geometry: Geometry) -> Any:
    top, left = geometry.padding
    return compiled._walk(x, (-top, -left), (1, 1))


def values_shifted(tiles: Any, pixels: Any, source: Any = None) -> Any:
    return inner_in_pixels(tiles, pixels, None if source is None else np.roll(source, 1))


inner_along, inner_in_pixels = compiled._along, compiled._in_pixels
STRIDED = ConvCase(axes=((3, 2, 1, 7), (2, 2, 1, 4)), channels=(3, 2), batch=4, margins=(1, 0), density=0.7)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("_along", one_residue),
        ("_along", first_pixel_off),
        ("_windows_walk", unpadded),
        ("_windows_walk", stride_forgotten),
        ("_in_pixels", values_shifted),
        ("_with_margin", lambda dy, geometry: dy),
        ("_sees_all", lambda geometry: True),
    ],
)
def test_planted_mistakes(monkeypatch: pytest.MonkeyPatch, name: str, mistake: Any) -> None:
    cases = [STRIDED, replace(STRIDED, axes=((1, 2, 0, 7), (3, 1, 1, 4)))]
    for case in cases:
        check_convolution(compiled, case)
    caches = [compiled._phases, compiled._sees_all, compiled._reach]
    monkeypatch.setattr(compiled, name, mistake)
    for cached in caches:
        cached.cache_clear()
    wrong = 0
    for case in cases:
        try:
            check_convolution(compiled, case)
        except AssertionError:
            wrong += 1
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()
    assert wrong


# --- bad input


def test_what_does_not_fit() -> None:
    w, x, dy, geometry, _ = STRIDED.draw(0)
    with pytest.raises(ValueError, match="a weight of 12 columns and 6 taps takes"):
        conv.convolve(w, Inset(x.whole[:1], x.at), geometry)
    with pytest.raises(ValueError, match="reach beyond it"):
        conv.convolve(w, Inset(x.whole, (0, 0)), geometry)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\)"):
        conv.convolve(w, x, geometry, np.ones(2))
    with pytest.raises(ValueError, match=r"dY has shape .* this convolution gives"):
        conv.convolve_backward(w, Inset(dy.whole[..., :2], dy.at), x, geometry)
    with pytest.raises(ValueError, match=r"dY has shape .* this convolution gives"):
        conv.convolve_dot(w.support, Inset(dy.whole[:, 1:], dy.at), x, geometry)
