"""Compiled kernels are kept between processes, and whatever happens to the files costs a compilation, never a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from child_processes import finish, run, start

from refimpl.kernels.cpu import cache, runtime
from refimpl.kernels.cpu.cache import SUFFIX

CHILD = """
import json, logging
{before}
import numpy as np
from refimpl.kernels import cpu, spec
from refimpl.kernels.cpu import cache
from refimpl.weights import Support

support = Support((5, 4), [0, 3, 9, 17])
tokens = np.array([[4, 0], [0, 2], [0, 1]])
for dtype in ({dtypes}):
    dx = np.arange(24).reshape(3, 4, 2).astype(dtype)
    assert np.array_equal(cpu.embed_gradient(support, tokens, dx), spec.embed_gradient(support, tokens, dx))
print(json.dumps([cache.counts["compiled"], cache.counts["loaded"], str(cache.folder())]))
"""


def child(dtypes: str = '"f4",', before: str = "") -> str:
    """Return the code of a process that compiles or loads a kernel for each type, and checks what it computes."""
    return CHILD.format(dtypes=dtypes, before=before)


def counts(out: str) -> tuple[int, int]:
    """Return how many kernels a process has compiled and loaded."""
    compiled, loaded, _ = json.loads(out)
    return compiled, loaded


def kept(folder: Path) -> list[Path]:
    """Return the files of kernels."""
    return sorted(folder.rglob(f"*{SUFFIX}"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Return a folder that one process has filled, with how many kernels, and what that process said."""
    folder = tmp_path_factory.mktemp("warm")
    out, said = run(child(), folder)
    compiled, loaded = counts(out)
    assert compiled == len(kept(folder)) > 0
    assert loaded == 0
    return folder, compiled, said


@pytest.fixture
def filled(warm: tuple[Path, int, str], tmp_path: Path) -> tuple[Path, int]:
    """Return a copy of it to damage."""
    shutil.copytree(warm[0], tmp_path / "filled")
    return tmp_path / "filled", warm[1]


def test_the_second_process_compiles_nothing_and_says_nothing(warm):
    folder, compiled, _ = warm
    out, said = run(child(), folder)
    assert counts(out) == (0, compiled)
    assert said == ""


def test_the_first_compilation_is_announced_before_it_begins(warm, tmp_path):
    """Without any set-up of logging; with it, also one for types that are new."""
    _, _, said = warm
    assert re.fullmatch(r"compiling kernels for this machine: once, some seconds; they are kept in .*\n", said)
    noted = 'logging.basicConfig(level="DEBUG", format="%(message)s"); logging.getLogger("numba").setLevel("ERROR")'
    first, *others = run(child(before=noted), tmp_path)[1].splitlines()
    assert first.startswith("compiling kernels for this machine")
    assert re.match(r"compiled the kernel embedding\.\w+ for .* in \d+\.\d\d s", others[0])
    _, said = run(child('"f4", "f8"', before=noted), tmp_path)
    assert said.startswith("compiling kernels for types or shapes that are new here; they are kept in")
    assert said.count("compiling") == 1


