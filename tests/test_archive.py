"""What an archive carries besides the program: how it is packed, found, unpacked once, kept, and removed."""

from __future__ import annotations

import ast
import concurrent.futures
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import tiny_models

import build_zipapp
import qmesh


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> build_zipapp.EngineTree:
    """A stand-in for the engine's packages: two files of Python, and one library under two names."""
    root = tmp_path_factory.mktemp("engine") / "tree"
    (root / "package" / "lib").mkdir(parents=True)
    for name in ("package", "llama_cpp"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "__init__.py").write_text("")
    (root / "psutil.py").write_text("")
    (root / "package" / "lib" / "liba.so.0").write_bytes(b"\x7fELF" * 1000)
    os.link(root / "package" / "lib" / "liba.so.0", root / "package" / "lib" / "liba.so")
    about = {"platform": qmesh.system_tag(), "python": qmesh.python_tag(), "packages": {"package": "1"}}
    return build_zipapp.EngineTree(root, about)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_models.write_model("qwen2", tmp_path_factory.mktemp("models") / "tiny.gguf").read_bytes()


@pytest.fixture
def model(model_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model_bytes)
    return path


@pytest.fixture(scope="module")
def built(tree: build_zipapp.EngineTree, model_bytes: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive that carries both; it is built once, as the program takes a second to compile."""
    place = tmp_path_factory.mktemp("built")
    (place / "tiny.gguf").write_bytes(model_bytes)
    build_zipapp.build(place / "carrying.pyz", tree, place / "tiny.gguf")
    return place / "carrying.pyz"


@pytest.fixture
def archive(built: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copy2(built, tmp_path))


def part_of(archive: Path, kind: str) -> qmesh.Part:
    contents = qmesh.read_contents(archive)
    assert contents is not None
    return contents.parts[kind]


def unpack(cache: Path, archive: Path, kind: str = qmesh.MODEL) -> Path:
    """A part's folder; its lock is not held on to."""
    unpacked = qmesh.Cache(cache).unpack(archive, part_of(archive, kind))
    unpacked.lock.close()
    return unpacked.path


Finished = subprocess.CompletedProcess[str]


def files_of(cache: Path) -> set[str]:
    """What is in a cache, but for the files that are locked."""
    return {path.name for path in cache.iterdir() if path.suffix not in (qmesh.IN_USE, qmesh.UNPACKING)}


def program(*arguments: object, cache: Path, python: tuple[str, ...] = ("-I", "-S")) -> Finished:
    environ = {"HOME": str(cache / "home"), "QMESH_CACHE_DIR": str(cache), "QMESH_HOST": "127.0.0.1"}
    command = [sys.executable, *python, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environ,
        cwd=cache.parent,
        timeout=harness.COMMAND_TIMEOUT_S,
        check=False,
    )


# --- Atomic writes ---


def test_an_atomic_write_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    qmesh.write_atomically(path, b"old")
    qmesh.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    qmesh.write_atomically(path, b"old")
    with path.open("rb") as reader:
        qmesh.write_atomically(path, b"new")
        assert reader.read() == b"old"


WRITE_TOO_MUCH = """
import pathlib, resource, sys, qmesh
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    qmesh.write_atomically(pathlib.Path(sys.argv[1]), b"new" * 100)
except OSError as error:
    print(error.strerror)
"""


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT, check=False)
    assert finished.stdout == "File too large\n", finished.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"):
        qmesh.write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


# --- Packing ---


def test_the_same_things_give_the_same_bytes_whatever_their_dates(
    archive: Path, tree: build_zipapp.EngineTree, model: Path, tmp_path: Path
) -> None:
    for path in tree.root.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    build_zipapp.build(tmp_path / "again.pyz", tree, model)
    assert (tmp_path / "again.pyz").read_bytes() == archive.read_bytes()


