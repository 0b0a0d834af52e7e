"""Whole meshes under the DHT engine: a thousand nodes, and what befalls them. A figure holds for its seed."""

from __future__ import annotations

import gc
import heapq
import math
import pickle
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
from virtual_network import Errand, Node, VirtualNetwork, employ, grow, introduce, send_clients

import qmesh
from qmesh import Contact, Finished, NodeId

MANY = 1000
SOME = 60
CLIENTS = 100
REANNOUNCED_S = qmesh.ANNOUNCE_PERIOD_S * (1 + qmesh.ANNOUNCE_JITTER)
FORGOTTEN_S = 7 * qmesh.REFRESH_PERIOD_S  # a silent node has left every table by then
LIES = 19  # as many invented nodes as a datagram holds

Mesh = tuple[VirtualNetwork, list[Node], random.Random]


def share_found(errands: Sequence[Errand]) -> float:
    return statistics.mean(errand.found for errand in errands)


def living(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.alive]


def kill_share(mesh: Mesh, share: float, *, spared: Sequence[Node] = ()) -> None:
    network, nodes, rng = mesh
    for node in rng.sample([node for node in nodes if node not in spared], int(share * len(nodes))):
        network.kill(node)


@dataclass(frozen=True)
class Hunt:
    """A node's search for the nodes closest to an id, and its end."""

    asker: Node
    target: NodeId
    end: Finished

    def recall(self, nodes: Iterable[Node]) -> float:
        """The share of the k closest living nodes that it found."""
        others = [node.node_id for node in living(nodes) if node is not self.asker]
        closest = heapq.nsmallest(qmesh.K, others, key=self.target.distance)
        return len({contact.node_id for contact in self.end.contacts} & set(closest)) / len(closest)


def hunt(network: VirtualNetwork, askers: Sequence[Node], rng: random.Random) -> list[Hunt]:
    """Have each of these nodes search for a random id at once; all searches end within their deadline."""
    targets = [NodeId.random(rng) for _ in askers]
    searches = [node.engine.find_node(target, network.now) for node, target in zip(askers, targets, strict=True)]
    network.run_for(qmesh.LOOKUP_DEADLINE_S)
    hunts = []
    for node, target, search in zip(askers, targets, searches, strict=True):
        (end,) = [event for event in node.events if isinstance(event, Finished) and event.search == search]
        hunts.append(Hunt(node, target, end))
    return hunts


def mean_recall(hunts: Iterable[Hunt], nodes: Sequence[Node]) -> float:
    return statistics.mean(hunt.recall(nodes) for hunt in hunts)


def rebuilt(make: Callable[[VirtualNetwork, int, random.Random], list[Node]], count: int, seed: int) -> bytes:
    network, rng = VirtualNetwork(seed, beacons=False, record=False), random.Random(seed)
    return pickle.dumps((network, make(network, count, rng), rng))


def fresh(mesh: bytes) -> Mesh:
    """A copy; the collector would go through all of it again and again while it is made."""
    gc.disable()
    try:
        network, nodes, rng = pickle.loads(mesh)
        return network, nodes, rng
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def thousand() -> bytes:
    return rebuilt(introduce, MANY, 100)


@pytest.fixture(scope="module")
def grown() -> bytes:
    return rebuilt(grow, SOME, 200)


@pytest.fixture
def many(thousand: bytes) -> Mesh:
    """A thousand nodes that stand; a fresh copy for each test, and the randomness for what befalls them."""
    return fresh(thousand)


@pytest.fixture
def some(grown: bytes) -> Mesh:
    """A smaller mesh that came together by itself, each node knowing three others at first."""
    return fresh(grown)


# --- The simulation itself ---


def small_run(seed: int, loss: float = 0.1) -> bytes:
    network, rng = VirtualNetwork(seed, loss=loss, beacons=False, record=False), random.Random(seed)
    nodes = grow(network, 30, rng)
    network.partition(nodes[:10], nodes[10:])
    employ(network, nodes[:2])
    network.heal()
    send_clients(network, 5, nodes[:2], nodes, rng)
    return network.digest


def test_the_same_seed_is_the_same_run_and_another_seed_another() -> None:
    assert small_run(1) == small_run(1)
    assert small_run(1) != small_run(2)


