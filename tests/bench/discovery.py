"""How fast workers are found and connected, beside Hyperswarm; idle traffic, and sizes of replies.

    python tests/bench/discovery.py [--workers N ...] [--rounds N] [--idle-s S] [--only PART ...] [--out DIR]

Everything stays on 127.0.0.1. Hyperswarm comes from npm and is set up under ~/.cache/qmesh-bench (or QMESH_BENCH_DIR);
without npm, only QMesh is measured, and the figures say so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import goals  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from scripted_worker import Script, ScriptedWorker, announced, record_of, says  # noqa: E402

import qmesh  # noqa: E402
from qmesh import Address, NodeId, WorkerRecord  # noqa: E402

PARTS = ("qmesh", "hyperswarm", "idle")
PATIENCE_S = 20.0  # what has not been found by then never will be; hyperswarm_peer.mjs waits as long
DIALS_AT_ONCE = 3  # as Hyperswarm does, by default
SETTLE_S = 7.0  # the dense beacons of a worker's start are over by then
MOST_SETTLE_S = 120.0  # a mesh that is not calm by then is measured as it is
CALM_SHARE = 0.5  # of one core: what idle nodes use stays below it, what nodes use that still meet does not
CALM_SECONDS = 3  # in a row
NO_SERVER = 9  # the port of a record that nobody dials
WAYS, UNITS = ("sent", "heard"), ("datagrams", "bytes")
CONNECTED = "QMesh connected"
COMPARED = (("QMesh heard of", "Hyperswarm lookup"), (CONNECTED, "Hyperswarm connected"))

INCLUDED = """Counted from before a fresh client is opened, which remembers nothing, to workers announced long before.
  QMesh heard of:        the worker's record is known; by beacon and lookup, as qmesh.Client does it
  QMesh connected:       the above, qmesh.dial to each worker as it is heard of, three at once, and its greeting
                         answered: TCP, TLS 1.3 with certificates on both sides. The client's own key and
                         certificate, which are new each time, are made within it, as a client makes them
  Hyperswarm lookup:     hyperdht's lookup finds the server's key; no beacons, a testnet of ten nodes as bootstrap
  Hyperswarm connected:  the lookup, and the `connection` event: UDP streams, encrypted. Three at once, its default
Each side's workers and client share one process."""


class Watch:
    """Milliseconds from its making until each thing was first seen."""

    def __init__(self, count: int) -> None:
        self._started = time.perf_counter()
        self._count = count
        self._seen: dict[object, float] = {}

    def saw(self, thing: object) -> bool:
        """Note a thing; False when it was seen before."""
        if thing in self._seen:
            return False
        self._seen[thing] = 1000 * (time.perf_counter() - self._started)
        return True

    @property
    def over(self) -> bool:
        return len(self._seen) >= self._count or time.perf_counter() - self._started > PATIENCE_S

    @property
    def times(self) -> Times:
        values = list(self._seen.values())
        return Times(values[0] if values else None, values[-1] if len(values) >= self._count else None)


@dataclass(frozen=True)
class Times:
    """Milliseconds to the first worker and to all of them; None for what did not come."""

    first: float | None
    all: float | None


# --- Finding and connecting ---


@contextlib.asynccontextmanager
async def workers_on(topic: str, count: int, script: Script) -> AsyncIterator[None]:
    """So many workers in this process, known to each other and to their holders."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(ScriptedWorker(script).on(topic))
        await settled()
        async with asyncio.timeout(PATIENCE_S):
            while len((await statuses(topic))[0]) < count:
                pass
        yield


async def settled() -> None:
    """Wait until the nodes of this process have met each other and told their holders."""
    await asyncio.sleep(SETTLE_S)
    calm = 0
    for _ in range(round(MOST_SETTLE_S)):
        used = time.process_time()
        await asyncio.sleep(1)
        calm = calm + 1 if time.process_time() - used < CALM_SHARE else 0
        if calm >= CALM_SECONDS:
            return
    print("  (the nodes did not come to rest)", flush=True)


@contextlib.asynccontextmanager
async def client_of(topic: str) -> AsyncIterator[qmesh.Client]:
    """A client that remembers nothing."""
    with tempfile.TemporaryDirectory() as directory:
        async with qmesh.Client(qmesh.Settings(host=qmesh.LOOPBACK, topic=topic, state_dir=directory)) as client:
            yield client


async def statuses(topic: str) -> tuple[list[qmesh.Json], list[qmesh.Json]]:
    async with client_of(topic) as client:
        await client.discover(everything=True)
        return await client.statuses()


async def find(topic: str, count: int) -> dict[str, Times]:
    """One client's way to all workers, each dialled as soon as it is heard of."""
    heard, connected = Watch(count), Watch(count)
    connections: list[qmesh.Connection] = []

    turns = asyncio.Semaphore(DIALS_AT_ONCE)

    async def connect(record: WorkerRecord) -> None:
        async with turns:
            connection = await qmesh.dial(record.address, client.links.identity)
        assert connection.peer_id == str(record.worker_id)
        connected.saw(record.worker_id)
        connections.append(connection)

    async with client_of(topic) as client:
        async with asyncio.TaskGroup() as dialling:
            searching = dialling.create_task(client.discover(everything=True))
            while not heard.over:
                for record in client.records():
                    if heard.saw(record.worker_id):
                        dialling.create_task(connect(record))
                await asyncio.sleep(0)
            searching.cancel()
        for connection in connections:
            await connection.close()
    return {"QMesh heard of": heard.times, CONNECTED: connected.times}


