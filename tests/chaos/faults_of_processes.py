"""Workers that are killed, suspended or told to stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from actors import ANSWER_TIMEOUT_S, STAGE_TIMEOUT_S, Server
from arena import LoopbackArena
from cells import Cell, Scene
from questions import QUICK, STREAM
from stages import MID_STREAM, STAGES, Stage, strike_in
from story import Story

WORKERS = 2
ROW_WORKERS = 4

CROWD_WORKERS = 6
CROWD_STREAMS = 50
CROWD_FLAGS = ("--slots", "4", "--queue", "17")  # so that half of them can take all, and one cannot

Strike = Callable[[LoopbackArena, Server, Story], None]


def _kill(arena: LoopbackArena, victim: Server, story: Story) -> None:
    victim.kill()


def _suspend(arena: LoopbackArena, victim: Server, story: Story) -> None:
    """It comes back when the client has gone on elsewhere, and must not put in a word."""
    victim.suspend()
    arena.wait_lost(story)
    victim.resume()


def _terminate(arena: LoopbackArena, victim: Server, story: Story) -> None:
    victim.terminate()


def _cell(fault: str, strike: Strike, stage: Stage) -> Cell:
    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            strike_in(stage, arena, WORKERS, strike)

    return Cell(fault, stage.name, play)


def _half(arena: LoopbackArena, begun: list[Story]) -> list[Server]:
    """Half of the workers, of whom at least one is in the middle of an answer."""
    first = arena.server_of(arena.rng.choice(begun))
    return [first, *arena.rng.sample(arena.others(first), CROWD_WORKERS // 2 - 1)]


def _half_at_once(scene: Scene) -> None:
    """Half of the workers are killed while all slots work and as many requests wait."""
    with scene.loopback() as arena:
        arena.start(CROWD_WORKERS, *CROWD_FLAGS)
        stories = [arena.asker.ask(QUICK[number % len(QUICK)]) for number in range(CROWD_STREAMS)]
        begun = arena.rng.randint(1, CROWD_STREAMS // 2)
        arena.asker.wait(
            lambda: sum(bool(story.pieces) for story in stories) >= begun, STAGE_TIMEOUT_S, f"{begun} answers begun"
        )
        arena.strike()
        for victim in _half(arena, [story for story in stories if story.pieces]):
            victim.kill()
        arena.asker.follow(*stories, within_s=ANSWER_TIMEOUT_S)
        whole = sum(story.is_whole for story in stories)
        arena.expect(whole == CROWD_STREAMS, f"{CROWD_STREAMS - whole} of {CROWD_STREAMS} answers are not whole")


def _has_tokens(story: Story, count: int) -> bool:
    return len(story.ids) >= count


def _has_moved(story: Story, times: int) -> bool:
    return len(story.selected) > times


def _one_after_another(scene: Scene) -> None:
    """Whoever goes on is killed as well, a few tokens later."""
    with scene.loopback() as arena:
        arena.start(ROW_WORKERS, "--slots", "2")
        story = arena.asker.ask(STREAM)
        arena.strike()
        for turn in range(1, ROW_WORKERS):
            count = len(story.ids) + arena.rng.randint(1, STREAM.max_tokens // ROW_WORKERS)
            arena.asker.wait(partial(_has_tokens, story, count), STAGE_TIMEOUT_S, "more of an answer")
            arena.server_of(story).kill()
            arena.asker.wait(partial(_has_moved, story, turn), STAGE_TIMEOUT_S, "the next worker")
        arena.asker.follow(story)
        arena.expect(story.is_whole, f"no whole answer, with a worker left that is well: {story.ending}")


def _started_again(scene: Scene) -> None:
    """The only worker is killed, and comes back with the same id, at another port and with nothing remembered."""
    with scene.loopback() as arena:
        arena.start(1, "--slots", "2")
        story = MID_STREAM.reach(arena)
        victim = arena.server_of(story)
        arena.strike()
        victim.kill()
        victim.process.popen.wait()
        (again,) = arena.start(1, "--slots", "2")
        arena.expect(again.worker_id == victim.worker_id, "a worker that is started again has another id")
        arena.asker.follow(story)
        arena.expect(story.is_whole, f"no whole answer, with a worker that is well: {story.ending}")


FAULTS: dict[str, Strike] = {"kill -9": _kill, "SIGSTOP, later SIGCONT": _suspend, "SIGTERM": _terminate}
CELLS = [
    *(_cell(fault, strike, stage) for fault, strike in FAULTS.items() for stage in STAGES),
    Cell("kill -9 of one worker after another", "mid-stream", _one_after_another),
    Cell("kill -9 of the only worker, started again", "mid-stream", _started_again),
    Cell(f"kill -9 of half of {CROWD_WORKERS} workers", f"{CROWD_STREAMS} streams", _half_at_once),
]
