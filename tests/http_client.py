"""An HTTP client that can break every rule: bytes out, and what comes back read strictly. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from loop import PATIENCE_S

from qmesh import LOOPBACK

HEAD = b"Host: 127.0.0.1\r\n"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


class HttpPeer:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def get(self, path: str = "/", *headers: str, method: str = "GET", version: str = "1.1") -> None:
        lines = [f"{method} {path} HTTP/{version}", "Host: 127.0.0.1", *headers, "", ""]
        self.send("\r\n".join(lines).encode())

    def post(self, path: str, body: Any, *headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + data)

    async def head(self) -> Reply:
        """The first line and headers of an answer."""
        async with asyncio.timeout(PATIENCE_S):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text[:-4].split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs)
        return Reply(int(status), headers, b"")

    async def chunk(self) -> bytes:
        """One chunk of a body, b"" the last. Raises IncompleteReadError when the connection ends instead."""
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        assert data[size:] == b"\r\n"
        return data[:size]

    async def reply(self, *, has_body: bool = True) -> Reply:
        """A whole answer. Raises IncompleteReadError when the connection ends before that."""
        head = await self.head()
        body = b""
        if not has_body:
            pass
        elif "content-length" in head.headers:
            async with asyncio.timeout(PATIENCE_S):
                body = await self.reader.readexactly(int(head.headers["content-length"]))
        elif head.headers.get("transfer-encoding") == "chunked":
            while chunk := await self.chunk():
                body += chunk
        else:
            body = await self.rest()
        return Reply(head.status, head.headers, body)

    async def rest(self) -> bytes:
        """All that comes until the server hangs up."""
        data = b""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(1 << 16):
                    data += piece
        return data

    def vanish(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(port: int, *, buffer: int = 1 << 16) -> AsyncIterator[HttpPeer]:
    """buffer: how much is read without being asked for, twice over."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=buffer)
    try:
        yield HttpPeer(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def fetch(port: int, path: str = "/", body: Any = None, *headers: str, method: str = "GET") -> Reply:
    """One request on a connection of its own."""
    async with connected(port) as peer:
        if body is None:
            peer.get(path, *headers, method=method)
        else:
            peer.post(path, body, *headers)
        return await peer.reply(has_body=method != "HEAD")


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what tests wait for tells nobody
            await asyncio.sleep(0.005)
