"""Downloads against a server on loopback: the published file or nothing, whatever the network does."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from refimpl.datasets import CATALOGUE, RemoteDataset, RemoteFile, fetch, load_text_folder

DATA = os.environ.get("REFIMPL_DATA")
RIGHT = bytes(range(256)) * 5000  # more than one chunk


@dataclass
class Server:
    """What the loopback server answers, and what it was asked."""

    url: str
    bodies: dict[str, bytes] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    without_length: set[str] = field(default_factory=set)
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def file(self, name: str, *urls: str, content: bytes = RIGHT) -> RemoteFile:
        """Make a catalogue entry for `content`, at these paths of the server."""
        addresses = tuple(f"{self.url}/{url}" for url in urls)
        return RemoteFile(name, len(content), hashlib.sha256(content).hexdigest(), addresses)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            state.requests.append(path)
            state.agents.add(self.headers["User-Agent"])
            if path in state.redirects:
                self.send_response(302)
                self.send_header("Location", f"{state.url}/{state.redirects[path]}")
                self.end_headers()
                return
            if path not in state.bodies:
                self.send_error(404)
                return
            body = state.bodies[path]
            self.send_response(200)
            if path not in state.without_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if path in state.truncated else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    # A proxy in the environment must not stand between the test and its own server.
    monkeypatch.setenv("no_proxy", "*")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def get(dataset: RemoteDataset, folder: Path, **options: object) -> list[Path]:
    return fetch("toy", folder, catalogue={"toy": dataset}, timeout=5, **options)  # type: ignore[arg-type]


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_right_files_arrive_whole_under_their_own_names(server: Server, tmp_path: Path) -> None:
    server.bodies = {"x/train.txt": RIGHT, "valid.txt": b"small"}
    files = (server.file("a.train", "x/train.txt"), server.file("a.valid", "valid.txt", content=b"small"))
    folder = tmp_path / "made" / "for it"
    paths = get(RemoteDataset(files), folder)
    assert paths == [folder / "a.train", folder / "a.valid"]
    assert [path.read_bytes() for path in paths] == [RIGHT, b"small"]
    assert everything_in(folder) == ["a.train", "a.valid"]
    assert not any("Python-urllib" in agent for agent in server.agents)


def test_a_file_that_is_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.bodies = {"a": RIGHT, "b": b"small"}
    dataset = RemoteDataset((server.file("a", "a"), server.file("b", "b", content=b"small")))
    first = get(dataset, tmp_path)
    assert server.requests == ["a", "b"]
    (tmp_path / "b").write_bytes(b"Small")
    assert get(dataset, tmp_path) == first
    assert server.requests == ["a", "b", "b"]
    assert (tmp_path / "b").read_bytes() == b"small"


@pytest.mark.parametrize(
    "wrong",
    [RIGHT[:-1] + b"!", RIGHT[:-1], RIGHT + b"!", b""],
    ids=["one byte", "shorter", "longer", "empty"],
)
def test_wrong_content_keeps_nothing(server: Server, tmp_path: Path, wrong: bytes) -> None:
    server.bodies = {"a": wrong}
    file = server.file("a", "a")
    got = "more than the" if len(wrong) > len(RIGHT) else hashlib.sha256(wrong).hexdigest()
    with pytest.raises(ValueError, match=rf"^a was not kept: .*{file.sha256}, but got {got}.*{server.url}/a"):
        get(RemoteDataset((file,)), tmp_path)
    assert everything_in(tmp_path) == []


def test_wrong_content_leaves_what_was_there(server: Server, tmp_path: Path) -> None:
    server.bodies = {"a": b"wrong"}
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(ValueError, match="was not kept"):
        get(RemoteDataset((server.file("a", "a"),)), tmp_path)
    assert everything_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_truncated_transfer_keeps_nothing_and_is_told_from_wrong_content(server: Server, tmp_path: Path) -> None:
    server.bodies, server.truncated = {"a": RIGHT}, {"a"}
    with pytest.raises(ConnectionError, match=rf"^a could not be downloaded from {server.url}/a \("):
        get(RemoteDataset((server.file("a", "a"),)), tmp_path)
    assert everything_in(tmp_path) == []


def test_a_truncated_transfer_without_a_length_is_caught_by_the_checksum(server: Server, tmp_path: Path) -> None:
    server.bodies, server.truncated, server.without_length = {"a": RIGHT}, {"a"}, {"a"}
    with pytest.raises(ValueError, match="was not kept"):
        get(RemoteDataset((server.file("a", "a"),)), tmp_path)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("first", ["missing", "wrong", "truncated"])
def test_the_second_mirror_helps_out(server: Server, tmp_path: Path, first: str) -> None:
    server.bodies = {"wrong": b"wrong", "truncated": RIGHT, "right": RIGHT}
    server.truncated = {"truncated"}
    (path,) = get(RemoteDataset((server.file("a", first, "right", "never"),)), tmp_path)
    assert path.read_bytes() == RIGHT
    assert server.requests == [first, "right"]
    assert everything_in(tmp_path) == ["a"]


def test_when_all_mirrors_fail_all_are_named(server: Server, tmp_path: Path) -> None:
    dataset = RemoteDataset((server.file("a", "one", "two"),))
    expected = rf"{server.url}/one \(.*404.*\); {server.url}/two \(.*404.*\); check the network"
    with pytest.raises(ConnectionError, match=expected):
        get(dataset, tmp_path)
    assert everything_in(tmp_path) == []


def test_a_refused_connection_is_one_sentence(server: Server, tmp_path: Path) -> None:
    # Port 1 of loopback: nobody listens there.
    with pytest.raises(ConnectionError, match=r"^a could not be downloaded from http://127\.0\.0\.1:1/a \("):
        get(RemoteDataset((server.file("a", "a"),)), tmp_path, base_url="http://127.0.0.1:1/")


def test_base_url_takes_the_place_of_the_pinned_addresses(server: Server, tmp_path: Path) -> None:
    server.bodies = {"mirror/a.train": RIGHT}
    (path,) = get(RemoteDataset((server.file("a.train", "x"),)), tmp_path, base_url=f"{server.url}/mirror/")
    assert path.read_bytes() == RIGHT
    assert server.requests == ["mirror/a.train"]


def test_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    server.bodies, server.redirects = {"b": RIGHT}, {"a": "b"}
    (path,) = get(RemoteDataset((server.file("a", "a"),)), tmp_path)
    assert path.read_bytes() == RIGHT


def test_a_disk_that_takes_no_more_is_not_blamed_on_the_network(server: Server, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    server.bodies = {"a": RIGHT}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            get(RemoteDataset((server.file("a", "a", "never"),)), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, ConnectionError)
    assert server.requests == ["a"]
    assert everything_in(tmp_path) == []


def test_progress_is_shown_on_request_only(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.bodies = {"a": RIGHT}
    dataset = RemoteDataset((server.file("a", "a"),))
    get(dataset, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    get(dataset, tmp_path / "loud", progress=True)
    out, err = capsys.readouterr()
    assert (out, "a:" in err) == ("", True)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set 'imagenet'; .*wikitext-2, mnist, fashion-mnist, "):
        fetch("imagenet", tmp_path)


def test_other_kinds_of_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_url is 'file:///etc'"):
        fetch("ptb", tmp_path / "new", base_url="file:///etc")
    assert everything_in(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        fetch("ptb", tmp_path / "file")


def make_archive(*members: tuple[str, bytes | str]) -> bytes:
    """A gzipped tar; a member whose content is text is a symbolic link to it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                info.mode = 0o4777
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def archive_dataset(server: Server, content: bytes, *members: str) -> RemoteDataset:
    server.bodies = {"x.tar.gz": content}
    return RemoteDataset((server.file("x.tar.gz", "x.tar.gz", content=content),), members)


