"""Everything that parses what comes from outside, under a coverage-guided fuzzer (Atheris, which is libFuzzer).

    python tests/fuzz.py [TARGET ...] [--runs N] [--seconds N] [--jobs N]

Each target runs in a process of its own, from a corpus of valid messages, and ends with one line. What is found is kept
under --out, one file an input: `python tests/fuzz.py TARGET --input FILE` runs that input alone. Needs
`pip install atheris`. tests/test_fuzz.py runs the same targets under Hypothesis, without it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import hashlib
import hmac
import importlib
import importlib.util
import itertools
import math
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
CHILD = "--child"

if sys.argv[1:2] == [CHILD]:  # what counts coverage has to be in place before the module is loaded
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["qmesh"]):
        importlib.import_module("qmesh")

import qmesh  # noqa: E402
from qmesh import Contact, Datagram, HealthState, InvalidRequest, ModelError, NodeId, WireError, WorkerRecord  # noqa: E402

RSS_LIMIT_MB = 1024
INPUT_TIMEOUT_S = 5
SEED = 1
MAX_EDITS = 6  # of one message: more are slower and find no more

KEYS = qmesh.MeshKeys.derive("fuzz")
CODEC = qmesh.DatagramCodec(KEYS.udp_key)
IDS = [NodeId.of_bytes(hashlib.sha256(bytes([number])).digest()) for number in range(256)]
OWN = IDS[0]
HOSTS = ("10.0.0.1", "10.0.0.2", "127.0.0.1", "fe80::1%eth0", "fe80::2%eth1", "2001:db8::1", "192.168.1.9", "fe80::3")
TRANSACTION = bytes(range(qmesh.TRANSACTION_BYTES))


def seal(text: bytes) -> bytes:
    """A datagram around any text, under a right MAC."""
    mac = hmac.digest(KEYS.udp_key, qmesh.DATAGRAM_MAGIC + text, "sha256")[: qmesh.MAC_BYTES]
    return qmesh.DATAGRAM_MAGIC + mac + text


def as_text(data: bytes) -> str:
    """A file's text as the fuzzer's bytes say it, half characters included."""
    return data.decode("utf-8", "surrogateescape")


# --- Parsers: each takes any bytes, and lets nothing escape but the error that is documented ---


def sealed_datagram(data: bytes) -> None:
    raw_datagram(seal(data))
    with contextlib.suppress(UnicodeEncodeError):
        raw_datagram(seal(qmesh.dump_json(edited(data, DATAGRAMS))))


def raw_datagram(data: bytes) -> None:
    reason = CODEC.judge(data)
    for parse in (CODEC.decode, CODEC.parse):
        try:
            datagram = parse(data)
        except WireError:
            continue
        assert parse == CODEC.parse or reason is None, "a datagram that was judged to be bad is decoded"
        assert CODEC.parse(CODEC.encode(datagram)) == datagram, "it does not mean what it says"


def messages(chunks: Iterable[bytes], limit: int = qmesh.MAX_HELLO_BYTES) -> tuple[list[qmesh.Json], str]:
    """What a stream of frames says, and how it ended. A reader holds no more than a frame and the latest chunk."""
    reader, got = qmesh.FrameReader(limit), []
    try:
        for chunk in chunks:
            reader.feed(chunk)
            assert reader.pending <= limit + 4 + len(chunk), "it holds more than a frame and what came last"
            while (message := reader.read()) is not None:
                got.append(message)
            assert reader.pending <= limit + 4, "an unfinished frame is larger than a frame may be"
    except WireError as error:
        return got, str(error)
    return got, f"{reader.pending} bytes pending"


def pieces(data: bytes, sizes: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = 1 + (sizes[at % len(sizes)] if sizes else 0)
        yield data[at : at + size]
        at += size


def frames(data: bytes) -> None:
    sizes, stream = data[:4], data[4:]
    assert messages(pieces(stream, sizes)) == messages([stream]), "it matters where the stream is cut"


def parsed(data: bytes) -> qmesh.Json:
    try:
        return qmesh.parse_json(data)
    except WireError:
        return {}


def json_text(data: bytes) -> None:
    body = parsed(data)
    with contextlib.suppress(InvalidRequest):  # half a surrogate pair
        assert parsed(qmesh.encode_frame(body)[4:]) == body


NASTY: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        7,
        2**32,
        10**400,
        0.5,
        -0.0,
        1e308,
        "",
        "user",
        "stop",
        "10.0.0.1",
        "x" * 65,
        "\ud800",
        "\x1b",
    ),
    *([], {}, [0], ["x"], {"tokens": [1]}, {"": {}}, [[[]]] * 3, {"\ud800": 1}, {"pattern": "(a){9}", "maxItems": 99}),
]


def edited(data: bytes, bodies: Sequence[qmesh.Json]) -> qmesh.Json:
    """A valid body, damaged as the bytes say: most damage to JSON's own text is found out before it means anything."""
    figures = iter(data)
    body = copy.deepcopy(bodies[next(figures, 0) % len(bodies)])
    for figure in itertools.islice(figures, MAX_EDITS):
        place: Any = body
        key = _key(place, figure)
        while place[key] and isinstance(place[key], (dict, list)) and (deeper := next(figures, 255)) < 240:
            place = place[key]
            key = _key(place, deeper)
        act = next(figures, 0) % (len(NASTY) + 4)
        if act < len(NASTY):
            place[key] = copy.deepcopy(NASTY[act])
        elif act == len(NASTY):
            place[key] = _altered(place[key], next(figures, 0), next(figures, 0))
        elif act == len(NASTY) + 1:
            place[key] = base64.b64encode(bytes(figures)).decode()
        elif len(body) > 1 and isinstance(place, dict):
            del place[key]
        if not place:
            break
    return body