def test_an_archive_tells_what_it_carries(model_bytes: bytes, archive: Path, tree: build_zipapp.EngineTree) -> None:
    contents = qmesh.read_contents(archive)
    assert contents is not None
    assert contents.version == qmesh.__version__
    assert contents.program == hashlib.sha256(harness.PROGRAM.read_bytes()).hexdigest()
    engine, model = contents.parts[qmesh.ENGINE], contents.parts[qmesh.MODEL]
    assert engine.about == {**tree.about, "links": {"package/lib/liba.so.0": "package/lib/liba.so"}}
    assert (model.name, model.size, model.unpacked) == ("tiny.gguf", len(model_bytes), len(model_bytes))
    data = archive.read_bytes()
    assert data[model.offset :][: model.size] == model_bytes
    packed = zipfile.ZipFile(io.BytesIO(data[engine.offset :][: engine.size]))
    assert packed.namelist() == ["llama_cpp/__init__.py", "package/__init__.py", "package/lib/liba.so", "psutil.py"]
    assert engine.unpacked == sum(info.file_size for info in packed.infolist())


def test_what_carries_nothing_says_so(tmp_path: Path) -> None:
    build_zipapp.build(tmp_path / "plain.pyz", None, None)
    contents = qmesh.read_contents(tmp_path / "plain.pyz")
    assert contents is not None
    assert contents.parts == {}


def test_an_archive_of_the_first_version_has_no_list_of_contents(tmp_path: Path) -> None:
    (tmp_path / "old.pyz").write_bytes(b"#!python\n" + qmesh.program_zip({"__main__.py": b""}))
    assert qmesh.read_contents(tmp_path / "old.pyz") is None


@pytest.mark.parametrize("listed", [b"{", b"[]", b"{}", b'{"version": "1", "program": "", "parts": {"engine": {}}}'])
def test_a_broken_list_of_contents_is_damage(tmp_path: Path, listed: bytes) -> None:
    (tmp_path / "bad.pyz").write_bytes(qmesh.program_zip({qmesh.CONTENTS_FILE: listed}))
    with pytest.raises(qmesh.DamagedArchive, match="list of contents"):
        qmesh.read_contents(tmp_path / "bad.pyz")


def test_an_archive_beyond_4_gib_starts_and_tells_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "large.pyz"
    part = qmesh.Part(qmesh.MODEL, "large.gguf", 23, 5 << 30, "0" * 64, 5 << 30, {})
    contents = qmesh.Contents("1", "", {qmesh.MODEL: part})
    members = {"__main__.py": build_zipapp.main_program({}), "qmesh.py": harness.PROGRAM.read_bytes()}
    with path.open("wb") as file:
        file.write(build_zipapp.HEAD)
        file.seek(part.size, os.SEEK_CUR)  # a hole, which takes no room
        file.write(qmesh.program_zip(members | {qmesh.CONTENTS_FILE: qmesh.dump_json(contents.to_json())}))
    assert qmesh.read_contents(path) == contents
    assert program(path, "--version", cache=tmp_path).stdout == f"qmesh {qmesh.__version__} (protocol 1)\n"


def test_the_compiled_program_is_used_by_the_python_that_built_it(archive: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(archive)!r}); import qmesh; print(qmesh.__file__)"
    assert program("-c", code, cache=tmp_path).stdout == f"{archive / 'qmesh.pyc'}\n"


# --- Unpacking ---


def test_a_model_is_unpacked_as_it_was(model_bytes: bytes, archive: Path, tmp_path: Path) -> None:
    folder = unpack(tmp_path / "cache", archive)
    assert (folder / "tiny.gguf").read_bytes() == model_bytes


def test_an_engine_is_unpacked_as_it_was_and_one_library_under_two_names_stays_one(
    archive: Path, tree: build_zipapp.EngineTree, tmp_path: Path
) -> None:
    folder = unpack(tmp_path / "cache", archive, qmesh.ENGINE)
    for path in tree.root.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(tree.root)).read_bytes() == path.read_bytes()
    lib = folder / "package" / "lib"
    assert (lib / "liba.so").samefile(lib / "liba.so.0")