def test_only_the_expected_members_are_unpacked(server: Server, tmp_path: Path) -> None:
    outside = str(tmp_path / "outside")
    content = make_archive(
        ("../up", b"evil"),
        (outside, b"evil"),
        ("d/link", "/etc"),
        ("d/readme", b"x"),
        ("./d/a", RIGHT),
        ("d/b", b"b"),
    )
    folder = tmp_path / "in"
    paths = get(archive_dataset(server, content, "d/a", "d/b"), folder)
    assert paths == [folder / "d" / "a", folder / "d" / "b"]
    assert [path.read_bytes() for path in paths] == [RIGHT, b"b"]
    assert not any(path.stat().st_mode & 0o7111 for path in paths)
    assert everything_in(tmp_path) == ["in", "in/d", "in/d/a", "in/d/b", "in/x.tar.gz"]


def test_unpacked_files_that_are_there_stay_and_lost_ones_come_back(server: Server, tmp_path: Path) -> None:
    dataset = archive_dataset(server, make_archive(("d/a", RIGHT), ("d/b", b"b")), "d/a", "d/b")
    first, second = get(dataset, tmp_path)
    before = first.stat().st_mtime_ns, first.stat().st_ino
    second.unlink()
    assert get(dataset, tmp_path) == [first, second]
    assert second.read_bytes() == b"b"
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before
    second.write_bytes(b"cut off")
    get(dataset, tmp_path)
    assert second.read_bytes() == b"b"
    assert server.requests == ["x.tar.gz"]


