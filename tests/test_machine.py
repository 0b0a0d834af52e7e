"""This machine: one identity per host and instance, files that survive damage, and figures of this machine."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest

import qmesh
from qmesh import NodeId, Settings, StateDirectory, SystemMonitor, UsageError

LAB = ("10.0.0.1", 47475)
HOME = ("192.168.1.7", 4000)
LINK = ("fe80::1%eth0", 47475)

HERE = qmesh.Platform("linux-x86_64", "cp311", "2.36", "A Processor", frozenset(qmesh.X86_FEATURES))
ENGINE: dict[str, Any] = {
    "platform": "linux-x86_64",
    "python": "cp311",
    "glibc": "2.34",
    "cpu": ["popcnt", "sse4_2"],
    "packages": {"numpy": "2.4.6"},
}

# Claims an instance in a process of its own, says which, and holds it until it is ended.
HOLDER = """
import sys, qmesh
from pathlib import Path
state = qmesh.StateDirectory.claim(Path(sys.argv[1]))
print(state.path.name, state.node_key().node_id, flush=True)
sys.stdin.read()
"""


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux tells it")
on_glibc = pytest.mark.skipif(
    qmesh.system_tag() != "linux-x86_64" or qmesh.glibc_version() is None, reason="glibc tells of x86-64 processors"
)


def run_python(code: str, *arguments: object) -> str:
    """What the code prints in a process of its own; it must succeed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


# --- Where state is kept ---


@pytest.mark.parametrize(
    ("system", "environ", "expected"),
    [
        ("linux", {"HOME": "/home/a"}, "/home/a/.local/state/qmesh"),
        ("linux", {"HOME": "/home/a", "XDG_STATE_HOME": ""}, "/home/a/.local/state/qmesh"),
        ("linux", {"HOME": "/home/a", "XDG_STATE_HOME": "/state"}, "/state/qmesh"),
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state/qmesh"),
        ("freebsd14", {"HOME": "/home/a"}, "/home/a/.local/state/qmesh"),
        ("darwin", {"HOME": "/Users/a"}, "/Users/a/Library/Application Support/qmesh"),
        ("darwin", {"HOME": "/Users/a", "XDG_STATE_HOME": "/x"}, "/Users/a/Library/Application Support/qmesh"),
        ("win32", {"USERPROFILE": "/Users/a", "LOCALAPPDATA": "/Local"}, "/Local/qmesh"),
        ("win32", {"USERPROFILE": "/Users/a"}, "/Users/a/AppData/Local/qmesh"),
        ("win32", {"HOME": "/git", "LOCALAPPDATA": "/Local"}, "/Local/qmesh"),
    ],
)
def test_each_platform_has_its_own_place_for_state(
    monkeypatch: pytest.MonkeyPatch, system: str, environ: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert qmesh.default_state_dir(environ) == Path(expected)


@pytest.mark.parametrize(
    ("host", "folder"),
    [
        ("lab-3", "lab-3"),
        ("lab-3.example.org", "lab-3.example.org"),
        ("büro 1", "b_ro_1"),
        ("../etc", "_etc"),
        ("a/b\\c", "a_b_c"),
        ("..", "localhost"),
        ("", "localhost"),
        (".hidden", "hidden"),
        ("nul\0", "nul_"),
    ],
)
def test_state_belongs_to_a_host_whose_name_cannot_lead_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, folder: str
) -> None:
    monkeypatch.setattr("platform.node", lambda: host)
    assert qmesh.host_state_dir(str(tmp_path), {}) == tmp_path / folder


def test_the_platform_decides_where_no_state_directory_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "lab-3")
    monkeypatch.setattr(sys, "platform", "linux")
    assert qmesh.host_state_dir(None, {"XDG_STATE_HOME": "/state"}) == Path("/state/qmesh/lab-3")


# --- Instances and their ids ---


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Callable[[], StateDirectory]]:
    """Claims an instance of this test's host directory; all are released at the end."""
    claimed: list[StateDirectory] = []

    def claim() -> StateDirectory:
        claimed.append(StateDirectory.claim(tmp_path / "host"))
        return claimed[-1]

    yield claim
    for state in claimed:
        state.release()


def test_two_instances_have_two_directories_and_two_ids(claim: Callable[[], StateDirectory]) -> None:
    first, second = claim(), claim()
    assert first.path != second.path
    assert first.node_key().node_id != second.node_key().node_id


def test_an_instance_makes_its_key_once_and_keeps_it(claim: Callable[[], StateDirectory]) -> None:
    first = claim()
    key = first.node_key()
    written = (first.path / "node.key").read_bytes()
    assert first.node_key() == key
    first.release()
    again = claim()
    assert (again.path, again.node_key()) == (first.path, key)
    assert (first.path / "node.key").read_bytes() == written


def test_the_key_is_pem_as_openssl_writes_it(claim: Callable[[], StateDirectory]) -> None:
    state = claim()
    key = state.node_key()
    head, body, end = (state.path / "node.key").read_text("ascii").splitlines()
    assert (head, end) == ("-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----")
    assert base64.b64decode(body).endswith(key.seed)


def test_the_id_stands_in_a_file_that_people_can_read(claim: Callable[[], StateDirectory]) -> None:
    state = claim()
    worker_id = state.node_key().node_id
    assert (state.path / "worker-id.txt").read_text("ascii") == f"{worker_id}\n"


