"""Images: record files, their parts, standardisation, batches, crops and flips, each against a loop over pixels."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.datasets import ImageBatches, Images, Part, load_image_folder, random_crop, random_flip
from refimpl.rng import generator

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def draw(n: int, shape: tuple[int, int, int], classes: int, seed: int) -> Part:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return Part(rng.integers(0, 256, (n, *shape), np.uint8), rng.permutation(labels).astype(np.uint8))


def idx(array: np.ndarray) -> bytes:
    """Write an idx file as its definition has it: big-endian numbers."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, train: Part, test: Part, *, pack: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (train.pixels[:, 0], train.labels, test.pixels[:, 0], test.labels)
    for name, array in zip(NAMES, arrays):
        data = idx(array)
        (folder / f"{name}{'.gz' if pack else ''}").write_bytes(gzip.compress(data) if pack else data)
    return folder


def records(part: Part, coarse: bool = False) -> bytes:
    return b"".join(
        bytes([7] * coarse) + bytes([label]) + image.tobytes()  # the coarse label comes first
        for image, label in zip(part.pixels, part.labels)
    )


def write_cifar(folder: Path, train: Part, test: Part, files: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, chosen in enumerate(np.array_split(np.arange(len(train.labels)), files), 1):
        (folder / f"data_batch_{k}.bin").write_bytes(records(Part(train.pixels[chosen], train.labels[chosen])))
    (folder / "test_batch.bin").write_bytes(records(test))
    return folder


def same(images: Images, train: Part, test: Part, held_out: int) -> None:
    """Check the three parts of a data set."""
    n = len(train.labels) - held_out
    for found, expected in (
        (images.train, Part(train.pixels[:n], train.labels[:n])),
        (images.valid, Part(train.pixels[n:], train.labels[n:])),
        (images.test, test),
    ):
        assert found.pixels.dtype == found.labels.dtype == np.uint8
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        np.testing.assert_array_equal(found.labels, expected.labels)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files(tmp_path: Path, pack: bool) -> None:
    train, test = draw(20, (1, 5, 7), 4, 0), draw(6, (1, 5, 7), 3, 1)
    images = load_image_folder(write_idx(tmp_path / "digits", train, test, pack=pack), valid_fraction=0.25)
    same(images, train, test, 5)
    assert (images.name, images.shape, images.classes) == ("digits", (1, 5, 7), 4)
    contents = b"".join(idx(a) for a in (train.pixels[:, 0], train.labels, test.pixels[:, 0], test.labels))
    assert images.sha256 == hashlib.sha256(contents).hexdigest()


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_cifar_10_records(tmp_path: Path, subfolder: str) -> None:
    train, test = draw(30, (3, 32, 32), 10, 0), draw(10, (3, 32, 32), 10, 1)
    write_cifar(tmp_path / subfolder, train, test, files=11)  # 10 and 11 come after 9
    images = load_image_folder(tmp_path, valid_fraction=0.1)
    same(images, train, test, 3)
    assert (images.shape, images.classes) == ((3, 32, 32), 10)
    assert images.sha256 == load_image_folder(tmp_path, valid_fraction=0.5).sha256


def test_cifar_100_takes_the_fine_labels(tmp_path: Path) -> None:
    train, test = draw(100, (3, 32, 32), 100, 0), draw(10, (3, 32, 32), 10, 1)
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(records(train, coarse=True))
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(records(test, coarse=True))
    images = load_image_folder(tmp_path)
    same(images, train, test, 10)
    assert images.classes == 100


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def other_size(folder: Path) -> None:
    (folder / NAMES[2]).write_bytes(idx(np.zeros((6, 5, 8))))


def not_gzip(folder: Path) -> None:
    (folder / NAMES[0]).rename(folder / f"{NAMES[0]}.gz")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (changed(NAMES[0], lambda data: data[:-1]), r"has 715 bytes, and its header asks for 716; it is truncated"),
        (changed(NAMES[0], lambda data: data + b"x"), r"has 717 bytes, and its header asks for 716"),
        (changed(NAMES[0], lambda data: data[:9]), r"has 9 bytes, and its header asks for 16; it is truncated"),
        (changed(NAMES[0], lambda data: b""), r"begins with the bytes , and an idx file of images with 00 00 08 03"),
        (changed(NAMES[1], lambda data: b"\0\0\x08\x03" + data[4:]), r"00 00 08 03, and an idx file of labels with"),
        (changed(NAMES[1], lambda data: idx(np.zeros(20))), r"has the label 0 alone"),
        (changed(NAMES[1], lambda data: idx(np.zeros(19))), r"has 19 labels for 20 images"),
        (changed(NAMES[2], lambda data: idx(np.zeros((0, 5, 7)))), r"holds no images \(its shape is 0 x 5 x 7\)"),
        (changed(NAMES[3], lambda data: idx(np.array([0, 1, 9, 2, 0, 1]))), r"has the label 9 at record 2.*0 to 3"),
        (other_size, r"test images in .* are 1 x 5 x 8 and the training images 1 x 5 x 7"),
        (not_gzip, r"cannot be unpacked"),
    ],
)
def test_idx_files_that_cannot_be(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_idx(tmp_path, draw(20, (1, 5, 7), 4, 0), draw(6, (1, 5, 7), 3, 1))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        load_image_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (changed("data_batch_2.bin", lambda data: data[:-1]), ValueError, r"no whole number of records of 3,073 bytes"),
        (changed("test_batch.bin", lambda data: b""), ValueError, r"has 0 bytes"),
        (changed("test_batch.bin", lambda data: b"\x0a" + data[1:]), ValueError, r"label 10 at record 0.*0 to 9"),
        (lambda folder: (folder / "data_batch_1.bin").unlink(), FileNotFoundError, "lacks data_batch_1.bin"),
        (lambda folder: (folder / "test_batch.bin").unlink(), FileNotFoundError, "lacks test_batch.bin"),
        (lambda folder: (folder / "test.bin").write_bytes(b""), ValueError, "more than one format: cifar-10"),
    ],
)
def test_records_that_cannot_be(spoil: Callable[[Path], object], error: type, says: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, draw(20, (3, 32, 32), 10, 0), draw(10, (3, 32, 32), 10, 1))
    spoil(tmp_path)
    with pytest.raises(error, match=says):
        load_image_folder(tmp_path)