@pytest.mark.parametrize("second", ["absent", "link"])
def test_a_member_that_is_missing_or_a_link_is_an_error(server: Server, tmp_path: Path, second: str) -> None:
    members: list[tuple[str, bytes | str]] = [("d/a", b"a")]
    if second == "link":
        members.append(("d/b", "/etc/passwd"))
    with pytest.raises(ValueError, match=r"x\.tar\.gz lacks d/b; "):
        get(archive_dataset(server, make_archive(*members), "d/a", "d/b"), tmp_path)
    assert not (tmp_path / "d" / "b").exists()


@pytest.mark.parametrize("content", [b"no archive", gzip.compress(b"no tar"), make_archive(("d/a", RIGHT))[:900]])
def test_an_archive_that_cannot_be_read_is_one_sentence(server: Server, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.tar\.gz cannot be unpacked \(.*delete it"):
        get(archive_dataset(server, content, "d/a"), tmp_path)
    assert everything_in(tmp_path) in (["x.tar.gz"], ["d", "x.tar.gz"])


def test_the_catalogue_is_well_formed() -> None:
    assert list(CATALOGUE) == ["ptb", "wikitext-2", "mnist", "fashion-mnist", "cifar-10", "cifar-100"]
    files = [file for dataset in CATALOGUE.values() for file in dataset.files]
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.size > 0
        assert file.urls
        assert all(url.startswith(("https://", "http://")) for url in file.urls)
    assert len({file.sha256 for file in files}) == len(files)
    assert [len(dataset.files) for dataset in CATALOGUE.values()] == [3, 3, 4, 4, 1, 1]


@pytest.mark.skipif(DATA is None, reason="REFIMPL_DATA names no folder with data")
@pytest.mark.parametrize("name", ["ptb", "wikitext-2"])
def test_the_published_files_pass_the_pinned_checksums(server: Server, tmp_path: Path, name: str) -> None:
    assert DATA is not None
    source = Path(DATA) / name
    names = [file.name for file in CATALOGUE[name].files]
    server.bodies = {each: (source / each).read_bytes() for each in names}
    paths = fetch(name, tmp_path, base_url=server.url)
    assert paths == [tmp_path / each for each in names]
    assert [path.stat().st_size for path in paths] == [file.size for file in CATALOGUE[name].files]
    load_text_folder(tmp_path)
