"""What a mesh's key is for, on real LANs: what is heard on the wire, who is answered, and who sees whom."""

from __future__ import annotations

import base64
import datetime
import functools
import json
import os
import random
import secrets
import shutil
import socket
import ssl
import string
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import pytest
from lan import Capture, Lan, Machine, require, settle

import qmesh

SOON_S = 15.0  # the pause between two beacons, and half of it
GREEDY = ("--temperature", "0", "--max-tokens", "24")
WORKER_PORT = qmesh.DEFAULT_PORT
UDP_PORTS = (qmesh.BEACON_PORT, qmesh.DEFAULT_PORT, qmesh.CLIENT_PORT)
ALERT_BYTES = 7  # a TLS alert that is not encrypted: type, version, size, level and reason
ANSWERED_S = 1.0  # a datagram is answered in some milliseconds, or never
ROOMY = 2000  # bytes each way, at least, of a connection on which something was asked and answered


def marked_words(count: int) -> str:
    """Words that stand nowhere else."""
    return " ".join("".join(secrets.choice(string.ascii_lowercase) for _ in range(12)) for _ in range(count))


# --- Reading what was captured ---

Flow = tuple[bytes, int, bytes, int]
"""From an address and port to an address and port."""


class Traffic:
    """What was said on a LAN: frames as they were, datagrams, and TCP's streams put together again."""

    def __init__(self, frames: Iterable[bytes]) -> None:
        self.frames = list(dict.fromkeys(frames))  # a switch shows each at every port that it passes
        self.datagrams: list[tuple[Flow, bytes]] = []
        self._segments: dict[Flow, dict[int, bytes]] = defaultdict(dict)
        self._starts: dict[Flow, int] = {}
        for frame in self.frames:
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        kind, packet = frame[12:14], frame[14:]
        if kind == b"\x08\x00":
            protocol, size, header = packet[9], int.from_bytes(packet[2:4], "big"), (packet[0] & 15) * 4
            source, target, data = packet[12:16], packet[16:20], packet[header:size]
        elif kind == b"\x86\xdd":
            protocol, size = packet[6], int.from_bytes(packet[4:6], "big")
            source, target, data = packet[8:24], packet[24:40], packet[40 : 40 + size]
        else:
            return
        flow = source, int.from_bytes(data[:2], "big"), target, int.from_bytes(data[2:4], "big")
        if protocol == socket.IPPROTO_UDP:
            self.datagrams.append((flow, data[8:]))
        elif protocol == socket.IPPROTO_TCP:
            sequence, payload = int.from_bytes(data[4:8], "big"), data[(data[12] >> 4) * 4 :]
            if data[13] & 2:  # SYN
                self._starts[flow] = sequence + 1
            if len(payload) > len(self._segments[flow].get(sequence, b"")):
                self._segments[flow][sequence] = payload

    def streams(self) -> dict[Flow, bytes]:
        """By flow, in the order of sequence numbers; every one from its beginning, and without a gap."""
        found = {}
        for flow, segments in self._segments.items():
            if not segments:
                continue  # the end of a connection that was there before
            stream = b""
            start = self._starts[flow]
            for at, payload in sorted(((sequence - start) % 2**32, data) for sequence, data in segments.items()):
                if at < 2**31 and payload:  # else a keep-alive's, from before the start
                    assert at <= len(stream), "a gap in what was captured"
                    stream += payload[len(stream) - at :]
            found[flow] = stream
        return found

    def between(self, machine: Machine, worker: Machine) -> list[tuple[bytes, bytes]]:
        """What was said on each connection to a worker: by who dialled, and by the worker."""
        ours, theirs = addresses(machine), addresses(worker)
        streams = self.streams()
        return [
            (said, streams[target, to, source, at])
            for (source, at, target, to), said in streams.items()
            if source in ours and target in theirs and to == WORKER_PORT
        ]

    def unicast(self, source: Machine, target: Machine) -> list[bytes]:
        """Datagrams from one machine to just another."""
        ours, theirs = addresses(source), addresses(target)
        return [data for (sender, _, to, _), data in self.datagrams if sender in ours and to in theirs]

    def shows(self, marks: Mapping[str, str | bytes]) -> set[str]:
        """Which of these stand in it, in any of their disguises."""
        everything = b"\n\n".join([*self.frames, *self.streams().values()])
        return {name for name, mark in marks.items() if any(part in everything for part in disguised(mark))}


