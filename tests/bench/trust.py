"""What trust costs: keys, handshakes, TLS on a stream, memory for strangers, and what slow strangers do to others.

    python tests/bench/trust.py [PART ...] [--rounds N] [--model FILE] [--out DIR]

The parts are mint, handshake, stream, memory and slow; all, where none is named. Sides that are compared take turns
within each round, each in a process of its own. There is no mode without TLS to compare with: `without_tls` makes one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import resource
import secrets
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import report  # noqa: E402
import scripted_worker  # noqa: E402

import qmesh  # noqa: E402

MINTS = 20
HANDSHAKES = 200
TOKENS = 128
STREAMS = (1, 4)
FRAMES = 20_000
FIRST_STRANGERS, STRANGERS = 50, 200  # the first fill what is free; all are fewer than MAX_UNTRUSTED
SETTLE_S = 0.7
ALL_BY_MALLOC = {"PYTHONMALLOC": "malloc"}  # so that nothing is taken in blocks of a megabyte
ATTACKERS = 1000
BEAT_S = 0.2  # a byte of an attacker
WARM_UP_S = 3.0  # the burst that is allowed at first is over
QUIET_AGAIN_S = 6.0  # a burst is allowed again
LONG_TOKENS = 300
NEWCOMERS = 4  # in each round
GAP_GOAL_MS = 250
OPEN_FILES = 4096
OPEN = "trust-bench"
SIDES = ("TLS", "plain")
ENDLESS: dict[str, float] = {"HANDSHAKE_TIMEOUT_S": 600}
UNRATED: dict[str, float] = {"HANDSHAKE_BURST": 1e9, "ALL_HANDSHAKES_BURST": 1e9}


# --- Tables ---


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{report.table(header, rows)}", flush=True)


# --- Children: each answers a line of JSON with a line of JSON; the first line says that it is ready ---


class Child:
    """Another process of this file."""

    def __init__(self, role: str, env: Mapping[str, str] | None = None, **arguments: Any) -> None:
        # Imported, not run: what compiling this file leaves behind would hide what others take.
        start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import trust; trust.be_child()"
        command = [sys.executable, "-c", start, role, json.dumps(arguments)]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.ready = self._read()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()

    def _read(self) -> Any:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "a process of the benchmark has ended"
        return json.loads(line)

    def ask(self, question: Any = None) -> Any:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(question) + "\n")
        self.popen.stdin.flush()
        return self._read()


async def answer(reply: Callable[[Any], Awaitable[Any]], ready: Any) -> None:
    """Answer the parent until it closes."""
    qmesh.print_json(ready)
    while line := await asyncio.to_thread(sys.stdin.readline):
        qmesh.print_json(await reply(json.loads(line)))


class Mallinfo(ctypes.Structure):
    """What mallinfo2 tells: `blocks[4]` bytes in areas of their own, `blocks[7]` in all others."""

    _fields_ = [("blocks", ctypes.c_size_t * 10)]


def allocated() -> int:
    """Bytes that glibc has handed out; 0 where there is another."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo2.restype = Mallinfo
    told = mallinfo2()
    return int(told.blocks[4] + told.blocks[7])


async def usage(question: Any) -> dict[str, float]:
    """What this process has used; question: whether it is to tidy up before."""
    if question:
        gc.collect()
        with contextlib.suppress(AttributeError):  # what others than glibc have free, they keep
            ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_full_info()
    return {
        "cpu_s": time.process_time(),
        "allocated": allocated(),
        "uss": memory.uss,
        "rss": memory.rss,
        "tasks": len(asyncio.all_tasks()),
    }


def identity(topic: str = OPEN) -> qmesh.Identity:
    return qmesh.Identity.ephemeral([qmesh.MeshKeys.derive(topic)])


async def until_closed(connection: qmesh.Connection) -> None:
    while await connection.receive() is not None:
        pass


async def serve(limits: Mapping[str, float]) -> None:
    """A server of ours, with other limits than its own."""
    vars(qmesh).update(limits)
    server = qmesh.TcpServer(until_closed, identity())
    address = await server.start(qmesh.LOOPBACK, 0)

    async def reply(question: Any) -> Any:
        return {**await usage(question), "dropped": dict(server.dropped)}

    await answer(reply, address)
    await server.stop()