def _key(place: Any, figure: int) -> Any:
    return list(place)[figure % len(place)] if isinstance(place, dict) else figure % len(place)


def _altered(value: Any, at: int, byte: int) -> Any:
    """Another byte within base64; another character within text."""
    if not isinstance(value, str) or not value:
        return [value]
    try:
        packed = bytearray(base64.b64decode(value, validate=True))
        packed[at % len(packed)] = byte
        return base64.b64encode(packed).decode()
    except (ValueError, ZeroDivisionError):
        at %= len(value)
        return value[:at] + chr(byte) + value[at + 1 :]


def each_body(data: bytes, bodies: Sequence[qmesh.Json]) -> Iterator[qmesh.Json]:
    yield parsed(data)
    yield edited(data, bodies)


def job(data: bytes) -> None:
    for body in each_body(data, JOBS):
        one_job(body)


def one_job(body: qmesh.Json) -> None:
    try:
        asked = qmesh.Job.from_json(body)
        qmesh.check_schema(asked.params.json_schema)
    except InvalidRequest:
        return
    said = asked.to_json()
    assert qmesh.Job.from_json(said) == asked
    with contextlib.suppress(InvalidRequest):  # half a surrogate pair in the schema
        qmesh.encode_frame(said)


def health(data: bytes) -> None:
    for body in each_body(data, [REPORT]):
        with contextlib.suppress(WireError):
            report = qmesh.HealthReport.from_json(body)
            qmesh.encode_frame(qmesh.HealthReport.from_json(report.to_json()).to_json())


def token(data: bytes) -> None:
    for body in each_body(data, [TOKEN]):
        with contextlib.suppress(WireError):
            piece = qmesh.Token.from_json(body)
            assert qmesh.Token.from_json(piece.to_json("r")) == piece
            qmesh.encode_frame(piece.to_json("r"))


def result(data: bytes) -> None:
    for body in each_body(data, [RESULT]):
        with contextlib.suppress(WireError, InvalidRequest):  # the latter for a figure's name: \\ud800
            answer = qmesh.Result.from_json(body)
            assert qmesh.Result.from_json(answer.to_json("r")) == answer
            qmesh.encode_frame(answer.to_json("r"))


def embed_job(data: bytes) -> None:
    for body in each_body(data, [EMBED_JOB]):
        with contextlib.suppress(InvalidRequest):
            asked = qmesh.EmbedJob.from_json(body)
            assert qmesh.EmbedJob.from_json(asked.to_json()) == asked
            qmesh.encode_frame(asked.to_json())


def embeddings(data: bytes) -> None:
    for body in each_body(data, [EMBEDDINGS]):
        with contextlib.suppress(WireError, InvalidRequest):  # the latter for a figure's name: \\ud800
            made = qmesh.Embeddings.from_json(body)
            assert qmesh.Embeddings.from_json(made.to_json("r")) == made
            assert [len(vector) for vector in made.vectors] == [made.dimensions] * len(made)
            qmesh.encode_frame(made.to_json("r"))


