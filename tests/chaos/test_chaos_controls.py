"""Each check of the invariants bites: a story in which one thing is wrong is complained of."""

from __future__ import annotations

from pathlib import Path
from random import Random

import actors
import arena
import pytest
import questions
from actors import STAGE_TIMEOUT_S, Asker, wait_until
from arena import Known, LoopbackArena
from questions import KEEP_BUSY, WARM_UP
from story import Json, Question, Story, complaints, misplaced, wrong_tokens

QUESTION = Question("Count.", 5)
TEXTS = ("one", " two", " three", " four", "")


def told(*events: Json) -> Story:
    story = Story("r1", QUESTION)
    for event in events:
        story.take({"id": "r1", "at": 0.0} | event)
    return story


def pieces() -> list[Json]:
    return [{"event": "token", "seq": seq, "tokens": [10 + seq], "text": text} for seq, text in enumerate(TEXTS)]


def answer(**changes: object) -> Json:
    whole = {"text": "".join(TEXTS), "finish_reason": "length", "worker_id": "w", "failovers": 0}
    return {"event": "answer"} | whole | changes


OVER: Json = {"event": "over"}
ENDED: Json = {"event": "error", "text": "WorkerLost: it has gone"}
KNOWN = told(*pieces(), answer(), OVER)


def without(index: int) -> list[Json]:
    return [*pieces()[:index], *pieces()[index + 1 :]]


def changed(index: int, **fields: object) -> list[Json]:
    return [event | fields if number == index else event for number, event in enumerate(pieces())]


@pytest.mark.parametrize(
    "story",
    [
        KNOWN,
        told(*pieces()[:2], ENDED, OVER),
        told(ENDED, OVER),
        told(
            {"event": "token", "seq": 0, "tokens": [10, 11, 12, 13], "text": "one two three four"},
            pieces()[4],
            answer(),
            OVER,
        ),
    ],
    ids=["whole", "cut, with an error", "error at once", "several tokens in one piece"],
)
def test_what_is_right_is_not_complained_of(story: Story) -> None:
    assert complaints(story, KNOWN) == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([*pieces()], "has not ended"),
        ([*pieces(), OVER], "it ended 0 times"),
        ([*pieces(), answer(), answer(), OVER], "it ended 2 times"),
        ([*pieces(), answer(), ENDED, OVER], "it ended 2 times"),
        ([*pieces(), answer(), pieces()[4], OVER], "behind its end came"),
        ([*pieces(), {"event": "fault", "text": "Traceback"}, OVER], "a fault reached the user"),
        ([{"event": "error", "text": " "}, OVER], "an error that says nothing"),
        ([*without(2), answer(), OVER], "1 tokens were lost and 0 came twice"),
        ([*pieces()[:3], pieces()[2], *pieces()[3:], answer(), OVER], "0 tokens were lost and 1 came twice"),
        ([*changed(3, seq=2), answer(), OVER], "came twice"),
        ([*changed(1, tokens=[99]), answer(), OVER], "1 tokens are not those"),
        ([*changed(1, tokens=[99])[:3], ENDED, OVER], "1 tokens are not those"),
        ([*pieces()[:4], answer(), OVER], "1 tokens are not those"),
        ([*changed(2, text=" tree"), answer(), OVER], "the text read is not that"),
        ([*changed(2, text=" tree")[:3], ENDED, OVER], "the text read is not that"),
        ([*pieces(), answer(text="one two"), OVER], "the result's text is not that"),
        ([*pieces(), answer(finish_reason="stop"), OVER], "it ended by 'stop'"),
    ],
)
def test_what_is_wrong_is_complained_of(events: list[Json], complaint: str) -> None:
    assert any(complaint in found for found in complaints(told(*events), KNOWN))


def test_tokens_are_counted_as_lost_repeated_and_wrong() -> None:
    assert misplaced(told(*without(1)).pieces) == (1, 0)
    assert misplaced(told(*pieces(), *pieces()[:2]).pieces) == (0, 9)
    assert wrong_tokens(told(*changed(1, tokens=[99]), answer(), OVER), KNOWN) == 1
    assert wrong_tokens(told(*pieces()[:2], ENDED, OVER), KNOWN) == 0


