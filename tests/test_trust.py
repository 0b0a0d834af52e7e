"""TCP shell: who is let in, who is not, and what those may cost who are not trusted yet."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from loop import PATIENCE_S, in_a_loop
from members import OPEN, closed, echo, member, node_key, serving
from raw_client import connected

import qmesh
from qmesh import (
    LOOPBACK,
    Address,
    Authority,
    Connection,
    Identity,
    MissingTls,
    QMeshError,
    TcpServer,
    WireError,
    WorkerLost,
    WrongMesh,
)

LAB, OFFICE = closed(1), closed(2)
ALERT_BYTES = 7  # a record that holds an alert and nothing else


async def works(address: Address, identity: Identity) -> None:
    """A member is let in, and answered."""
    connection = await qmesh.dial(address, identity)
    await connection.send({"type": "status", "n": 7})
    answer = await connection.receive()
    await connection.close()
    assert answer == {"type": "status_response", "n": 7}


async def until_dropped(server: TcpServer, **expected: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while dict(server.dropped) != expected:  # noqa: ASYNC110 - it is the server that counts
            await asyncio.sleep(0.01)


async def said_to(address: Address, data: bytes) -> bytes:
    """All that comes back to one who sends this over TCP, until the other side closes."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := await reader.read(qmesh.READ_BYTES):
                answer += more
        writer.close()
        return answer


# --- Whose mesh it is ---


@in_a_loop
async def test_members_of_a_closed_mesh_learn_each_others_ids_from_their_certificates() -> None:
    async with serving(member(1, LAB)) as (_, address):
        connection = await qmesh.dial(address, member(2, LAB))
        assert connection.peer_id == str(node_key(1).node_id)
        assert connection.keys == LAB
        await connection.close()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LAB, OFFICE),
        (LAB, OPEN),
        (OPEN, LAB),
        (OPEN, qmesh.MeshKeys.derive("another topic")),
        (LAB, closed(1, "another topic")),
    ],
)
@in_a_loop
async def test_who_dials_another_mesh_is_told_so_and_gets_nothing_else(
    theirs: qmesh.MeshKeys, ours: qmesh.MeshKeys
) -> None:
    async with serving(member(1, theirs)) as (server, address):
        with pytest.raises(WrongMesh, match="another mesh, with another key or topic") as caught:
            await qmesh.dial(address, member(2, ours))
        assert "--key" in caught.value.remedy
        await until_dropped(server, mesh=1)
        await works(address, member(3, theirs))


def client_context(trusting: qmesh.MeshKeys, showing: Identity | None) -> ssl.SSLContext:
    """Of a client that trusts the right mesh, and shows a certificate of another, or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if showing is not None:
        context = showing.memberships[0].dialling
    context.check_hostname = False
    context.load_verify_locations(cadata=Authority(trusting.ca_seed).certificate)
    return context


@pytest.mark.parametrize("showing", [None, member(2, OFFICE)], ids=["none", "another mesh's"])
@in_a_loop
async def test_a_certificate_is_asked_of_who_dials(showing: Identity | None) -> None:
    async with serving(member(1, LAB)) as (server, address):
        name = member(2, LAB).memberships[0].server_name
        context = client_context(LAB, showing)
        reader, writer = await asyncio.open_connection(*address, ssl=context, server_hostname=name)
        with pytest.raises(ssl.SSLError, match=r"CERTIFICATE_REQUIRED|UNKNOWN_CA"):
            await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.transport.abort()
        await until_dropped(server, mesh=1)
        await works(address, member(3, LAB))


@in_a_loop
async def test_a_listener_without_our_meshs_certificate_is_not_greeted() -> None:
    impostor = member(1, OFFICE)
    said = asyncio.Queue[bytes]()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.put_nowait(await reader.read())
        writer.close()

    server = await asyncio.start_server(on_connection, LOOPBACK, 0, ssl=impostor.memberships[0].listening)
    async with server:
        with pytest.raises(WrongMesh, match="certificate is not signed by this mesh's key"):
            await qmesh.dial(server.sockets[0].getsockname(), member(2, LAB))
    assert said.empty()


def signed_by_the_mesh(mesh: qmesh.MeshKeys) -> str:
    """A certificate of the right authority that is not of our form, with its key, in PEM."""
    own, now = Ed25519PrivateKey.from_private_bytes(node_key(5).seed), datetime.datetime(2020, 1, 1)
    authority = x509.load_der_x509_certificate(Authority(mesh.ca_seed).certificate)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "QMesh node")]))
        .issuer_name(authority.subject)
        .serial_number(5)
        .not_valid_before(now)
        .not_valid_after(now.replace(year=2100))
        .public_key(own.public_key())
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("also.me")]), critical=False)
        .sign(Ed25519PrivateKey.from_private_bytes(mesh.ca_seed), None)
    )
    return certificate.public_bytes(Encoding.PEM).decode() + node_key(5).pem


def showing(pem: str, mesh: qmesh.MeshKeys, tmp_path: Path) -> Identity:
    """A member that shows another certificate than a member's."""
    identity = member(5, mesh)
    (tmp_path / "shown.pem").write_text(pem)
    for context in (identity.memberships[0].dialling, identity.listening):
        context.load_cert_chain(tmp_path / "shown.pem")
    return identity


