"""Fixtures that several test files share: the real model, and meshes of real processes on the loopback."""

from __future__ import annotations

import os
import py_compile
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import hypothesis
import machines
import pytest
from archives import Archives, NoArchives, find_archives

import qmesh

hypothesis.settings.register_profile("shared machine", deadline=None)  # where an example may take any time
hypothesis.settings.load_profile("shared machine")

# The files that take 20 seconds or more go first, as one that began last would be waited for alone; the longest first,
# but those that wait are beside those that compute.
FIRST = [
    *("engine", "cli", "openai_clients", "lan", "end_to_end", "simulation", "batch", "failover", "worker", "client"),
    *("portable", "bare", "doctor", "trust_lan", "rollout", "page", "zipapp", "doctor_lan", "terminal", "service"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_configure(config: pytest.Config) -> None:
    """Have what `harness.running` starts compiled, though PYTHONDONTWRITEBYTECODE is set."""
    if not hasattr(config, "workerinput"):  # before xdist's processes are there
        py_compile.compile(str(harness.PROGRAM), doraise=True)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model, fetched with `pull` as a user would when it is not there yet."""
    path = harness.ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
    if not path.exists():
        subprocess.run(
            [sys.executable, harness.ROOT / "qmesh.py", "pull", "--to", path.parent], check=True, timeout=600
        )
    return path


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Archives:
    """Archives that carry what a worker needs."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # one for all processes of this run
    try:
        return find_archives(place / "archives", model_path)
    except NoArchives as error:
        machines.require(str(error))
        raise


@pytest.fixture
def topic() -> str:
    """A mesh of this test's own."""
    return f"test-{secrets.token_hex(8)}"


@pytest.fixture
def parting_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted workers end one after another, and each would wait for those before it to say goodbye."""
    monkeypatch.setattr(qmesh, "GOODBYE_TIMEOUT_S", 0.01)


@pytest.fixture
def mesh(tmp_path: Path, model_path: Path) -> Iterator[harness.Mesh]:
    """A mesh of this test's own; its workers are stopped at the end."""
    with harness.Mesh(tmp_path, model_path) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[harness.Mesh]:
    """A mesh with two workers, for the tests of one file that only ask."""
    with harness.Mesh(tmp_path_factory.mktemp("mesh"), model_path) as mesh:
        mesh.start_workers(2)
        yield mesh
