"""HTTP/1.1 as it is read, without input or output, and a server on real sockets with bad clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import pytest
from http_client import HEAD, HttpPeer, connected, fetch, until
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import PATIENCE_S, in_a_loop

import qmesh
from qmesh import LOOPBACK, HttpError, HttpReader, HttpRequest, HttpResponse, HttpServer

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)
SOON_S = 0.15  # a limit that tests wait for
ROUNDS = 3000  # of damaged requests


@pytest.fixture(autouse=True)
def no_faults(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client does is no fault of the program; tests of faults clear the log."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


# --- Reading, without input or output ---


def read(*pieces: bytes) -> list[HttpRequest | int]:
    """The requests in these pieces; last the status of what is wrong, if anything is."""
    reader, found = HttpReader(), list[HttpRequest | int]()
    try:
        for piece in pieces:
            reader.feed(piece)
            while (request := reader.request()) is not None:
                found.append(request)
    except HttpError as error:
        found.append(error.status)
    return found


def one(data: bytes) -> HttpRequest:
    (request,) = read(data)
    assert isinstance(request, HttpRequest)
    return request


def get(target: str = "/", *headers: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")


def post(*headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1") + body


def chunked(body: bytes) -> bytes:
    return post("Transfer-Encoding: chunked", body=body)


def test_a_request_is_read() -> None:
    request = one(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: a:80\r\nX-One:  two \t\r\nContent-Length: 3\r\n\r\nabc")
    assert request == HttpRequest(
        "POST", "/v1/x", {"host": "a:80", "x-one": "two", "content-length": "3"}, True, b"abc"
    )


def test_several_requests_in_one_piece_are_read_one_after_the_other() -> None:
    found = read(get("/1") + post("Content-Length: 2", body=b"ab") + chunked(b"1\r\nc\r\n0\r\n\r\n") + get("/2"))
    assert [(r.path, r.body) for r in found if isinstance(r, HttpRequest)] == [
        ("/1", b""),
        ("/", b"ab"),
        ("/", b"c"),
        ("/2", b""),
    ]


def test_empty_lines_before_a_request_are_passed_over() -> None:
    assert one(b"\r\n\r\n" + get("/x")).path == "/x"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("options", [None, "keep-alive", "close", "Upgrade, Close"])
def test_whether_a_connection_is_kept_is_told_by_the_version_and_the_header(version: str, options: str | None) -> None:
    line = f"Connection: {options}\r\n" if options else ""
    request = one(f"GET / HTTP/{version}\r\nHost: a\r\n{line}\r\n".encode())
    assert request.is_1_1 == (version == "1.1")
    assert request.keeps_alive == (version == "1.1" and options in (None, "keep-alive"))


def test_a_request_of_http_1_0_needs_no_host() -> None:
    assert one(b"GET / HTTP/1.0\r\n\r\n").headers == {}


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("/", "/", "a"),
        ("/?", "/", "a"),
        ("/a//b/../c", "/a//b/../c", "a"),
        ("/%2e%2E/%2Fx", "/..//x", "a"),
        ("/%00%0d%0a", "/\0\r\n", "a"),
        ("/%C3%A4%FF%zz", "/ä\ufffd%zz", "a"),
        ("/a:b;c=d", "/a:b;c=d", "a"),
        ("/http://b/", "/http://b/", "a"),
        ("http://b:8080/x?y", "/x", "b:8080"),
        ("HTTPS://b", "/", "b"),
        ("http://b?x", "/", "b"),
        ("http://[::1/x", "/x", "[::1"),
    ],
)
def test_a_target_is_a_path_or_a_url_whose_host_counts(target: str, path: str, host: str) -> None:
    request = one(get(target))
    assert (request.path, request.headers["host"]) == (path, host)


@pytest.mark.parametrize(
    "target",
    ["//b/x", "*", "b:443", "x", "?x", "", "ftp://b/x", "foo:/x", "http:///x", "http:/x", "http://b//x", "/#x"],
)
def test_a_target_of_another_form_is_refused(target: str) -> None:
    assert read(get(target)) == [400]


@pytest.mark.parametrize(
    "line",
    [
        b"GET /",
        b"GET / HTTP/2.0",
        b"GET / HTTP/1.2",
        b"GET / http/1.1",
        b"GET / HTTP/1.1 ",
        b" GET / HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET /\tHTTP/1.1",
        b"GET / x HTTP/1.1",
        b"G(T / HTTP/1.1",
        b"GET /\xe4 HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01",
        b"",
    ],
)
def test_another_first_line_is_refused(line: bytes) -> None:
    assert read(b"x" * (not line) + line + b"\r\nHost: a\r\n\r\n") == [400]


@pytest.mark.parametrize(
    "line",
    [
        b"Name : x",
        b" folded",
        b"\tfolded",
        b": x",
        b"Name",
        b"Na me: x",
        b"Name: a\nb",
        b"Name: a\rb",
        b"Name: a\x00b",
        b"Name: a\x7fb",
        b"Name\xe4: a",
        b"Host: b",
        b"host: a",
    ],
)
def test_a_header_line_that_two_programs_might_read_differently_is_refused(line: bytes) -> None:
    assert read(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n") == [400]


def test_a_request_of_http_1_1_without_a_host_is_refused() -> None:
    assert read(b"GET / HTTP/1.1\r\n\r\n") == [400]


def test_lines_that_end_in_a_bare_line_feed_end_no_head() -> None:
    assert read(b"GET / HTTP/1.1\nHost: a\n\n") == []
    assert read(b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n") == [400]


def test_headers_that_come_twice_are_joined() -> None:
    assert one(get("/", "A: 1", "a:2", "B:")).headers == {"host": "a", "a": "1, 2", "b": ""}


@pytest.mark.parametrize(
    "length", ["", "+5", "-5", "0x5", "5.0", "5 5", "5,5", "5, 5", "٥", "5_0", "1e1", "five", "9" * 16, "9" * 5000]
)
def test_a_length_that_is_no_plain_number_is_refused(length: str) -> None:
    data = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + length.encode() + b"\r\n\r\nabcde"
    assert read(data) == [400]


def test_a_length_that_is_given_twice_is_refused() -> None:
    assert read(post("Content-Length: 5", "Content-Length: 5", body=b"abcde")) == [400]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Transfer-Encoding: chunked", "Content-Length: 3"], 400),
        (["Content-Length: 3", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: gzip, chunked"], 501),
        (["Transfer-Encoding: chunked, identity"], 501),
        (["Transfer-Encoding: identity"], 501),
        (["Transfer-Encoding: \x0bchunked"], 400),
        (["Transfer-Encoding : chunked"], 400),
        (["Transfer-Encoding: xchunked"], 501),
        (["Transfer-Encoding:"], 501),
    ],
)
def test_a_body_whose_end_two_programs_might_see_elsewhere_is_refused(headers: list[str], status: int) -> None:
    assert read(post(*headers, body=b"0\r\n\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n")) == [status]


def test_chunks_in_http_1_0_are_refused() -> None:
    assert read(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") == [400]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"0\r\n\r\n", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
        (b"00000003\r\nabc\r\n1\r\n\n\r\n0\r\n\r\n", b"abc\n"),
        (b'a;x=y;z="q"\r\n0123456789\r\n1 ;x\r\nb\r\n000\r\n\r\n', b"0123456789b"),
        (b"1\r\na\r\n0;last\r\nX-Sum: 1\r\nExpires: never\r\n\r\n", b"a"),
        (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    ],
)
def test_a_body_in_chunks_is_put_together(body: bytes, expected: bytes) -> None:
    request, after = read(chunked(body) + get("/next"))
    assert isinstance(request, HttpRequest)
    assert isinstance(after, HttpRequest)
    assert (request.body, after.path) == (expected, "/next")


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1_0\r\n",
        b"\r\n",
        b" 1\r\na\r\n",
        b"1 \r\na\r\n",
        b"\n1\r\na\r\n",
        b"1\n\r\na\r\n",
        b"1;\n\r\na\r\n",
        b"1;a\x00\r\na\r\n",
        b"000000001\r\na\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n\n",
        b"0\r\nbare\nline: x\r\n\r\n",
        b"0\r\n folded\r\n\r\n",
        b"0\r\nX: 1\n\nGET / HTTP/1.1\r\n\r\n",
        b"1" * 2000,
        b"1;" + b"x" * 2000,
    ],
)
def test_chunks_that_are_not_as_they_should_be_are_refused(body: bytes) -> None:
    assert read(chunked(body)) == [400]


def test_a_head_may_be_as_long_as_its_limit_and_no_longer() -> None:
    most = qmesh.MAX_HTTP_HEAD_BYTES
    fitting = get("/", "X: " + "x" * (most - len(get("/", "X: "))))
    assert len(fitting) == most
    assert one(fitting).path == "/"
    assert read(fitting.replace(b"X: ", b"X: x")) == [431]
    assert read(b"x" * (most - 1)) == []
    assert read(b"x" * most) == [431]


def test_a_body_may_be_as_long_as_its_limit_and_no_longer() -> None:
    most = qmesh.MAX_HTTP_BODY_BYTES
    body = bytes(most)
    assert one(post(f"Content-Length: {most}", body=body)).body == body
    assert read(post(f"Content-Length: {most + 1}")) == [413]
    assert one(chunked(b"1\r\nx\r\n%x\r\n%b\r\n0\r\n\r\n" % (most - 1, body[1:]))).body == b"x" + body[1:]
    assert read(chunked(b"1\r\nx\r\n%x\r\n" % most)) == [413]
    assert read(chunked(b"ffffffff\r\n")) == [413]


def test_a_chunk_s_line_may_be_as_long_as_its_limit_and_no_longer() -> None:
    most = qmesh.MAX_HTTP_CHUNK_LINE_BYTES
    line = b"1;" + b"x" * (most - 4) + b"\r\n"
    assert one(chunked(line + b"a\r\n0\r\n\r\n")).body == b"a"
    assert read(chunked(b"1;" + line[1:] + b"a\r\n0\r\n\r\n")) == [400]


@pytest.mark.parametrize("filler", [b" ", b"\t ", b"a", b"\xe4", b","])
def test_a_long_header_line_that_ends_badly_is_refused_without_long_thought(filler: bytes) -> None:
    line = b"X:" + (filler * qmesh.MAX_HTTP_HEAD_BYTES)[: qmesh.MAX_HTTP_HEAD_BYTES - 100] + b"\x00"
    began = time.process_time()
    assert read(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n") == [400]
    assert time.process_time() - began < 1


def test_a_body_of_the_smallest_chunks_is_read_in_time_that_grows_with_its_length() -> None:
    count = 200_000
    began = time.process_time()
    assert one(chunked(b"1\r\na\r\n" * count + b"0\r\n\r\n")).body == b"a" * count
    assert time.process_time() - began < 5


def test_what_is_left_of_a_request_is_told() -> None:
    reader = HttpReader()
    assert not reader.begun
    reader.feed(b"GET / HT")
    assert (reader.begun, reader.request()) == (True, None)
    reader.feed(b"TP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
    assert (reader.begun, reader.request()) == (True, None)
    reader.feed(b"bGET")
    assert reader.request() is not None
    assert (reader.begun, reader.ahead) == (True, 3)


VALID = [
    get("/v1/models/x%20y?z=1", "Authorization: Bearer abcdefgh", "Connection: keep-alive"),
    post("Content-Length: 11", "Content-Type: application/json", body=b'{"a": true}'),
    post("Expect: 100-continue", "Content-Length: 0"),
    chunked(b"4;ext=1\r\nabcd\r\n10\r\n0123456789abcdef\r\n0\r\nTrailer: x\r\n\r\n"),
    b"\r\nHEAD http://localhost:8080/health HTTP/1.0\r\nConnection: close\r\n\r\n",
]
NASTY = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"0",
    b"ffffffff",
    b"99999999",
    b"-1",
    b"\xff",
    b"/",
    b"//",
    b"%",
    b"[",
    b"x" * 2000,
]


def damaged(rng: random.Random) -> bytes:
    """Some valid requests, with a few edits."""
    data = bytearray(b"".join(rng.choices(VALID, k=rng.randint(1, 3))))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        end = at + rng.choice([0, 0, 1, 1, 2, 8, 40])
        copied = rng.randrange(len(data) + 1)
        data[at:end] = rng.choice([b"", rng.choice(NASTY), rng.randbytes(1), data[copied : copied + 30]])
    return bytes(data)


def split(data: bytes, rng: random.Random) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = rng.choice([1, 1, 2, 3, 7, 50, 1000])
        yield data[at : at + size]
        at += size


def test_damaged_requests_are_read_or_refused_and_the_same_however_they_are_cut() -> None:
    rng = random.Random(24)
    statuses: set[int] = set()
    whole = 0
    for _ in range(ROUNDS):
        data = damaged(rng)
        found = read(data)
        assert read(*split(data, rng)) == found, data
        whole += sum(isinstance(one, HttpRequest) for one in found)
        statuses |= {one for one in found if isinstance(one, int)}
    assert {400, 501} <= statuses <= {400, 413, 431, 501}
    assert whole > ROUNDS / 2


@given(
    st.lists(st.sampled_from([*VALID, *NASTY]) | st.binary(max_size=30), max_size=6), st.randoms(use_true_random=False)
)
@SETTINGS
def test_any_bytes_are_read_or_refused_and_the_same_however_they_are_cut(
    parts: list[bytes], rng: random.Random
) -> None:
    data = b"".join(parts)
    assert read(*split(data, rng)) == read(data)


# --- Answers ---


def test_what_a_header_cannot_hold_is_replaced_rather_than_let_through() -> None:
    response = HttpResponse(200, b"", headers={"X-Name": "a\r\nSet-Cookie: b\x00☃ä"})
    head = qmesh.response_head(response, closes=False, chunked=False)
    assert b"\r\nX-Name: a??Set-Cookie: b??\xe4\r\n" in head
    assert head.count(b"\r\n\r\n") == 1


# --- The server ---


@contextlib.asynccontextmanager
async def serving(handle: qmesh.HttpHandler, **more: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    """A server and its port; nothing of it is left when it has been stopped."""
    server = HttpServer(handle, **more)
    before = asyncio.all_tasks()
    _, port = await server.start(LOOPBACK, 0, 0)
    try:
        yield server, port
    finally:
        await server.stop()
        assert asyncio.all_tasks() <= before


async def echo(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, f"{request.method} {request.path} ".encode() + request.body, "text/plain")


class Source:
    """A handler whose answers come in pieces, as they are put; it knows which of them are over."""

    def __init__(self, **more: Any) -> None:
        self.pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.open = 0
        self.given = 0
        self._more = more

    async def handle(self, request: HttpRequest) -> HttpResponse:
        body = self._body()
        await anext(body)
        return HttpResponse(200, body, "text/plain", **self._more)

    async def _body(self) -> AsyncGenerator[bytes, None]:
        self.open += 1
        try:
            yield b""
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                self.given += 1
                yield piece
        finally:
            await asyncio.sleep(0)  # what ends a stream of ours waits, too
            self.open -= 1

    def says(self, *pieces: bytes | Exception | None) -> None:
        for piece in pieces:
            self.pieces.put_nowait(piece)


class Blocked:
    """A handler that is at work until it is let go; it knows whether it was cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def handle(self, request: HttpRequest) -> HttpResponse:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await echo(request)


