"""The DHT engine: many real engines over a virtual network, and strangers who speak by hand."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from dataclasses import replace

import members
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_network import Node, VirtualNetwork

import qmesh
from qmesh import Finished, Found, HealthState, Joined, NodeId, WorkerRecord

FULL = qmesh.MAX_DATAGRAM_BYTES
STRANGER = ("10.99.0.1", 5000)
TOPIC = qmesh.MeshKeys.derive("virtual").topic


def record_of(node_id: NodeId, **changes: object) -> WorkerRecord:
    record = WorkerRecord(node_id, (qmesh.UNSPECIFIED, 47476), 1, 80, HealthState.HEALTHY, 4, "tiny", bytes(8))
    return replace(record, **changes)  # type: ignore[arg-type]


def join(network: VirtualNetwork, count: int) -> list[Node]:
    """That many nodes, each of which was given the first one's address."""
    nodes = [network.add_node() for _ in range(count)]
    for node in nodes[1:]:
        node.engine.meet([nodes[0].address], network.now)
    network.run_for(2)
    return nodes


def work(network: VirtualNetwork, *nodes: Node, **figures: object) -> None:
    """Make workers of these nodes, and let the news spread."""
    for node in nodes:
        node.engine.announce(record_of(node.node_id, **figures), network.now, at_once=True)
    network.run_for(1)


def client_of(network: VirtualNetwork, *peers: Node) -> Node:
    """A client that knows these peers and nobody else."""
    client = network.add_client()
    for node in list(network.nodes.values()):
        if node not in peers:
            network.block(client, node)
    client.engine.meet([peer.address for peer in peers], network.now)
    network.run_until(lambda: len(client.engine.table) == len(peers))
    return client


def finished(network: VirtualNetwork, node: Node, search: int) -> Finished:
    """The end of a search, as soon as it has come; every search ends in time."""

    def ends() -> list[Finished]:
        return [event for event in node.events if isinstance(event, Finished) and event.search == search]

    network.run_until(lambda: bool(ends()), qmesh.LOOKUP_DEADLINE_S)
    return ends()[0]


def find(network: VirtualNetwork, node: Node, *, everything: bool = False) -> Finished:
    return finished(network, node, node.engine.find_workers(network.now, everything=everything))


def found_ids(network: VirtualNetwork, node: Node, *, everything: bool = False) -> set[NodeId]:
    return {record.worker_id for record in find(network, node, everything=everything).records}


def ids(nodes: list[Node]) -> set[NodeId]:
    return {node.node_id for node in nodes}


def table_of(node: Node) -> set[NodeId]:
    return {contact.node_id for contact in node.engine.table}


def sent_kinds(network: VirtualNetwork, source: Node, since: float = 0.0) -> list[str]:
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    return [codec.decode(s.data).kind for s in network.sent if s.source == source.address and s.time >= since]


class Stranger:
    """Sends one datagram by hand, from any address and under any id, and reads what comes back to it."""

    def __init__(self, network: VirtualNetwork, address: qmesh.Address = STRANGER) -> None:
        self.network = network
        self.address = address
        self.codec = qmesh.DatagramCodec(network.keys.udp_key)
        self.last_reply = b""
        self.asked = 0
        self.caused_bytes = 0

    def ask(
        self, node: Node, kind: str, sender: NodeId | None = None, *, size: int = FULL, **body: object
    ) -> qmesh.Datagram | None:
        self.asked += 1
        transaction = b"%08d" % self.asked
        data = self.codec.encode(qmesh.Datagram(kind, transaction, sender, body), pad_to=size)
        node.engine.receive_datagram(data, self.address, self.network.now)
        out = [data for data, to in node.engine.datagrams_to_send(self.network.now) if to == self.address]
        self.caused_bytes = sum(map(len, out))
        replies = [data for data in out if self.codec.decode(data).kind not in qmesh.REQUESTS]
        self.last_reply = replies[0] if replies else b""
        return self.codec.decode(replies[0]) if replies else None

    def token_from(self, node: Node) -> bytes:
        reply = self.ask(node, "find_node", target=TOPIC)
        assert reply is not None
        token = reply.body["token"]
        assert isinstance(token, bytes)
        return token

    def announce(self, node: Node, sender: NodeId, record: WorkerRecord, token: bytes) -> str:
        """ "ok", or the code of the error."""
        reply = self.ask(node, "announce", sender, topic=TOPIC, token=token, record=record)
        assert reply is not None
        return str(reply.body.get("code", reply.kind))

    def plant(self, node: Node, *records: WorkerRecord) -> None:
        """Have a node hold these records, all at this stranger's host."""
        for record in records:
            assert self.announce(node, record.worker_id, record, self.token_from(node)) == "ok"


Answer = tuple[str, Mapping[str, object]]
PONG: Answer = ("pong", {})
NOBODY: Answer = ("nodes", {"nodes": (), "token": bytes(qmesh.TOKEN_BYTES)})


def lone_engine(own: NodeId | None) -> qmesh.DhtEngine:
    """An engine outside any network, whose clock starts at 0."""
    return qmesh.DhtEngine(keys=qmesh.MeshKeys.derive("virtual"), own=own, rng=random.Random(0), now=0.0)


def answer_by_hand(engine: qmesh.DhtEngine, source: qmesh.Address, now: float, answers: Mapping[str, Answer]) -> None:
    """Answer all that an engine has to send as a peer at `source` would that says what it likes."""
    codec = qmesh.DatagramCodec(qmesh.MeshKeys.derive("virtual").udp_key)
    for data, _ in engine.datagrams_to_send(now):
        request = codec.decode(data)
        if request.kind in answers:
            kind, body = answers[request.kind]
            reply = qmesh.Datagram(kind, request.transaction, NodeId(77), body)
            engine.receive_datagram(codec.encode(reply), source, now)


def many_records(first: int, last: int) -> list[WorkerRecord]:
    return [record_of(NodeId(number << 200), model="m" * qmesh.MODEL_NAME_BYTES) for number in range(first, last)]


@pytest.fixture(scope="module")
def standing_mesh() -> bytes:
    network = VirtualNetwork(60, beacons=False)
    nodes = join(network, 60)
    work(network, *nodes[:50])
    network.sent.clear()
    return pickle.dumps((network, nodes))


@pytest.fixture
def mesh(standing_mesh: bytes) -> tuple[VirtualNetwork, list[Node]]:
    """60 nodes that know each other, the first 50 of them workers; a fresh copy for each test."""
    network, nodes = pickle.loads(standing_mesh)
    return network, nodes


# --- The network itself ---


def test_the_same_seed_replays_the_same_run_byte_for_byte() -> None:
    def run(seed: int) -> list[object]:
        network = VirtualNetwork(seed, loss=0.2)
        nodes = join(network, 4)
        work(network, nodes[1])
        return list(network.sent)

    assert run(7) == run(7)
    assert run(7) != run(8)


# --- Meeting ---


def test_nodes_that_hear_each_others_beacons_know_each_other_at_once() -> None:
    network = VirtualNetwork(1)
    nodes = [network.add_node() for _ in range(8)]
    network.run_for(0.1)
    for node in nodes:
        assert table_of(node) == ids(nodes) - {node.node_id}
        joined = [event.contact.node_id for event in node.events if isinstance(event, Joined)]
        assert sorted(joined) == sorted(table_of(node))


def test_nodes_that_were_all_given_one_peer_find_everybodys_records() -> None:
    network = VirtualNetwork(2, beacons=False)
    nodes = join(network, 10)
    work(network, *nodes[5:])
    client = client_of(network, nodes[2])
    for peer in nodes:
        network.unblock(client, peer)
    assert found_ids(network, client) == ids(nodes[5:])


def test_a_peer_that_starts_later_is_still_met() -> None:
    network = VirtualNetwork(3, beacons=False)
    early = network.add_node()
    early.engine.meet([("10.7.7.7", 47475)], network.now)
    network.run_for(20)
    late = network.add_node(address=("10.7.7.7", 47475))
    network.run_for(11)
    assert late.node_id in early.engine.table
    assert early.node_id in late.engine.table


def test_a_node_that_lost_its_only_peer_meets_it_again_when_the_link_heals() -> None:
    network = VirtualNetwork(4, beacons=False)
    one, other = join(network, 2)
    network.block(one, other)
    network.run_for(300)
    assert not table_of(one)
    assert not table_of(other)
    network.unblock(one, other)
    network.run_for(15)
    assert other.node_id in one.engine.table
    assert one.node_id in other.engine.table


def test_halves_of_a_mesh_without_beacons_become_one_again_when_the_link_between_them_heals() -> None:
    network = VirtualNetwork(4, beacons=False)
    nodes = join(network, 4)
    pairs = [(one, other) for one in nodes[:2] for other in nodes[2:]]
    for one, other in pairs:
        network.block(one, other)
    network.run_for(300)
    assert [table_of(node) for node in nodes] == [{n.node_id} for n in (nodes[1], nodes[0], nodes[3], nodes[2])]
    for one, other in pairs:
        network.unblock(one, other)
    network.run_for(70)
    assert all(table_of(node) == ids(nodes) - {node.node_id} for node in nodes)