PART = 8  # any 16 characters in a row hold 8 that begin at a multiple of 8


def disguised(mark: str | bytes) -> Iterator[bytes]:
    """Parts of a text or secret as they may be written: whoever sends 16 characters of it sends one of these."""
    for at in range(0, len(mark) - PART + 1, PART):
        part = mark[at : at + PART]
        if len(set(part)) < 4:
            continue  # spaces fill datagrams up
        written = [part] if isinstance(part, bytes) else [part.encode(), part.encode("utf-16-le")[:-1]]
        for data in written:
            yield data
            yield data.hex().encode()
            yield data.hex().upper().encode()
            yield from in_base64(data)


def in_base64(data: bytes) -> Iterator[bytes]:
    """The letters that base64 has for these bytes alone, whichever stand before and behind them."""
    for before in range(3):
        letters = base64.b64encode(bytes(before) + data + bytes(2))
        first, last = -(-before * 8 // 6), (before + len(data)) * 8 // 6
        yield letters[first:last]


@functools.cache
def addresses(machine: Machine) -> set[bytes]:
    """Those of a machine, as packets hold them."""
    told = json.loads(machine.python("import subprocess as s; print(s.check_output(['ip', '-j', 'addr']).decode())"))
    found = [entry["local"] for interface in told if interface["ifname"] != "lo" for entry in interface["addr_info"]]
    return {socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in found}


def check_tls(said: bytes, *, dialled: bool) -> None:
    """That bytes are TLS 1.3's records and nothing else: greetings that are readable, then what is not."""
    kinds, at, hello = [], 0, b""
    while at < len(said):
        size = int.from_bytes(said[at + 3 : at + 5], "big")
        assert said[at + 1] == 3
        assert at + 5 + size <= len(said), "half a record"
        hello = hello or said[at + 5 : at + 5 + size]
        kinds.append(said[at])
        if said[at] == 0x14:
            assert said[at + 5 : at + 5 + size] == b"\1"  # says nothing: for middleboxes that expect it
        at += 5 + size
    assert kinds[0] == 0x16
    assert hello[0] == (1 if dialled else 2)
    versions = b"\x00\x2b\x00\x03\x02\x03\x04" if dialled else b"\x00\x2b\x00\x02\x03\x04"
    assert versions in hello  # the only one that is offered, and the one that is chosen: TLS 1.3
    assert set(kinds[1:]) <= {0x14, 0x17}
    assert kinds.count(0x14) <= 1
    assert kinds.count(0x17) >= 2
    assert b'{"type"' not in said


# --- A LAN with a closed mesh and an open one, of one name ---


@dataclass
class Talk:
    """A question of one mesh, and what was answered."""

    worker: Machine
    flags: tuple[str, ...]
    prompt: str = field(default_factory=lambda: f"Tell a story in which these occur: {marked_words(10)}")
    system: str = field(default_factory=lambda: f"You know what this is: {marked_words(3)}")
    answer: str = ""

    @property
    def texts(self) -> dict[str, str]:
        told = {"prompt": self.prompt, "system": self.system, "answer": self.answer}
        return told | {f"{name} in JSON": json.dumps(text) for name, text in told.items()}


@dataclass
class Neighbours:
    """Members of both meshes, and a machine of neither; what passed while each mesh was asked once."""

    lan: Lan
    key: Path
    closed: Talk
    open: Talk
    desk: Machine
    prowler: Machine
    traffic: Traffic
    command_lines: list[bytes]
    visits: dict[str, Future[dict[str, Any]]]
    probes: Future[dict[str, tuple[bytes, float]]] = field(init=False)

    @property
    def keys(self) -> qmesh.MeshKeys:
        return qmesh.MeshKeys.derive(self.lan.topic, self.secret)

    @property
    def open_keys(self) -> qmesh.MeshKeys:
        return qmesh.MeshKeys.derive(self.lan.topic)

    @property
    def secret(self) -> qmesh.MeshKey:
        return qmesh.parse_mesh_keys(self.key.read_text("ascii"))[0]

    @property
    def secrets(self) -> dict[str, str | bytes]:
        """What nobody may read who listens, whichever mesh it is of."""
        told: dict[str, str | bytes] = {
            "topic": self.lan.topic,
            "key": self.secret.text,
            "key's bytes": self.secret.secret,
        }
        told |= {"UDP key": self.keys.udp_key, "authority's key": self.keys.ca_seed}
        for machine in (self.closed.worker, self.open.worker):
            (path,) = machine.state_dir.glob(f"*/*/{qmesh.NODE_KEY_FILE}")
            told[f"key of {machine.name}"] = qmesh.NodeKey.parse(path.read_text("ascii")).seed
        return told


@dataclass
class Network:
    """Makes the LANs of this file; nothing may have been sent out of one when it is taken away."""

    directory: Path
    model: Path
    made: ExitStack

    def lan(self, topic: str | None = None) -> Lan:
        lan = self.made.enter_context(Lan(self.directory, self.model, topic=topic))
        self.made.callback(self._check, lan)
        return lan

    @staticmethod
    def _check(lan: Lan) -> None:
        assert lan.strays == Counter()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Network]:
    require()
    with ExitStack() as made:
        yield Network(tmp_path_factory.mktemp("trust"), model_path, made)