async def is_hung_up(peer: HttpPeer) -> bool:
    return await peer.rest() == b""


@in_a_loop
async def test_requests_on_one_connection_are_answered_in_turn_however_they_are_cut() -> None:
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(get("/1") + post("Content-Length: 2", body=b"ab") + get("/2")[:7])
        assert (await peer.reply()).body == b"GET /1 "
        assert (await peer.reply()).body == b"POST / ab"
        for byte in get("/2")[7:]:
            peer.send(bytes([byte]))
            await asyncio.sleep(0)
        reply = await peer.reply()
        assert (reply.status, reply.body) == (200, b"GET /2 ")
        assert reply.headers["content-type"] == "text/plain"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "connection" not in reply.headers


@pytest.mark.parametrize(("version", "headers"), [("1.0", ()), ("1.1", ("Connection: close",))])
@in_a_loop
async def test_a_connection_that_is_not_kept_is_closed_behind_the_answer(
    version: str, headers: tuple[str, ...]
) -> None:
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.get("/", *headers, version=version)
        reply = await peer.reply()
        assert (reply.body, reply.headers["connection"]) == (b"GET / ", "close")
        assert await is_hung_up(peer)


@in_a_loop
async def test_head_is_answered_as_get_without_a_body_and_what_would_have_given_one_is_closed() -> None:
    source = Source()
    async with serving(source.handle) as (_, port), connected(port) as peer:
        peer.get("/", method="HEAD")
        assert (await peer.reply(has_body=False)).status == 200
        assert source.open == 0
        source.says(b"a", None)
        peer.get("/")
        assert (await peer.reply()).body == b"a"


