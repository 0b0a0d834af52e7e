"""The archive: the same bytes from the same source, and the whole program in one file, also on a bare Python."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
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
        names = [name for name in members.namelist() if not name.startswith("help/")]
        assert names == ["__main__.py", "contents.json", "qmesh.py", "qmesh.pyc"]
        assert members.read("qmesh.py") == harness.PROGRAM.read_bytes().replace(b"\r\n", b"\n")
        assert {member.date_time for member in members.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {member.compress_type for member in members.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["worker", "--help"], ["prompt", "-h"]], ids=" ".join)
def test_help_that_was_prepared_is_what_the_program_says(
    archive: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    usual, renamed = tmp_path / "qmesh.pyz", tmp_path / "lab.pyz"
    for copy in (usual, renamed):
        shutil.copyfile(archive, copy)
    prepared = run(sys.executable, "-v", usual, *words)
    made = run(sys.executable, usual, *words, env={"COLUMNS": "80"})
    assert (prepared.stdout, prepared.returncode) == (made.stdout, 0)
    assert "import 'qmesh'" not in prepared.stderr
    other = run(sys.executable, renamed, *words)
    assert other.stdout.split() == made.stdout.replace(usual.name, renamed.name).split()


@pytest.mark.skipif(sys.platform == "win32", reason="by a POSIX shell")
@pytest.mark.parametrize("output", ["| true", ">/dev/full", ">&-"])
def test_help_that_nobody_can_read_is_no_error(archive: Path, tmp_path: Path, output: str) -> None:
    shutil.copyfile(archive, tmp_path / "qmesh.pyz")
    command = f"{shlex.quote(sys.executable)} qmesh.pyz worker --help {output}"
    assert "Traceback" not in run("sh", "-c", command, cwd=tmp_path).stderr


def test_the_archive_is_built_beside_the_sources_when_no_place_is_named(archive: Path, sources: Path) -> None:
    finished = run(sys.executable, sources)
    built = sources.parent / "dist" / "qmesh.pyz"
    assert finished.stdout == f"{built} ({built.stat().st_size:,} bytes)\n"
    assert built.read_bytes() == archive.read_bytes()


def test_an_archive_is_replaced_and_nothing_else_is_left(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "qmesh.pyz"
    target.parent.mkdir()
    target.write_bytes(qmesh.program_zip({"__main__.py": b"old"}))
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


# Runs the archive, with a Ctrl-C while the program is being loaded.
INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *more):
        if name == "qmesh":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupt_ends_it_in_silence_before_it_has_begun(archive: Path) -> None:
    finished = run(sys.executable, "-c", INTERRUPTED, archive, "models")
    assert (finished.returncode, finished.stdout, finished.stderr) == (qmesh.EXIT_INTERRUPTED, "", "")


# --- Sealing ---

# Nodes of one key hear each other, whatever their topics: no other run of the tests shall have these.
KEY, OTHER_KEY = (qmesh.MeshKey(secrets.token_bytes(32)) for _ in range(2))


def key_file(tmp_path: Path, *keys: qmesh.MeshKey, name: str = "lab.key") -> Path:
    path = tmp_path / name
    path.write_text("# of lab 3\n" + "".join(f"{key.text}\n" for key in keys))
    path.chmod(0o600)
    return path


def seal(archive: Path, target: Path, *keys: qmesh.MeshKey, umask: int = 0o022) -> Finished:
    """Seals these keys into a copy; it must succeed."""
    named = ["--key", key_file(target.parent, *keys)] if keys else []
    finished = run(sys.executable, "-I", "-S", archive, "seal", target, *named, umask=umask)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def sealed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with KEY in it."""
    path = tmp_path_factory.mktemp("sealed") / "lab.pyz"
    seal(archive, path, KEY)
    return path


def told_mesh(archive: Path, tmp_path: Path, *arguments: object, **variables: str) -> str:
    """The mesh in which a client of an archive looks for workers, and finds none."""
    own = alone(tmp_path)
    command = (sys.executable, "-I", "-S", archive, "status", "--timeout", "0.3", *arguments)
    finished = run(*command, cwd=tmp_path, env=own | variables)
    assert finished.returncode == 3, finished.stderr
    title = re.search(rf"UDP 47474, (.*?) mesh '{own['QMESH_TOPIC']}'(?: \((.*?)\))?\)", finished.stderr)
    assert title is not None, finished.stderr
    return title[2] if title[1] == "closed" else title[1]


def fingerprint(key: qmesh.MeshKey) -> str:
    return qmesh.MeshKeys.derive("any", key).fingerprint