def init(path: Path, *flags: str) -> str:
    """Make a key file as a user does; returns what is said."""
    command = [*harness.running(harness.PROGRAM), "init", str(path), *flags]
    finished = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=plain_env(), cwd=harness.ROOT, check=True
    )
    assert finished.stdout == f"{path}\n"
    return finished.stderr


def plain_env(**variables: str) -> dict[str, str]:
    """Of a user who has set nothing of the program's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
    return inherited | {"PYTHONUNBUFFERED": "1"} | variables


def command_lines(*machines: Machine) -> list[bytes]:
    """What `ps` tells everybody of what runs on these machines."""
    found = []
    for machine in machines:
        listed = subprocess.run(["ip", "netns", "pids", machine.namespace.name], capture_output=True, check=True)
        for pid in listed.stdout.split():
            with suppress(OSError):
                found.append(Path("/proc", pid.decode(), "cmdline").read_bytes())
    return [line for line in found if b"qmesh" in line or b".pyz" in line]


def ask(machine: Machine, talk: Talk, look: Callable[[], list[bytes]]) -> list[bytes]:
    """Have a question answered; returns what `look` saw while it was."""
    asking = machine.popen("prompt", talk.prompt, "--system", talk.system, *GREEDY, *talk.flags)
    assert asking.stdout is not None
    begun = asking.stdout.read(1)
    seen = look()
    talk.answer = (begun + asking.stdout.read()).removesuffix("\n")
    _, stderr = asking.communicate(timeout=harness.COMMAND_TIMEOUT_S)
    assert asking.returncode == 0, stderr
    return seen


@pytest.fixture(scope="module")
def neighbours(network: Network) -> Iterator[Neighbours]:
    key = network.directory / "lab.key"
    init(key)
    with ThreadPoolExecutor() as pool:
        lan = network.lan(topic=f"lab of {marked_words(2)}")
        names = ("closed", "open", "desk", "prowler", "stranger")
        closed, open_, desk, prowler, stranger = (lan.machine(name) for name in names)
        talks = Talk(closed, ("--key", str(key))), Talk(open_, ())
        capture = Capture(lan.switch, network.directory / "switch.capture")
        started = [talk.worker.start_worker(*talk.flags, ready=False) for talk in talks]
        for process in started:
            process.wait_ready()
        lines = list(pool.map(lambda talk: ask(desk, talk, lambda: command_lines(closed, open_, desk)), talks))
        traffic = Traffic(capture.stop())
        visits = {
            "stranger": pool.submit(visit, stranger, "--peer", str(closed.address_in(lan))),
            "member": pool.submit(visit, desk, "--key", str(key)),
        }
        made = Neighbours(lan, key, *talks, desk, prowler, traffic, lines[0] + lines[1], visits)
        made.probes = pool.submit(probe, made)
        yield made


def visit(machine: Machine, *flags: str) -> dict[str, Any]:
    """What `doctor --json` says on a machine."""
    finished = machine.run("doctor", "--json", *flags)
    assert finished.stdout, finished.stderr
    told: dict[str, Any] = json.loads(finished.stdout)
    return told


# --- What is heard on the wire ---


@pytest.mark.parametrize("mesh", ["closed", "open"])
def test_whoever_listens_reads_neither_the_prompt_nor_the_answer(neighbours: Neighbours, mesh: str) -> None:
    talk: Talk = getattr(neighbours, mesh)
    assert len(talk.answer) >= 2 * PART
    assert neighbours.traffic.shows(talk.texts) == set()


def test_whoever_listens_reads_neither_the_name_of_the_topic_nor_a_key(neighbours: Neighbours) -> None:
    assert neighbours.traffic.shows(neighbours.secrets) == set()


@pytest.mark.parametrize("mesh", ["closed", "open"])
def test_what_is_heard_of_a_conversation_is_tls_1_3_and_all_of_it_was_heard(neighbours: Neighbours, mesh: str) -> None:
    connections = neighbours.traffic.between(neighbours.desk, getattr(neighbours, mesh).worker)
    talks = [pair for pair in connections if min(map(len, pair)) > ROOMY]
    assert talks
    for asked, answered in talks:
        check_tls(asked, dialled=True)
        check_tls(answered, dialled=False)


def test_every_datagram_is_of_the_protocol_and_beacons_are_among_them(neighbours: Neighbours) -> None:
    heard = [(flow[3], data) for flow, data in neighbours.traffic.datagrams if {flow[1], flow[3]} & set(UDP_PORTS)]
    assert all(data.startswith(qmesh.DATAGRAM_MAGIC) for _, data in heard)
    beacons = Counter(port == qmesh.BEACON_PORT for port, _ in heard)
    assert beacons[True] >= 2
    assert beacons[False] >= 2
    for keys, worker in ((neighbours.keys, neighbours.closed.worker), (neighbours.open_keys, neighbours.open.worker)):
        codec = qmesh.DatagramCodec(keys.udp_key)
        ours = [codec.parse(data) for _, data in heard if codec.judge(data) is None]
        assert {"beacon", "pong"} <= {datagram.kind for datagram in ours}
        assert {str(datagram.sender) for datagram in ours if datagram.kind == "pong"} == {worker.processes[0].worker_id}


def test_what_is_in_the_clear_is_found_in_the_same_way(neighbours: Neighbours) -> None:
    """That nothing was found above is worth something: the search finds what every datagram says."""
    told: dict[str, str | bytes] = {
        "worker": bytes.fromhex(neighbours.closed.worker.processes[0].worker_id),
        "topic's id": bytes(neighbours.keys.topic),
        "model": qmesh.short_model_name(neighbours.closed.worker.processes[0].ready["model"]),
    }
    assert neighbours.traffic.shows(told) == set(told)


def test_a_conversation_in_the_clear_would_be_read_however_it_is_cut(neighbours: Neighbours) -> None:
    talk, lan = neighbours.closed, neighbours.lan
    address = neighbours.open.worker.address_in(lan)
    capture = Capture(lan.switch, neighbours.lan.directory / "clear.capture")
    neighbours.open.worker.popen_python(LISTENER)
    script = f"""