# --- 1  Mint ---


class Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        self.laps[name] = 1000 * (time.perf_counter() - self._since)
        self._since = time.perf_counter()


def mint_whole() -> dict[str, float]:
    """As a node does it."""
    watch = Stopwatch()
    membership = identity().memberships[0]
    _ = membership.dialling, membership.listening
    watch.lap("all of it")
    return watch.laps


def mint_in_parts() -> dict[str, float]:
    seed = bytes(range(qmesh.KEY_BYTES))
    watch = Stopwatch()
    keys = qmesh.MeshKeys.derive(OPEN)
    watch.lap("keys from the topic")
    qmesh.ed25519_public_key(seed)
    watch.lap("doublings table")
    public = qmesh.ed25519_public_key(seed)
    watch.lap("a public key")
    authority = qmesh.Authority(keys.ca_seed)
    watch.lap("CA certificate")
    authority.certify(public)
    watch.lap("node's certificate")
    membership = qmesh.Membership(keys, qmesh.NodeKey.of_seed(seed))
    watch.lap("(the three again)")
    _ = membership.dialling
    watch.lap("client's context")
    _ = membership.listening
    watch.lap("server's context")
    del watch.laps["(the three again)"]
    watch.laps["doublings table"] -= watch.laps["a public key"]
    return watch.laps


def part_mint(arguments: argparse.Namespace) -> Iterator[report.Item]:
    laps: dict[str, list[float]] = {}
    for whole in [False, True] * MINTS:
        with Child("mint", whole=whole) as child:
            for name, ms in child.ready.items():
                laps.setdefault(name, []).append(ms)
    for name, times in laps.items():
        yield report.Figure.of(f"minting in a fresh process: {name}", times, "ms")


async def child_mint(*, whole: bool) -> None:
    qmesh.print_json(mint_whole() if whole else mint_in_parts())


# --- 2  Handshake ---


async def greeter() -> None:
    """A server that greets without TLS."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_frame(reader)
        writer.write(qmesh.encode_frame(qmesh.greeting("welcome", qmesh.NodeId(1))))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(on_connection, qmesh.LOOPBACK, 0) as server:
        await answer(usage, server.sockets[0].getsockname())


async def read_frame(reader: asyncio.StreamReader) -> qmesh.Json:
    (size,) = struct.unpack(">I", await reader.readexactly(4))
    return qmesh.parse_json(await reader.readexactly(size))


async def dial_with_tls(address: qmesh.Address, own: qmesh.Identity) -> float:
    started = time.perf_counter()
    connection = await qmesh.dial(address, own)
    took = 1000 * (time.perf_counter() - started)
    await connection.close()
    return took


async def dial_without(address: qmesh.Address, own: qmesh.Identity) -> float:
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(qmesh.encode_frame(qmesh.greeting("hello", own.node_id)))
    await read_frame(reader)
    took = 1000 * (time.perf_counter() - started)
    writer.close()
    await writer.wait_closed()
    return took


async def handshakes(servers: Mapping[str, Child]) -> list[report.Item]:
    own = identity()
    dials = {"TLS": dial_with_tls, "plain": dial_without}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(10):  # to warm up
        for side in SIDES:
            await dials[side](tuple(servers[side].ready), own)
    for side in SIDES:
        cpu[side].append(servers[side].ask()["cpu_s"])
    for _ in range(HANDSHAKES):
        for side in SIDES:
            times[side].append(await dials[side](tuple(servers[side].ready), own))
    for side in SIDES:
        cpu[side].append(servers[side].ask()["cpu_s"])
    spent = {side: 1000 * (after - before) / HANDSHAKES for side, (before, after) in cpu.items()}
    sides = [times[side] for side in SIDES]
    group = "connect and greet"
    return [
        report.ratio(group, sides, "ms", peer="without TLS", group=group),
        *(report.Figure.of(f"{group}, {side}: server's processor", [ms], "ms") for side, ms in spent.items()),
    ]


def part_handshake(arguments: argparse.Namespace) -> Iterator[report.Item]:
    with Child("serve", limits=UNRATED) as ours, Child("greeter") as plain:
        yield from asyncio.run(handshakes({"TLS": ours, "plain": plain}))


# --- 3  TLS on a stream ---


class PlainStream(qmesh.TlsStream):
    """Passes bytes through."""

    def __init__(self) -> None:
        self.tls: Any = None
        self._in, self._out = bytearray(), bytearray()

    def has_hello(self) -> bool:
        return bool(self._in)

    def feed(self, data: memoryview) -> None:
        self._in += data

    def to_send(self) -> bytes:
        data = bytes(self._out)
        self._out.clear()
        return data

    @property
    def unread(self) -> int:
        return len(self._in)

    def read(self) -> bytes | None:
        data = bytes(self._in)
        self._in.clear()
        return data or None

    def write(self, data: bytes) -> None:
        self._out += data

    def close(self) -> None:
        pass


class PlainConnection(qmesh.Connection):
    """Both sides say who they are, and are believed: the dialler first."""

    async def secure(self, identity: qmesh.Identity, dialled: qmesh.Membership | None = None) -> None:
        self._membership = dialled or identity.memberships[0]
        own = bytes.fromhex(str(identity.node_id))
        if dialled is not None:
            self._stream.write(own)
            self._flush()
        while self._stream.unread < len(own):
            await self._more()
        self._certified = (self._stream.read() or b"").hex()
        if dialled is None:
            self._stream.write(own)
            self._flush()


def without_tls() -> None:
    """Make this process's program one that has no TLS."""
    vars(qmesh).update(TlsStream=PlainStream, Connection=PlainConnection)