@pytest.mark.parametrize("told", [b"", b"00ff", b"a" * 64 + b"\n", b"\xff" * 64, None])
def test_the_file_with_the_id_follows_the_key(claim: Callable[[], StateDirectory], told: bytes | None) -> None:
    """It may be older than keys are, or have been edited: what it says is nobody's id."""
    state = claim()
    key = state.node_key()
    if told is None:
        (state.path / "worker-id.txt").unlink()
    else:
        (state.path / "worker-id.txt").write_bytes(told)
    assert state.node_key() == key
    assert (state.path / "worker-id.txt").read_text("ascii") == f"{key.node_id}\n"
    assert not (state.path / "worker-id.txt.unusable").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_its_user_can_read_a_key_whatever_the_umask(claim: Callable[[], StateDirectory], umask: int) -> None:
    state = claim()
    before = os.umask(umask)
    try:
        state.node_key()
    finally:
        os.umask(before)
    assert (state.path / "node.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o666, 0o640, 0o400])
def test_a_key_that_was_opened_to_others_is_shut_again(claim: Callable[[], StateDirectory], mode: int) -> None:
    state = claim()
    key = state.node_key()
    (state.path / "node.key").chmod(mode)
    assert state.node_key() == key
    assert (state.path / "node.key").stat().st_mode & 0o777 == 0o600


def test_a_released_instance_is_taken_before_a_new_one(claim: Callable[[], StateDirectory]) -> None:
    first, second = claim(), claim()
    first.release()
    assert claim().path == first.path
    assert claim().path not in (first.path, second.path)


def test_another_process_gets_another_instance_and_its_death_frees_it(claim: Callable[[], StateDirectory]) -> None:
    own = claim()
    command = [sys.executable, "-c", HOLDER, str(own.path.parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=harness.ROOT
    ) as holder:
        try:
            assert holder.stdout is not None
            name, other_id = holder.stdout.readline().split()
            third = claim()
        finally:
            holder.kill()
    assert len({own.path.name, name, third.path.name}) == 3
    assert len({str(own.node_key().node_id), other_id, str(third.node_key().node_id)}) == 3
    successor = claim()
    assert (successor.path.name, str(successor.node_key().node_id)) == (name, other_id)


def test_there_is_an_end_to_the_instances_of_one_machine(
    monkeypatch: pytest.MonkeyPatch, claim: Callable[[], StateDirectory]
) -> None:
    monkeypatch.setattr(qmesh, "MAX_INSTANCES", 2)
    claim(), claim()
    with pytest.raises(UsageError, match="2 workers run on this machine already"):
        claim()


def test_a_folder_copied_to_another_host_makes_another_identity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def identity(root: Path, host: str) -> NodeId:
        monkeypatch.setattr("platform.node", lambda: host)
        state = StateDirectory.claim(qmesh.host_state_dir(str(root), {}))
        try:
            return state.node_key().node_id
        finally:
            state.release()

    original = identity(tmp_path / "a", "lab-1")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identity(tmp_path / "b", "lab-2") != original
    assert identity(tmp_path / "a", "lab-1") == original


KEY = qmesh.NodeKey.of_seed(bytes(range(32)))
RSA = qmesh.pem("PRIVATE KEY", bytes.fromhex("300d06092a864886f70d0101010500") + bytes(100))
X25519 = KEY.pem.replace("K2VwBCI", "K2VuBCI")  # the object id ends in 110, not 112
DAMAGED_KEYS = {
    "empty": b"",
    "a blank line": b"\n",
    "garbage": b"\xff" * 64,
    "zeros": bytes(64),
    "an id": b"0" * 64,
    "cut off": KEY.pem.encode()[:70],
    "a line cut off": KEY.pem.encode()[:-30],
    "without its frame": KEY.pem.encode().splitlines()[1],
    "another letter": KEY.pem.encode().replace(b"MC4", b"M!4"),
    "too short": qmesh.pem("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420") + bytes(31)).encode(),
    "too long": qmesh.pem("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420") + bytes(33)).encode(),
    "RSA": RSA.encode(),
    "X25519": X25519.encode(),
    "a certificate": qmesh.pem("CERTIFICATE", bytes(100)).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED_KEYS)
def test_a_damaged_key_is_kept_aside_renewed_and_spoken_of(
    claim: Callable[[], StateDirectory], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    state, damage = claim(), DAMAGED_KEYS[kind]
    assert damage != KEY.pem.encode()
    path = state.path / "node.key"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING, "qmesh"):
        renewed = state.node_key()
    assert (state.path / "node.key.unusable").read_bytes() == damage
    assert f"{path} holds no Ed25519 key: kept as node.key.unusable and renewed" in caplog.text
    assert damage.decode("latin-1").strip() == "" or damage.decode("latin-1").strip() not in caplog.text
    assert state.node_key() == renewed != KEY
    assert (state.path / "worker-id.txt").read_text("ascii") == f"{renewed.node_id}\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_no_file_is_kept_aside_and_renewed(
    claim: Callable[[], StateDirectory], caplog: pytest.LogCaptureFixture
) -> None:
    state = claim()
    (state.path / "node.key").mkdir()
    renewed = state.node_key()
    assert (state.path / "node.key.unusable").is_dir()
    assert state.node_key() == renewed
    assert str(state.path / "node.key") in caplog.text


def test_blanks_around_a_key_do_no_harm(claim: Callable[[], StateDirectory], caplog: pytest.LogCaptureFixture) -> None:
    state = claim()
    (state.path / "node.key").write_bytes(b"\r\n" + KEY.pem.replace("\n", "\r\n").encode() + b"\r\n\n")
    assert state.node_key() == KEY
    assert not caplog.records