@in_a_loop
async def test_head_of_what_is_refused_has_no_body_either() -> None:
    def admit(request: HttpRequest) -> None:
        raise HttpError(404, "no")

    async with serving(echo, admit=admit) as (_, port), connected(port) as peer:
        peer.get("/", method="HEAD")
        reply = await peer.reply(has_body=False)
        assert (reply.status, reply.headers["content-length"]) == (404, "3")
        assert await is_hung_up(peer)


@in_a_loop
async def test_a_client_that_waits_to_be_told_to_go_on_is_told() -> None:
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(post("Expect: 100-Continue", "Content-Length: 3"))
        assert (await peer.head()).status == 100
        peer.send(b"abc")
        assert (await peer.reply()).body == b"POST / abc"


@in_a_loop
async def test_a_client_whose_body_is_there_or_who_knows_no_http_1_1_is_not_told_to_go_on() -> None:
    async with serving(echo) as (_, port):
        async with connected(port) as peer:
            peer.send(post("Expect: 100-continue", "Content-Length: 3", body=b"abc"))
            assert (await peer.head()).status == 200
        async with connected(port) as peer:
            peer.send(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
            await asyncio.sleep(0.02)
            peer.send(b"abc")
            assert (await peer.head()).status == 200


@in_a_loop
async def test_who_is_not_admitted_is_told_before_sending_a_body() -> None:
    def admit(request: HttpRequest) -> None:
        raise HttpError(401, "no", headers={"WWW-Authenticate": "Bearer"})

    async with serving(echo, admit=admit) as (_, port), connected(port) as peer:
        peer.send(post("Expect: 100-continue", "Content-Length: 3000000"))
        reply = await peer.reply()
        assert (reply.status, reply.headers["www-authenticate"], reply.body) == (401, "Bearer", b"no\n")
        assert await is_hung_up(peer)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\r\n\r\n", 400),
        (get("http://[x/", "A : b"), 400),
        (post("Content-Length: 99999999"), 413),
        (post("Transfer-Encoding: gzip"), 501),
        (b"GET /" + b"x" * (1 << 15), 431),
        (chunked(b"z\r\n"), 400),
    ],
)
@in_a_loop
async def test_what_cannot_be_read_is_told_and_hung_up_on(data: bytes, status: int) -> None:
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(data + get("/never"))
        reply = await peer.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert await is_hung_up(peer)