import socket
with socket.create_connection(({address!r}, 9)) as sock:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in {json.dumps(talk.texts).encode()!r}:
        sock.send(bytes([byte]))
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
"""
    neighbours.desk.python(script)
    traffic = Traffic(capture.stop())
    assert traffic.shows(talk.texts) == set(talk.texts)


LISTENER = """
import socket
with socket.create_server(("", 9)) as server:
    print("listening", flush=True)
    sock, _ = server.accept()
    while sock.recv(1 << 16):
        pass
    sock.close()
"""


def test_the_search_sees_through_every_disguise() -> None:
    rng = random.Random(1)
    text = marked_words(9)
    for begin in range(20):
        window = text[begin : begin + 2 * PART]
        for disguise in (str.encode, lambda part: part.encode("utf-16-le"), lambda part: part.encode("utf-16-be")):
            data: bytes = disguise(window)
            around = rng.randbytes(begin % 3) + data + b"."
            for seen in (data, data.hex().encode(), data.hex().upper().encode(), base64.b64encode(around)):
                assert Traffic([bytes(14) + seen]).shows({"text": text}) == {"text"}


# --- A closed mesh and an open one ---


def test_a_closed_mesh_and_an_open_one_of_the_same_name_do_not_see_each_other(neighbours: Neighbours) -> None:
    with ThreadPoolExecutor(2) as pool:
        closed = pool.submit(neighbours.desk.status, *neighbours.closed.flags)
        opened = pool.submit(neighbours.prowler.status)
    for told, talk, mesh in (
        (closed.result(), neighbours.closed, neighbours.keys),
        (opened.result(), neighbours.open, neighbours.open_keys),
    ):
        assert [worker["worker_id"] for worker in told["workers"]] == [talk.worker.processes[0].worker_id]
        assert told["unreachable"] == []
        assert told["mesh"] == mesh.to_json()
        assert told["workers"][0]["mesh"] == told["mesh"]


def test_no_key_stands_in_a_command_line(neighbours: Neighbours) -> None:
    lines = b"\n".join(neighbours.command_lines)
    assert lines.count(b"worker") >= 2
    assert lines.count(b"prompt") >= 2
    assert qmesh.KEY_PREFIX.encode() not in lines
    assert not any(part in lines for part in disguised(neighbours.secret.text))


# --- Those who are not members ---

OPENINGS = ("hello", "http", "tls 1.2", "no name", "open mesh", "silence", "noise")


def probe(neighbours: Neighbours) -> dict[str, tuple[bytes, float]]:
    """What a machine without the key is told on connections that begin so or so, and how long they last."""
    outsider = qmesh.Identity.ephemeral([neighbours.open_keys])
    dialling = outsider.memberships[0].dialling
    name = outsider.memberships[0].server_name
    older = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    older.check_hostname = False
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    greeting = qmesh.encode_frame(qmesh.greeting("hello", outsider.node_id))
    openings = {
        "hello": greeting,
        "http": b"GET /status HTTP/1.1\r\nHost: worker\r\n\r\n",
        "tls 1.2": client_hello(older, None),
        "no name": client_hello(dialling, None),
        "open mesh": client_hello(dialling, name),
        "silence": b"",
        "noise": random.Random(1).randbytes(600),
    }
    assert tuple(openings) == OPENINGS
    script = PROBES.format(
        openings={name: data.hex() for name, data in openings.items()},
        address=(neighbours.closed.worker.address_in(neighbours.lan), WORKER_PORT),
        patience_s=2 * qmesh.HANDSHAKE_TIMEOUT_S,
    )
    told = json.loads(neighbours.prowler.python(script))
    return {name: (bytes.fromhex(data), seconds) for name, (data, seconds) in told.items()}


PROBES = """
import json, socket, threading, time
told = {{}}
def probe(name, opening):
    began, heard = time.monotonic(), b""
    with socket.create_connection({address!r}) as sock:
        sock.settimeout({patience_s})
        try:
            sock.sendall(bytes.fromhex(opening))
            while data := sock.recv(1 << 16):
                heard += data
        except ConnectionError:
            pass
    told[name] = heard.hex(), time.monotonic() - began
