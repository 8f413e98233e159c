"""The vector functions of the row kernels: their accuracy over the whole range, and what is not finite."""

from collections.abc import Callable

import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from refimpl.kernels.cpu.rows import Frame
from refimpl.kernels.cpu.vector import QUAD, quads
from refimpl.rng import generator

WIDTH = 20  # in full registers and in what is left at a row's end
LIMIT = {np.float32: 87.0, np.float64: 708.0}  # where exp stays at the smallest and largest normal numbers
CLAIMED_ULPS = {"exp": 2, "sigmoid": 4, "tanh": 4}
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def compiled(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of flat arrays (of a multiple of WIDTH) that runs one method of Rows."""

    @intrinsic
    def on_row(typingctx, quads, x, at, out):
        def generate(context, b, signature, arguments):
            f = Frame(context, b, signature, arguments)
            f.rows.store(getattr(f.rows, name)(f.rows.load(f.pointer(1, 2))), b.gep(f.pointer(3), [arguments[2]]))
            return context.get_dummy_value()

        return types.void(quads, x, types.intp, out), generate

    @njit
    def loop(quads, x, out):
        for i in range(0, x.size, WIDTH):
            on_row(quads, x, i, out)

    def apply(x: np.ndarray) -> np.ndarray:
        padded = np.concatenate([x, np.zeros(-x.size % WIDTH, x.dtype)])
        out = np.full_like(padded, np.nan)
        loop(quads(WIDTH), padded, out)
        return out[: x.size]

    assert WIDTH % QUAD == 0
    return apply


FUNCTIONS = {name: compiled(name) for name in CLAIMED_ULPS}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """Return the function in a wider type, from formulas that lose nothing there."""
    wide = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        if name == "exp":
            return np.exp(wide)
        if name == "tanh":
            return np.tanh(wide)
        e = np.exp(-np.abs(wide))
        return np.where(wide >= 0, 1 / (1 + e), e / (1 + e))


def ulps(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the error in units in the last place of the reference, rounded to the type of ``got``."""
    with np.errstate(under="ignore"):
        unit = np.spacing(np.maximum(np.abs(reference).astype(got.dtype), np.finfo(got.dtype).tiny))
    return np.abs(got.astype(reference.dtype) - reference) / unit


def arguments(dtype: type, limit: float) -> np.ndarray:
    """Return arguments up to ±limit: of all magnitudes, denormals too, and next to the reduction's seams."""
    rng = generator(0, "arguments")
    seams = np.concatenate([(np.arange(-60, 61) + half) * np.log(2) for half in (0, 0.5, 0.25)])
    tiny = float(np.finfo(dtype).tiny)
    x = np.concatenate(
        [
            np.exp2(rng.uniform(np.log2(tiny), np.log2(limit), 100_000)),
            rng.uniform(0, limit, 50_000),
            rng.uniform(0, 2, 50_000),
            np.abs(seams),
            [0, limit, np.nextafter(limit, 0), tiny, float(np.finfo(dtype).smallest_subnormal)],
            float(np.finfo(dtype).smallest_subnormal) * rng.integers(1, 1 << 20, 1000),
        ]
    ).astype(dtype)
    x = x[x <= limit]
    near = np.concatenate([x, np.nextafter(x, dtype(0)), np.nextafter(x, dtype(1))])
    near = near[near <= limit]
    return np.concatenate([near, -near])


@EACH
@TYPES
def test_accuracy_in_units_in_the_last_place(name, dtype):
    if dtype == np.float64 and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is no wider than float64 here")
    x = arguments(dtype, LIMIT[dtype])
    error = ulps(FUNCTIONS[name](x), exact(name, x))
    worst = int(error.argmax())
    assert error[worst] <= CLAIMED_ULPS[name], f"{name}({x[worst]!r}) is {error[worst]:.2f} ulp off"


@EACH
@TYPES
def test_beyond_the_limits_the_error_is_the_smallest_normal_number_at_most(name, dtype):
    limit = LIMIT[dtype]
    x = np.array([limit * f for f in (1.001, 1.1, 2, 1e3, 1e30)] + [np.finfo(dtype).max, np.inf], dtype)
    below = FUNCTIONS[name](-x)
    floor = {"exp": 0.0, "sigmoid": 0.0, "tanh": -1.0}[name]
    assert (np.abs(below - dtype(floor)) <= 2 * np.finfo(dtype).tiny).all()
    above = FUNCTIONS[name](x)
    if name == "exp":  # held at exp(limit), far beyond what any activation is
        assert (above == above[0]).all()
        assert (above >= np.exp(dtype(limit)) * (1 - 4 * np.finfo(dtype).eps)).all()
    else:
        assert (above == 1).all()


@EACH
@TYPES
def test_nan_stays_nan_in_its_own_place(name, dtype):
    for place in range(WIDTH):
        x = np.linspace(-3, 3, WIDTH).astype(dtype)
        clean = FUNCTIONS[name](x)
        x[place] = np.nan
        got = FUNCTIONS[name](x)
        assert np.array_equal(np.isnan(got), np.arange(WIDTH) == place)
        assert np.array_equal(np.delete(got, place), np.delete(clean, place))
    assert np.isnan(FUNCTIONS[name](np.full(WIDTH, -np.nan, dtype))).all()


@TYPES
def test_special_values(dtype):
    zeros = np.array([0.0, -0.0], dtype)
    assert (FUNCTIONS["exp"](zeros) == 1).all()
    assert (FUNCTIONS["sigmoid"](zeros) == 0.5).all()
    assert (FUNCTIONS["tanh"](zeros) == 0).all()


@TYPES
def test_tanh_is_odd_to_its_accuracy_and_within_one(dtype):
    x = arguments(dtype, 30.0)
    y, mirrored = FUNCTIONS["tanh"](x), FUNCTIONS["tanh"](-x)
    assert (np.abs(y) <= 1).all()
    assert (ulps(-mirrored, y.astype(np.longdouble)) <= 2 * CLAIMED_ULPS["tanh"]).all()


@TYPES
def test_sigmoid_is_within_zero_and_one(dtype):
    y = FUNCTIONS["sigmoid"](arguments(dtype, LIMIT[dtype]))
    assert ((y >= 0) & (y <= 1)).all()