def error(data: bytes) -> None:
    for body in each_body(data, ERRORS):
        said = qmesh.error_from_frame(body)
        assert said.code in qmesh.ERROR_CODES
        assert str(said).isprintable()
        assert len(str(said)) <= qmesh.MAX_ERROR_CHARS


def status(data: bytes) -> None:
    for body in each_body(data, [STRANGERS]):
        assert len(qmesh.strangers_of(body)) <= qmesh.MAX_STRANGERS


def mesh_keys(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        keys = qmesh.parse_mesh_keys(as_text(data))
        assert qmesh.parse_mesh_keys("\n".join(key.text for key in keys)) == keys


def node_key(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        key = qmesh.NodeKey.parse(as_text(data))
        assert qmesh.NodeKey.parse(key.pem) == key


AUTHORITY = qmesh.Authority(KEYS.ca_seed)
NODE_KEY = qmesh.NodeKey.of_seed(bytes(32))


def certificate(data: bytes) -> None:
    try:
        node_id = AUTHORITY.node_id(data)
    except WireError:
        return
    assert node_id != NODE_KEY.node_id or data[:-64] == AUTHORITY.certify(NODE_KEY.public)[:-64]


_SCRATCH = tempfile.TemporaryDirectory()


def gguf(data: bytes) -> None:
    path = Path(_SCRATCH.name, "fuzz.gguf")
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        assert qmesh.read_model(path).size == len(data)


def settings(data: bytes) -> None:
    values = as_text(data).split("\n")
    names = ("QMESH_HOST", "QMESH_PORT", "QMESH_PEERS", "QMESH_TOPIC", "QMESH_TIMEOUT", "QMESH_LOG", "GPU_LAYERS")
    with contextlib.suppress(ValueError):
        qmesh.Settings.resolve({}, dict(zip(names, values, strict=False)))
    for value in values:
        with contextlib.suppress(ValueError):
            assert 0 <= qmesh.parse_address(value, 1)[1] <= 65535


# --- A live node, and a program of what befalls it ---


def address(number: int) -> qmesh.Address:
    return HOSTS[number % len(HOSTS)], 1000 + number // len(HOSTS)


NUMBERS = {address(number): number for number in range(256)}


def contact(number: int) -> Contact:
    return Contact(IDS[number % 256], address(number % 256))


def record(number: int, host: str = qmesh.UNSPECIFIED) -> WorkerRecord:
    return WorkerRecord(IDS[number % 256], (host, 1 + number), number, 80, HealthState.BUSY, 3, "tiny", bytes(8))


@dataclass
class Mesh:
    """One engine, and the whole network around it in the hands of whoever writes the bytes."""

    now: float = 1000.0
    asked: list[tuple[Datagram, qmesh.Address]] = field(default_factory=list)
    tokens: dict[qmesh.Address, bytes] = field(default_factory=dict)
    most_sent: int = 0

    def __post_init__(self) -> None:
        self.engine = qmesh.DhtEngine(keys=KEYS, own=OWN, rng=random.Random(SEED), now=self.now)

    def value(self, name: str, number: int, sender: NodeId, source: qmesh.Address) -> Any:
        several = range(number, number + number % 12)
        if name == "token":
            return self.tokens.get(source, bytes(8)) if number % 8 else bytes(8)
        if name == "record":
            return replace(record(number), worker_id=sender) if number % 8 else record(number, "10.0.0.7")
        if name == "nodes":
            return tuple(map(contact, several))
        if name == "records":
            return tuple(record(each, HOSTS[each % len(HOSTS)]) for each in several)
        if name == "topic":
            return IDS[number] if number % 4 == 3 else KEYS.topic
        plain = {"total": number, "known": number % 2, "code": qmesh.DATAGRAM_ERRORS[number % 3]}
        return plain.get(name, IDS[number] if number else NodeId(0))

    def hear(self, kind: str, who: int, where: int, number: int, flags: int) -> None:
        """A datagram of a kind comes in: a request of anybody's, or a reply to a request of the engine's."""
        source, transaction, sender = address(where), bytes([who, number] * 4), IDS[who]
        if kind not in qmesh.REQUESTS and self.asked:
            request, asked_at = self.asked[-1 - where % len(self.asked)]
            transaction = request.transaction
            source = asked_at if asked_at in NUMBERS and not flags & 4 else source
            sender = sender if flags & 8 else IDS[NUMBERS[source]]
        told = qmesh.DATAGRAMS[kind]
        names = told.fields if flags & 16 else told.required
        body = {name: self.value(name, number, sender, source) for name in names}
        heard = Datagram(kind, transaction, None if flags & 32 else sender, body)
        pad_to = qmesh.MAX_DATAGRAM_BYTES if flags & 1 else qmesh.SMALL_REQUEST_BYTES if flags & 2 else 0
        with contextlib.suppress(WireError):  # too long
            self.receive(CODEC.encode(heard, pad_to=pad_to), source, asks=kind in qmesh.REQUESTS)

    def receive(self, data: bytes, source: qmesh.Address, *, asks: bool) -> None:
        self.engine.receive_datagram(data, source, self.now)
        sent = self.take()
        if asks:
            assert sum(len(each) for each, _ in sent) <= len(data), "a request makes it send more than itself"
            assert {to for _, to in sent} <= {source}, "a request makes it write to somebody else"
        else:
            assert len(sent) <= 2 * qmesh.K + qmesh.LOOKUP_CONCURRENCY, "a reply makes it send without measure"

    def wake(self, now: float) -> None:
        self.now = max(self.now, now)
        self.engine.handle_timer(self.now)
        assert self.engine.get_timer() > self.now, "a timer that is due at once again would spin"
        assert len(self.take()) <= 2 * qmesh.MAX_TRANSACTIONS

    def wish(self, number: int, flags: int) -> None:
        """The owner wants something."""
        wishes: list[Callable[[], object]] = [
            lambda: self.engine.find_workers(self.now, everything=bool(flags & 1)),
            lambda: self.engine.announce(replace(record(number), worker_id=OWN), self.now, at_once=bool(flags & 1)),
            lambda: self.engine.withdraw(self.now),
            lambda: self.engine.meet(map(address, range(number % 64)), self.now),
            lambda: self.engine.restart(self.now),
            lambda: self.engine.find_node(IDS[number], self.now),
        ]
        wishes[number % len(wishes)]()
        self.take()

    def take(self) -> list[tuple[bytes, qmesh.Address]]:
        """What the engine sends and says; all of it has to make sense to others."""
        while self.engine.next_event() is not None:
            pass
        sent = self.engine.datagrams_to_send(self.now)
        for data, to in sent:
            said = CODEC.decode(data)
            if said.kind in qmesh.REQUESTS:
                self.asked.append((said, to))
            elif "token" in said.body:
                self.tokens[to] = said.body["token"]
        del self.asked[:-64]
        assert len(self.engine.table) <= qmesh.MAX_TABLE_NODES
        assert not math.isnan(self.engine.get_timer())
        return sent


STEP_BYTES = 5
KINDS = tuple(qmesh.DATAGRAMS)
RAW, LATER, MUCH_LATER, NEXT_TIMER, WISH = range(len(KINDS), len(KINDS) + 5)


def dht(data: bytes) -> None:
    """Five bytes a step: what happens, and four figures of it."""
    mesh, at = Mesh(), 0
    while at + STEP_BYTES <= len(data):
        act, *figures = data[at : at + STEP_BYTES]
        who, where, number, flags = figures
        at += STEP_BYTES
        act %= WISH + 1
        if act < len(KINDS):
            mesh.hear(KINDS[act], who, where, number, flags)
        elif act == RAW:
            mesh.receive(seal(data[at : at + number]), address(where), asks=True)
            at += number
        elif act == WISH:
            mesh.wish(number, flags)
        else:
            due = mesh.engine.get_timer() if act == NEXT_TIMER else 0.0
            mesh.wake(max(due, mesh.now + who / (64 if act == LATER else 1)))


# --- Seeds ---


def sample(name: str) -> Any:
    return Mesh().value(name, 9, IDS[9], address(9))


def datagram_seeds() -> list[bytes]:
    every = [
        Datagram(kind, TRANSACTION, IDS[9], {name: sample(name) for name in told.fields})
        for kind, told in qmesh.DATAGRAMS.items()
    ]
    return [CODEC.encode(replace(each, body=_fewer(each.body))) for each in every]


def _fewer(body: Any) -> Any:
    return {name: value[:3] if isinstance(value, tuple) else value for name, value in body.items()}


JOBS = [
    each.to_json()
    for each in (
        qmesh.Job("r", prompt="hello", model="tiny", resume=qmesh.Resume((1, 2), "ab"), timeout_s=1.5),
        qmesh.Job("r", (qmesh.Message("system", "be brief"), qmesh.Message("user", "é"))),
        qmesh.Job("r", prompt="x", params=qmesh.Sampling(seed=1, stop=("a", "b"), json_schema={"type": "object"})),
        qmesh.Job(
            "r", prompt="x", params=qmesh.Sampling(json_schema={"items": {"pattern": "(a|b){2,3}", "maxLength": 9}})
        ),
    )
]
REPORT = qmesh.HealthReport(50.5, HealthState.BUSY, 10, 20, 30).to_json()
TOKEN = qmesh.Token(3, (1, 2), "ab").to_json("r")
EMBED_JOB = qmesh.EmbedJob("r", ("one", "two"), "tiny", qmesh.Resume((), "ab"), 9.5).to_json()
EMBEDDINGS = qmesh.Embeddings(struct.pack("<4f", 1, 0, 0.6, 0.8), 2, {"prompt_tokens": 3}, "m", "ab", "cd").to_json("r")
RESULT = qmesh.Result("text", "stop", {"prompt_tokens": 1}, {"queue_ms": 0.5}, "tiny", "ab").to_json("r")
ERRORS = [
    qmesh.error_frame("r", each)
    for each in (qmesh.Refused("full"), InvalidRequest("why"), qmesh.ModelNotFound("x"), qmesh.DeadlineExceeded("x"))
]
STRANGERS = {"network": {"strangers": [{"host": "10.0.0.1", "reason": "mesh", "age_s": 1.5}]}}
KEY = qmesh.MeshKey(bytes(range(32)))
OLD_KEY = f"{qmesh.KEY_PREFIX}{'a' * 52} until 2030-12-31"


DATAGRAMS = [qmesh.parse_json(data[qmesh.DATAGRAM_HEADER_BYTES :]) for data in datagram_seeds()]


def json_seeds(*bodies: qmesh.Json) -> list[bytes]:
    return [qmesh.dump_json(body) for body in bodies]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_seeds() -> list[bytes]:
    numbers = {"general.file_type": 2, "llama.context_length": 64, "llama.block_count": 3, "general.alignment": 32}
    heads = {"llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    pairs = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    pairs += [string(name) + struct.pack("<II", 4, number) for name, number in {**numbers, **heads}.items()]
    pairs += [string("list") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("")]
    pairs += [string("numbers") + struct.pack("<IIQ3H", 9, 2, 3, 1, 2, 3)]
    tensors = [string("t") + struct.pack("<IQQIQ", 2, 5, 3, 0, 0)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return [head + bytes(-len(head) % 32) + bytes(60), b"GGUF" + struct.pack("<IQQ", 2, 0, 0) + bytes(8)]


def dht_seeds() -> list[bytes]:
    """A node that is met, searched through, announced to, and left alone; and a flood of requests."""
    kind = {name: number for number, name in enumerate(KINDS)}
    answers = [(kind[name], 9, where, 10, 16) for name in ("pong", "nodes", "workers", "ok") for where in range(3)]
    owner = [(WISH, 0, 0, number, 1) for number in (63, 61, 60, 65, 64, 62)]
    asks = [(kind[name], who, who, who, 1 | 16) for name in KINDS if name in qmesh.REQUESTS for who in (1, 9)]
    waits = [(NEXT_TIMER, 0, 0, 0, 0), (LATER, 60, 0, 0, 0), (MUCH_LATER, 30, 0, 0, 0)]
    lives = owner[:1] + answers + owner[1:2] + answers * 2 + waits
    programs = [asks * 3, lives, asks + answers * 2 + waits, owner * 2 + waits]
    raw = bytes([RAW, 0, 9, 40, 0]) + datagram_seeds()[0][qmesh.DATAGRAM_HEADER_BYTES :][:40]
    return [b"".join(map(bytes, program)) for program in programs] + [raw]


@dataclass(frozen=True)
class Target:
    """run: takes any bytes, and raises what nobody documented. size: the longest input worth trying."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    size: int = 1200


def headless() -> list[bytes]:
    return [data[qmesh.DATAGRAM_HEADER_BYTES :] for data in datagram_seeds()]


TARGETS = {
    "datagram": Target(sealed_datagram, headless),
    "raw": Target(raw_datagram, datagram_seeds, 1201),
    "frames": Target(
        frames, lambda: [bytes([9, 0, 99, 4]) + qmesh.encode_frame(TOKEN) + qmesh.encode_frame(RESULT)], 512
    ),
    "json": Target(json_text, lambda: [*json_seeds(JOBS[1], RESULT), b'{"a":[1e9,-0.5,null,true,"\\ud83d"]}']),
    "job": Target(job, lambda: json_seeds(*JOBS), 4096),
    "health": Target(health, lambda: json_seeds(REPORT), 512),
    "token": Target(token, lambda: json_seeds(TOKEN), 512),
    "result": Target(result, lambda: json_seeds(RESULT), 512),
    "embed_job": Target(embed_job, lambda: json_seeds(EMBED_JOB), 1024),
    "embeddings": Target(embeddings, lambda: json_seeds(EMBEDDINGS), 512),
    "error": Target(error, lambda: json_seeds(*ERRORS), 512),
    "status": Target(status, lambda: json_seeds(STRANGERS), 512),
    "dht": Target(dht, dht_seeds, 64 * STEP_BYTES),
    "mesh_keys": Target(mesh_keys, lambda: [KEY.text.encode(), f"# ours\n{KEY.text}\n{OLD_KEY}\n".encode()], 256),
    "node_key": Target(node_key, lambda: [NODE_KEY.pem.encode()], 256),
    "certificate": Target(certificate, lambda: [AUTHORITY.certify(NODE_KEY.public), AUTHORITY.certificate], 512),
    "gguf": Target(gguf, gguf_seeds),
    "settings": Target(settings, lambda: [b"10.0.0.1\n47475\n[::1]:5 lab:9,10.0.0.2\nlab\n1.5\ninfo\n-1"], 256),
}


# --- Running them ---


def run_child(name: str, arguments: Sequence[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    atheris.Setup([name, *arguments], TARGETS[name].run)
    atheris.Fuzz()


def fuzz(name: str, runs: int, seconds: int, out: Path) -> bool:
    """Run one target and print its line; whether nothing was found."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds()):
            Path(corpus, f"seed-{number}").write_bytes(seed)
        limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={INPUT_TIMEOUT_S}"]
        limits += [f"-rss_limit_mb={RSS_LIMIT_MB}", f"-max_len={target.size}"]
        report = [f"-seed={SEED}", "-print_final_stats=1", f"-artifact_prefix={out / name}-"]
        command = [sys.executable, __file__, CHILD, name, *limits, *report, corpus]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        took = time.monotonic() - started
    said = done.stdout + done.stderr
    executed = max(map(int, re.findall(r"(?:executed_units: +|^#)(\d+)", said, re.MULTILINE)), default=0)
    edges = re.findall(r"\bcov: (\d+)", said) or ["0"]
    crashes = int(done.returncode != 0)  # a target ends at its first
    row = f"{name:12} {executed:>10,} {took:>8.0f} {executed / took:>9,.0f} {edges[0]:>6} {edges[-1]:>6}  {crashes}"
    print(row, flush=True)
    if done.returncode:
        print("\n".join(said.splitlines()[-60:]), flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all, by default")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each target")
    parser.add_argument("--seconds", type=int, default=0, help="at most, for each target; 0 is without end")
    parser.add_argument("--jobs", type=int, default=1, help="targets at once")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "qmesh-fuzz"), help="for what is found")
    parser.add_argument("--input", type=Path, help="run this input alone, without atheris")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    names = arguments.targets or list(TARGETS)
    if arguments.input is not None:
        for name in names:
            TARGETS[name].run(arguments.input.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("the fuzzer is missing: pip install atheris", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{'target':12} {'runs':>10} {'seconds':>8} {'runs/s':>9} {'seeds':>6} {'edges':>6}  crashes", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        clean = list(pool.map(lambda name: fuzz(name, arguments.runs, arguments.seconds, arguments.out), names))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        run_child(sys.argv[2], sys.argv[3:])
    sys.exit(main())