@in_a_loop
async def test_a_certificate_of_the_right_authority_but_another_form_is_refused_by_both_sides(tmp_path: Path) -> None:
    odd = showing(signed_by_the_mesh(LAB), LAB, tmp_path)
    async with serving(member(1, LAB)) as (server, address):
        with pytest.raises((WireError, WorkerLost)):
            await qmesh.dial(address, odd)
        await until_dropped(server, protocol=1)
    async with serving(odd) as (_, address):
        with pytest.raises(WireError, match="not of QMesh's form"):
            await qmesh.dial(address, member(2, LAB))


@in_a_loop
async def test_what_is_changed_on_its_way_ends_the_connection_and_is_called_so() -> None:
    async with serving(member(1, LAB)) as (_, address), through_a_flaw(address) as (flawed, damage):
        connection = await qmesh.dial(flawed, member(2, LAB))
        damage.set()
        with contextlib.suppress(WorkerLost):
            await connection.send({"type": "status", "n": 1})
        with pytest.raises(WorkerLost):
            await connection.receive()
        connection.abort()
        await works(address, member(3, LAB))


@contextlib.asynccontextmanager
async def through_a_flaw(address: Address) -> AsyncIterator[tuple[Address, asyncio.Event]]:
    """A way to a listener that changes the last bit of all that passes once the event is set."""
    damage, pumps = asyncio.Event(), set[asyncio.Task[None]]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(qmesh.READ_BYTES):
                writer.write(data[:-1] + bytes([data[-1] ^ damage.is_set()]))
        writer.transport.abort()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection(*address)
        pumps.update(map(asyncio.create_task, (pump(reader, their_writer), pump(their_reader, writer))))

    server = await asyncio.start_server(on_connection, LOOPBACK, 0)
    async with server, asyncio.timeout(PATIENCE_S):
        yield server.sockets[0].getsockname(), damage
        await asyncio.gather(*pumps)


@in_a_loop
async def test_who_takes_no_answers_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", 0.2)
    # The system has the same limit, and on a busy machine may be the first to notice.
    monkeypatch.delattr("socket.TCP_USER_TIMEOUT", raising=False)
    ended: asyncio.Future[QMeshError] = asyncio.get_running_loop().create_future()

    async def answers_without_end(connection: Connection) -> None:
        for _ in range(64):  # more than the buffers between the two can hold
            connection.write({"type": "status_response", "ballast": "x" * 1_000_000})
        try:
            while await connection.receive() is not None:
                pass
        except QMeshError as error:
            ended.set_result(error)

    server = TcpServer(answers_without_end, member(1))
    try:
        async with connected(await server.start(LOOPBACK, 0)) as client, asyncio.timeout(PATIENCE_S):
            await client.send({"type": "status"})
            assert "took nothing for 0.2 s" in str(await ended)
    finally:
        await server.stop()