@in_a_loop
async def test_who_sends_too_much_reads_why_although_still_sending() -> None:
    async with serving(echo) as (_, port), connected(port) as peer:
        size = 32 * 1024 * 1024
        peer.send(post(f"Content-Length: {size}"))

        async def send_all() -> None:
            with contextlib.suppress(ConnectionError):
                for _ in range(size >> 16):
                    peer.send(bytes(1 << 16))
                    await peer.writer.drain()

        sending = asyncio.create_task(send_all())
        reply = await peer.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        await sending


@in_a_loop
async def test_who_goes_on_sending_without_end_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HTTP_LINGER_S", SOON_S)
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(post("Content-Length: 99999999"))
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while True:
                    peer.send(bytes(1 << 16))
                    await peer.writer.drain()
                    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "begun", [b"G", get("/")[:-2], post("Content-Length: 3", body=b"ab"), chunked(b"1\r\n"), b"\r\n"]
)
@in_a_loop
async def test_a_request_that_never_gets_whole_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(qmesh, "HTTP_REQUEST_TIMEOUT_S", SOON_S)
    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(begun)
        reply = await peer.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert await is_hung_up(peer)


@in_a_loop
async def test_a_request_that_comes_drop_by_drop_is_given_up_in_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HTTP_REQUEST_TIMEOUT_S", SOON_S)

    async def drip(peer: HttpPeer) -> None:
        while True:
            peer.send(b"A: b\r\n")
            await asyncio.sleep(SOON_S / 10)

    async with serving(echo) as (_, port), connected(port) as peer:
        peer.send(b"GET / HTTP/1.1\r\n")
        dripping = asyncio.create_task(drip(peer))
        assert (await peer.reply()).status == 408
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