def test_nobody_else_can_write_or_read_what_was_unpacked(archive: Path, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        folder = unpack(tmp_path / "cache", archive)
    finally:
        os.umask(umask)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "cache", folder)] == [0o700, 0o700]


def test_a_part_is_unpacked_once(archive: Path, tmp_path: Path) -> None:
    first = (unpack(tmp_path / "cache", archive) / "tiny.gguf").stat()
    assert (unpack(tmp_path / "cache", archive) / "tiny.gguf").stat().st_ino == first.st_ino


def test_of_many_at_once_one_unpacks_and_all_get_it(archive: Path, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: unpack(tmp_path / "cache", archive, qmesh.ENGINE), range(32)))
    assert len({path.stat().st_ino for path in found}) == 1
    assert files_of(tmp_path / "cache") == {found[0].name}


def test_another_version_of_a_part_has_a_place_of_its_own(
    model_bytes: bytes, archive: Path, model: Path, tmp_path: Path
) -> None:
    before = unpack(tmp_path / "cache", archive)
    model.write_bytes(model_bytes + b"!")
    build_zipapp.build(tmp_path / "newer.pyz", None, model)
    after = unpack(tmp_path / "cache", tmp_path / "newer.pyz")
    assert before != after
    assert [path.joinpath("tiny.gguf").read_bytes() for path in (before, after)] == [model_bytes, model_bytes + b"!"]


def test_a_sealed_copy_uses_what_the_archive_unpacked(archive: Path, tmp_path: Path) -> None:
    before = unpack(tmp_path / "cache", archive, qmesh.ENGINE)
    qmesh.seal(archive, "qmesh1-key\n", tmp_path / "sealed.pyz")
    assert unpack(tmp_path / "cache", tmp_path / "sealed.pyz", qmesh.ENGINE) == before
    assert part_of(tmp_path / "sealed.pyz", qmesh.MODEL) == part_of(archive, qmesh.MODEL)


@pytest.mark.parametrize("kind", [qmesh.ENGINE, qmesh.MODEL])
def test_a_damaged_part_is_told_and_nothing_of_it_is_kept(archive: Path, tmp_path: Path, kind: str) -> None:
    data, part = bytearray(archive.read_bytes()), part_of(archive, kind)
    data[part.offset + part.size // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(qmesh.DamagedArchive, match=f"its {kind} is not what was packed"):
        unpack(tmp_path / "cache", archive, kind)
    assert files_of(tmp_path / "cache") == set()
    with pytest.raises(qmesh.DamagedArchive):
        qmesh.check_archive(archive, qmesh.read_contents(archive))


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b""), Path.unlink], ids=["cut short", "gone"])
def test_an_unpacked_file_that_lost_something_is_unpacked_anew(archive: Path, tmp_path: Path, harm: object) -> None:
    folder = unpack(tmp_path / "cache", archive, qmesh.ENGINE)
    assert callable(harm)
    harm(folder / "package" / "lib" / "liba.so.0")
    assert unpack(tmp_path / "cache", archive, qmesh.ENGINE) == folder
    assert (folder / "package" / "lib" / "liba.so.0").read_bytes() == b"\x7fELF" * 1000


def test_what_lost_something_while_it_is_used_is_unpacked_anew_for_the_next(
    model_bytes: bytes, archive: Path, tmp_path: Path
) -> None:
    cache = qmesh.Cache(tmp_path / "cache")
    used = cache.unpack(archive, part_of(archive, qmesh.MODEL))
    (used.path / "tiny.gguf").write_bytes(b"")
    assert (unpack(cache.root, archive) / "tiny.gguf").read_bytes() == model_bytes
    used.lock.close()


