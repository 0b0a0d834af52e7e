"""The archive: the same bytes from the same source, and the whole program in one file, also on a bare Python."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import harness
import pytest

import qmesh

BUILD = harness.ROOT / "build_zipapp.py"


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None, umask: int = 0o022) -> Finished:
    """A command to its end, with nothing of this process's settings for the program."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
    return subprocess.run(
        [*map(str, command)],
        input="",
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=inherited | (env or {}),
        cwd=cwd,
        umask=umask,
        timeout=harness.COMMAND_TIMEOUT_S,
        check=False,
    )


Finished = subprocess.CompletedProcess[str]


def build(target: Path, *, script: Path = BUILD, umask: int = 0o022) -> bytes:
    """Builds the archive and returns its bytes."""
    finished = run(sys.executable, script, "-o", target, cwd=target.parent, umask=umask)
    assert (finished.returncode, finished.stderr) == (0, "")
    return target.read_bytes()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built archive, in a directory without anything else of the program."""
    path = tmp_path_factory.mktemp("archive") / "qmesh.pyz"
    build(path)
    return path


def alone(tmp_path: Path) -> dict[str, str]:
    """The environment of a mesh that nobody else is in, on the loopback."""
    return {"QMESH_HOST": "127.0.0.1", "QMESH_TOPIC": secrets.token_hex(8), "QMESH_STATE_DIR": str(tmp_path / "state")}


def bare(archive: Path, *arguments: object, tmp_path: Path, python: str = sys.executable) -> Finished:
    """The archive in another working directory, on a Python without site packages, variables and user's modules."""
    return run(python, "-I", "-S", archive, *arguments, cwd=tmp_path, env=alone(tmp_path))


