"""How fast workers are found and connected, beside Hyperswarm; cold starts, idle traffic, sizes of replies, memory.

    python tests/bench/discovery.py [--workers N ...] [--repeats N] [--idle-s S] [--nodes N] [--only PART ...]

Everything stays on 127.0.0.1. Times are in milliseconds: medians over the repeats, with the spread; ratios are medians
of the ratios within a repeat, in which both sides take turns. Hyperswarm comes from npm and is set up under
~/.cache/qmesh-bench (or QMESH_BENCH_DIR); without npm, only QMesh's rows are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import peers  # noqa: E402
from engine import machine  # noqa: E402
from mesh import spread  # noqa: E402
from scripted_worker import Script, ScriptedWorker, announced, record_of, says  # noqa: E402

import qmesh  # noqa: E402
from qmesh import Address, NodeId, WorkerRecord  # noqa: E402

PARTS = ("qmesh", "hyperswarm", "cold-start", "idle", "memory")
PATIENCE_S = 20.0  # what has not been found by then never will be; hyperswarm_peer.mjs waits as long
DIALS_AT_ONCE = 3  # as Hyperswarm does, by default
SETTLE_S = 7.0  # the dense beacons of a worker's start are over by then
MOST_SETTLE_S = 120.0  # a mesh that is not calm by then is measured as it is
CALM_SHARE = 0.5  # of one core: what idle nodes use stays below it, what nodes use that still meet does not
CALM_SECONDS = 3  # in a row
NODES_BEFORE = 20  # the first nodes pay for what all nodes share, so they are not in the figure
COLD_START_GOAL_MS = 300
NO_SERVER = 9  # the port of a record that nobody dials
UNITS = ("datagrams", "bytes")

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
    return {"QMesh heard of": heard.times, "QMesh connected": connected.times}


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


async def compare(counts: Sequence[int], repeats: int, peer: peers.Hyperswarm | None, *, ours: bool) -> None:
    print(INCLUDED, flush=True)
    for count in counts:
        topic = f"bench-{secrets.token_hex(8)}"
        rounds: list[dict[str, Times]] = []
        if peer is not None:
            await peer.ask({"servers": count})
        async with workers_on(topic, count, says("yes")) if ours else contextlib.nullcontext():
            for turn in range(-1, repeats):  # the first warms up
                times = await find(topic, count) if ours else {}
                times |= await whole_calls(topic, count) if ours else {}
                times |= await find_by_hyperswarm(peer) if peer is not None else {}
                rounds += [times] if turn >= 0 else []
        print_times(count, rounds)


def print_times(count: int, rounds: Sequence[dict[str, Times]]) -> None:
    print(f"\n{qmesh.plural(count, 'worker')}, median of {len(rounds)}")
    for name in rounds[0]:
        for what in ("first", "all"):
            values = [value for turn in rounds if (value := getattr(turn[name], what)) is not None]
            missing = len(rounds) - len(values)
            if values:
                note = f", not in {missing} of {len(rounds)} runs" if missing else ""
                print(f"{name:>24}, {what:>5}: {spread(values, 'ms')}{note}")
    for ours, theirs in (("QMesh heard of", "Hyperswarm lookup"), ("QMesh connected", "Hyperswarm connected")):
        for what in ("first", "all") if ours in rounds[0] and theirs in rounds[0] else ():
            pairs = [(getattr(turn[ours], what), getattr(turn[theirs], what)) for turn in rounds]
            ratios = [mine / other for mine, other in pairs if mine is not None and other is not None]
            if ratios:
                print(f"{'ratio of times':>24}, {what:>5}: {statistics.median(ratios):8.2f} ({ours} / {theirs})")
    sys.stdout.flush()


async def opened_peer() -> peers.Hyperswarm | None:
    """Hyperswarm in a process of its own; None, and a line that says why, when it cannot be had."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        print("Hyperswarm is left out: npm is not here")
        return None
    try:
        peer = await asyncio.to_thread(peers.Hyperswarm)
    except subprocess.CalledProcessError as error:
        print(f"Hyperswarm is left out: npm could not install it (exit code {error.returncode})")
        return None
    await peer.ready()
    return peer


# --- Cold starts ---


async def cold_starts(count: int, repeats: int) -> None:
    """From the start of a `prompt` process until a worker has its request."""
    arrived: asyncio.Queue[float] = asyncio.Queue()
    answer = says("yes")

    async def script(connection: qmesh.Connection, request_id: str) -> bool:
        arrived.put_nowait(time.perf_counter())
        return await answer(connection, request_id)

    async def start() -> tuple[float, float]:
        started = time.perf_counter()
        with mesh.popen("prompt", "Say hello.", "--json") as asking:
            text, _ = await asyncio.to_thread(asking.communicate)
        return 1000 * (arrived.get_nowait() - started), float(json.loads(text)["timings"]["discover_ms"])

    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), Path()) as mesh:
        async with workers_on(mesh.topic, count, script):
            runs: dict[str, list[tuple[float, float]]] = {"nothing remembered": [], "peers remembered": []}
            for turn in range(-1, repeats):
                mesh.state_dir = Path(directory) / f"state-{turn}"
                for times in runs.values():  # the first process of a state directory leaves it peers
                    one = await start()
                    times += [one] if turn >= 0 else []
    print(f"\nCold start with {qmesh.plural(count, 'worker')}: start of `prompt` to its request, median of {repeats}")
    for name, times in runs.items():
        print(f"{name:>24}, whole: {spread([whole for whole, _ in times], 'ms')} (goal {COLD_START_GOAL_MS})")
        print(f"{'':>24}  its discovery: {spread([part for _, part in times], 'ms')}", flush=True)


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
    topic: str, *, beacons: bool, make_engine: Callable[..., qmesh.DhtEngine]
) -> tuple[NodeId, contextlib.AbstractAsyncContextManager[Address]]:
    """A DHT node that announces a record with no server behind it."""
    node_id = NodeId.of_bytes(secrets.token_bytes(32))
    return node_id, announced(topic, record_of(node_id, NO_SERVER), beacons=beacons, make_engine=make_engine)


