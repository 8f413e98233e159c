"""Random labels, what is remembered of them, and agreement of the models of runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from analysis_cases import CLASSES, Stops, acdc, images
from hypothesis import given
from hypothesis import strategies as st

from refimpl.analysis.memorisation import Memory, MemoryWatcher, read_memory
from refimpl.analysis.models import agreement_of
from refimpl.analysis.twins import agreement
from refimpl.analysis.watch import Several
from refimpl.datasets import Images, Part, RandomLabels, first_images, random_labels
from refimpl.rng import generator
from refimpl.training import twin
from refimpl.training.config import Config, override
from refimpl.training.loop import Run
from refimpl.training.run_folder import RunFolder
from refimpl.training.start import resume, start

pytestmark = pytest.mark.usefixtures("own_folder")


# --- data


def check_labels(count: int, seed: int, draw: Any = random_labels) -> None:
    """Nothing but the labels of the chosen images changes, and the true ones are remembered."""
    plain = images()
    found: RandomLabels = draw(plain, count, rng=np.random.default_rng(seed))
    assert found.chosen.tolist() == sorted(set(found.chosen.tolist()))
    assert len(found.chosen) == count
    assert np.array_equal(found.true, plain.train.labels[found.chosen])
    assert np.array_equal(found.random, found.images.train.labels[found.chosen])
    assert np.array_equal(found.pixels, plain.train.pixels[found.chosen])
    others = np.setdiff1d(np.arange(len(plain.train.labels)), found.chosen)
    assert np.array_equal(found.images.train.labels[others], plain.train.labels[others])
    assert found.random.max() < CLASSES
    assert np.array_equal(plain.train.labels, images().train.labels)
    assert (found.images.valid, found.images.test) == (plain.valid, plain.test)
    assert np.array_equal(found.images.train.pixels, plain.train.pixels)
    assert found.images.sha256 != plain.sha256
    assert found.images.train.labels.dtype == found.true.dtype == np.uint8


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_labels_are_drawn_anew(count: int, seed: int) -> None:
    check_labels(count, seed)


def test_catches_wrong_draws() -> None:
    def in_place(plain: Images, count: int, *, rng: Any) -> RandomLabels:
        found = random_labels(plain, count, rng=rng)
        plain.train.labels[:] = found.images.train.labels
        return found

    def with_replacement(plain: Images, count: int, *, rng: Any) -> RandomLabels:
        found = random_labels(plain, count, rng=rng)
        chosen = np.sort(rng.choice(len(plain.train.labels), count))
        return RandomLabels(found.images, chosen, plain.train.labels[chosen])

    def same_name(plain: Images, count: int, *, rng: Any) -> RandomLabels:
        found = random_labels(plain, count, rng=rng)
        return RandomLabels(replace(found.images, sha256=plain.sha256), found.chosen, found.true)

    for planted in (in_place, with_replacement, same_name):
        with pytest.raises(AssertionError):
            check_labels(30, 1, planted)


def test_labels_are_uniform_over_all_classes_their_own_too() -> None:
    big = Part(np.zeros((30_000, 1, 1, 1), np.uint8), np.zeros(30_000, np.uint8))
    plain = Images("big", big, big, big, 10, "big")
    found = random_labels(plain, 30_000, rng=generator(0, "labels"))
    counts = np.bincount(found.random, minlength=10)
    assert np.abs(counts - 3000).max() < 5 * np.sqrt(3000 * 0.9)  # five standard deviations
    assert random_labels(plain, 5, rng=generator(0, "labels")).images.sha256 == (
        random_labels(plain, 5, rng=generator(0, "labels")).images.sha256
    )


def test_fewer_images() -> None:
    plain = images()
    fewer = first_images(plain, 10)
    assert len(fewer.train.labels) == len(fewer.train.pixels) == 10
    assert np.array_equal(fewer.train.pixels, plain.train.pixels[:10])
    assert fewer.sha256 not in (plain.sha256, first_images(plain, 11).sha256)
    assert (fewer.valid, fewer.test) == (plain.valid, plain.test)
    assert first_images(plain, 40) is plain
    for count in (0, 41):
        with pytest.raises(ValueError, match=f"{count} training images are .* give from 1 to 40"):
            first_images(plain, count)
        with pytest.raises(ValueError, match=f"{count} training images are .* give from 1 to 40"):
            random_labels(plain, count, rng=generator(0, "labels"))


# --- what is remembered


def labelled(count: int = 15) -> RandomLabels:
    return random_labels(images(), count, rng=generator(5, "labels"))


def check_memory(watcher: MemoryWatcher) -> None:
    """Both accuracies, image by image, from the parameters that the last step of each epoch left."""
    labels, seen = watcher.labels, []

    class Copies(MemoryWatcher):
        def entry(self, run: Run) -> Any:
            task, right = run.task, [0, 0]
            for i, pixels in enumerate(labels.pixels):
                x = labels.images.standardised(pixels[None], np.float64)
                scores = task.model.logits(run.trainer.evaluated(), x)[:, 0]  # type: ignore[attr-defined]
                right[0] += int(np.argmax(scores) == labels.random[i])
                right[1] += int(np.argmax(scores) == labels.true[i])
            seen.append(tuple(n / len(labels.chosen) for n in right))
            return {}

    config = override(acdc(), ["model=norm-mlp"])  # batch norm: in evaluation by its running statistics
    Run(config, labels.images).train(Several([watcher, Copies(labels)]))
    assert [(memory.random, memory.true) for memory in watcher.epochs] == seen
    assert [memory.epoch for memory in watcher.epochs] == list(range(7))
    assert [memory.phase == "compressed" for memory in watcher.epochs] == [k in (1, 2, 4, 6) for k in range(7)]


def test_both_accuracies_are_those_of_each_image() -> None:
    check_memory(MemoryWatcher(labelled()))


def test_catches_accuracies_of_something_else() -> None:
    labels = labelled()
    other = np.random.default_rng(0).integers(0, CLASSES, len(labels.chosen)).astype(np.uint8)
    swapped = RandomLabels(labels.images, labels.chosen, other)

    class Exchanged(MemoryWatcher):
        def entry(self, run: Run) -> Any:
            found = super().entry(run)
            return {**found, "random": found["true"], "true": found["random"]}

    class Late(MemoryWatcher):
        def epoch_ended(self, run: Run, epoch: int) -> None:
            pass

        def evaluated(self, run: Run, record: dict[str, Any]) -> None:
            super().epoch_ended(run, record["epoch"] - 1)

    class WrongLabels(MemoryWatcher):
        def entry(self, run: Run) -> Any:
            self.labels = swapped
            found = super().entry(run)
            self.labels = labels
            return found

    for planted in (Exchanged, Late, WrongLabels):
        with pytest.raises(AssertionError):
            check_memory(planted(labels))


def test_a_long_dense_run_memorises() -> None:
    """A network with room for everything ends with every random label, and so with no more true ones than by chance."""
    labels = labelled()
    watcher = MemoryWatcher(labels)
    config = acdc(method={"name": "dense"}, model={"sizes": [64]}, training={"epochs": 60, "batch_size": 10})
    Run(config, labels.images).train(watcher)
    assert watcher.epochs[-1] == Memory(59, "dense", 1.0, float((labels.random == labels.true).mean()))
    assert watcher.epochs[0].random < 1


def test_a_stopped_run_remembers_the_same() -> None:
    labels = labelled()
    for name, steps in (("straight", 0), ("stopped", 20)):
        run = start(acdc(), name, labels.images)
        run.train(Several([MemoryWatcher(labels), Stops(steps)]))
        run.close()
    run = resume("stopped", corpus=labels.images)
    run.train(MemoryWatcher(labels))
    run.close()
    assert read_memory("stopped") == read_memory("straight")


def test_runs_that_do_not_fit_are_refused() -> None:
    labels = labelled()
    with pytest.raises(ValueError, match="trained on other images than those with random labels"):
        Run(acdc(), images()).train(MemoryWatcher(labels))
    with pytest.raises(ValueError, match=r"data\.augment is true.*set it to false"):
        Run(acdc(data={"augment": True}), labels.images).train(MemoryWatcher(labels))
    with pytest.raises(FileNotFoundError, match=r"memory\.json"):
        read_memory(".")


# --- agreement of runs


def trained(path: str, config: Config | None = None) -> None:
    run = start(config or acdc(), path, images())
    run.train()
    run.close()


def test_the_twins_of_a_run_and_the_models_of_two() -> None:
    trained("run")
    trained("dense", acdc(method={"name": "dense"}))
    run = Run(acdc(), images())
    for part in ("test", "valid"):
        held_out = getattr(images(), part)
        x = images().standardised(held_out.pixels, np.float64)
        scores = []
        for saved in (RunFolder.open("run").best(), RunFolder.open("run").best_dense(), RunFolder.open("dense").best()):
            scores.append(run.task.model.logits(twin.params_of(saved), x))  # type: ignore[attr-defined]
        labels = held_out.labels.astype(int)
        for other, second in ((None, scores[1]), ("dense", scores[2])):
            found = agreement_of("run", other, corpus=images(), part=part)
            wanted = agreement(scores[0], second, labels)
            assert (found.same, found.both_right, found.accuracies) == (
                wanted.same, wanted.both_right, wanted.accuracies,
            )  # fmt: skip
            assert found.cross_entropy == pytest.approx(wanted.cross_entropy, rel=1e-12)
    itself = agreement_of("run", "run", corpus=images())
    assert itself.same == 1
    task = run.task.evaluate(twin.params_of(RunFolder.open("run").best_dense()), "test")
    assert agreement_of("run", corpus=images()).accuracies[1] == task["accuracy"]


def test_models_that_are_not_there_are_refused() -> None:
    trained("dense", acdc(method={"name": "dense"}))
    with pytest.raises(FileNotFoundError, match="has no dense twin"):
        agreement_of("dense", corpus=images())
    with pytest.raises(FileNotFoundError, match="is not a run"):
        agreement_of("nowhere", corpus=images())
    with pytest.raises(ValueError, match="sha256"):
        agreement_of("dense", "dense", corpus=first_images(images(), 20))
