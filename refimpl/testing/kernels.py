r"""The contract of a kernel tier: each product against a wider reference, with the rounding bound
:math:`\gamma_n |A| |B|`.

A tier is any object with the functions of :mod:`refimpl.kernels.spec`. Each check takes it and a `Case`, and
raises AssertionError where a result is further from the reference than rounding can carry it. Nothing here
calls a kernel for its reference: those are dense products in a wider type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.kernels import memory
from refimpl.rng import generator
from refimpl.testing.bounds import error_ratio, gamma, product_bound, unit_roundoff, wider
from refimpl.weights import SparseWeight, Support

FUNCTION = 8.0
"""Assumed relative error of exp, log and tanh in units of roundoff: four units in the last place."""

# (leading axes, columns): few fill a vector, and they need but five panel widths of each type,
# because a compiled tier compiles each of its kernels for each width.
GROUPS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((), 1),
    ((), 3),
    ((5,), 1),
    ((), 7),
    ((2,), 17),
    ((5,), 7),
    ((), 33),
    ((5,), 20),
    ((3,), 33),
    ((), 130),
    ((3, 1), 130),
)
ARRANGEMENTS = ("plain", "transposed", "sliced", "aligned")


@dataclass(frozen=True)
class Case:
    """A sparse weight and operands of its products, all drawn from a seed."""

    rows: int
    columns: int
    density: float
    lead: tuple[int, ...]
    batch: int
    dtype: Any = np.float64
    arrangement: str = "plain"
    seed: int = 0
    holes: bool = field(default=True)  # a row and a column of the weight are empty

    @cached_property
    def w(self) -> SparseWeight:
        """The weight; one of ten stored values is 0."""
        rng = generator(self.seed, "weight")
        mask = rng.random((self.rows, self.columns)) < self.density
        if self.holes:
            mask[rng.integers(self.rows)] = False
            mask[:, rng.integers(self.columns)] = False
        support = Support.from_mask(mask)
        stored = rng.random(support.nnz) < 0.9
        return SparseWeight(support, self.numbers("values", support.nnz) * stored.astype(self.dtype))

    @cached_property
    def x(self) -> np.ndarray:
        """Input, shape (..., C, N)."""
        return arrange(self.numbers("x", *self.lead, self.columns, self.batch), self.arrangement)

    @cached_property
    def dy(self) -> np.ndarray:
        """Gradient of the output, shape (..., R, N)."""
        return arrange(self.numbers("dy", *self.lead, self.rows, self.batch), self.arrangement)

    @property
    def bias(self) -> np.ndarray:
        """One number for each row."""
        return self.numbers("bias", self.rows)

    @property
    def dense(self) -> np.ndarray:
        """The weight with its zeros, in the wider type."""
        return self.w.dense().astype(wider(self.dtype))

    def numbers(self, stream: str, *shape: int) -> np.ndarray:
        """Return normal numbers of magnitudes from 1e-2 to 1e2."""
        rng = generator(self.seed, stream)
        return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)).astype(self.dtype)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[Any, ...] = (np.float32, np.float64)) -> Case:
    """Draw a case: empty to full supports, single rows and columns, every grouping and arrangement."""
    sizes = st.sampled_from([1, 2, 5, 17, 40])
    lead, batch = draw(st.sampled_from(GROUPS))
    return Case(
        rows=draw(sizes),
        columns=draw(sizes),
        density=draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])),
        lead=lead,
        batch=batch,
        dtype=draw(st.sampled_from(dtypes)),
        arrangement=draw(st.sampled_from(ARRANGEMENTS)),
        seed=draw(st.integers(0, 2**32)),
        holes=draw(st.booleans()),
    )


def arrange(x: np.ndarray, arrangement: str) -> np.ndarray:
    """Return the same numbers as another view of memory."""
    match arrangement:
        case "transposed":
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)
        case "sliced":
            around = np.full((*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1] + 2), np.nan, x.dtype)
            around[..., 1::2, 1:-1] = x
            return around[..., 1::2, 1:-1]
        case "aligned":
            out = memory.empty(x.shape, x.dtype)
            out[...] = x
            return out
    return x


def poison_pool() -> None:
    """Fill all waiting buffers with NaN: an entry that a kernel forgets must not hold an earlier result."""
    for blocks in memory._free.values():
        for block in blocks:
            block[...] = 0xFF


def flat_columns(x: np.ndarray) -> np.ndarray:
    """Return (..., F, N) as one matrix (F, all columns) in the wider type."""
    return np.moveaxis(x, -2, 0).reshape(x.shape[-2], -1).astype(wider(x.dtype))


def _within(name: str, got: np.ndarray, reference: np.ndarray, bound: np.ndarray, dtype: Any) -> None:
    assert got.dtype == dtype, f"{name} is {got.dtype}, of operands of type {np.dtype(dtype)}"
    ratio = error_ratio(got, reference, bound)
    assert ratio <= 1, f"{name} is {ratio:.3g} times as far from the reference as rounding can carry it"


def check_matmul(tier: Any, case: Case) -> None:
    """``W X`` and ``W X + b``; an empty row must give exactly 0, or the bias."""
    w, x, wide = case.dense, case.x.astype(wider(case.dtype)), wider(case.dtype)
    counts = case.w.support.row_counts[:, None]
    poison_pool()
    got = tier.matmul(case.w, case.x)
    _within("W X", got, w @ x, product_bound(w, x, counts, case.dtype), case.dtype)
    w = np.concatenate([w, case.bias[:, None].astype(wide)], axis=1)
    x = np.concatenate([x, np.ones((*x.shape[:-2], 1, x.shape[-1]), wide)], axis=-2)
    bound = product_bound(w, x, np.where(counts > 0, counts + 1, 0), case.dtype)
    poison_pool()
    _within("W X + b", tier.matmul(case.w, case.x, case.bias), w @ x, bound, case.dtype)


def check_matmul_t(tier: Any, case: Case) -> None:
    """``W^T dY``; an empty column must give exactly 0."""
    w_t, dy = case.dense.T, case.dy.astype(wider(case.dtype))
    counts = case.w.support.mask().sum(axis=0)[:, None]
    poison_pool()
    _within(
        "W^T dY",
        tier.matmul_t(case.w, case.dy),
        w_t @ dy,
        product_bound(w_t, dy, counts, case.dtype),
        case.dtype,
    )


def check_sddmm(tier: Any, case: Case) -> None:
    """``dY X^T`` on the support."""
    dy, x_t, flat = flat_columns(case.dy), flat_columns(case.x).T, case.w.support.flat
    reference = (dy @ x_t).reshape(-1)[flat]
    bound = product_bound(dy, x_t, dtype=case.dtype).reshape(-1)[flat]
    _within("dY X^T", tier.sddmm(case.w.support, case.dy, case.x), reference, bound, case.dtype)


def check_matmul_t_sddmm(tier: Any, case: Case) -> None:
    """Both backward products at once."""
    poison_pool()
    dx, dw = tier.matmul_t_sddmm(case.w, case.dy, case.x)
    both = SimpleNamespace(matmul_t=lambda *_: dx, sddmm=lambda *_: dw)
    check_matmul_t(both, case)
    check_sddmm(both, case)


def check_sum_rows(tier: Any, case: Case) -> None:
    """The sum of each feature over all columns."""
    dy = flat_columns(case.dy)
    ones = np.ones((dy.shape[1], 1), dy.dtype)
    poison_pool()
    bound = product_bound(dy, ones, dtype=case.dtype)[:, 0]
    _within("dY 1", tier.sum_rows(case.dy), (dy @ ones)[:, 0], bound, case.dtype)


def check_embedding(tier: Any, case: Case) -> None:
    """Lookup, which is exact, and its gradient, whose terms are the occurrences of a token."""
    shape = case.lead[0] if case.lead else 1, case.batch
    tokens = generator(case.seed, "tokens").integers(0, case.rows, shape)
    poison_pool()
    got = tier.embed(case.w, tokens)
    looked_up = case.w.dense()[tokens].transpose(0, 2, 1)
    assert got.dtype == case.dtype, f"the type {got.dtype} of the embedding's lookup is wrong"
    assert np.array_equal(got, looked_up), "the embedding's lookup is wrong"
    dx = arrange(case.numbers("dx", shape[0], case.columns, shape[1]), case.arrangement)
    one_hot = (tokens.reshape(-1) == np.arange(case.rows)[:, None]).astype(wider(case.dtype))
    columns, flat = flat_columns(dx).T, case.w.support.flat
    terms = one_hot.sum(axis=1).astype(int)[:, None]
    bound = product_bound(one_hot, columns, terms, case.dtype).reshape(-1)[flat]
    reference = (one_hot @ columns).reshape(-1)[flat]
    _within(
        "the embedding's gradient",
        tier.embed_gradient(case.w.support, tokens, dx),
        reference,
        bound,
        case.dtype,
    )


def check_panels(tier: Any, case: Case) -> None:
    """Every column is in the panels once, beside its label; the rest is fill; the way back is exact."""
    poison_pool()
    panels = tier.to_panels(case.x)
    assert panels.ndim == 3, f"the number of axes of the panels {panels.shape} is wrong"
    assert panels.dtype == case.dtype, f"the panels' type {panels.dtype} is wrong"
    assert np.array_equal(tier.from_panels(panels, case.x.shape), case.x), "the way back from panels is wrong"
    labels = np.arange(case.x.size // case.columns).reshape(*case.lead, 1, case.batch)
    places = tier.to_panels(labels, -1, case.x.itemsize)[:, 0]
    assert places.shape == (panels.shape[0], panels.shape[2]), (
        f"the shape {places.shape} of the labels' panels is wrong"
    )
    assert np.array_equal(np.sort(places[places >= 0]), labels.reshape(-1)), "the set of labels in the panels is wrong"
    columns = np.moveaxis(panels, 1, 0)
    expected = flat_columns(case.x).astype(case.dtype)[:, places[places >= 0]]
    assert np.array_equal(columns[:, places >= 0], expected), "the place of a column or its label is wrong"
    assert not columns[:, places < 0].any(), "what fills the panels is wrong"


def check_softmax(tier: Any, case: Case) -> None:
    r"""Loss and gradient of softmax cross-entropy, in the tier's panels.

    With :math:`d = z - \max z` (relative error u) and the exponential's error, :math:`e^d` is known to
    :math:`(|d| + F) u`, or to the smallest normal number where it underflows; the mass to the sum of those
    and :math:`\gamma_V`; and the loss and the gradient to what follows from them.
    """
    u, wide = unit_roundoff(case.dtype), wider(case.dtype)
    z = arrange(case.numbers("logits", *case.lead, case.rows, case.batch), case.arrangement)
    z = z.reshape(-1, *z.shape[-2:])
    targets = generator(case.seed, "targets").integers(-1, case.rows, (z.shape[0], case.batch))
    counts, scale = targets >= 0, 0.375
    exact = z.astype(wide)
    poison_pool()
    loss = tier.softmax_cross_entropy(z, targets, scale)

    d = exact - exact.max(axis=1, keepdims=True)
    e = np.exp(d)
    e_error = e * (np.abs(d) + FUNCTION) * u + 2 * float(np.finfo(case.dtype).tiny)
    mass = e.sum(axis=1, keepdims=True)
    mass_error = (e_error.sum(axis=1, keepdims=True) + gamma(case.rows, case.dtype) * mass) / mass  # relative
    p = e / mass
    p_error = e_error / mass + p * (mass_error + 3 * u)
    chosen = (targets[:, None, :] == np.arange(case.rows)[:, None]).astype(wide)
    second_order = 1.001
    bound = second_order * scale * (p_error + 2 * u * chosen) * counts[:, None, :]
    _within("the gradient", z, scale * (p - chosen) * counts[:, None, :], bound, case.dtype)

    d_chosen = (d * chosen).sum(axis=1)
    terms = np.log(mass[:, 0]) - d_chosen
    error = mass_error[:, 0] + np.abs(d_chosen) * u + FUNCTION * unit_roundoff(np.float64) * np.log(mass[:, 0])
    summation = 2 * gamma(counts.sum() + 1, np.float64) * (np.log(mass[:, 0]) + np.abs(d_chosen))
    reference, allowed = terms[counts].sum(), second_order * (error + summation)[counts].sum()
    _within("the loss", np.array([loss]), np.array([reference]), np.array([allowed]), np.float64)


CHECKS = (
    check_matmul,
    check_matmul_t,
    check_sddmm,
    check_matmul_t_sddmm,
    check_sum_rows,
    check_embedding,
    check_panels,
    check_softmax,
)
