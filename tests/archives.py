"""Archives that carry an engine, and a model: those of QMESH_TEST_ARCHIVES, or built from the wheel in build/wheels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import harness

import qmesh

VARIABLE = "QMESH_TEST_ARCHIVES"
WHEELS = harness.ROOT / "build" / "wheels"  # where build_zipapp.py keeps what it compiled
BUILD_TIMEOUT_S = 600  # it packs 100 MB tightly


class NoArchives(Exception):
    """What is missing."""


@dataclass(frozen=True)
class Archives:
    """By what they carry: the program alone, the engine too, and a model besides."""

    program: Path
    engine: Path
    whole: Path

    @property
    def model_name(self) -> str:
        contents = qmesh.read_contents(self.whole)
        assert contents is not None
        return contents.parts[qmesh.MODEL].name


def find_archives(folder: Path, model: Path) -> Archives:
    """The archives to test; those that have to be built come into the folder, once. Raises NoArchives."""
    import fcntl  # not on Windows, where conftest.py imports this module too

    given = os.environ.get(VARIABLE)
    if given is not None:
        folder = Path(given)
    else:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other tests' processes wait for the first
            if not any(folder.glob("*.pyz")):
                _build(folder, model)
    found = {frozenset(_kinds(path)): path for path in sorted(folder.glob("*.pyz"))}
    kinds = (frozenset[str](), frozenset({qmesh.ENGINE}), frozenset({qmesh.ENGINE, qmesh.MODEL}))
    absent = [" and ".join(sorted(kind)) or "the program alone" for kind in kinds if kind not in found]
    if absent:
        raise NoArchives(f"{folder} holds no archive with {', nor one with '.join(absent)}")
    return Archives(*(found[kind] for kind in kinds))


def _kinds(archive: Path) -> set[str]:
    contents = qmesh.read_contents(archive)
    return set(contents.parts) if contents is not None else set()


def _build(folder: Path, model: Path) -> None:
    wheels = sorted(WHEELS.rglob("llama_cpp_python-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise NoArchives(f"there is no wheel of the engine in {WHEELS}, and {VARIABLE} names no archives")
    engine = ("--engine", "--wheels", str(wheels[-1].parent))
    for flags, name in ((engine, "engine.pyz"), ((*engine, "--model", str(model)), "whole.pyz"), ((), "qmesh.pyz")):
        command = [sys.executable, str(harness.ROOT / "build_zipapp.py"), *flags, "-o", str(folder / name)]
        finished = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=BUILD_TIMEOUT_S, check=False
        )
        if finished.returncode:
            raise NoArchives(f"{' '.join(command)}: {finished.stderr.strip()}")
