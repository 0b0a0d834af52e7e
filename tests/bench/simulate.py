"""What searches succeed in a simulated mesh, by its size, by what befalls it, by k and by concurrency.

    python tests/bench/simulate.py [--nodes N ...] [--clients N] [--seed N] [--k N ...] [--concurrency N ...]

Each mesh comes together by itself, and one of its nodes is a worker. Success is that a fresh client, which
knows two living nodes, learns of that worker; `after` is one period of announcing later. The tables of
k and of concurrency, and of a mesh at rest, are of 1,000 nodes at most.
"""

from __future__ import annotations

import argparse
import math
import pickle
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from virtual_network import Errand, Node, VirtualNetwork, employ, grow, send_clients  # noqa: E402

import qmesh  # noqa: E402

MINUTE_S = 60.0
CONSTANTS_NODES = 1000  # at most, for the table of k and concurrency: each of its rows is another mesh
KILLED = (0.0, 0.1, 0.3, 0.5)
LOSSES = (0.0, 0.1)
REANNOUNCED_S = qmesh.ANNOUNCE_PERIOD_S * (1 + qmesh.ANNOUNCE_JITTER)

Mesh = tuple[VirtualNetwork, list[Node], random.Random]


@contextmanager
def tuned(k: int, concurrency: int) -> Iterator[None]:
    """With other figures in place of K and LOOKUP_CONCURRENCY, also where they are defaults of arguments."""
    before = qmesh.K, qmesh.LOOKUP_CONCURRENCY
    set_constants(k, concurrency)
    try:
        yield
    finally:
        set_constants(*before)


def set_constants(k: int, concurrency: int) -> None:
    vars(qmesh).update(K=k, LOOKUP_CONCURRENCY=concurrency)
    for method in (qmesh.RoutingTable.__init__, qmesh.Lookup.__init__):
        defaults = method.__kwdefaults__ or {}
        defaults |= {name: value for name, value in (("k", k), ("concurrency", concurrency)) if name in defaults}


def standing_mesh(count: int, seed: int) -> bytes:
    """A mesh that has come together and has a worker, its first node; to be loaded once per row."""
    network, rng = VirtualNetwork(seed, beacons=False, record=False), random.Random(seed)
    nodes = grow(network, count, rng)
    employ(network, nodes[:1])
    return pickle.dumps((network, nodes, rng))


def befall(mesh: Mesh, killed: float, loss: float, clients: int) -> tuple[list[Errand], list[Errand]]:
    """Kill a share of the nodes, all but the worker, and lose a share of the datagrams; before and after."""
    network, nodes, rng = mesh
    network.loss = loss
    for node in rng.sample(nodes[1:], int(killed * len(nodes))):
        network.kill(node)
    living = [node for node in nodes if node.alive]
    before = send_clients(network, clients, nodes[:1], living, rng)
    network.run_for(REANNOUNCED_S)
    return before, send_clients(network, clients, nodes[:1], living, rng)


def percentile(values: Sequence[int], share: float) -> int:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def figures(mesh: bytes, killed: float, loss: float, clients: int) -> str:
    """One row: hops, requests per search, success, and the share of searches that ended before their deadline."""
    before, after = befall(pickle.loads(mesh), killed, loss, clients)
    hops = [errand.hops for errand in before]
    requests = statistics.mean(errand.requests for errand in before)
    cells = [f"{statistics.median(hops):8.0f}{percentile(hops, 0.99):5}{requests:10.1f}"]
    for errands in (before, after):
        found = statistics.mean(errand.found for errand in errands)
        cells.append(f"{found:9.2%}{statistics.mean(errand.in_time for errand in errands):9.1%}")
    return "".join(cells)


HEAD = "    hops  p99  requests   before  in time    after  in time"


def compare_sizes(sizes: Sequence[int], clients: int, seed: int) -> None:
    print(f"{'nodes':>7}{'killed':>8}{'loss':>6}{HEAD}")
    for count in sizes:
        mesh = standing_mesh(count, seed)
        for killed in KILLED:
            for loss in LOSSES:
                print(f"{count:>7,}{killed:>8.0%}{loss:>6.0%}{figures(mesh, killed, loss, clients)}", flush=True)


def compare_constants(count: int, ks: Sequence[int], concurrencies: Sequence[int], clients: int, seed: int) -> None:
    print(f"\n{count:,} nodes, half of them killed, a tenth of all datagrams lost\n{'k':>7}{'at once':>14}{HEAD}")
    for k in ks:
        for concurrency in concurrencies:
            with tuned(k, concurrency):
                row = figures(standing_mesh(count, seed), 0.5, 0.1, clients)
            print(f"{k:>7}{concurrency:>14}{row}", flush=True)


def rest(count: int, seed: int) -> None:
    """What a node of a mesh at rest holds and sends."""
    tracemalloc.start()
    network, rng = VirtualNetwork(seed, beacons=False, record=False), random.Random(seed)
    nodes = grow(network, count, rng)
    held = tracemalloc.get_traced_memory()[0] / count / 1e3
    tracemalloc.stop()
    known = statistics.mean(len(node.engine.table) for node in nodes)
    print(f"\n{count:,} nodes at rest: each knows {known:.0f} others and takes {held:.0f} KB, some of it on the wire")
    for minute in (1, 2, 3):
        datagrams, size = network.count, network.size
        network.run_for(MINUTE_S)
        sent, sent_kb = (network.count - datagrams) / count, (network.size - size) / count / 1e3
        known = statistics.mean(len(node.engine.table) for node in nodes)
        print(f"   minute {minute}: {sent:6.1f} datagrams and {sent_kb:6.1f} KB sent by each, {known:.0f} nodes known")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[50, 100, 1000])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--k", type=int, nargs="*", default=[8, 20, 40])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[3, 10, 20])
    arguments = parser.parse_args()
    started = time.perf_counter()
    compare_sizes(arguments.nodes, arguments.clients, arguments.seed)
    count = min(max(arguments.nodes), CONSTANTS_NODES)
    if arguments.k and arguments.concurrency:
        compare_constants(count, arguments.k, arguments.concurrency, arguments.clients, arguments.seed)
    rest(count, arguments.seed)
    print(f"\nseed {arguments.seed}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