threads = [threading.Thread(target=probe, args=item) for item in {openings!r}.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(told))
"""


def client_hello(context: ssl.SSLContext, name: str | None) -> bytes:
    """How a dialler begins."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_connection_of_no_member_ends_in_time_with_no_more_than_an_alert(
    neighbours: Neighbours, opening: str
) -> None:
    heard, seconds = neighbours.probes.result()[opening]
    assert seconds < qmesh.HANDSHAKE_TIMEOUT_S + 1
    assert len(heard) <= ALERT_BYTES
    assert heard[:2] in (b"", b"\x15\x03")


@pytest.mark.parametrize("shown", ["the certificate of another mesh", "no certificate"])
def test_who_dials_by_the_name_that_it_overheard_is_told_nothing(neighbours: Neighbours, shown: str) -> None:
    script = INTRUDER.format(
        path=str(harness.ROOT),
        topic=neighbours.lan.topic,
        certified=shown != "no certificate",
        address=(neighbours.closed.worker.address_in(neighbours.lan), WORKER_PORT),
        name=qmesh.Identity.ephemeral([neighbours.keys]).memberships[0].server_name,
        patience_s=2 * qmesh.HANDSHAKE_TIMEOUT_S,
    )
    told = json.loads(neighbours.prowler.python(script))
    assert told["heard"] == ""
    assert told["seconds"] < qmesh.HANDSHAKE_TIMEOUT_S + 1