def changed_program(directory: Path, change: str) -> Path:
    program = directory / "changed.py"
    places = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    lines = ["import sys", f"sys.path[:0] = {places!r}", "import qmesh, trust", change]
    program.write_text("\n".join([*lines, "sys.exit(qmesh.main(sys.argv[1:]))"]), "utf-8")
    return program


def prompt_job(prompt: str, tokens: int) -> qmesh.Job:
    params = qmesh.Sampling(max_tokens=tokens, temperature=0)
    return qmesh.Job(secrets.token_hex(8), prompt=prompt, params=params)


def counting(number: int) -> str:
    """About fifty tokens that no other prompt begins with, and that a small model goes on with for ever."""
    return " ".join(str(1000 * number + count) for count in range(100, 110))


class Asker:
    """A client that stays open; times are milliseconds since the question."""

    def __init__(self, mesh: qmesh.Client) -> None:
        self._mesh = mesh
        self._identity = qmesh.Identity.ephemeral(mesh.meshes)

    async def reply(self, question: Any) -> Any:
        before, started = time.process_time(), time.perf_counter()
        ask = self._fresh if question["fresh"] else self._warm
        jobs = [prompt_job(prompt, question["tokens"]) for prompt in question["prompts"]]
        times = await asyncio.gather(*map(ask, jobs))
        return {
            "first_ms": [stream[0] for stream in times],
            "tokens": sum(map(len, times)),
            "seconds": time.perf_counter() - started,
            "cpu_s": time.process_time() - before,
        }

    async def _warm(self, job: qmesh.Job) -> list[float]:
        return await self._times(self._mesh.run(job))

    async def _fresh(self, job: qmesh.Job) -> list[float]:
        """Over a connection of its own."""
        started = time.perf_counter()
        link = qmesh.WorkerLink(await qmesh.dial(self._mesh.records()[0].address, self._identity))
        dialled_ms = 1000 * (time.perf_counter() - started)
        times = await self._times(link.run(job))
        await link.close()
        return [dialled_ms + ms for ms in times]

    @staticmethod
    async def _times(events: Any) -> list[float]:
        started = time.perf_counter()
        times: list[float] = []
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, qmesh.Token):
                    times += [1000 * (time.perf_counter() - started)] * len(event.tokens)
        return times


async def child_client(*, side: str, topic: str, state: str) -> None:
    if side == "plain":
        without_tls()
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=topic, state_dir=state)
    async with qmesh.Client(settings) as mesh:
        await mesh.discover()
        await answer(Asker(mesh).reply, "ready")