@pytest.mark.parametrize("requests", [0, 1])
@in_a_loop
async def test_a_connection_on_which_nothing_is_asked_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    monkeypatch.setattr(qmesh, "HTTP_IDLE_TIMEOUT_S", SOON_S)
    async with serving(echo) as (_, port), connected(port) as peer:
        for _ in range(requests):
            peer.get("/")
            await peer.reply()
        assert await is_hung_up(peer)


@in_a_loop
async def test_a_connection_that_waits_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_HTTP_CONNECTIONS", 2)
    async with serving(echo) as (_, port), connected(port) as first, connected(port) as second:
        for peer in (first, second):
            peer.get("/")
            await peer.reply()
        assert (await fetch(port)).status == 200
        assert await is_hung_up(first)
        second.get("/")
        assert (await second.reply()).status == 200


@in_a_loop
async def test_so_does_one_whose_request_has_begun_and_was_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_HTTP_CONNECTIONS", 2)
    async with serving(echo) as (_, port), connected(port) as first, connected(port) as second:
        for peer in (first, second):
            peer.send(b"G")
        for _ in range(3):
            assert (await fetch(port)).status == 200
        assert await is_hung_up(first)


@in_a_loop
async def test_where_all_are_at_work_a_new_one_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "MAX_HTTP_CONNECTIONS", 1)
    blocked = Blocked()
    async with serving(blocked.handle) as (_, port), connected(port) as first:
        first.get("/")
        await blocked.begun.wait()
        async with connected(port) as second:
            second.get("/")
            assert await is_hung_up(second)
        blocked.go.set()
        assert (await first.reply()).status == 200


@in_a_loop
async def test_of_many_connections_that_come_at_once_no_more_stay_than_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmesh, "MAX_HTTP_CONNECTIONS", 3)
    async with serving(echo) as (_, port), contextlib.AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        socks = [stack.enter_context(socket.socket()) for _ in range(12)]
        for sock in socks:  # all are there before the server sees the first
            sock.connect((LOOPBACK, port))
            sock.setblocking(False)
        assert (await fetch(port)).status == 200
        ended = 0
        for sock in socks:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.05):
                    await loop.sock_recv(sock, 1)
            with contextlib.suppress(BlockingIOError):
                try:
                    ended += sock.recv(1) == b""
                except ConnectionError:
                    ended += 1
        assert ended >= 12 - 3


