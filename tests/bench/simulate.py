"""What searches succeed in a simulated mesh, by its size, by what befalls it, by k and by concurrency.

    python tests/bench/simulate.py [--nodes N ...] [--clients N] [--seed N] [--k N ...]
        [--concurrency N ...] [--out DIR]

Each mesh comes together by itself, and one of its nodes is a worker. Success is that a fresh client, which
knows two living nodes, learns of that worker; `after` is one period of announcing later. With `--k` and `--concurrency`
there is a table of meshes with these figures, of 1,000 nodes at most, half of them killed and a tenth of all datagrams
lost. Time is virtual, so that a seed gives the same figures on any machine.
"""

from __future__ import annotations

import argparse
import pickle
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import report  # noqa: E402
from virtual_network import Errand, Node, VirtualNetwork, employ, grow, send_clients  # noqa: E402

import qmesh  # noqa: E402

MINUTE_S = 60.0
CONSTANTS_NODES = 1000  # at most, for the table of k and concurrency: each of its rows is another mesh
GOAL_NODES = 1000  # of the mesh that the goals are about
HARDEST = (0.5, 0.1)
FATES = ((0.0, 0.0), (0.0, 0.1), (0.3, 0.0), (0.5, 0.0), HARDEST)  # shares: of nodes killed, of datagrams lost
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


def hops_of_nodes(network: VirtualNetwork, nodes: Sequence[Node], rng: random.Random) -> list[int]:
    """Of searches for random ids by nodes of the mesh itself, all at once."""
    begun = {node.engine.find_node(qmesh.NodeId.random(rng), network.now) for node in nodes}
    network.run_for(qmesh.LOOKUP_DEADLINE_S)
    ends = [event for node in nodes for event in node.events if isinstance(event, qmesh.Finished)]
    return [end.hops for end in ends if end.search in begun]


@dataclass(frozen=True)
class Searches:
    """How the searches of fresh clients went, right after what befell a mesh, and one period of announcing later."""

    before: list[Errand]
    after: list[Errand]

    @property
    def hops(self) -> list[int]:
        return [errand.hops for errand in self.before]

    def found(self, *, later: bool) -> float:
        """Per cent of them."""
        return 100 * statistics.mean(errand.found for errand in (self.after if later else self.before))

    def row(self) -> str:
        """Hops, requests per search, success, and the share of searches that ended before their deadline."""
        requests = statistics.mean(errand.requests for errand in self.before)
        text = f"{statistics.median(self.hops):8.0f}{report.percentile(self.hops, 0.99):5.0f}{requests:10.1f}"
        for errands, later in ((self.before, False), (self.after, True)):
            text += f"{self.found(later=later):8.2f}%{statistics.mean(errand.in_time for errand in errands):9.1%}"
        return text


HEAD = "    hops  p99  requests   before  in time    after  in time"


def searches(mesh: bytes, killed: float, loss: float, clients: int) -> Searches:
    return Searches(*befall(pickle.loads(mesh), killed, loss, clients))


def compare_fates(count: int, clients: int, seed: int) -> Iterator[report.Item]:
    print(f"{'nodes':>7}{'killed':>8}{'loss':>6}{HEAD}")
    mesh = standing_mesh(count, seed)
    network, nodes, rng = pickle.loads(mesh)
    own = hops_of_nodes(network, rng.sample(nodes, min(clients, count)), rng)
    yield report.Figure.of(f"hops of a node's search, {count:,} nodes", own, "hops", _key(count, "hops"))
    for killed, loss in FATES:
        found = searches(mesh, killed, loss, clients)
        print(f"{count:>7,}{killed:>8.0%}{loss:>6.0%}{found.row()}", flush=True)
        where = f"{count:,} nodes, {killed:.0%} killed, {loss:.0%} of datagrams lost"
        key = {(0.5, 0.0): "half", HARDEST: "lossy"}.get((killed, loss), "")
        yield report.Figure.of(f"hops of a fresh client, {where}", found.hops, "hops")
        yield report.Figure.of(f"found, {where}", [found.found(later=False)], "%", _key(count, key))
        again = f"{key}-later" if key == "half" else ""
        yield report.Figure.of(
            f"found after one announcement, {where}", [found.found(later=True)], "%", _key(count, again)
        )
    yield from rest(mesh)


def _key(count: int, name: str) -> str:
    """The goals are about meshes of one size."""
    return f"simulation.{name}" if name and count == GOAL_NODES else ""


def compare_constants(count: int, ks: Sequence[int], concurrencies: Sequence[int], clients: int, seed: int) -> None:
    print(f"\n{count:,} nodes, half of them killed, a tenth of all datagrams lost\n{'k':>7}{'at once':>14}{HEAD}")
    for k in ks:
        for concurrency in concurrencies:
            with tuned(k, concurrency):
                found = searches(standing_mesh(count, seed), *HARDEST, clients)
            print(f"{k:>7}{concurrency:>14}{found.row()}", flush=True)


def rest(mesh: bytes) -> Iterator[report.Item]:
    """What a node of a mesh at rest sends."""
    network, nodes, _ = pickle.loads(mesh)
    datagrams, size, count = network.count, network.size, len(nodes)
    network.run_for(MINUTE_S)
    known = [len(node.engine.table) for node in nodes]
    yield report.Figure.of(f"others that a node knows, of {count:,}", [statistics.mean(known)], "nodes")
    yield report.Figure.of(
        f"sent by a node in a minute, of {count:,}", [(network.count - datagrams) / count], "datagrams"
    )
    yield report.Figure.of(f"the same, of {count:,}", [(network.size - size) / count / 1e3], "kB")


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    for count in arguments.nodes:
        yield from compare_fates(count, arguments.clients, arguments.seed)
    count = min(max(arguments.nodes), CONSTANTS_NODES)
    if arguments.k and arguments.concurrency:
        compare_constants(count, arguments.k, arguments.concurrency, arguments.clients, arguments.seed)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[50, 100, 1000])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--k", type=int, nargs="*", default=[])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[3, 10, 20])
    return parser


if __name__ == "__main__":
    report.main("simulation", make_parser(), figures)
