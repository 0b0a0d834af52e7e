"""A client of the TCP port that can break every rule but TLS's: bytes out, frames in, a deadline on every wait.

Its TLS is asyncio's own, so that ours is not tested against itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

from loop import PATIENCE_S
from members import OPEN

import qmesh


def frame(payload: bytes) -> bytes:
    """Any bytes, with a true length before them."""
    return struct.pack(">I", len(payload)) + payload


class RawClient:
    """One connection. Nothing is sent but what is asked for; nothing that comes is dropped but signs of life.

    alive: how many of those came.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, identity: qmesh.Identity) -> None:
        self.identity = identity
        self._reader = reader
        self._writer = writer
        self._frames = qmesh.FrameReader(limit=qmesh.MAX_FRAME_BYTES)
        self.alive = 0

    async def send(self, body: qmesh.Json) -> None:
        await self.send_bytes(qmesh.encode_frame(body))

    async def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send_byte_by_byte(self, data: bytes) -> None:
        for at in range(len(data)):
            await self.send_bytes(data[at : at + 1])
            await asyncio.sleep(0)  # the other side reads along

    async def greet(self) -> qmesh.Json:
        """Say hello; returns what the other side says to it."""
        await self.send(qmesh.greeting("hello", self.identity.node_id))
        return await self.receive()

    async def receive(self) -> qmesh.Json:
        """The next frame; it must come."""
        body = await self._next()
        assert body is not None, "the other side closed without a word"
        return body

    async def closed(self, *, after: str | None = None) -> None:
        """Wait for the end, before which nothing more may come but frames of the type `after`."""
        while (body := await self._next()) is not None:
            assert body["type"] == after, f"this came instead of the end: {body}"

    def send_no_more(self) -> None:
        """Close this side only, as a sender that was cut off does."""
        self._writer.get_extra_info("socket").shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Vanish, as a process that is killed does."""
        self._writer.transport.abort()

    async def _next(self) -> qmesh.Json | None:
        while (body := await self._any()) is not None and body["type"] == "inference_alive":
            self.alive += 1
        return body

    async def _any(self) -> qmesh.Json | None:
        async with asyncio.timeout(PATIENCE_S):
            while (body := self._frames.read()) is None:
                with contextlib.suppress(ConnectionResetError):  # an end is an end
                    if data := await self._reader.read(qmesh.READ_BYTES):
                        self._frames.feed(data)
                        continue
                assert not self._frames.pending, "the other side closed in the middle of a frame"
                return None
            return body

    async def ask(self, request_id: str, **fields: Any) -> None:
        """Send a prompt; with no other text it is one that a small model goes on with for ever."""
        text = {} if "prompt" in fields or "messages" in fields else {"prompt": "1 2 3 4 5 6 7 8 9 10 11"}
        await self.send({"type": "prompt", "request_id": request_id, **text, **fields})

    async def embed(self, request_id: str, *texts: str, **fields: Any) -> None:
        """Ask for the embeddings of some texts."""
        await self.send({"type": "embed", "request_id": request_id, "texts": texts, **fields})

    async def receive_kind(self, kind: str, request_id: str | None = None) -> qmesh.Json:
        """The next frame of this type, and of this request if one is named; others are passed over."""
        while True:
            body = await self.receive()
            if body["type"] == kind and request_id in (None, body.get("request_id")):
                return body

    async def status(self) -> qmesh.Json:
        await self.send({"type": "status"})
        return await self.receive_kind("status_response")


@contextlib.asynccontextmanager
async def connected(
    address: qmesh.Address,
    *,
    greeted: bool = True,
    identity: qmesh.Identity | None = None,
    local_addr: qmesh.Address | None = None,
) -> AsyncIterator[RawClient]:
    """A connection that is closed at the end, and has greeted unless it is not to; of a member of `OPEN`."""
    identity = identity or qmesh.Identity.ephemeral([OPEN])
    membership = identity.memberships[0]
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(
            *address, ssl=membership.dialling, server_hostname=membership.server_name, local_addr=local_addr
        )
    client = RawClient(reader, writer, identity)
    try:
        if greeted:
            welcome = await client.greet()
            assert welcome["type"] == "welcome", welcome
        yield client
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