async def child_streamer(*, side: str, topic: str) -> None:
    """A worker that says so many tokens as fast as it can."""
    if side == "plain":
        without_tls()

    async def script(connection: qmesh.Connection, request_id: str) -> bool:
        for seq in range(FRAMES):
            connection.write(scripted_worker.token_frame(request_id, seq, " word"))
            if connection.lagging:
                await connection.drain()
        await connection.send(scripted_worker.result_frame(request_id, ""))
        return True

    async with scripted_worker.ScriptedWorker(script).on(topic):
        await answer(usage, "ready")


@dataclass
class Streamed:
    """What one side did in all rounds."""

    speeds: list[float] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)
    fresh_ms: list[float] = field(default_factory=list)
    client_us: list[float] = field(default_factory=list)
    worker_us: list[float] = field(default_factory=list)

    def add(self, told: Mapping[str, Any]) -> None:
        self.speeds.append(told["tokens"] / told["seconds"])
        self.waits_ms += told["first_ms"]
        self.client_us.append(1e6 * told["cpu_s"] / told["tokens"])


def in_turn(turn: int) -> Sequence[str]:
    return SIDES if turn % 2 else SIDES[::-1]


def question(prompts: Sequence[str], tokens: int, *, fresh: bool = False) -> dict[str, Any]:
    return {"prompts": prompts, "tokens": tokens, "fresh": fresh}


@contextlib.contextmanager
def real_sides(directory: Path, model: Path) -> Iterator[dict[str, Child]]:
    """A worker and a client of each side."""
    threads = str(psutil.cpu_count(logical=False) or 1)
    with contextlib.ExitStack() as stack:
        clients = {}
        for side in SIDES:
            place = directory / side
            place.mkdir()
            program = harness.PROGRAM if side == "TLS" else changed_program(place, "trust.without_tls()")
            mesh = stack.enter_context(harness.Mesh(place, model, program))
            mesh.start_worker("--threads", threads, "--nice", "0")
            state = str(mesh.state_dir)
            clients[side] = stack.enter_context(Child("client", side=side, topic=mesh.topic, state=state))
        yield clients


def real_streams(model: Path, rounds: int) -> Iterator[report.Item]:
    figures = {(side, count): Streamed() for side in SIDES for count in STREAMS}
    numbers = itertools.count(1)
    with tempfile.TemporaryDirectory() as directory, real_sides(Path(directory), model) as clients:
        for turn in range(-1, rounds):  # the first round warms up
            for count, side in itertools.product(STREAMS, in_turn(turn)):
                told = clients[side].ask(question([counting(next(numbers)) for _ in range(count)], TOKENS))
                fresh = [clients[side].ask(question([counting(next(numbers))], 2, fresh=True)) for _ in range(3)]
                if turn >= 0:
                    figures[side, count].add(told)
                    figures[side, count].fresh_ms += [wait for one in fresh for wait in one["first_ms"]]
    for count in STREAMS:
        tls, plain = (figures[side, count] for side in SIDES)
        group = qmesh.plural(count, "stream")
        yield report.ratio(
            f"tokens/s, {group}", (tls.speeds, plain.speeds), "tokens/s", peer="without TLS", group=group
        )
        for side, it in {"TLS": tls, "without TLS": plain}.items():
            yield report.Figure.of(f"first token, warm, {side}, {group}", it.waits_ms, "ms")
            yield report.Figure.of(f"first token, fresh connection, {side}, {group}", it.fresh_ms, "ms")
            yield report.Figure.of(f"client's processor for a token, {side}, {group}", it.client_us, "us")


