"""Mistakes planted in the kernels, one at a time: the checks that the kernels pass must catch each."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from refimpl.kernels import cpu, spec
from refimpl.kernels.cpu import embedding, plan, products
from refimpl.kernels.cpu.rows import dot_row, gather_row
from refimpl.kernels.cpu.runtime import kernel
from refimpl.testing.kernels import (
    CHECKS,
    Case,
    check_embedding,
    check_matmul,
    check_matmul_t,
    check_matmul_t_sddmm,
    check_panels,
    check_sddmm,
    check_softmax,
)


def case(dtype=np.float64, **changes) -> Case:
    """Return a case with several panels, tiles and chunks in both directions."""
    usual = {"rows": 130, "columns": 520, "density": 0.5, "lead": (9,), "batch": 20, "holes": False}
    return Case(**(usual | changes), dtype=dtype)


@pytest.mark.parametrize("lead", [9, 30], ids=["rows where they lie", "rows end to end"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernels_pass_where_the_mistakes_below_are_planted(check, lead):
    check(cpu, case(lead=(lead,)))


def caught(*checks, tier=cpu, **changes) -> None:
    for check in checks:
        with pytest.raises(AssertionError, match=r"as far from the reference|is wrong"):
            check(tier, case(**changes))


def wrap(monkeypatch, owner, name, change) -> None:
    """Replace a function by ``change(original, *arguments)``."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **named: change(original, *arguments, **named))


def test_a_forgotten_tile(monkeypatch):
    def last_left_out(tiles, *arguments):
        cut = tiles(*arguments)
        return replace(cut, starts=cut.starts[:-1], ends=cut.ends[:-1]) if len(cut.starts) > 1 else cut

    wrap(monkeypatch, plan.Lines, "tiles", last_left_out)
    caught(check_matmul, check_matmul_t, check_matmul_t_sddmm)


def test_a_tile_that_starts_one_entry_late(monkeypatch):
    def late(tiles, *arguments):
        cut = tiles(*arguments)
        starts = cut.starts.copy()
        starts[0, 0] += 1
        starts.flags.writeable = False
        return replace(cut, starts=starts)

    wrap(monkeypatch, plan.Lines, "tiles", late)
    caught(check_matmul, check_matmul_t, check_matmul_t_sddmm)


@pytest.mark.parametrize("end", [0, -1])
def test_chunks_that_leave_out_the_first_or_the_last_line(monkeypatch, end):
    def short(chunks, *arguments, **named):
        bounds = chunks(*arguments, **named).copy()
        bounds[end] += 1 if end == 0 else -1
        return bounds

    wrap(monkeypatch, plan.Lines, "chunks", short)
    caught(check_matmul, check_matmul_t, check_matmul_t_sddmm)


def test_a_line_that_is_doubled(monkeypatch):
    def twice(run, function, *arguments, **named):
        run(function, *arguments, **named)
        if function is products.gather:
            arguments[-1][0, 3] *= 2

    wrap(monkeypatch, products, "run", twice)
    caught(check_matmul, check_matmul_t)


@kernel(parallel=False)
def dot_of_the_last_panel(quads, index, starts, ends, apart, bounds, y, x, out):
    for p in range(x.shape[0]):
        for t in range(starts.shape[0]):
            for i in range(y.shape[1]):
                dot_row(
                    quads, x.reshape(-1), p * x.shape[1], y.reshape(-1), p * y.shape[1] + i,
                    index, starts[t, i], ends[t, i], out, False,
                )  # fmt: skip


@kernel(parallel=False)
def gather_of_the_last_tile(quads, values, index, starts, ends, apart, bounds, x, offset, out):
    for p in range(x.shape[0]):
        for t in range(starts.shape[0]):
            for i in range(out.shape[1]):
                gather_row(
                    quads, x.reshape(-1), p * x.shape[1], values, index, starts[t, i], ends[t, i],
                    out.reshape(-1), p * out.shape[1] + i, False, offset[i],
                )  # fmt: skip


def test_add_ignored_for_the_second_panel(monkeypatch):
    monkeypatch.setattr(products, "dot", dot_of_the_last_panel)
    check_sddmm(cpu, case(lead=(1,)))  # right for one panel
    caught(check_sddmm)


def test_add_ignored_for_the_second_tile(monkeypatch):
    monkeypatch.setattr(products, "gather", gather_of_the_last_tile)
    check_matmul(cpu, case(columns=40))  # right for one tile
    caught(check_matmul)


