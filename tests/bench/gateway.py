"""What the gateway costs: waits and tokens per second against a client of the mesh, and against llama.cpp's own server.

    python tests/bench/gateway.py [--rounds N] [--pairs N] [--streams N ...] [--threads N] [--no-peer] [--out DIR]

Three sides answer the same questions in turn in each round: one worker asked through `Client`, the same worker asked
over HTTP through a gateway, and llama.cpp's server, built from the code that our engine runs on, with the same model,
threads, slots and context. One process asks them all: it reads events as lines off the socket and looks into no more of
them than it must, on a connection of its own for each request; its share of a core is printed, as is the gateway's.

Added waits are of pairs from the same round; the gateway's processor time is what it takes on any machine, however
busy. Where others are at work, `--threads 1` keeps llama.cpp's threads from waiting for each other. The peer is
set up by peers.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

import qmesh  # noqa: E402

DIRECT, GATEWAY, PEER = "the library", "gateway", "llama.cpp server"
GOAL_STREAMS = 4  # at which the goal for tokens per second is held against the gateway
ASK = "--ask"  # what the process that asks is started with
TOKENS = 128
WORDS = 10  # of a prompt
SHORT_WORDS = 1  # so that what the model makes of it, and how long that takes by chance, hides as little as may be
SHORT_TOKENS = (1, 32)
SLOTS = 8
CONTEXT = 2048
LIMIT_S = 300
REPORT_LIMIT_BYTES = 2**20
NUMBERS_FROM = 1000  # so that all prompts are of the same length


def prompt(number: int, words: int) -> str:
    """Eight tokens a word, which no other prompt begins with, and which a small model goes on with for ever."""
    return " ".join(str(1000 * (NUMBERS_FROM + number) + count) for count in range(100, 100 + words))


# --- The process that asks ---


@dataclass(frozen=True)
class Stream:
    """One answer as its reader saw it; times in seconds by the asking process's clock."""

    started: float
    first: float
    ended: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """Several answers at once, and the processor time that asking for them took."""

    streams: tuple[Stream, ...]
    cpu_s: float

    @property
    def wall_s(self) -> float:
        return max(stream.ended for stream in self.streams) - min(stream.started for stream in self.streams)

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)


async def over_http(port: int, text: str, tokens: int) -> Stream:
    body = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    payload = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    first, last = 0.0, b""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(harness.LOOPBACK, port)
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    status = await reader.readline()
    assert b" 200 " in status, (status, await reader.read(2000))
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the stream ended early"
        if line.startswith(b"data: {"):
            if not first and json.loads(line[6:])["choices"][0]["text"]:
                first = time.perf_counter()
            last = line
    ended = time.perf_counter()
    writer.close()
    return Stream(started, first, ended, json.loads(last[6:])["usage"]["completion_tokens"])


async def through_client(client: qmesh.Client, text: str, tokens: int) -> Stream:
    first, started = 0.0, time.perf_counter()
    job = qmesh.Job(secrets.token_hex(8), prompt=text, params=qmesh.Sampling(max_tokens=tokens, temperature=0))
    async with contextlib.aclosing(client.run(job)) as run:
        async for event in run:
            if isinstance(event, qmesh.Token) and event.text:
                first = first or time.perf_counter()
            elif isinstance(event, qmesh.Answer):
                return Stream(started, first, time.perf_counter(), event.result.usage["completion_tokens"])
    raise AssertionError("an answer is the last event")


async def ask(orders: str) -> None:
    """Answer lines of JSON on stdin with lines of JSON: `port` (0: through the mesh), `prompts`, `tokens`."""
    topic, state_dir = json.loads(orders)
    async with qmesh.Client(qmesh.Settings(host=harness.LOOPBACK, topic=topic, state_dir=state_dir)) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            port, tokens, began = order["port"], order["tokens"], time.process_time()
            async with asyncio.timeout(LIMIT_S):
                streams = await asyncio.gather(
                    *(
                        over_http(port, text, tokens) if port else through_client(client, text, tokens)
                        for text in order["prompts"]
                    )
                )
            print(json.dumps(asdict(Load(tuple(streams), time.process_time() - began))), flush=True)


