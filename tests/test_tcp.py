"""TCP shell: connections that greet, break the rules, and carry many requests at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import re
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import members
import pytest
from loop import PATIENCE_S, in_a_loop
from members import echo, member
from raw_client import RawClient, connected, frame

import qmesh
from qmesh import (
    LOOPBACK,
    Address,
    Connection,
    DeadlineExceeded,
    InvalidRequest,
    Job,
    Json,
    NodeId,
    QMeshError,
    Refused,
    Result,
    TcpServer,
    Token,
    UsageError,
    WireError,
    WorkerLink,
    WorkerLost,
)

SERVER, CLIENT = member(1), member(2)

# What is in a frame that breaks the protocol, and what its sender is told.
BAD_FRAMES = {
    "not JSON": (frame(b"{nonsense"), "not JSON"),
    "not UTF-8": (frame(b"\xff\xfe"), "not JSON"),
    "an empty frame": (frame(b""), "not JSON"),
    "deep nesting": (frame(b'{"type":"status","n":' + b"[" * 3000), "not JSON"),
    "a key that stands twice": (frame(b'{"type":"status","type":"status"}'), "not JSON"),
    "not a number": (frame(b'{"type":"status","n":NaN}'), "not JSON"),
    "a list": (frame(b'["status"]'), "not an object"),
    "a number": (frame(b"42"), "not an object"),
    "no type": (frame(b"{}"), "unknown type"),
    "an unknown type": (frame(b'{"type":"dance"}'), "unknown type.*dance"),
    "a type that is a list": (frame(b'{"type":["status"]}'), "unknown type"),
    "a type that is half a surrogate pair": (frame(b'{"type":"\\ud800"}'), "unknown type"),
}
MORE_FRAMES = {
    "nesting of the deepest": (
        frame(b'{"type":"status","n":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
        "not JSON",
    ),
    "one byte too many": (struct.pack(">I", qmesh.MAX_FRAME_BYTES + 1), "at most 4,194,304"),
    "all lengths can say": (b"\xff\xff\xff\xff", "at most 4,194,304"),
}


def forever() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def serving(
    handler: qmesh.Handler = echo,
) -> contextlib.AbstractAsyncContextManager[tuple[TcpServer, Address]]:
    return members.serving(SERVER, handler)


@contextlib.asynccontextmanager
async def dialled(address: Address) -> AsyncIterator[Connection]:
    connection = await qmesh.dial(address, CLIENT)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def linked(address: Address) -> AsyncIterator[WorkerLink]:
    link = WorkerLink(await qmesh.dial(address, CLIENT))
    try:
        yield link
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def saying(greeting: bytes, answer: bytes = b"", *, hangs_up: bool = False) -> AsyncIterator[Address]:
    """A listener that is no TcpServer: it says `greeting` to whoever comes, and `answer` to a prompt.

    hangs_up: whether it closes when it has said all, or hears the other side out.
    """
    writers: list[asyncio.StreamWriter] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(greeting)
        frames, has_more = qmesh.FrameReader(), bool(answer)
        while (has_more or not hangs_up) and (data := await reader.read(qmesh.READ_BYTES)):
            frames.feed(data)
            while (body := frames.read()) is not None:
                if body["type"] == "prompt" and has_more:
                    writer.write(answer)
                    has_more = False
        writer.close()

    server = await asyncio.start_server(on_connection, LOOPBACK, 0, ssl=SERVER.listening)
    async with server:
        try:
            yield server.sockets[0].getsockname()
        finally:
            for writer in writers:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def works(client: RawClient, n: int) -> None:
    await client.send({"type": "status", "n": n})
    assert (await client.receive())["n"] == n


# --- Greeting ---


@in_a_loop
async def test_both_sides_learn_who_the_other_is() -> None:
    met: asyncio.Queue[Connection] = asyncio.Queue()

    async def handler(connection: Connection) -> None:
        met.put_nowait(connection)
        await echo(connection)

    async with serving(handler) as (_, address), dialled(address) as ours:
        theirs = await met.get()
        assert (ours.peer_id, ours.address) == (str(SERVER.node_id), address)
        assert theirs.peer_id == str(CLIENT.node_id)
        assert ours.keys == theirs.keys == members.OPEN
        await ours.send({"type": "status", "n": 1})
        assert await ours.receive() == {"type": "status_response", "n": 1}


def greeting_of_version(version: object) -> Callable[[str, NodeId], Json]:
    def greeting(kind: str, node_id: NodeId) -> Json:
        return {"type": kind, "version": version, "node_id": str(node_id), "agent": "qmesh/9.9"}

    return greeting


@in_a_loop
async def test_what_a_server_sends_does_not_wait_until_what_it_sent_before_is_acknowledged() -> None:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    (sock,) = qmesh.bind_preferred(socket.SOCK_STREAM, LOOPBACK, 0, 0)
    async with await asyncio.start_server(on_connection, sock=sock), asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        assert await told
        assert not await reader.read()
        writer.close()
        await writer.wait_closed()


@in_a_loop
async def test_a_client_of_another_version_is_told_both_versions_and_closed() -> None:
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        await client.send(greeting_of_version(2)("hello", CLIENT.node_id))
        told = await client.receive()
        assert (told["type"], told["code"]) == ("inference_error", "invalid_request")
        assert "qmesh/9.9" in told["message"]
        assert "version 2" in told["message"]
        assert qmesh.AGENT in told["message"]
        await client.closed()


@in_a_loop
async def test_one_who_dials_a_server_of_another_version_learns_both_versions() -> None:
    async with saying(qmesh.encode_frame(greeting_of_version(2)("welcome", SERVER.node_id))) as address:
        with pytest.raises(WireError, match=r"qmesh/9\.9 and speaks version 2.*version 1"):
            await qmesh.dial(address, CLIENT)


@in_a_loop
async def test_one_who_is_turned_away_for_its_version_is_told_to_use_the_same_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as (_, address):
        monkeypatch.setattr(qmesh, "greeting", greeting_of_version(2))
        with pytest.raises(WireError, match="version 2") as caught:
            await qmesh.dial(address, CLIENT)
        assert "same file" in caught.value.remedy


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has one address of the loopback alone")
@in_a_loop
async def test_of_many_hosts_of_another_version_the_log_tells_of_one_at_a_time_and_of_each_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hello = greeting_of_version(2)("hello", CLIENT.node_id)
    hosts = [f"127.0.0.{number}" for number in (2, 2, 3, 4)]
    async with serving() as (server, address):
        for host in hosts:
            async with connected(address, greeted=False, identity=CLIENT, local_addr=(host, 0)) as client:
                await client.send(hello)
                await client.receive()
                await client.closed()
        assert server.dropped == {"protocol": len(hosts)}
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("127.0.0.2 was turned away: 127.0.0.2:")
    assert "version 2 of the protocol" in warning


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        ({"type": "status", "n": 1}, "a greeting is needed before status"),
        ({"type": "welcome", "version": 1, "node_id": str(CLIENT.node_id)}, "a greeting is needed before welcome"),
        ({"type": "hello", "version": 1}, "under another id than its certificate's"),
        ({"type": "hello", "version": 1, "node_id": str(CLIENT.node_id)[1:]}, "under another id"),
        ({"type": "hello", "version": 1, "node_id": str(CLIENT.node_id).upper()}, "under another id"),
        ({"type": "hello", "version": 1, "node_id": str(SERVER.node_id)}, "under another id"),
        ({"type": "hello", "version": 1, "node_id": 7}, "under another id"),
        ({"type": "hello", "node_id": str(CLIENT.node_id)}, "speaks version None"),
        ({"type": "hello", "version": "1", "node_id": str(CLIENT.node_id)}, "speaks version 1 "),
        ({"type": "hello", "version": [1], "node_id": str(CLIENT.node_id)}, "speaks version"),
    ],
)
@in_a_loop
async def test_one_who_does_not_greet_as_is_due_is_told_why_and_closed(greeting: Json, reason: str) -> None:
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        await client.send(greeting)
        assert reason in (await client.receive())["message"]
        await client.closed()


@in_a_loop
async def test_an_agent_with_half_a_surrogate_pair_is_turned_away_like_any_other() -> None:
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        await client.send_bytes(frame(b'{"type":"hello","version":2,"agent":"\\ud800"}'))
        assert "speaks version 2" in (await client.receive())["message"]
        await client.closed()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame of"),
        (frame(b'"welcome"'), "not an object"),
        (qmesh.encode_frame({"type": "status"}), "greets with status"),
        (qmesh.encode_frame({"type": "welcome", "version": 1}), "under another id"),
    ],
)
@in_a_loop
async def test_a_server_that_is_none_of_ours_is_called_so(said: bytes, reason: str) -> None:
    async with saying(said) as address:
        with pytest.raises(WireError, match=reason):
            await qmesh.dial(address, CLIENT)


@in_a_loop
async def test_a_server_that_closes_at_once_is_a_worker_lost() -> None:
    async with saying(b"", hangs_up=True) as address:
        with pytest.raises(WorkerLost):
            await qmesh.dial(address, CLIENT)


@in_a_loop
async def test_where_nobody_listens_the_worker_is_lost() -> None:
    with socket.socket() as held:  # bound, so that nobody else takes the port, and not listening
        held.bind((LOOPBACK, 0))
        host, port = held.getsockname()
        with pytest.raises(WorkerLost, match=f"{host}:{port} cannot be reached"):
            await qmesh.dial((host, port), CLIENT)


@in_a_loop
async def test_a_port_that_is_taken_is_named_to_who_wants_to_listen() -> None:
    async with serving() as (_, (host, port)):
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            await TcpServer(echo, SERVER).start(host, port)


# --- Silence ---


@in_a_loop
async def test_a_client_that_does_not_greet_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKE_TIMEOUT_S", 0.1)
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        await client.send_bytes(b"\x00\x00")  # a beginning is not enough
        await client.closed()


@in_a_loop
async def test_one_who_has_greeted_may_be_silent_for_longer_than_the_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKE_TIMEOUT_S", 0.5)
    async with serving() as (_, address), connected(address) as quiet:
        async with connected(address, greeted=False) as silent:
            await silent.closed()  # a whole handshake's time later
        await works(quiet, 1)


@in_a_loop
async def test_a_server_that_does_not_greet_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HANDSHAKE_TIMEOUT_S", 0.1)
    async with saying(b"") as address:
        with pytest.raises(WorkerLost, match=r"did not greet within 0\.1 s"):
            await qmesh.dial(address, CLIENT)


@in_a_loop
async def test_a_reader_that_takes_nothing_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", 0.2)
    outcome: asyncio.Future[None] = forever()

    async def flood(connection: Connection) -> None:
        try:
            for _ in range(64):  # more than the buffers between the two can hold
                await connection.send({"type": "status_response", "n": "x" * 1024 * 1024})
        except QMeshError as error:
            outcome.set_exception(error)
            raise
        outcome.set_result(None)

    async with serving(flood) as (_, address), connected(address):
        with pytest.raises(WorkerLost, match=r"took nothing for 0\.2 s"):
            await outcome


@in_a_loop
async def test_a_machine_that_is_switched_off_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create_connection(*_: object) -> None:
        await forever()

    monkeypatch.setattr(qmesh, "CONNECT_TIMEOUT_S", 0.01)
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
    with pytest.raises(WorkerLost, match=r"127\.0\.0\.1:7 did not answer within 0\.01 s"):
        await qmesh.dial((LOOPBACK, 7), CLIENT)


@in_a_loop
async def test_a_pause_lasts_until_its_time_is_over_or_the_other_side_has_gone() -> None:
    paused: asyncio.Queue[QMeshError | None] = asyncio.Queue()

    async def handler(connection: Connection) -> None:
        await connection.pause(0.001)
        paused.put_nowait(None)
        try:
            await connection.pause(PATIENCE_S)
        except QMeshError as error:
            paused.put_nowait(error)

    async with serving(handler) as (_, address), asyncio.timeout(PATIENCE_S):
        async with connected(address):
            assert await paused.get() is None
        assert isinstance(await paused.get(), WorkerLost)


@in_a_loop
async def test_a_server_that_can_open_no_more_files_says_so_and_goes_on_when_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, failures = asyncio.get_running_loop(), [OSError(errno.EMFILE, "Too many open files")]
    sock_accept = loop.sock_accept

    async def accept(sock: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return await sock_accept(sock)

    monkeypatch.setattr(loop, "sock_accept", accept)
    monkeypatch.setattr(qmesh, "ACCEPT_RETRY_S", 0.0)
    async with serving() as (_, address):
        assert await qmesh.greeted_by(address, CLIENT) == SERVER.node_id
    assert "no connection can be accepted: [Errno 24] Too many open files" in caplog.text
    assert await qmesh.greeted_by(address, CLIENT) is None


# --- Broken rules ---


async def is_told_and_closed(bad: RawClient, reason: str) -> None:
    told = await bad.receive()
    assert (told["type"], told["code"]) == ("inference_error", "invalid_request")
    assert "request_id" not in told
    assert re.search(reason, told["message"])
    await bad.closed()


@pytest.mark.parametrize("name", [*BAD_FRAMES, *MORE_FRAMES])
@in_a_loop
async def test_who_breaks_the_protocol_is_told_why_and_closed_and_no_other_notices(name: str) -> None:
    data, reason = (BAD_FRAMES | MORE_FRAMES)[name]
    async with serving() as (_, address), connected(address) as good, connected(address) as bad:
        await works(good, 1)
        await bad.send_bytes(data)
        await is_told_and_closed(bad, reason)
        await works(good, 2)


@pytest.mark.parametrize("name", BAD_FRAMES)
@in_a_loop
async def test_a_bad_frame_in_place_of_a_greeting_is_answered_the_same(name: str) -> None:
    data, reason = BAD_FRAMES[name]
    async with serving() as (_, address), connected(address) as good:
        async with connected(address, greeted=False) as bad:
            await bad.send_bytes(data)
            await is_told_and_closed(bad, reason)
        await works(good, 1)


@in_a_loop
async def test_before_the_welcome_a_frame_has_at_most_four_kib() -> None:
    async with serving() as (_, address), connected(address, greeted=False) as bad:
        await bad.send_bytes(struct.pack(">I", 4 * 1024 + 1))
        await is_told_and_closed(bad, "4,097 bytes, where at most 4,096")


@in_a_loop
async def test_after_the_welcome_a_frame_may_be_larger() -> None:
    async with serving() as (_, address), connected(address) as client:
        await client.send({"type": "status", "n": 1, "more": "x" * 1024 * 1024})
        assert (await client.receive())["n"] == 1


@in_a_loop
async def test_a_frame_that_is_cut_off_ends_its_connection_and_no_other_notices() -> None:
    async with serving() as (_, address), connected(address) as good, connected(address) as bad:
        await bad.send_bytes(qmesh.encode_frame({"type": "status", "n": 1})[:-1])
        bad.send_no_more()
        await bad.closed()
        await works(good, 1)


@in_a_loop
async def test_a_client_that_vanishes_in_the_middle_of_a_frame_ends_only_its_own_connection() -> None:
    ended = asyncio.Event()

    async def handler(connection: Connection) -> None:
        try:
            await echo(connection)
        finally:
            ended.set()

    async with serving(handler) as (_, address):
        async with connected(address) as bad:
            await works(bad, 1)
            await bad.send_bytes(b"\x00\x00\x00\x20{")
            bad.abort()
            async with asyncio.timeout(PATIENCE_S):
                await ended.wait()
        async with connected(address) as good:
            await works(good, 1)


@in_a_loop
async def test_frames_that_are_written_together_come_in_order_and_none_of_them_where_one_cannot_be_said() -> None:
    async with serving() as (_, address), dialled(address) as ours:
        with pytest.raises(InvalidRequest, match="JSON cannot carry"):
            ours.write({"type": "status", "n": 0}, {"type": "status", "n": math.nan})
        ours.write({"type": "status", "n": 1}, {"type": "status", "n": 2})
        assert [await ours.receive() for _ in range(2)] == [{"type": "status_response", "n": n} for n in (1, 2)]


@in_a_loop
async def test_a_sender_of_single_bytes_is_understood() -> None:
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        await client.send_byte_by_byte(qmesh.encode_frame(qmesh.greeting("hello", CLIENT.node_id)))
        assert (await client.receive())["type"] == "welcome"
        await client.send_byte_by_byte(qmesh.encode_frame({"type": "status", "n": 1}))
        assert (await client.receive())["n"] == 1


@in_a_loop
async def test_frames_that_come_with_the_greeting_are_not_lost() -> None:
    async with serving() as (_, address), connected(address, greeted=False, identity=CLIENT) as client:
        status = qmesh.encode_frame({"type": "status", "n": 1})
        await client.send_bytes(qmesh.encode_frame(qmesh.greeting("hello", CLIENT.node_id)) + status + status)
        assert [(await client.receive())["type"] for _ in range(3)] == ["welcome", *["status_response"] * 2]


@in_a_loop
async def test_a_fault_of_the_handler_is_logged_and_ends_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def faulty(connection: Connection) -> None:
        body = await connection.receive()
        if body is not None and body["n"] == 0:
            raise ZeroDivisionError
        await connection.send({"type": "status_response", "n": 1})

    async with serving(faulty) as (_, address), connected(address) as good:
        async with connected(address) as bad:
            await bad.send({"type": "status", "n": 0})
            await bad.closed()
        await works(good, 1)
    assert "TcpServer" in caplog.text
    assert " failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@in_a_loop
async def test_a_server_that_stops_ends_every_connection_and_takes_no_more() -> None:
    async with serving() as (server, address), connected(address) as one, connected(address) as other:
        await server.stop()
        await one.closed()
        await other.closed()
        with pytest.raises(WorkerLost):
            await qmesh.dial(address, CLIENT)


# --- Limits ---


@pytest.mark.parametrize("limit", ["MAX_CONNECTIONS_PER_HOST", "MAX_CONNECTIONS"])
@in_a_loop
async def test_there_is_a_limit_to_connections_and_who_leaves_makes_room(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, limit, 2)
    async with serving() as (server, address), connected(address) as staying:
        async with connected(address) as leaving:
            with pytest.raises(qmesh.Refused, match="too many connections"):
                await qmesh.dial(address, CLIENT)
            assert server.dropped["full"] == 1
            await works(staying, 1)
            leaving.send_no_more()
            await leaving.closed()
        async with dialled_at_last(address) as late:
            assert late.peer_id == str(SERVER.node_id)


@contextlib.asynccontextmanager
async def dialled_at_last(address: Address) -> AsyncIterator[Connection]:
    """Dial until it succeeds: the server may be a moment behind."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(WorkerLost, Refused):
                async with dialled(address) as connection:
                    yield connection
                    return