INTRUDER = """
import json, socket, ssl, sys, time
sys.path.insert(0, {path!r})
import qmesh
identity = qmesh.Identity.ephemeral([qmesh.MeshKeys.derive({topic!r})])
context = identity.memberships[0].dialling if {certified} else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
began, heard = time.monotonic(), b""
try:
    with context.wrap_socket(socket.create_connection({address!r}), server_hostname={name!r}) as sock:
        sock.settimeout({patience_s})
        sock.sendall(qmesh.encode_frame(qmesh.greeting("hello", identity.node_id)))
        while data := sock.recv(1 << 16):
            heard += data
except (ssl.SSLError, ConnectionError):
    pass
print(json.dumps({{"heard": heard.hex(), "seconds": time.monotonic() - began}}))
"""


def requests(keys: qmesh.MeshKeys, wanted: qmesh.NodeId) -> list[bytes]:
    """A datagram of each type that asks something, whole and padded, under a mesh's key."""
    codec, sender = qmesh.DatagramCodec(keys.udp_key), qmesh.NodeId.of_bytes(secrets.token_bytes(32))
    record = qmesh.WorkerRecord(
        sender, (qmesh.UNSPECIFIED, WORKER_PORT), 1, 90, qmesh.HealthState.HEALTHY, 1, "m", bytes(8)
    )
    bodies: dict[str, dict[str, Any]] = {
        "ping": {},
        "find_node": {"target": wanted},
        "find_workers": {"topic": wanted},
        "announce": {"topic": wanted, "token": bytes(8), "record": record},
        "withdraw": {"topic": wanted, "token": bytes(8)},
        "beacon": {"topic": wanted},
    }
    assert bodies.keys() == qmesh.REQUESTS
    sizes = (qmesh.SMALL_REQUEST_BYTES, qmesh.MAX_DATAGRAM_BYTES)
    made = []
    for (kind, body), size in ((item, size) for item in bodies.items() for size in sizes):
        for who in (None, sender):
            made.append(codec.encode(qmesh.Datagram(kind, secrets.token_bytes(8), who, body), pad_to=size))
    return made


def dropped(neighbours: Neighbours) -> Counter[str]:
    """What the closed mesh's worker has not taken in so far, by reason."""
    (worker,) = neighbours.desk.status(*neighbours.closed.flags)["workers"]
    return Counter(worker["network"]["dropped"])


def answers(neighbours: Neighbours, name: str, worker: Machine, sent: list[bytes]) -> list[bytes]:
    """What a worker says to a machine without the key that sends it these datagrams, to both of its ports."""
    capture = Capture(neighbours.prowler.namespace, neighbours.lan.directory / f"{name}.capture")
    path = neighbours.lan.directory / f"{name}.datagrams"
    path.write_text("\n".join(data.hex() for data in sent), "ascii")
    script = SPEAKER.format(
        path=str(path),
        host=worker.address_in(neighbours.lan),
        ports=(WORKER_PORT, qmesh.BEACON_PORT),
        wait_s=ANSWERED_S,
    )
    neighbours.prowler.python(script)
    traffic = Traffic(capture.stop())
    assert len(traffic.unicast(neighbours.prowler, worker)) >= len(set(sent))
    return traffic.unicast(worker, neighbours.prowler)