@in_a_loop
async def test_who_is_made_to_wait_may_leave() -> None:
    waited, left = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def waits(connection: Connection) -> None:
        await connection.pause(0.01)
        waited.set()
        try:
            await connection.pause(PATIENCE_S)
        except QMeshError as error:
            left.set_result(error)

    server = TcpServer(waits, member(1))
    async with connected(await server.start(LOOPBACK, 0)) as client, asyncio.timeout(PATIENCE_S):
        await waited.wait()
        client.send_no_more()
        assert isinstance(await left, WorkerLost)
    await server.stop()


# --- Those who do not speak TLS 1.3 ---


def client_hello(version: ssl.TLSVersion, name: str | None) -> bytes:
    """The first that a TLS client of this version says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


STRANGERS: dict[str, bytes] = {
    "the greeting in clear": qmesh.encode_frame(qmesh.greeting("hello", node_key(2).node_id)),
    "a browser": b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n",
    "noise": bytes(range(256)),
    "TLS 1.2": client_hello(ssl.TLSVersion.TLSv1_2, member(2, LAB).memberships[0].server_name),
    "TLS 1.3 without a name": client_hello(ssl.TLSVersion.TLSv1_3, None),
    "TLS 1.3 with another name": client_hello(ssl.TLSVersion.TLSv1_3, "bank.example"),
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS.keys())
@in_a_loop
async def test_a_stranger_gets_an_alert_at_most(data: bytes) -> None:
    async with serving(member(1, LAB)) as (server, address):
        answer = await said_to(address, data)
        assert len(answer) <= ALERT_BYTES
        assert answer[:1] in (b"", b"\x15")
        assert server.dropped.total() == 1
        await works(address, member(2, LAB))


@contextlib.asynccontextmanager
async def answering(answer: Callable[[bytes], bytes]) -> AsyncIterator[Address]:
    """A listener that says once to each who speaks to it what comes of that, and then waits for its end."""

    ended = asyncio.Event()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(answer(await reader.read(qmesh.READ_BYTES)))
            await reader.read()
        writer.transport.abort()
        ended.set()

    server = await asyncio.start_server(on_connection, LOOPBACK, 0)
    async with server, asyncio.timeout(PATIENCE_S):
        yield server.sockets[0].getsockname()
        await ended.wait()


def tls_1_2(hello: bytes) -> bytes:
    """What a listener that knows no later version has to say."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(hello)
    with contextlib.suppress(ssl.SSLError):
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    return outgoing.read()


LISTENERS: dict[str, Callable[[bytes], bytes]] = {
    "HTTP": lambda hello: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "SSH": lambda hello: b"SSH-2.0-OpenSSH_9.2\r\n",
    "noise": lambda hello: STRANGERS["noise"],
    "an echo": lambda hello: hello,
    "TLS 1.2": tls_1_2,
}


@pytest.mark.parametrize("answer", LISTENERS.values(), ids=LISTENERS.keys())
@in_a_loop
async def test_a_listener_that_does_not_speak_tls_1_3_is_called_so(answer: Callable[[bytes], bytes]) -> None:
    async with answering(answer) as address:
        with pytest.raises(WireError, match="does not speak TLS as QMesh does"):
            await qmesh.dial(address, member(2, LAB))


# --- What those may cost who are not trusted yet ---


@in_a_loop
async def test_a_chain_of_very_many_certificates_is_not_read_to_its_end(tmp_path: Path) -> None:
    own = signed_by_the_mesh(LAB)
    bomb = showing(own + 100 * own.partition("-----BEGIN PRIVATE")[0], LAB, tmp_path)
    async with serving(member(1, LAB)) as (server, address):
        with pytest.raises((WireError, WorkerLost)):
            await qmesh.dial(address, bomb)
        await until_dropped(server, protocol=1)
        await works(address, member(2, LAB))
    async with serving(bomb) as (_, address):
        with pytest.raises(WireError, match="bytes before it greeted"):
            await qmesh.dial(address, member(2, LAB))


@in_a_loop
async def test_who_has_shown_a_certificate_may_still_send_no_more_than_a_greeting() -> None:
    async with serving(member(1)) as (server, address), connected(address, greeted=False) as client:
        await client.send({"type": "hello", "agent": "x" * qmesh.MAX_HELLO_BYTES})
        assert "at most 4,096 are accepted" in (await client.receive())["message"]
        await client.closed()
        await until_dropped(server, protocol=1)


