"""Programs of several versions in one mesh: they work together, or both sides are told why not and what to do."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest

import qmesh

VECTORS = Path(__file__).parent / "vectors"
BEFORE_ENGINES = "d979879"


def program_of(commit: str, directory: Path) -> Path:
    """The program as it was at a commit."""
    path = directory / commit / "qmesh.py"
    path.parent.mkdir()
    path.write_bytes(lzma.decompress((VECTORS / f"qmesh-{commit}.py.xz").read_bytes()))
    return path


def program_to_come(directory: Path) -> Path:
    """The present program, but for its version and that of its protocol."""
    text = harness.PROGRAM.read_text("utf-8")
    for name, value in (("PROTOCOL_VERSION: Final", str(qmesh.PROTOCOL_VERSION + 1)), ("__version__", '"9.9.9"')):
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    path = directory / "qmesh.py"
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def mixed(tmp_path: Path, model_path: Path) -> Iterator[harness.Mesh]:
    """A mesh whose next process is of `program`."""
    with harness.Mesh(tmp_path, model_path) as mesh:
        yield mesh


@pytest.mark.parametrize("old_asks", [False, True], ids=["an older worker", "an older client"])
def test_an_older_version_of_the_same_protocol_works_with_this_one(
    mixed: harness.Mesh, tmp_path: Path, old_asks: bool
) -> None:
    old = program_of(BEFORE_ENGINES, tmp_path)
    mixed.program = harness.PROGRAM if old_asks else old
    worker = mixed.start_worker()
    mixed.program = old if old_asks else harness.PROGRAM
    answer = mixed.json("prompt", "Say hello.", "--max-tokens", "8", "--temperature", "0")
    assert (answer["worker_id"], answer["usage"]["completion_tokens"]) == (worker.worker_id, 8)
    view = mixed.json("status")
    assert [each["worker_id"] for each in view["workers"]] == [worker.worker_id]
    assert view["unreachable"] == []
    assert worker.stop() == 0
    assert "version" not in worker.stderr


@pytest.mark.parametrize("newer_asks", [False, True], ids=["a newer worker", "a newer client"])
def test_versions_of_another_protocol_are_told_on_both_sides(
    mixed: harness.Mesh, tmp_path: Path, newer_asks: bool
) -> None:
    newer = program_to_come(tmp_path)
    mixed.program = harness.PROGRAM if newer_asks else newer
    worker = mixed.start_worker()
    mixed.program = newer if newer_asks else harness.PROGRAM
    asked = mixed.run("prompt", "hi", "--timeout", "2")
    agents, versions = [qmesh.AGENT, "qmesh/9.9.9"], [qmesh.PROTOCOL_VERSION, qmesh.PROTOCOL_VERSION + 1]
    assert asked.returncode == 3
    assert (
        f"somebody at 127.0.0.1 speaks another version of the protocol than {versions[newer_asks]}, that of "
        f"{agents[newer_asks]}, as an older or newer QMesh does: if it is one, copy the newer file to all machines"
    ) in asked.stderr
    kind = "a newer" if newer_asks else "an older"
    said = (
        f"speaks version {versions[newer_asks]} of the protocol, as {kind} QMesh does; this is {agents[not newer_asks]}"
    )
    assert worker.stderr.count(said) == 1
    assert worker.stderr.count("copy the newer file to both") == 1
