"""Doctor: what is said of a machine and of its peers; tests/test_lan.py has it name real faults."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import secrets
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import members
import pytest
from loop import PATIENCE_S, in_a_loop
from scripted_worker import announced, record_of

import qmesh
from qmesh import Check, Neighbour, NodeId, Verdict

ADDRESS = ("10.0.0.7", 47475)


def peer(**outcome: Any) -> Neighbour:
    return Neighbour(NodeId(7 << 240), udp=ADDRESS, tcp=ADDRESS, **outcome)


# --- What a peer's answers mean ---

REACHED: dict[str, Any] = {"pinged": True, "greeted": True}

CONCLUSIONS: dict[str, tuple[dict[str, Any], dict[str, bool], str]] = {
    "all is well": (REACHED | {"shut": []}, {}, ""),
    "its ping does not come back": (REACHED | {"shut": ["UDP 47475"]}, {}, "udp_blocked_here"),
    "its connection does not come back": (REACHED | {"shut": ["TCP 47475"]}, {}, "tcp_blocked_here"),
    "neither comes back": (REACHED | {"shut": ["UDP 47475", "TCP 47475"]}, {}, "udp_blocked_here"),
    "it does not know how to call back": (REACHED | {"failure": "a message of an unknown type"}, {}, "not_called_back"),
    "TCP only, and its own ping arrives here": ({"greeted": True, "called": True}, {}, "udp_blocked_there"),
    "TCP only, and others answer over UDP": ({"greeted": True}, {"udp_elsewhere": True}, "udp_blocked_there"),
    "TCP only, and we do not hear ourselves": ({"greeted": True}, {"deaf": True}, "udp_blocked_here"),
    "TCP only, and nothing else is known": ({"greeted": True}, {}, "udp_blocked"),
    "UDP only": ({"pinged": True, "failure": "did not answer within 3 s"}, {}, "tcp_blocked_there"),
    "it does not hear what is sent to everybody": (REACHED | {"shut": [], "heard": True}, {}, "udp_blocked_there"),
    "it hears and is heard": (REACHED | {"shut": [], "heard": True, "hears": True}, {}, ""),
    "it is only heard": ({"heard": True}, {}, "one_way"),
    "it was named and is silent": ({"named": "lab7"}, {}, "peer_silent"),
    "others told of it": ({}, {}, "peer_unreachable"),
}


@pytest.mark.parametrize("case", CONCLUSIONS)
def test_the_cause_follows_from_both_directions_and_from_how_others_fare(case: str) -> None:
    outcome, circumstances, cause = CONCLUSIONS[case]
    check = qmesh.conclude(peer(**outcome), **{"deaf": False, "udp_elsewhere": False} | circumstances)
    assert check.cause == cause
    assert (check.verdict is Verdict.PROBLEM) == (cause not in ("", "not_called_back"))
    assert check.name == "peer 10.0.0.7:47475 (worker 000700)"
    assert "10.0.0.7:47475" in check.tried
    assert bool(check.remedy) == (check.verdict is Verdict.PROBLEM)


def test_what_was_not_tried_is_not_called_blocked() -> None:
    """Of a worker that is known from the DHT alone, only its TCP address is."""
    tcp_only = Neighbour(NodeId(2), tcp=ADDRESS, greeted=True, shut=[])
    assert qmesh.conclude(tcp_only, deaf=False, udp_elsewhere=False).verdict is Verdict.WELL


@pytest.mark.parametrize(
    ("outcome", "cause", "verdict"),
    [
        ({"pinged": True, "guessed": True}, "other_topic", Verdict.NOTE),
        ({"pinged": True, "guessed": True, "named": "lab"}, "tcp_blocked_there", Verdict.PROBLEM),
        ({"pinged": True, "foreign": True}, "other_topic", Verdict.NOTE),
        ({"pinged": False, "foreign": True}, "other_mesh", Verdict.NOTE),
        ({"pinged": False, "foreign": True, "named": "lab"}, "other_mesh", Verdict.PROBLEM),
    ],
)
def test_another_topic_or_mesh_is_not_called_a_firewall(outcome: dict[str, Any], cause: str, verdict: Verdict) -> None:
    check = qmesh.conclude(peer(**outcome), deaf=False, udp_elsewhere=False)
    assert (check.cause, check.verdict) == (cause, verdict)
    assert cause.startswith("tcp") or "--topic" in check.remedy


# --- This machine ---


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


def test_this_python_will_do() -> None:
    assert only(qmesh.check_python()).verdict is Verdict.WELL
    check = only(qmesh.check_tls())
    assert check == Check("tls", f"{ssl.OPENSSL_VERSION}, TLS 1.3 with Ed25519")


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 4))
    check = only(qmesh.check_python())
    assert (check.verdict, check.cause) == (Verdict.PROBLEM, "python_old")
    assert "3.11" in check.remedy


def tls_is_missing() -> str:
    """What is found where TLS is; what to do about it is told too."""
    check = only(qmesh.check_tls())
    assert (check.name, check.verdict, check.cause) == ("tls", Verdict.PROBLEM, "tls_missing")
    assert check.remedy.startswith("Use a Python that comes with OpenSSL 1.1.1 or newer")
    return check.found


def test_a_tls_library_without_tls_1_3_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl.HAS_TLSv1_3", False)
    assert tls_is_missing() == f"this Python's {ssl.OPENSSL_VERSION} has no TLS 1.3 with Ed25519"


def test_a_tls_library_that_is_too_old_for_ed25519_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl.OPENSSL_VERSION", "OpenSSL 1.1.0l  10 Sep 2019")
    monkeypatch.setattr("ssl.OPENSSL_VERSION_INFO", (1, 1, 0, 12, 15))
    assert tls_is_missing() == "this Python's OpenSSL 1.1.0l  10 Sep 2019 has no TLS 1.3 with Ed25519"


def test_a_tls_library_that_takes_no_ed25519_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of some systems, built without it, or told not to."""

    def refused(*_: object) -> None:
        raise ssl.SSLError(1, "[SSL] unsupported algorithm")

    monkeypatch.setattr("ssl.SSLContext.load_cert_chain", refused)
    assert "does not take Ed25519" in tls_is_missing()