def test_processes_that_compile_at_once_do_no_harm(tmp_path):
    """Two the same kernel, and one another form of it; then there is nothing left to compile, and no other file."""
    at_once = [start(child(dtypes), tmp_path) for dtypes in ('"f4",', '"f4",', '"f8",')]
    first, second, third = (counts(finish(process)[0]) for process in at_once)
    forms = first[0] + first[1]
    assert forms == sum(second) == sum(third) > 0
    assert counts(run(child('"f4", "f8"'), tmp_path)[0]) == (0, len(kept(tmp_path)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == kept(tmp_path)


def spoil_half(content: bytes) -> bytes:
    """A copy that was interrupted."""
    return content[: len(content) // 2]


def spoil_one_byte(content: bytes) -> bytes:
    """A disk that errs: inside the machine code, which nothing else would notice."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def spoil_kind(content: bytes) -> bytes:
    """Another program's file, whole by itself."""
    return cache._pack(["something", "else"])


@pytest.mark.parametrize("spoil", [spoil_half, spoil_one_byte, spoil_kind])
def test_a_damaged_file_is_compiled_again(spoil, filled):
    folder, compiled = filled
    for path in kept(folder):
        path.write_bytes(spoil(path.read_bytes()))
    out, said = run(child(), folder)
    assert counts(out) == (compiled, 0)
    assert len(re.findall(rf"{SUFFIX} cannot be read \(.+\); it is compiled again", said)) == compiled
    assert counts(run(child(), folder)[0]) == (0, compiled)


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
def test_a_full_disk_is_warned_about_once(tmp_path):
    out, said = run(child('"f4", "f8"', before=FULL), tmp_path)
    assert counts(out)[0] >= 2
    assert said.count("compiled kernels cannot be kept in") == 1
    assert "so the next process compiles them again; set REFIMPL_CACHE to a folder with room" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def no_home(tmp_path: Path) -> dict[str, str]:
    """Return settings under which nothing can be written but temporary files; permissions do not stop root."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    nowhere = str(tmp_path / "file" / "folder")
    return dict.fromkeys(("REFIMPL_CACHE", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), nowhere) | {
        "TMPDIR": str(tmp_path / "temporary")
    }


@pytest.mark.skipif(sys.platform == "win32", reason="TMPDIR names the folder elsewhere")
def test_without_a_writable_home_a_temporary_folder_serves(tmp_path):
    settings = no_home(tmp_path)
    out, _ = run(child(), **settings)
    compiled, loaded, folder = json.loads(out)
    assert loaded == 0 < compiled
    assert Path(folder).parent == Path(settings["TMPDIR"]) / f"refimpl-{os.getuid()}"
    assert counts(run(child(), **settings)[0]) == (0, compiled)


@pytest.mark.skipif(sys.platform == "win32", reason="TMPDIR names the folder elsewhere")
def test_a_temporary_folder_that_others_can_write_to_is_not_trusted(tmp_path):
    """What is loaded from there is run."""
    settings = no_home(tmp_path)
    planted = Path(settings["TMPDIR"]) / f"refimpl-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    compiled, _, folder = json.loads(run(child(), **settings)[0])
    assert compiled > 0
    assert Path(folder).parent == planted.parent
    assert kept(planted) == []


def test_nowhere_to_write_at_all(monkeypatch, tmp_path):
    """A folder is named all the same, and the attempt to use it warns."""

    def fails():
        raise FileNotFoundError("no usable temporary directory found")

    for name, value in no_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.tempfile, "gettempdir", fails)
    assert cache.folder.__wrapped__().name.startswith("kernels-")


def test_another_source_is_another_folder(tmp_path):
    here = Path(cache.__file__).parent
    shutil.copytree(here, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    before = cache.version(tmp_path / "copy")
    assert before == cache.version(here)
    assert cache.version(here.parent, here) in cache.folder().name
    rows = tmp_path / "copy" / "rows.py"  # no kernel stands there: all import it
    rows.write_text(rows.read_text() + "\n")
    assert cache.version(tmp_path / "copy") != before
    (tmp_path / "copy" / "more.py").touch()
    versions = {before, cache.version(tmp_path / "copy")}
    rows.write_text(rows.read_text()[:-1])
    versions.add(cache.version(tmp_path / "copy"))
    assert len(versions) == 3


def test_another_processor_is_another_file(warm):
    """Machines that share a home do not run each other's code."""
    folder, compiled, _ = warm
    out, _ = run(child(), folder, NUMBA_CPU_NAME="generic")
    assert counts(out) == (compiled, 0)
    assert len(kept(folder)) == 2 * compiled
    assert counts(run(child(), folder)[0]) == (0, compiled)
    assert counts(run(child(), folder, NUMBA_CPU_NAME="generic")[0]) == (0, compiled)


def test_the_forms_of_a_kernel_are_kept_apart():
    """One function is compiled for one thread and for several: under one name they would be taken for each other."""

    class Codegen:
        @staticmethod
        def magic_tuple() -> tuple[str, ...]:
            return ("triple", "processor", "features")

    def stores(kernel):
        return kernel.serial._cache, kernel.parallel._cache

    from refimpl.kernels.cpu import products

    kernels = [kernel for kernel in vars(products).values() if isinstance(kernel, runtime.Kernel)]
    files = {store.file(("float32",), Codegen) for kernel in kernels for store in stores(kernel)}
    files |= {store.file(("float64",), Codegen) for kernel in kernels for store in stores(kernel)}
    expected = 2 * sum(1 if kernel.serial is kernel.parallel else 2 for kernel in kernels)
    assert len(files) == expected > 2
