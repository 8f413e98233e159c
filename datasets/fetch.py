"""Download data sets so that a file is either exactly the published one or absent."""

import hashlib
import logging
import os
import posixpath
import secrets
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from refimpl.datasets.catalogue import CATALOGUE, RemoteDataset, RemoteFile

logger = logging.getLogger(__name__)

# Some hosts answer 403 to the name that urllib gives itself.
USER_AGENT = "Mozilla/5.0 (compatible; refimpl dataset download)"
CHUNK_BYTES = 1 << 18


class _TransferError(Exception):
    """The address did not deliver a whole file."""


class _WrongContentError(Exception):
    """The address delivered a file, but not the published one."""


def fetch(
    name: str,
    folder: str | PathLike[str],
    *,
    base_url: str | None = None,
    progress: bool | None = None,
    timeout: float = 30.0,
    catalogue: Mapping[str, RemoteDataset] = CATALOGUE,
) -> list[Path]:
    """Download a data set into `folder`, every file checked against its pinned sha256.

    A file is written under a temporary name in `folder` and gets its own name only when its checksum is
    right; whatever goes wrong, nothing else stays. A file that is already there with the right checksum is
    not downloaded again, and one with a wrong checksum is replaced once the right one has arrived. Addresses
    are tried in order; the next one is tried also after wrong content, since the checksum alone decides.

    Parameters
    ----------
    name : {"ptb", "wikitext-2", "mnist", "fashion-mnist", "cifar-10", "cifar-100"}
        Data set: a key of `catalogue`.
    folder : path
        Where the files go; it is made if it does not exist.
    base_url : str, optional
        An http or https address of your own mirror, asked for ``base_url/file name`` in place of the pinned
        addresses.
    progress : bool, optional
        Whether to show a progress bar; by default only on a terminal.
    timeout : float
        Seconds that an address may stay silent.
    catalogue : mapping of str to RemoteDataset
        What can be fetched.

    Returns
    -------
    list of Path
        The data set's files: those downloaded, or for an archive (CIFAR) those unpacked from it. An
        archive stays beside them; without it the next call would download it again.

    Raises
    ------
    ValueError
        If `name` is not in the catalogue, `base_url` is not an http address, `folder` is a file, the content
        at the addresses has the wrong checksum, or an archive lacks a member.
    ConnectionError
        If no address delivered a file; the sentence lists all of them.
    """
    if name not in catalogue:
        raise ValueError(f"There is no data set {name!r}; give one of {', '.join(catalogue)}.")
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base_url!r}; give an address that begins with http:// or https://.")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder to put the data set into.")
    target.mkdir(parents=True, exist_ok=True)

    dataset = catalogue[name]
    paths = []
    for file in dataset.files:
        path = target / file.name
        if path.is_file() and _sha256(path) == file.sha256:
            logger.info("%s is already there.", path)
        else:
            urls = file.urls if base_url is None else (f"{base_url.rstrip('/')}/{file.name}",)
            _download(file, urls, path, progress, timeout)
        paths.append(path)
    if not dataset.members:
        return paths
    return [unpacked for path in paths for unpacked in _unpack(path, dataset.members, target)]


def _download(file: RemoteFile, urls: tuple[str, ...], path: Path, progress: bool | None, timeout: float) -> None:
    """Fill `path` from the first of `urls` that delivers the published file."""
    failures: list[str] = []
    wrong: list[str] = []
    for url in urls:
        try:
            with _replacing(path) as out:
                _copy_checked(file, url, out, progress, timeout)
            return
        except _TransferError as error:
            failures.append(f"{url} ({error})")
            logger.warning("%s: %s", url, error)
        except _WrongContentError as error:
            wrong.append(f"{error} from {url}")
            logger.warning("%s: wrong content, %s", url, error)
    if wrong:
        raise ValueError(
            f"{file.name} was not kept: its sha256 must be {file.sha256}, but got {'; '.join(wrong)}; "
            f"try again, or give the base_url of a mirror that holds the published file."
        )
    raise ConnectionError(
        f"{file.name} could not be downloaded from {'; '.join(failures)}; "
        f"check the network, or give the base_url of a mirror that you can reach."
    )


def _copy_checked(file: RemoteFile, url: str, out: BinaryIO, progress: bool | None, timeout: float) -> None:
    """Write what `url` delivers to `out` and check it on the way."""
    sha256 = hashlib.sha256()
    received = 0
    bar = tqdm(
        total=file.size,
        desc=file.name,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress is None else not progress,
    )
    with bar:
        for chunk in _chunks(url, timeout):
            received += len(chunk)
            if received > file.size:
                # A server that never stops must not fill the disk.
                raise _WrongContentError(f"more than the {file.size} bytes of the published file")
            sha256.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
    if sha256.hexdigest() != file.sha256:
        raise _WrongContentError(f"{sha256.hexdigest()} ({received} bytes)")


def _chunks(url: str, timeout: float) -> Iterator[bytes]:
    """Yield the body of `url`.

    Errors of the network, and of no one else, become `_TransferError`: what the consumer does with a chunk
    (a full disk, say) happens outside this generator.
    """
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            announced = response.length
            received = 0
            while chunk := response.read(CHUNK_BYTES):
                received += len(chunk)
                yield chunk
    except (OSError, HTTPException, ValueError) as error:
        raise _TransferError(str(error) or type(error).__name__) from None
    if announced is not None and received < announced:
        raise _TransferError(f"the connection closed after {received} of {announced} bytes")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file under a temporary name; it becomes `path` if the block ends well, else it is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as out:
            yield out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(archive: Path, members: tuple[str, ...], folder: Path) -> list[Path]:
    """Unpack the named members of a gzipped tar archive, if regular files, to the same paths in `folder`.

    Only names from the catalogue ever become paths, and only contents are taken from the archive: links,
    modes, owners and any other member of it are never acted on. (So `tarfile`'s filters, which the first
    releases of Python 3.11 lack, have nothing left to do.)
    """
    missing = dict.fromkeys(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name not in missing or not member.isreg():
                    continue
                path = folder / name
                source = tar.extractfile(member)
                # A file of full size is whole: it got its name only when all of it was written.
                if source is not None and not (path.is_file() and path.stat().st_size == member.size):
                    path.parent.mkdir(exist_ok=True)
                    with source, _replacing(path) as out:
                        shutil.copyfileobj(source, out)
                del missing[name]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}); delete it and fetch it again.") from None
    if missing:
        raise ValueError(f"{archive} lacks {', '.join(missing)}; delete it and fetch it from the published address.")
    return [folder / name for name in members]