def scripted_streams(rounds: int) -> Iterator[report.Item]:
    figures = {side: Streamed() for side in SIDES}
    with tempfile.TemporaryDirectory() as state, contextlib.ExitStack() as stack:
        workers, clients = {}, {}
        for side in SIDES:
            topic = f"bench-{secrets.token_hex(8)}"
            workers[side] = stack.enter_context(Child("streamer", side=side, topic=topic))
            clients[side] = stack.enter_context(Child("client", side=side, topic=topic, state=state))
        for turn in range(-1, rounds):
            for side in in_turn(turn):
                before = workers[side].ask()["cpu_s"]
                told = clients[side].ask(question(["go"], FRAMES))
                if turn >= 0:
                    figures[side].add(told)
                    figures[side].worker_us.append(1e6 * (workers[side].ask()["cpu_s"] - before) / FRAMES)
    tls, plain = (figures[side] for side in SIDES)
    group = f"{FRAMES:,} scripted frames"
    yield report.ratio(group, (tls.speeds, plain.speeds), "frames/s", peer="without TLS", group=group)
    for side, it in {"TLS": tls, "without TLS": plain}.items():
        yield report.Figure.of(f"worker's processor for a frame, {side}", it.worker_us, "us")
        yield report.Figure.of(f"client's processor for a frame, {side}", it.client_us, "us")


def part_stream(arguments: argparse.Namespace) -> Iterator[report.Item]:
    yield from real_streams(report.needed_model(arguments.model), arguments.rounds)
    yield from scripted_streams(arguments.rounds)


# --- 4  Memory for those who are not trusted yet ---


@functools.cache
def membership() -> qmesh.Membership:
    return identity().memberships[0]


class Dialler:
    """The dialler's side of TLS, by hand: what is to be sent in `outgoing`."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = membership().server_name
        self._tls = membership().dialling.wrap_bio(self.incoming, self.outgoing, server_hostname=name)

    def step(self) -> bool:
        """Whether the handshake is done."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            return True
        return False

    def hello(self) -> bytes:
        self.step()
        return self.outgoing.read()


class Stranger:
    """A socket to a server, from an address of its own."""

    def __init__(self, address: qmesh.Address, number: int) -> None:
        self.sock = socket.create_connection(address, timeout=10, source_address=(f"127.0.0.{2 + number}", 0))
        self.dialler = Dialler()

    def handshake(self) -> None:
        done = False
        while not done:
            done = self.dialler.step()
            self.sock.sendall(self.dialler.outgoing.read())
            if not done:
                self.dialler.incoming.write(self.sock.recv(65536))


def padded(hello: bytes, size: int) -> bytes:
    """A ClientHello made longer by the extension for that (RFC 7685)."""
    at = 5 + 4 + 2 + 32  # behind the random bytes
    at += 1 + hello[at]
    at += 2 + int.from_bytes(hello[at : at + 2], "big")
    at += 1 + hello[at]
    more = size - len(hello)
    extensions = int.from_bytes(hello[at : at + 2], "big") + more
    body = hello[9:at] + extensions.to_bytes(2, "big") + hello[at + 2 :]
    body += b"\0\x15" + (more - 4).to_bytes(2, "big") + bytes(more - 4)
    return hello[:3] + (len(body) + 4).to_bytes(2, "big") + hello[5:6] + len(body).to_bytes(3, "big") + body


HALF_RECORD = b"\x17\x03\x03" + (6_500).to_bytes(2, "big") + bytes(6_000)