def test_a_failing_run_names_what_it_is_replayed_with() -> None:
    network = VirtualNetwork(41, loss=0.25, beacons=False)
    network.add_node()
    with pytest.raises(AssertionError, match=r"within 5 s: <VirtualNetwork\(seed=41, loss=0\.25.* at 1005\.000 s"):
        network.run_until(lambda: False, patience=5)


def test_what_an_engine_raises_carries_the_network() -> None:
    class Broken(qmesh.DhtEngine):
        def handle_timer(self, now: float) -> None:
            raise KeyError

    network = VirtualNetwork(42, beacons=False)
    network.add_node(engine=Broken)
    with pytest.raises(KeyError) as caught:
        network.run_for(1)
    assert caught.value.__notes__ == [repr(network)]


def test_a_link_can_be_open_one_way_only() -> None:
    network = VirtualNetwork(43, beacons=False)
    one, other = network.add_node(), network.add_node()
    network.block_one_way(one, other)
    assert not network.reaches(one.address, other.address)
    assert network.reaches(other.address, one.address)


# --- A thousand nodes ---


def test_searches_among_a_thousand_nodes_take_few_hops_and_find_the_closest(many: Mesh) -> None:
    network, nodes, rng = many
    hunts = hunt(network, rng.sample(nodes, CLIENTS), rng)
    hops = sorted(one.end.hops for one in hunts)
    assert statistics.median(hops) <= 2, network
    assert hops[math.ceil(0.99 * len(hops)) - 1] <= 4, network
    assert mean_recall(hunts, nodes) >= 0.98, network
    assert max(len(node.engine.table) for node in nodes) < 0.15 * MANY, network


def test_the_only_worker_is_found_when_half_of_a_thousand_nodes_die_at_once(many: Mesh) -> None:
    network, nodes, rng = many
    (worker,) = rng.sample(nodes, 1)
    employ(network, [worker])
    kill_share(many, 0.5, spared=[worker])
    errands = send_clients(network, CLIENTS, [worker], living(nodes), rng)
    assert share_found(errands) >= 0.995, network
    network.run_for(REANNOUNCED_S)
    errands = send_clients(network, CLIENTS, [worker], living(nodes), rng)
    assert share_found(errands) == 1, network


def test_each_of_ten_workers_is_found_among_a_thousand_nodes_where_a_tenth_is_lost_each_way(many: Mesh) -> None:
    network, nodes, rng = many
    network.loss = 0.1
    workers = rng.sample(nodes, 10)
    employ(network, workers)
    errands = send_clients(network, CLIENTS, workers, nodes, rng)
    assert share_found(errands) >= 0.99, network
    assert all(errand.in_time for errand in errands), network


# --- Partitions, links, sleep and churn ---


def test_halves_that_forgot_each_other_become_one_mesh_again(some: Mesh) -> None:
    network, nodes, rng = some
    halves = nodes[::2], nodes[1::2]
    network.partition(*halves)
    network.run_for(FORGOTTEN_S)
    here = {node.node_id for node in halves[0]}
    known = {contact.node_id for node in halves[0] for contact in node.engine.table}
    assert known <= here, network
    network.heal()
    network.run_for(2 * qmesh.REFRESH_PERIOD_S)
    assert mean_recall(hunt(network, nodes, rng), nodes) >= 0.99, network
    employ(network, halves[0][:1])
    assert share_found(send_clients(network, 20, halves[0][:1], halves[1], rng)) == 1, network


