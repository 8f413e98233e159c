"""First test the tests: mistakes in a convolution must be caught, by the laws or by the loops."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conv_cases import check_by_loops, make_conv

from refimpl import kernels
from refimpl.kernels.types import Inset
from refimpl.layers import conv2d, depthwise, windows
from refimpl.layers.windows import Windows
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Support


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Use one thread, and leave the size of the blocks as it was."""
    count, entries, small = kernels.threads.get(), windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES
    kernels.threads.set_count(1)
    with kernels.use("spec"):
        yield
    kernels.threads.set_count(count)
    windows.BLOCK_ENTRIES, conv2d.SMALL_ENTRIES = entries, small


PLAIN: dict[str, Any] = {
    "groups": 2, "channels": (2, 2), "kernel": (2, 3), "stride": 2, "padding": ((0, 1), (1, 2)), "extra": (3, 4),
    "batch": 2, "bias": True, "block": 60, "small": 0,
}  # fmt: skip
DEPTHWISE = {**PLAIN, "channels": (2, 1)}
OVERLAPPING = {**PLAIN, "stride": 1}


def group_one_everywhere(shape: Any, groups: int) -> list[conv2d.Group]:
    return [g._replace(inputs=slice(0, shape[1])) for g in inner_groups(shape, groups)]


def flipped(self: Windows) -> list[tuple[int, int]]:
    return [(i, j) for i in reversed(range(self.kernel[0])) for j in reversed(range(self.kernel[1]))]


def transposed(self: Windows) -> list[tuple[int, int]]:
    return [(i, j) for j in range(self.kernel[1]) for i in range(self.kernel[0])]


def padding_off_by_one(self: Windows, padded: np.ndarray) -> np.ndarray:
    (top, bottom), (left, right) = self.padding
    return padded[:, bottom : padded.shape[1] - top, right : padded.shape[2] - left]


def first_positions_again(self: Windows, padded: Any, i: int, j: int, rows: slice, across: slice) -> np.ndarray:
    return inner_tap(self, padded, i, j, rows, slice(0, across.stop - across.start))


def assigned(self: Windows, columns: np.ndarray, padded: np.ndarray, rows: slice, across: slice) -> None:
    shape = self.tap(padded, 0, 0, rows, across).shape
    by_tap = columns.reshape(shape[0], len(self.taps), *shape[1:])
    for k, (i, j) in enumerate(self.taps):
        self.tap(padded, i, j, rows, across)[...] = by_tap[:, k]


def entries_of_the_first_group(support: Support, group: conv2d.Group) -> slice:
    own = inner_entries(support, group)
    return slice(0, own.stop - own.start)


def first_block_only(*arguments: Any) -> Any:
    return iter(list(inner_blocks(*arguments))[:1])


def modulo(*arguments: Any) -> Iterator[depthwise.Pass]:
    for part in inner_passes(*arguments):
        if isinstance(part.outputs, slice):
            yield part
        else:
            yield part._replace(inputs=part.outputs % arguments[1])


def without_a_tap(*arguments: Any) -> Iterator[depthwise.Pass]:
    return (part for part in inner_passes(*arguments) if (part.j, part.i) != (1, 1))


inner_groups, inner_entries, inner_blocks = conv2d._groups, conv2d._entries, conv2d._blocks
inner_tap, inner_passes = Windows.tap, depthwise._passes


def attempts(sizes: dict[str, Any]) -> list[Callable[[], None]]:
    """Return the checks that a mistake has to pass unnoticed: the laws, and the loops."""
    return [
        lambda: check_layer(make_conv, {k: [v] for k, v in sizes.items()}, max_examples=4, shrink=False),
        lambda: check_by_loops(0, **sizes),
    ]


@pytest.mark.parametrize("sizes", [PLAIN, DEPTHWISE, OVERLAPPING])
def test_the_layer_itself_passes(sizes: dict[str, Any]) -> None:
    for attempt in attempts(sizes):
        attempt()


# A mistake that forward and backward share is another layer with right derivatives: only the loops can tell.
@pytest.mark.parametrize(
    ("where", "name", "mistake", "sizes", "by_laws"),
    [
        (conv2d, "_groups", group_one_everywhere, PLAIN, False),
        (Windows, "taps", property(flipped), PLAIN, False),
        (Windows, "taps", property(transposed), PLAIN, False),
        (Windows, "taps", property(flipped), DEPTHWISE, False),
        (Windows, "crop", padding_off_by_one, PLAIN, False),
        (Windows, "tap", first_positions_again, PLAIN, False),
        (Windows, "add_columns", assigned, OVERLAPPING, True),
        (conv2d, "_entries", entries_of_the_first_group, PLAIN, True),
        (depthwise, "_passes", modulo, DEPTHWISE, True),
        (depthwise, "_passes", without_a_tap, DEPTHWISE, False),
    ],
)
def test_planted_mistakes(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, mistake: Any, sizes: dict[str, Any], by_laws: bool
) -> None:
    monkeypatch.setattr(where, name, mistake)
    laws, loops = attempts(sizes)
    with pytest.raises((AssertionError, ValueError)):  # a check of the supports may come first
        loops()
    if by_laws:
        with pytest.raises((AssertionError, ValueError)):
            laws()


def dy_not_summed_over_positions(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = conv2d.backward(dy, cache, grads, **options)
    grads["b"] = dy[:, 0, 0].sum(axis=1)
    return dx


def other_padding_in_backward(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    moved = Inset(np.pad(cache.x.whole, ((0, 0), (1, 1), (1, 1), (0, 0))), cache.x.at)
    return conv2d.backward(dy, cache._replace(x=moved), grads, **options)


def gradient_of_the_first_block(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv2d, "_blocks", first_block_only)
        return conv2d.backward(dy, cache, grads, **options)


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (dy_not_summed_over_positions, "gradient of b is .* along a random direction"),
        (other_padding_in_backward, "gradient of w is .* along a random direction"),
        (gradient_of_the_first_block, "gradient of input 0 is .* along a random direction"),
    ],
)
def test_mistakes_in_backward(mistake: Callable[..., Any], match: str) -> None:
    def make(rng: np.random.Generator, **sizes: Any) -> Layer:
        layer = make_conv(rng, **sizes)
        return Layer(
            layer.forward,
            lambda dy, cache, grads, dx: mistake(dy, cache, grads, input_gradient=dx),
            layer.params,
            layer.inputs,
            sparse=("w",),
            complex_step=True,
        )

    with pytest.raises(AssertionError, match=match):
        check_layer(make, {k: [v] for k, v in PLAIN.items()}, max_examples=4, shrink=False)