async def whole_calls(topic: str, count: int) -> dict[str, Times]:
    """What the client's own methods take, with the waits in which they listen for more workers."""
    discovered = Watch(1)
    async with client_of(topic) as client:
        await client.discover()
        discovered.saw("the first few")
    answered = Watch(1)
    workers, _ = await statuses(topic)
    answered.saw("all")
    asked = answered.times.first if len(workers) == count else None
    return {"QMesh discover()": Times(discovered.times.first, None), "QMesh statuses()": Times(None, asked)}


async def find_by_hyperswarm(peer: peers.Hyperswarm) -> dict[str, Times]:
    lookup = await peer.ask({"lookup": True})
    connected = await peer.ask({"find": True})
    return {
        "Hyperswarm lookup": Times(lookup["first"], lookup["all"]),
        "Hyperswarm connected": Times(connected["first"], connected["all"]),
    }


async def compare(
    counts: Sequence[int], rounds: int, peer: peers.Hyperswarm | None, *, ours: bool
) -> list[report.Item]:
    print(INCLUDED, flush=True)
    items: list[report.Item] = []
    for count in counts:
        topic = f"bench-{secrets.token_hex(8)}"
        found: list[dict[str, Times]] = []
        if peer is not None:
            await peer.ask({"servers": count})
        async with workers_on(topic, count, says("yes")) if ours else contextlib.nullcontext():
            for turn in range(-1, rounds):  # the first warms up
                times = await find(topic, count) if ours else {}
                times |= await whole_calls(topic, count) if ours else {}
                times |= await find_by_hyperswarm(peer) if peer is not None else {}
                found += [times] if turn >= 0 else []
        items += times_figures(count, found)
    return items


def times_figures(count: int, rounds: Sequence[dict[str, Times]]) -> Iterator[report.Item]:
    """Of each pair that is compared both sides where both came; all else alone."""
    workers = qmesh.plural(count, "worker")
    pairs = [pair for pair in COMPARED if set(pair) <= set(rounds[0])]
    alone = [name for name in rounds[0] if not any(name in pair for pair in pairs)]
    for what in ("first", "all") if count > 1 else ("first",):
        of = f"{what} of {workers}" if count > 1 else workers
        for ours, theirs in pairs:
            both = [(getattr(turn[ours], what), getattr(turn[theirs], what)) for turn in rounds]
            came = [pair for pair in both if None not in pair]
            goal = goals.discovery_key(what, count) if ours == CONNECTED else ""
            if came:
                name = f"{ours}, {of}{_note(len(came), len(rounds))}"
                yield report.ratio(name, list(zip(*came, strict=True)), "ms", peer=theirs, goal=goal)
        for name in alone:
            values = [value for turn in rounds if (value := getattr(turn[name], what)) is not None]
            if values:
                yield report.Figure.of(f"{name}, {of}{_note(len(values), len(rounds))}", values, "ms")


def _note(came: int, rounds: int) -> str:
    return "" if came == rounds else f", not in {rounds - came} of {rounds} rounds"


async def opened_peer() -> peers.Hyperswarm:
    """Hyperswarm in a process of its own. Raises report.CannotMeasure when it cannot be had."""
    peer = await asyncio.to_thread(peers.Hyperswarm)
    await peer.ready()
    return peer