@in_a_loop
async def test_who_has_shown_a_certificate_may_not_send_without_end_either() -> None:
    async with serving(member(1)) as (server, address), connected(address, greeted=False) as client:
        with contextlib.suppress(OSError):
            await client.send_bytes(bytes(2 * qmesh.MAX_UNTRUSTED_BYTES))
        await until_dropped(server, protocol=1)


@in_a_loop
async def test_a_connection_that_breaks_is_told_from_one_that_ends() -> None:
    ends: asyncio.Queue[object] = asyncio.Queue()

    async def listens(connection: Connection) -> None:
        try:
            ends.put_nowait(await connection.receive())
        except QMeshError as error:
            ends.put_nowait(error)

    server = TcpServer(listens, member(1))
    address = await server.start(LOOPBACK, 0)
    async with asyncio.timeout(PATIENCE_S):
        connection = await qmesh.dial(address, member(2))
        await connection.close()
        assert await ends.get() is None
        with socket.socket() as sock:
            await breaks_off(sock, address)
        assert isinstance(await ends.get(), WorkerLost)
    await server.stop()


async def breaks_off(sock: socket.socket, address: Address) -> None:
    """Greet over this socket, and have it reset when it is closed."""
    connection, loop = Connection(), asyncio.get_running_loop()
    sock.setblocking(False)
    await loop.sock_connect(sock, address)
    identity = member(3)
    await loop.create_connection(lambda: connection, sock=sock)
    await connection.secure(identity, identity.memberships[0])
    await connection.send(qmesh.greeting("hello", identity.node_id))
    welcome = await connection.receive()
    assert welcome is not None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.abort()


@pytest.mark.parametrize(
    "said",
    [b"", STRANGERS["TLS 1.2"][:40], STRANGERS["TLS 1.3 without a name"][:-1]],
    ids=["nothing", "a part", "all but a byte"],
)
@in_a_loop
async def test_who_does_not_come_to_an_end_with_the_handshake_is_dropped_in_time(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKE_TIMEOUT_S", 0.2)
    async with serving(member(1)) as (server, address):
        assert await said_to(address, said) == b""
        assert server.dropped == {"slow": 1}


@in_a_loop
async def test_who_trickles_its_bytes_is_dropped_as_soon_as_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with serving(member(1)) as (server, address), asyncio.timeout(PATIENCE_S):
        _, writer = await asyncio.open_connection(*address)
        for byte in STRANGERS["TLS 1.3 without a name"]:
            writer.write(bytes([byte]))
            if server.dropped:
                break
            await asyncio.sleep(0.01)
        assert server.dropped == {"slow": 1}
        writer.close()


@pytest.mark.parametrize("limit", ["MAX_UNTRUSTED_PER_HOST", "MAX_UNTRUSTED"])
@in_a_loop
async def test_those_who_take_long_to_greet_make_room_for_those_who_come(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, limit, 2)
    async with serving(member(1)) as (server, address), contextlib.AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(connected(address, greeted=False)) for _ in range(2)]
        await works(address, member(2))
        await first.closed()
        assert server.dropped == {"shed": 1}
        assert (await second.greet())["type"] == "welcome"


@in_a_loop
async def test_who_is_trusted_makes_room_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_UNTRUSTED", 1)
    async with serving(member(1)) as (server, address), connected(address) as client:
        async with connected(address, greeted=False) as slow:
            await works(address, member(2))
            await slow.closed()
        await client.send({"type": "status", "n": 1})
        assert (await client.receive())["n"] == 1
        assert server.dropped == {"shed": 1}


@in_a_loop
async def test_strangers_get_no_more_handshakes_than_are_worth_it_and_hosts_of_members_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKES_BURST", 1.0)
    monkeypatch.setattr(qmesh, "HANDSHAKES_PER_S", 0.001)
    async with serving(member(1)) as (server, address):
        for number in range(3):
            await works(address, member(2 + number))
        assert await answer_to("127.0.0.2", address) == b""
        assert server.dropped == {"busy": 1}


