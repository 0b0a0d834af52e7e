"""Workers on the real wire, over UDP and TCP, of whom only the model is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loop import PATIENCE_S

import qmesh
from qmesh import Connection, Json, NodeId

Script = Callable[[Connection, str], Awaitable[bool]]
"""What a worker does with a request, given its id; False when it hangs up then."""

FINGERPRINT = bytes(qmesh.FINGERPRINT_BYTES)


NO_STATUS: Json = {"no": "answer"}


def health_of(score: float) -> Json:
    return qmesh.HealthReport(score, qmesh.state_of(score), 1, 2, 3).to_json()


@dataclass(eq=False)
class ScriptedWorker:
    """Does what `script` says with every prompt. `told_score` is what its record says, `score` its fresh status.

    tcp_key: the key that it has over TCP, if not its own. status: all that its status says, if not the usual;
    NO_STATUS for silence.
    """

    script: Script
    score: float = 80
    told_score: int | None = None
    model: str = "tiny"
    tcp_key: qmesh.NodeKey | None = None
    status: Json | None = None
    key: qmesh.NodeKey = field(default_factory=lambda: qmesh.NodeKey.of_seed(secrets.token_bytes(32)))
    udp_address: qmesh.Address = ("", 0)
    prompts: list[Json] = field(default_factory=list)
    statuses: int = 0
    cancelled: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    connections: int = 0
    closed: asyncio.Queue[None] = field(default_factory=asyncio.Queue)

    @property
    def worker_id(self) -> NodeId:
        return self.key.node_id

    @contextlib.asynccontextmanager
    async def on(self, topic: str, *, beacons: bool = True) -> AsyncIterator[ScriptedWorker]:
        """Join the mesh of this topic. beacons: whether clients find it with no address given."""
        identity = qmesh.Identity(self.tcp_key or self.key, [qmesh.MeshKeys.derive(topic)])
        server = qmesh.TcpServer(self._serve, identity)
        _, port = await server.start(qmesh.LOOPBACK, 0)
        try:
            record = self._record(port)
            async with announced(topic, record, beacons=beacons) as self.udp_address:
                yield self
        finally:
            await server.stop()

    def _record(self, port: int) -> qmesh.WorkerRecord:
        score = round(self.score) if self.told_score is None else self.told_score
        name = qmesh.short_model_name(self.model)
        return record_of(self.worker_id, port, score=score, model=name)

    async def _serve(self, connection: Connection) -> None:
        self.connections += 1
        try:
            while (body := await connection.receive()) is not None:
                if not await self._answer(connection, body):
                    return
        finally:
            self.closed.put_nowait(None)

    def _usual_status(self) -> Json:
        queue = {"active": 0, "waiting": 0, "capacity": 16}
        load = {"health": health_of(self.score), "slots": 4, "queue": queue, "speed": 1.0}
        return {**load, "models": [{"name": self.model}]}

    async def _answer(self, connection: Connection, body: Json) -> bool:
        if body["type"] == "cancel":
            self.cancelled.put_nowait(body["request_id"])
        elif body["type"] == "status":
            self.statuses += 1
            status = self._usual_status() if self.status is None else self.status
            if status is not NO_STATUS:
                await connection.send({"type": "status_response", **status, "request_id": body["request_id"]})
        else:
            self.prompts.append(body)
            return await self.script(connection, body["request_id"])
        return True


def record_of(worker_id: NodeId, port: int, *, score: int = 80, model: str = "tiny") -> qmesh.WorkerRecord:
    state = qmesh.state_of(score)
    return qmesh.WorkerRecord(worker_id, (qmesh.UNSPECIFIED, port), 1, score, state, 4, model, FINGERPRINT)


@contextlib.asynccontextmanager
async def announced(
    topic: str,
    record: qmesh.WorkerRecord,
    *,
    beacons: bool = True,
    host: str = qmesh.LOOPBACK,
    make_engine: Callable[..., qmesh.DhtEngine] = qmesh.DhtEngine,
) -> AsyncIterator[qmesh.Address]:
    """A node that tells a mesh of a worker; yields its address."""
    engine = make_engine(
        keys=qmesh.MeshKeys.derive(topic),
        own=record.worker_id,
        rng=random.Random(secrets.randbits(64)),
        now=qmesh.uptime_s(),
    )
    node = await qmesh.UdpNode.open(engine, host=host, port=0, listen=beacons, on_event=lambda event: None)
    node.run(lambda engine, now: engine.announce(record, now))
    try:
        yield node.address
    finally:
        await node.close()


# --- Clients ---


def client_of(topic: str, state_dir: Path, **more: Any) -> qmesh.Client:
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=topic, state_dir=str(state_dir), **more)
    return qmesh.Client(settings, environ={}, rng=random.Random(1))


@contextlib.asynccontextmanager
async def mesh_of(topic: str, state_dir: Path, *workers: ScriptedWorker, **more: Any) -> AsyncIterator[qmesh.Client]:
    """A client that has heard of all these workers."""
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.on(topic))
        client = await stack.enter_async_context(client_of(topic, state_dir, **more))
        await until_known(client, len(workers))
        yield client


async def until_known(client: qmesh.Client, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(client.records()) < count:
            await client.discover()
            await asyncio.sleep(0.01)  # a discovery that has found somebody returns at once


# --- Scripts ---


def token_frame(request_id: str, seq: int, text: str) -> Json:
    return qmesh.Token(seq, (seq,), text).to_json(request_id)


def result_frame(request_id: str, text: str, tokens: int = 1) -> Json:
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "cached_tokens": 0}
    return qmesh.Result(text, "stop", usage, {"queue_ms": 0.0}, "tiny", "0" * 64).to_json(request_id)


def says(*pieces: str) -> Script:
    """Streams these, and ends well."""

    async def script(connection: Connection, request_id: str) -> bool:
        for seq, piece in enumerate(pieces):
            await connection.send(token_frame(request_id, seq, piece))
        await connection.send(result_frame(request_id, "".join(pieces), len(pieces)))
        return True

    return script


def sends(*bodies: Json, hangs_up: bool = False) -> Script:
    """Sends these frames of the request, and then nothing more."""

    async def script(connection: Connection, request_id: str) -> bool:
        for body in bodies:
            await connection.send({**body, "request_id": request_id})
        return not hangs_up

    return script


def refuses(error: qmesh.QMeshError | None = None) -> Script:
    frame = qmesh.error_frame(None, error or qmesh.Refused("the queue is full"))
    return sends(frame)


def in_turn(*scripts: Script) -> Script:
    """One script for each request, and the last for all that follow."""
    left = list(scripts)

    async def script(connection: Connection, request_id: str) -> bool:
        chosen = left.pop(0) if len(left) > 1 else left[0]
        return await chosen(connection, request_id)

    return script


HANGS_UP: Script = sends(hangs_up=True)
IS_SILENT: Script = sends()