class Asker:
    """The process that asks."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._asked = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, topic: str, state_dir: Path) -> AsyncIterator[Asker]:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), asyncio.subprocess.PIPE)
        command = [sys.executable, __file__, ASK, json.dumps([topic, str(state_dir)])]
        process = await asyncio.create_subprocess_exec(*command, **pipes, limit=REPORT_LIMIT_BYTES)
        try:
            yield cls(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # which ends it
            await process.wait()

    async def load(self, port: int, count: int, tokens: int, words: int) -> Load:
        """As many answers at once, each to a prompt that was never asked before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        prompts = [prompt(self._asked + at, words) for at in range(count)]
        self._asked += count
        order = json.dumps({"port": port, "prompts": prompts, "tokens": tokens})
        self._process.stdin.write(f"{order}\n".encode())
        line = await self._process.stdout.readline()
        assert line, "the process that asks has ended"
        told = json.loads(line)
        load = Load(tuple(Stream(**stream) for stream in told["streams"]), told["cpu_s"])
        assert all(stream.tokens == tokens for stream in load.streams), "an answer ended early"
        return load


# --- What is measured ---


class Sides:
    """The sides by their name, and the processor time of the gateway."""

    def __init__(self, asker: Asker, gateway: harness.Process, peer: peers.HttpPeer | None) -> None:
        self._asker = asker
        self._gateway = psutil.Process(gateway.popen.pid)
        self._ports = {DIRECT: 0, GATEWAY: int(gateway.ready["url"].rpartition(":")[2])}
        if peer is not None:
            self._ports[PEER] = peer.port

    @property
    def names(self) -> list[str]:
        return list(self._ports)

    async def load(self, name: str, count: int, tokens: int, words: int) -> tuple[Load, float]:
        """The load, and the gateway's processor time, in seconds."""
        before = self._gateway.cpu_times()
        load = await self._asker.load(self._ports[name], count, tokens, words)
        after = self._gateway.cpu_times()
        return load, after.user + after.system - before.user - before.system


class Waits:
    """Milliseconds to the first token and to the end, for short answers: the same place is the same pair."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._gateway_s = 0.0  # of its processor time, in all
        self._of: dict[tuple[str, str], list[float]] = {}

    async def pair(self, sides: Sides, turn: int) -> None:
        for name in (DIRECT, GATEWAY) if turn % 2 else (GATEWAY, DIRECT):
            load, gateway_s = await sides.load(name, 1, self.tokens, SHORT_WORDS)
            (stream,) = load.streams
            self._gateway_s += gateway_s if name == GATEWAY else 0.0
            self._of.setdefault((name, "first token"), []).append(1000 * (stream.first - stream.started))
            self._of.setdefault((name, "whole answer"), []).append(1000 * (stream.ended - stream.started))

    def figures(self) -> Iterator[report.Item]:
        answer = f"answer of {qmesh.plural(self.tokens, 'token')}"
        for what in ("first token", "whole answer"):
            sides = [self._of[name, what] for name in (GATEWAY, DIRECT)]
            goal = "gateway.wait" if (what, self.tokens) == ("first token", SHORT_TOKENS[0]) else ""
            group = f"{what}, {answer}"
            yield report.added(f"{group}: added", sides, "ms", own=GATEWAY, peer=DIRECT, group=group, goal=goal)
        spent = 1000 * self._gateway_s / len(self._of[GATEWAY, "first token"])
        yield report.Figure.of(f"processor of the gateway, {answer}", [spent], "ms")


class Speeds:
    """Tokens per second and waits of every side at one number of streams: the same place is the same run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.of: dict[str, list[float]] = {}
        self._first_ms: dict[str, list[float]] = {}
        self._cores: dict[str, list[float]] = {}
        self._gateway_s, self._gateway_tokens = 0.0, 0  # of its processor time, for so many tokens

    async def turn(self, sides: Sides, turn: int) -> None:
        names = sides.names
        start = turn % len(names)  # no side always follows the same one
        for name in names[start:] + names[:start]:
            load, gateway_s = await sides.load(name, self.count, TOKENS, WORDS)
            self.of.setdefault(name, []).append(load.tokens / load.wall_s)
            waits = [1000 * (stream.first - stream.started) for stream in load.streams]
            self._first_ms.setdefault(name, []).append(statistics.median(waits))
            self._cores.setdefault(name, []).append(load.cpu_s / load.wall_s)
            if name == GATEWAY:
                self._gateway_s += gateway_s
                self._gateway_tokens += load.tokens

    def figures(self) -> Iterator[report.Item]:
        group = qmesh.plural(self.count, "stream")
        for name in self.of:
            if name != GATEWAY:
                goal = "gateway.speed" if (name, self.count) == (DIRECT, GOAL_STREAMS) else ""
                sides = self.of[GATEWAY], self.of[name]
                yield report.ratio(
                    f"tokens/s, {group}", sides, "tokens/s", own=GATEWAY, peer=name, group=group, goal=goal
                )
            yield report.Figure.of(f"first token, {name}, {group}", self._first_ms[name], "ms")
            yield report.Figure.of(f"processor of who asks, {name}, {group}", self._cores[name], "cores")
        spent = 1000 * self._gateway_s / self._gateway_tokens
        yield report.Figure.of(f"processor of the gateway for a token, {group}", [spent], "ms")