def test_a_python_without_tls_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ssl", None)
    assert tls_is_missing().startswith("this Python has no TLS (")


def test_a_machine_without_the_workers_packages_can_still_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> object:
        raise qmesh.MissingPackage("llama-cpp-python is not installed here", "install it with: pip install it")

    monkeypatch.setattr(qmesh, "load_llama", missing)
    check = only(qmesh.check_engine(None))
    assert (check.verdict, check.cause) == (Verdict.NOTE, "engine_missing")
    assert check.remedy == "install it with: pip install it"


def test_a_gpu_that_this_build_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "detect_gpu", lambda layers: qmesh.GpuChoice(-1, "CUDA", "a GPU for CUDA was found"))
    monkeypatch.setattr(qmesh.load_llama(), "llama_supports_gpu_offload", lambda: False)
    check = only(qmesh.check_engine(None))
    assert (check.verdict, check.cause) == (Verdict.PROBLEM, "engine_without_gpu")
    assert "GGML_CUDA" in check.remedy


def test_an_archives_engine_that_cannot_be_unpacked_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(module: str) -> object:
        raise qmesh.DamagedArchive("the engine in lab.pyz is damaged")

    monkeypatch.setattr(qmesh, "load_package", damaged)
    check = only(qmesh.check_engine(None))
    assert (check.verdict, check.cause) == (Verdict.PROBLEM, "engine_unusable")
    assert check.found == "the engine in lab.pyz is damaged"
    assert check.remedy.startswith("Copy it to this machine once more")