# --- Building ---


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the archive is made of; returns the copied build script."""
    folder = tmp_path / "copy of the sources"
    folder.mkdir()
    for path in (BUILD, harness.PROGRAM):
        shutil.copyfile(path, folder / path.name)
    return folder / BUILD.name


def test_the_same_source_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "other name.pyz") == archive.read_bytes()


def test_neither_place_nor_time_nor_permissions_change_the_bytes(archive: Path, sources: Path, tmp_path: Path) -> None:
    program = sources.with_name("qmesh.py")
    os.utime(program, (1_000_000_000, 1_000_000_000))
    program.chmod(0o700)
    assert build(tmp_path / "a.pyz", script=sources, umask=0o077) == archive.read_bytes()


def test_line_ends_as_windows_has_them_do_not_change_the_bytes(archive: Path, sources: Path, tmp_path: Path) -> None:
    program = sources.with_name("qmesh.py")
    program.write_bytes(program.read_bytes().replace(b"\n", b"\r\n"))
    assert build(tmp_path / "a.pyz", script=sources) == archive.read_bytes()


def test_another_source_gives_other_bytes(archive: Path, sources: Path, tmp_path: Path) -> None:
    with sources.with_name("qmesh.py").open("a") as file:
        file.write("# one more line\n")
    assert build(tmp_path / "a.pyz", script=sources) != archive.read_bytes()


def test_the_archive_holds_the_module_as_it_is_and_a_way_in(archive: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        assert members.testzip() is None
        assert members.namelist() == ["__main__.py", "qmesh.py"]
        assert members.read("qmesh.py") == harness.PROGRAM.read_bytes().replace(b"\r\n", b"\n")
        assert {member.date_time for member in members.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {member.compress_type for member in members.infolist()} == {zipfile.ZIP_STORED}


def test_the_archive_is_built_beside_the_sources_when_no_place_is_named(archive: Path, sources: Path) -> None:
    finished = run(sys.executable, sources)
    built = sources.parent / "dist" / "qmesh.pyz"
    assert finished.stdout == f"{built} ({built.stat().st_size:,} bytes)\n"
    assert built.read_bytes() == archive.read_bytes()


def test_an_archive_is_replaced_and_nothing_else_is_left(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "qmesh.pyz"
    target.parent.mkdir()
    target.write_bytes(b"old")
    assert build(target) == archive.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_anyone_may_run_the_archive_whatever_the_umask(tmp_path: Path) -> None:
    build(tmp_path / "a.pyz", umask=0o077)
    assert (tmp_path / "a.pyz").stat().st_mode & 0o777 == 0o755


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "qmesh.pyz"
    finished = run(sys.executable, BUILD, "-o", target)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith(f"error: {target} cannot be written: ")
    assert finished.stderr.count("\n") == 1


# --- Running ---


def test_the_archive_runs_as_a_program_of_its_own(archive: Path) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert run(archive, "--version", env=path).stdout == f"qmesh {qmesh.__version__} (protocol 1)\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        ([], 2),
        (["prompt", ""], 2),
        (["prompt", "hi", "--timeout", "x"], 2),
        (["prompt", "hi", "--timeout", "1"], 3),
        (["status", "--timeout", "1"], 3),
        (["models"], 1),
    ],
)
def test_exit_codes_come_through_on_a_bare_python_anywhere(
    archive: Path, tmp_path: Path, arguments: list[str], code: int
) -> None:
    finished = bare(archive, *arguments, tmp_path=tmp_path)
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_mesh_with_nobody_is_told_without_any_package(archive: Path, tmp_path: Path) -> None:
    finished = bare(archive, "prompt", "hi", "--timeout", "1", "--json", tmp_path=tmp_path)
    assert json.loads(finished.stdout)["error"]["retryable"] is True
    assert finished.stderr.startswith("error: no worker was found in ")


def test_the_program_is_called_what_its_file_is_called(archive: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copy(archive, tmp_path / "lab.pyz"))
    assert bare(renamed, "--help", tmp_path=tmp_path).stdout.startswith("usage: lab.pyz ")


def test_models_beside_the_archive_are_found(archive: Path, tmp_path: Path) -> None:
    place = tmp_path / "usb stick"
    (place / "models").mkdir(parents=True)
    copied = shutil.copy(archive, place)
    model = place / "models" / "tiny.gguf"
    model.write_bytes(b"GGML")
    finished = bare(Path(copied), "models", "--json", tmp_path=tmp_path)
    assert json.loads(finished.stdout) == {"models": [], "damaged": [f"{model}: it is not a GGUF file"]}


# --- What is missing ---


@pytest.fixture
def far_python(tmp_path: Path) -> str:
    """This Python under a path as long as users have."""
    folder = tmp_path / "home" / "a-user-with-a-name" / "projects" / "machine-learning" / "qmesh" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python3").symlink_to(Path(sys.executable).resolve())
    return str(folder / "python3")


def install_line(stderr: str) -> str:
    [line] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_worker_says_which_package_is_missing_and_how_to_install_it(
    archive: Path, tmp_path: Path, far_python: str
) -> None:
    finished = bare(archive, "worker", tmp_path=tmp_path, python=far_python)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "Traceback" not in finished.stderr
    command = f'{far_python} -m pip install "psutil"'
    assert install_line(finished.stderr) == f"error: psutil is not installed here; install it with: {command}"


# Runs the archive with one package missing.
WITHOUT = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_install_command_of_llama_is_whole_and_can_be_pasted_into_a_shell(
    archive: Path, tmp_path: Path, model_path: Path
) -> None:
    arguments = ["worker", "--port", "0", "--model", model_path]
    finished = run(sys.executable, "-c", WITHOUT, "llama_cpp", archive, *arguments, cwd=tmp_path, env=alone(tmp_path))
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "Traceback" not in finished.stderr
    before, _, command = install_line(finished.stderr).partition("install it with: ")
    assert before == "error: llama-cpp-python is not installed here; "
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", qmesh.LLAMA_REQUIREMENT]


# --- The whole of it ---


def test_a_worker_from_the_archive_answers_a_prompt_from_the_archive(
    archive: Path, tmp_path: Path, model_path: Path
) -> None:
    with harness.Mesh(tmp_path, model_path, program=archive) as mesh:
        worker = mesh.start_worker()
        answer = mesh.json("prompt", "What is the capital of France?", "--temperature", "0", "--max-tokens", "16")
        assert worker.stop() == 0, worker.stderr
    assert answer["worker_id"] == worker.worker_id
    assert answer["text"]