# Nobody (65534) may not read what is another's; a test that runs as root becomes nobody first.
READ_FORBIDDEN = """
import os, qmesh, sys
from pathlib import Path
os.chdir(sys.argv[1])
key = qmesh.NodeKey.of_seed(bytes(32))
Path("node.key").write_text(key.pem)
Path("node.key").chmod(0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    print(qmesh.StateDirectory(Path()).node_key() != key or os.stat("node.key").st_uid == os.getuid())
except qmesh.UsageError as error:
    print("--state-dir" in str(error))
"""


def test_a_key_that_may_not_be_read_is_mended_or_refused_with_the_flag_that_mends_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert run_python(READ_FORBIDDEN, tmp_path).splitlines()[:1] == ["True"]


# --- Places that cannot be written ---


def test_a_state_directory_below_a_file_is_refused_with_the_flag_that_mends_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="--state-dir") as caught:
        StateDirectory.claim(tmp_path / "file" / "host")
    assert str(tmp_path / "file" / "host") in str(caught.value)


def test_a_file_in_an_instances_place_is_refused_with_the_flag_that_mends_it(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("in the way")
    with pytest.raises(UsageError, match="--state-dir"):
        StateDirectory.claim(tmp_path)


def test_a_key_that_cannot_be_written_is_refused_with_the_flag_that_mends_it(
    claim: Callable[[], StateDirectory],
) -> None:
    state = claim()
    shutil.rmtree(state.path)
    with pytest.raises(UsageError, match="--state-dir"):
        state.node_key()


# As READ_FORBIDDEN: nobody may write in what is another's.
WRITE_FORBIDDEN = """
import os, qmesh, sys
from pathlib import Path
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)
else:
    os.chmod(".", 0o555)
try:
    print(qmesh.StateDirectory(Path()).node_key())
except qmesh.UsageError as error:
    print("--state-dir" in str(error), "Permission denied" in str(error))
"""


def test_a_directory_that_is_read_only_is_refused_with_the_flag_that_mends_it() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own are shut to nobody altogether
        place = Path(name)
        place.chmod(0o755)
        try:
            assert run_python(WRITE_FORBIDDEN, place) == "True True\n"
            assert list(place.iterdir()) == []
        finally:
            place.chmod(0o755)


# --- The mesh's key ---

NEW = qmesh.MeshKey(bytes(range(32)))
OLD = qmesh.MeshKey(bytes(range(1, 33)))
TODAY = datetime.date(2026, 3, 1)


def told(key: object) -> Settings:
    return Settings(topic="tests", key=str(key))


def key_file(tmp_path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "lab.key"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def until(day: datetime.date) -> str:
    return f"{OLD.text} until {day.isoformat()}"


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> datetime.date:
    monkeypatch.setattr(qmesh, "utc_today", lambda: TODAY)
    return TODAY


def test_without_a_key_a_source_tree_is_of_the_open_mesh() -> None:
    assert qmesh.read_keys(Settings(topic="tests")) == ()
    assert qmesh.read_mesh_keys(Settings(topic="tests")) == (qmesh.MeshKeys.derive("tests"),)


@pytest.mark.parametrize(
    "content",
    [
        NEW.text,
        f"{NEW.text}\n",
        f"  {NEW.text.upper()}\r\n\r\n",
        f"# of lab 3\n\n{NEW.text}  # made in March\n",
        f"# für Labor 3\n{NEW.text}\n",
    ],
)
def test_a_key_is_read_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    path = key_file(tmp_path, content)
    assert qmesh.read_keys(told(path)) == (NEW,)
    assert qmesh.read_mesh_keys(told(path)) == (qmesh.MeshKeys.derive("tests", NEW),)
    assert not caplog.records


def test_the_mark_that_windows_puts_before_a_text_does_no_harm(tmp_path: Path) -> None:
    assert qmesh.read_keys(told(key_file(tmp_path, b"\xef\xbb\xbf" + NEW.text.encode()))) == (NEW,)


def test_the_variable_holds_a_key_or_the_path_of_its_file(tmp_path: Path) -> None:
    for value in (NEW.text, NEW.text.upper(), f" {NEW.text}\n", str(key_file(tmp_path, NEW.text))):
        assert qmesh.read_keys(Settings.resolve({}, {"QMESH_KEY": value})) == (NEW,)
    both = Settings.resolve({}, {"QMESH_KEY": f"{NEW.text}\n{until(TODAY)}"})
    assert qmesh.read_keys(both) == (NEW, dataclasses.replace(OLD, until=TODAY))


def test_a_topic_of_its_own_makes_another_mesh_of_the_same_key(tmp_path: Path) -> None:
    path = key_file(tmp_path, NEW.text)
    (one,) = qmesh.read_mesh_keys(Settings(topic="one", key=str(path)))
    (other,) = qmesh.read_mesh_keys(Settings(topic="other", key=str(path)))
    assert (one.name, other.name) == ("one", "other")
    assert one.topic != other.topic
    assert one.fingerprint == other.fingerprint != qmesh.OPEN_MESH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "there is no mesh key in it"),
        (b"# nothing but words\n", "there is no mesh key in it"),
        (b"SECRET", "line 1: a mesh key is"),
        (b"\xff\xfe\x00SECRET", "line 1: a mesh key is"),
        (b"\n\nSECRET", "line 3: a mesh key is"),
        (NEW.text.encode()[:-1], "line 1: a mesh key is"),
        (NEW.text.encode() + b"a", "line 1: a mesh key is"),
        (f"{NEW.text} {OLD.text}".encode(), 'line 1: behind a key that is being replaced stands "until YYYY-MM-DD"'),
        (f"{NEW.text}\n{OLD.text}".encode(), "each key after it needs one"),
        (f"{OLD.text} until 2026-01-01".encode(), "the first key is the one in force"),
        (f"{NEW.text}\n{OLD.text} until soon".encode(), 'line 2: behind a key that is being replaced stands "until'),
        (f"{NEW.text}\n{OLD.text} until 2026-02-30".encode(), "line 2: "),
        (f"{NEW.text}\n{NEW.text} until 2026-01-01".encode(), "at most 4 keys, each another"),
        (b"#" * (qmesh.MAX_KEY_FILE_BYTES + 1), "it has more than 4,096 bytes"),
        (NEW.text.encode() + bytes(10_000), "it has more than 4,096 bytes"),
    ],
)
def test_what_is_no_key_file_is_named_with_what_is_wrong_and_never_with_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, said: str
) -> None:
    path = key_file(tmp_path, content)
    with caplog.at_level(logging.DEBUG, "qmesh"), pytest.raises(UsageError) as caught:
        qmesh.read_mesh_keys(told(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    for secret in ("SECRET", NEW.text[7:20], OLD.text[7:20], "##"):
        assert secret not in str(caught.value) + caplog.text


def test_a_key_file_at_its_limit_is_taken(tmp_path: Path) -> None:
    words = "#" * (qmesh.MAX_KEY_FILE_BYTES - len(NEW.text) - 1)
    assert qmesh.read_keys(told(key_file(tmp_path, f"{NEW.text}\n{words}"))) == (NEW,)


@pytest.mark.parametrize("name", ["missing.key", ".", "file/lab.key"])
def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    with pytest.raises(UsageError, match=r"the key file .* cannot be read") as caught:
        qmesh.read_mesh_keys(told(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [NEW.text[:-1], NEW.text + "a", f"{NEW.text} until 2026-01-01", f"{NEW.text},x"])
def test_a_variable_that_holds_no_key_is_named_without_it(value: str) -> None:
    with pytest.raises(UsageError, match=r"^the mesh key in QMESH_KEY: ") as caught:
        qmesh.read_mesh_keys(Settings.resolve({}, {"QMESH_KEY": value}))
    assert NEW.text[7:20] not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_file_that_others_can_read_is_spoken_of_with_what_shuts_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = key_file(tmp_path, NEW.text, mode)
    assert qmesh.read_keys(told(path)) == (NEW,)
    warning = f"other users of this machine can read the mesh's key: chmod go= {path}"
    assert [record.message for record in caplog.records] == [warning] * warned
    assert NEW.text[7:20] not in caplog.text


def test_a_key_that_comes_through_a_pipe_is_read_and_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    """As a shell gives it: --key <(pass lab)."""
    ours, theirs = os.pipe()
    os.write(theirs, NEW.text.encode())
    os.close(theirs)
    try:
        assert qmesh.read_keys(told(f"/dev/fd/{ours}")) == (NEW,)
    finally:
        os.close(ours)
    assert not caplog.records


DAY = datetime.timedelta(days=1)


@pytest.mark.parametrize(("age", "counts"), [(-DAY, False), (0 * DAY, True), (DAY, True)])
def test_an_old_key_counts_to_the_end_of_its_last_day(
    tmp_path: Path, today: datetime.date, age: datetime.timedelta, counts: bool
) -> None:
    path = key_file(tmp_path, f"{NEW.text}\n{until(today + age)}\n")
    old = dataclasses.replace(OLD, until=today + age)
    assert qmesh.read_keys(told(path)) == (NEW, old)
    expected = [qmesh.MeshKeys.derive("tests", key) for key in (NEW, old)]
    assert [qmesh.in_force(keys) for keys in expected] == [True, counts]
    assert qmesh.read_mesh_keys(told(path)) == tuple(expected[: 1 + counts])  # the one in force first


def test_today_is_the_day_at_greenwich() -> None:
    assert abs(qmesh.utc_today() - datetime.datetime.now(datetime.UTC).date()) <= DAY


def sealed(path: Path, members: dict[str, bytes]) -> Path:
    """An archive with a program of some size, that only its owner can read."""
    path.write_bytes(qmesh.program_zip({"qmesh.py": bytes(qmesh.MAX_KEY_FILE_BYTES)} | members))
    path.chmod(0o600)
    return path


def test_the_key_of_a_sealed_archive_is_read_as_that_of_a_file_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = qmesh.MeshKey(bytes(range(32)))
    archive = sealed(tmp_path / "lab.pyz", {qmesh.SEALED_KEY_FILE: key.text.encode()})
    assert qmesh.read_keys(Settings(key=str(archive))) == (key,)
    assert caplog.text == ""
    with pytest.raises(UsageError, match="there is no mesh key in it"):
        qmesh.read_keys(Settings(key=str(sealed(tmp_path / "open.pyz", {}))))


@pytest.mark.parametrize(
    ("members", "is_sealed"), [({"qmesh.py": b""}, False), ({qmesh.SEALED_KEY_FILE: b""}, True), (None, True)]
)
def test_an_archive_with_a_key_and_what_is_none_may_not_be_handed_out(
    tmp_path: Path, members: dict[str, bytes] | None, is_sealed: bool
) -> None:
    (tmp_path / "file").write_bytes(b"no archive" if members is None else qmesh.program_zip(members))
    with (tmp_path / "file").open("rb") as file:
        assert qmesh.is_sealed(file) == is_sealed
        assert file.tell() == 0


# --- Files for a moment ---


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where temporary files are made."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_a_private_file_can_be_read_by_this_user_alone_and_is_gone_afterwards(temporary: Path) -> None:
    before = os.umask(0)
    try:
        with qmesh.private_file("secret") as name:
            assert list(temporary.iterdir()) == [Path(name)]
            assert Path(name).read_text("ascii") == "secret"
            assert Path(name).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_private_file_is_gone_also_when_its_use_fails(temporary: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), qmesh.private_file("secret"):
        raise failure
    assert list(temporary.iterdir()) == []


@on_linux
def test_a_private_file_that_does_not_fit_is_gone_and_spoken_of(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / "begun").touch()
    monkeypatch.setattr(tempfile, "mkstemp", lambda prefix: (os.open("/dev/full", os.O_WRONLY), temporary / "begun"))
    with pytest.raises(qmesh.QMeshError, match=r"No space left on device.*TMPDIR"), qmesh.private_file("secret"):
        pass
    assert list(temporary.iterdir()) == []


def test_a_private_file_that_somebody_else_removed_is_no_error(temporary: Path) -> None:
    with qmesh.private_file("secret") as name:
        Path(name).unlink()
    assert list(temporary.iterdir()) == []


def test_where_no_temporary_file_can_be_made_it_says_which_variable_names_a_place(temporary: Path) -> None:
    temporary.rmdir()
    with pytest.raises(qmesh.QMeshError, match=r"No such file or directory.*TMPDIR"), qmesh.private_file("secret"):
        pass


def test_clients_remember_nothing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    state = StateDirectory.of_client(tmp_path / "file")
    state.remember([LAB])
    assert state.peers() == []
    assert qmesh.remembered_peers(tmp_path / "file") == []


# --- Remembered peers ---


def addresses(count: int, start: int = 0) -> list[qmesh.Address]:
    return [(f"10.0.{number // 250}.{number % 250}", 1 + number) for number in range(start, start + count)]


def test_peers_are_remembered_in_their_order(claim: Callable[[], StateDirectory]) -> None:
    state = claim()
    state.remember([LAB, LINK, HOME])
    assert state.peers() == [LAB, LINK, HOME]
    state.remember([HOME])
    assert state.peers() == [HOME]


def test_an_instance_that_met_nobody_remembers_nobody(
    claim: Callable[[], StateDirectory], caplog: pytest.LogCaptureFixture
) -> None:
    assert claim().peers() == []
    assert not caplog.records


def test_only_so_many_peers_are_remembered(claim: Callable[[], StateDirectory]) -> None:
    state = claim()
    state.remember(addresses(1000))
    assert state.peers() == addresses(qmesh.MAX_REMEMBERED_PEERS)
    assert len(json.loads((state.path / "peers.json").read_bytes())) == qmesh.MAX_REMEMBERED_PEERS


def test_only_so_many_peers_are_read(claim: Callable[[], StateDirectory]) -> None:
    state = claim()
    lines = [f'"{host}:{port}"' for host, port in addresses(1000)]
    (state.path / "peers.json").write_text(f"[{', '.join(lines)}]")
    assert state.peers() == addresses(qmesh.MAX_REMEMBERED_PEERS)


DAMAGED_PEERS = [
    b"",
    b"{",
    b"null",
    b"7",
    b"[7]",
    b"[null]",
    b'"10.0.0.1:1"',
    b'["10.0.0.1"]',
    b'["10.0.0.1:0"]',
    b'["10.0.0.1:65536"]',
    b'["host:80"]',
    b'["10.0.0.1:1", "::"]',
    b'[["10.0.0.1", 1]]',
    b'["\\ud800:1"]',
    b"\xff\xfe",
    b"9" * 5000,
    b"[" * 100_000,
]


@pytest.mark.parametrize("damage", DAMAGED_PEERS, ids=lambda damage: repr(damage[:20]))
def test_damaged_peers_are_kept_aside_forgotten_and_spoken_of(
    claim: Callable[[], StateDirectory], caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    state = claim()
    path = state.path / "peers.json"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING, "qmesh"):
        assert state.peers() == []
    assert (state.path / "peers.json.unusable").read_bytes() == damage
    assert str(path) in caplog.text
    state.remember([LAB])
    assert state.peers() == [LAB]


def test_all_clients_of_a_host_share_what_they_remember(tmp_path: Path) -> None:
    StateDirectory.of_client(tmp_path / "host").remember([LAB])
    assert StateDirectory.of_client(tmp_path / "host").peers() == [LAB]


def test_a_host_remembers_the_peers_of_all_its_instances_once(claim: Callable[[], StateDirectory]) -> None:
    first, second = claim(), claim()
    first.remember([LAB, HOME])
    second.remember([HOME, LINK])
    StateDirectory.of_client(first.path.parent).remember([LAB, ("10.0.0.9", 9)])
    found = qmesh.remembered_peers(first.path.parent)
    assert sorted(found) == sorted([LAB, HOME, LINK, ("10.0.0.9", 9)])


def test_a_host_remembers_only_so_many_peers(claim: Callable[[], StateDirectory]) -> None:
    first, second = claim(), claim()
    first.remember(addresses(50))
    second.remember(addresses(50, start=50))
    found = qmesh.remembered_peers(first.path.parent)
    assert len(found) == len(set(found)) == qmesh.MAX_REMEMBERED_PEERS
    assert set(found) <= set(addresses(100))


def test_one_damaged_file_does_not_cost_the_others(claim: Callable[[], StateDirectory]) -> None:
    first, second = claim(), claim()
    (first.path / "peers.json").write_bytes(b"{")
    second.remember([LAB])
    assert qmesh.remembered_peers(first.path.parent) == [LAB]


# --- Processor and memory ---


def test_samples_are_percentages() -> None:
    monitor = SystemMonitor()
    assert all(0 <= figure <= 100 for _ in range(3) for figure in monitor.sample())


def test_what_this_process_uses_itself_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times, now = iter([0.0, 1.5, 1.5]), iter([100.0, 101.0, 102.0])  # it works for a second and a half, and then rests
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("qmesh.time.monotonic", lambda: next(now))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 80.0)
    monkeypatch.setattr(
        psutil.Process, "cpu_times", lambda process: types.SimpleNamespace(user=next(times), system=0.0)
    )
    monitor = SystemMonitor()
    assert [monitor.sample()[0] for _ in range(2)] == [5.0, 80.0]


def test_memory_is_in_use_and_free() -> None:
    monitor = SystemMonitor()
    assert 0 < monitor.sample()[1] < 100
    assert 0 < monitor.free_memory_bytes() < psutil.virtual_memory().total


def test_there_is_a_core_and_not_more_than_the_system_counts() -> None:
    assert 1 <= SystemMonitor().physical_cores() <= (os.cpu_count() or 1)


LOWER = """
import psutil, qmesh
before = psutil.Process().nice()
qmesh.SystemMonitor().lower_priority(before + 3)
print(psutil.Process().nice() - before)
"""

# Nobody (65534) may not raise a priority; a test that runs as root becomes nobody first.
RAISE = """
import logging, os, qmesh
logging.basicConfig(format="%(message)s")
monitor = qmesh.SystemMonitor()
if os.getuid() == 0:
    os.setuid(65534)
monitor.lower_priority(-20)
"""


def test_a_worker_lets_everything_else_go_first() -> None:
    assert run_python(LOWER) == "3\n"


def test_a_priority_that_the_system_refuses_is_spoken_of_and_nothing_more() -> None:
    assert run_python(RAISE).startswith("the priority cannot be set to -20: ")


RAISE_LIMIT = """
import resource, qmesh
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
print(*(qmesh.raise_file_limit(wanted) for wanted in (32, 128)))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 96))
print(qmesh.raise_file_limit(128), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_as_many_files_may_be_open_as_are_wanted_where_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_python(RAISE_LIMIT).split() == ["64", "128", "96", "96"]
    monkeypatch.setitem(sys.modules, "resource", None)
    assert qmesh.raise_file_limit(1 << 20) == 1 << 20


# --- What is missing ---


def test_without_psutil_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(qmesh.MissingPackage) as caught:
        SystemMonitor()
    command = f'{sys.executable} -m pip install "psutil>=5.9,<8"'
    assert str(caught.value) == f"psutil is not installed here; install it with: {command}"


@pytest.mark.parametrize("module", qmesh.ENGINE_PACKAGES)
def test_all_that_a_worker_lacks_is_told_at_once(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in qmesh.ENGINE_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(qmesh.MissingPackage) as caught:
        qmesh.load_package(module)
    assert caught.value.what == "llama-cpp-python and psutil are not installed here"
    before, _, command = caught.value.advice.partition(": ")
    assert before == "install them with"
    assert shlex.split(command) == [sys.executable, "-m", "pip", "install", *qmesh.ENGINE_PACKAGES.values()]


def test_a_package_that_does_not_load_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ImportError(f"{name}: its library is made for another machine")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(qmesh.MissingPackage) as caught:
        qmesh.load_package("psutil")
    assert caught.value.what == "psutil does not load here (psutil: its library is made for another machine)"
    assert caught.value.advice == qmesh.rebuild_advice(qmesh.ENGINE_PACKAGES["psutil"])


@pytest.mark.parametrize(("version", "works"), [("0.2.90", False), ("0.3.36", True), ("0.4.0", False), (None, False)])
def test_an_installed_llama_is_used_where_it_is_one_that_works(
    monkeypatch: pytest.MonkeyPatch, version: str | None, works: bool
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert qmesh.installed_llama() == works


@pytest.mark.parametrize("interpreter", ["/usr/bin/python3", "/opt/my tools/bin/python3"])
def test_an_install_command_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch, interpreter: str) -> None:
    monkeypatch.setattr(sys, "executable", interpreter)
    words = shlex.split(qmesh.install_command("name>=1,<2"))
    assert words == [interpreter, "-m", "pip", "install", "name>=1,<2"]


def test_an_interpreter_that_does_not_know_its_path_is_called_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert qmesh.install_command("psutil") == 'python -m pip install "psutil"'
    assert qmesh.install_command("numpy>=2", "psutil") == 'python -m pip install "numpy>=2" "psutil"'


# --- Whether an engine fits ---


@pytest.mark.parametrize(
    "about",
    [
        ENGINE,
        ENGINE | {"glibc": "2.36"},
        ENGINE | {"glibc": "2.4"},  # below 2.36
        ENGINE | {"glibc": None},
        ENGINE | {"cpu": []},
        {"platform": "linux-x86_64", "python": "cp311"},
    ],
)
def test_an_engine_for_a_machine_like_this_fits(about: dict[str, Any]) -> None:
    assert qmesh.engine_misfit(about, HERE) is None


def test_nothing_is_held_against_a_processor_that_is_not_known() -> None:
    unknown = qmesh.Platform(HERE.system, HERE.python, HERE.glibc)
    assert qmesh.engine_misfit(ENGINE, unknown) is None


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (
            {"python": "cp312"},
            "is for Python 3.12 on Linux x86_64, and this is Python 3.11 on Linux x86_64; build one there",
        ),
        ({"platform": "linux-aarch64"}, "is for Python 3.11 on Linux aarch64, and this is Python 3.11 on Linux x86_64"),
        ({"platform": "windows-x86_64"}, "is for Python 3.11 on Windows x86_64"),
        ({"python": "pypy311"}, "is for pypy311 on Linux"),
        ({"glibc": "2.38"}, "needs glibc 2.38 or newer, and this machine has 2.36; build one on the machine with the"),
        ({"glibc": "3.0"}, "needs glibc 3.0"),
        (
            {"cpu": ["avx2", "popcnt", "sha"]},
            "needs a processor with avx2, sha; this machine's (A Processor) has none",
        ),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_what_it_needs(about: dict[str, Any], words: str) -> None:
    misfit = qmesh.engine_misfit(ENGINE | about, HERE)
    assert misfit is not None
    why = "; ".join(misfit)
    assert words in why
    assert qmesh.install_command(qmesh.LLAMA_REQUIREMENT) in why or "run workers on newer machines" in why


def test_a_machine_with_another_c_library_is_told_so() -> None:
    misfit = qmesh.engine_misfit(ENGINE, qmesh.Platform(HERE.system, HERE.python, None))
    assert misfit is not None
    assert "this machine has another C library" in misfit[0]


def test_an_engine_for_another_machine_is_refused() -> None:
    qmesh.check_engine_fits({"platform": qmesh.system_tag(), "python": qmesh.python_tag()})
    with pytest.raises(qmesh.MissingPackage, match=f"this is Python {sys.version_info[0]}.{sys.version_info[1]} on "):
        qmesh.check_engine_fits({"platform": "vms-vax", "python": "cp311"})


@pytest.mark.parametrize(
    ("system", "machine", "tag"),
    [
        ("Linux", "x86_64", "linux-x86_64"),
        ("Darwin", "arm64", "macos-arm64"),
        ("Windows", "AMD64", "windows-x86_64"),
    ],
)
def test_systems_and_processors_have_one_name_each(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, tag: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert qmesh.system_tag() == tag
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert qmesh.system_tag() == f"{tag}-32bit"


# --- What this machine is ---


@on_glibc
def test_the_processor_and_linux_tell_the_same_features() -> None:
    _, features = qmesh.read_processor()
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert features is not None
    assert "pni" in features
    assert sorted(features) == sorted(qmesh.X86_FEATURES.keys() & flags)


class OtherLibrary:
    """A C library that does not tell of the processor, as musl and older ones of GNU."""

    def __init__(self, name: str | None) -> None:
        assert name is None


@on_linux
@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("model name\t: Some CPU\nflags\t\t: fpu sse4_2 pni avx\n", "Some CPU", {"sse4_2", "pni"}),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "", None),  # of another kind
        (None, "", None),
    ],
)
def test_where_the_c_library_does_not_tell_linux_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, name: str, features: set[str] | None
) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(qmesh, "CPU_FILE", file)
    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)
    assert qmesh.read_processor() == (name, features)


def test_elsewhere_the_processor_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert qmesh.read_processor() == ("", None)


@pytest.mark.parametrize(("told", "version"), [("glibc 2.31", "2.31"), ("musl", None), (None, None)])
def test_the_version_of_glibc_is_told_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, told: str | None, version: str | None
) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: told, raising=False)
    assert qmesh.glibc_version() == version


def test_a_system_that_has_no_name_for_glibc_does_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unrecognised(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unrecognised, raising=False)
    assert qmesh.glibc_version() is None


# --- The graphics card ---

TWO_CARDS = "NVIDIA T4, 300, 15360, 7\nNVIDIA A100-SXM4, 1024.5, 40960, [N/A]\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name on the path, with this shell script."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_cards_are_read_from_nvidia_smi(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(f"[ \"$1\" = {qmesh.NVIDIA_QUERY[0]} ] && printf '{TWO_CARDS}'")
    t4, a100 = asyncio.run(qmesh.read_gpu_load())
    assert t4 == qmesh.GpuLoad("NVIDIA T4", 300 * 2**20, 15360 * 2**20, 7.0)
    assert (a100.memory_used, a100.utilization) == (1024 * 2**20 + 2**19, None)


NONSENSE = ("echo 'NVIDIA-SMI has failed'", "printf 'T4, many, 15360, 7\\n'", "printf '\\377\\n'", "printf 'T4, 1\\n'")


@pytest.mark.parametrize("script", ["exit 9", *NONSENSE])
def test_an_nvidia_smi_that_fails_or_talks_nonsense_means_no_cards(
    nvidia_smi: Callable[[str], None], script: str
) -> None:
    nvidia_smi(script)
    assert asyncio.run(qmesh.read_gpu_load()) == []


def test_an_nvidia_smi_that_hangs_is_ended(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(qmesh, "GPU_TIMEOUT_S", 1.5)
    nvidia_smi(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    assert asyncio.run(qmesh.read_gpu_load()) == []
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_without_nvidia_smi_there_are_no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asyncio.run(qmesh.read_gpu_load()) == []
    (tmp_path / "nvidia-smi").write_text("no program")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert asyncio.run(qmesh.read_gpu_load()) == []


# --- Interfaces and the clock ---


def test_the_interfaces_are_those_that_psutil_sees() -> None:
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup and "pointopoint" not in stats.flags}
    expected = {
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    found = qmesh.list_interfaces()
    assert {(item.name, item.address) for item in found} == expected
    assert ("127.0.0.1", None) in {(item.address, item.broadcast) for item in found}
    assert all(item.index == socket.if_nametoindex(item.name) for item in found)


def test_where_the_interfaces_cannot_be_told_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> list[qmesh.Interface]:
        raise OSError("no such call")

    monkeypatch.setattr(qmesh, "_interfaces_of_posix", fails)
    monkeypatch.setattr(qmesh, "_interfaces_of_psutil", fails)
    assert qmesh.list_interfaces() == []


WINDOWS_INTERFACES: dict[str, list[tuple[int, str, str | None]]] = {
    "Ethernet": [(-1, "00-15-5D-00-00-01", None), (2, "192.168.1.7", "255.255.255.0"), (10, "fe80::7", None)],
    "Loopback": [(2, "127.0.0.1", "255.0.0.0")],
    "Wi-Fi": [(2, "10.0.0.7", "255.0.0.0")],  # it is not connected
}


def windows_psutil() -> types.SimpleNamespace:
    entries = {
        name: [types.SimpleNamespace(family=family, address=address, netmask=mask) for family, address, mask in told]
        for name, told in WINDOWS_INTERFACES.items()
    }
    up = {name: types.SimpleNamespace(isup=name != "Wi-Fi") for name in entries}
    return types.SimpleNamespace(net_if_stats=lambda: up, net_if_addrs=lambda: entries)


@on_linux
def test_windows_tells_its_interfaces_through_psutil_or_by_the_name_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    infos = [("192.168.1.7", 0), ("fe80::7", 0, 0, 5), ("2001:db8::7", 0, 0, 0), ("127.0.0.1", 0)]
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "Loopback"), (5, "Ethernet")])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", info) for info in infos])
    monkeypatch.setitem(sys.modules, "psutil", windows_psutil())
    assert qmesh.list_interfaces() == [
        qmesh.Interface("Ethernet", 5, "192.168.1.7", "192.168.1.255"),
        qmesh.Interface("Ethernet", 5, "fe80::7%5"),
        qmesh.Interface("Loopback", 1, "127.0.0.1"),
    ]
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert qmesh.list_interfaces() == [
        qmesh.Interface("", 0, "127.0.0.1"),
        qmesh.Interface("", 0, "192.168.1.7", "255.255.255.255"),
        qmesh.Interface("", 5, "fe80::7%5"),
        qmesh.Interface("", 0, "2001:db8::7"),
    ]


def sockaddr(host: str) -> bytes:
    """A C `struct sockaddr_in` or `sockaddr_in6`, as Linux has them."""
    if ":" in host:
        return struct.pack("@HHI16sI", socket.AF_INET6, 0, 0, socket.inet_pton(socket.AF_INET6, host), 0)
    return struct.pack("@HH4s8x", socket.AF_INET, 0, socket.inet_aton(host))


class InterfacesOfC:
    """A C library whose getifaddrs(3) tells of these, by name, flags, address, netmask and broadcast."""

    def __init__(self, *entries: tuple[str, int, bytes | None, bytes | None, bytes | None]) -> None:
        self.given_back = False
        self._kept: list[Any] = []
        self._first = 0
        for name, flags, *addresses in reversed(entries):
            places = [self._keep(address) for address in addresses]
            self._first = self._keep(struct.pack("@PPIPPPP", self._first, self._keep(name.encode()), flags, *places, 0))

    def _keep(self, data: bytes | None) -> int:
        if data is None:
            return 0
        self._kept.append(ctypes.create_string_buffer(data))
        return ctypes.addressof(self._kept[-1])

    def getifaddrs(self, first: Any) -> int:
        ctypes.cast(first, ctypes.POINTER(ctypes.c_void_p)).contents.value = self._first
        return 0 if self._first else -1

    def freeifaddrs(self, first: ctypes.c_void_p) -> None:
        self.given_back = first.value == self._first


UP, BROADCASTS, IS_TUNNEL = 0x1, 0x2, 0x10  # <net/if.h>


@on_linux
def test_of_what_linux_tells_the_interfaces_count_that_are_up_and_lead_to_a_lan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask, other = sockaddr("255.255.255.0"), struct.pack("@H12x", socket.AF_PACKET)
    library = InterfacesOfC(
        ("lo", UP | BROADCASTS, sockaddr("10.1.2.3"), mask, None),
        ("lo", UP | BROADCASTS, sockaddr("10.1.3.3"), mask, sockaddr("10.1.3.99")),
        ("lo", UP, sockaddr("10.1.4.3"), mask, sockaddr("10.1.4.255")),
        ("lo", BROADCASTS, sockaddr("10.1.5.3"), mask, None),
        ("lo", UP | IS_TUNNEL, sockaddr("10.1.6.3"), mask, None),
        ("lo", UP, other, None, None),
        ("lo", UP, None, None, None),
        ("gone meanwhile", UP, sockaddr("10.1.7.3"), mask, None),
        ("lo", UP, sockaddr("fe80::7"), None, None),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    index = socket.if_nametoindex("lo")
    assert qmesh.list_interfaces() == [
        qmesh.Interface("lo", index, "10.1.2.3", "10.1.2.255"),
        qmesh.Interface("lo", index, "10.1.3.3", "10.1.3.99"),
        qmesh.Interface("lo", index, "10.1.4.3"),
        qmesh.Interface("lo", index, "fe80::7%lo"),
    ]
    assert library.given_back
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: InterfacesOfC())
    assert qmesh.list_interfaces() == []


def test_the_uptime_does_not_go_back() -> None:
    times = [qmesh.uptime_s() for _ in range(100)]
    assert times == sorted(times)
