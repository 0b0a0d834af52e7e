"""A worker that says right things, and then wrong ones: frames that are no such, out of order, or somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from actors import STAGE_TIMEOUT_S, wait_until
from cells import Cell, Scene
from questions import KEEP_BUSY, STREAM
from scripted_worker import Script, ScriptedWorker
from stages import EARLIEST, LATEST
from story import Json, Piece

import qmesh

BEST_SCORE = 100  # whoever has it is asked first
REAL_FLAGS = ("--slots", "2", "--queue", "2")  # with one of two requests in it, its score is ten points lower
THREAD_TIMEOUT_S = 30

Wrongs = Callable[[list[Piece], int], list[Json]]
"""What is said behind so many pieces of an answer; the request's id is added where there is none."""


def frame(piece: Piece, **changes: Any) -> Json:
    return {"type": "inference_token", "seq": piece.seq, "tokens": list(piece.tokens), "text": piece.text} | changes


@dataclass(eq=False)
class Impostor(ScriptedWorker):
    """A scripted worker that has the real model, as far as it tells."""

    fingerprint: bytes = b""

    def _record(self, port: int) -> qmesh.WorkerRecord:
        name = qmesh.short_model_name(self.model)
        address = (qmesh.UNSPECIFIED, port)
        return qmesh.WorkerRecord(
            self.worker_id, address, 1, round(self.score), qmesh.HealthState.HEALTHY, 4, name, self.fingerprint
        )

    def _usual_status(self) -> Json:
        return super()._usual_status() | {"models": [{"name": self.model, "fingerprint": self.fingerprint.hex()}]}


def errs(pieces: list[Piece], count: int, wrongs: Wrongs) -> Script:
    """Say so many pieces of an answer as they are, then what is wrong, and then nothing: the connection stays."""

    async def script(connection: qmesh.Connection, request_id: str) -> bool:
        said = [*map(frame, pieces[:count]), *wrongs(pieces, count)]
        for body in said:
            await connection.send({"request_id": request_id} | body)
        return True

    return script


@contextlib.contextmanager
def beside(work: Callable[[], contextlib.AbstractAsyncContextManager[Any]]) -> Iterator[None]:
    """Keep something asynchronous going in a thread of its own."""
    begun, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def keep() -> None:
        async with work():
            begun.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(keep(),))
    thread.start()
    try:
        assert begun.wait(THREAD_TIMEOUT_S), "it did not begin"
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(THREAD_TIMEOUT_S)
        loop.close()


# --- What is wrong ---


def _nonsense(pieces: list[Piece], at: int) -> list[Json]:
    return [frame(pieces[at], tokens="all of them", seq=None)]


def _unknown_kind(pieces: list[Piece], at: int) -> list[Json]:
    return [frame(pieces[at], type="inference_poem")]


def _wrong_seq(pieces: list[Piece], at: int) -> list[Json]:
    return [frame(pieces[at], seq=pieces[at].seq + 3)]


def _hole(pieces: list[Piece], at: int) -> list[Json]:
    return [frame(pieces[at + 1]), frame(pieces[at + 2])]


def _duplicate(pieces: list[Piece], at: int) -> list[Json]:
    return [frame(pieces[at - 1])]


def _another_request(pieces: list[Piece], at: int) -> list[Json]:
    """It is not meant for us: to the client it is silence."""
    return [frame(piece, request_id="somebody-else") for piece in pieces[at:]]


def _early_result(pieces: list[Piece], at: int) -> list[Json]:
    """An end whose text is more than its tokens."""
    text = "".join(piece.text for piece in pieces[: at + 2])
    usage = {"prompt_tokens": 1, "completion_tokens": at + 2, "cached_tokens": 0}
    return [{"type": "inference_result", "text": text, "finish_reason": "stop", "usage": usage}]


def _too_much(pieces: list[Piece], at: int) -> list[Json]:
    """All that is right, and one token more than may be."""
    return [*map(frame, pieces[at:]), frame(pieces[-1], seq=STREAM.max_tokens)]


def _cell(fault: str, wrongs: Wrongs) -> Cell:
    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            (real,) = arena.start(1, *REAL_FLAGS)
            count = arena.rng.randint(EARLIEST, LATEST)
            pieces = arena.known[STREAM].pieces
            model = qmesh.read_model(scene.model)
            impostor = Impostor(
                errs(pieces, count, wrongs), score=BEST_SCORE, model=model.name, fingerprint=model.fingerprint
            )
            with beside(lambda: impostor.on(arena.mesh.topic)):
                arena.occupy(real, KEEP_BUSY)
                asker, both = arena.asker, {real.worker_id, str(impostor.worker_id)}
                wait_until(lambda: asker.known() >= both, STAGE_TIMEOUT_S, "a client that knows both")
                story = asker.ask(STREAM)
                asker.wait(lambda: len(story.ids) >= count, STAGE_TIMEOUT_S, "what is right of an answer")
                arena.strike()
                asker.follow(story)
            arena.expect(story.selected[:1] == [str(impostor.worker_id)], "the wrong worker was not asked")
            arena.expect(story.is_whole, f"no whole answer, with a worker left that is well: {story.ending}")

    return Cell(fault, "mid-stream", play)


CELLS = [
    _cell("a frame with nonsense in it", _nonsense),
    _cell("a frame of no known kind", _unknown_kind),
    _cell("a wrong seq", _wrong_seq),
    _cell("a piece left out", _hole),
    _cell("a duplicate frame", _duplicate),
    _cell("frames of another request", _another_request),
    _cell("a result that is more than its tokens", _early_result),
    _cell("more tokens than were asked for", _too_much),
]