@in_a_loop
async def test_who_sends_request_after_request_without_waiting_is_hung_up_on() -> None:
    blocked = Blocked()
    async with serving(blocked.handle) as (_, port), connected(port) as peer:
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(1000):
                    peer.send(get("/", "X: " + "x" * 1000))
                    await peer.writer.drain()
        await asyncio.wait_for(blocked.cancelled.wait(), PATIENCE_S)
        assert await is_hung_up(peer)


@pytest.mark.parametrize("how", ["reset", "close", "half"])
@in_a_loop
async def test_a_client_that_goes_away_ends_the_work_for_it(how: str) -> None:
    blocked = Blocked()
    async with serving(blocked.handle) as (_, port), connected(port) as peer:
        peer.get("/")
        await blocked.begun.wait()
        if how == "reset":
            peer.vanish()
        elif how == "close":
            peer.writer.close()
        else:
            peer.writer.write_eof()
        async with asyncio.timeout(1):
            await blocked.cancelled.wait()


@in_a_loop
async def test_an_answer_in_pieces_comes_as_it_is_made() -> None:
    source = Source()
    async with serving(source.handle) as (_, port), connected(port) as peer:
        peer.get("/")
        assert (await peer.head()).headers["transfer-encoding"] == "chunked"
        source.says(b"one")
        assert await peer.chunk() == b"one"
        source.says(b"", b"two", None)
        assert await peer.chunk() == b"two"
        assert await peer.chunk() == b""
        assert source.open == 0
        source.says(None)
        peer.get("/")  # the connection is kept
        assert (await peer.reply()).body == b""


@in_a_loop
async def test_to_a_client_of_http_1_0_pieces_come_until_the_connection_ends() -> None:
    source = Source()
    async with serving(source.handle) as (_, port), connected(port) as peer:
        source.says(b"one", b"two", None)
        peer.get("/", version="1.0")
        head = await peer.head()
        assert "transfer-encoding" not in head.headers
        assert head.headers["connection"] == "close"
        assert await peer.rest() == b"onetwo"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@in_a_loop
async def test_an_answer_of_known_length_keeps_the_connection(version: str) -> None:
    source = Source(length=6)
    async with serving(source.handle) as (_, port), connected(port) as peer:
        source.says(b"one", b"two", None)
        peer.get("/", version=version)
        reply = await peer.reply()
        assert (reply.body, reply.headers["content-length"]) == (b"onetwo", "6")
        assert ("connection" in reply.headers) == (version == "1.0")


@in_a_loop
async def test_an_answer_that_is_shorter_than_was_said_ends_the_connection() -> None:
    source = Source(length=6)
    async with serving(source.handle) as (_, port), connected(port) as peer:
        source.says(b"one", None)
        peer.get("/")
        with pytest.raises(asyncio.IncompleteReadError):
            await peer.reply()


@in_a_loop
async def test_an_answer_that_is_longer_than_was_said_is_cut() -> None:
    source = Source(length=4)
    async with serving(source.handle) as (_, port), connected(port) as peer:
        source.says(b"one", b"two", b"three", None)
        peer.get("/")
        assert (await peer.reply()).body == b"onet"
        source.says(b"next", None)
        peer.get("/")
        assert (await peer.reply()).body == b"next"


@pytest.mark.parametrize("how", ["reset", "close", "half"])
@pytest.mark.parametrize("pieces", [0, 1])
@in_a_loop
async def test_a_stream_is_closed_when_its_client_has_gone(how: str, pieces: int) -> None:
    source = Source()
    async with serving(source.handle) as (_, port), connected(port) as peer:
        peer.get("/")
        await peer.head()
        source.says(*[b"x"] * pieces)
        for _ in range(pieces):
            await peer.chunk()
        {"reset": peer.vanish, "close": peer.writer.close, "half": peer.writer.write_eof}[how]()
        async with asyncio.timeout(1):
            await until(lambda: not source.open)


@in_a_loop
async def test_a_stream_is_closed_when_its_client_has_gone_before_the_head() -> None:
    source = Source()
    go = asyncio.Event()

    async def handle(request: HttpRequest) -> HttpResponse:
        response = await source.handle(request)
        with contextlib.suppress(asyncio.CancelledError):  # as where the end of the work meets the client's
            await go.wait()
        return response

    async with serving(handle) as (_, port), connected(port) as peer:
        peer.get("/")
        await until(lambda: source.open)
        peer.vanish()
        source.says(b"x")
        await until(lambda: not source.open)
        assert source.given == 0