async def idle(count: int, idle_s: float, ratios: dict[str, list[float]]) -> None:
    """What idle nodes send and hear; a client's search and the goodbyes at the end only count as ratios."""
    topic = f"bench-{secrets.token_hex(8)}"
    engines: list[CountingEngine] = []

    def make(**arguments: Any) -> CountingEngine:
        engines.append(CountingEngine(ratios, **arguments))
        return engines[-1]

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(light_node(topic, beacons=True, make_engine=make)[1])
        await settled()
        before, kinds_before = total(engine.traffic for engine in engines), total(engine.sent for engine in engines)
        started = time.monotonic()
        await asyncio.sleep(idle_s)
        traffic = total(engine.traffic for engine in engines) - before
        kinds = total(engine.sent for engine in engines) - kinds_before
        share = 60 / (time.monotonic() - started) / count
        async with client_of(topic) as client:
            await client.discover(everything=True)
    said = ", ".join(
        f"{share * traffic[f'{what} {way}']:.0f} {what} {way}" for way in ("sent", "heard") for what in UNITS
    )
    print(f"{qmesh.plural(count, 'worker'):>12}: {said}")
    print(
        f"{'':>14}sent: {', '.join(f'{share * number:.1f} {kind}' for kind, number in kinds.most_common())}", flush=True
    )


def total(counts: Any) -> Counter[str]:
    return sum(counts, Counter())


async def idle_traffic(counts: Sequence[int], idle_s: float) -> None:
    ratios: dict[str, list[float]] = defaultdict(list)
    print(
        f"\nIdle traffic per node and minute, over {idle_s:g} s; a beacon counts once, though it leaves on each outlet"
    )
    for count in counts:
        await idle(count, idle_s, ratios)
    print("\nSize of a reply by the size of its request (never above 1)")
    for kind in sorted(qmesh.REQUESTS):
        values = ratios.get(kind, [])
        said = f"mean {statistics.mean(values):.2f}, largest {max(values):.2f}, of {len(values)}" if values else "none"
        print(f"{kind:>24}: {said}", flush=True)
    assert max(max(values) for values in ratios.values()) <= 1


# --- Memory ---


def acquaint(engines: Sequence[qmesh.DhtEngine], contacts: Sequence[qmesh.Contact], now: float) -> None:
    """Fill tables as answers from all the others would, each with values of its own, as they come off the wire."""
    wire = qmesh.pack_contacts(contacts)
    for engine in engines:
        for contact in qmesh.unpack_contacts(wire):
            engine.table.answered(contact, now)


async def memory_per_node(nodes: int) -> tuple[float, float]:
    """Kilobytes of one more node, and the contacts in its table."""
    engines: list[qmesh.DhtEngine] = []
    contacts: list[qmesh.Contact] = []
    sizes = []
    topic = f"bench-{secrets.token_hex(8)}"

    def make(**arguments: Any) -> qmesh.DhtEngine:
        engines.append(qmesh.DhtEngine(**arguments))
        return engines[-1]

    async with contextlib.AsyncExitStack() as stack:
        for count in (NODES_BEFORE, nodes):
            for _ in range(count):
                node_id, node = light_node(topic, beacons=False, make_engine=make)
                contacts.append(qmesh.Contact(node_id, await stack.enter_async_context(node)))
            acquaint(engines, contacts, asyncio.get_running_loop().time())
            await asyncio.sleep(2 * SETTLE_S)  # a search for holders, and their records
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
        in_table = statistics.mean(len(engine.table) for engine in engines[NODES_BEFORE:])
    return (sizes[1] - sizes[0]) / nodes / 1e3, in_table


def memory_in_here(nodes: int) -> tuple[float, float]:
    return asyncio.run(memory_per_node(nodes))


def memory(nodes: int) -> None:
    """In a process of its own: what others freed before would hide some of it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        kilobytes, contacts = pool.submit(memory_in_here, nodes).result()
    print(
        f"\nMemory: {kilobytes:.0f} kB for each of {nodes} more nodes, with {contacts:.0f} contacts in its table",
        flush=True,
    )


async def main(arguments: argparse.Namespace) -> None:
    parts = set(arguments.only or PARTS)
    print(machine(), flush=True)
    if parts & {"qmesh", "hyperswarm"}:
        peer = await opened_peer() if "hyperswarm" in parts else None
        try:
            if peer is not None or "qmesh" in parts:
                await compare(arguments.workers, arguments.repeats, peer, ours="qmesh" in parts)
        finally:
            if peer is not None:
                await peer.close()
    if "cold-start" in parts:
        await cold_starts(max(arguments.workers), arguments.repeats)
    if "idle" in parts:
        await idle_traffic(arguments.workers, arguments.idle_s)
    if "memory" in parts:
        memory(arguments.nodes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--idle-s", type=float, default=60.0, help="how long idle workers are watched")
    parser.add_argument("--nodes", type=int, default=200, help="whose memory is measured")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all")
    asyncio.run(main(parser.parse_args()))
