"""UDP shell: real nodes on the loopback that find each other, bind, and part."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import errno
import os
import random
import secrets
import socket
import struct
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import members
import pytest
from loop import PATIENCE_S, in_a_loop

import qmesh
from qmesh import (
    LOOPBACK,
    Address,
    Event,
    Finished,
    Found,
    Joined,
    MeshKeys,
    NodeId,
    UdpNode,
    UsageError,
    WorkerRecord,
)

NOT_OURS = "192.0.2.1"  # of the range for documentation (RFC 5737): an address of no machine
KINDS = [socket.SOCK_DGRAM, socket.SOCK_STREAM]


class Peer:
    """A node, its id, and the events that it told its owner, in order. meshes: if not the open one of the topic."""

    def __init__(self, topic: str, node_id: NodeId | None, *meshes: MeshKeys) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._node_id = node_id
        rng, now = random.Random(secrets.randbits(64)), qmesh.uptime_s()
        self.engines = [
            qmesh.DhtEngine(keys=keys, own=node_id, rng=rng, now=now) for keys in meshes or [MeshKeys.derive(topic)]
        ]
        self.node: UdpNode

    @property
    def engine(self) -> qmesh.DhtEngine:
        """Its first one."""
        return self.engines[0]

    @property
    def node_id(self) -> NodeId:
        assert self._node_id is not None, "a client has no id"
        return self._node_id

    @property
    def known(self) -> set[NodeId]:
        return {contact.node_id for contact in self.node.contacts()}

    def meet(self, *addresses: Address) -> None:
        self.node.run(lambda engine, now: engine.meet(addresses, now))

    def announce(self, tcp_port: int) -> None:
        record = WorkerRecord(
            self.node_id, (qmesh.UNSPECIFIED, tcp_port), 1, 90, qmesh.HealthState.HEALTHY, 4, "tiny", bytes(8)
        )
        self.node.run(lambda engine, now: engine.announce(record, now))

    async def until(self, wanted: Callable[[Event], bool]) -> Event:
        """The next event of this kind; others are passed over."""
        async with asyncio.timeout(PATIENCE_S):
            while not wanted(event := await self.events.get()):
                pass
            return event

    async def joins(self, *others: Peer) -> None:
        """Wait until these have entered the table."""
        while not {other.node_id for other in others} <= self.known:
            await self.until(lambda event: isinstance(event, Joined))

    async def search(self) -> list[WorkerRecord]:
        """One search for workers in each mesh, to its end."""
        found: list[WorkerRecord] = []
        numbers = self.node.run(lambda engine, now: engine.find_workers(now))
        for _ in numbers:
            ended = await self.until(lambda event: isinstance(event, Finished) and event.search in numbers)
            assert isinstance(ended, Finished)
            found += ended.records
        return found

    async def search_until(self, wanted: Callable[[list[WorkerRecord]], bool]) -> list[WorkerRecord]:
        """Search again and again, until what is found is as wanted."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if wanted(found := await self.search()):
                    return found
                await asyncio.sleep(0)  # a search that knows nobody ends at once


@contextlib.asynccontextmanager
async def opened(
    topic: str,
    *meshes: MeshKeys,
    listen: bool = False,
    client: bool = False,
    on_event: Callable[[Event], None] | None = None,
    clock: Callable[[], float] = qmesh.uptime_s,
) -> AsyncIterator[Peer]:
    """A node on the loopback that hears beacons only when it is to listen."""
    peer = Peer(topic, None if client else NodeId.of_bytes(secrets.token_bytes(32)), *meshes)
    peer.node = await UdpNode.open(
        *peer.engines, host=LOOPBACK, port=0, listen=listen, on_event=on_event or peer.events.put_nowait, clock=clock
    )
    try:
        yield peer
    finally:
        await peer.node.close()


# --- Finding each other ---


@in_a_loop
async def test_two_nodes_find_each_other_by_beacon_with_no_address_given(topic: str) -> None:
    async with opened(topic, listen=True) as one, opened(topic, listen=True) as other:
        await one.joins(other)
        await other.joins(one)