def test_what_a_killed_process_left_is_removed_by_the_next(model_bytes: bytes, archive: Path, tmp_path: Path) -> None:
    cache, part = tmp_path / "cache", part_of(archive, qmesh.MODEL)
    left = cache / f".{part.folder}.x1y2z3" / "tree"
    left.mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    (left / "tiny.gguf").write_bytes(model_bytes[:100])
    unpack(cache, archive)
    assert files_of(cache) == {part.folder}


def age(folder: Path) -> None:
    """Have a part be unpacked and used last long ago."""
    long_ago = time.time() - qmesh.STALE_AFTER_S - 60
    for kind in (qmesh.IN_USE, qmesh.UNPACKING):
        os.utime(folder.with_name(folder.name + kind), (long_ago, long_ago))


def test_unpacking_removes_what_nobody_used_for_a_day_and_nothing_that_somebody_uses(
    model_bytes: bytes, archive: Path, model: Path, tmp_path: Path
) -> None:
    cache = qmesh.Cache(tmp_path / "cache")
    used = cache.unpack(archive, part_of(archive, qmesh.ENGINE))
    stale = cache.unpack(archive, part_of(archive, qmesh.MODEL))
    for unpacked in (used, stale):
        age(unpacked.path)
    stale.lock.close()
    model.write_bytes(model_bytes + b"!")
    build_zipapp.build(tmp_path / "newer.pyz", None, model)
    newer = unpack(tmp_path / "cache", tmp_path / "newer.pyz")
    used.lock.close()
    assert files_of(tmp_path / "cache") == {used.path.name, newer.name}
    assert not list((tmp_path / "cache").glob(f"{stale.path.name}*"))


def test_what_was_used_today_is_kept_though_nobody_uses_it_now(archive: Path, model: Path, tmp_path: Path) -> None:
    cache = qmesh.Cache(tmp_path / "cache")
    before = unpack(cache.root, archive)
    age(before)
    found = cache.find(part_of(archive, qmesh.MODEL))
    assert found is not None
    found.lock.close()
    unpack(cache.root, archive, qmesh.ENGINE)
    assert before.is_dir()


def test_unpacking_removes_nothing_that_is_not_its_own(archive: Path, model: Path, tmp_path: Path) -> None:
    before = unpack(tmp_path / "cache", archive)
    theirs = [tmp_path / "cache" / name for name in ("poetry.lock", "poetry", ".poetry.kept", "engine-1.lock")]
    for path in theirs:
        path.write_text("theirs")
        long_ago = time.time() - 2 * qmesh.STALE_AFTER_S
        os.utime(path, (long_ago, long_ago))
    age(before)
    unpack(tmp_path / "cache", archive, qmesh.ENGINE)
    assert not before.exists()
    assert [path.read_text() for path in theirs] == ["theirs"] * 4


def test_a_lock_is_shared_as_nfs_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has locks of bytes stand for those of files on NFS; who shares one has to be able to read."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    for shared in (True, False):
        lock = qmesh.try_lock(tmp_path / "lock", shared=shared)
        assert lock is not None
        lock.close()