@in_a_loop
async def test_streams_are_closed_when_the_server_stops() -> None:
    source = Source()
    server = HttpServer(source.handle)
    _, port = await server.start(LOOPBACK, 0, 0)
    async with connected(port) as peer:
        peer.get("/")
        await peer.head()
        source.says(b"x")
        await peer.chunk()
        await server.stop(SOON_S)
        assert source.open == 0
        with pytest.raises(asyncio.IncompleteReadError):
            await peer.chunk()


@in_a_loop
async def test_a_reader_that_takes_nothing_is_hung_up_on_and_little_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", SOON_S)
    source = Source()
    size = 1 << 16
    source.says(*[bytes(size)] * 1000, None)
    async with serving(source.handle) as (_, port), connected(port, buffer=1) as peer:
        peer.get("/")
        await until(lambda: source.given and not source.open)
        assert source.given * size < 20 * 1024 * 1024  # what the two systems hold for their sockets, and 64 KiB of ours
        assert len(await peer.rest()) < 20 * 1024 * 1024


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no limit on what waits unsent")
@in_a_loop
async def test_the_system_holds_little_for_who_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With MBs there, somebody slow would have to take those before the deadline for what comes next."""
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", SOON_S)
    source, size = Source(), 1 << 13
    source.says(*[bytes(size)] * 2000, None)
    async with serving(source.handle) as (_, port):
        with socket.create_connection((LOOPBACK, port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await until(lambda: source.given and not source.open)
    assert qmesh.HTTP_UNSENT_BYTES < source.given * size < 8 * qmesh.HTTP_UNSENT_BYTES


@in_a_loop
@pytest.mark.parametrize("in_pieces", [False, True])
async def test_who_takes_an_answer_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch, in_pieces: bool) -> None:
    """The limit is for what is taken next, and not for an answer: this one takes several times as long as it."""
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", 2 * SOON_S)
    body, piece = random.Random(1).randbytes(8 * 1024 * 1024), 1 << 16

    async def handle(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, pieces(), length=len(body)) if in_pieces else HttpResponse(200, body)

    async def pieces() -> AsyncGenerator[bytes, None]:
        for place in range(0, len(body), 4 * piece):
            yield body[place : place + 4 * piece]

    async with serving(handle) as (_, port), connected(port, buffer=piece) as peer:
        peer.get("/")
        assert (await peer.head()).headers["content-length"] == str(len(body))
        began, taken = time.monotonic(), b""
        while len(taken) < len(body):
            await asyncio.sleep(0.01)
            taken += await peer.reader.readexactly(piece)
    assert taken == body
    assert time.monotonic() - began > 4 * SOON_S


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({}, None),
        ({"range": "bytes=0-"}, range(100)),
        ({"range": "bytes=99-"}, range(99, 100)),
        ({"range": "bytes=10-19"}, range(10, 20)),
        ({"range": "bytes=10-1000"}, range(10, 100)),
        ({"range": "bytes=0-0"}, range(1)),
        ({"range": "bytes=-10"}, range(90, 100)),
        ({"range": "bytes=-1000"}, range(100)),
        ({"range": "bytes=100-"}, 416),
        ({"range": "bytes=500-600"}, 416),
        ({"range": "bytes=-0"}, 416),
        ({"range": "bytes=20-10"}, None),
        ({"range": "bytes=-"}, None),
        ({"range": "bytes=1-2,5-6"}, None),
        ({"range": "bytes=a-b"}, None),
        ({"range": "lines=1-2"}, None),
        ({"range": "bytes=" + "9" * 30 + "-"}, None),
        ({"range": "bytes=10-", "if-range": '"tag"'}, range(10, 100)),
        ({"range": "bytes=10-", "if-range": '"other"'}, None),
        ({"range": "bytes=10-", "if-range": 'W/"tag"'}, None),
        ({"range": "bytes=500-", "if-range": '"other"'}, None),
    ],
)
def test_a_part_of_a_file_may_be_asked_for(headers: dict[str, str], part: range | int | None) -> None:
    request = HttpRequest("GET", "/", headers)
    if isinstance(part, int):
        with pytest.raises(HttpError) as caught:
            qmesh.byte_range(request, 100, '"tag"')
        assert (caught.value.status, caught.value.headers) == (part, {"Content-Range": "bytes */100"})
    else:
        assert qmesh.byte_range(request, 100, '"tag"') == part
    assert qmesh.byte_range(HttpRequest("HEAD", "/", headers), 100, '"tag"') is None


@in_a_loop
async def test_what_nobody_takes_is_not_kept_when_the_connection_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that fits the buffer is written without waiting; its connection ends in time all the same."""
    size = 32 * 1024 * 1024
    monkeypatch.setattr(qmesh, "SEND_TIMEOUT_S", SOON_S)
    monkeypatch.setattr(qmesh, "HTTP_WRITE_BUFFER_BYTES", 2 * size)

    async def handle(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, bytes(size))

    alone = asyncio.all_tasks()
    async with serving(handle) as (_, port), connected(port, buffer=1) as peer:
        peer.get("/", "Connection: close")
        await until(lambda: len(asyncio.all_tasks()) > len(alone))
        await until(lambda: len(asyncio.all_tasks()) == len(alone))
        assert len(await peer.rest()) < size