def test_folders_that_hold_no_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*`refimpl fetch fashion-mnist`"):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no images that are known"):
        load_image_folder(tmp_path)
    (tmp_path / NAMES[0]).write_bytes(idx(np.zeros((2, 3, 3))))
    with pytest.raises(FileNotFoundError, match=r"lacks train-labels-idx1-ubyte and .*t10k-labels-idx1-ubyte"):
        load_image_folder(tmp_path)
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load_image_folder(tmp_path / NAMES[0])


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_validation_part_that_takes_nothing_or_all_is_refused(fraction: float, tmp_path: Path) -> None:
    write_idx(tmp_path, draw(20, (1, 2, 2), 4, 0), draw(6, (1, 2, 2), 3, 1))
    with pytest.raises(ValueError, match=r"sets aside (0|20) of the 20 training images"):
        load_image_folder(tmp_path, valid_fraction=fraction)


def test_real_records(data_folder: Path) -> None:
    """Ten classes in about equal parts, and the usual brightness of CIFAR-10's channels."""
    if not (data_folder / "cifar-10-subset").is_dir():
        pytest.skip("REFIMPL_DATA holds no cifar-10-subset")
    images = load_image_folder(data_folder / "cifar-10-subset")
    counts = np.bincount(images.train.labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 0.8 * counts.mean()
    mean, deviation = images.statistics
    assert np.all((mean > 110) & (mean < 130) & (deviation > 55) & (deviation < 75))


# --- numbers ------------------------------------------------------------------------------------------------


def dataset(n: int = 23, shape: tuple[int, int, int] = (2, 4, 3), seed: int = 0) -> Images:
    parts = [draw(count, shape, 3, seed + k) for k, count in enumerate((n, 5, 4))]
    return Images("drawn", *parts, 3, f"drawn-{seed}")


def standardisation_errors(standardise: Callable[[Images, np.ndarray], np.ndarray], images: Images) -> float:
    """Return how far a standardisation is from the definition, pixel by pixel; statistics are of the training part."""
    train = images.train.pixels.astype(float)
    expected = np.empty((*images.shape, 5))
    for c in range(images.shape[0]):
        mean, deviation = train[:, c].mean(), train[:, c].std()
        for n in range(5):
            expected[c, :, :, n] = (images.valid.pixels[n, c] - mean) / deviation
    return float(np.abs(standardise(images, images.valid.pixels) - expected).max())


def test_standardisation_is_the_training_parts() -> None:
    images = dataset()
    # Sums of up to 276 bytes are exact; the roundings are those of a mean, a root and a quotient of numbers below 4.
    bound = 400 * np.finfo(float).eps
    assert standardisation_errors(lambda i, p: i.standardised(p, "float64"), images) < bound
    x = images.standardised(images.train.pixels, "float64")
    np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=bound)
    np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=bound)
    single = images.standardised(images.train.pixels, np.float32)
    assert single.dtype == np.float32
    assert single.flags.c_contiguous
    np.testing.assert_array_equal(single, x.astype(np.float32))


