"""Training a classifier: order, steps, evaluation and resuming, on images that take milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import last_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.datasets import Images, Part
from refimpl.rng import generator
from refimpl.testing.training import dense, tiny_corpus
from refimpl.training import flops
from refimpl.training.classification import ClassificationTask
from refimpl.training.config import Config, load_recipe, override
from refimpl.training.corpora import facts_of, open_corpus
from refimpl.training.loop import Observer, Run
from refimpl.training.metrics import read_metrics
from refimpl.training.report import evaluate
from refimpl.training.start import resume, start
from refimpl.weights import Params

EPS = float(np.finfo(float).eps)
SHAPE = (1, 6, 5)
CLASSES = 3

pytestmark = pytest.mark.usefixtures("own_folder")


def part(n: int, seed: int, shape: tuple[int, int, int] = SHAPE) -> Part:
    """Return noisy images, each class brighter in its own rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.uint8)
    pixels = rng.integers(0, 100, (n, *shape))
    for row in range(shape[1]):
        pixels[:, :, row] += 120 * (labels == row % CLASSES)[:, None, None]
    return Part(pixels.astype(np.uint8), labels)


def images(n: int = 40, shape: tuple[int, int, int] = SHAPE) -> Images:
    return Images("drawn", part(n, 0, shape), part(11, 1, shape), part(9, 2, shape), CLASSES, "drawn")


def config(*more: str, **tables: Any) -> Config:
    base: dict[str, Any] = {
        "task": "classification",
        "dtype": "float64",
        "seed": 3,
        "data": {"eval_batch_size": 4},
        "model": {"name": "mlp", "sizes": [8]},
        "method": {"name": "dense", "sparsity": 0.5},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "training": {"epochs": 3, "batch_size": 7, "threads": 1},
    }
    for name, given_ in tables.items():
        base[name] = {**base[name], **given_} if isinstance(given_, dict) else given_
    return override(Config.from_dict(base), more)


# --- the order of an epoch ----------------------------------------------------------------------------------


def orders(task: ClassificationTask, epochs: list[int]) -> list[list[int]]:
    return [task.batches(epoch).order.tolist() for epoch in epochs]


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 40))
def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_only(
    seed: int, epochs: list[int], batch: int
) -> None:
    data = images()
    task = ClassificationTask(config(seed=seed), data)
    found = orders(task, epochs)
    assert all(sorted(order) == list(range(40)) for order in found)
    other = ClassificationTask(config("augment=true", seed=seed, training={"batch_size": batch, "epochs": 9}), data)
    assert orders(other, epochs[::-1]) == found[::-1]
    assert len({tuple(order) for order in found}) == len(set(epochs))
    assert orders(ClassificationTask(config(seed=seed ^ 1), data), epochs) != found


def test_after_a_rewind_the_earlier_epochs_come_again() -> None:
    run = Run(config(), images())
    run.state.epoch, run.state.origin_epoch = 5, 4
    assert run.batches is run.task.batches(1)


def test_each_batch_of_each_epoch_has_crops_and_flips_of_its_own() -> None:
    task = ClassificationTask(config("augment=true"), images())
    seen = set()
    for epoch in range(3):
        batches = task.batches(epoch)
        assert batches.augment is not None
        for k in range(len(batches)):
            draws = batches.augment(k).random(4)
            np.testing.assert_array_equal(draws, generator(3, "augment", 6 * epoch + k).random(4))
            seen.add(draws.tobytes())
    assert len(seen) == 18
    assert ClassificationTask(config(), images()).batches(0).augment is None