def test_two_meshes_that_started_apart_become_one() -> None:
    network = VirtualNetwork(5)
    nodes = [network.add_node() for _ in range(6)]
    pairs = [(one, other) for one in nodes[:3] for other in nodes[3:]]
    for one, other in pairs:
        network.block(one, other)
    work(network, nodes[0], nodes[5])
    network.run_for(30)
    assert table_of(nodes[0]) == ids(nodes[1:3])
    for one, other in pairs:
        network.unblock(one, other)
    network.run_for(11)
    assert table_of(nodes[0]) == ids(nodes[1:])
    assert found_ids(network, client_of(network, nodes[1])) == ids([nodes[0], nodes[5]])


def test_a_worker_answers_a_beacon_with_its_own_record() -> None:
    network = VirtualNetwork(6)
    worker, _bystander = join(network, 2)
    work(network, worker)
    client = network.add_client()
    network.run_for(0.1)
    heard = [event for event in client.events if isinstance(event, Found)]
    assert [(event.search, [r.address for r in event.records]) for event in heard] == [
        (None, [(worker.address[0], 47476)])
    ]


def test_a_beacon_for_another_topic_is_answered_without_a_record() -> None:
    network = VirtualNetwork(6)
    (worker,) = join(network, 1)
    work(network, worker)
    reply = Stranger(network).ask(worker, "beacon", topic=NodeId(5), size=qmesh.SMALL_REQUEST_BYTES)
    assert reply is not None
    assert (reply.kind, reply.body) == ("pong", {})


def test_a_node_does_not_answer_its_own_beacon() -> None:
    network = VirtualNetwork(7)
    node = network.add_node()
    network.run_for(3)
    assert set(sent_kinds(network, node)) == {"beacon"}
    assert not node.engine.dropped


def test_a_node_that_is_given_its_own_address_soon_stops_asking_there() -> None:
    network = VirtualNetwork(8)
    node = network.add_node()
    node.engine.meet([node.address], network.now)
    network.run_for(30)
    since = network.now
    network.run_for(60)
    assert "ping" not in sent_kinds(network, node, since)
    assert not table_of(node)


def test_an_answer_under_our_own_id_makes_us_no_neighbour_of_ours() -> None:
    engine = lone_engine(NodeId(77))
    engine.handle_timer(0.0)
    answer_by_hand(engine, STRANGER, 0.0, {"beacon": ("pong", {"record": record_of(NodeId(77))})})
    assert len(engine.table) == 0
    assert engine.next_event() is None


def test_a_client_enters_no_table_and_is_asked_nothing() -> None:
    network = VirtualNetwork(9)
    nodes = join(network, 4)
    client = network.add_client()
    network.run_for(70)
    assert table_of(client) == ids(nodes)
    assert all(table_of(node) == ids(nodes) - {node.node_id} for node in nodes)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    assert all(codec.decode(s.data).kind not in qmesh.REQUESTS for s in network.sent if s.destination == client.address)
    assert set(sent_kinds(network, client)) == {"beacon"}


def test_a_node_that_was_only_heard_from_is_asked_but_not_known_before_it_answers() -> None:
    network = VirtualNetwork(10)
    (node,) = join(network, 1)
    network.run_for(60)
    assert Stranger(network).ask(node, "ping", NodeId(77)) is not None
    network.run_for(5)
    assert NodeId(77) not in node.engine.table
    newcomer = network.add_node()
    newcomer.engine.meet([node.address], network.now)
    network.run_for(0.1)
    assert newcomer.node_id in node.engine.table


def test_a_crowd_of_strangers_is_asked_a_few_at_a_time() -> None:
    network = VirtualNetwork(11)
    (node,) = join(network, 1)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    for number in range(1, 101):
        ping = codec.encode(qmesh.Datagram("ping", bytes(8), NodeId(number)), pad_to=FULL)
        node.engine.receive_datagram(ping, (f"10.50.0.{number}", 1000), network.now)
    out = [codec.decode(data).kind for data, _ in node.engine.datagrams_to_send(network.now)]
    assert out.count("pong") == 100
    assert out.count("ping") == qmesh.MAX_UNVERIFIED


def test_a_node_that_falls_silent_is_forgotten_and_no_longer_told_of() -> None:
    network = VirtualNetwork(12)
    nodes = join(network, 4)
    network.kill(nodes[3])
    network.run_for(200)
    assert all(table_of(node) == ids(nodes[:3]) - {node.node_id} for node in nodes[:3])


def test_an_address_that_changed_its_identity_is_known_by_the_new_one_only() -> None:
    network = VirtualNetwork(13, beacons=False)
    one, old = join(network, 2)
    network.kill(old)
    new = network.add_node(address=old.address)
    contacts = finished(network, one, one.engine.find_node(old.node_id, network.now)).contacts
    assert old.node_id not in {contact.node_id for contact in contacts}
    assert one.engine.dropped["identity"] == 1
    assert table_of(one) == {new.node_id}


def test_an_identity_that_is_gone_is_noticed_by_whoever_asks_after_it() -> None:
    network = VirtualNetwork(15, beacons=False)
    one, old = join(network, 2)
    network.kill(old)
    new = network.add_node(address=old.address)
    network.run_for(130)  # the silent are asked once a minute
    assert table_of(one) == {new.node_id}


def test_a_node_that_moved_to_another_address_is_asked_there() -> None:
    network = VirtualNetwork(14)
    one, old = join(network, 2)
    network.kill(old)
    moved = network.add_node(own=old.node_id)
    network.run_for(30)  # the old address has to have been silent for a while
    assert [contact.address for contact in one.engine.table] == [moved.address]


# --- Searches ---


