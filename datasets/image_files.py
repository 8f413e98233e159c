"""Folders of labelled images in the published record formats: idx files, and CIFAR's binary records."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from refimpl.datasets.images import Images, Part

IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
SUBFOLDERS = ("", "cifar-10-batches-bin", "cifar-100-binary")
"""Where a folder's files may lie: in it, or where the published archives put them."""

KNOWN = (
    "idx files as of MNIST (train-images-idx3-ubyte, ..., also .gz), CIFAR-10's data_batch_1.bin, ... and "
    "test_batch.bin, or CIFAR-100's train.bin and test.bin"
)
SIDE = 32
"""Height and width of CIFAR's images."""


def load_image_folder(path: str | PathLike[str], *, valid_fraction: float = 0.1) -> Images:
    """Load the labelled images of a folder.

    A folder is known by its files' names: idx files (MNIST, Fashion-MNIST and others of their kind), each either plain
    or with ``.gz``; CIFAR-10's binary records (``data_batch_1.bin`` up to any number, and ``test_batch.bin``); or
    CIFAR-100's (``train.bin``, ``test.bin``), of which the fine labels are taken. CIFAR's files may also lie in the
    folder's subfolder that the published archive makes.

    Parameters
    ----------
    path : path
        The folder.
    valid_fraction : float
        The last images of the training files, this fraction of them rounded to the nearest number, are the validation
        part and are not trained on. Above 0, below 1.

    Returns
    -------
    Images
        Named as the folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it lacks a file.
    ValueError
        If `path` is a file, the folder holds two of the known layouts, a file is truncated or is not what its name
        says, images and labels do not match, a label is out of range, there is one class only, or a part would be
        empty.

    Notes
    -----
    Sources: LeCun, Cortes, Burges, "The MNIST database of handwritten digits" (idx); Krizhevsky, "Learning multiple
    layers of features from tiny images", 2009 (CIFAR).
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(
            f"There is no folder {folder}; give one that holds images: {KNOWN}; `refimpl fetch fashion-mnist` "
            f"downloads some."
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds images: {KNOWN}.")
    found = find_layouts(folder)
    if len(found) > 1:
        names = " and ".join(f"{layout.name} ({layout.folder})" for layout in found)
        raise ValueError(
            f"{folder} holds images in more than one format: {names}; give a folder with the files of one."
        )
    if not found:
        raise FileNotFoundError(f"{folder} holds no images that are known; put one of these there: {KNOWN}.")
    sha256 = hashlib.sha256()
    train, test, classes = found[0].read(sha256)
    if test.pixels.shape[1:] != train.pixels.shape[1:]:
        shapes = [" x ".join(map(str, part.pixels.shape[1:])) for part in (test, train)]
        raise ValueError(
            f"The test images in {folder} are {shapes[0]} and the training images {shapes[1]}; give one size."
        )
    n = len(train.labels)
    held_out = round(valid_fraction * n)
    if not 0 < held_out < n:
        raise ValueError(
            f"valid_fraction is {valid_fraction:g}, which sets aside {held_out} of the {n} training images in {folder} "
            f"for validation; give a fraction that leaves both parts at least one image."
        )
    train, valid = (Part(*(array[part] for array in train)) for part in (slice(n - held_out), slice(n - held_out, n)))
    return Images(folder.resolve().name, train, valid, test, classes, sha256.hexdigest())


@dataclass(frozen=True)
class Layout:
    """Files of one format in a folder.

    Attributes
    ----------
    name : {"idx", "cifar-10", "cifar-100"}
    folder : Path
    """

    name: str
    folder: Path

    def read(self, sha256: hashlib._Hash) -> tuple[Part, Part, int]:
        """Return the training images, the test images and the number of classes; ``sha256`` takes all contents in."""
        if self.name == "idx":
            return _read_idx(self.folder, sha256)
        if self.name == "cifar-10":
            train = [self.folder / name for name in _numbered(self.folder)]
            return _read_cifar(train, self.folder / "test_batch.bin", 1, 10, sha256)
        return _read_cifar([self.folder / "train.bin"], self.folder / "test.bin", 2, 100, sha256)


def find_layouts(folder: Path) -> list[Layout]:
    """Return the formats of which a folder holds any file."""
    found = []
    for path in (folder / name for name in SUBFOLDERS):
        if any(_idx_file(path, name) for name in IDX_FILES):
            found.append(Layout("idx", path))
        if _numbered(path) or (path / "test_batch.bin").is_file():
            found.append(Layout("cifar-10", path))
        if (path / "train.bin").is_file() or (path / "test.bin").is_file():
            found.append(Layout("cifar-100", path))
    return found


# --- idx ---------------------------------------------------------------------------------------------------


def _idx_file(folder: Path, name: str) -> Path | None:
    """Return the file of a name, plain or packed, also with the dot that some copies have before ``idx``."""
    for spelt in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelt, folder / f"{spelt}.gz"):
            if path.is_file():
                return path
    return None


def _read_idx(folder: Path, sha256: hashlib._Hash) -> tuple[Part, Part, int]:
    files = [_idx_file(folder, name) for name in IDX_FILES]
    missing = [name for name, file in zip(IDX_FILES, files) if file is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)} (plain or .gz); put all four files there.")
    arrays = [_idx(file, 3 if "images" in name else 1, sha256) for name, file in zip(IDX_FILES, files) if file]
    parts = []
    for pixels, labels, file in ((arrays[0], arrays[1], files[1]), (arrays[2], arrays[3], files[3])):
        if len(pixels) != len(labels):
            raise ValueError(
                f"{file} has {len(labels)} labels for {len(pixels)} images; give the files of one data set."
            )
        parts.append(Part(pixels[:, None], labels))
    train, test = parts
    classes = int(train.labels.max()) + 1
    if classes < 2:
        raise ValueError(
            f"{files[1]} has the label 0 alone, which leaves nothing to tell apart; give two classes or more."
        )
    _check_labels(files[3], test.labels, classes)
    return train, test, classes


def _idx(file: Path, axes: int, sha256: hashlib._Hash) -> np.ndarray:
    """Read an array of bytes: two zero bytes, the type (8), the number of axes, their lengths, the entries."""
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} cannot be unpacked ({error}); delete it and fetch it again.") from None
    sha256.update(data)
    magic = bytes((0, 0, 8, axes))
    what = "images" if axes == 3 else "labels"
    if data[:4] != magic:
        raise ValueError(
            f"{file} begins with the bytes {data[:4].hex(' ')}, and an idx file of {what} with {magic.hex(' ')}; "
            f"give the published file."
        )
    lengths = np.frombuffer(data[4 : 4 + 4 * axes], ">u4").tolist() if len(data) >= 4 + 4 * axes else []
    expected = 4 + 4 * axes + int(np.prod(lengths, dtype=object)) if lengths else 4 + 4 * axes
    if not lengths or len(data) != expected:
        raise ValueError(
            f"{file} has {len(data):,} bytes, and its header asks for {expected:,}; it is truncated or damaged, so "
            f"fetch it again."
        )
    if 0 in lengths:
        raise ValueError(f"{file} holds no {what} (its shape is {' x '.join(map(str, lengths))}); give one that does.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(lengths)


# --- CIFAR -------------------------------------------------------------------------------------------------


def _numbered(folder: Path) -> list[str]:
    """Return the names of CIFAR-10's training files, by their number."""
    numbers = [
        int(m[1]) for p in folder.glob("data_batch_*.bin") if (m := re.fullmatch(r"data_batch_(\d+)\.bin", p.name))
    ]
    return [f"data_batch_{k}.bin" for k in sorted(numbers)]


