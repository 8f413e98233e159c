"""Images for the kernels, and the checks of batch norm's: within what rounding explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.kernels import spec_images
from refimpl.layers.padded import Padded
from refimpl.rng import generator
from refimpl.testing.bounds import gamma, wider

EPS = 1e-5


def framed(x: np.ndarray, margin: int) -> Padded:
    """Return images inside a margin that is not to be read."""
    c, h, w, b = x.shape
    out = Padded(np.full((c, h + 2 * margin, w + 2 * margin, b), np.nan, x.dtype), margin)
    out.image[...] = x
    return out


@dataclass(frozen=True)
class Case:
    """Images and what is done to them, drawn from a seed."""

    shape: tuple[int, int, int, int]
    dtype: Any = np.float64
    margin: int = 0  # of what is written
    around: tuple[int, ...] = (0, 0, 0, 0)  # margins of what is read: x and more; dy, x, more and y
    add: bool = False
    rectify: bool = False
    moving: bool = True
    offset: float = 1.0  # mean of a channel, in units of its greatest number
    seed: int = 0

    def numbers(self, stream: str) -> np.ndarray:
        """Return images, each channel of its own magnitude."""
        rng = generator(self.seed, stream)
        size = 10.0 ** rng.uniform(-2, 2, (self.shape[0], 1, 1, 1))
        return (size * rng.standard_normal(self.shape)).astype(self.dtype)

    def channels(self, stream: str) -> np.ndarray:
        """Return a number for each channel, of either sign."""
        return generator(self.seed, stream).standard_normal(self.shape[0]).astype(self.dtype)

    @property
    def x(self) -> np.ndarray:
        """What is normalised."""
        x = self.numbers("x")
        return (x + self.offset * np.abs(x).max((1, 2, 3), keepdims=True)).astype(self.dtype)

    def out(self) -> Padded:
        """Return images to write; everything in them is wrong."""
        return framed(np.full(self.shape, np.nan, self.dtype), self.margin)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Draw a case: single numbers, rows that fill no vector, several blocks of vectors."""
    height, width = draw(st.sampled_from([(1, 1), (1, 5), (3, 2), (4, 4), (7, 7), (2, 16)]))
    drawn = {
        "shape": (draw(st.integers(1, 5)), height, width, draw(st.integers(1, 33))),
        "dtype": draw(st.sampled_from([np.float32, np.float64])),
        "margin": draw(st.integers(0, 2)),
        "around": draw(st.tuples(*[st.integers(0, 2)] * 4)) if draw(st.booleans()) else (0, 0, 0, 0),
        "add": draw(st.booleans()),
        "rectify": draw(st.booleans()),
        "moving": draw(st.booleans()),
        "offset": draw(st.sampled_from([0.0, 1.0, -30.0, 1000.0])),
        "seed": draw(st.integers(0, 2**32)),
    }
    return Case(**(drawn | fixed))


def inner(x: Padded) -> np.ndarray:
    """Return the images, and see that there are zeros around them."""
    edge = Padded(x.whole.copy(), x.margin)
    edge.image[...] = 0
    assert not edge.whole.any(), "what stands in the margin is wrong"
    return x.image


def within(name: str, got: np.ndarray, reference: np.ndarray, bound: np.ndarray, dtype: Any) -> None:
    assert got.dtype == dtype, f"the type {got.dtype} of {name} is wrong"
    error = np.abs(got.astype(reference.dtype) - reference)
    assert (error <= bound).all(), (
        f"{name} is {float((error / np.maximum(bound, 1e-300)).max()):.3g} times as far from the reference as rounding "
        "can carry it"
    )


def per_channel(a: np.ndarray) -> np.ndarray:
    return a[:, None, None, None]