def test_find_node_returns_the_truly_closest_in_a_mesh_of_sixty(mesh: tuple[VirtualNetwork, list[Node]]) -> None:
    network, nodes = mesh
    rng = random.Random(0)
    for node in nodes[::4]:
        target = NodeId.random(rng)
        others = sorted(ids(nodes) - {node.node_id}, key=target.distance)
        end = finished(network, node, node.engine.find_node(target, network.now))
        found = [contact.node_id for contact in end.contacts]
        assert found[: qmesh.K // 2] == others[: qmesh.K // 2]
        assert len(set(found) & set(others[: qmesh.K])) >= qmesh.K - 1  # of a third of all nodes, one may be unknown
        assert 1 <= end.hops <= 4
        assert end.requests >= qmesh.K


def test_find_workers_finds_a_sample_of_fifty_and_all_of_them_where_all_are_wanted(
    mesh: tuple[VirtualNetwork, list[Node]],
) -> None:
    network, nodes = mesh
    client = client_of(network, nodes[55])
    for node in nodes:
        network.unblock(client, node)
    sample = find(network, client)
    assert 8 <= len(sample.records) <= 50
    assert found_ids(network, client, everything=True) == ids(nodes[:50])


def test_one_holder_alone_hands_out_all_it_holds_page_by_page() -> None:
    network = VirtualNetwork(20, beacons=False)
    (holder,) = join(network, 1)
    Stranger(network).plant(holder, *many_records(1, 51))
    client = client_of(network, holder)
    end = find(network, client, everything=True)
    assert {record.worker_id for record in end.records} == {r.worker_id for r in many_records(1, 51)}
    assert len(end.records) == 50
    assert end.requests >= 50 / (FULL // qmesh.MAX_RECORD_BYTES)
    assert 1 <= len(find(network, client).records) < 50


def test_a_holder_that_dies_between_two_pages_does_not_hold_up_the_search() -> None:
    network = VirtualNetwork(18, beacons=False)
    (holder,) = join(network, 1)
    Stranger(network).plant(holder, *many_records(1, 51))
    client = client_of(network, holder)
    search, since = client.engine.find_workers(network.now, everything=True), network.now
    network.run_until(lambda: any(isinstance(event, Found) for event in client.events))
    network.kill(holder)
    assert 0 < len(finished(network, client, search).records) < 50
    assert network.now - since < qmesh.LOOKUP_DEADLINE_S


def test_holders_with_different_records_are_united() -> None:
    network = VirtualNetwork(21, beacons=False)
    one, other = join(network, 2)
    stranger = Stranger(network)
    stranger.plant(one, *many_records(1, 31))
    stranger.plant(other, *many_records(16, 46))
    client = client_of(network, one, other)
    end = find(network, client, everything=True)
    assert {record.worker_id for record in end.records} == {r.worker_id for r in many_records(1, 46)}


def test_of_two_records_of_one_worker_the_later_counts_whoever_answers_first() -> None:
    network = VirtualNetwork(21, beacons=False)
    holders = join(network, 2)
    for holder, stamp in zip(holders, (5, 6), strict=True):
        Stranger(network).plant(holder, record_of(NodeId(3), stamp=stamp))
    client = client_of(network, *holders)
    assert [[record.stamp for record in find(network, client).records] for _ in range(9)] == [[6]] * 9


def test_whoever_wants_everything_also_asks_the_holders_that_a_full_holder_knows() -> None:
    network = VirtualNetwork(22, beacons=False)
    one, other = join(network, 2)
    stranger = Stranger(network)
    stranger.plant(one, *many_records(1, 31))
    stranger.plant(other, *many_records(31, 61))
    client = client_of(network, one)
    network.unblock(client, other)
    end = find(network, client, everything=True)
    assert {record.worker_id for record in end.records} == {r.worker_id for r in many_records(1, 61)}


def test_what_finished_holds_is_what_was_found_on_the_way() -> None:
    network = VirtualNetwork(23, beacons=False)
    nodes = join(network, 5)
    work(network, *nodes)
    client = client_of(network, *nodes)
    end = find(network, client, everything=True)
    found = [
        r for event in client.events if isinstance(event, Found) and event.search == end.search for r in event.records
    ]
    assert {record.worker_id: record for record in found} == {record.worker_id: record for record in end.records}
    assert {record.address for record in end.records} == {(node.address[0], 47476) for node in nodes}


def test_a_search_of_somebody_who_knows_nobody_ends_at_once() -> None:
    network = VirtualNetwork(24, beacons=False)
    client = network.add_client()
    since = network.now
    assert find(network, client) == Finished(1, (), (), 0, 0)
    assert network.now == since


def test_a_search_among_the_dead_ends_within_its_deadline_with_nothing() -> None:
    network = VirtualNetwork(25, beacons=False)
    nodes = join(network, 12)
    client = client_of(network, *nodes)
    for node in nodes:
        network.kill(node)
    end = find(network, client)
    assert (end.contacts, end.records) == ((), ())
    network.run_for(2)
    assert client.engine.settled


def test_one_silent_node_does_not_hold_up_a_search() -> None:
    network = VirtualNetwork(26, beacons=False)
    nodes = join(network, 5)
    client = client_of(network, *nodes)
    network.kill(nodes[0])
    since = network.now
    assert len(find(network, client).contacts) == 4
    assert network.now - since <= qmesh.MIN_REQUEST_TIMEOUT_S + 0.01


def test_a_search_waits_for_the_second_try_when_the_only_peer_lost_the_first() -> None:
    network = VirtualNetwork(26, beacons=False)
    (worker,) = join(network, 1)
    work(network, worker)
    client = client_of(network, worker)
    search = client.engine.find_workers(network.now)
    network.loss = 1.0
    network.run_for(0.01)
    network.loss = 0.0
    assert [record.worker_id for record in finished(network, client, search).records] == [worker.node_id]


def test_searches_succeed_where_a_tenth_is_lost_each_way(mesh: tuple[VirtualNetwork, list[Node]]) -> None:
    network, nodes = mesh
    client = client_of(network, *nodes[50:54])
    for node in nodes:
        network.unblock(client, node)
    network.loss = 0.1
    counts = [len(find(network, client).records) for _ in range(25)]
    assert min(counts) >= 8
    assert found_ids(network, client, everything=True) == ids(nodes[:50])


def test_the_mesh_outlives_the_sudden_death_of_a_third(mesh: tuple[VirtualNetwork, list[Node]]) -> None:
    network, nodes = mesh
    rng = random.Random(1)
    dead = rng.sample(nodes, 18)
    alive = [node for node in nodes if node not in dead]
    client = client_of(network, *alive[:3])
    for node in nodes:
        network.unblock(client, node)
    for node in dead:
        network.kill(node)
    assert found_ids(network, client, everything=True) == ids(nodes[:50])  # the dead's records live on for a while
    for node in alive[::14]:
        end = finished(network, node, node.engine.find_node(TOPIC, network.now))
        assert len(end.contacts) >= qmesh.K // 2
        assert not {contact.node_id for contact in end.contacts} & ids(dead)


def test_nothing_is_told_or_asked_of_a_search_after_its_end() -> None:
    network = VirtualNetwork(27, beacons=False, delay=(0.18, 0.18))
    (holder,) = join(network, 1)
    Stranger(network).plant(holder, *many_records(1, 61))
    Stranger(network, ("10.99.0.2", 5000)).plant(holder, *many_records(61, 121))
    client = client_of(network, holder)
    end = find(network, client, everything=True)
    assert 0 < len(end.records) < 120  # so many pages take longer than a search may
    told, asked = len(client.events), client.engine.sent["find_workers"]
    network.run_for(10)
    assert len(client.events) == told
    assert client.engine.sent["find_workers"] == asked
    assert client.engine.settled


def test_a_peer_whose_link_became_slow_is_still_of_use() -> None:
    network = VirtualNetwork(19, beacons=False)
    (worker,) = join(network, 1)
    work(network, worker)
    client = client_of(network, worker)
    network.delay = (0.25, 0.25)
    assert found_ids(network, client) == {worker.node_id}
    asked = client.engine.sent["find_workers"]
    assert found_ids(network, client) == {worker.node_id}
    assert client.engine.sent["find_workers"] == asked + 1  # it is known by now how long to wait


@pytest.mark.parametrize(("advance", "pages"), [(1, 1000), (0, 3)])
def test_a_holder_whose_list_never_ends_cannot_keep_a_client_asking(advance: int, pages: int) -> None:
    client = lone_engine(None)
    client.meet([STRANGER], 0.0)
    for step in range(400):
        now = step / 50
        client.handle_timer(now)
        after = NodeId(7 + step * advance)
        endless = {"nodes": (), "records": (), "total": 1000, "token": bytes(qmesh.TOKEN_BYTES), "next": after}
        answer_by_hand(client, STRANGER, now, {"ping": PONG, "find_workers": ("workers", endless)})
        if step == 1:
            client.find_workers(now, everything=True)
    assert client.settled
    assert client.sent["find_workers"] <= pages


def test_however_much_is_asked_at_once_the_requests_in_flight_are_bounded() -> None:
    network = VirtualNetwork(29, beacons=False)
    nodes = join(network, 15)
    for node in nodes[1:]:
        network.kill(node)
    network.run_until(lambda: nodes[0].engine.settled)
    rng, since = random.Random(2), len(network.sent)
    searches = [nodes[0].engine.find_node(NodeId.random(rng), network.now) for _ in range(60)]
    network.run_for(0.0)
    assert 0 < len(network.sent) - since <= qmesh.MAX_TRANSACTIONS
    network.run_for(qmesh.LOOKUP_DEADLINE_S)
    ends = [event.search for event in nodes[0].events if isinstance(event, Finished)]
    assert sorted(ends) == searches
    network.run_for(3)
    assert nodes[0].engine.settled


def test_of_very_many_who_are_met_at_once_those_beyond_the_bound_wait_for_the_next_time() -> None:
    engine = lone_engine(None)
    engine.meet([("10.1.0.1", port) for port in range(1, qmesh.MAX_TRANSACTIONS + 6)], 0.0)
    assert len(engine.datagrams_to_send(0.0)) == qmesh.MAX_TRANSACTIONS
    assert engine.dropped == {"transactions": 5}


# --- Records ---


def test_a_killed_workers_record_expires_and_is_never_returned_after() -> None:
    network = VirtualNetwork(30)
    nodes = join(network, 3)
    work(network, nodes[0])
    network.run_for(60)
    network.kill(nodes[0])
    killed = network.now
    client = client_of(network, *nodes[1:])
    network.run_for(24 - (network.now - killed))  # the last announcement is 11 s old at most
    assert found_ids(network, client) == {nodes[0].node_id}
    network.run_for(killed + qmesh.RECORD_TTL_S - network.now)
    for _ in range(60):
        assert not found_ids(network, client)
        network.run_for(1)


def test_a_withdrawn_record_is_gone_at_once() -> None:
    network = VirtualNetwork(31)
    nodes = join(network, 6)
    work(network, *nodes[:2])
    nodes[0].engine.withdraw(network.now)
    network.run_until(lambda: nodes[0].engine.settled)
    client = client_of(network, *nodes)
    assert found_ids(network, client) == {nodes[1].node_id}
    network.run_for(30)
    assert found_ids(network, client) == {nodes[1].node_id}


def test_a_withdrawn_worker_no_longer_answers_beacons_with_its_record() -> None:
    network = VirtualNetwork(32)
    (worker,) = join(network, 1)
    work(network, worker)
    worker.engine.withdraw(network.now)
    client = network.add_client()
    network.run_for(20)
    assert table_of(client) == {worker.node_id}
    assert not [event for event in client.events if isinstance(event, Found)]


def test_withdrawing_what_was_never_announced_sends_nothing() -> None:
    network = VirtualNetwork(33)
    node, _ = join(network, 2)
    node.engine.withdraw(network.now)
    assert not node.engine.datagrams_to_send(network.now)


def test_an_announcement_that_was_lost_is_not_repeated_after_the_withdrawal() -> None:
    network = VirtualNetwork(34)
    worker, holder = join(network, 2)
    work(network, worker)
    network.block(worker, holder)
    worker.engine.announce(record_of(worker.node_id, stamp=2), network.now, at_once=True)
    network.run_for(0.05)
    network.unblock(worker, holder)
    worker.engine.withdraw(network.now)
    network.run_for(2)
    assert not found_ids(network, client_of(network, holder))


def test_a_withdrawal_that_is_refused_ends_there() -> None:
    network = VirtualNetwork(33)
    worker, holder = join(network, 2)
    work(network, worker)
    network.kill(holder)
    network.add_node(own=holder.node_id, address=holder.address)  # it has started anew, and knows no old tokens
    worker.engine.withdraw(network.now)
    network.run_for(1)
    assert worker.engine.dropped["refused_token"] == 1
    assert worker.engine.settled


def test_a_worker_that_withdraws_while_it_looks_for_holders_is_announced_to_nobody() -> None:
    network = VirtualNetwork(34)
    worker, holder = join(network, 2)
    asked = worker.engine.sent["find_node"]
    worker.engine.announce(record_of(worker.node_id), network.now)
    network.run_until(lambda: worker.engine.sent["find_node"] > asked)
    worker.engine.withdraw(network.now)
    network.run_for(2)
    assert "announce" not in sent_kinds(network, worker)
    assert not found_ids(network, client_of(network, holder))


def test_a_worker_that_withdrew_can_announce_itself_again() -> None:
    network = VirtualNetwork(35)
    worker, holder = join(network, 2)
    work(network, worker)
    worker.engine.withdraw(network.now)
    network.run_for(1)
    work(network, worker, stamp=2)
    assert found_ids(network, client_of(network, holder)) == {worker.node_id}


def test_every_announcement_carries_the_newest_health() -> None:
    network = VirtualNetwork(36)
    worker, holder = join(network, 2)
    work(network, worker, score=80)
    client = client_of(network, holder)
    worker.engine.announce(record_of(worker.node_id, stamp=2, score=40), network.now)
    network.run_for(11.1)
    assert [record.score for record in find(network, client).records] == [40]


def test_the_first_announcement_does_not_wait_for_its_turn() -> None:
    network = VirtualNetwork(37)
    worker, holder = join(network, 2)
    worker.engine.announce(record_of(worker.node_id), network.now)
    network.run_for(0.1)
    assert found_ids(network, client_of(network, holder)) == {worker.node_id}


def test_news_that_cannot_wait_are_announced_at_once() -> None:
    network = VirtualNetwork(37)
    worker, holder = join(network, 2)
    work(network, worker)
    client = client_of(network, holder)
    overloaded = record_of(worker.node_id, stamp=2, score=5, state=HealthState.OVERLOADED)
    worker.engine.announce(overloaded, network.now, at_once=True)
    network.run_for(0.01)
    assert [record.state for record in find(network, client).records] == [HealthState.OVERLOADED]


def test_an_older_announcement_that_is_repeated_does_not_overtake_a_newer_one() -> None:
    network = VirtualNetwork(38)
    worker, holder = join(network, 2)
    work(network, worker)
    network.block(worker, holder)
    worker.engine.announce(record_of(worker.node_id, stamp=2, score=40), network.now, at_once=True)
    network.run_for(0.05)
    network.unblock(worker, holder)
    worker.engine.announce(record_of(worker.node_id, stamp=3, score=10), network.now, at_once=True)
    network.run_for(2)
    assert [record.score for record in find(network, client_of(network, holder)).records] == [10]


def test_what_was_announced_once_is_announced_for_ever() -> None:
    network = VirtualNetwork(39)
    alone, *others = join(network, 3)
    work(network, alone)
    for other in others:
        network.block(alone, other)
    network.run_for(100)
    assert found_ids(network, client_of(network, alone)) == {alone.node_id}
    for other in others:
        network.unblock(alone, other)
    network.run_for(100)
    assert found_ids(network, client_of(network, others[0])) == {alone.node_id}


@pytest.mark.parametrize("start", range(0, 78, 3))  # rounds come every 10 s, a search for holders every 60 s
def test_a_hiccup_of_the_network_never_makes_a_living_worker_vanish(start: int) -> None:
    network = VirtualNetwork(40)
    worker, holder = join(network, 2)
    work(network, worker)
    client = client_of(network, holder)
    network.run_for(start)
    network.loss = 1.0
    network.run_for(3)
    network.loss = 0.0
    for _ in range(9):
        network.run_for(5)
        assert found_ids(network, client) == {worker.node_id}


def test_a_holder_that_was_restarted_under_its_old_id_soon_holds_the_record_again() -> None:
    network = VirtualNetwork(41)
    worker, holder = join(network, 2)
    work(network, worker)
    network.kill(holder)
    holder = network.add_node(own=holder.node_id, address=holder.address)
    network.run_for(25)
    assert found_ids(network, client_of(network, holder)) == {worker.node_id}


def test_a_holder_that_always_refuses_does_not_make_a_worker_announce_ever_faster() -> None:
    worker = lone_engine(NodeId(1))
    worker.announce(record_of(NodeId(1)), 0.0)
    for step in range(600):
        worker.handle_timer(step / 10)
        refusal = ("error", {"code": "token"})
        answer_by_hand(worker, STRANGER, step / 10, {"beacon": PONG, "find_node": NOBODY, "announce": refusal})
    assert 3 <= worker.sent["announce"] <= 12  # in a minute


def test_a_node_that_comes_later_is_told_of_the_workers_there_are() -> None:
    network = VirtualNetwork(42, beacons=False)
    nodes = join(network, 3)
    work(network, *nodes)
    late = network.add_node()
    late.engine.meet([nodes[1].address], network.now)
    network.run_for(2)
    assert found_ids(network, client_of(network, late)) == ids(nodes)


def test_a_worker_is_found_at_the_address_it_moved_to() -> None:
    network = VirtualNetwork(43)
    worker, holder = join(network, 2)
    work(network, worker)
    network.kill(worker)
    moved = network.add_node(own=worker.node_id)
    network.run_for(1)
    work(network, moved, stamp=2)
    left, found = sorted(find(network, client_of(network, holder)).records, key=lambda record: record.stamp)
    assert found.address == (moved.address[0], 47476)
    assert left.address == (worker.address[0], 47476)
    network.run_for(qmesh.RECORD_TTL_S)  # what it said at the old one, nobody believes any longer
    (found,) = find(network, client_of(network, holder)).records
    assert found.address == (moved.address[0], 47476)


# --- Strangers ---


def test_a_token_counts_for_a_minute_or_two_and_no_longer() -> None:
    network = VirtualNetwork(50)
    (node,) = join(network, 1)
    stranger, own = Stranger(network), NodeId(1 << 250)
    token = stranger.token_from(node)
    network.run_for(59)
    assert stranger.announce(node, own, record_of(own), token) == "ok"
    network.run_for(61)
    assert stranger.announce(node, own, record_of(own), token) == "token"


def test_a_token_counts_only_for_the_address_it_was_given_to() -> None:
    network = VirtualNetwork(51)
    (node,) = join(network, 1)
    own = NodeId(1 << 250)
    token = Stranger(network).token_from(node)
    for elsewhere in (("10.99.0.2", 5000), ("10.99.0.1", 5001)):
        assert Stranger(network, elsewhere).announce(node, own, record_of(own), token) == "token"
    assert Stranger(network).announce(node, own, record_of(own), token) == "ok"


def test_a_record_for_another_id_or_at_a_foreign_address_is_refused() -> None:
    network = VirtualNetwork(52)
    (node,) = join(network, 1)
    stranger, own = Stranger(network), NodeId(1 << 250)
    token = stranger.token_from(node)
    assert stranger.announce(node, own, record_of(NodeId(3)), token) == "record"
    assert stranger.announce(node, own, record_of(own, address=("10.1.2.3", 80)), token) == "record"
    assert not found_ids(network, client_of(network, node))


def test_nobody_can_withdraw_the_record_of_a_worker_at_another_host() -> None:
    network = VirtualNetwork(53)
    worker, holder = join(network, 2)
    work(network, worker)
    thief = Stranger(network)
    thief.ask(holder, "withdraw", worker.node_id, topic=TOPIC, token=thief.token_from(holder))
    assert found_ids(network, client_of(network, holder)) == {worker.node_id}
    thief.plant(holder, record_of(worker.node_id, stamp=9))
    thief.ask(holder, "withdraw", worker.node_id, topic=TOPIC, token=thief.token_from(holder))
    (record,) = find(network, client_of(network, holder)).records  # it took its own back
    assert record.address == (worker.address[0], 47476)


@pytest.mark.parametrize("stamp", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("everything", [False, True])
def test_who_announces_under_anothers_id_displaces_its_record_at_no_holder(stamp: int, everything: bool) -> None:
    """Over UDP an id is a claim; the dialled worker's certificate tells whose it is."""
    network = VirtualNetwork(57)
    worker, *holders = join(network, 4)
    work(network, worker)
    impostor = Stranger(network)
    for holder in holders:
        impostor.plant(holder, record_of(worker.node_id, stamp=stamp, score=100))
    network.run_for(qmesh.ANNOUNCE_PERIOD_S)
    for holder in holders:
        records = find(network, client_of(network, holder), everything=everything).records
        assert {record.worker_id for record in records} == {worker.node_id}
        assert {record.address[0] for record in records} == {worker.address[0], STRANGER[0]}
    network.run_for(qmesh.RECORD_TTL_S)
    for holder in holders:  # the worker goes on announcing itself, whatever the other's stamps are
        (record,) = find(network, client_of(network, holder), everything=everything).records
        assert record.address == (worker.address[0], 47476)


def test_a_withdrawal_without_a_valid_token_is_refused() -> None:
    network = VirtualNetwork(53)
    (node,) = join(network, 1)
    stranger, own = Stranger(network), NodeId(1 << 250)
    stranger.plant(node, record_of(own))
    reply = stranger.ask(node, "withdraw", own, topic=TOPIC, token=bytes(8))
    assert reply is not None
    assert reply.body == {"code": "token"}
    stranger.ask(node, "withdraw", None, topic=TOPIC, token=stranger.token_from(node))  # a client has no record
    assert found_ids(network, client_of(network, node)) == {own}


def test_one_host_cannot_fill_a_node_with_records() -> None:
    network = VirtualNetwork(54)
    (node,) = join(network, 1)
    stranger = Stranger(network)
    stranger.plant(node, *many_records(1, qmesh.MAX_RECORDS_PER_HOST + 1))
    (extra,) = many_records(100, 101)
    assert stranger.announce(node, extra.worker_id, extra, stranger.token_from(node)) == "quota"
    Stranger(network, ("10.99.0.2", 5000)).plant(node, extra)


@pytest.fixture(scope="module")
def laden() -> bytes:
    network = VirtualNetwork(55, beacons=False)
    nodes = join(network, 25)
    Stranger(network).plant(nodes[0], *many_records(1, 51))
    work(network, nodes[0], model="m" * qmesh.MODEL_NAME_BYTES)
    network.run_for(10)
    return pickle.dumps((network, nodes[0]))


REQUEST_BODIES: dict[str, dict[str, object]] = {
    "ping": {},
    "beacon": {"topic": TOPIC},
    "find_node": {"target": TOPIC},
    "find_workers": {"topic": TOPIC},
    "find_workers from the first on": {"topic": TOPIC, "after": NodeId(0)},
    "announce": {"topic": TOPIC, "record": record_of(NodeId(1 << 250))},
    "withdraw": {"topic": TOPIC},
}


@pytest.mark.parametrize("name", REQUEST_BODIES)
def test_a_request_causes_no_more_than_its_own_size(name: str, laden: bytes) -> None:
    network, node = pickle.loads(laden)
    stranger, kind = Stranger(network), name.split()[0]
    body = REQUEST_BODIES[name]
    if "record" in body or kind == "withdraw":
        body = body | {"token": stranger.token_from(node)}
    answered = 0
    for size in (0, *range(80, FULL + 1, 20)):
        natural = len(stranger.codec.encode(qmesh.Datagram(kind, bytes(8), NodeId(1 << 250), body)))
        reply = stranger.ask(node, kind, NodeId(1 << 250), size=size, **body)
        assert stranger.caused_bytes <= max(size, natural)  # whoever forged our address wins nothing by it
        answered += reply is not None
    assert answered > 30
    assert len(stranger.last_reply) > 900 or not kind.startswith("find")


def test_lists_fill_the_room_there_is_and_keep_some_for_nodes(laden: bytes) -> None:
    network, node = pickle.loads(laden)
    reply = Stranger(network).ask(node, "find_workers", topic=TOPIC)
    assert reply is not None
    assert len(reply.body["records"]) >= 5
    assert len(reply.body["nodes"]) >= qmesh.NODES_KEPT_FREE
    assert reply.body["total"] >= 50


OTHER_MESHES = {
    "another topic": qmesh.MeshKeys.derive("another"),
    "the same topic with a key": members.closed(1, "virtual"),
}


@pytest.mark.parametrize("kind", OTHER_MESHES)
def test_a_datagram_of_another_mesh_is_dropped_in_silence_and_counted(kind: str) -> None:
    network = VirtualNetwork(56)
    (node,) = join(network, 1)
    since = len(network.sent)
    foreign = qmesh.DatagramCodec(OTHER_MESHES[kind].udp_key)
    ping = foreign.encode(qmesh.Datagram("ping", bytes(8), NodeId(9)), pad_to=FULL)
    node.engine.receive_datagram(ping, STRANGER, network.now)
    assert node.engine.datagrams_to_send(network.now) == []
    assert node.engine.dropped == {"mesh": 1}
    assert node.engine.gate.strangers == {STRANGER[0]: ("mesh", network.now)}
    assert len(network.sent) == since


def of_another_version(size: int) -> bytes:
    return b"QM\x09" + bytes(size - 3)


def test_one_of_another_version_hears_that_there_is_this_one_and_is_told_of_once() -> None:
    network = VirtualNetwork(57)
    (node,) = join(network, 1)
    for _ in range(3):
        node.engine.receive_datagram(of_another_version(FULL), STRANGER, network.now)
    note = node.engine.datagrams_to_send(network.now)
    assert note == [(qmesh.VERSION_NOTE, STRANGER)] * 3
    assert node.engine.dropped == {"version": 3}
    assert node.engine.gate.strangers == {STRANGER[0]: ("version", network.now)}
    assert [node.engine.next_event(), node.engine.next_event()] == [qmesh.OtherVersion(STRANGER, 9), None]
    node.engine.receive_datagram(of_another_version(FULL), STRANGER, network.now + qmesh.STRANGER_PERIOD_S)
    assert node.engine.next_event() == qmesh.OtherVersion(STRANGER, 9)


def test_of_many_hosts_of_another_version_one_is_told_of_at_a_time() -> None:
    (node,) = join(network := VirtualNetwork(59), 1)
    for number in range(5):
        node.engine.receive_datagram(of_another_version(FULL), (f"10.9.9.{number}", 1), network.now)
    assert [node.engine.next_event(), node.engine.next_event()] == [qmesh.OtherVersion(("10.9.9.0", 1), 9), None]
    later = network.now + qmesh.STRANGER_PAUSE_S
    node.engine.receive_datagram(of_another_version(FULL), ("10.9.9.1", 1), later)
    assert node.engine.next_event() == qmesh.OtherVersion(("10.9.9.1", 1), 9)


def test_a_host_of_another_version_is_named_to_others_until_it_was_silent_for_long() -> None:
    (node,) = join(network := VirtualNetwork(60), 1)
    others, now = node.engine.gate.others, network.now
    for host in ("10.9.9.2", "10.9.9.1"):
        node.engine.receive_datagram(of_another_version(FULL), (host, 1), now)
    node.engine.receive_datagram(of_another_version(FULL), ("10.9.9.2", 1), now + 5)
    assert others.hosts(now + qmesh.STRANGER_PERIOD_S - 1) == ["10.9.9.1", "10.9.9.2"]
    assert others.hosts(now + qmesh.STRANGER_PERIOD_S) == ["10.9.9.2"]
    assert others.hosts(now + qmesh.STRANGER_PERIOD_S + 5) == []


def test_hosts_of_another_version_however_many_are_told_of_as_seldom_and_few_are_remembered() -> None:
    others, told = qmesh.OtherVersions(), 0
    for step in range(400):
        told += others.heard(f"10.9.9.{step % 40}", step / 10)
    assert told == 40 / qmesh.STRANGER_PAUSE_S
    assert len(others.hosts(40)) == qmesh.MAX_STRANGERS


def test_a_stranger_to_a_closed_mesh_gets_no_note() -> None:
    keys, own = members.closed(2, "virtual"), NodeId(7)
    engine = qmesh.DhtEngine(keys=keys, own=own, rng=random.Random(0), now=0.0)
    engine.receive_datagram(of_another_version(FULL), STRANGER, 0.0)
    assert engine.datagrams_to_send(0.0) == []
    assert engine.next_event() == qmesh.OtherVersion(STRANGER, 9)


def test_the_note_to_another_version_is_never_answered_and_never_larger_than_what_it_answers() -> None:
    network = VirtualNetwork(58)
    (node,) = join(network, 1)
    node.engine.receive_datagram(of_another_version(len(qmesh.VERSION_NOTE)), STRANGER, network.now)
    assert node.engine.datagrams_to_send(network.now) == []
    assert node.engine.next_event() == qmesh.OtherVersion(STRANGER, 9)
    for _ in range(2 * round(qmesh.RATE_BURST)):
        node.engine.receive_datagram(of_another_version(FULL), STRANGER, network.now)
    assert len(node.engine.datagrams_to_send(network.now)) < qmesh.RATE_BURST


@pytest.mark.parametrize("other", [qmesh.MeshKeys.derive("virtual"), members.closed(2, "virtual")])
def test_in_a_closed_mesh_nothing_is_heard_of_the_open_one_or_of_another_key(other: qmesh.MeshKeys) -> None:
    closed = members.closed(1, "virtual")
    inside, outside = (
        qmesh.DhtEngine(keys=keys, own=NodeId(number), rng=random.Random(number), now=0.0)
        for number, keys in ((1, closed), (2, other))
    )
    for target, speaker in ((inside, outside), (outside, inside)):
        speaker.meet([STRANGER], 0.0)
        speaker.handle_timer(0.0)
        said = [data for data, _ in speaker.datagrams_to_send(0.0)]
        assert len(said) >= 2  # a ping and a beacon
        target.datagrams_to_send(0.0)
        for data in said:
            target.receive_datagram(data, STRANGER, 0.0)
        assert target.datagrams_to_send(0.0) == []
        assert (target.dropped["mesh"], list(target.table)) == (len(said), [])


def damaged_datagrams() -> st.SearchStrategy[bytes]:
    codec = qmesh.DatagramCodec(qmesh.MeshKeys.derive("virtual").udp_key)
    token = {"token": bytes(8)}
    whole = [
        codec.encode(qmesh.Datagram(name.split()[0], bytes(8), NodeId(9), body | token))
        for name, body in REQUEST_BODIES.items()
    ]
    cut = st.builds(lambda data, lost: data[:-lost], st.sampled_from(whole), st.integers(1, 100))
    return st.one_of(st.binary(max_size=1300), cut, cut.map(lambda data: data + b" "))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(damaged_datagrams(), max_size=20))
def test_nothing_that_comes_from_the_wire_upsets_a_node(datagrams: list[bytes]) -> None:
    engine = lone_engine(NodeId(1))
    for data in datagrams:
        engine.receive_datagram(data, STRANGER, 0.0)
    assert engine.dropped.total() == len(datagrams)
    assert engine.datagrams_to_send(0.0) == []


def test_a_flood_from_one_host_is_cut_off_and_others_do_not_notice() -> None:
    network = VirtualNetwork(57)
    (node,) = join(network, 1)
    flooder, other = Stranger(network), Stranger(network, ("10.99.0.2", 5000))
    answered = sum(flooder.ask(node, "ping") is not None for _ in range(500))
    assert answered == qmesh.RATE_BURST
    assert node.engine.dropped["rate"] == 500 - answered
    assert Stranger(network, (STRANGER[0], 6000)).ask(node, "ping") is None
    assert other.ask(node, "ping") is not None
    network.run_for(1)
    answered = sum(flooder.ask(node, "ping") is not None for _ in range(200))
    assert answered == pytest.approx(qmesh.RATE_PER_S, abs=1)


def test_of_very_many_senders_the_longest_silent_is_forgotten() -> None:
    network = VirtualNetwork(58)
    (node,) = join(network, 1)
    flooder = Stranger(network)
    for _ in range(500):
        flooder.ask(node, "ping")
    for number in range(qmesh.MAX_RATED_ADDRESSES):
        node.engine.receive_datagram(b"", (f"10.60.{number // 250}.{number % 250}", 5000), network.now)
    assert flooder.ask(node, "ping") is not None


def test_on_the_loopback_every_process_has_its_own_rate() -> None:
    network = VirtualNetwork(58)
    (node,) = join(network, 1)
    flooder, other = Stranger(network, ("127.0.0.1", 5000)), Stranger(network, ("127.0.0.1", 5001))
    for _ in range(500):
        flooder.ask(node, "ping")
    assert flooder.ask(node, "ping") is None
    assert other.ask(node, "ping") is not None


def test_what_is_on_the_loopback_is_told_to_nobody_outside_the_machine() -> None:
    network = VirtualNetwork(59, beacons=False)
    gateway = network.add_node()
    inner = network.add_node(address=("127.0.0.1", 47480))
    inner.engine.meet([gateway.address], network.now)
    network.run_for(1)
    work(network, inner)
    network.run_for(11)
    for asker, told in ((Stranger(network), set()), (Stranger(network, ("127.0.0.1", 5000)), {inner.node_id})):
        sample = asker.ask(gateway, "find_workers", topic=TOPIC)
        page = asker.ask(gateway, "find_workers", topic=TOPIC, after=NodeId(0))
        near = asker.ask(gateway, "find_node", target=TOPIC)
        assert sample is not None
        assert page is not None
        assert near is not None
        for reply in (sample, page, near):
            assert {contact.node_id for contact in reply.body["nodes"]} == told
        for reply in (sample, page):
            assert {record.worker_id for record in reply.body["records"]} == told


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_peer_on_this_machine_is_known_by_the_address_that_others_can_use(order: tuple[int, int]) -> None:
    network = VirtualNetwork(62)
    (node,) = join(network, 1)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    beacon = codec.decode(next(sent.data for sent in reversed(network.sent) if sent.destination == qmesh.BEACON))
    addresses = [("10.0.0.77", 47476), ("127.0.0.1", 47476)]
    for which in order:  # it hears our beacon on both interfaces, and answers on both
        pong = codec.encode(qmesh.Datagram("pong", beacon.transaction, NodeId(77)))
        node.engine.receive_datagram(pong, addresses[which], network.now)
    reply = Stranger(network).ask(node, "find_node", target=TOPIC)
    assert reply is not None
    assert reply.body["nodes"] == (qmesh.Contact(NodeId(77), addresses[0]),)


def test_an_address_that_no_longer_answers_gives_way_to_the_loopback() -> None:
    engine = lone_engine(NodeId(1))
    engine.handle_timer(0.0)
    answer_by_hand(engine, ("10.0.0.77", 47476), 0.0, {"beacon": PONG})
    answer_by_hand(engine, ("10.0.0.77", 47476), 0.0, {"find_node": NOBODY})
    engine.find_node(TOPIC, 0.1)  # in vain, for the link has gone down
    for now in (0.2, 0.5, 0.9):
        engine.handle_timer(now)
    engine.datagrams_to_send(0.9)
    engine.handle_timer(1.0)
    answer_by_hand(engine, ("127.0.0.1", 47476), 1.0, {"beacon": PONG})
    assert [contact.address for contact in engine.table] == [("127.0.0.1", 47476)]


def test_loopback_records_between_others_do_not_stop_the_paging() -> None:
    network = VirtualNetwork(60, beacons=False)
    (holder,) = join(network, 1)
    inside = Stranger(network, ("127.0.0.1", 5000))
    inside.plant(holder, *many_records(10, 50))
    Stranger(network).plant(holder, *many_records(1, 10), *many_records(50, 60))
    end = find(network, client_of(network, holder), everything=True)
    told = {record.worker_id for record in end.records}
    assert told == {record.worker_id for record in [*many_records(1, 10), *many_records(50, 60)]}


def test_a_pong_about_another_worker_is_not_believed() -> None:
    network = VirtualNetwork(63)
    (node,) = join(network, 1)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    node.engine.meet([STRANGER], network.now)
    ((ping, _),) = node.engine.datagrams_to_send(network.now)
    body = {"record": record_of(NodeId(3))}
    pong = codec.encode(qmesh.Datagram("pong", codec.decode(ping).transaction, NodeId(9), body))
    node.engine.receive_datagram(pong, STRANGER, network.now)
    network.run_for(0)
    assert table_of(node) == {NodeId(9)}
    assert not [event for event in node.events if isinstance(event, Found)]


def test_a_worker_that_is_on_another_machines_loopback_is_not_believed_to_be_on_ours() -> None:
    engine = lone_engine(None)
    engine.meet([STRANGER], 0.0)
    record = record_of(NodeId(77), address=("127.0.0.1", 47476))
    answer_by_hand(engine, STRANGER, 0.0, {"ping": ("pong", {"record": record})})
    assert engine.next_event() == Joined(qmesh.Contact(NodeId(77), STRANGER))
    assert engine.next_event() is None


STRAY_REPLIES = {
    "the right answer from the wrong address": ("pong", ("10.99.0.9", 5000), True),
    "an answer to a question that was not put": ("pong", STRANGER, False),
    "an answer to another question": ("nodes", STRANGER, True),
}


@pytest.mark.parametrize(("kind", "address", "known"), STRAY_REPLIES.values(), ids=STRAY_REPLIES)
def test_a_reply_that_was_not_asked_for_is_ignored(kind: str, address: qmesh.Address, known: bool) -> None:
    network = VirtualNetwork(61, beacons=False)
    (node,) = join(network, 1)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    node.engine.meet([STRANGER], network.now)
    ((ping, _),) = node.engine.datagrams_to_send(network.now)
    transaction = codec.decode(ping).transaction if known else bytes(8)
    body = {"nodes": (), "token": bytes(8)} if kind == "nodes" else {}
    node.engine.receive_datagram(codec.encode(qmesh.Datagram(kind, transaction, NodeId(9), body)), address, network.now)
    assert node.engine.dropped == {"stray": 1}
    assert not table_of(node)
    assert not node.engine.settled


# --- Time ---


def test_a_node_that_slept_beacons_and_asks_everyone_again() -> None:
    network = VirtualNetwork(70)
    sleeper, *_others = join(network, 3)
    network.run_for(10)
    network.kill(sleeper)
    network.run_for(qmesh.SLEEP_GAP_S + 1)
    woke = network.now
    network.revive(sleeper)
    network.run_for(0.5)
    assert sent_kinds(network, sleeper, woke).count("beacon") == 2  # as a node does that has just started
    assert sent_kinds(network, sleeper, woke).count("ping") == 2


def test_a_worker_that_slept_longer_than_its_record_lives_is_found_at_once_when_it_wakes() -> None:
    network = VirtualNetwork(70)
    sleeper, *others = join(network, 3)
    work(network, sleeper)
    network.kill(sleeper)
    network.run_for(60)
    client = client_of(network, *others)
    assert not found_ids(network, client)
    network.revive(sleeper)
    network.run_for(0.5)
    assert found_ids(network, client) == {sleeper.node_id}


def test_a_short_gap_is_no_sleep() -> None:
    network = VirtualNetwork(71)
    node, _ = join(network, 2)
    network.run_for(30)
    network.kill(node)
    network.run_for(4)
    woke = network.now
    network.revive(node)
    network.run_for(0.5)
    assert sent_kinds(network, node, woke).count("beacon") <= 1


@pytest.mark.parametrize("late", [0.1, 0.3, 1.5, 4.0, 14.0, 16.0, 1000.0])
def test_a_timer_that_is_handled_late_still_moves_forward(late: float) -> None:
    engine = lone_engine(NodeId(1))
    engine.meet([STRANGER], 0.0)
    engine.announce(record_of(NodeId(1)), 0.0)
    engine.find_workers(0.0)
    now = 0.0
    for _ in range(20):
        now = max(engine.get_timer(), now) + late
        engine.handle_timer(now)
        assert engine.get_timer() > now


def test_a_mesh_at_rest_is_quiet() -> None:
    network = VirtualNetwork(72)
    nodes = join(network, 5)
    work(network, nodes[0])
    network.run_for(60)
    before = len(network.sent)
    network.run_for(600)
    assert (len(network.sent) - before) / 600 / len(nodes) < 1.2  # datagrams a second and node


def test_every_search_ends_once_and_nothing_leaks_whatever_happens() -> None:
    network = VirtualNetwork(73, loss=0.05, delay=(0.001, 0.2))
    nodes = join(network, 10)
    rng = random.Random(3)
    started: dict[Node, list[int]] = {node: [] for node in nodes}
    for _ in range(40):
        one, other = rng.sample(nodes, 2)
        act = rng.choice([network.block, network.unblock, network.unblock])
        act(one, other)
        rng.choice([network.kill, network.revive, network.revive])(one)
        if other.alive:
            started[other] += [other.engine.find_workers(network.now, everything=rng.random() < 0.5)]
            started[other] += [other.engine.find_node(NodeId.random(rng), network.now)]
            other.engine.announce(record_of(other.node_id, stamp=int(network.now)), network.now)
        network.run_for(rng.uniform(0, 4))
    for node in nodes:
        network.revive(node)
    network.run_for(qmesh.LOOKUP_DEADLINE_S)
    for node in nodes:
        ends = [event.search for event in node.events if isinstance(event, Finished)]
        assert sorted(ends) == started[node]
    for node in nodes[1:]:
        network.kill(node)
    network.run_for(300)
    network.run_until(lambda: nodes[0].engine.settled)
    assert not table_of(nodes[0])


# --- Several ways to one machine ---


def test_a_beacon_that_arrives_by_two_ways_is_answered_once() -> None:
    network = VirtualNetwork(80)
    (node,) = join(network, 1)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    beacon = codec.encode(qmesh.Datagram("beacon", bytes(8), None, {"topic": TOPIC}), pad_to=qmesh.SMALL_REQUEST_BYTES)
    for _ in range(3):  # by multicast, by broadcast, and by the loopback's own way
        node.engine.receive_datagram(beacon, STRANGER, network.now)
    assert [to for _, to in node.engine.datagrams_to_send(network.now)] == [STRANGER]
    assert node.engine.dropped == {"copy": 2}


def test_nodes_that_know_each_other_leave_beacons_unanswered() -> None:
    """Or a LAN of a hundred workers would answer a hundred beacons a hundred times, every ten seconds."""
    network = VirtualNetwork(81)
    nodes = join(network, 6)
    network.run_for(30)
    since = network.now
    network.run_for(8 * qmesh.BEACON_PERIOD_S)
    pongs = sum(sent_kinds(network, node, since).count("pong") for node in nodes)
    pings = sum(sent_kinds(network, node, since).count("ping") for node in nodes)
    assert pongs == pings  # each answers a ping, none a beacon


def test_a_node_that_starts_anew_under_its_old_id_is_answered_at_once() -> None:
    network = VirtualNetwork(82)
    one, other = join(network, 2)
    network.run_for(30)
    network.kill(other)
    again = network.add_node(own=other.node_id, address=other.address)
    network.run_for(0.1)
    assert table_of(again) == {one.node_id}


def test_whoever_uses_our_id_is_spoken_of() -> None:
    """A state directory that was copied makes two machines one."""
    network = VirtualNetwork(83)
    (node,) = join(network, 1)
    clone = network.add_node(own=node.node_id)
    network.run_for(qmesh.BEACON_PERIOD_S + 1)
    assert qmesh.Cloned(clone.address) in node.events
    assert qmesh.Cloned(node.address) in clone.events
    assert node.engine.dropped["clone"] > 0


def test_our_own_words_that_come_back_are_nobody_elses() -> None:
    network = VirtualNetwork(84)
    (node,) = join(network, 1)
    node.engine.meet([node.address], network.now)
    network.run_for(60)
    assert not [event for event in node.events if isinstance(event, qmesh.Cloned)]


def test_a_peer_that_was_named_is_asked_again_whenever_nobody_is_left() -> None:
    network = VirtualNetwork(85, beacons=False)
    named, node, *others = [network.add_node() for _ in range(qmesh.MAX_LOST + 4)]
    for each in (node, *others):
        each.engine.meet([named.address], network.now)
    network.run_for(70)
    assert table_of(node) == ids([named, *others])
    for each in (named, *others):  # so many fall silent that the address of the first is not among the last
        network.kill(each)
    network.run_for(600)
    assert not table_of(node)
    network.revive(named)
    network.run_for(qmesh.BEACON_PERIOD_S + 1)
    assert named.node_id in table_of(node)


def test_of_very_many_addresses_that_are_named_only_so_many_are_asked_again() -> None:
    engine = lone_engine(None)
    addresses = [(f"10.1.{number // 256}.{number % 256}", 1) for number in range(qmesh.MAX_TOLD + 10)]
    engine.meet(addresses, 0.0)
    assert [address for _, address in engine.datagrams_to_send(0.0)] == addresses
    asked: set[qmesh.Address] = set()
    while (now := engine.get_timer()) < 2 * qmesh.BEACON_PERIOD_S:
        engine.handle_timer(now)
        sent = engine.datagrams_to_send(now)
        asked |= {address for _, address in sent} if now > qmesh.BEACON_PERIOD_S else set()
    assert asked - {qmesh.BEACON} == set(addresses[: qmesh.MAX_TOLD])


def test_a_former_holder_is_told_of_a_withdrawal_too() -> None:
    network = VirtualNetwork(86)
    nodes = join(network, 30)
    worker = min(nodes, key=lambda node: node.node_id.distance(network.keys.topic))
    work(network, worker)
    network.run_for(20)
    nearer = [network.add_node(NodeId(network.keys.topic ^ distance)) for distance in range(1, 16)]
    network.run_for(qmesh.ANNOUNCE_PERIOD_S)
    assert worker.engine.withdraw(network.now)
    network.run_for(5)
    for node in (*nodes, *nearer):
        reply = Stranger(network, ("10.99.0.8", 5000)).ask(node, "find_workers", topic=network.keys.topic)
        assert reply is not None
        assert reply.body["total"] == 0


HERE, BESIDE, ELSEWHERE = ("fe80::1%eth0", 5000), ("fe80::2%eth0", 5000), ("fe80::2%wlan0", 5000)


@pytest.mark.parametrize(("asker", "told"), [(BESIDE, 1), (ELSEWHERE, 0), (STRANGER, 0), (("127.0.0.1", 5), 0)])
def test_a_link_local_address_is_told_only_to_those_on_its_link(asker: qmesh.Address, told: int) -> None:
    network = VirtualNetwork(87, beacons=False)
    (holder,) = join(network, 1)
    Stranger(network, HERE).plant(holder, record_of(NodeId(5)))
    reply = Stranger(network, asker).ask(holder, "find_workers", topic=TOPIC)
    assert reply is not None
    assert [record.address[0] for record in reply.body["records"]] == ["fe80::1"] * told


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            ("fe80::9%eth1", 5000),
            {("fe80::7%eth1", 7), ("10.0.0.7", 7)},
        ),  # the wire carries no scope: it is ours to add
        (("10.0.0.9", 5000), {("10.0.0.7", 7)}),
        (("127.0.0.1", 5000), {("127.0.0.7", 7), ("10.0.0.7", 7)}),
    ],
)
def test_only_addresses_of_use_here_are_taken_over(source: qmesh.Address, expected: set[qmesh.Address]) -> None:
    engine = lone_engine(NodeId(1))
    engine.meet([source], 0.0)
    answer_by_hand(engine, source, 0.0, {"ping": PONG})
    hosts = ("fe80::7", "10.0.0.7", "127.0.0.7")
    nodes = tuple(qmesh.Contact(NodeId(1000 + number), (host, 7)) for number, host in enumerate(hosts))
    number = engine.find_node(TOPIC, 1.0)
    assert number
    answer_by_hand(engine, source, 1.0, {"find_node": ("nodes", {"nodes": nodes, "token": bytes(qmesh.TOKEN_BYTES)})})
    assert {address for _, address in engine.datagrams_to_send(1.0)} == expected