async def compared(arguments: argparse.Namespace, parts: set[str]) -> list[report.Item]:
    peer, missing = None, []
    if "hyperswarm" in parts:
        try:
            peer = await opened_peer()
        except report.CannotMeasure as reason:
            missing.append(report.Missing("discovery.", str(reason)))
    try:
        if peer is None and "qmesh" not in parts:
            return [*missing]
        return [*missing, *await compare(arguments.workers, arguments.rounds, peer, ours="qmesh" in parts)]
    finally:
        if peer is not None:
            await peer.close()


# --- Idle traffic, and sizes of replies ---


class CountingEngine(qmesh.DhtEngine):
    """Counts what goes through a node's verbs, and notes each reply's share of its request's size, by request."""

    def __init__(self, ratios: dict[str, list[float]], *, keys: qmesh.MeshKeys, **rest: Any) -> None:
        super().__init__(keys=keys, **rest)
        self.traffic: Counter[str] = Counter()
        self._ratios = ratios
        self._reader = qmesh.DatagramCodec(keys.udp_key)
        self._asked: dict[tuple[bytes, Address], tuple[str, int]] = {}

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        self._count("heard", data)
        with contextlib.suppress(qmesh.WireError):
            heard = self._reader.decode(data)
            if heard.kind in qmesh.REQUESTS:
                self._asked[heard.transaction, address] = heard.kind, len(data)
        super().receive_datagram(data, address, now)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        sent = super().datagrams_to_send(now)
        for data, address in sent:
            self._count("sent", data)
            asked = self._asked.pop((self._reader.decode(data).transaction, address), None)
            if asked is not None:
                kind, size = asked
                self._ratios[kind].append(len(data) / size)
        return sent

    def _count(self, way: str, data: bytes) -> None:
        self.traffic[f"datagrams {way}"] += 1
        self.traffic[f"bytes {way}"] += len(data)


def light_node(
    topic: str, make_engine: Callable[..., qmesh.DhtEngine]
) -> contextlib.AbstractAsyncContextManager[Address]:
    """A DHT node that announces a record with no server behind it."""
    node_id = NodeId.of_bytes(secrets.token_bytes(32))
    return announced(topic, record_of(node_id, NO_SERVER), beacons=True, make_engine=make_engine)


async def idle(count: int, idle_s: float, ratios: dict[str, list[float]]) -> list[report.Item]:
    """What idle nodes send and hear; a client's search and the goodbyes at the end only count as ratios."""
    topic = f"bench-{secrets.token_hex(8)}"
    engines: list[CountingEngine] = []

    def make(**arguments: Any) -> CountingEngine:
        engines.append(CountingEngine(ratios, **arguments))
        return engines[-1]

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(light_node(topic, make))
        await settled()
        before, kinds_before = total(engine.traffic for engine in engines), total(engine.sent for engine in engines)
        started = time.monotonic()
        await asyncio.sleep(idle_s)
        traffic = total(engine.traffic for engine in engines) - before
        kinds = total(engine.sent for engine in engines) - kinds_before
        share = 60 / (time.monotonic() - started) / count
        async with client_of(topic) as client:
            await client.discover(everything=True)
    where = f"a minute by an idle worker of {count}"
    said = [(f"{way} {where}", share * traffic[f"{unit} {way}"], unit) for way in WAYS for unit in UNITS]
    said += [(f"sent {where}: {kind}", share * number, "datagrams") for kind, number in kinds.most_common()]
    return [report.Figure.of(what, [value], unit) for what, value, unit in said]


def total(counts: Any) -> Counter[str]:
    return sum(counts, Counter())


async def idle_traffic(counts: Sequence[int], idle_s: float) -> list[report.Item]:
    """A beacon counts once, though it leaves on each outlet. Replies are never larger than what asked for them."""
    ratios: dict[str, list[float]] = defaultdict(list)
    items: list[report.Item] = []
    for count in counts:
        items += await idle(count, idle_s, ratios)
    for kind in sorted(kind for kind in qmesh.REQUESTS if ratios[kind]):
        items.append(report.Figure.of(f"largest reply, by the size of its {kind}", [max(ratios[kind])], "x"))
        assert max(ratios[kind]) <= 1, kind
    return items


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    parts = set(arguments.only or PARTS)
    if parts & {"qmesh", "hyperswarm"}:
        yield from asyncio.run(compared(arguments, parts))
    if "idle" in parts:
        yield from asyncio.run(idle_traffic(arguments.workers, arguments.idle_s))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=7)
    parser.add_argument("--workers", type=int, nargs="+", default=list(goals.DISCOVERY_WORKERS))
    parser.add_argument("--idle-s", type=float, default=60.0, help="how long idle workers are watched")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all")
    return parser


if __name__ == "__main__":
    report.main("discovery", make_parser(), figures)