def test_catches_other_statistics() -> None:
    def of_validation(images: Images, pixels: np.ndarray) -> np.ndarray:
        other = Images("", images.valid, images.valid, images.test, 3, "")
        return other.standardised(pixels, "float64")

    def of_all_channels(images: Images, pixels: np.ndarray) -> np.ndarray:
        values = images.train.pixels.astype(float)
        return (pixels.transpose(1, 2, 3, 0) - values.mean()) / values.std()

    for mistake in (of_validation, of_all_channels):
        assert standardisation_errors(mistake, dataset()) > 1e-3


def test_a_constant_channel_becomes_zeros() -> None:
    images = dataset()
    images.train.pixels[:, 1] = 9
    x = images.standardised(images.train.pixels, np.float64)
    assert np.all(x[1] == 0)
    assert np.isfinite(images.standardised(images.test.pixels, np.float64)).all()


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_every_image_is_in_one_batch_with_its_own_label(n: int, batch_size: int, seed: int) -> None:
    images = dataset(n, seed=seed)
    order = np.random.default_rng(seed).permutation(n)
    batches = ImageBatches(images, images.train, order, batch_size, np.float64)
    assert len(batches) == len(list(batches)) == (n + batch_size - 1) // batch_size
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    seen = 0
    for inputs, labels in batches:
        assert inputs.shape == (*images.shape, len(labels))
        for column, label in enumerate(labels):
            which = order[seen]
            assert label == images.train.labels[which]
            one = images.standardised(images.train.pixels[which : which + 1], np.float64)[..., 0]
            np.testing.assert_array_equal(inputs[..., column], one)
            seen += 1
    assert seen == n
    np.testing.assert_array_equal(batches[-1][0], batches[len(batches) - 1][0])
    with pytest.raises(IndexError, match="does not exist"):
        batches[len(batches)]


def test_augmentation_belongs_to_a_batch_not_to_what_was_asked_before() -> None:
    images = dataset()
    order = np.arange(23)
    batches = ImageBatches(images, images.train, order, 5, np.float64, lambda k: generator(3, "augment", k))
    forwards = [inputs.tobytes() for inputs, _ in batches]
    assert forwards == [batches[k][0].tobytes() for k in reversed(range(len(batches)))][::-1]
    plain = ImageBatches(images, images.train, order, 5, np.float64)
    assert all(inputs.tobytes() != forwards[k] for k, (inputs, _) in enumerate(plain))


# --- crops and flips ----------------------------------------------------------------------------------------


def naive_crop(pixels: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    n, _, height, width = pixels.shape
    down = rng.integers(0, 2 * padding + 1, (2, n))
    out = np.zeros_like(pixels)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                from_y, from_x = y + down[0, i] - padding, x + down[1, i] - padding
                if 0 <= from_y < height and 0 <= from_x < width:
                    out[i, :, y, x] = pixels[i, :, from_y, from_x]
    return out


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 5), st.integers(0, 9))
def test_a_crop_is_the_naive_one(n: int, channels: int, height: int, width: int, padding: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(1, 256, (n, channels, height, width), np.uint8)
    before = pixels.copy()
    found = random_crop(pixels, padding, rng=generator(seed, "crop"))
    np.testing.assert_array_equal(found, naive_crop(pixels, padding, generator(seed, "crop")))
    np.testing.assert_array_equal(pixels, before)
    assert found.dtype == np.uint8
    if padding == 0:
        np.testing.assert_array_equal(found, pixels)


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_a_flip_is_the_naive_one(n: int, channels: int, height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), np.uint8)
    found = random_flip(pixels, rng=generator(seed, "flip"))
    mirrored = generator(seed, "flip").random(n) < 0.5
    for i in range(n):
        for y in range(height):
            for x in range(width):
                source = width - 1 - x if mirrored[i] else x
                np.testing.assert_array_equal(found[i, :, y, x], pixels[i, :, y, source])


def test_crops_and_flips_are_uniform() -> None:
    """Every one of the nine offsets, and both sides, about equally often: within five standard deviations."""
    n = 9000
    dot = np.zeros((n, 1, 3, 3), np.uint8)
    dot[:, 0, 1, 1] = 1
    places = random_crop(dot, 1, rng=generator(0, "crop")).reshape(n, 9)
    assert np.all(places.sum(axis=1) == 1)
    assert np.all(np.abs(places.sum(axis=0, dtype=int) - n / 9) < 5 * np.sqrt(n * 8 / 81))
    left = np.zeros((n, 1, 1, 2), np.uint8)
    left[..., 0] = 1
    assert abs(random_flip(left, rng=generator(0, "flip"))[..., 0].sum(dtype=int) - n / 2) < 5 * np.sqrt(n / 4)