# --- Whom a silence is laid to ---

ELSEWHERE_TOO = ("10.99.0.9", 5000)


def test_nobody_is_forgotten_for_what_happens_at_an_address_that_is_not_its_own() -> None:
    """Else anybody could have anybody forgotten, by speaking in its name from where nobody answers."""
    network = VirtualNetwork(88, beacons=False)
    node, victim = join(network, 2)
    network.run_for(30)
    impostor = Stranger(network, ELSEWHERE_TOO)
    for _ in range(4):
        impostor.ask(node, "find_node", victim.node_id, target=TOPIC)
        network.run_for(5)
    assert table_of(node) == {victim.node_id}
    assert [contact.address for contact in node.engine.table] == [victim.address]


def test_nor_for_what_another_says_there() -> None:
    network = VirtualNetwork(89, beacons=False)
    node, victim = join(network, 2)
    network.run_for(30)
    codec = qmesh.DatagramCodec(network.keys.udp_key)
    question = codec.encode(qmesh.Datagram("find_node", bytes(8), victim.node_id, {"target": TOPIC}), pad_to=FULL)
    node.engine.receive_datagram(question, ELSEWHERE_TOO, network.now)
    pings = [codec.decode(data) for data, to in node.engine.datagrams_to_send(network.now) if to == ELSEWHERE_TOO]
    (ping,) = (sent for sent in pings if sent.kind == "ping")
    pong = codec.encode(qmesh.Datagram("pong", ping.transaction, NodeId(9)))
    node.engine.receive_datagram(pong, ELSEWHERE_TOO, network.now)
    assert victim.node_id in table_of(node)


