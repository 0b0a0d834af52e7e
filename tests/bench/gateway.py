"""What the gateway costs: waits and tokens per second against a client of the mesh, and against llama.cpp's own server.

    python tests/bench/gateway.py [--runs N] [--pairs N] [--streams N ...] [--threads N] [--no-peer]

Three sides answer the same questions in turn within each run: one worker asked through `Client`, the same worker asked
over HTTP through a gateway, and llama.cpp's server, built from the code that our engine runs on, with the same model,
threads, slots and context. One process asks them all: it reads events as lines off the socket and looks into no more of
them than it must, on a connection of its own for each request; its share of a core is printed, as is the gateway's.

Ratios and added waits are medians over pairs from the same run, since a shared machine changes its mind between two;
the gateway's processor time is what it takes on any machine, however busy. Where others are at work, `--threads 1`
keeps llama.cpp's threads from waiting for each other. A Markdown table comes first, then all figures as a line of JSON.
The peer is set up by peers.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import peers  # noqa: E402

import qmesh  # noqa: E402

DIRECT, GATEWAY, PEER = "direct", "gateway", "llama.cpp server"
TOKENS = 128
WORDS = 10  # of a prompt
SHORT_WORDS = 1  # so that what the model makes of it, and how long that takes by chance, hides as little as may be
SHORT_TOKENS = (1, 32)
SLOTS = 8
CONTEXT = 2048
LIMIT_S = 300
REPORT_LIMIT_BYTES = 2**20
GOAL_ADDED_MS = 3.0
GOAL_RATIO = 0.97
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
        command = [sys.executable, __file__, "--ask", json.dumps([topic, str(state_dir)])]
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


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


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

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(what) for what in ("first token", "whole answer")]

    def _row(self, what: str) -> dict[str, Any]:
        direct, gateway = self._of[DIRECT, what], self._of[GATEWAY, what]
        added = [theirs - ours for ours, theirs in zip(direct, gateway, strict=True)]
        row: dict[str, Any] = {"tokens": self.tokens, "what": what, "pairs": len(added)}
        for name, values in {"direct_ms": direct, "gateway_ms": gateway, "added_ms": added}.items():
            row |= {f"{name}_p50": statistics.median(values), f"{name}_p99": percentile(values, 0.99)}
        row["added_of_p99_ms"] = row["gateway_ms_p99"] - row["direct_ms_p99"]
        return row | {"gateway_cpu_ms": 1000 * self._gateway_s / len(added)}


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

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(name) for name in self.of]

    def _row(self, name: str) -> dict[str, Any]:
        values, waits = self.of[name], self._first_ms[name]
        ratios = [ours / theirs for ours, theirs in zip(self.of[GATEWAY], values, strict=True)]
        return {
            "streams": self.count,
            "side": name,
            "tokens_per_s": statistics.median(values),
            "tokens_per_s_range": (min(values), max(values)),
            "first_token_ms": statistics.median(waits),
            "first_token_ms_range": (min(waits), max(waits)),
            "gateway_is": (statistics.median(ratios), min(ratios), max(ratios)),
            "asker_cores": statistics.median(self._cores[name]),
            "gateway_cpu_ms_per_token": 1000 * self._gateway_s / self._gateway_tokens if name == GATEWAY else None,
        }


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
        print(f"run {run + 1} of {runs}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return waits, speeds


# --- The report ---


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def waits_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["max_tokens", "time to", "direct p50 / p99", "gateway p50 / p99", "added p50", "goal", "added to p99"]
    header += ["gateway, CPU ms"]
    lines = []
    for it in rows:
        sides = [f"{it[f'{side}_ms_p50']:.1f} / {it[f'{side}_ms_p99']:.1f} ms" for side in (DIRECT, GATEWAY)]
        added = [f"{it['added_ms_p50']:.1f} ms", f"{GOAL_ADDED_MS:g} ms", f"{it['added_of_p99_ms']:.1f} ms"]
        lines.append([str(it["tokens"]), it["what"], *sides, *added, f"{it['gateway_cpu_ms']:.2f}"])
    return table(header, lines)


def speeds_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["streams", "side", "tokens/s (spread)", "first token (spread)", "the gateway is (spread)", "goal"]
    header += ["asker, cores", "gateway, CPU ms a token"]
    lines = []
    for it in rows:
        ratio = "{:.3f} x ({:.3f}-{:.3f})".format(*it["gateway_is"])
        cpu = it["gateway_cpu_ms_per_token"]
        lines.append(
            [
                str(it["streams"]),
                it["side"],
                "{:.1f} ({:.1f}-{:.1f})".format(it["tokens_per_s"], *it["tokens_per_s_range"]),
                "{:.0f} ({:.0f}-{:.0f}) ms".format(it["first_token_ms"], *it["first_token_ms_range"]),
                "" if it["side"] == GATEWAY else ratio,
                f"{GOAL_RATIO} x" if it["side"] == DIRECT else "",
                f"{it['asker_cores']:.2f}",
                "" if cpu is None else f"{cpu:.2f}",
            ]
        )
    return table(header, lines)


async def compare(mesh: harness.Mesh, arguments: argparse.Namespace) -> None:
    threads = arguments.threads
    setup = peers.Setup(mesh.model, SLOTS, CONTEXT, threads)
    sizes = ["--slots", str(SLOTS), "--ctx", str(CONTEXT), "--threads", str(threads)]
    mesh.start_worker(*sizes, "--nice", "0")
    gateway = mesh.start_gateway()
    async with contextlib.AsyncExitStack() as stack:
        peer = peers.BuiltLlamaServer(setup) if arguments.peer else None
        if peer is not None:
            stack.push_async_callback(peer.close)
            await peer.ready()
        asker = await stack.enter_async_context(Asker.started(mesh.topic, mesh.directory / "asker"))
        before = os.getloadavg()
        sides = Sides(asker, gateway, peer)
        waits, speeds = await measure(sides, arguments.streams, arguments.runs, arguments.pairs)
    machine = f"{platform.system()} {platform.machine()}, {psutil.cpu_count(logical=False)} cores"
    load = f"load of the machine before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}"
    sizes_told = f"{SLOTS} slots of {CONTEXT} tokens, {qmesh.plural(threads, 'thread')}"
    print(f"{mesh.model.stem}, {sizes_told}; {machine}; {load}")
    print(f"medians of {arguments.runs} runs; {arguments.runs * arguments.pairs} pairs of short answers\n")
    short, long = [row for it in waits for row in it.rows()], [row for it in speeds for row in it.rows()]
    print(waits_table(short), speeds_table(long), sep="\n\n")
    print("\n" + json.dumps({"machine": machine, "load": load, "waits": short, "speeds": long}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=20, help="of short answers in each run")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave llama.cpp's server out")
    parser.add_argument("--ask", help=argparse.SUPPRESS)  # what the process that asks is started with
    arguments = parser.parse_args()
    if arguments.ask is not None:
        asyncio.run(ask(arguments.ask))
        return
    model = ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), model) as mesh:
        asyncio.run(compare(mesh, arguments))


if __name__ == "__main__":
    main()