# --- Many requests on one connection ---


def job(request_id: str, *, timeout_s: float = 60.0) -> Job:
    return Job(request_id, prompt="Why?", timeout_s=timeout_s)


def token(request_id: str, seq: int, text: str) -> Json:
    return Token(seq, (seq,), text).to_json(request_id)


def result(request_id: str, text: str = "") -> Json:
    return Result(text, "stop", {}, {}, "tiny", str(SERVER.node_id)).to_json(request_id)


async def text_of(link: WorkerLink, job: Job) -> str:
    """The streamed text of an answer, with a bar before its end."""
    said = [item async for item in link.run(job)]
    assert isinstance(said[-1], Result)
    return "".join(item.text for item in said if isinstance(item, Token)) + "|" + said[-1].text


async def prompts(connection: Connection, count: int) -> list[str]:
    """The ids of the next requests."""
    bodies = [await connection.receive() for _ in range(count)]
    assert all(body is not None and body["type"] == "prompt" for body in bodies), bodies
    return [str(body["request_id"]) for body in bodies if body is not None]


def scripted(script: Callable[[Connection], Awaitable[None]]) -> qmesh.Handler:
    """A worker that does what is written, and then only listens."""

    async def handler(connection: Connection) -> None:
        await script(connection)
        while await connection.receive() is not None:
            pass

    return handler