def test_a_forgotten_bias():
    caught(check_matmul, tier=SimpleNamespace(matmul=lambda w, x, bias=None: cpu.matmul(w, x)))
    caught(check_matmul, tier=SimpleNamespace(matmul=lambda w, x, bias=None: spec.matmul(w, x)))


def test_values_in_the_wrong_order(monkeypatch):
    monkeypatch.setattr(products, "in_tiles", lambda values, tiles: values)
    caught(check_matmul_t, check_matmul_t_sddmm)
    check_matmul(cpu, case())  # its rows are read where they lie
    caught(check_matmul, lead=(30,))


def test_gradients_left_in_the_tiles_order(monkeypatch):
    monkeypatch.setattr(products, "from_tiles", lambda values, tiles: values)
    caught(check_matmul_t_sddmm)
    check_sddmm(cpu, case())
    caught(check_sddmm, lead=(30,))


@pytest.mark.parametrize(("function", "place"), [("gather", 2), ("dot", 1), ("gather_dot", 2)])
def test_one_index_that_is_one_off(monkeypatch, function, place):
    def off(run, kernel, *arguments, **named):
        if kernel is getattr(products, function):
            index = arguments[place].copy()
            index[-1] -= 1
            arguments = (*arguments[:place], index, *arguments[place + 1 :])
        run(kernel, *arguments, **named)

    wrap(monkeypatch, products, "run", off)
    checks = {
        "gather": [check_matmul, check_matmul_t],
        "dot": [check_sddmm],
        "gather_dot": [check_matmul_t_sddmm],
    }
    caught(*checks[function])


def test_columns_that_fill_a_panel_are_not_cleared(monkeypatch):
    """What the pool holds there is NaN in these tests; sums over columns must not see it."""

    def dirty(pack, x, fill=0, itemsize=0):
        return pack(x, np.nan if x.dtype.kind == "f" else fill, itemsize)

    wrap(monkeypatch, products, "pack", dirty)
    ragged = {"lead": (7,), "batch": 7}
    caught(check_sddmm, check_matmul_t_sddmm, **ragged)


def test_panels_whose_labels_are_grouped_otherwise():
    def rolled(x, fill=0, itemsize=0):
        return np.roll(cpu.to_panels(x, fill, itemsize), 1 if itemsize else 0, axis=2)

    caught(check_panels, tier=SimpleNamespace(to_panels=rolled, from_panels=cpu.from_panels))


def test_a_column_that_does_not_come_back():
    def lost(panels, shape):
        x = cpu.from_panels(panels, shape).copy()
        x[..., -1] = x[..., 0]
        return x

    caught(check_panels, tier=SimpleNamespace(to_panels=cpu.to_panels, from_panels=lost))


def test_a_token_that_is_skipped(monkeypatch):
    def skip(run, function, tokens, *arguments):
        run(function, tokens[:-1] if function is embedding.scatter else tokens, *arguments)

    wrap(monkeypatch, embedding, "run", skip)
    caught(check_embedding)


def test_a_row_of_an_embedding_that_is_not_cleared(monkeypatch):
    def uncleared(run, function, *arguments):
        run(function, *arguments)
        if function is embedding.lookup:
            arguments[-1][0, 0] = 1

    wrap(monkeypatch, embedding, "run", uncleared)
    caught(check_embedding)


def off_by_one(z, targets, scale):
    return cpu.softmax_cross_entropy(z, np.where(targets > 0, targets - 1, targets), scale)


def no_scale(z, targets, scale):
    return cpu.softmax_cross_entropy(z, targets, 1.0)


def all_columns_count(z, targets, scale):
    return cpu.softmax_cross_entropy(z, np.maximum(targets, 0), scale)


def mean_for_sum(z, targets, scale):
    return cpu.softmax_cross_entropy(z, targets, scale) / targets.size


def the_greatest_logit_not_taken_off(z, targets, scale):
    z[...] = np.exp(z)
    mass = z.sum(axis=1, keepdims=True)
    z *= scale / mass
    return 0.0


@pytest.mark.parametrize(
    "mistake", [off_by_one, no_scale, all_columns_count, mean_for_sum, the_greatest_logit_not_taken_off]
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_mistakes_of_softmax(mistake):
    caught(check_softmax, tier=SimpleNamespace(softmax_cross_entropy=mistake))