@in_a_loop
async def test_hosts_have_connections_each_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "CONNECTIONS_BURST", 1.0)
    monkeypatch.setattr(qmesh, "is_loopback", lambda host: False)  # where all are one, each socket has its own
    async with serving(member(1)) as (server, address):
        await works(address, member(2))
        with pytest.raises(WorkerLost):
            await qmesh.dial(address, member(2))
        assert server.dropped == {"rate": 1}
        assert (await answer_to("127.0.0.2", address))[:1] == b"\x15"  # it was listened to


@in_a_loop
async def test_more_connections_than_can_be_dealt_with_wait_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "ACCEPTS_BURST", 1.0)
    monkeypatch.setattr(qmesh, "ACCEPTS_PER_S", 20.0)
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with serving(member(1)) as (server, address):
        await asyncio.gather(*(works(address, member(2 + number)) for number in range(7)))
        assert loop.time() - started >= 0.25
        assert not server.dropped


async def answer_to(host: str, address: Address) -> bytes:
    """What a stranger with this address of the machine hears when it asks for a handshake."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, address)
        await loop.sock_sendall(sock, STRANGERS["TLS 1.3 without a name"])
        with contextlib.suppress(ConnectionResetError):
            return await loop.sock_recv(sock, qmesh.READ_BYTES)
        return b""


# --- A key that is being replaced ---

TODAY = datetime.date(2030, 6, 15)
OLD = closed(2, until="2030-06-15")


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the date, in days from OLD's last one."""

    def set_to(days: int) -> None:
        monkeypatch.setattr(qmesh, "utc_today", lambda: TODAY + datetime.timedelta(days))

    set_to(0)
    return set_to


async def refused(address: Address, identity: Identity) -> None:
    with pytest.raises(WrongMesh):
        await qmesh.dial(address, identity)


PAIRS: list[tuple[str, Identity, Identity, Callable[[Address, Identity], Awaitable[None]]]] = [
    ("who has both serves the new", member(1, LAB, OLD), member(2, LAB), works),
    ("who has both serves the old", member(1, LAB, OLD), member(2, OFFICE), works),
    ("who has both dials the old", member(1, OFFICE), member(2, LAB, OLD), works),
    ("who has both dials the new", member(1, LAB), member(2, LAB, OLD), works),
    ("who has both dials who has both", member(1, LAB, OLD), member(2, LAB, OLD), works),
    ("a third is refused", member(1, LAB, OLD), member(2, closed(3)), refused),
]


@pytest.mark.parametrize(("server", "client", "outcome"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS])
@in_a_loop
async def test_while_a_key_is_replaced_members_have_both(
    server: Identity,
    client: Identity,
    outcome: Callable[[Address, Identity], Awaitable[None]],
    calendar: Callable[[int], None],
) -> None:
    async with serving(server) as (_, address):
        await outcome(address, client)


@in_a_loop
async def test_after_its_last_day_an_old_key_counts_on_neither_side(calendar: Callable[[int], None]) -> None:
    both = member(1, LAB, OLD)
    async with serving(both) as (_, address):
        await works(address, member(2, OFFICE))
        calendar(1)
        await refused(address, member(2, OFFICE))
        await works(address, member(3, LAB))
    async with serving(member(4, OFFICE)) as (_, address):
        await refused(address, both)


# --- A Python that cannot ---


@in_a_loop
async def test_a_tls_library_that_is_too_old_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "HAS_TLSv1_3", False)
    server = TcpServer(echo, member(1))
    for attempt in (lambda: qmesh.dial((LOOPBACK, 1), member(2)), lambda: server.start(LOOPBACK, 0)):
        with pytest.raises(MissingTls, match=f"{ssl.OPENSSL_VERSION} has no TLS 1.3") as caught:
            await attempt()
        assert "OpenSSL 1.1.1 or newer" in caught.value.remedy


@in_a_loop
async def test_a_tls_library_without_ed25519_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ssl.SSLError(1, "unsupported algorithm")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", fails)
    with pytest.raises(MissingTls, match=r"does not take Ed25519.*unsupported algorithm"):
        await TcpServer(echo, member(1)).start(LOOPBACK, 0)