def test_one_who_waits_for_another_process_gives_up_at_last(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(archive, qmesh.MODEL)
    (tmp_path / "cache").mkdir(mode=0o700)
    lock = qmesh.try_lock(tmp_path / "cache" / f"{part.folder}{qmesh.UNPACKING}")
    assert lock is not None
    with lock:
        monkeypatch.setattr(qmesh, "UNPACK_TIMEOUT_S", 0.0)
        with pytest.raises(qmesh.QMeshError, match=r"another process has been unpacking tiny\.gguf into .* too long"):
            qmesh.Cache(tmp_path / "cache").unpack(archive, part)


def test_where_files_can_have_no_second_name_they_are_copied(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "this file system knows no links")

    monkeypatch.setattr(os, "link", link)
    libraries = unpack(tmp_path / "cache", archive, qmesh.ENGINE) / "package" / "lib"
    assert (libraries / "liba.so").read_bytes() == (libraries / "liba.so.0").read_bytes()
    assert not (libraries / "liba.so").samefile(libraries / "liba.so.0")


def test_a_disk_that_knows_no_locks_is_told_in_the_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available"):
        qmesh.try_lock(tmp_path / "lock")


# --- Using what is carried ---

USE = """
import sys, qmesh
qmesh.use_carried_engine()
import llama_cpp, psutil
print(llama_cpp.__file__, psutil.__file__, flush=True)
sys.stdin.read()
"""


def user(archive: Path, cache: Path, *installed: Path, **pipes: int) -> subprocess.Popen[str]:
    """A process that uses the packages of a worker, as the archive's program finds them."""
    path = os.pathsep.join(map(str, (archive, *installed)))
    environ = {"PYTHONPATH": path, "QMESH_CACHE_DIR": str(cache), "HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-S", "-c", USE],
        env=environ,
        cwd=cache.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def used(archive: Path, cache: Path, *installed: Path) -> list[Path]:
    """Where that process found llama_cpp and psutil."""
    output, _ = user(archive, cache, *installed).communicate(timeout=harness.COMMAND_TIMEOUT_S)
    return [Path(each) for each in output.split()]


def installed(folder: Path, llama: str | None, *, psutil: bool) -> Path:
    """A folder of packages: llama-cpp-python in this version, psutil."""
    folder.mkdir()
    if llama is not None:
        (folder / "llama_cpp").mkdir()
        (folder / "llama_cpp" / "__init__.py").write_text("")
        (folder / f"llama_cpp_python-{llama}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {llama}\n"
        (folder / f"llama_cpp_python-{llama}.dist-info" / "METADATA").write_text(metadata)
    if psutil:
        (folder / "psutil.py").write_text("")
    return folder


@pytest.mark.parametrize(
    ("llama", "psutil", "are_installed"),
    [
        (None, False, [False, False]),
        (None, True, [False, False]),
        ("0.3.36", True, [True, True]),
        ("0.3.36", False, [True, False]),
        ("0.2.90", True, [False, False]),
    ],
)
def test_an_installed_llama_goes_before_the_carried_one_if_it_is_one_that_works(
    archive: Path, tmp_path: Path, llama: str | None, psutil: bool, are_installed: list[bool]
) -> None:
    packages = installed(tmp_path / "packages", llama, psutil=psutil)
    found = used(archive, tmp_path / "cache", packages)
    assert [path.is_relative_to(packages) for path in found] == are_installed
    assert (tmp_path / "cache").exists() != all(are_installed)


def test_what_a_process_uses_is_locked_until_it_ends(archive: Path, tmp_path: Path) -> None:
    process = user(archive, tmp_path / "cache")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    (lock,) = (tmp_path / "cache").glob(f"*{qmesh.IN_USE}")
    assert qmesh.try_lock(lock) is None
    process.stdin.close()
    assert process.wait(harness.COMMAND_TIMEOUT_S) == 0
    process.stdout.close()
    freed = qmesh.try_lock(lock)
    assert freed is not None
    freed.close()


@pytest.fixture
def running(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive, as if this process ran from it."""
    monkeypatch.setattr(qmesh, "__file__", str(archive / "qmesh.py"))
    monkeypatch.setenv("QMESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(qmesh, "model_dirs", lambda: [tmp_path])
    forget = qmesh.carried.cache_clear, qmesh.unpacked_part.cache_clear
    for each in forget:
        each()
    yield archive
    for each in forget:
        each()


def test_the_carried_model_is_taken_by_its_name_and_where_none_is_named_but_not_where_another_is(
    running: Path, model: Path, model_bytes: bytes, tmp_path: Path
) -> None:
    other = model.rename(tmp_path / "other.gguf")
    assert [qmesh.choose_model(wanted) for wanted in ("other", str(other))] == [other, other]
    assert not (tmp_path / "cache").exists()
    (found,) = {qmesh.choose_model(wanted) for wanted in (None, "tiny", "TINY.gguf")}
    assert found.is_relative_to(tmp_path / "cache")
    assert found.read_bytes() == model_bytes


def test_one_who_names_a_model_that_is_not_there_is_told_of_the_carried_one_too(
    running: Path, model: Path, tmp_path: Path
) -> None:
    model.rename(tmp_path / "other.gguf")
    told = "there is no model file nosuch; models here: tiny (in this archive), other"
    with pytest.raises(qmesh.ModelNotFound, match=re.escape(told)):
        qmesh.choose_model("nosuch")
    assert not (tmp_path / "cache").exists()


def test_models_tells_of_a_carried_model_without_unpacking_it(
    archive: Path, model_bytes: bytes, tmp_path: Path
) -> None:
    listed = json.loads(program(archive, "models", "--json", cache=tmp_path / "cache").stdout)
    assert [(each["size"], each["path"]) for each in listed["models"]] == [(len(model_bytes), str(archive))]
    assert not (tmp_path / "cache").exists()


# --- Places ---


def test_the_places_are_the_platforms_and_a_temporary_one_unless_one_is_set(tmp_path: Path) -> None:
    assert [*qmesh.cache_places({"QMESH_CACHE_DIR": str(tmp_path)})] == [tmp_path]
    first, second = qmesh.cache_places({"HOME": str(tmp_path)})
    assert first.is_relative_to(tmp_path)
    assert not second.is_relative_to(tmp_path)
    assert next(qmesh.cache_places({"HOME": "/h", "XDG_CACHE_HOME": "/c"})) == (
        Path("/c/qmesh") if sys.platform == "linux" else first
    )


@pytest.mark.parametrize(
    ("system", "environ", "place"),
    [
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/qmesh"),
        ("win32", {"HOME": "/h", "LOCALAPPDATA": "/l"}, r"/l/qmesh\cache"),
        ("win32", {"USERPROFILE": "/h"}, r"/h/AppData/Local/qmesh\cache"),
    ],
)
def test_each_platform_has_a_place_of_its_own_for_caches(
    monkeypatch: pytest.MonkeyPatch, system: str, environ: dict[str, str], place: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert next(qmesh.cache_places(environ)) == Path(place)


def test_without_owners_of_files_a_temporary_place_has_to_be_within_ones_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert [*qmesh.cache_places({"HOME": str(tmp_path)})][1:] == [tmp_path / "temporary" / "qmesh"]
    assert [*qmesh.cache_places({"HOME": str(tmp_path / "home")})][1:] == []


def test_where_no_place_can_be_used_nothing_is_unpacked(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"QMESH_CACHE_DIR": str(tmp_path / "file")}
    part = part_of(archive, qmesh.MODEL)
    assert not qmesh.is_unpacked(part, places)
    with pytest.raises(qmesh.UsageError, match="name another folder in QMESH_CACHE_DIR"):
        qmesh.unpack(archive, part, places)


def test_where_the_first_place_cannot_be_used_the_next_one_is(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home").write_text("no folder")
    unpacked = qmesh.unpack(archive, part_of(archive, qmesh.MODEL), {"HOME": str(tmp_path / "home")})
    unpacked.lock.close()
    assert unpacked.path.parent == tmp_path / f"qmesh-{os.getuid()}"
    assert qmesh.is_unpacked(part_of(archive, qmesh.MODEL), {"HOME": str(tmp_path / "home")})


def test_the_temporary_place_is_left_as_soon_as_the_usual_one_can_be_used(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").write_text("no folder")
    qmesh.unpack(archive, part_of(archive, qmesh.MODEL), home).lock.close()
    (tmp_path / "home").unlink()
    assert not qmesh.is_unpacked(part_of(archive, qmesh.MODEL), home)
    unpacked = qmesh.unpack(archive, part_of(archive, qmesh.MODEL), home)
    unpacked.lock.close()
    assert unpacked.path.is_relative_to(tmp_path / "home")


def test_a_place_that_others_can_write_is_not_used(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(
        qmesh.UsageError, match=r"shared \(others own it, or can write there\); name another .* QMESH_CACHE_DIR"
    ):
        qmesh.unpack(archive, part_of(archive, qmesh.MODEL), {"QMESH_CACHE_DIR": str(tmp_path / "shared")})


def test_a_link_of_ones_own_to_another_disk_is_followed(model_bytes: bytes, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    assert (unpack(tmp_path / "cache", archive) / "tiny.gguf").read_bytes() == model_bytes


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another's link")
def test_a_link_that_some_other_user_laid_is_not_followed(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "laid").symlink_to(tmp_path / "mine")
    os.chown(tmp_path / "laid", 12345, 12345, follow_symlinks=False)
    with pytest.raises(qmesh.UsageError, match="laid"):
        qmesh.unpack(archive, part_of(archive, qmesh.MODEL), {"QMESH_CACHE_DIR": str(tmp_path / "laid")})
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_home_is_enough_where_no_temporary_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert len([*qmesh.cache_places({"HOME": str(tmp_path)})]) == 1


def test_a_cache_of_a_user_that_does_not_exist_is_told(archive: Path) -> None:
    with pytest.raises(qmesh.UsageError, match="QMESH_CACHE_DIR=~nobody-at-all/x: "):
        qmesh.unpack(archive, part_of(archive, qmesh.MODEL), {"QMESH_CACHE_DIR": "~nobody-at-all/x"})


def test_a_model_needs_its_room_once(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(archive, qmesh.MODEL)
    room = shutil.disk_usage(tmp_path)._replace(free=part.size + qmesh.SPARE_BYTES)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    unpack(tmp_path / "cache", archive)
    room = room._replace(free=room.free - 1)
    with pytest.raises(OSError, match="full: "):
        unpack(tmp_path / "another", archive)


def test_too_little_room_is_told_before_anything_is_written(archive: Path, tmp_path: Path) -> None:
    part = part_of(archive, qmesh.MODEL)
    large = qmesh.Part(part.kind, part.name, part.offset, part.size, part.sha256, 1 << 60, {})
    with pytest.raises(qmesh.UsageError, match=r"full: 1152921504\.7 GB are needed.*QMESH_CACHE_DIR"):
        qmesh.unpack(archive, large, {"QMESH_CACHE_DIR": str(tmp_path / "cache")})


# --- Telling ---


def test_version_tells_file_contents_hash_and_mesh(model_bytes: bytes, archive: Path, tmp_path: Path) -> None:
    finished = program(archive, "version", cache=tmp_path / "cache")
    assert finished.stdout.splitlines()[:2] == [
        f"qmesh {qmesh.__version__} (protocol 1)",
        f"file      {archive}, {archive.stat().st_size / 1e6:.0f} MB",
    ]
    for line in (
        f"SHA-256   {hashlib.sha256(archive.read_bytes()).hexdigest()}",
        f"engine    for {qmesh.system_tag()}-{qmesh.python_tag()}: package 1",
        f"model     tiny.gguf, {len(model_bytes) / 1e6:.0f} MB",
        "mesh      open mesh 'qmesh-inference'",
    ):
        assert line in finished.stdout.splitlines()
    assert not (tmp_path / "cache").exists()  # nothing had to be unpacked


def test_version_tells_damage(archive: Path, tmp_path: Path) -> None:
    data, part = bytearray(archive.read_bytes()), part_of(archive, qmesh.MODEL)
    data[part.offset] ^= 1
    archive.write_bytes(data)
    finished = program(archive, "version", "--json", cache=tmp_path)
    assert finished.returncode == 1
    assert '"code":"damaged_archive"' in finished.stdout.replace(" ", "")
    assert "Copy it to this machine once more" in finished.stderr


def test_a_whole_archive_has_the_hash_of_its_file_and_one_with_another_program_is_none(archive: Path) -> None:
    contents = qmesh.read_contents(archive)
    assert contents is not None
    assert qmesh.check_archive(archive, contents) == hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(qmesh.DamagedArchive, match="its program is not what was packed"):
        qmesh.check_archive(archive, replace(contents, program="0" * 64))


@pytest.mark.parametrize("member", ["qmesh.py", "qmesh.pyc", "__main__.py"])
def test_damage_to_the_program_itself_is_told_by_version_and_seal(archive: Path, tmp_path: Path, member: str) -> None:
    with zipfile.ZipFile(archive) as members:
        info = members.getinfo(member)
    data = bytearray(archive.read_bytes())
    data[info.header_offset + 30 + len(member) + info.file_size - 3] ^= 0x20
    archive.write_bytes(data)
    with pytest.raises(qmesh.DamagedArchive, match="is damaged: its program"):
        qmesh.check_archive(archive, qmesh.read_contents(archive))
    with pytest.raises(qmesh.DamagedArchive, match="is damaged: its program"):
        qmesh.seal(archive, "key", tmp_path / "sealed.pyz")
    assert not (tmp_path / "sealed.pyz").exists()
    if member != "__main__.py":
        finished = program(archive, "--version", cache=tmp_path)
        assert (finished.returncode, finished.stdout) == (1, "")
        assert finished.stderr == f"error: {archive} is damaged: copy it to this machine again\n"


def test_an_older_python_is_told_which_is_needed(archive: Path) -> None:
    with zipfile.ZipFile(archive) as members:
        main = members.read("__main__.py").decode()
    old = "import sys\nsys.version_info, sys.version = (3, 8, 1), '3.8.1 (default)'\n"
    finished = subprocess.run([sys.executable, "-c", old + main], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr == f"error: QMesh needs Python 3.11 or newer, and this is 3.8.1, {sys.executable}\n"
    ast.parse(main, feature_version=(3, 4))  # so far back that nobody has it any more


def test_version_of_a_source_file_tells_that_file(tmp_path: Path) -> None:
    finished = program(harness.PROGRAM, "version", cache=tmp_path)
    assert f"file      {harness.PROGRAM}" in finished.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--engine", "--wheels", "."], "there is no wheel of llama-cpp-python in ."),
        (["--wheels", "."], "--wheels are for an engine: add --engine"),
        (
            ["--model", "tiny.gguf", "-o", "tiny.gguf"],
            "tiny.gguf is there, and is no archive",
        ),
        (["-o", "folder"], "folder is there, and is no archive"),
        (["--model", "nothing.gguf"], "nothing.gguf"),
        (["--list", "tiny.gguf"], "its list of contents cannot be read"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_built(
    model: Path, model_bytes: bytes, arguments: list[str], why: str
) -> None:
    (model.parent / "folder").mkdir()
    finished = subprocess.run(
        [sys.executable, harness.ROOT / "build_zipapp.py", *arguments],
        cwd=model.parent,
        capture_output=True,
        text=True,
        timeout=harness.COMMAND_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode in (1, 2)
    assert why in finished.stderr
    assert "Traceback" not in finished.stderr
    assert model.read_bytes() == model_bytes


def test_listing_tells_every_file_that_is_inside(model_bytes: bytes, archive: Path, tmp_path: Path) -> None:
    finished = program(harness.ROOT / "build_zipapp.py", "--list", archive, cache=tmp_path, python=())
    names = [line.split()[1] for line in finished.stdout.splitlines() if not line.endswith(":") and "SHA" not in line]
    assert finished.returncode == 0, finished.stderr
    assert {"psutil.py", "package/lib/liba.so", "qmesh.py", "__main__.py", "contents.json"} <= {*names}
    assert "     same file package/lib/liba.so.0 as package/lib/liba.so" in finished.stdout
    assert f"model: tiny.gguf, {len(model_bytes):,} bytes" in finished.stdout
