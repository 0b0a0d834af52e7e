"""Nodes that are members of a mesh, and those that are not, for tests of what they say to each other over TCP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from qmesh import LOOPBACK, Address, Connection, Handler, Identity, MeshKey, MeshKeys, NodeKey, TcpServer

OPEN = MeshKeys.derive("tests")


def node_key(number: int) -> NodeKey:
    """The same key for the same number."""
    return NodeKey.of_seed(number.to_bytes(32, "big"))


def closed(number: int, topic: str = "tests", until: str = "") -> MeshKeys:
    """The keys of a closed mesh; the same for the same number."""
    key = MeshKey(number.to_bytes(32, "big"))
    return MeshKeys.derive(topic, MeshKey.parse(f"{key.text} until {until}") if until else key)


def member(number: int, *meshes: MeshKeys) -> Identity:
    """A node of these meshes, or of one that is open."""
    return Identity(node_key(number), meshes or [OPEN])


async def echo(connection: Connection) -> None:
    """Answer each frame with its `n`, until the other side closes."""
    while (body := await connection.receive()) is not None:
        await connection.send({"type": "status_response", "n": body.get("n")})


@contextlib.asynccontextmanager
async def serving(identity: Identity, handler: Handler = echo) -> AsyncIterator[tuple[TcpServer, Address]]:
    """A listener of this node, and where it listens."""
    server = TcpServer(handler, identity)
    address = await server.start(LOOPBACK, 0)
    try:
        yield server, address
    finally:
        await server.stop()