def test_the_same_key_gives_the_same_bytes(archive: Path, sealed: Path, tmp_path: Path) -> None:
    seal(archive, tmp_path / "another name.pyz", KEY, umask=0o077)
    assert (tmp_path / "another name.pyz").read_bytes() == sealed.read_bytes()
    seal(archive, tmp_path / "other.pyz", OTHER_KEY)
    assert (tmp_path / "other.pyz").read_bytes() != sealed.read_bytes()


def test_a_sealed_archive_holds_what_the_archive_holds_and_the_key(archive: Path, sealed: Path) -> None:
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(sealed) as after:
        assert after.testzip() is None
        assert after.namelist() == sorted([*before.namelist(), "mesh.key"])
        for name in before.namelist():
            assert after.read(name) == before.read(name)
            assert after.getinfo(name).external_attr == before.getinfo(name).external_attr
        assert after.read("mesh.key") == f"{KEY.text}\n".encode()
        assert {member.date_time for member in after.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {member.compress_type for member in after.infolist()} == {zipfile.ZIP_STORED}
    assert sealed.read_bytes().startswith(b"#!/usr/bin/env python3\n# coding: this-file-is-damaged--")


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_this_user_may_read_and_run_a_sealed_archive_whatever_the_umask(
    archive: Path, tmp_path: Path, umask: int
) -> None:
    seal(archive, tmp_path / "lab.pyz", KEY, umask=umask)
    assert (tmp_path / "lab.pyz").stat().st_mode & 0o777 == 0o700


def test_sealing_prints_the_path_and_tells_the_mesh_but_not_the_key(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "lab.pyz"
    finished = seal(archive, target, KEY)
    assert finished.stdout == f"{target}\n"
    assert fingerprint(KEY) in finished.stderr
    assert KEY.text[7:20] not in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab.key", "lab.pyz"]


def test_a_sealed_archive_runs_on_a_bare_python_and_belongs_to_the_closed_mesh(
    archive: Path, sealed: Path, tmp_path: Path
) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert run(sealed, "--version", env=path).stdout == f"qmesh {qmesh.__version__} (protocol 1)\n"
    assert told_mesh(sealed, tmp_path) == fingerprint(KEY)
    assert told_mesh(archive, tmp_path) == "open"


def test_a_key_that_is_named_goes_before_the_sealed_one(sealed: Path, tmp_path: Path) -> None:
    other, third = key_file(tmp_path, OTHER_KEY), qmesh.MeshKey(bytes(32))
    assert told_mesh(sealed, tmp_path, "--key", other) == fingerprint(OTHER_KEY)
    assert told_mesh(sealed, tmp_path, QMESH_KEY=str(other)) == fingerprint(OTHER_KEY)
    assert told_mesh(sealed, tmp_path, QMESH_KEY=OTHER_KEY.text) == fingerprint(OTHER_KEY)
    assert told_mesh(sealed, tmp_path, "--key", other, QMESH_KEY=third.text) == fingerprint(OTHER_KEY)


def test_sealing_a_sealed_archive_replaces_its_key(archive: Path, sealed: Path, tmp_path: Path) -> None:
    seal(sealed, tmp_path / "again.pyz", OTHER_KEY)
    seal(archive, tmp_path / "afresh.pyz", OTHER_KEY)
    assert (tmp_path / "again.pyz").read_bytes() == (tmp_path / "afresh.pyz").read_bytes()
    seal(sealed, tmp_path / "copy.pyz")  # without a key named, the one that it has
    assert (tmp_path / "copy.pyz").read_bytes() == sealed.read_bytes()


def test_what_is_there_already_is_not_sealed_over(sealed: Path, tmp_path: Path) -> None:
    own, key = Path(shutil.copy(sealed, tmp_path / "lab.pyz")), key_file(tmp_path, OTHER_KEY)
    for target in (own, key):
        before = target.read_bytes()
        finished = bare(own, "seal", target, "--key", key, tmp_path=tmp_path)
        assert finished.returncode == 2
        assert f"{target} is there already, and is left as it is" in finished.stderr
        assert target.read_bytes() == before


def test_the_key_in_a_sealed_archive_can_be_used_and_replaced(archive: Path, sealed: Path, tmp_path: Path) -> None:
    assert told_mesh(archive, tmp_path, "--key", sealed) == fingerprint(KEY)
    new = tmp_path / "new.key"
    finished = bare(archive, "init", new, "--replace", sealed, "--until", "2099-12-31", tmp_path=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert qmesh.parse_mesh_keys(new.read_text("ascii"))[1].secret == KEY.secret


def test_a_sealed_archive_that_others_can_read_is_spoken_of(sealed: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(sealed, tmp_path / "lab.pyz"))
    own.chmod(0o755)
    warning = f"other users of this machine can read the mesh's key: chmod go= {own}"
    assert warning in bare(own, "status", "--timeout", "0.2", tmp_path=tmp_path).stderr
    own.chmod(0o700)
    assert warning not in bare(own, "status", "--timeout", "0.2", tmp_path=tmp_path).stderr


def test_a_key_and_the_one_that_it_replaces_are_both_sealed_in(archive: Path, tmp_path: Path) -> None:
    old = dataclasses.replace(OTHER_KEY, until=datetime.date(2099, 12, 31))
    seal(archive, tmp_path / "lab.pyz", KEY, old)
    with zipfile.ZipFile(tmp_path / "lab.pyz") as members:
        assert qmesh.parse_mesh_keys(members.read("mesh.key").decode("ascii")) == (KEY, old)
    assert told_mesh(tmp_path / "lab.pyz", tmp_path) == fingerprint(KEY)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_an_archive_that_was_copied_in_part_says_so(archive: Path, tmp_path: Path, share: float) -> None:
    part = tmp_path / "qmesh.pyz"
    part.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    finished = bare(part, "worker", tmp_path=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.endswith(": this-file-is-damaged--copy-it-to-this-machine-again\n")


def test_without_a_key_nothing_is_sealed(archive: Path, tmp_path: Path) -> None:
    finished = bare(archive, "seal", tmp_path / "lab.pyz", tmp_path=tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert re.search(r"no key to put in: name one with --key FILE, as `python \S+ init FILE` makes", finished.stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_source_cannot_be_sealed_and_says_what_can(tmp_path: Path) -> None:
    key = key_file(tmp_path, KEY)
    finished = run(sys.executable, harness.PROGRAM, "seal", tmp_path / "lab.pyz", "--key", key)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "only an archive can be sealed: `python build_zipapp.py` makes dist/qmesh.pyz, which can" in finished.stderr
    assert list(tmp_path.iterdir()) == [key]


def test_the_copy_that_init_suggests_to_seal_is_none_that_is_there(archive: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(archive, tmp_path / "lab.pyz"))
    first = bare(own, "init", "ours.key", tmp_path=tmp_path)
    second = bare(own, "init", "lab.key", tmp_path=tmp_path)
    assert " lab.pyz seal ours.pyz --key ours.key " in first.stderr
    (key,) = qmesh.parse_mesh_keys((tmp_path / "lab.key").read_text("ascii"))
    assert f" lab.pyz seal lab-{fingerprint(key)}.pyz --key lab.key " in second.stderr


def test_a_seal_that_fails_leaves_nothing_behind(archive: Path, tmp_path: Path) -> None:
    key, folder = key_file(tmp_path, KEY), tmp_path / "folder.pyz"
    folder.mkdir()
    no_key = key_file(tmp_path, name="no.key")
    there = sorted(tmp_path.rglob("*"))
    for target, named, said in (
        (tmp_path / "missing" / "lab.pyz", key, "lab.pyz cannot be written: there is no folder"),
        (folder, key, "folder.pyz is there already"),
        (tmp_path / "lab.pyz", no_key, "there is no mesh key in it"),
        (tmp_path / "lab.pyz", tmp_path / "none.key", "none.key cannot be read (No such file or directory)"),
    ):
        finished = bare(archive, "seal", target, "--key", named, tmp_path=tmp_path)
        assert (finished.returncode, finished.stdout) == (2, "")
        assert said in finished.stderr
        assert KEY.text[7:20] not in finished.stderr
        assert sorted(tmp_path.rglob("*")) == there


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


def test_a_worker_says_which_packages_are_missing_and_how_to_install_them(
    archive: Path, tmp_path: Path, far_python: str
) -> None:
    finished = bare(archive, "worker", tmp_path=tmp_path, python=far_python)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "Traceback" not in finished.stderr
    before, _, command = install_line(finished.stderr).partition("install them with: ")
    assert before == "error: llama-cpp-python and psutil are not installed here; "
    assert shlex.split(command) == [far_python, "-m", "pip", "install", *qmesh.ENGINE_PACKAGES.values()]


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


def test_a_worker_and_a_client_from_one_sealed_archive_need_no_settings(
    archive: Path, sealed: Path, tmp_path: Path, model_path: Path
) -> None:
    with harness.Mesh(tmp_path, model_path, program=sealed) as mesh:
        worker = mesh.start_worker()
        assert worker.ready["mesh"] == {"topic": mesh.topic, "open": False, "fingerprint": fingerprint(KEY)}
        assert mesh.json("prompt", "hi", "--max-tokens", "2")["worker_id"] == worker.worker_id
        assert mesh.json("status")["mesh"] == worker.ready["mesh"]
        mesh.program = archive
        assert mesh.run("prompt", "hi", "--timeout", "1.5").returncode == 3
        assert worker.stop() == 0, worker.stderr