SPEAKER = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, open({path!r}) as datagrams:
    for data in datagrams:
        for port in {ports!r}:
            sock.sendto(bytes.fromhex(data), ({host!r}, port))
        time.sleep(0.005)
    time.sleep({wait_s})
"""


def test_datagrams_under_another_key_are_answered_with_silence(neighbours: Neighbours) -> None:
    sent = requests(neighbours.open_keys, neighbours.open_keys.topic)
    sent += requests(neighbours.open_keys, neighbours.keys.topic)
    assert answers(neighbours, "foreign", neighbours.closed.worker, sent) == []
    assert answers(neighbours, "own", neighbours.open.worker, sent) != []  # there they are good


def test_damaged_datagrams_of_members_and_noise_are_answered_with_silence(neighbours: Neighbours) -> None:
    rng = random.Random(1)
    whole = requests(neighbours.keys, neighbours.keys.topic)
    sent = [rng.randbytes(rng.randrange(1, qmesh.MAX_DATAGRAM_BYTES)) for _ in range(20)]
    sent += [qmesh.DATAGRAM_MAGIC + rng.randbytes(rng.randrange(qmesh.MAX_DATAGRAM_BYTES)) for _ in range(20)]
    for data in whole:
        at = rng.randrange(len(qmesh.DATAGRAM_MAGIC), len(data))
        sent += [data[:-1], data + b" ", data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]]
    before = dropped(neighbours)
    assert answers(neighbours, "damaged", neighbours.closed.worker, sent) == []
    reasons = dropped(neighbours) - before
    assert reasons.keys() <= {"mesh", "size", "protocol", "copy", "unpadded"}  # and so none for its number
    assert sum(reasons.values()) >= 2 * len(sent)
    assert answers(neighbours, "whole", neighbours.closed.worker, whole) != []


@pytest.fixture(scope="module")
def repeated(neighbours: Neighbours) -> tuple[list[bytes], list[bytes]]:
    """Every datagram that members sent, and what a machine without the key is told that sends them once more."""
    heard = [data for flow, data in neighbours.traffic.datagrams if {flow[1], flow[3]} & set(UDP_PORTS)]
    said = [data for data in dict.fromkeys(heard) if qmesh.DatagramCodec(neighbours.keys.udp_key).judge(data) is None]
    return said, answers(neighbours, "repeated", neighbours.closed.worker, said)


def test_what_members_said_gains_little_for_a_stranger_who_says_it_again(
    neighbours: Neighbours, repeated: tuple[list[bytes], list[bytes]]
) -> None:
    said, heard = repeated
    assert sum(map(len, heard)) < 2 * sum(map(len, said))  # each went to two ports
    kinds = {qmesh.DatagramCodec(neighbours.keys.udp_key).decode(data).kind for data in heard}
    assert kinds <= {"ping", "pong", "nodes", "workers", "error"}  # what is known, and nothing is taken for news
    told = neighbours.desk.status(*neighbours.closed.flags)
    assert [worker["worker_id"] for worker in told["workers"]] == [neighbours.closed.worker.processes[0].worker_id]
    assert told["unreachable"] == []


def test_a_member_is_served_right_after_all_of_that(neighbours: Neighbours) -> None:
    neighbours.probes.result()
    again = Talk(neighbours.closed.worker, neighbours.closed.flags, neighbours.closed.prompt, neighbours.closed.system)
    ask(neighbours.desk, again, list)
    assert again.answer == neighbours.closed.answer


def test_a_doctor_tells_whoever_has_no_key_that_the_mesh_is_another(neighbours: Neighbours) -> None:
    told = neighbours.visits["stranger"].result()
    address = neighbours.closed.worker.address_in(neighbours.lan)
    (check,) = [check for check in told["checks"] if check["name"].startswith(f"peer {address}")]
    assert (check["verdict"], check["cause"]) == ("problem", "other_mesh")
    assert not told["ok"]


def test_a_doctor_finds_a_member_well(neighbours: Neighbours) -> None:
    told = neighbours.visits["member"].result()
    assert told["ok"], told
    worker = neighbours.closed.worker.processes[0].worker_id[:6]
    assert {check["verdict"] for check in told["checks"] if f"worker {worker}" in check["name"]} == {"well"}


# --- A key that replaces another ---


@dataclass
class Rotation:
    """A mesh whose key is being replaced: workers that have not heard of it, that have, and that no longer wait."""

    desk: Machine
    old: Path
    new: Path
    both: Path


@pytest.fixture(scope="module")
def rotation(network: Network) -> Rotation:
    folder = network.directory
    today = qmesh.utc_today()
    old, both, over, new = (folder / f"{name}.key" for name in ("old", "both", "over", "new"))
    init(old)
    init(both, "--replace", str(old), "--until", str(today + datetime.timedelta(days=1)))
    first, second = qmesh.parse_mesh_keys(both.read_text("ascii"))
    yesterday = qmesh.MeshKey(second.secret, today - datetime.timedelta(days=1))
    for path, keys in ((new, [first]), (over, [first, yesterday])):
        path.write_text("".join(f"{key.text}\n" for key in keys), "ascii")
        path.chmod(0o600)
    lan = network.lan()
    machines = {name: lan.machine(name) for name in ("waiting", "both", "over")}
    desk = lan.machine("desk")
    started = [
        machine.start_worker("--key", str(path), ready=False)
        for machine, path in zip(machines.values(), (old, both, over), strict=True)
    ]
    for process in started:
        process.wait_ready()
    return Rotation(desk, old, new, both)


@pytest.mark.parametrize(
    ("key", "seen"),
    [("old", {"waiting", "both"}), ("both", {"waiting", "both", "over"}), ("new", {"both", "over"})],
)
def test_while_a_key_is_replaced_those_with_either_see_each_other_until_its_last_day(
    rotation: Rotation, key: str, seen: set[str]
) -> None:
    flags = ("--key", str(getattr(rotation, key)))
    settle(lambda: rotation.desk.reached(*flags), seen, SOON_S)
    answer = rotation.desk.json("prompt", "Hello", "--max-tokens", "4", *flags)
    assert answer["text"]


# --- A sealed archive ---


def test_a_sealed_archive_is_all_that_two_machines_need(network: Network, model_path: Path) -> None:
    folder = network.directory / "sealing"
    folder.mkdir()
    key, archive, sealed = folder / "lab.key", folder / "qmesh.pyz", folder / "lab.pyz"
    told = init(key)
    for step in ((harness.ROOT / "build_zipapp.py", "-o", archive), (archive, "seal", sealed, "--key", key)):
        subprocess.run([sys.executable, *map(str, step)], capture_output=True, env=plain_env(), check=True)
    lan = network.lan()
    worker, desk = lan.machine("worker"), lan.machine("desk")
    for machine in (worker, desk):
        shutil.copy(sealed, machine.directory / sealed.name)
    (worker.directory / "models").mkdir()
    (worker.directory / "models" / model_path.name).symlink_to(model_path)

    def line(machine: Machine, *arguments: str) -> list[str]:
        place = ["env", "-C", str(machine.directory)]
        return [*machine.prefix, *place, sys.executable, sealed.name, *arguments]

    def client(*arguments: str) -> Any:
        env = plain_env(HOME=str(desk.directory))
        return json.loads(subprocess.run(line(desk, *arguments), capture_output=True, env=env, check=True).stdout)

    env = plain_env(HOME=str(worker.directory))
    process = harness.Process(line(worker, "worker", "--json"), env, worker.directory / "worker.log")
    worker.processes.append(process)
    process.wait_ready()
    answer = client("prompt", "Why is the sky blue?", "--max-tokens", "8", "--json")
    assert answer["text"]
    assert answer["worker_id"] == process.worker_id
    status = client("status", "--json")
    assert f"({status['mesh']['fingerprint']})" in told
    assert status["mesh"] == status["workers"][0]["mesh"] == process.ready["mesh"]
    assert not status["mesh"]["open"]
    assert process.stderr == ""
    lines = b"\n".join(command_lines(worker))
    assert sealed.name.encode() in lines
    assert qmesh.KEY_PREFIX.encode() not in lines
