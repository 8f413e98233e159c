"""Settings of the whole suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from refimpl import kernels

# Deterministic in CI, so that a failure there can be repeated; random elsewhere. No deadline: kernels compile at first
# use.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def data_folder() -> Path:
    """Folder with real data sets, named by REFIMPL_DATA; tests that need it are skipped without."""
    folder = os.environ.get("REFIMPL_DATA")
    if not folder:
        pytest.skip("REFIMPL_DATA names no folder with data sets")
    return Path(folder)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, on the tier that compiles nothing."""
    monkeypatch.chdir(tmp_path)
    with kernels.use("spec"):
        yield tmp_path


@pytest.fixture(params=kernels.TIERS, scope="module")
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test of a file on each tier, on one thread: threads that meet cost more than such small work."""
    count = kernels.threads.get()
    kernels.threads.set_count(1)
    with kernels.use(request.param):
        yield request.param
    kernels.threads.set_count(count)