def test_models_are_named_and_a_damaged_one_is_a_problem_where_a_worker_would_take_it(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "model_dirs", lambda: [tmp_path])
    assert only(qmesh.check_models(None)).cause == "no_model"
    torn, well = ("model_unusable", Verdict.PROBLEM), ("", Verdict.WELL)
    (tmp_path / "torn.gguf").write_bytes(model_path.read_bytes()[:5000])
    assert [(check.cause, check.verdict) for check in qmesh.check_models(None)] == [torn]
    (tmp_path / "lost.gguf").write_bytes(b"")
    assert [(check.cause, check.verdict) for check in qmesh.check_models(None)] == [torn, torn]
    (tmp_path / "lost.gguf").unlink()
    (tmp_path / "good.gguf").symlink_to(model_path)
    assert [(check.cause, check.verdict) for check in qmesh.check_models("torn")] == [well, torn]
    for wanted in ("good", None):
        checks = qmesh.check_models(wanted)
        assert [(check.cause, check.verdict) for check in checks] == [well, ("model_unusable", Verdict.NOTE)]
        assert str(tmp_path / "torn.gguf") in checks[1].remedy


def test_a_state_directory_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = only(qmesh.check_state(tmp_path / "file" / "host"))
    assert (check.verdict, check.cause) == (Verdict.PROBLEM, "state_unusable")
    assert "--state-dir" in check.remedy


def test_an_id_that_stands_in_two_places_is_a_problem(tmp_path: Path) -> None:
    """As when a state directory was copied to another host's, on a home directory that both share."""
    for host, worker_id in (("one", "a" * 64), ("other", "b" * 64)):
        place = tmp_path / host / "0"
        place.mkdir(parents=True)
        (place / qmesh.WORKER_ID_FILE).write_text(f"{worker_id}\n")
    assert only(qmesh.check_state(tmp_path / "one")).verdict is Verdict.WELL
    (tmp_path / "other" / "0" / qmesh.WORKER_ID_FILE).write_text("a" * 64)
    check = only(qmesh.check_state(tmp_path / "one"))
    assert check.cause == "cloned_identity"
    assert "one" in check.found
    assert "other" in check.found


# --- Ports ---

KEYS = qmesh.MeshKeys.derive("doctor")
OURSELVES = members.member(1, KEYS)


@pytest.fixture
def usual_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A UDP port that is taken, in the preferred one's place."""
    with qmesh.bind_one(socket.SOCK_DGRAM, qmesh.LOOPBACK, 0) as sock:
        monkeypatch.setattr(qmesh, "DEFAULT_PORT", sock.getsockname()[1])
        yield sock


@in_a_loop
async def test_a_port_that_another_program_holds_is_told_from_one_of_a_worker(usual_port: socket.socket) -> None:
    check = only(await qmesh.check_port(socket.SOCK_DGRAM, qmesh.LOOPBACK, KEYS, OURSELVES))
    assert (check.verdict, check.cause) == (Verdict.NOTE, "port_taken")


@in_a_loop
async def test_a_port_that_a_worker_holds_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with announced("doctor", record_of(NodeId(5), 1), beacons=False) as (_, port):
        monkeypatch.setattr(qmesh, "DEFAULT_PORT", port)
        check = only(await qmesh.check_port(socket.SOCK_DGRAM, qmesh.LOOPBACK, KEYS, OURSELVES))
        assert check.verdict is Verdict.WELL
        assert NodeId(5).short in check.found


@in_a_loop
async def test_a_port_that_may_not_be_bound_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> list[socket.socket]:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(qmesh, "bind_all", forbidden)
    assert only(await qmesh.check_port(socket.SOCK_STREAM, qmesh.LOOPBACK, KEYS, OURSELVES)).cause == "port_unusable"