@in_a_loop
async def test_an_answer_that_is_being_taken_comes_whole_though_the_server_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 32 * 1024 * 1024
    monkeypatch.setattr(qmesh, "HTTP_WRITE_BUFFER_BYTES", 2 * size)
    answered = asyncio.Event()

    async def handle(request: HttpRequest) -> HttpResponse:
        answered.set()
        return HttpResponse(200, bytes(size))

    async with serving(handle) as (server, port), connected(port, buffer=4096) as peer:
        peer.get("/")
        await answered.wait()
        await asyncio.sleep(0.05)  # by now it waits for the next request
        stopping = asyncio.create_task(server.stop(PATIENCE_S))
        await asyncio.sleep(0.05)
        assert len((await peer.reply()).body) == size
        await stopping


@in_a_loop
async def test_an_answer_in_pieces_shows_signs_of_life_while_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmesh, "HTTP_SILENCE_S", SOON_S)
    source = Source(sign_of_life=b":\n\n")
    async with serving(source.handle) as (_, port), connected(port) as peer:
        peer.get("/")
        await peer.head()
        assert [await peer.chunk(), await peer.chunk()] == [b":\n\n", b":\n\n"]
        source.says(b"x", None)
        assert [await peer.chunk(), await peer.chunk()] == [b"x", b""]
        peer.get("/")  # nothing comes behind the end
        source.says(b"y", None)
        assert (await peer.reply()).body == b"y"


@in_a_loop
async def test_a_fault_of_the_handler_is_told_as_one_and_the_connection_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handle(request: HttpRequest) -> HttpResponse:
        if request.path == "/bad\n":
            raise RuntimeError("secret")
        return await echo(request)

    async with serving(handle) as (_, port), connected(port) as peer:
        peer.get("/bad%0A")
        reply = await peer.reply()
        assert (reply.status, b"secret" in reply.body) == (500, False)
        assert [record.getMessage() for record in caplog.records] == ["GET /bad? failed"]
        caplog.clear()
        peer.get("/")
        assert (await peer.reply()).status == 200


@pytest.mark.parametrize("more", [{}, {"length": 9}])
@in_a_loop
async def test_a_stream_that_fails_does_not_end_as_if_it_were_whole(
    caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    source = Source(**more)
    async with serving(source.handle) as (_, port), connected(port) as peer:
        peer.get("/")
        await peer.head()
        source.says(b"x", RuntimeError("no more"))
        assert await peer.rest() == (b"x" if more else b"1\r\nx\r\n")
        assert source.open == 0
        assert [record.getMessage() for record in caplog.records] == ["an HTTP connection failed"]
        caplog.clear()


@in_a_loop
async def test_what_is_under_way_may_end_when_the_server_stops_and_nobody_new_comes_in() -> None:
    blocked = Blocked()
    async with serving(blocked.handle) as (server, port), connected(port) as busy, connected(port) as idle:
        busy.get("/")
        await blocked.begun.wait()
        stopping = asyncio.create_task(server.stop(PATIENCE_S))
        assert await is_hung_up(idle)
        with pytest.raises(OSError):  # noqa: PT011 - each system has a word of its own for it
            await fetch(port)
        assert not stopping.done()
        blocked.go.set()
        reply = await busy.reply()
        assert (reply.status, await busy.rest()) == (200, b"")
        await asyncio.wait_for(stopping, PATIENCE_S)


@in_a_loop
async def test_a_server_that_cannot_wait_longer_ends_what_is_under_way() -> None:
    blocked = Blocked()
    async with serving(blocked.handle) as (server, port), connected(port) as peer:
        peer.get("/")
        await blocked.begun.wait()
        await server.stop(SOON_S)
        assert blocked.cancelled.is_set()
        assert await is_hung_up(peer)


@in_a_loop
async def test_clients_at_random_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """Damaged requests, cut anywhere, of clients that leave at any time."""
    rng = random.Random(7)

    async def client(port: int) -> None:
        with contextlib.suppress(ConnectionError):
            async with connected(port) as peer:
                for piece in split(damaged(rng), rng):
                    peer.send(piece)
                    if rng.random() < 0.1:
                        await asyncio.sleep(0)
                if rng.random() < 0.5:
                    peer.send(HEAD)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await peer.reader.read(100)

    async with serving(echo) as (_, port):
        for _ in range(20):
            await asyncio.gather(*(client(port) for _ in range(10)))
        assert (await fetch(port)).status == 200
