"""How far a request has come when a fault strikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from actors import ANSWER_TIMEOUT_S, STAGE_TIMEOUT_S, Server, wait_until
from arena import Arena, LanArena, LoopbackArena
from questions import KEEP_BUSY, LONG_PROMPT, STREAM
from story import Story

EARLIEST, LATEST = 3, 60  # tokens of STREAM between which the middle of it lies
LAST_FEW = 3  # tokens before the end, at most, where its end begins


@dataclass(frozen=True)
class Stage:
    """flags: of the workers, so that requests can be brought there. reach: ask, and wait until it has come so far."""

    name: str
    flags: tuple[str, ...]
    reach: Callable[[Arena], Story]


def _queued(arena: Arena) -> Story:
    """Each worker has one slot, and it is taken."""
    for server in arena.servers:
        arena.occupy(server, KEEP_BUSY)
    story = arena.asker.ask(STREAM)
    arena.asker.wait(lambda: bool(story.queued), STAGE_TIMEOUT_S, "a request in the queue")
    return story


def _reading(arena: Arena) -> Story:
    """A worker reads a long prompt, and has said nothing yet."""
    story = arena.asker.ask(LONG_PROMPT)
    arena.asker.wait(lambda: bool(story.selected), STAGE_TIMEOUT_S, "a worker that is chosen")
    victim = arena.server_of(story)
    wait_until(lambda: arena.watcher.load(victim) == (1, 0), STAGE_TIMEOUT_S, "a worker that reads")
    assert not story.pieces, "the prompt was read too soon"
    return story


def after_tokens(arena: Arena, count: int) -> Story:
    """A request whose answer has come so far."""
    story = arena.asker.ask(STREAM)
    arena.asker.wait(lambda: len(story.ids) >= count, ANSWER_TIMEOUT_S, f"{count} tokens of an answer")
    return story


def _streaming(arena: Arena) -> Story:
    return after_tokens(arena, arena.rng.randint(EARLIEST, LATEST))


def _ending(arena: Arena) -> Story:
    return after_tokens(arena, STREAM.max_tokens - arena.rng.randint(0, LAST_FEW))


QUEUED = Stage("queued", ("--slots", "1", "--queue", "8"), _queued)
READING = Stage("prompt evaluation", ("--slots", "2"), _reading)
MID_STREAM = Stage("mid-stream", ("--slots", "2"), _streaming)
LAST_TOKEN = Stage("last token", ("--slots", "2"), _ending)
STAGES = (QUEUED, READING, MID_STREAM, LAST_TOKEN)


AnyArena = TypeVar("AnyArena", LoopbackArena, LanArena)


def strike_in(stage: Stage, arena: AnyArena, workers: int, strike: Callable[[AnyArena, Server, Story], None]) -> None:
    """Strike the worker that is at an answer when it has come to this stage; the others are to make it whole."""
    arena.start(workers, *stage.flags)
    story = stage.reach(arena)
    arena.strike()
    strike(arena, arena.server_of(story), story)
    arena.asker.follow(story, within_s=ANSWER_TIMEOUT_S)
    arena.expect(story.is_whole, f"no whole answer, with a worker left that is well: {story.ending}")