def _read_cifar(
    train: list[Path], test: Path, label_bytes: int, classes: int, sha256: hashlib._Hash
) -> tuple[Part, Part, int]:
    expected = [test.parent / f"data_batch_{k}.bin" for k in range(1, len(train) + 1)] if label_bytes == 1 else train
    missing = [file.name for file in (*(expected or [test.parent / "data_batch_1.bin"]), test) if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{test.parent} lacks {' and '.join(missing)}; put all files of the data set there.")
    parts = [_records(file, label_bytes, classes, sha256) for file in (*train, test)]
    merged = Part(np.concatenate([p.pixels for p in parts[:-1]]), np.concatenate([p.labels for p in parts[:-1]]))
    return merged, parts[-1], classes


def _records(file: Path, label_bytes: int, classes: int, sha256: hashlib._Hash) -> Part:
    """Read records of one or two label bytes, the last of which counts, and three planes of 32 x 32 bytes."""
    data = file.read_bytes()
    sha256.update(data)
    size = label_bytes + 3 * SIDE * SIDE
    if not data or len(data) % size:
        raise ValueError(
            f"{file} has {len(data):,} bytes, which is no whole number of records of {size:,} bytes; it is truncated "
            f"or in another format, so fetch it again."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1].copy()
    _check_labels(file, labels, classes)
    return Part(np.ascontiguousarray(records[:, label_bytes:]).reshape(-1, 3, SIDE, SIDE), labels)


def _check_labels(file: Path | None, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        raise ValueError(
            f"{file} has the label {labels[wrong[0]]} at record {wrong[0]}, and labels are 0 to {classes - 1}; give "
            f"the files of one data set."
        )