def test_workers_are_found_where_a_fifth_of_all_links_is_open_one_way_only(some: Mesh) -> None:
    network, nodes, rng = some
    for one in nodes:
        for other in rng.sample(nodes, len(nodes) // 5):
            network.block_one_way(one, other)
    employ(network, nodes[:1])
    network.run_for(REANNOUNCED_S)
    errands = send_clients(network, 50, nodes[:1], nodes, rng)
    assert share_found(errands) == 1, network
    assert statistics.mean(len(one.end.contacts) for one in hunt(network, nodes, rng)) >= 15, network


def test_machines_that_slept_are_found_as_soon_as_they_wake(some: Mesh) -> None:
    network, nodes, rng = some
    sleepers = rng.sample(nodes, SOME // 3)
    employ(network, sleepers[:3])
    for node in sleepers:
        network.kill(node)
    network.run_for(2 * qmesh.REFRESH_PERIOD_S)
    assert share_found(send_clients(network, 20, sleepers[:3], living(nodes), rng)) == 0, network
    for node in sleepers:
        network.revive(node)
    network.run_for(1)
    assert share_found(send_clients(network, 50, sleepers[:3], nodes, rng)) == 1, network
    assert share_found(send_clients(network, 50, sleepers[:3], sleepers, rng)) == 1, network


def test_workers_are_found_while_a_hundredth_of_the_nodes_is_replaced_every_second(some: Mesh) -> None:
    network, nodes, rng = some
    workers, others = nodes[:3], nodes[3:]
    employ(network, workers)
    errands = []
    for _ in range(12):
        for _ in range(SOME // 20):
            network.kill(others.pop(rng.randrange(len(others))))
            others.append(network.add_node())
            others[-1].engine.meet([peer.address for peer in rng.sample(others[:-1], 3)], network.now)
        errands += send_clients(network, 10, workers, others, rng)  # which takes five seconds
    assert share_found(errands) >= 0.99, network
    assert all(errand.in_time for errand in errands), network


# --- Liars and the silent ---


class Impostor(qmesh.DhtEngine):
    """Answers pings as anybody does, so that it is known, but not what it is searched through for."""

    def __init__(self, *, keys: qmesh.MeshKeys, own: NodeId | None, rng: random.Random, now: float) -> None:
        super().__init__(keys=keys, own=own, rng=rng, now=now)
        self.own = own
        self.rng = rng
        self.lies: list[tuple[bytes, qmesh.Address]] = []

    def receive_datagram(self, data: bytes, address: qmesh.Address, now: float) -> None:
        codec = qmesh.DatagramCodec(qmesh.MeshKeys.derive("virtual").udp_key)
        request = codec.decode(data)
        if request.kind not in ("find_node", "find_workers"):
            super().receive_datagram(data, address, now)
        elif (reply := self.lie(request)) is not None:
            self.lies.append((codec.encode(reply), address))

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, qmesh.Address]]:
        lies, self.lies = self.lies, []
        return lies + super().datagrams_to_send(now)

    def lie(self, request: qmesh.Datagram) -> qmesh.Datagram | None:
        """Says nothing at all."""
        return None


class Liar(Impostor):
    """Answers every search with nodes that do not exist: others each time, anywhere."""

    def lie(self, request: qmesh.Datagram) -> qmesh.Datagram:
        target = request.body.get("target", request.body.get("topic"))
        hosts = self.rng.sample(range(1, 1 << 16), LIES)
        nodes = tuple(Contact(self.invent(target), (f"10.66.{host >> 8}.{host & 255}", 6666)) for host in hosts)
        body = {"nodes": nodes, "token": bytes(qmesh.TOKEN_BYTES)}
        if request.kind == "find_node":
            return qmesh.Datagram("nodes", request.transaction, self.own, body)
        return qmesh.Datagram("workers", request.transaction, self.own, body | {"records": (), "total": 0})

    def invent(self, target: NodeId) -> NodeId:
        return NodeId.random(self.rng)


class Tempter(Liar):
    """Invents nodes that are closer to what is sought than any that exist."""

    def invent(self, target: NodeId) -> NodeId:
        return NodeId(target ^ self.rng.getrandbits(128))


@pytest.mark.parametrize("kind", [Impostor, Liar, Tempter])
def test_a_tenth_of_all_nodes_that_lie_or_keep_silent_hide_no_worker(kind: type[qmesh.DhtEngine]) -> None:
    network, rng = VirtualNetwork(300, beacons=False, record=False), random.Random(300)
    nodes = grow(network, SOME, rng, kinds=[qmesh.DhtEngine] * 9 + [kind])
    honest = [node for node in nodes if not isinstance(node.engine, Impostor)]
    employ(network, honest[:1])
    assert share_found(send_clients(network, 50, honest[:1], honest, rng)) == 1, network
    hunts = hunt(network, honest[:30], rng)
    assert statistics.mean(len(one.end.contacts) for one in hunts) >= 0.9 * qmesh.K, network
    existing = {node.node_id for node in nodes}
    for node in honest:
        assert {contact.node_id for contact in node.engine.table} <= existing, network