def test_a_question_that_is_thrown_back_from_elsewhere_changes_nothing() -> None:
    network = VirtualNetwork(90, beacons=False)
    node, named = (network.add_node() for _ in range(2))
    network.kill(named)
    node.engine.meet([named.address], network.now)
    ((ping, _),) = node.engine.datagrams_to_send(network.now)
    node.engine.receive_datagram(ping, ELSEWHERE_TOO, network.now)
    network.revive(named)
    network.run_for(qmesh.BEACON_PERIOD_S + 1)
    assert table_of(node) == {named.node_id}


def test_nodes_that_were_made_up_at_our_own_address_hold_up_no_search() -> None:
    engine = lone_engine(NodeId(1))
    engine.meet([STRANGER], 0.0)
    answer_by_hand(engine, STRANGER, 0.0, {"ping": PONG})
    nodes = tuple(qmesh.Contact(NodeId(TOPIC ^ number), ("10.0.0.1", 7)) for number in range(1, 11))
    search = engine.find_node(TOPIC, 1.0)
    named = {"find_node": ("nodes", {"nodes": nodes, "token": bytes(qmesh.TOKEN_BYTES)})}
    answer_by_hand(engine, STRANGER, 1.0, named)
    for data, address in engine.datagrams_to_send(1.0):
        engine.receive_datagram(data, address, 1.001)  # that is us
    engine.handle_timer(1.002)
    ended = []
    while (event := engine.next_event()) is not None:
        ended += [event] if isinstance(event, Finished) and event.search == search else []
    assert [contact.node_id for contact in ended[0].contacts] == [NodeId(77)]