def half_hello(stranger: Stranger) -> None:
    hello = stranger.dialler.hello()
    stranger.sock.sendall(hello[: len(hello) // 2])


def long_hello(stranger: Stranger) -> None:
    stranger.sock.sendall(padded(stranger.dialler.hello(), 4_000)[:-1])


def unfinished_record(stranger: Stranger) -> None:
    stranger.handshake()
    stranger.sock.sendall(HALF_RECORD)


def hello_alone(stranger: Stranger) -> None:
    stranger.sock.sendall(stranger.dialler.hello())


def hello_and_half(stranger: Stranger) -> None:
    hello_alone(stranger)
    stranger.sock.recv(65536)
    stranger.sock.sendall(HALF_RECORD)


STATES: dict[str, Callable[[Stranger], None]] = {
    "silent": lambda stranger: None,
    "half a ClientHello": half_hello,
    "a ClientHello, and nothing more": hello_alone,
    "a ClientHello, and 6,000 of a record's 6,500 bytes": hello_and_half,
    "the handshake, no greeting": Stranger.handshake,
    "3,999 of a ClientHello's 4,000 bytes": long_hello,
    "the handshake, and 6,000 of a record's 6,500 bytes": unfinished_record,
}


def memory_of(state: Callable[[Stranger], None]) -> dict[str, float]:
    """KiB for each stranger in this state; what is left when they have gone; how many were dropped."""
    with Child("serve", ALL_BY_MALLOC, limits=UNRATED | ENDLESS) as child:
        strangers = [Stranger(tuple(child.ready), number) for number in range(FIRST_STRANGERS)]
        for stranger in strangers:
            state(stranger)
        time.sleep(SETTLE_S)
        before = child.ask(True)
        strangers += [Stranger(tuple(child.ready), FIRST_STRANGERS + number) for number in range(STRANGERS)]
        for stranger in strangers[FIRST_STRANGERS:]:
            state(stranger)
        time.sleep(SETTLE_S)
        found = [child.ask(tidy) for tidy in (False, True)]
        served = found[1]["tasks"] - before["tasks"]
        for stranger in strangers:
            stranger.sock.close()
        time.sleep(SETTLE_S)
        left = child.ask(True)["uss"] - before["uss"]
    each = {name: (found[0][name] - before[name]) / 1024 / STRANGERS for name in ("allocated", "uss", "rss")}
    tidied = (found[1]["uss"] - before["uss"]) / 1024 / STRANGERS
    return {**each, "after gc": tidied, "left": left / 1024, "served": served}


def part_memory(arguments: argparse.Namespace) -> Iterator[report.Item]:
    for name, state in STATES.items():
        found = [memory_of(state) for _ in range(arguments.rounds)]
        for key in found[0]:
            unit = "strangers" if key == "served" else "KiB"
            yield report.Figure.of(f"{STRANGERS} strangers, {name}: {key}", [one[key] for one in found], unit)


# --- 5  Slow strangers ---


class Attack:
    """So many strangers, each of whom sends a byte now and then, and comes again when it is dropped."""

    def __init__(self, address: qmesh.Address, *, spread: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._address = address
        self._spread = spread
        self._hello = Dialler().hello()

    def _source(self, number: int) -> str:
        return f"127.1.{number // 250}.{1 + number % 250}" if self._spread else "127.0.0.2"

    async def stranger(self, number: int) -> None:
        await asyncio.sleep(BEAT_S * number / ATTACKERS)
        while True:
            with socket.socket() as sock, contextlib.suppress(OSError):
                await self._trickle(sock, self._source(number))

    async def _trickle(self, sock: socket.socket, source: str) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        sock.bind((source, 0))
        self.counts["tried"] += 1
        try:
            await loop.sock_connect(sock, self._address)
        except OSError:
            await asyncio.sleep(BEAT_S)
            raise
        for at in range(len(self._hello)):
            await loop.sock_sendall(sock, self._hello[at : at + 1])
            await asyncio.sleep(BEAT_S)


async def child_attack(*, address: Sequence[Any], spread: bool) -> None:
    allow_files()
    attack = Attack((address[0], address[1]), spread=spread)
    tasks = [asyncio.create_task(attack.stranger(number)) for number in range(ATTACKERS)]

    async def reply(question: Any) -> Any:
        return {**attack.counts, "cpu_s": time.process_time()}

    await answer(reply, "ready")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def count_hosts() -> None:
    """Make this process's program one that counts by host also on the loopback, as on a network."""
    vars(qmesh).update(sender_of=lambda address: address[0])


class Bystander(asyncio.Protocol):
    """Drops strangers as often as a worker does, and is none."""

    def __init__(self, taken: qmesh.RateLimiter, most: int, per_s: float) -> None:
        self._taken = taken
        self._stay_s = most / per_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        loop = asyncio.get_running_loop()
        if self._taken.allow(("", 0), loop.time()):
            loop.call_later(self._stay_s, transport.abort)
        else:
            transport.abort()


async def child_bystander(*, spread: bool) -> None:
    allow_files()
    each = qmesh.MAX_UNTRUSTED_PER_HOST, qmesh.CONNECTIONS_PER_S, qmesh.CONNECTIONS_BURST
    most, per_s, burst = (qmesh.MAX_UNTRUSTED, qmesh.ACCEPTS_PER_S, qmesh.ACCEPTS_BURST) if spread else each
    taken = qmesh.RateLimiter(burst=burst, per_s=per_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Bystander(taken, most, per_s), qmesh.LOOPBACK, 0, backlog=1024)
    await answer(usage, server.sockets[0].getsockname())
    server.close()


@dataclass
class Situation:
    """What a client saw in all rounds of one kind. spread: whether the attackers have addresses of their own."""

    name: str
    spread: bool | None = None  # None for no attack
    on_bystander: bool = False
    gaps_ms: list[list[float]] = field(default_factory=list)
    tries_per_s: list[float] = field(default_factory=list)
    attack_cpu: list[float] = field(default_factory=list)
    lost: int = 0  # rounds in which the client was dropped
    arrivals_ms: list[float] = field(default_factory=list)
    turned_away: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


SITUATIONS = (
    ("quiet", None, False),
    ("1,000 hosts against the worker", True, False),
    ("1,000 hosts against a bystander", True, True),
    ("one host against the worker", False, False),
    ("one host against a bystander", False, True),
)


class Besieged:
    """A worker, and a client that was there before."""

    def __init__(self, mesh: harness.Mesh) -> None:
        worker = mesh.start_worker("--threads", "1", "--nice", "0", "--slots", "2")
        self.address: qmesh.Address = tuple(worker.ready["tcp"])
        self._identity = identity(mesh.topic)
        self._numbers = itertools.count(1)

    async def open(self) -> None:
        self._link = qmesh.WorkerLink(await qmesh.dial(self.address, self._identity))

    async def mend(self) -> bool:
        """Connect again where the connection was lost; whether it was."""
        lost = not self._link.alive
        if lost:
            await self._link.close()
            await self.open()
        return lost

    async def close(self) -> None:
        await self._link.close()

    async def dropped(self) -> Counter[str]:
        return Counter((await self._link.status())["network"]["connections_dropped"])

    async def gaps(self) -> list[float]:
        """Milliseconds between the tokens of an answer; one without end where the connection was lost."""
        times: list[float] = []
        job = prompt_job(counting(next(self._numbers)), LONG_TOKENS)
        try:
            async with contextlib.aclosing(self._link.run(job)) as said:
                async for event in said:
                    if isinstance(event, qmesh.Token):
                        times.append(1000 * time.perf_counter())
        except qmesh.WorkerLost:
            return [math.inf]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    async def newcomer(self, it: Situation) -> None:
        """Somebody who dials now, once, and asks for the status."""
        started = time.perf_counter()
        try:
            link = qmesh.WorkerLink(await qmesh.dial(self.address, self._identity))
            try:
                await link.status()
            finally:
                await link.close()
            it.arrivals_ms.append(1000 * (time.perf_counter() - started))
        except qmesh.QMeshError as error:
            it.turned_away[type(error).__name__] += 1


@contextlib.contextmanager
def attack_on(it: Situation, worker: qmesh.Address) -> Iterator[Child | None]:
    with contextlib.ExitStack() as stack:
        if it.spread is None:
            yield None
            return
        target = list(worker)
        if it.on_bystander:
            target = stack.enter_context(Child("bystander", spread=it.spread)).ready
        yield stack.enter_context(Child("attack", address=target, spread=it.spread))


async def observe(it: Situation, worker: Besieged) -> None:
    before = await worker.dropped()
    with attack_on(it, worker.address) as attack:
        await asyncio.sleep(WARM_UP_S)
        started, told = time.perf_counter(), attack.ask() if attack else {}
        it.gaps_ms.append(await worker.gaps())
        if attack:
            seconds, after = time.perf_counter() - started, attack.ask()
            it.tries_per_s.append((after.get("tried", 0) - told.get("tried", 0)) / seconds)
            it.attack_cpu.append((after["cpu_s"] - told["cpu_s"]) / seconds)
        for _ in range(NEWCOMERS):
            await worker.newcomer(it)
            await asyncio.sleep(BEAT_S)
    if it.spread is not None and not it.on_bystander:
        await asyncio.sleep(QUIET_AGAIN_S)
    it.lost += await worker.mend()
    it.dropped += await worker.dropped() - before


def slow_row(it: Situation, quiet: Situation) -> list[str]:
    longest, calm = [max(gaps) for gaps in it.gaps_ms], [max(gaps) for gaps in quiet.gaps_ms]
    more = [one - other for one, other in zip(longest, calm, strict=True)]
    lost = f", lost {it.lost} of {len(longest)} times" if it.lost else ""
    every = [gap for gaps in it.gaps_ms for gap in gaps]
    gap = [f"{statistics.median(every):.1f}", f"{report.percentile(every, 0.99):.1f}", report.spread(longest)]
    added = "" if it is quiet else f"{report.spread(more)} {'yes' if max(more) <= GAP_GOAL_MS else 'NO'}"
    attack = [f"{statistics.median(each):.1f}" if each else "" for each in (it.tries_per_s, it.attack_cpu)]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in it.dropped.most_common())
    tries = len(it.arrivals_ms) + it.turned_away.total()
    why = "".join(f", {count} {name}" for name, count in it.turned_away.items())
    ms = f", {report.spread(it.arrivals_ms)} ms" if it.arrivals_ms else ""
    return [
        it.name,
        *gap,
        added + lost,
        *attack,
        f"{len(it.arrivals_ms)} of {tries}{ms}{why}",
        dropped,
    ]


def slow_table(situations: Sequence[Situation]) -> None:
    header = ["situation", "gap, ms", "p99", "longest (from-to)", f"longer than quiet (goal {GAP_GOAL_MS})"]
    header += ["tries/s", "attackers' cores", "newcomers let in", "dropped by the worker"]
    rounds = len(situations[0].gaps_ms)
    markdown(
        [f"{header[0]}, {qmesh.plural(rounds, 'round')}", *header[1:]],
        [slow_row(it, situations[0]) for it in situations],
    )


async def besiege(mesh: harness.Mesh, rounds: int) -> list[Situation]:
    worker = Besieged(mesh)
    await worker.open()
    await worker.gaps()  # to warm up
    situations = [Situation(*about) for about in SITUATIONS]
    for turn in range(rounds):
        start = turn % len(situations)
        for it in [*situations[start:], *situations[:start]]:
            await observe(it, worker)
            print(f"round {turn + 1}: {it.name}: longest gap {max(it.gaps_ms[-1]):.1f} ms", file=sys.stderr)
        slow_table(situations)
    await worker.close()
    return situations


def slow_figures(situations: Sequence[Situation]) -> Iterator[report.Item]:
    for it in situations:
        yield report.Figure.of(f"longest gap, {it.name}", [max(gaps) for gaps in it.gaps_ms], "ms")
        if it.arrivals_ms:
            yield report.Figure.of(f"newcomers let in, {it.name}", it.arrivals_ms, "ms")


def part_slow(arguments: argparse.Namespace) -> Iterator[report.Item]:
    allow_files()
    with tempfile.TemporaryDirectory() as directory:
        program = changed_program(Path(directory), "trust.count_hosts()")
        with harness.Mesh(Path(directory), arguments.model, program) as mesh:
            yield from slow_figures(asyncio.run(besiege(mesh, arguments.rounds)))


# --- Command line ---


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[report.Item]]] = {
    "mint": part_mint,
    "handshake": part_handshake,
    "stream": part_stream,
    "memory": part_memory,
    "slow": part_slow,
}
CHILDREN: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "mint": child_mint,
    "serve": serve,
    "greeter": greeter,
    "client": child_client,
    "streamer": child_streamer,
    "attack": child_attack,
    "bystander": child_bystander,
}


def be_child() -> None:
    role, arguments = sys.argv[1:]
    asyncio.run(CHILDREN[role](**json.loads(arguments)))


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    print(ssl.OPENSSL_VERSION, flush=True)
    for part in arguments.parts or PARTS:
        yield from PARTS[part](arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("parts", nargs="*", metavar="PART", type=report.one_of(PARTS), help=", ".join(PARTS))
    parser.add_argument("--model", type=Path, default=report.MODEL)
    return parser


if __name__ == "__main__":
    report.main("trust", make_parser(), figures)
