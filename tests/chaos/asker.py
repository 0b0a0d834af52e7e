"""A client process that does what it is told on stdin and says on stdout what comes of it, one JSON object a line.

It is a process of its own so that it can stand in another network namespace than the tests, be killed and be
suspended; and a script, not the command line, because the command line does not tell of each token.

Commands (`do`): `ask` a question of the mesh; `ask_at` one worker, whatever the others are like; `drop` a request;
`status` of one worker; `look` which workers there are; `leave`, which ends it, as the end of stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import qmesh  # noqa: E402

Json = dict[str, Any]
COMMAND_BYTES = 8 << 20  # the largest frame fits twice


def tell(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **fields}), flush=True)


def tell_progress(request_id: str, event: object) -> None:
    """One event of a request, in the words that `story.Story` takes."""
    if isinstance(event, qmesh.Token):
        tell("token", id=request_id, seq=event.seq, tokens=event.tokens, text=event.text)
    elif isinstance(event, (qmesh.Selected, qmesh.Lost)):
        reason = {"reason": str(event.reason)} if isinstance(event, qmesh.Lost) else {}
        tell(type(event).__name__.lower(), id=request_id, worker_id=event.worker_id, **reason)
    elif isinstance(event, qmesh.Queued):
        tell("queued", id=request_id, position=event.position)
    elif isinstance(event, qmesh.Answer):
        tell_result(request_id, event.result, event.failovers)


def tell_result(request_id: str, result: qmesh.Result, failovers: int) -> None:
    told = {"text": result.text, "finish_reason": result.finish_reason, "worker_id": result.worker_id}
    tell("answer", id=request_id, failovers=failovers, **told)


def job_of(command: Json) -> qmesh.Job:
    return qmesh.Job(
        command["id"],
        messages=(qmesh.Message("user", command["text"]),),
        params=qmesh.Sampling(max_tokens=command["max_tokens"], temperature=0),
        timeout_s=command["timeout_s"],
    )


class Asker:
    """Requests under way, and connections over which workers are asked how they are."""

    def __init__(self, mesh: qmesh.Client) -> None:
        self._mesh = mesh
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._questions: set[asyncio.Task[None]] = set()
        self._links: dict[tuple[str, int], qmesh.WorkerLink] = {}
        self._dialling = asyncio.Lock()

    async def obey(self, commands: asyncio.StreamReader) -> None:
        while line := await commands.readline():
            command = json.loads(line)
            match command["do"]:
                case "ask":
                    self._begin(command, self._ask(command))
                case "ask_at":
                    self._begin(command, self._ask_at(command))
                case "drop":
                    if command["id"] in self._requests:  # it may have ended meanwhile
                        self._requests[command["id"]].cancel()
                case "status":
                    self._look(self._tell_status(command))
                case "look":
                    self._look(self._tell_known(command))
                case "leave":
                    return

    async def close(self) -> None:
        tasks = [*self._requests.values(), *self._questions]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _look(self, question: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(question)
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    def _begin(self, command: Json, request: Coroutine[Any, Any, None]) -> None:
        self._requests[command["id"]] = asyncio.create_task(self._bounded(command["id"], request))

    async def _bounded(self, request_id: str, request: Coroutine[Any, Any, None]) -> None:
        """Say how a request ends, however it ends."""
        try:
            await request
        except qmesh.QMeshError as error:
            tell("error", id=request_id, text=f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            tell("left", id=request_id)
        except Exception:
            tell("fault", id=request_id, text=traceback.format_exc())
        finally:
            tell("over", id=request_id)
            del self._requests[request_id]

    async def _ask(self, command: Json) -> None:
        async with contextlib.aclosing(self._mesh.run(job_of(command))) as events:
            async for event in events:
                tell_progress(command["id"], event)

    async def _ask_at(self, command: Json) -> None:
        """On a connection of its own, frame by frame: nothing of the client's is between us and the worker."""
        connection = await qmesh.dial(tuple(command["address"]), self._mesh.links.identity)
        try:
            await connection.send(job_of(command).to_json())
            while (body := await connection.receive()) is not None:
                if body["type"] == "inference_token":
                    tell_progress(command["id"], qmesh.Token.from_json(body))
                elif body["type"] == "inference_result":
                    tell_result(command["id"], qmesh.Result.from_json(body), 0)
                    return
                elif body["type"] == "inference_error":
                    raise qmesh.error_from_frame(body)
            raise qmesh.WorkerLost("it closed the connection")
        finally:
            connection.abort()

    async def _tell_status(self, command: Json) -> None:
        try:
            link = await self._link(tuple(command["address"]))
            told = await link.status()
            tell("status", ticket=command["ticket"], queue=told["queue"], score=told["health"]["score"])
        except qmesh.QMeshError as error:
            tell("status", ticket=command["ticket"], error=str(error))

    async def _tell_known(self, command: Json) -> None:
        with contextlib.suppress(qmesh.NoWorkerFound):
            await self._mesh.discover(everything=True)
        tell("known", ticket=command["ticket"], workers=[str(record.worker_id) for record in self._mesh.records()])

    async def _link(self, address: tuple[str, int]) -> qmesh.WorkerLink:
        async with self._dialling:
            link = self._links.get(address)
            if link is None or not link.alive:
                if link is not None:
                    await link.close()
                link = qmesh.WorkerLink(await qmesh.dial(address, self._mesh.links.identity))
                self._links[address] = link
            return link


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.asynccontextmanager
async def nothing_left_behind() -> AsyncIterator[None]:
    """Tell which tasks and how many descriptors are there behind the client that were not there before it."""
    before, open_before = asyncio.all_tasks(), descriptors()
    yield
    left = sorted(str(task.get_coro()) for task in asyncio.all_tasks() - before)
    tell("closed", tasks=left, descriptors=descriptors() - open_before)


async def main() -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: tell("fault", text=repr(context)))
    commands = asyncio.StreamReader(limit=COMMAND_BYTES)
    told, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    settings = qmesh.Settings.resolve({}, os.environ)
    async with nothing_left_behind(), qmesh.Client(settings) as mesh:
        asker = Asker(mesh)
        tell("ready")
        try:
            await asker.obey(commands)
        finally:
            await asker.close()
    told.close()


if __name__ == "__main__":
    asyncio.run(main())