async def measure(sides: Sides, counts: Sequence[int], runs: int, pairs: int) -> tuple[list[Waits], list[Speeds]]:
    waits, speeds = [Waits(tokens) for tokens in SHORT_TOKENS], [Speeds(count) for count in counts]
    await Waits(1).pair(sides, 0)  # which warm up
    await Speeds(1).turn(sides, 0)
    for run in range(runs):
        for turn in range(pairs):
            for short in waits:
                await short.pair(sides, turn)
        for speed in speeds:
            await speed.turn(sides, run)
        print(f"round {run + 1} of {runs}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return waits, speeds


# --- The figures ---


async def compare(mesh: harness.Mesh, arguments: argparse.Namespace) -> list[report.Item]:
    threads = arguments.threads
    setup = peers.Setup(mesh.model, SLOTS, CONTEXT, threads)
    sizes = ["--slots", str(SLOTS), "--ctx", str(CONTEXT), "--threads", str(threads)]
    missing: list[report.Item] = []
    mesh.start_worker(*sizes, "--nice", "0")
    gateway = mesh.start_gateway()
    async with contextlib.AsyncExitStack() as stack:
        peer = None
        if arguments.peer:
            try:
                peer = peers.BuiltLlamaServer(setup)
                stack.push_async_callback(peer.close)
                await peer.ready()
            except report.CannotMeasure as reason:
                missing.append(report.Missing("gateway.peer", str(reason)))
        asker = await stack.enter_async_context(Asker.started(mesh.topic, mesh.directory / "asker"))
        sides = Sides(asker, gateway, peer)
        waits, speeds = await measure(sides, arguments.streams, arguments.rounds, arguments.pairs)
    items = [figure for short in waits for figure in short.figures()]
    return [*items, *(figure for speed in speeds for figure in speed.figures()), *missing]


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    model, threads = report.needed_model(), qmesh.plural(arguments.threads, "thread")
    print(f"{model.stem}, {SLOTS} slots of {CONTEXT} tokens, {threads}", flush=True)
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), model) as mesh:
        yield from asyncio.run(compare(mesh, arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--pairs", type=int, default=20, help="of short answers in each round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave llama.cpp's server out")
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == [ASK]:
        asyncio.run(ask(sys.argv[2]))
    else:
        report.main("gateway", make_parser(), figures)
