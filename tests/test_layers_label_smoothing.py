"""Cross-entropy with label smoothing: the laws of every layer, torch, its limits, planted mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.layers import label_smoothing
from refimpl.testing.layers import Layer, check_layer

SIZES: dict[str, Any] = {
    "classes": [1, 2, 5], "panels": [(), (1,), (2,)], "columns": [1, 3], "epsilon": [0.0, 0.1, 1.0],
    "skip": [True, False],
}  # fmt: skip


def draw_targets(rng: np.random.Generator, classes: int, shape: tuple[int, ...], skip: bool) -> np.ndarray:
    """Draw labels; with ``skip`` the last does not count, and perhaps others, but the first does."""
    targets = rng.integers(-1 if skip else 0, classes, shape)
    if skip:
        targets.reshape(-1)[-1] = -1
    targets.reshape(-1)[0] = 0
    return targets


def make(
    rng: np.random.Generator, *, classes: int, panels: tuple[int, ...], columns: int, epsilon: float, skip: bool,
    forward: Callable[..., Any] = label_smoothing.forward,
) -> Layer:  # fmt: skip
    targets = draw_targets(rng, classes, (*panels, columns), skip)
    return Layer(
        lambda p, x: forward(x, targets, epsilon=epsilon),
        lambda dy, cache, grads, dx: label_smoothing.backward(cache),
        {},
        (rng.standard_normal((*panels, classes, columns)),),
        optional_dx=False,
    )


def test_label_smoothing() -> None:
    check_layer(make, SIZES, max_examples=40)


def check_against_torch(
    seed: int, classes: int, columns: int, epsilon: float, size: float, skip: bool,
    forward: Callable[..., Any] = label_smoothing.forward,
) -> None:  # fmt: skip
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    scores, targets = size * rng.standard_normal((classes, columns)), draw_targets(rng, classes, (columns,), skip)
    kept = scores.copy()
    loss, cache = forward(scores, targets, epsilon=epsilon)
    np.testing.assert_array_equal(scores, kept)
    leaf = torch.tensor(scores.T.copy(), requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(leaf, torch.tensor(targets), label_smoothing=epsilon, ignore_index=-1)
    theirs.backward()
    # Sums of `classes` logarithms of numbers that are right to a few units, relative to the largest score.
    bound = 8 * classes * np.finfo(float).eps * max(1.0, float(np.abs(scores).max()))
    assert abs(loss - theirs.item()) <= bound
    np.testing.assert_allclose(label_smoothing.backward(cache), leaf.grad.numpy().T, rtol=0, atol=bound)


@given(
    seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 9), columns=st.integers(1, 6), epsilon=st.floats(0, 1),
    size=st.sampled_from([1.0, 30.0, 1e4]), skip=st.booleans(),
)  # fmt: skip
def test_label_smoothing_of_torch(seed: int, **sizes: Any) -> None:
    check_against_torch(seed, **sizes)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_without_smoothing_it_is_the_cross_entropy(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = rng.standard_normal((2, classes, 3)), draw_targets(rng, classes, (2, 3), True)
    loss, gradient = label_smoothing.forward(scores, targets)
    number = int((targets >= 0).sum())
    in_place = scores.copy()
    with kernels.use("spec"):
        total = kernels.softmax_cross_entropy(in_place, targets, 1 / number)
    bound = 16 * classes * np.finfo(float).eps * max(1.0, float(np.abs(scores).max()))
    assert abs(loss - total / number) <= bound
    np.testing.assert_allclose(gradient, in_place, rtol=0, atol=bound)


def test_panels_are_columns_side_by_side() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.standard_normal((2, 4, 3)), draw_targets(rng, 4, (2, 3), True)
    loss, gradient = label_smoothing.forward(scores, targets, epsilon=0.2)
    flat, joined = label_smoothing.forward(np.concatenate(list(scores), 1), targets.reshape(-1), epsilon=0.2)
    assert abs(loss - flat) <= 16 * np.finfo(float).eps * loss
    np.testing.assert_array_equal(np.concatenate(list(gradient), 1), joined)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_the_least_loss_is_the_entropy_of_the_target(seed: int, epsilon: float) -> None:
    """At scores log q the gradient is 0 and the loss -sum q log q, the least of all."""
    rng = np.random.default_rng(seed)
    classes, label = 5, int(rng.integers(5))
    q = np.full(classes, epsilon / classes)
    q[label] += 1 - epsilon
    best, gradient = label_smoothing.forward(np.log(q)[:, None], np.array([label]), epsilon=epsilon)
    eps = 64 * np.finfo(float).eps
    assert abs(best + q @ np.log(q)) <= eps * 8
    assert np.abs(gradient).max() <= eps
    other, _ = label_smoothing.forward(rng.standard_normal((classes, 1)), np.array([label]), epsilon=epsilon)
    assert other >= best - eps * 8


def test_at_one_the_labels_do_not_count() -> None:
    scores = np.random.default_rng(0).standard_normal((4, 3))
    one, first = label_smoothing.forward(scores, np.array([0, 1, 2]), epsilon=1.0)
    two, second = label_smoothing.forward(scores, np.array([3, 3, 0]), epsilon=1.0)
    assert one == two
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_scores_do_not_overflow(dtype: Any) -> None:
    scores: np.ndarray = np.array([[3e4, -3e4], [-3e4, -3e4], [0, -2e4]], dtype)
    with np.errstate(over="raise", invalid="raise"):
        loss, gradient = label_smoothing.forward(scores, np.array([0, 2]), epsilon=0.0)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(
    ("scores", "targets", "epsilon", "match"),
    [
        ((3, 2), [0, 1], 1.5, "label smoothing is 1.5; give a number from 0 to 1"),
        ((3, 2), [0, 1], -0.1, "label smoothing is -0.1"),
        ((3, 2), [0, 1], float("nan"), "label smoothing is nan"),
        ((3, 2), [0, 1, 2], 0.1, r"scores have shape \(3, 2\) and the targets \(3,\)"),
        ((3,), [0, 1, 2], 0.1, r"scores have shape \(3,\)"),
        ((3, 2), [0, 3], 0.1, "the targets are int64 from 0 to 3; they must be integers from -1 to 2"),
        ((3, 2), [0.0, 1.0], 0.1, "the targets are float64"),
        ((3, 2), [-1, -1], 0.1, "all targets are -1"),
    ],
)
def test_what_does_not_fit(scores: Any, targets: Any, epsilon: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        label_smoothing.forward(np.ones(scores), np.array(targets), epsilon=epsilon)


# --- planted mistakes -----------------------------------------------------------------------------------------


def among_the_other_classes(scores: np.ndarray, targets: np.ndarray, *, epsilon: float) -> Any:
    """Spread epsilon over the K - 1 wrong classes: another definition, with right derivatives."""
    classes = scores.shape[-2]
    return label_smoothing.forward(scores, targets, epsilon=min(1.0, epsilon * classes / (classes - 1)))


def mean_over_all_columns(scores: np.ndarray, targets: np.ndarray, *, epsilon: float) -> Any:
    loss, cache = label_smoothing.forward(scores, targets, epsilon=epsilon)
    share = float((targets >= 0).mean())
    return loss * share, cache * share


def gradient_of_plain_cross_entropy(scores: np.ndarray, targets: np.ndarray, *, epsilon: float) -> Any:
    loss, _ = label_smoothing.forward(scores, targets, epsilon=epsilon)
    return loss, label_smoothing.forward(scores, targets)[1]


def gradient_of_the_sum(scores: np.ndarray, targets: np.ndarray, *, epsilon: float) -> Any:
    loss, cache = label_smoothing.forward(scores, targets, epsilon=epsilon)
    return loss, cache * (targets >= 0).sum()


def test_the_layer_itself_agrees_with_torch() -> None:
    check_against_torch(0, 4, 6, 0.1, 1.0, True)


@pytest.mark.parametrize(
    "mistake",
    [among_the_other_classes, mean_over_all_columns, gradient_of_plain_cross_entropy, gradient_of_the_sum],
)
def test_mistakes_that_torch_shows(mistake: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_against_torch(0, 4, 6, 0.1, 1.0, True, forward=mistake)


@pytest.mark.parametrize("mistake", [gradient_of_plain_cross_entropy, gradient_of_the_sum])
def test_mistakes_in_the_gradient(mistake: Callable[..., Any]) -> None:
    def mistaken(rng: np.random.Generator, **sizes: Any) -> Layer:
        return make(rng, forward=mistake, **sizes)

    sizes = {**SIZES, "classes": [5], "columns": [3], "epsilon": [0.1]}
    with pytest.raises(AssertionError, match=r"gradient of input 0 is .* along a random direction"):
        check_layer(mistaken, sizes, max_examples=5, shrink=False)