@in_a_loop
async def test_five_nodes_all_find_each_other_by_beacon(topic: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(opened(topic, listen=True)) for _ in range(5)]
        for peer in peers:
            await peer.joins(*(other for other in peers if other is not peer))


@in_a_loop
async def test_a_client_that_beacons_is_told_of_every_worker_and_joins_nobodys_table(topic: str) -> None:
    async with opened(topic, listen=True) as one, opened(topic, listen=True) as other:
        one.announce(tcp_port=4000)
        other.announce(tcp_port=4001)
        async with opened(topic, client=True) as client:
            told: dict[NodeId, Address] = {}
            while len(told) < 2:
                found = await client.until(lambda event: isinstance(event, Found) and event.search is None)
                assert isinstance(found, Found)
                told |= {record.worker_id: record.address for record in found.records}
            assert told == {one.node_id: (LOOPBACK, 4000), other.node_id: (LOOPBACK, 4001)}
            assert one.known | other.known <= {one.node_id, other.node_id}


@in_a_loop
async def test_one_address_to_meet_is_enough_without_beacons(topic: str) -> None:
    async with opened(topic) as one, opened(topic) as other:
        one.meet(other.node.address)
        await one.joins(other)
        await other.joins(one)


@in_a_loop
async def test_nodes_that_met_one_in_the_middle_come_to_know_each_other(topic: str) -> None:
    async with opened(topic) as one, opened(topic) as middle, opened(topic) as other:
        one.meet(middle.node.address)
        await middle.joins(one)
        other.meet(middle.node.address)
        await other.joins(one, middle)
        await one.joins(other)


@in_a_loop
async def test_a_worker_is_found_through_a_node_that_both_know(topic: str) -> None:
    async with opened(topic) as worker, opened(topic) as middle, opened(topic, client=True) as client:
        worker.announce(tcp_port=4000)
        worker.meet(middle.node.address)
        await middle.joins(worker)
        client.meet(middle.node.address)
        await client.joins(middle)
        (record,) = await client.search_until(bool)
        assert (record.worker_id, record.address) == (worker.node_id, (LOOPBACK, 4000))


