"""Mistakes planted in the kernels on images: the checks that the kernels pass must catch each."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from image_cases import Case, check_backward, check_forward

from refimpl.kernels.cpu import batch_norm as norm_kernels
from refimpl.layers.padded import Padded

CASE = Case((3, 7, 7, 20), np.float64, 1, (1, 1, 1, 1))


def test_the_kernels_pass_where_the_mistakes_below_are_planted() -> None:
    for rectify in (False, True):
        case = Case((3, 7, 7, 20), np.float64, 1, (1, 1, 1, 1), add=rectify, rectify=rectify)
        check_forward(norm_kernels, case)
        check_backward(norm_kernels, case)


def mistaken(**changes: Callable[..., Any]) -> Any:
    """Return the kernels with some functions replaced by ``change(original, *arguments)``."""

    class Kernels:
        batch_norm = staticmethod(norm_kernels.batch_norm)
        batch_norm_backward = staticmethod(norm_kernels.batch_norm_backward)

    for name, change in changes.items():
        original = getattr(norm_kernels, name)
        setattr(Kernels, name, staticmethod(lambda *a, f=original, c=change, **named: c(f, *a, **named)))
    return Kernels


def one_channel_late(f: Any, x: Padded, *rest: Any, **options: Any) -> Any:
    return f(Padded(np.roll(x.whole, 1, axis=0), x.margin), *rest, **options)


def bessel(f: Any, x: Padded, *rest: Any, **options: Any) -> Any:
    mean, var = f(x, *rest, **options)
    n = x.image[0].size
    return mean, var * n / (n - 1)


def a_row_forgotten(f: Any, x: Padded, weight: Any, bias: Any, eps: float, out: Padded, **options: Any) -> Any:
    got = f(x, weight, bias, eps, out, **options)
    out.image[:, -1] = 0
    return got


def margin_written(f: Any, x: Padded, weight: Any, bias: Any, eps: float, out: Padded, **options: Any) -> Any:
    got = f(x, weight, bias, eps, out, **options)
    out.whole[0, 3, 0, 5] = 1e-9
    return got


def in_float32(f: Any, x: Padded, *rest: Any, **options: Any) -> Any:
    mean, var = f(x, *rest, **options)
    return mean.astype(np.float32).astype(float), var


@pytest.mark.parametrize("mistake", [one_channel_late, bessel, a_row_forgotten, margin_written, in_float32])
def test_mistakes_in_forward(mistake: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"as far from the reference|is wrong"):
        check_forward(mistaken(batch_norm=mistake), CASE)


def mean_as_if_constant(f: Any, *arguments: Any, **options: Any) -> Any:
    return f(*arguments, **{**options, "moving": False})


def sums_of_what_was_not_masked(f: Any, dy: Padded, x: Padded, y: Any, *rest: Any, **options: Any) -> Any:
    f(dy, x, y, *rest, **options)
    return f(dy, x, None, *rest[:3], None, moving=True)


def slightly_off(f: Any, dy: Padded, x: Padded, *rest: Any, **options: Any) -> Any:
    return f(dy, Padded(x.whole * (1 + 1e-11), x.margin), *rest, **options)


@pytest.mark.parametrize("mistake", [mean_as_if_constant, sums_of_what_was_not_masked, slightly_off])
def test_mistakes_in_backward(mistake: Callable[..., Any]) -> None:
    case = Case((3, 7, 7, 20), np.float64, 1, (1, 1, 1, 1), add=True, rectify=True)
    with pytest.raises(AssertionError, match=r"as far from the reference|is wrong"):
        check_backward(mistaken(batch_norm_backward=mistake), case)


@pytest.mark.parametrize("late", [1, -1])
def test_images_that_begin_at_another_sample(late: int) -> None:
    """The address of the first pixel, off by one number: everything is read and written beside its place."""

    def elsewhere(f: Any, x: Padded, *rest: Any, **options: Any) -> Any:
        return f(Padded(np.roll(x.whole.reshape(len(x.whole), -1), late, axis=1).reshape(x.whole.shape), x.margin),
                 *rest, **options)  # fmt: skip

    with pytest.raises(AssertionError, match=r"as far from the reference|is wrong"):
        check_forward(mistaken(batch_norm=elsewhere), CASE)
