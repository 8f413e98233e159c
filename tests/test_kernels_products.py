"""Every product of every tier against a wider reference, with the rounding bound."""

import numpy as np
import pytest
from hypothesis import given, settings

from refimpl import kernels
from refimpl.kernels import cpu, spec
from refimpl.testing.bounds import error_ratio, product_bound, wider
from refimpl.testing.kernels import CHECKS, Case, cases, flat_columns
from refimpl.weights import SparseWeight, Support

TIERS = pytest.mark.parametrize("tier", [spec, cpu], ids=["spec", "cpu"])
EACH = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
LINEAR = CHECKS[:5]
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@TIERS
@EACH
@settings(max_examples=25)
@given(case=cases())
def test_products(tier, check, case):
    check(tier, case)


@TIERS
@DTYPES
@pytest.mark.parametrize("shape", [(24, 700), (700, 24)])
def test_products_over_several_tiles_and_panels(tier, dtype, shape):
    """A panel too large for the level-1 cache, and enough entries in a line to cut it into tiles."""
    case = Case(*shape, density=0.3, lead=(9,), batch=20, dtype=dtype)
    for check in LINEAR:
        check(tier, case)
    if tier is cpu:
        derived = cpu.products.plan(case.w.support)
        wide = derived.rows if shape[1] > shape[0] else derived.columns
        assert max(len(cut.starts) for cut in wide._tiles.values()) > 3


@TIERS
@pytest.mark.parametrize(("rows", "columns"), [(24, 700), (700, 24), (320, 320)])
def test_products_of_one_panel_of_short_rows(tier, rows, columns):
    """Rows are cut into tiles where they lie, and columns read their values from all over the pattern."""
    case = Case(rows, columns, density=0.4, lead=(), batch=32, dtype=np.float32)
    for check in LINEAR:
        check(tier, case)
    if tier is cpu:
        derived = cpu.products.plan(case.w.support)
        in_rows, in_columns = (
            max(len(cut.starts) for cut in lines._tiles.values()) for lines in (derived.rows, derived.columns)
        )
        assert in_rows == (2 if columns == 700 else 1)
        assert (in_columns > 1) == (rows > 24)


@TIERS
@pytest.mark.parametrize("columns", [65535, 65536, 65537, 70001])
def test_many_columns(tier, columns):
    """Around the place where indices change from 16 to 32 bits; 65536 columns still have 16."""
    case = Case(3, columns, density=1e-3, lead=(), batch=3)
    last = Support((3, columns), np.union1d(case.w.support.flat, [0, columns - 1, 2 * columns - 1, 3 * columns - 1]))
    assert last.indices.dtype == (np.uint16 if columns <= 65536 else np.uint32)
    w = SparseWeight(last, case.numbers("more", last.nnz))
    dense, x, dy = w.dense(), case.x, case.dy
    for got, a, b in (
        (tier.matmul(w, x), dense, x),
        (tier.matmul_t(w, dy), dense.T, dy),
        (tier.matmul_t_sddmm(w, dy, x)[0], dense.T, dy),
    ):
        wide = wider(np.float64)
        assert error_ratio(got, a.astype(wide) @ b.astype(wide), product_bound(a, b)) <= 1
    for dw in (tier.sddmm(last, dy, x), tier.matmul_t_sddmm(w, dy, x)[1]):
        reference = (flat_columns(dy) @ flat_columns(x).T).reshape(-1)[last.flat]
        bound = product_bound(dy, x.T).reshape(-1)[last.flat]
        assert error_ratio(dw, reference, bound) <= 1
    tokens = np.array([[0, 2, 1]])
    assert np.array_equal(tier.embed(w, tokens), dense[tokens].transpose(0, 2, 1))


def test_many_rows():
    """The transposed twin's indices go to 32 bits on their own."""
    case = Case(65537, 3, density=1e-3, lead=(), batch=3)
    for check in (*LINEAR,):
        check(cpu, case)


@DTYPES
def test_a_panel_of_the_kernels_layout_is_not_copied_and_comes_out_right(dtype):
    width = 80 if dtype == np.float32 else 64
    case = Case(40, 17, 0.3, lead=(3,), batch=width, dtype=dtype, arrangement="aligned")
    assert cpu.to_panels(case.x) is case.x
    assert cpu.from_panels(case.x, case.x.shape) is case.x
    for check in CHECKS:
        check(cpu, case)


@TIERS
@DTYPES
def test_a_full_support_is_a_dense_product(tier, dtype):
    case = Case(17, 40, 1.0, lead=(5,), batch=20, dtype=dtype, holes=False)
    assert case.w.nnz == 17 * 40
    for check in LINEAR:
        check(tier, case)
    # the dense product's own error is within the same bound, so the two differ by no more than both
    w, wide = case.w.dense(), wider(dtype)
    reference = w.astype(wide) @ case.x.astype(wide)
    assert error_ratio(kernels.matmul(w, case.x), reference, product_bound(w, case.x)) <= 1


@TIERS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(tier, bad):
    """One bad value reaches every entry that it belongs to, and no other."""
    case = Case(17, 40, 0.7, lead=(5,), batch=7, holes=False)
    w, x, dy = case.w, case.x.copy(), case.dy.copy()
    x[2, 11, 3] = dy[1, 4, 5] = bad
    mask = w.support.mask()
    y = tier.matmul(w, x)
    expected = np.zeros(y.shape, bool)
    expected[2, :, 3] = mask[:, 11]
    assert np.array_equal(~np.isfinite(y), expected)
    dx, dw = tier.matmul_t_sddmm(w, dy, x)
    expected = np.zeros(dx.shape, bool)
    expected[1, :, 5] = mask[4]
    assert np.array_equal(~np.isfinite(dx), expected)
    row, column = np.divmod(w.support.flat, 40)
    assert np.array_equal(~np.isfinite(dw), (row == 4) | (column == 11))
    assert np.array_equal(~np.isfinite(tier.sum_rows(dy)), np.arange(17) == 4)


@TIERS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_shows_in_the_loss(tier, bad):
    z = Case(17, 1, 0.0, (3,), 20).numbers("z", 3, 17, 20)
    z[1, 5, 6] = bad
    targets = np.zeros((3, 20), np.int64)
    with np.errstate(invalid="ignore"):
        assert np.isnan(tier.softmax_cross_entropy(z, targets, 1.0))
    assert np.isnan(z[1, :, 6]).all()
    z[1, :, 6] = 0
    assert np.isfinite(z).all()


@TIERS
def test_softmax_of_extreme_logits(tier):
    """Logits that overflow an exponential, and one of minus infinity, which has no probability."""
    big = np.float64(1e300)
    z = np.array([[[big, 0.0, -np.inf, 800.0], [0.0, big, 0.0, 0.0], [-big, 0.0, 0.0, -800.0]]])
    targets = np.array([[0, 1, 1, 0]])
    loss = tier.softmax_cross_entropy(z, targets, 1.0)
    half = np.array([[0, 0, 0], [0, 0, 0], [0, -0.5, 0.5], [0, 0, 0]]).T
    assert np.abs(z[0] - half).max() < 1e-300  # exponentials below the smallest normal number may be kept at it
    assert abs(loss - np.log(2)) <= 4 * np.finfo(float).eps