@in_a_loop
async def test_an_address_where_nobody_answers_is_no_obstacle(topic: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind((LOOPBACK, 0))
        async with opened(topic) as one, opened(topic) as other:
            one.meet(deaf.getsockname(), other.node.address)
            await one.joins(other)


@in_a_loop
async def test_nodes_of_different_topics_hear_each_other_and_stay_apart(topic: str) -> None:
    async with (
        opened(topic, listen=True) as one,
        opened(f"{topic}-other", listen=True) as stranger,
        opened(topic, listen=True) as other,
    ):
        stranger.meet(one.node.address)
        await other.joins(one)
        other.meet(one.node.address)  # sent behind the stranger's: when it is answered, that was judged
        await one.joins(other)
        assert one.known == {other.node_id}
        assert other.known == {one.node_id}
        assert stranger.known == set()
        assert one.engine.dropped["mesh"] > 0


# --- Binding ---


@contextlib.contextmanager
def bound(kind: socket.SocketKind, host: str, port: int | None) -> Iterator[socket.socket]:
    """The one socket that a single host takes."""
    (sock,) = qmesh.bind_preferred(kind, host, port, qmesh.DEFAULT_PORT)
    with sock:
        yield sock


@pytest.mark.parametrize("kind", KINDS)
def test_a_free_port_is_taken_and_told(kind: socket.SocketKind) -> None:
    with bound(kind, LOOPBACK, 0) as sock:
        host, port = sock.getsockname()
        assert (host, port > 0) == (LOOPBACK, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_that_was_asked_for_and_is_taken_is_named(kind: socket.SocketKind) -> None:
    with bound(kind, LOOPBACK, 0) as holder:
        if kind == socket.SOCK_STREAM:
            holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken.*another one, or 0"):
            qmesh.bind_preferred(kind, LOOPBACK, port, qmesh.DEFAULT_PORT)


@pytest.mark.parametrize("kind", KINDS)
def test_when_the_usual_port_is_taken_a_free_one_does(kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch) -> None:
    with bound(kind, LOOPBACK, 0) as holder:
        if kind == socket.SOCK_STREAM:
            holder.listen()
        usual = holder.getsockname()[1]
        monkeypatch.setattr(qmesh, "DEFAULT_PORT", usual)
        with bound(kind, LOOPBACK, None) as sock:
            assert sock.getsockname()[1] not in (0, usual)


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_port_is_taken_when_it_is_free(kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch) -> None:
    with bound(kind, LOOPBACK, 0) as sock:
        usual = sock.getsockname()[1]
    monkeypatch.setattr(qmesh, "DEFAULT_PORT", usual)
    with bound(kind, LOOPBACK, None) as sock:
        assert sock.getsockname()[1] == usual


@pytest.mark.parametrize("port", [0, None])
def test_an_address_of_another_machine_cannot_be_bound(port: int | None) -> None:
    with pytest.raises(UsageError, match=f"{NOT_OURS} is no address of this machine; name one that is"):
        qmesh.bind_preferred(socket.SOCK_DGRAM, NOT_OURS, port, qmesh.DEFAULT_PORT)


@in_a_loop
async def test_a_node_whose_port_is_taken_says_so(topic: str) -> None:
    async with opened(topic) as holder:
        peer, port = Peer(topic, NodeId(1)), holder.node.address[1]
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            await UdpNode.open(peer.engine, host=LOOPBACK, port=port, listen=False, on_event=peer.events.put_nowait)


class Bindings:
    """What binding gives where a machine has no IPv6, or another program has its port: in turn, for each attempt."""

    def __init__(self, *failures: int) -> None:
        self.given: list[socket.socket] = []
        self._failures = list(failures)
        self._bind_one = qmesh.bind_one

    def __call__(self, kind: socket.SocketKind, host: str, port: int) -> socket.socket:
        if host == qmesh.UNSPECIFIED6 and (failure := self._failures.pop(0)):
            raise OSError(failure, os.strerror(failure))
        self.given.append(self._bind_one(kind, LOOPBACK, port if host == qmesh.UNSPECIFIED else 0))
        return self.given[-1]


@pytest.mark.parametrize("failure", qmesh.NO_IPV6)
def test_without_ipv6_the_socket_for_ipv4_is_enough(monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    bindings = Bindings(failure)
    monkeypatch.setattr(qmesh, "bind_one", bindings)
    assert qmesh.bind_preferred(socket.SOCK_DGRAM, "", 0, 0) == bindings.given
    bindings.given[0].close()


def test_a_port_that_is_free_for_one_version_of_ip_alone_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(errno.EADDRINUSE, errno.EADDRINUSE, 0)
    monkeypatch.setattr(qmesh, "bind_one", bindings)
    socks = qmesh.bind_preferred(socket.SOCK_DGRAM, "", 0, 0)
    assert [sock for sock in bindings.given if sock.fileno() != -1] == socks
    assert (len(bindings.given), len(socks)) == (4, 2)
    for sock in socks:
        sock.close()


def test_what_keeps_a_port_from_being_had_is_told_in_the_systems_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "bind_one", Bindings(errno.EPERM))
    with pytest.raises(UsageError, match=r"^\*:0 cannot be bound: Operation not permitted"):
        qmesh.bind_preferred(socket.SOCK_DGRAM, "", 0, 0)


# --- Interfaces ---


def test_a_machine_whose_interfaces_are_not_known_still_has_somewhere_to_beacon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmesh, "list_interfaces", list)
    assert [(item.address, item.broadcast) for item in qmesh.outlets("")] == [
        (LOOPBACK, None),
        (qmesh.UNSPECIFIED, qmesh.LIMITED_BROADCAST),
    ]


def test_with_a_host_only_its_interface_counts() -> None:
    assert [item.address for item in qmesh.outlets("127.0.0.1")] == ["127.0.0.1"]
    assert [item.address for item in qmesh.outlets("127.0.0.9")] == ["127.0.0.9"]  # the loopback has millions


def test_of_ipv6_each_interface_counts_once_and_no_version_that_is_not_wanted() -> None:
    assert all(qmesh.link_of(item.address) for item in qmesh.outlets("") if ":" in item.address)
    assert not [item for item in qmesh.outlets(qmesh.UNSPECIFIED) if ":" in item.address]
    assert not [item for item in qmesh.outlets(qmesh.UNSPECIFIED6) if ":" not in item.address]


def test_a_link_local_address_has_its_interface_by_name_while_that_is_there() -> None:
    name, index = "lo" if sys.platform == "linux" else "lo0", 1
    assert qmesh.address_of(("fe80::1", 7, 0, index)) == (f"fe80::1%{name}", 7)
    assert qmesh.address_of(("fe80::1", 7, 0, 9999)) == ("fe80::1%9999", 7)
    assert qmesh.address_of(("2001:db8::1", 7, 0, index)) == ("2001:db8::1", 7)


@in_a_loop
async def test_where_beacons_cannot_be_heard_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def share_port(sock: socket.socket) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    listener = qmesh.BeaconListener(LOOPBACK, lambda data, address: None)
    found = qmesh.outlets(LOOPBACK)
    with monkeypatch.context() as patched:
        patched.setattr(qmesh, "share_port", share_port)
        for _ in range(2):
            await listener.follow(found)
    before = listener.failure
    assert caplog.text.count("peers may find this machine by --peer only") == 1
    await listener.follow(found)
    assert (before, listener.failure) == ("Operation not permitted", None)
    await listener.close()


# --- Names of peers ---


@in_a_loop
async def test_peers_are_met_by_address_and_by_name(topic: str) -> None:
    async with opened(topic) as one, opened(topic) as other, opened(topic) as asking:
        ports = one.node.address[1], other.node.address[1]
        asking.node.meet([f"{LOOPBACK}:{ports[0]}", f"localhost:{ports[1]}"])
        await asking.joins(one, other)
        assert asking.node.unresolved == {}


@pytest.mark.parametrize("name", ["lab..example", ".lab", f"{'x' * 64}.example"])
@in_a_loop
async def test_a_name_that_is_none_cannot_be_resolved(name: str) -> None:
    with pytest.raises(qmesh.QMeshError):
        await qmesh.resolve(name, 7)


@in_a_loop
async def test_a_name_server_that_says_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def name_server(*_: object, **__: object) -> list[object]:
        over.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", name_server)
    monkeypatch.setattr(qmesh, "RESOLVE_TIMEOUT_S", 0.01)
    try:
        with pytest.raises(qmesh.QMeshError, match=r"no answer in 0\.01 s"):
            await qmesh.resolve("lab7", 7)
    finally:
        over.set()


@in_a_loop
async def test_a_name_that_cannot_be_resolved_yet_is_spoken_of_and_tried_again(
    topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker may start before its machine has found the name server."""
    tried: list[str] = []

    def name_server(host: str, port: int, **_: object) -> list[object]:
        tried.append(host)
        if len(tried) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (LOOPBACK, port))]

    monkeypatch.setattr(socket, "getaddrinfo", name_server)  # a real question would leave this machine
    monkeypatch.setattr(qmesh, "BEACON_PERIOD_S", 0.01)
    async with opened(topic) as one, opened(topic) as asking:
        asking.node.meet([f"lab7:{one.node.address[1]}"])
        await asking.joins(one)
        assert asking.node.unresolved == {}
    assert set(tried) == {"lab7"}
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"the peer lab7:{one.node.address[1]} cannot be resolved (Name or service not known); it is tried again"
    ]


# --- Noise ---


def noise(rng: random.Random) -> list[bytes]:
    """Random bytes of many sizes, some behind a true header, and some far too long."""
    blobs = [rng.randbytes(size) for size in (0, 1, 18, 19, 320, 1200, 1201, 40_000)]
    return blobs + [qmesh.DATAGRAM_MAGIC + rng.randbytes(rng.randrange(1200)) for _ in range(100)]


@in_a_loop
async def test_noise_is_counted_and_does_no_harm(topic: str) -> None:
    async with opened(topic) as target, opened(topic) as friend:
        sent = noise(random.Random(7))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thrower:
            for blob in sent:
                thrower.sendto(blob, target.node.address)
                await asyncio.sleep(0)  # the node reads along, so that its socket's buffer does not overflow
        friend.meet(target.node.address)  # it arrives behind the noise
        await friend.joins(target)
        await target.joins(friend)
        assert sum(target.engine.dropped[reason] for reason in ("size", "protocol", "mesh")) == len(sent)


@in_a_loop
async def test_a_flood_from_one_sender_is_cut_off_and_others_are_answered(topic: str) -> None:
    async with opened(topic) as target, opened(topic) as friend:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thrower:
            for _ in range(int(qmesh.RATE_BURST) + 1000):
                thrower.sendto(b"?", target.node.address)
                await asyncio.sleep(0)
        friend.meet(target.node.address)
        await friend.joins(target)
        assert target.engine.dropped["rate"] > 0


# --- A node of two meshes, while a key is being replaced ---

LAST_DAY = datetime.date(2026, 3, 1)


@dataclass
class Rotation:
    """A mesh's new key and its old one, as the members know them who have both, and those who have not.

    only_old: for those who do not know that it has a last day. neither: of a key that nobody has.
    """

    topic: str
    new: MeshKeys
    old: MeshKeys
    only_old: MeshKeys
    neither: MeshKeys

    @property
    def both(self) -> tuple[MeshKeys, MeshKeys]:
        return self.new, self.old


@pytest.fixture
def rotation(topic: str, monkeypatch: pytest.MonkeyPatch) -> Rotation:
    """It is the old key's last day; `CLOCK_CHECK_S` is short."""
    monkeypatch.setattr(qmesh, "utc_today", lambda: LAST_DAY)
    monkeypatch.setattr(qmesh, "CLOCK_CHECK_S", 0.01)
    number = secrets.randbits(128)  # nodes of one key hear each other, whatever their topics
    new, only_old, neither = (members.closed(number + step, topic) for step in range(3))
    return Rotation(topic, new, members.closed(number + 1, topic, LAST_DAY.isoformat()), only_old, neither)


@in_a_loop
async def test_a_node_of_two_meshes_finds_the_members_of_either_by_beacon_and_they_stay_apart(
    rotation: Rotation,
) -> None:
    async with (
        opened(rotation.topic, *rotation.both, listen=True) as both,
        opened(rotation.topic, rotation.new, listen=True) as new,
        opened(rotation.topic, rotation.only_old, listen=True) as old,
        opened(rotation.topic, listen=True) as neither,
    ):
        await both.joins(new, old)
        await new.joins(both)
        await old.joins(both)
        assert (new.known, old.known, neither.known) == ({both.node_id}, {both.node_id}, set())


@in_a_loop
async def test_a_worker_of_two_meshes_is_found_from_either_and_a_client_of_two_finds_workers_of_either(
    rotation: Rotation,
) -> None:
    async with (
        opened(rotation.topic, *rotation.both) as both,
        opened(rotation.topic, rotation.new) as new,
        opened(rotation.topic, rotation.only_old) as old,
    ):
        for port, worker in enumerate((both, new, old), 4000):
            worker.announce(tcp_port=port)
        expected = {
            (rotation.new,): {both.node_id, new.node_id},
            (rotation.only_old,): {both.node_id, old.node_id},
            rotation.both: {both.node_id, new.node_id, old.node_id},
        }
        for meshes, wanted in expected.items():
            async with opened(rotation.topic, *meshes, client=True) as client:
                client.meet(both.node.address, new.node.address, old.node.address)
                found = await client.search_until(
                    lambda found, wanted=wanted: {record.worker_id for record in found} >= wanted  # type: ignore[misc]
                )
                assert {record.worker_id for record in found} == wanted


@in_a_loop
async def test_a_datagram_of_neither_mesh_is_counted_once_and_one_of_either_is_not(rotation: Rotation) -> None:
    async with opened(rotation.topic, *rotation.both) as both:
        address = both.node.address
        for stranger in (rotation.neither, MeshKeys.derive(rotation.topic)):
            assert await qmesh.udp_ping(stranger, address, LOOPBACK) is None
        for keys in rotation.both:
            assert await qmesh.udp_ping(keys, address, LOOPBACK) == both.node_id
        report = both.node.report()
        assert report["dropped"] == {"mesh": 2 * qmesh.PING_ATTEMPTS}
        assert report["received"]["datagrams"] >= 2 * qmesh.PING_ATTEMPTS + 2
        assert [(each["host"], each["reason"]) for each in report["strangers"]] == [(LOOPBACK, "mesh")]


@in_a_loop
async def test_a_node_of_two_meshes_takes_its_record_back_in_both_when_it_closes(rotation: Rotation) -> None:
    async with (
        opened(rotation.topic, rotation.new) as new,
        opened(rotation.topic, rotation.only_old) as old,
        opened(rotation.topic, *rotation.both, client=True) as client,
    ):
        client.meet(new.node.address, old.node.address)
        async with opened(rotation.topic, *rotation.both) as both:
            both.announce(tcp_port=4000)
            both.meet(new.node.address, old.node.address)
            await client.search_until(lambda found: len(found) == 2 and held_by(new, old))
        assert await client.search() == []


def held_by(*holders: Peer) -> bool:
    """Whether each of them has taken a record in."""
    return all(holder.engine.sent["ok"] > 0 for holder in holders)


@in_a_loop
async def test_when_the_last_day_of_a_key_is_over_a_node_takes_its_record_back_and_is_silent_there(
    rotation: Rotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        opened(rotation.topic, *rotation.both) as both,
        opened(rotation.topic, rotation.new) as new,
        opened(rotation.topic, rotation.only_old) as old,
        opened(rotation.topic, rotation.new, client=True) as new_client,
        opened(rotation.topic, rotation.only_old, client=True) as old_client,
    ):
        both.announce(tcp_port=4000)
        both.meet(new.node.address, old.node.address)
        new_client.meet(new.node.address)
        old_client.meet(old.node.address)
        for client in (new_client, old_client):
            await client.search_until(lambda found: bool(found) and held_by(new, old))
        assert len(both.node.engines) == 2

        monkeypatch.setattr(qmesh, "utc_today", lambda: LAST_DAY + datetime.timedelta(days=1))
        await old_client.search_until(lambda found: not found)
        assert both.engines[1].sent["withdraw"] > 0
        assert both.node.engines == both.engines[:1]
        async with asyncio.timeout(PATIENCE_S):  # while the withdrawal is under way it still answers
            while await qmesh.udp_ping(rotation.only_old, both.node.address, LOOPBACK) is not None:
                pass
        sent = dict(both.engines[1].sent)

        (record,) = await new_client.search()
        assert (record.worker_id, record.address) == (both.node_id, (LOOPBACK, 4000))
        assert await qmesh.udp_ping(rotation.new, both.node.address, LOOPBACK) == both.node_id
        assert await qmesh.udp_ping(rotation.only_old, both.node.address, LOOPBACK) is None
        assert both.engine.dropped["mesh"] >= 2 * qmesh.PING_ATTEMPTS  # of that mesh nothing is known any more
        assert both.engines[1].sent == sent
        assert both.known == {new.node_id}


# --- Parting, and asking from within an event ---


@in_a_loop
async def test_a_node_that_closes_takes_its_record_back(topic: str) -> None:
    async with opened(topic) as middle, opened(topic, client=True) as client:
        async with opened(topic) as worker:
            worker.announce(tcp_port=4000)
            worker.meet(middle.node.address)
            client.meet(middle.node.address)
            await client.joins(middle)
            await client.search_until(lambda found: bool(found) and middle.engine.sent["ok"] > 0)  # it holds the record
        assert await client.search() == []


@in_a_loop
async def test_a_node_that_took_its_record_back_and_closes_at_once_still_hears_that_it_is_gone(topic: str) -> None:
    async with opened(topic) as middle:
        async with opened(topic) as worker:
            worker.announce(tcp_port=4000)
            worker.meet(middle.node.address)
            await worker.search_until(lambda _: middle.engine.sent["ok"] > 0 and worker.engine.settled)
            worker.node.run(lambda engine, now: engine.withdraw(now))
            assert not worker.engine.settled
        assert worker.engine.settled


@in_a_loop
async def test_a_closed_node_gives_its_port_back(topic: str) -> None:
    async with opened(topic) as peer:
        port = peer.node.address[1]
    with bound(socket.SOCK_DGRAM, LOOPBACK, port):
        pass


@in_a_loop
async def test_the_owner_may_ask_for_more_from_within_an_event_and_hears_one_at_a_time(topic: str) -> None:
    within: list[Event] = []
    nested: list[Event] = []
    told: list[Event] = []
    searches: list[int] = []
    ended = asyncio.Event()

    def on_event(event: Event) -> None:
        nested.extend(within)
        within.append(event)
        if isinstance(event, Joined):  # it came together with what the worker told of itself
            searches.extend(seeker.node.run(lambda engine, now: engine.find_workers(now)))
        told.append(within.pop())
        if isinstance(event, Finished):
            ended.set()

    async with opened(topic, listen=True) as worker:
        worker.announce(tcp_port=4000)
        async with opened(topic, client=True, on_event=on_event) as seeker:
            async with asyncio.timeout(PATIENCE_S):
                await ended.wait()
            assert nested == []
            (finished,) = [event for event in told if isinstance(event, Finished)]
            assert [finished.search] == searches
            assert [record.worker_id for record in finished.records] == [worker.node_id]
            assert any(isinstance(event, Found) and event.search is None for event in told)


# --- What happens to a socket, a clock and a network while a node runs ---


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that beacons, and looks at the clock, every 10 ms."""
    monkeypatch.setattr(qmesh, "BEACON_TIMES_S", (0.0,))
    monkeypatch.setattr(qmesh, "BEACON_PERIOD_S", 0.01)
    monkeypatch.setattr(qmesh, "CLOCK_CHECK_S", 0.01)


def deafen(port: int) -> None:
    """Have the kernel drop all that arrives at one of our own UDP sockets, as some systems do after an ICMP error."""
    nothing = struct.pack("HBBI", 0x06, 0, 0, 0)  # a BPF program: return 0 bytes of whatever it is
    program = ctypes.create_string_buffer(nothing)
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as sock:
            if sock.type == socket.SOCK_DGRAM and sock.getsockname()[1] == port:
                filter_ = struct.pack("HL", 1, ctypes.addressof(program))
                sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)


SO_ATTACH_FILTER = 26


@pytest.mark.skipif(sys.platform != "linux", reason="socket filters are Linux's")
@in_a_loop
async def test_a_socket_that_hears_nothing_any_more_is_bound_anew(topic: str, hasty: None) -> None:
    async with opened(topic) as node, opened(topic) as other:
        address = node.node.address
        deafen(address[1])
        other.meet(address)
        await other.joins(node)
        assert node.node.address == address


@pytest.mark.skipif(sys.platform != "linux", reason="socket filters are Linux's")
@in_a_loop
async def test_a_socket_that_cannot_be_bound_anew_yet_is_tried_again(
    topic: str, hasty: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    attempts: list[Address] = []
    bind_one = qmesh.bind_one

    def bind(kind: socket.SocketKind, host: str, port: int) -> socket.socket:
        attempts.append((host, port))
        if len(attempts) < 3:
            raise OSError(errno.EADDRNOTAVAIL, "the interface is not back yet")
        return bind_one(kind, host, port)

    async with opened(topic) as node, opened(topic) as other:
        monkeypatch.setattr(qmesh, "bind_one", bind)
        deafen(node.node.address[1])
        other.meet(node.node.address)
        await other.joins(node)
        assert set(attempts) == {node.node.address}
    assert caplog.text.count("tried again at the next beacon") == 2


@in_a_loop
async def test_an_error_on_windows_has_the_socket_bound_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    own = qmesh.UdpSocket(lambda data, address: None)
    await own.open(qmesh.bind_one(socket.SOCK_DGRAM, LOOPBACK, 0))
    own.error_received(ConnectionResetError())
    assert own.test()
    monkeypatch.setattr(sys, "platform", "win32")
    own.error_received(ConnectionResetError())
    assert not own.test()
    await own.close()


@in_a_loop
async def test_a_node_looks_for_everybody_again_when_an_interface_comes(
    topic: str, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(topic) as node, opened(topic) as other:
        node.meet(other.node.address)
        await node.joins(other)
        pings = node.engine.sent["ping"]
        come = [*qmesh.outlets(LOOPBACK), qmesh.Interface("lo", 1, "127.0.0.2")]
        monkeypatch.setattr(qmesh, "outlets", lambda host: come)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await asyncio.sleep(0)
                if node.engine.sent["ping"] > pings:
                    break
        assert node.node.report()["interfaces"] == [item.address for item in come]


@in_a_loop
async def test_a_node_whose_machine_slept_looks_for_everybody_again(topic: str, hasty: None) -> None:
    """The loop's clock stands still meanwhile: only the machine's own tells."""
    slept = 0.0
    async with opened(topic, listen=True, clock=lambda: qmesh.uptime_s() + slept) as node, opened(topic) as other:
        node.meet(other.node.address)
        await node.joins(other)
        pings = node.engine.sent["ping"]
        slept = 3600.0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await asyncio.sleep(0)
                if node.engine.sent["ping"] > pings:
                    return


@in_a_loop
async def test_a_node_of_all_interfaces_has_one_port_for_ipv4_and_ipv6() -> None:
    socks = qmesh.bind_preferred(socket.SOCK_DGRAM, "", 0, 0)
    assert len({sock.getsockname()[1] for sock in socks}) == 1
    families = [sock.family for sock in socks]
    assert families == [socket.AF_INET, socket.AF_INET6][: len(families)]
    for sock in socks:
        sock.close()


@in_a_loop
async def test_a_ping_from_outside_is_answered_under_the_nodes_id_and_in_its_mesh_only(topic: str) -> None:
    keys = qmesh.MeshKeys.derive(topic)
    async with opened(topic) as node:
        assert await qmesh.udp_ping(keys, node.node.address, LOOPBACK) == node.node_id
        assert await qmesh.udp_ping(qmesh.MeshKeys.derive(f"{topic}-other"), node.node.address, LOOPBACK) is None
        assert node.known == set()  # it was no node that asked
        assert node.engine.gate.strangers[LOOPBACK][0] == "mesh"


@pytest.mark.parametrize(("address", "host"), [(("::1", 7), LOOPBACK), ((LOOPBACK, 7), NOT_OURS)])
@in_a_loop
async def test_nobody_answers_a_ping_that_cannot_leave(topic: str, address: Address, host: str) -> None:
    assert await qmesh.udp_ping(qmesh.MeshKeys.derive(topic), address, host) is None


@in_a_loop
async def test_the_report_counts_what_passed_and_what_was_dropped(topic: str) -> None:
    async with opened(topic) as one, opened(topic) as other:
        other.meet(one.node.address)
        await other.joins(one)
        await one.joins(other)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thrower:
            thrower.sendto(b"QM\x63 from a later version", one.node.address)
            thrower.sendto(b"noise, long enough to hold a header and more", one.node.address)
        assert await qmesh.udp_ping(qmesh.MeshKeys.derive(topic), one.node.address, LOOPBACK) == one.node_id
        report = one.node.report()
        assert report["peers"] == 1
        assert report["interfaces"] == [LOOPBACK]
        assert report["dropped"]["protocol"] == 1
        assert report["dropped"]["version"] >= 1  # other tests' nodes of other versions may be heard on the loopback
        assert [(each["host"], each["reason"]) for each in report["strangers"]] == [(LOOPBACK, "version")]
        assert report["received"]["bytes"] > report["received"]["datagrams"] > 0
        assert report["sent"]["bytes"] > report["sent"]["datagrams"] > 0