@pytest.mark.parametrize("augment", ["false", "true"])
def test_samples_are_counted_by_batches(augment: str) -> None:
    run = Run(config(f"augment={augment}"), images())
    assert run.steps_per_epoch == 6  # five batches of seven, one of five
    counted = 0
    for step in range(run.total_steps):
        assert run.task.samples(step) == counted
        counted += len(run.task.batches(step // 6)[step % 6][1])


# --- what a step is -----------------------------------------------------------------------------------------


def naive_step(params: dict[str, np.ndarray], x: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and gradients image by image, of a network with one hidden layer; ``x`` is (C, H, W, B)."""
    w1, b1, w2, b2 = (params[f"layers.{k}.{kind}"] for k in (0, 1) for kind in ("weight", "bias"))
    grads = {name: np.zeros_like(p) for name, p in params.items()}
    loss = 0.0
    for n, label in enumerate(labels):
        image = np.array(
            [x[c, i, j, n] for c in range(x.shape[0]) for i in range(x.shape[1]) for j in range(x.shape[2])]
        )
        a = w1 @ image + b1
        h = np.maximum(a, 0)
        z = w2 @ h + b2
        p = np.exp(z) / np.exp(z).sum()
        loss -= np.log(p[label]) / len(labels)
        dz = (p - np.eye(len(z))[label]) / len(labels)
        da = (w2.T @ dz) * (a > 0)
        for name, g in zip(params, (np.outer(da, image), da, np.outer(dz, h), dz)):
            grads[name] += g
    return loss, grads


class Shadow(Observer):
    """Compares each step with the naive one from the same state: SGD with momentum 0.9 at a learning rate of 0.1."""

    def __init__(self) -> None:
        self.steps = 0

    def started(self, run: Run) -> None:
        self.remember(run)

    def remember(self, run: Run) -> None:
        self.before = {name: dense(w) for name, w in run.state.params.items()}
        self.moment = {name: slots["momentum_buffer"].copy() for name, slots in run.state.slots.items()}

    def stepped(self, run: Run, result: Any) -> None:
        loss, grads = naive_step(self.before, *run.batches[run.state.window - 1])
        # Sums of at most 30 products of numbers below 10, three layers of them: a few hundred roundings.
        bound = 3000 * EPS
        assert abs(result.loss - loss) < bound
        for name, grad in grads.items():
            expected = self.before[name] - 0.1 * (0.9 * self.moment[name] + grad)
            assert np.abs(dense(run.state.params[name]) - expected).max() < bound
        self.steps += 1
        self.remember(run)


def test_a_run_is_the_naive_one_step_by_step() -> None:
    run, shadow = Run(config(), images()), Shadow()
    assert run.train(shadow) == "finished"
    assert shadow.steps == 18


@pytest.mark.parametrize(
    "method", ["method=dense", "method=static", "method=set", "method=rigl", "method=topkast", "method=selfish"]
)
def test_every_kind_of_method_learns(method: str) -> None:
    run = Run(config(method, "interval=3", "refresh=3", "backward_sparsity=0.2", "epochs=6"), images(90))
    before = run.task.evaluate(run.trainer.evaluated(), "valid")
    run.train()
    after = run.task.evaluate(run.trainer.evaluated(), "valid")
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.8


def test_the_probe_sees_the_first_batch() -> None:
    run = Run(config(), images())
    params = {name: dense(w) for name, w in run.state.params.items()}
    x, labels = run.task.batches(0)[0]
    for temperature in (1.0, 200.0):
        cooled: Params = dict(params)
        for name in ("layers.1.weight", "layers.1.bias"):
            cooled[name] = params[name] / temperature
        loss, expected = naive_step(cooled, x, labels)  # type: ignore[arg-type]
        found, grads = run.task.probe().loss_and_grads(params, temperature=temperature)
        assert abs(found - loss) < 1000 * EPS
        for name, g in grads.items():
            factor = temperature if name.startswith("layers.1") else 1.0
            value = g if isinstance(g, np.ndarray) else g.dense()
            assert np.abs(value - expected[name] / factor).max() < 1000 * EPS
    assert run.task.probe().samples == 7


def test_operations_are_counted_for_each_image() -> None:
    run = Run(config(), images())
    run.train()
    first, second = 30 * 8, 8 * CLASSES
    # Forward and weight gradient everywhere; the images themselves have no gradient.
    assert flops.total(run.state.flops["executed"]) == 3 * 40 * 2 * (2 * first + 3 * second)


# --- evaluation ---------------------------------------------------------------------------------------------


def counted(run: Run, params: Params, which: str) -> dict[str, float]:
    """Return the scores image by image."""
    held_out: Part = getattr(run.corpus, which)
    loss, correct = 0.0, 0
    for pixels, label in zip(held_out.pixels, held_out.labels):
        scores = run.task.model.logits(params, run.corpus.standardised(pixels[None], "float64"))[:, 0]
        loss -= float(np.log(np.exp(scores[label]) / np.exp(scores).sum()))
        best = 0
        for k in range(CLASSES):
            best = k if scores[k] > scores[best] else best
        correct += best == label
    return {"loss": loss / len(held_out.labels), "accuracy": correct / len(held_out.labels)}


def check_evaluation(evaluated: Callable[[Run, Params, str], dict[str, float]]) -> None:
    """Check an evaluation against a count, on both parts and for batches that divide them and that do not."""
    for batch in (1, 4, 9, 100):
        run = Run(config(f"eval_batch_size={batch}", "epochs=1"), images())
        run.train()
        params = run.trainer.evaluated()
        for which in ("valid", "test"):
            found, expected = evaluated(run, params, which), counted(run, params, which)
            assert list(found) == ["loss", "accuracy"]
            assert found["accuracy"] == expected["accuracy"]
            assert abs(found["loss"] - expected["loss"]) < 500 * EPS


def test_evaluation_is_a_count() -> None:
    check_evaluation(lambda run, params, which: run.task.evaluate(params, which))


def of_a_mean_of_batches(run: Run, params: Params, which: str) -> dict[str, float]:
    held_out: Part = getattr(run.corpus, which)
    size, n = run.config.data.eval_batch_size, len(held_out.labels)
    means = []
    for first in range(0, n, size):
        pixels, labels = held_out.pixels[first : first + size], held_out.labels[first : first + size]
        scores = run.task.model.logits(params, run.corpus.standardised(pixels, "float64"))
        losses = np.log(np.exp(scores).sum(axis=0)) - scores[labels, np.arange(len(labels))]
        means.append((losses.mean(), (scores.argmax(axis=0) == labels).mean()))
    return dict(zip(("loss", "accuracy"), np.mean(means, axis=0).tolist()))


def of_the_other_part(run: Run, params: Params, which: str) -> dict[str, float]:
    return run.task.evaluate(params, "test" if which == "valid" else "valid")


def that_sees_raw_bytes(run: Run, params: Params, which: str) -> dict[str, float]:
    held_out: Part = getattr(run.corpus, which)
    scores = run.task.model.logits(params, held_out.pixels.transpose(1, 2, 3, 0) / 255)
    losses = np.log(np.exp(scores).sum(axis=0)) - scores[held_out.labels, np.arange(len(held_out.labels))]
    return {"loss": float(losses.mean()), "accuracy": float((scores.argmax(axis=0) == held_out.labels).mean())}


@pytest.mark.parametrize("mistake", [of_a_mean_of_batches, of_the_other_part, that_sees_raw_bytes])
def test_catches_an_evaluation(mistake: Callable[[Run, Params, str], dict[str, float]]) -> None:
    with pytest.raises(AssertionError):
        check_evaluation(mistake)


def test_evaluate_from_python() -> None:
    run = Run(config(), images())
    scores = evaluate(run.config, run.trainer.evaluated(), run.corpus)
    assert scores.valid == run.task.evaluate(run.trainer.evaluated(), "valid")
    assert scores.test == run.task.evaluate(run.trainer.evaluated(), "test")


# --- resuming -----------------------------------------------------------------------------------------------


class StopAfter(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, run: Run, result: Any) -> None:
        run.stop_asked = run.state.step == self.step


def untimed(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(folder / "metrics.jsonl")]


def check_resume(settings: Config, stops: tuple[int, ...]) -> None:
    data = images()
    straight = start(settings, "straight", data)
    straight.train()
    straight.close()
    stopped = start(settings, "stopped", data)
    for step in stops:
        assert stopped.train(StopAfter(step)) == "stopped"
        stopped.close()
        stopped = resume("stopped", corpus=images())
    stopped.train()
    stopped.close()
    one, other = last_checkpoint(Path("straight")), last_checkpoint(Path("stopped"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    assert untimed(Path("straight")) == untimed(Path("stopped"))


RESUMED = {
    "dense": ("optimizer=adam", "lr=0.01"),
    "augment": ("method=set", "augment=true"),
    "rigl": ("method=rigl", "interval=4", "end_fraction=1.0"),
    "averaging": ("method=selfish", "optimizer=snt-asgd", "momentum=0", "nonmono=0", "lr=0.5"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_straight_run(name: str) -> None:
    check_resume(config(*RESUMED[name]), (2, 6, 11, 15))  # in the middle of each epoch, and between two


def that_remembers(task: ClassificationTask, epoch: int) -> Any:
    """Draw orders one after the other from one generator, which a new process begins anew."""
    drawn = task.__dict__.setdefault("_drawn", generator(0, "one"))
    made = vars(task).setdefault("_made", {})
    if epoch not in made:
        made[epoch] = real_batches(task, epoch)
        made[epoch].order[:] = drawn.permutation(task.count)
    return made[epoch]


def that_augments_anew(task: ClassificationTask, epoch: int) -> Any:
    batches = real_batches(task, epoch)
    rng = task.__dict__.setdefault("_augments", generator(0, "augment"))
    object.__setattr__(batches, "augment", lambda number: rng)
    return batches


real_batches = ClassificationTask.batches


@pytest.mark.parametrize("mistake", [that_remembers, that_augments_anew])
def test_catches_batches(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassificationTask, "batches", mistake)
    with pytest.raises(AssertionError):
        check_resume(config("augment=true"), (2, 6, 11, 15))


# --- data -------------------------------------------------------------------------------------------------


def test_data_of_another_task_from_python() -> None:
    with pytest.raises(ValueError, match="are a text and task is 'classification'; give a folder of images"):
        Run(config(), tiny_corpus())
    with pytest.raises(ValueError, match="are images and task is 'language-model'; set task=classification"):
        Run(Config(), images())
    task = ClassificationTask(config(), images())
    wide = images(shape=(1, 6, 6))
    x = wide.standardised(wide.train.pixels, float)
    with pytest.raises(
        ValueError, match=r"the images have shape \(1, 6, 6\), 36 numbers, and the network takes \(30,\)"
    ):
        task.model.logits(task.model.init(0, float), x)


def test_real_images_are_learnt(data_folder: Path) -> None:
    folder = data_folder / "cifar-10-subset"
    if not folder.is_dir():
        pytest.skip("REFIMPL_DATA holds no cifar-10-subset")
    settings = override(
        load_recipe("mlp-cifar-static"), [f"data.corpus={folder}", "sizes=[100]", "epochs=2", "lr=0.02", "threads=1"]
    )
    data = open_corpus(settings)
    assert facts_of(data)["classes"] == 10
    with kernels.use("cpu"):
        run = Run(settings, data)
        run.train()
        assert run.task.evaluate(run.trainer.evaluated(), "test")["accuracy"] > 0.2  # ten classes: 0.1 by chance