def test_the_longest_wait_behind_a_moment_is_found() -> None:
    story = told(*({**piece, "at": at} for piece, at in zip(pieces(), (1.0, 2.0, 5.0, 5.5, 9.0), strict=True)))
    assert story.pause_s(2.5) == 3.5
    assert story.pause_s(9.5) is None


# --- The checks of processes ---


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Known:
    return questions.learn(tmp_path_factory.mktemp("undisturbed"), model_path, [WARM_UP])


@pytest.fixture
def hall(tmp_path: Path, model_path: Path, known: Known, monkeypatch: pytest.MonkeyPatch) -> LoopbackArena:
    """An arena that waits but a little for what will not come."""
    for name in ("QUIET_TIMEOUT_S", "FOOTPRINT_TIMEOUT_S", "STOP_TIMEOUT_S"):
        monkeypatch.setattr(arena, name, 1.0)
    return LoopbackArena(tmp_path / "hall", model_path, known, Random(0))


def test_where_nothing_is_wrong_nothing_is_broken(hall: LoopbackArena) -> None:
    with hall:
        hall.start(1)
        hall.asker.follow(hall.asker.ask(WARM_UP))
    assert hall.broken == []


def test_a_worker_that_dies_by_itself_is_noticed(hall: LoopbackArena) -> None:
    with hall:
        (server,) = hall.start(1)
        server.process.popen.kill()
        server.process.popen.wait()
    assert len(hall.broken) == 1
    assert "a worker ended by itself, with -9" in hall.broken[0]


def test_a_worker_that_will_not_stop_is_noticed(hall: LoopbackArena) -> None:
    with hall:
        (server,) = hall.start(1)
        server.suspend()
        server.terminate()
    assert hall.broken == ["a worker that was told to stop has not within 1 s"]


def test_a_slot_that_stays_taken_is_noticed(hall: LoopbackArena) -> None:
    with hall:
        (server,) = hall.start(1)
        stranger = Asker(hall.home, hall.directory / "stranger", {})
        stranger.ask_at(server, KEEP_BUSY)
        wait_until(lambda: hall.watcher.load(server) == (1, 0), STAGE_TIMEOUT_S, "a worker that is kept busy")
    stranger.end()
    assert hall.broken == ["TimedOut: a survivor that is idle: not within 1 s"]


def test_a_connection_that_stays_is_noticed(hall: LoopbackArena) -> None:
    with hall:
        (server,) = hall.start(1)
        stranger = Asker(hall.home, hall.directory / "stranger", {})
        stranger.status(server)
    stranger.end()
    assert len(hall.broken) == 1
    assert "a survivor holds" in hall.broken[0]


def test_another_text_than_the_known_one_is_noticed(hall: LoopbackArena) -> None:
    with hall:
        hall.start(1)
        hall.known = {WARM_UP: KNOWN}
        hall.asker.follow(hall.asker.ask(WARM_UP))
    assert any("are not those of the undisturbed run" in complaint for complaint in hall.broken)


LEAVES_THINGS_BEHIND = """
import json, sys
print(json.dumps({"event": "ready"}), flush=True)
sys.stdin.readline()
print(json.dumps({"event": "closed", "tasks": ["forgotten()"], "descriptors": 2}))
print("Task was destroyed but it is pending!", file=sys.stderr)
"""


def test_a_client_that_leaves_something_behind_is_noticed(
    hall: LoopbackArena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "untidy.py"
    script.write_text(LEAVES_THINGS_BEHIND)
    with hall:
        hall.start(1)
        monkeypatch.setattr(actors, "SCRIPT", script)
        hall.new_asker()
    assert hall.broken == [
        "a client's stderr: Task was destroyed but it is pending!",
        "a client left tasks behind: ['forgotten()']",
        "a client left 2 descriptors open",
    ]