def test_that_our_id_is_used_is_told_once_a_minute_however_often_it_is() -> None:
    network = VirtualNetwork(91)
    (node,) = join(network, 1)
    stranger = Stranger(network)
    for _ in range(100):
        stranger.ask(node, "ping", node.node_id)
    network.run_for(1)
    assert node.events.count(qmesh.Cloned(STRANGER)) == 1
    assert node.engine.dropped["clone"] == 100


LINK = ("fe80::77%eth0", 47476)
WIDE = ("10.0.0.77", 47476)


def test_a_holder_that_is_met_on_a_wider_way_is_told_there() -> None:
    """A record that came over a link-local address could be told to nobody else."""
    engine = lone_engine(NodeId(1))
    engine.announce(record_of(NodeId(1)), 0.0)
    engine.handle_timer(0.0)
    answer_by_hand(engine, LINK, 0.0, {"beacon": PONG})
    told: list[qmesh.Address] = []
    for step in range(1, 20):
        now = step / 10
        for data, address in engine.datagrams_to_send(now):
            request = qmesh.DatagramCodec(qmesh.MeshKeys.derive("virtual").udp_key).decode(data)
            told += [address] if request.kind == "announce" else []
            kind, body = {"ping": PONG, "beacon": PONG, "announce": ("ok", {})}.get(request.kind, NOBODY)
            source = address if address != qmesh.BEACON else WIDE if step > 8 else LINK
            reply = qmesh.DatagramCodec(qmesh.MeshKeys.derive("virtual").udp_key).encode(
                qmesh.Datagram(kind, request.transaction, NodeId(77), body)
            )
            engine.receive_datagram(reply, source, now)
        engine.handle_timer(now)
    assert told[0] == LINK
    assert told[-1] == WIDE