def check_forward(module: Any, case: Case) -> None:
    """Statistics, and then the output that follows from them.

    Partial sums of a block of 8 numbers, of differences that were rounded, carry 10 roundings (12 for squares), and the
    final sums in float64 one for each number. Sums that begin at a pivot p with (mean - p)^2 <= 4 var lose a factor of
    14 at most: var = S - s^2 with S <= 5 var, |s| <= 2 sigma and mean |x - p| <= sqrt 5 sigma.
    """
    wide, dtype = wider(case.dtype), case.dtype
    x, weight, bias, more = case.x, case.channels("weight"), case.channels("bias"), case.numbers("more")
    n = x[0].size
    given = None
    if not case.moving:
        given = case.channels("mean"), np.square(case.channels("variance"))
    out = case.out()
    mean, var = module.batch_norm(
        framed(x, case.around[0]), weight, bias, EPS, out, statistics=given,
        add=framed(more, case.around[1]) if case.add else None, rectify=case.rectify,
    )  # fmt: skip
    exact = x.astype(wide)
    if given is None:
        mu = exact.mean((1, 2, 3))
        d = exact - per_channel(mu)
        sigma2 = np.square(d).mean((1, 2, 3))
        g = 1.001 * (gamma(12, dtype) + gamma(n + 4, np.float64))
        # Digits that the pivot, a number of the arrays' type, cannot have, or the definition's mean: it sums x itself.
        plain = gamma(n + 4, np.float64) * np.abs(exact).mean((1, 2, 3)) if module is spec_images else 0
        tiny = np.square(gamma(2, dtype) * mu + plain)
        within("the variance", var, sigma2, 14 * g * (sigma2 + tiny), np.float64)
        bound = 5 * g * np.sqrt(sigma2 + tiny) + gamma(2, np.float64) * np.abs(mu) + plain
        within("the mean", mean, mu, bound, np.float64)
    else:
        assert mean is given[0]
    scale = 1 / np.sqrt(var.astype(wide) + EPS)
    steep = per_channel(weight.astype(wide) * scale) * (exact - per_channel(mean.astype(dtype).astype(wide)))
    reference = steep + per_channel(bias.astype(wide)) + (more.astype(wide) if case.add else 0)
    bound = np.abs(steep) + np.abs(per_channel(bias.astype(wide))) + (np.abs(more.astype(wide)) if case.add else 0)
    if case.rectify:
        reference = np.maximum(reference, 0)
    within("the output", inner(out), reference, gamma(6, dtype) * bound, dtype)


def check_backward(module: Any, case: Case) -> None:
    """Gradients from the same statistics and the same output; what was masked is masked to the bit."""
    wide, dtype = wider(case.dtype), case.dtype
    x, dy, weight, bias, more = (*map(case.numbers, ("x", "dy")), *map(case.channels, ("weight", "bias")), case.x)
    mean, scale = case.channels("mean"), np.abs(case.channels("scale")) + dtype(0.1)
    read = [framed(a, margin) for a, margin in zip((dy, x, more), case.around[:3], strict=True)]
    variance = np.square(1 / scale)
    # The same module's forward pass: signs are not to be taken from other roundings.
    out = framed(np.full(case.shape, np.nan, dtype), case.around[3])
    module.batch_norm(
        read[1], weight, bias, 0.0, out, statistics=(mean, variance), add=read[2] if case.add else None,
        rectify=case.rectify,
    )  # fmt: skip
    scale, y = spec_images.scale_of(variance, 0.0, dtype), out.image
    keep = case.add and case.rectify
    dx, added = case.out(), framed(np.full(case.shape, np.nan, dtype), 0) if keep else None
    d_weight, d_bias = module.batch_norm_backward(
        read[0], read[1], out if keep else None, mean, scale, weight, dx, moving=case.moving,
        beta=bias if case.rectify and not case.add else None, added=added,
    )  # fmt: skip
    g = np.where(y <= 0, 0, dy).astype(wide) if case.rectify else dy.astype(wide)
    if added is not None:
        assert np.array_equal(added.whole, g), "the gradient of what was added is wrong"
    axes, n = (1, 2, 3), x[0].size
    xhat = (x.astype(wide) - per_channel(mean.astype(wide))) * per_channel(scale.astype(wide))
    rounding = 1.001 * (gamma(16, dtype) + gamma(n + 4, np.float64))
    sum_g, sum_gx = g.sum(axes), (g * xhat).sum(axes)
    most_g, most_gx = np.abs(g).sum(axes), np.abs(g * xhat).sum(axes)
    within("the gradient of beta", d_bias, sum_g, rounding * most_g, dtype)
    within("the gradient of gamma", d_weight, sum_gx, rounding * most_gx, dtype)
    slope = per_channel(weight.astype(wide) * scale.astype(wide))
    parts, most = g, np.abs(g)
    if case.moving:
        parts = g - per_channel(sum_g / n) - xhat * per_channel(sum_gx / n)
        most = np.abs(g) + per_channel(most_g / n) + np.abs(xhat) * per_channel(most_gx / n)
    within("the gradient of x", inner(dx), slope * parts, rounding * np.abs(slope) * most, dtype)