# --- The whole examination, on the loopback ---


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `doctor` on a mesh: the exit code, and what it prints. It need not wait for beacons on the loopback."""
    monkeypatch.setattr(qmesh, "DOCTOR_LISTEN_S", 1.0)
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 1.0)

    def run(mesh: harness.Mesh, *arguments: str) -> tuple[int, str]:
        for name, value in mesh.env.items():
            monkeypatch.setenv(name, value)
        exit_code = qmesh.main(["doctor", *arguments])
        return exit_code, capsys.readouterr().out

    return run


def causes(told: dict[str, Any], verdict: str = "problem") -> set[str]:
    return {check["cause"] for check in told["checks"] if check["verdict"] == verdict}


def test_where_all_is_well_it_says_so_and_exits_with_0(
    two_workers: harness.Mesh, examine: Callable[..., tuple[int, str]]
) -> None:
    exit_code, printed = examine(two_workers, "--json")
    told = json.loads(printed)
    assert (exit_code, told["ok"], causes(told)) == (0, True, set())
    found = {check["name"]: check["found"] for check in told["checks"]}
    assert set(found) >= {"python", "tls", "engine", "state", "interface lo (127.0.0.1)", "mesh"}
    assert found["mesh"].startswith("2 workers found")
    for worker in two_workers.processes:
        assert found[f"worker {worker.worker_id[:6]}"] == "runs on this machine"


def test_what_is_wrong_is_named_for_people_and_programs(
    mesh: harness.Mesh, examine: Callable[..., tuple[int, str]]
) -> None:
    """Nobody is there, a peer is silent, and a name is none; each with what to do about it."""
    with qmesh.bind_one(socket.SOCK_DGRAM, qmesh.LOOPBACK, 0) as silent:
        peers = ["--peer", f"127.0.0.1:{silent.getsockname()[1]}", "--peer", ".nowhere"]
        exit_code, printed = examine(mesh, "--json", *peers)
        told = json.loads(printed)
        assert (exit_code, told["ok"]) == (1, False)
        assert causes(told) == {"no_worker", "name_unresolved", "peer_silent"}
        exit_code, printed = examine(mesh, *peers)
    assert exit_code == 1
    for line in (
        "❌ mesh: 0 workers found",
        "❌ peer .nowhere",
        "tried: ",
        "to do: start one with ",
        "3 problems found",
    ):
        assert line in printed, line


def member_of(mesh: harness.Mesh) -> qmesh.Identity:
    return members.member(1, qmesh.MeshKeys.derive(mesh.topic))


@in_a_loop
async def test_a_worker_that_is_asked_to_call_back_tells_who_answered(two_workers: harness.Mesh) -> None:
    """The other worker at its own ports, nobody at a port that is closed."""
    one, other = (process.ready for process in two_workers.processes)
    link = qmesh.WorkerLink(await qmesh.dial(tuple(one["tcp"]), member_of(two_workers)))
    try:
        with qmesh.bind_one(socket.SOCK_DGRAM, qmesh.LOOPBACK, 0) as closed:
            nobody = closed.getsockname()[1]
            asked = link.dial_back(other["udp"][1], other["tcp"][1]), link.dial_back(nobody, nobody)
            good, bad = await asyncio.gather(*asked)
    finally:
        await link.close()
    assert (good["udp"], good["tcp"]) == (other["worker_id"], other["worker_id"])
    assert (bad["udp"], bad["tcp"]) == (None, None)


@in_a_loop
async def test_a_worker_calls_back_a_few_at_a_time(two_workers: harness.Mesh) -> None:
    ready = two_workers.processes[0].ready
    link = qmesh.WorkerLink(await qmesh.dial(tuple(ready["tcp"]), member_of(two_workers)))
    try:
        with qmesh.bind_one(socket.SOCK_DGRAM, qmesh.LOOPBACK, 0) as silent:
            port = silent.getsockname()[1]
            asked = [link.dial_back(port, port) for _ in range(qmesh.MAX_DIAL_BACKS_EACH + 3)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        await link.close()
    assert sum(isinstance(outcome, qmesh.Refused) for outcome in outcomes) == 3


CLOSED = members.closed(1)
KEY = qmesh.MeshKey(secrets.token_bytes(32))  # nodes of one key hear each other, whatever their topics


@contextlib.contextmanager
def listening(*meshes: qmesh.MeshKeys) -> Iterator[int]:
    """A node of these meshes that answers over TCP, and not over UDP; yields its port."""

    async def hang_up(connection: qmesh.Connection) -> None:
        return

    loop = asyncio.new_event_loop()
    server = qmesh.TcpServer(hang_up, members.member(2, *meshes))
    _, port = loop.run_until_complete(server.start(qmesh.LOOPBACK, 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


@pytest.mark.parametrize("meshes", [[members.OPEN], [CLOSED], [CLOSED, members.closed(3)]])
def test_a_peer_of_another_mesh_is_told_from_one_that_is_silent(
    mesh: harness.Mesh, examine: Callable[..., tuple[int, str]], meshes: list[qmesh.MeshKeys]
) -> None:
    with listening(*meshes) as port:
        exit_code, printed = examine(mesh, "--json", "--peer", f"127.0.0.1:{port}")
    told = json.loads(printed)
    (check,) = (check for check in told["checks"] if check["name"] == f"peer 127.0.0.1:{port}")
    assert (exit_code, check["cause"], check["verdict"]) == (1, "other_mesh", "problem")
    assert "another mesh" in check["found"]
    assert "--key" in check["remedy"]
    assert "peer_silent" not in causes(told)


def test_the_mesh_that_was_examined_is_named(mesh: harness.Mesh, examine: Callable[..., tuple[int, str]]) -> None:
    key = mesh.directory / "lab.key"
    key.write_text(KEY.text)
    key.chmod(0o600)
    for arguments, title in (
        ([], f"open mesh '{mesh.topic}'"),
        (["--key", str(key)], qmesh.MeshKeys.derive(mesh.topic, KEY).title),
    ):
        told = json.loads(examine(mesh, "--json", *arguments)[1])
        found = {check["name"]: check["found"] for check in told["checks"]}
        assert title in found["mesh"]
        assert KEY.text[7:20] not in json.dumps(told)


# --- What workers say of others ---

LATELY = {"host": "10.0.0.9", "reason": "mesh", "age_s": 3.0}


@pytest.mark.parametrize(
    ("network", "hosts"),
    [
        ({"strangers": [LATELY, LATELY | {"host": "fe80::1%eth0", "reason": "version"}]}, {"10.0.0.9", "fe80::1%eth0"}),
        ({"strangers": [LATELY | {"age_s": 60.0}]}, set()),
        (
            {"strangers": [1, None, {}, LATELY | {"host": "\x1b[2J"}, LATELY | {"reason": "spite"}, LATELY]},
            {"10.0.0.9"},
        ),
        ({"strangers": [LATELY | {"host": f"10.0.1.{number}"} for number in range(99)]}, 16),
        ({"strangers": 5}, set()),
        (None, set()),
    ],
)
def test_what_a_worker_says_of_strangers_is_taken_with_care(network: Any, hosts: set[str] | int) -> None:
    found = qmesh.strangers_of({"network": network})
    assert (len(found) if isinstance(hosts, int) else set(found)) == hosts


def test_it_does_not_take_itself_for_a_worker(mesh: harness.Mesh, examine: Callable[..., tuple[int, str]]) -> None:
    with qmesh.bind_one(socket.SOCK_STREAM, qmesh.LOOPBACK, 0) as sock:
        port = sock.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qmesh, "DEFAULT_PORT", port)
        exit_code, printed = examine(mesh, "--json", "--peer", "127.0.0.1")
    assert exit_code == 1
    assert causes(json.loads(printed)) == {"no_worker"}


@in_a_loop
async def test_another_mesh_on_this_machine_is_spoken_of_where_no_worker_is_found(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of somebody who gave a worker another key or topic than the rest."""
    hurried = {"DOCTOR_LISTEN_S": 1.0, "DISCOVERY_TIMEOUT_S": 1.0, "BEACON_TIMES_S": (0.0, 0.2), "BEACON_PERIOD_S": 0.2}
    for name, value in hurried.items():
        monkeypatch.setattr(qmesh, name, value)
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=topic, state_dir=str(tmp_path))
    async with announced(f"{topic}-other", record_of(NodeId(5), 1)):
        *_, told = [check async for check in qmesh.Doctor(settings, {}).examine()]
    assert (told.name, told.cause, told.verdict) == ("mesh", "no_worker", Verdict.PROBLEM)
    assert told.found.endswith("heard of a mesh with another topic or key on this machine")
    assert told.remedy.startswith("start one with `python qmesh.py worker`")
    assert "; or use the same --key " in told.remedy


# --- The README ---


def test_every_cause_stands_in_the_readme_and_no_other() -> None:
    readme = (harness.ROOT / "README.md").read_text("utf-8")
    (told,) = re.findall(r"carries its cause as a word:\n(.*?)\.\n", readme, re.DOTALL)
    named = re.findall(r"`(\w+)`", told)
    assert sorted(named) == sorted(qmesh.CAUSES)
