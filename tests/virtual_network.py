"""A seeded network in virtual time that carries the datagrams of many real DHT engines."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scripted_worker import record_of

import qmesh

PATIENCE_S = 60.0  # virtual; what has not come true by then never will


@dataclass(eq=False)
class Node:
    """An engine, where it is reached, and all that it has told its owner. own: None for a client.

    wakes_at: when its timer is next looked at, which is never later than its engine wants.
    """

    engine: qmesh.DhtEngine
    own: qmesh.NodeId | None
    address: qmesh.Address
    alive: bool = True
    wakes_at: float = math.inf
    events: list[qmesh.Event] = field(default_factory=list)

    @property
    def node_id(self) -> qmesh.NodeId:
        assert self.own is not None, "a client has no id"
        return self.own


class Sent(NamedTuple):
    """A datagram that was put on the wire, whether or not it arrives."""

    time: float
    source: qmesh.Address
    destination: qmesh.Address
    data: bytes


class VirtualNetwork:
    """Carries datagrams between engines, with seeded delay and loss: the same seed, the same run.

    loss: the share of datagrams that are lost. delay: seconds one way, from and to. beacons: False for a
    network without multicast. `count` and `size` are the datagrams since the beginning and their bytes,
    `digest` is of all of them in order; `sent` lists them, unless `record` is False: thousands of nodes fill
    the memory with it. A timer that does not move forward, which would burn a processor, fails the run.

    The repr names what a run is replayed with. Failures in here carry it; an assertion about a network
    outside takes the network as its message.
    """

    def __init__(
        self,
        seed: int,
        *,
        loss: float = 0.0,
        delay: tuple[float, float] = (0.0005, 0.002),
        beacons: bool = True,
        record: bool = True,
    ) -> None:
        self.keys = qmesh.MeshKeys.derive("virtual")
        self.seed = seed
        self.now = 1000.0
        self.loss = loss
        self.delay = delay
        self.beacons = beacons
        self.record = record
        self.nodes: dict[qmesh.Address, Node] = {}
        self.sent: list[Sent] = []
        self.count = 0
        self.size = 0
        self.digest = b""
        self._rng = random.Random(seed)
        self._cut: set[tuple[qmesh.Address, qmesh.Address]] = set()  # from, to
        self._island: dict[qmesh.Address, int] = {}
        self._due: list[tuple[float, int, qmesh.Address, Sent | None]] = []  # a delivery, or a timer
        self._scheduled = 0

    def __repr__(self) -> str:
        settings = f"seed={self.seed}, loss={self.loss}, delay={self.delay}, beacons={self.beacons}"
        progress = f"{self.now:.3f} s, {len(self.nodes):,} nodes, {self.count:,} datagrams, {self.digest.hex()[:8]}"
        return f"<VirtualNetwork({settings}) at {progress}>"

    def add_node(
        self,
        own: qmesh.NodeId | None = None,
        address: qmesh.Address | None = None,
        *,
        engine: type[qmesh.DhtEngine] = qmesh.DhtEngine,
    ) -> Node:
        """Switch a node on; without an id or an address it gets one of its own."""
        return self._add(own or qmesh.NodeId.random(self._rng), address, engine)

    def add_client(self, address: qmesh.Address | None = None) -> Node:
        """Switch an ephemeral client on: it asks, but nobody is to know it."""
        return self._add(None, address, qmesh.DhtEngine)

    def kill(self, node: Node) -> None:
        """Let a node fall silent and deaf, as if unplugged or asleep."""
        node.alive = False

    def revive(self, node: Node) -> None:
        """Let it go on with what it knew; to its engine, the clock has jumped."""
        node.alive = True
        self._handle_timer(node)

    def block(self, one: Node, other: Node) -> None:
        """Cut the link between two nodes, both ways."""
        self.block_one_way(one, other)
        self.block_one_way(other, one)

    def block_one_way(self, source: Node, destination: Node) -> None:
        """Let nothing through from `source` to `destination`; the way back stays open."""
        self._cut.add((source.address, destination.address))

    def unblock(self, one: Node, other: Node) -> None:
        self._cut -= {(one.address, other.address), (other.address, one.address)}

    def partition(self, *groups: Iterable[Node]) -> None:
        """Cut the network between these groups; nodes of no group reach everyone, and are reached."""
        self._island = {node.address: number for number, group in enumerate(groups) for node in group}

    def heal(self) -> None:
        """End the partition; links that were blocked one by one stay so."""
        self._island = {}

    def reaches(self, source: qmesh.Address, destination: qmesh.Address) -> bool:
        """Whether the wire leads from one address to the other; loss apart."""
        if (source, destination) in self._cut:
            return False
        here = self._island.get(source)
        return here is None or self._island.get(destination, here) == here

    def run_for(self, seconds: float) -> None:
        """Let this much virtual time pass."""
        end = self.now + seconds
        self._run(lambda: False, end)
        self.now = end

    def run_until(self, happened: Callable[[], bool], patience: float = PATIENCE_S) -> None:
        """Let time pass until something is true; fail if it does not become so."""
        self._run(happened, self.now + patience)
        assert happened(), f"has not happened within {patience} s: {self}"

    def _add(self, own: qmesh.NodeId | None, address: qmesh.Address | None, engine: type[qmesh.DhtEngine]) -> Node:
        count = len(self.nodes) + 1
        address = address or (f"10.0.{count // 250}.{count % 250 + 1}", qmesh.DEFAULT_PORT)
        rng = random.Random(self._rng.getrandbits(64))
        node = Node(engine(keys=self.keys, own=own, rng=rng, now=self.now), own, address)
        self.nodes[address] = node
        return node

    def _run(self, happened: Callable[[], bool], end: float) -> None:
        try:
            for node in self.nodes.values():
                self._pump(node)  # its owner may have asked for something
            while not happened() and self._due and self._due[0][0] <= end:
                self.now, _, address, sent = heapq.heappop(self._due)
                node = self.nodes[address]
                if sent is not None:
                    self._deliver(node, sent)
                elif node.wakes_at == self.now:  # else it has been told to wake earlier, and has
                    self._handle_timer(node)
        except Exception as error:
            error.add_note(repr(self))
            raise

    def _schedule(self, time: float, address: qmesh.Address, sent: Sent | None = None) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (time, self._scheduled, address, sent))

    def _deliver(self, node: Node, sent: Sent) -> None:
        if node.alive:
            node.engine.receive_datagram(sent.data, sent.source, self.now)
            self._pump(node)

    def _handle_timer(self, node: Node) -> None:
        node.wakes_at = math.inf
        if node.alive and node.engine.get_timer() <= self.now:
            node.engine.handle_timer(self.now)
            assert node.engine.get_timer() > self.now, "the timer does not move forward"
        self._pump(node)

    def _pump(self, node: Node) -> None:
        """Take from an engine what it has for the wire, for its owner and for the clock."""
        if not node.alive:
            return
        for data, destination in node.engine.datagrams_to_send(self.now):
            self._carry(Sent(self.now, node.address, destination, data))
        while (event := node.engine.next_event()) is not None:
            node.events.append(event)
        timer = max(node.engine.get_timer(), self.now)
        if timer < node.wakes_at:  # one that was put off is looked at when it would have rung, and put off then
            node.wakes_at = timer
            self._schedule(timer, node.address)

    def _carry(self, sent: Sent) -> None:
        self.count += 1
        self.size += len(sent.data)
        told = f"{sent.time} {sent.source} {sent.destination} ".encode()
        self.digest = hashlib.blake2b(self.digest + told + sent.data, digest_size=16).digest()
        if self.record:
            self.sent.append(sent)
        if sent.destination != qmesh.BEACON:
            self._carry_to(sent.destination, sent)
        elif self.beacons:
            for address in list(self.nodes):
                self._carry_to(address, sent)

    def _carry_to(self, address: qmesh.Address, sent: Sent) -> None:
        lost = self._rng.random() < self.loss
        if address in self.nodes and not lost and self.reaches(sent.source, address):
            self._schedule(self.now + self._rng.uniform(*self.delay), address, sent)


# --- What a mesh of many goes through ---

WORKER_PORT = 47476
PEERS_KNOWN = 3  # by a node that joins where there is no multicast
JOINING_AT_ONCE = 20
JOIN_PERIOD_S = 0.1
SEARCH_MARGIN_S = 0.01


def grow(
    network: VirtualNetwork, count: int, rng: random.Random, *, kinds: Sequence[type[qmesh.DhtEngine]] = ()
) -> list[Node]:
    """Let so many nodes join by themselves, each of which was given a few of those that are there.

    kinds: the engines that they run, in turn.
    """
    kind = itertools.cycle(kinds or [qmesh.DhtEngine])
    nodes = [network.add_node(engine=next(kind))]
    while len(nodes) < count:
        there = list(nodes)
        for _ in range(min(JOINING_AT_ONCE, count - len(nodes))):
            nodes.append(network.add_node(engine=next(kind)))
            peers = rng.sample(there, min(PEERS_KNOWN, len(there)))
            nodes[-1].engine.meet([peer.address for peer in peers], network.now)
        network.run_for(JOIN_PERIOD_S)
    network.run_for(2)
    return nodes


def introduce(network: VirtualNetwork, count: int, rng: random.Random, *, strangers: int = 45) -> list[Node]:
    """As `grow`, in a twentieth of its time: each node is told its neighbours and some strangers instead.

    The tables hold about as many nodes as those of a mesh that has grown. The nodes start spread over a
    period of refreshing, as those of a standing mesh have.
    """
    nodes: list[Node] = []
    while len(nodes) < count:
        nodes += [network.add_node() for _ in range(min(JOINING_AT_ONCE, count - len(nodes)))]
        network.run_for(qmesh.REFRESH_PERIOD_S * JOINING_AT_ONCE / count)
    for node in nodes:
        neighbours = heapq.nsmallest(qmesh.K + 1, nodes, key=lambda other: node.node_id.distance(other.node_id))
        for peer in [*neighbours, *rng.sample(nodes, min(strangers, count))]:
            node.engine.table.answered(qmesh.Contact(peer.node_id, peer.address), network.now)
    return nodes


def employ(network: VirtualNetwork, workers: Iterable[Node]) -> None:
    """Make workers of these nodes, and let the news spread."""
    for node in workers:
        node.engine.announce(record_of(node.node_id, WORKER_PORT), network.now, at_once=True)
    network.run_for(2)


@dataclass(frozen=True)
class Errand:
    """How a client's search for one worker went. in_time: it ended by itself, before its deadline."""

    found: bool
    in_time: bool
    hops: int
    requests: int


def send_clients(
    network: VirtualNetwork, count: int, wanted: Sequence[Node], peers: Sequence[Node], rng: random.Random
) -> list[Errand]:
    """Have so many fresh clients, each of which knows two of `peers`, search for one of `wanted` each."""
    clients = [network.add_client() for _ in range(count)]
    for client in clients:
        client.engine.meet([peer.address for peer in rng.sample(peers, 2)], network.now)
    network.run_for(2)
    searches = [client.engine.find_workers(network.now) for client in clients]
    network.run_for(qmesh.LOOKUP_DEADLINE_S - SEARCH_MARGIN_S)
    in_time = [any(isinstance(event, qmesh.Finished) for event in client.events) for client in clients]
    network.run_for(2 * SEARCH_MARGIN_S)
    errands = []
    for client, search, early in zip(clients, searches, in_time, strict=True):
        (end,) = [event for event in client.events if isinstance(event, qmesh.Finished)]
        assert end.search == search, network
        found = rng.choice(wanted).node_id in {record.worker_id for record in end.records}
        errands.append(Errand(found, early, end.hops, end.requests))
        network.kill(client)
    return errands
