"""A seeded network in virtual time that carries the datagrams of many real DHT engines."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import qmesh

PATIENCE_S = 60.0  # virtual; what has not come true by then never will


@dataclass(eq=False)
class Node:
    """An engine, where it is reached, and all that it has told its owner. own: None for a client."""

    engine: qmesh.DhtEngine
    own: qmesh.NodeId | None
    address: qmesh.Address
    alive: bool = True
    timer: float = 0.0
    events: list[qmesh.Event] = field(default_factory=list)

    @property
    def node_id(self) -> qmesh.NodeId:
        assert self.own is not None, "a client has no id"
        return self.own


@dataclass(frozen=True)
class Sent:
    """A datagram that was put on the wire, whether or not it arrives."""

    time: float
    source: qmesh.Address
    destination: qmesh.Address
    data: bytes


class VirtualNetwork:
    """Carries datagrams between engines, with seeded delay and loss: the same seed, the same run.

    loss: the share of datagrams that are lost. delay: seconds one way, from and to. beacons: False for a
    network without multicast. `sent` lists every datagram since the beginning. A timer that does not
    move forward, which would burn a processor, fails the run.
    """

    def __init__(
        self, seed: int, *, loss: float = 0.0, delay: tuple[float, float] = (0.0005, 0.002), beacons: bool = True
    ) -> None:
        self.keys = qmesh.MeshKeys.derive("virtual")
        self.now = 1000.0
        self.loss = loss
        self.delay = delay
        self.beacons = beacons
        self.nodes: dict[qmesh.Address, Node] = {}
        self.sent: list[Sent] = []
        self._rng = random.Random(seed)
        self._cut: set[frozenset[qmesh.Address]] = set()
        self._due: list[tuple[float, int, qmesh.Address, Sent | None]] = []  # a delivery, or a timer
        self._scheduled = 0

    def add_node(self, own: qmesh.NodeId | None = None, address: qmesh.Address | None = None) -> Node:
        """Switch a node on; without an id or an address it gets one of its own."""
        return self._add(own or qmesh.NodeId.random(self._rng), address)

    def add_client(self, address: qmesh.Address | None = None) -> Node:
        """Switch an ephemeral client on: it asks, but nobody is to know it."""
        return self._add(None, address)

    def kill(self, node: Node) -> None:
        """Let a node fall silent and deaf, as if unplugged or asleep."""
        node.alive = False

    def revive(self, node: Node) -> None:
        """Let it go on with what it knew; to its engine, the clock has jumped."""
        node.alive = True
        self._on_timer(node)

    def block(self, one: Node, other: Node) -> None:
        """Cut the link between two nodes, both ways."""
        self._cut.add(frozenset((one.address, other.address)))

    def unblock(self, one: Node, other: Node) -> None:
        self._cut.discard(frozenset((one.address, other.address)))

    def run_for(self, seconds: float) -> None:
        """Let this much virtual time pass."""
        end = self.now + seconds
        self._run(lambda: False, end)
        self.now = end

    def run_until(self, happened: Callable[[], bool], patience: float = PATIENCE_S) -> None:
        """Let time pass until something is true; fail if it does not become so."""
        self._run(happened, self.now + patience)
        assert happened(), f"has not happened within {patience} s"

    def _add(self, own: qmesh.NodeId | None, address: qmesh.Address | None) -> Node:
        count = len(self.nodes) + 1
        address = address or (f"10.0.{count // 250}.{count % 250 + 1}", qmesh.DEFAULT_PORT)
        rng = random.Random(self._rng.getrandbits(64))
        engine = qmesh.DhtEngine(keys=self.keys, own=own, rng=rng, now=self.now)
        self.nodes[address] = node = Node(engine, own, address)
        return node

    def _run(self, happened: Callable[[], bool], end: float) -> None:
        for node in self.nodes.values():
            self._pump(node)  # its owner may have asked for something
        while not happened() and self._due and self._due[0][0] <= end:
            self.now, _, address, sent = heapq.heappop(self._due)
            node = self.nodes[address]
            if sent is None:
                self._on_timer(node)
            elif node.alive:
                node.engine.receive_datagram(sent.data, sent.source, self.now)
                self._pump(node)

    def _schedule(self, time: float, address: qmesh.Address, sent: Sent | None = None) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (time, self._scheduled, address, sent))

    def _pump(self, node: Node) -> None:
        """Take from an engine what it has for the wire, for its owner and for the clock."""
        if not node.alive:
            return
        for data, destination in node.engine.datagrams_to_send(self.now):
            self._carry(Sent(self.now, node.address, destination, data))
        while (event := node.engine.next_event()) is not None:
            node.events.append(event)
        timer = node.engine.get_timer()
        if timer != node.timer:
            node.timer = timer
            self._schedule(max(timer, self.now), node.address)

    def _carry(self, sent: Sent) -> None:
        self.sent.append(sent)
        everyone = list(self.nodes) if self.beacons else []
        for address in everyone if sent.destination == qmesh.BEACON else [sent.destination]:
            lost = self._rng.random() < self.loss or frozenset((sent.source, address)) in self._cut
            if address in self.nodes and not lost:
                self._schedule(self.now + self._rng.uniform(*self.delay), address, sent)

    def _on_timer(self, node: Node) -> None:
        if node.alive and node.engine.get_timer() <= self.now:
            node.engine.handle_timer(self.now)
            assert node.engine.get_timer() > self.now, "the timer does not move forward"
            self._pump(node)