@in_a_loop
async def test_answers_that_come_interleaved_and_out_of_order_reach_those_who_asked() -> None:
    connections: list[Connection] = []

    async def script(connection: Connection) -> None:
        connections.append(connection)
        ids = await prompts(connection, 20)
        for seq in range(3):
            for request_id in ids:
                await connection.send(token(request_id, seq, f"{request_id}{seq} "))
        for request_id in reversed(ids):
            await connection.send(result(request_id, request_id))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        asked = [f"r{number}" for number in range(20)]
        texts = await asyncio.gather(*(text_of(link, job(request_id)) for request_id in asked))
        assert texts == [f"{r}0 {r}1 {r}2 |{r}" for r in asked]
        assert len(connections) == 1


@in_a_loop
async def test_answers_to_nobodys_request_are_passed_over() -> None:
    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        for body in (token("stranger", 0, "no"), result("stranger"), {"type": "inference_queued"}):
            await connection.send(body)
        await connection.send(result(request_id, "yes"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        assert await text_of(link, job("r")) == "|yes"


@in_a_loop
async def test_a_place_in_the_queue_is_told() -> None:
    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send({"type": "inference_queued", "request_id": request_id, "position": 3, "wait_s": 2})
        await connection.send(result(request_id))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        said = [item async for item in link.run(job("r"))]
        assert said[0] == qmesh.Queued(3, 2.0)


@in_a_loop
async def test_a_refused_request_raises_what_the_worker_said_and_the_others_go_on() -> None:
    async def script(connection: Connection) -> None:
        one, other = await prompts(connection, 2)
        await connection.send(qmesh.error_frame(one, Refused("the queue is full")))
        await connection.send(result(other, "fine"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        texts = await asyncio.gather(*(text_of(link, job(r)) for r in "ab"), return_exceptions=True)
        assert isinstance(texts[0], Refused)
        assert str(texts[0]) == "the queue is full"
        assert texts[1] == "|fine"


@in_a_loop
async def test_a_request_id_that_is_under_way_cannot_be_used_again() -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        await connection.send(token("r", 0, "first "))
        while body := await connection.receive():
            if body["type"] == "status":
                await connection.send({"type": "status_response", "request_id": body["request_id"]})
                await connection.send(result("r", "end"))
            else:  # as a worker does
                await connection.send(qmesh.error_frame("r", InvalidRequest("the request_id r is in use already")))

    async with (
        serving(scripted(script)) as (_, address),
        linked(address) as link,
        contextlib.aclosing(link.run(job("r", timeout_s=1))) as first,
    ):
        assert await anext(first) == Token(0, (0,), "first ")
        with pytest.raises(QMeshError):
            await text_of(link, job("r", timeout_s=1))
        await link.status()
        said = await anext(first)
        assert isinstance(said, Result)
        assert said.text == "end"


@pytest.mark.parametrize("whole", [True, False])
@in_a_loop
async def test_what_came_before_a_connection_closed_is_heard_also_by_who_reads_slowly(whole: bool) -> None:
    async def handler(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        for seq in range(3):
            connection.write(token(request_id, seq, f"{seq} "))
        if whole:
            connection.write(result(request_id, "end"))
        await connection.drain()

    async with (
        serving(handler) as (_, address),
        linked(address) as link,
        contextlib.aclosing(link.run(job("r"))) as answer,
    ):
        said: list[Any] = [await anext(answer)]
        while link.alive:  # noqa: ASYNC110 - its end makes no event
            await asyncio.sleep(0)
        said += [await anext(answer), await anext(answer)]
        assert [item.text for item in said] == ["0 ", "1 ", "2 "]
        if whole:
            last = await anext(answer)
            assert isinstance(last, Result)
            assert last.text == "end"
            with pytest.raises(StopAsyncIteration):
                await anext(answer)
        else:
            with pytest.raises(WorkerLost):
                await anext(answer)


@pytest.mark.parametrize("fault", ["silence", "nonsense"])
@in_a_loop
async def test_a_worker_that_is_given_up_is_told_to_stop(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(qmesh, "DEADLINE_GRACE_S", 0.0)
    told: asyncio.Future[Json | None] = asyncio.get_running_loop().create_future()

    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        if fault == "nonsense":
            await connection.send({"type": "inference_token", "request_id": request_id, "seq": "first"})
        told.set_result(await connection.receive())

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        with pytest.raises(QMeshError):
            await text_of(link, job("r", timeout_s=1 if fault == "silence" else 60))
        assert await told == {"type": "cancel", "request_id": "r"}


@in_a_loop
async def test_when_the_connection_is_lost_all_who_wait_hear_of_it() -> None:
    async def lose(connection: Connection) -> None:
        await prompts(connection, 3)

    async with serving(lose) as (_, address), linked(address) as link:
        lost = await asyncio.gather(*(text_of(link, job(r)) for r in "abc"), return_exceptions=True)
        assert [type(error) for error in lost] == [WorkerLost] * 3
        assert not link.alive
        with pytest.raises(WorkerLost, match="is closed"):
            await text_of(link, job("d"))


@in_a_loop
async def test_a_link_that_is_closed_here_ends_what_waits_on_it() -> None:
    asked = asyncio.Event()

    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        asked.set()

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        waiting = asyncio.create_task(text_of(link, job("r")))
        await asked.wait()
        await link.close()
        with pytest.raises(WorkerLost):
            await waiting


@in_a_loop
async def test_why_a_worker_closed_is_told_to_who_waits() -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        raise WireError("a message of an unknown type")

    async with serving(script) as (_, address), linked(address) as link:
        with pytest.raises(QMeshError, match="a message of an unknown type"):
            await text_of(link, job("r"))


@in_a_loop
async def test_who_leaves_an_answer_early_cancels_it() -> None:
    cancelled: asyncio.Future[Json | None] = asyncio.get_running_loop().create_future()

    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send(token(request_id, 0, "a"))
        cancelled.set_result(await connection.receive())

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        async with contextlib.aclosing(link.run(job("r"))) as answer:
            assert await anext(answer) == Token(0, (0,), "a")
        assert await cancelled == {"type": "cancel", "request_id": "r"}
        assert link.alive


@in_a_loop
async def test_a_worker_that_is_silent_is_given_up_and_all_that_is_asked_of_it() -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 2)
        await connection.send(token("r", 0, "a"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        patient = asyncio.create_task(text_of(link, job("patient")))
        answer = link.run(job("r"), stall_s=0.2)
        assert await anext(answer) == Token(0, (0,), "a")
        with pytest.raises(WorkerLost, match=r"was silent for 0\.2 s") as caught:
            await anext(answer)
        assert "send the request again" in caught.value.remedy
        with pytest.raises(WorkerLost):
            await patient
        assert not link.alive


@in_a_loop
async def test_signs_of_life_are_waited_for_and_never_too_many() -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        for _ in range(2 * qmesh.MAX_OTHER_FRAMES):
            await connection.send({"type": "inference_alive", "request_id": "r"})
        await connection.send(result("r", "whole"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        assert await text_of(link, replace(job("r"), params=qmesh.Sampling(max_tokens=1))) == "|whole"


@in_a_loop
async def test_a_worker_that_says_more_than_it_was_asked_for_is_left() -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        for position in range(qmesh.MAX_OTHER_FRAMES + 3):
            await connection.send({"type": "inference_queued", "request_id": "r", "position": position, "wait_s": 1})

    async with serving(scripted(script)) as (_, address), linked(address) as link, asyncio.timeout(PATIENCE_S):
        answer = link.run(replace(job("r"), params=qmesh.Sampling(max_tokens=1)))
        await anext(answer)
        while True:
            await asyncio.sleep(0)  # nobody reads what it says
            if not link.alive:
                break
        with pytest.raises(WireError, match="sends more than it was asked for"):
            _ = [item async for item in answer]


@in_a_loop
async def test_a_client_that_slept_blames_nobody_for_it() -> None:
    asleep = asyncio.Event()

    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        await asleep.wait()
        await connection.send(result("r", "whole"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        asking = asyncio.create_task(anext(link.run(job("r"), stall_s=1.0)))
        await asyncio.sleep(0.1)  # it waits
        time.sleep(1.5)  # noqa: ASYNC251  the whole process is stopped, as by SIGSTOP or a closed lid
        asleep.set()
        said = await asking
        assert isinstance(said, Result)


@pytest.mark.parametrize("end", [result("r"), qmesh.error_frame("r", InvalidRequest("no"))])
@in_a_loop
async def test_an_answer_that_has_ended_is_not_cancelled(end: Json) -> None:
    after: asyncio.Future[Json | None] = asyncio.get_running_loop().create_future()

    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        await connection.send(end)
        after.set_result(await connection.receive())

    async with serving(scripted(script)) as (_, address):
        async with linked(address) as link:
            with contextlib.suppress(InvalidRequest):
                await text_of(link, job("r"))
        assert await after is None


@in_a_loop
async def test_a_worker_that_is_silent_to_the_end_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "DEADLINE_GRACE_S", 0.1)

    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send(token(request_id, 0, "a"))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        started = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await text_of(link, job("r", timeout_s=0.2))
        assert 0.3 <= asyncio.get_running_loop().time() - started < 30


@in_a_loop
async def test_a_worker_that_tells_of_the_deadline_itself_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "DEADLINE_GRACE_S", 30.0)

    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send(qmesh.error_frame(request_id, DeadlineExceeded("not finished within 0.2 s")))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.2 s"):
            await text_of(link, job("r", timeout_s=0.2))


@in_a_loop
async def test_a_job_that_is_larger_than_a_frame_may_be_is_not_sent() -> None:
    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send(result(request_id, request_id))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        with pytest.raises(InvalidRequest, match="at most 4,194,304"):
            await text_of(link, Job("large", prompt="x" * qmesh.MAX_FRAME_BYTES))
        assert await text_of(link, job("small")) == "|small"


# --- Status ---


@in_a_loop
async def test_status_and_answers_share_a_connection() -> None:
    async def script(connection: Connection) -> None:
        (request_id,) = await prompts(connection, 1)
        await connection.send(token(request_id, 0, "a"))
        asked = await connection.receive()
        assert asked is not None
        await connection.send({"type": "status_response", "request_id": asked["request_id"], "n": 5})
        await connection.send(result(request_id))

    async with (
        serving(scripted(script)) as (_, address),
        linked(address) as link,
        contextlib.aclosing(link.run(job("r"))) as answer,
    ):
        await anext(answer)
        assert (await link.status())["n"] == 5
        assert isinstance(await anext(answer), Result)


@in_a_loop
async def test_a_worker_that_gives_no_status_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "STATUS_TIMEOUT_S", 0.1)

    async def silence(connection: Connection) -> None:
        await forever()

    async with serving(silence) as (_, address), linked(address) as link:
        with pytest.raises(WorkerLost, match=r"gave no status in 0\.1 s"):
            await link.status()


@in_a_loop
async def test_another_frame_in_place_of_a_status_is_an_error() -> None:
    async def script(connection: Connection) -> None:
        body = await connection.receive()
        assert body is not None
        await connection.send(result(body["request_id"]))

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        with pytest.raises(WireError, match="inference_result where status_response was expected"):
            await link.status()


# --- Answers that make no sense ---

ENDLESS = 10**400  # whole numbers of JSON have no bound


@pytest.mark.parametrize(
    "body",
    [
        {"type": "inference_token"},
        {"type": "inference_token", "seq": 0, "tokens": [1]},
        {"type": "inference_token", "seq": "0", "tokens": [1], "text": "a"},
        {"type": "inference_token", "seq": 0, "tokens": 1, "text": "a"},
        {"type": "inference_token", "seq": 0, "tokens": [1], "text": ["a"]},
        {"type": "inference_result"},
        {"type": "inference_result", "text": "a", "finish_reason": "stop", "usage": [], "timings": {}},
        {**result("r"), "model": None},
        {**result("r"), "timings": {"queue_ms": ENDLESS}},
        {"type": "inference_queued"},
        {"type": "inference_queued", "position": "first", "wait_s": 1},
        {"type": "inference_queued", "position": 1, "wait_s": ENDLESS},
        {"type": "status_response"},
        {"type": "hello"},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
@in_a_loop
async def test_an_answer_that_makes_no_sense_is_a_wire_error(body: Json) -> None:
    async def script(connection: Connection) -> None:
        await prompts(connection, 1)
        await connection.send({**body, "request_id": "r"})

    async with serving(scripted(script)) as (_, address), linked(address) as link:
        with pytest.raises(WireError):
            await text_of(link, job("r"))


@pytest.mark.parametrize("name", [*BAD_FRAMES, *MORE_FRAMES])
@in_a_loop
async def test_a_worker_that_breaks_the_protocol_is_left_and_all_who_wait_hear_why(name: str) -> None:
    data, reason = (BAD_FRAMES | MORE_FRAMES)[name]
    welcome = qmesh.encode_frame(qmesh.greeting("welcome", SERVER.node_id))
    async with saying(welcome, data) as address, linked(address) as link:
        lost = await asyncio.gather(*(text_of(link, job(r)) for r in "ab"), return_exceptions=True)
        assert [bool(re.search(reason, str(error))) for error in lost] == [True, True], lost
        assert isinstance(lost[0], QMeshError)
        assert not link.alive


@in_a_loop
async def test_a_worker_that_dies_in_the_middle_of_a_frame_is_left() -> None:
    welcome = qmesh.encode_frame(qmesh.greeting("welcome", SERVER.node_id))
    async with saying(welcome, b"\x00\x00\x00\x20{", hangs_up=True) as address, linked(address) as link:
        with pytest.raises(QMeshError, match="closed in the middle of a message"):
            await text_of(link, job("r"))