# --- Quotas of senders ---


def allowed(limiter: qmesh.RateLimiter, address: qmesh.Address, now: float, tries: int) -> int:
    return sum(limiter.allow(address, now) for _ in range(tries))


def test_a_sender_may_burst_and_then_keep_to_its_rate() -> None:
    limiter = qmesh.RateLimiter(burst=10, per_s=2)
    assert allowed(limiter, STRANGER, 0.0, 20) == 10
    assert allowed(limiter, STRANGER, 1.0, 20) == 2
    assert allowed(limiter, STRANGER, 1.4, 20) == 0
    assert allowed(limiter, STRANGER, 100.0, 20) == 10


def test_a_host_has_one_quota_for_all_its_ports_and_the_loopback_one_for_each() -> None:
    limiter = qmesh.RateLimiter(burst=3, per_s=1)
    assert [allowed(limiter, ("10.0.0.1", port), 0.0, 2) for port in (1, 2, 3)] == [2, 1, 0]
    assert allowed(limiter, ("10.0.0.2", 1), 0.0, 5) == 3
    assert [allowed(limiter, ("127.0.0.1", port), 0.0, 5) for port in (1, 2, 3)] == [3, 3, 3]


def test_what_costs_more_than_is_left_is_taken_and_paid_by_a_pause() -> None:
    limiter = qmesh.RateLimiter(burst=10, per_s=2)
    assert limiter.charge(STRANGER, 0.0, 10) == 0
    assert limiter.charge(STRANGER, 0.0, 4) == 2.0
    assert limiter.charge(STRANGER, 2.0, 1) == 0.5  # who pauses as told has paid by then
    assert limiter.charge(("10.0.0.2", 1), 2.0, 1) == 0


def test_a_crowd_of_senders_takes_a_bounded_memory_and_who_sent_last_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmesh, "MAX_RATED_ADDRESSES", 4)
    limiter = qmesh.RateLimiter(burst=1, per_s=0.001)
    assert limiter.allow(("10.0.0.1", 1), 0.0)
    for number in range(2, 5):
        limiter.allow((f"10.0.0.{number}", 1), 0.0)
        assert not limiter.allow(("10.0.0.1", 1), 0.0)
    for number in range(5, 9):
        limiter.allow((f"10.0.0.{number}", 1), 0.0)
    assert limiter.allow(("10.0.0.1", 1), 0.0)  # it was silent while four others sent, and is forgotten
