"""Client: answers that survive their workers. Scripted workers on the real wire tell one story, and die in
every way; the reader has to hear each word of it once, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from loop import PATIENCE_S, in_a_loop
from scripted_worker import (
    FINGERPRINT,
    HANGS_UP,
    IS_SILENT,
    NO_STATUS,
    Script,
    ScriptedWorker,
    client_of,
    health_of,
    mesh_of,
    refuses,
    result_frame,
    sends,
    token_frame,
)

import qmesh
from qmesh import (
    LOOPBACK,
    Answer,
    Client,
    Connection,
    InvalidRequest,
    Job,
    Json,
    Lost,
    ModelNotFound,
    NoWorkerFound,
    QMeshError,
    Refused,
    Sampling,
    Selected,
    Settings,
    Token,
    WireError,
    WorkerLost,
)

STORY = ("Once ", "upon ", "a ", "time ", "there ", "was ", "a ", "fox.")
WHOLE = "".join(STORY)
STALL_S = 0.4

pytestmark = pytest.mark.usefixtures("parting_without_waiting")


@dataclass(eq=False)
class Storyteller(ScriptedWorker):
    """Tells the story from where the request goes on; after `upto` words of its own it does what `then` says.

    fingerprint: of its model, as its status tells it.
    """

    script: Script = IS_SILENT  # replaced
    upto: int = len(STORY)
    then: Script | None = None
    fingerprint: str = FINGERPRINT.hex()
    told: list[int] = field(default_factory=list)  # how many words each time

    def __post_init__(self) -> None:
        self.script = self._tell
        queue = {"active": 0, "waiting": 0, "capacity": 16}
        models = [{"name": self.model, "fingerprint": self.fingerprint}]
        self.status = {"health": health_of(self.score), "slots": 4, "queue": queue, "speed": 1.0, "models": models}

    async def _tell(self, connection: Connection, request_id: str) -> bool:
        resume = self.prompts[-1].get("resume", {"tokens": []})["tokens"]
        assert resume == list(range(len(resume))), "what it goes on with is not what was told"
        words = range(len(resume), len(STORY))[: self.upto]
        self.told.append(len(words))
        for seq in words:
            await connection.send(token_frame(request_id, seq, STORY[seq]))
        if self.then is not None:
            return await self.then(connection, request_id)
        await connection.send(result_frame(request_id, WHOLE, len(STORY)))
        return True


class Reader:
    """Follows one answer, and sees that nothing is lost or told twice."""

    def __init__(self) -> None:
        self.events: list[qmesh.Progressed] = []
        self.text = ""
        self._seq = 0

    async def follow(self, mesh: Client, job: Job, **options: Any) -> Answer:
        async with contextlib.aclosing(mesh.run(job, **options)) as events:
            async for event in events:
                self.events.append(event)
                if isinstance(event, Token):
                    assert event.seq == self._seq
                    self._seq += len(event.tokens)
                    self.text += event.text
        last = self.events[-1]
        assert isinstance(last, Answer)
        assert sum(isinstance(event, Answer) for event in self.events) == 1
        assert last.result.text == self.text
        return last

    @property
    def lost(self) -> list[Lost]:
        return [event for event in self.events if isinstance(event, Lost)]

    @property
    def selected(self) -> list[str]:
        return [event.worker_id for event in self.events if isinstance(event, Selected)]


def a_job(*, timeout_s: float = PATIENCE_S, **more: Any) -> Job:
    params = Sampling(max_tokens=100, temperature=0)
    return Job(secrets.token_hex(8), prompt="Tell me a story.", params=params, timeout_s=timeout_s, **more)


def in_order(*workers: Callable[[float], Storyteller]) -> list[Storyteller]:
    """Workers of which the client prefers each to the one behind it."""
    return [make(90.0 - 10 * place) for place, make in enumerate(workers)]


def teller(upto: int = len(STORY), then: Script | None = None, **more: Any) -> Callable[[float], Storyteller]:
    return lambda score: Storyteller(score=score, upto=upto, then=then, **more)


# --- Going on ---


@pytest.mark.parametrize("upto", range(1, len(STORY) + 1))
@in_a_loop
async def test_when_a_worker_dies_the_next_goes_on_behind_its_last_word(topic: str, tmp_path: Path, upto: int) -> None:
    dying, living = in_order(teller(upto, HANGS_UP), teller())
    async with mesh_of(topic, tmp_path, dying, living) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job())
    assert reader.text == WHOLE
    assert sum(dying.told) + sum(living.told) == len(STORY)
    assert answer.failovers == (1 if living.told else 0)


@in_a_loop
async def test_any_number_of_workers_may_die_one_after_another(topic: str, tmp_path: Path) -> None:
    workers = in_order(*[teller(2, refuses(Refused("draining", "draining")))] * 3, teller())
    async with mesh_of(topic, tmp_path, *workers) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job())
    assert [worker.told for worker in workers] == [[2], [2], [2], [2]]
    assert answer.failovers == 3
    assert reader.selected == [str(worker.worker_id) for worker in workers]
    assert [(lost.worker_id, lost.tokens) for lost in reader.lost] == [
        (str(worker.worker_id), 2 * place) for place, worker in enumerate(workers[:3], 1)
    ]
    assert [lost.reason for lost in reader.lost] == ["draining"] * 3
    assert answer.to_json()["failovers"] == 3


@in_a_loop
async def test_the_same_question_with_the_same_seed_is_sent_to_who_goes_on(topic: str, tmp_path: Path) -> None:
    first, second = in_order(teller(3, refuses()), teller())
    async with mesh_of(topic, tmp_path, first, second) as mesh:
        await Reader().follow(mesh, a_job())
    (asked,), (again,) = first.prompts, second.prompts
    assert "resume" not in asked
    assert again.pop("resume") == {"tokens": [0, 1, 2], "fingerprint": FINGERPRINT.hex()}
    assert 0 < again.pop("timeout_s") < asked.pop("timeout_s")
    assert again == asked
    assert asked["params"]["seed"] >= 0


@in_a_loop
async def test_a_broken_connection_is_mended_before_another_worker_is_asked(topic: str, tmp_path: Path) -> None:
    flaky, other = in_order(teller(3, HANGS_UP), teller())
    async with mesh_of(topic, tmp_path, flaky, other) as mesh:
        tell = flaky.script

        async def once(connection: Connection, request_id: str) -> bool:
            flaky.then = HANGS_UP if not flaky.told else None
            flaky.upto = 3 if not flaky.told else len(STORY)
            return await tell(connection, request_id)

        flaky.script = once
        reader = Reader()
        answer = await reader.follow(mesh, a_job())
    assert (flaky.told, other.told) == ([3, 5], [])
    assert answer.failovers == 0
    assert reader.selected == [str(flaky.worker_id)]


@in_a_loop
async def test_a_worker_that_falls_silent_in_the_middle_is_given_up_before_the_deadline(
    topic: str, tmp_path: Path
) -> None:
    silent, living = in_order(teller(3, IS_SILENT), teller())
    async with mesh_of(topic, tmp_path, silent, living, stall_s=STALL_S) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
        assert reader.text == WHOLE
        assert f"was silent for {STALL_S:g} s" in reader.lost[0].reason


@in_a_loop
async def test_who_gives_signs_of_life_is_waited_for(topic: str, tmp_path: Path) -> None:
    async def slowly(connection: Connection, request_id: str) -> bool:
        for _ in range(12):
            await asyncio.sleep(STALL_S / 4)
            await connection.send({"type": "inference_alive", "request_id": request_id})
        await connection.send(result_frame(request_id, STORY[0], 1))
        return True

    slow, other = in_order(teller(1, slowly), teller())
    async with mesh_of(topic, tmp_path, slow, other, stall_s=STALL_S) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
    assert (reader.lost, other.prompts) == ([], [])


@in_a_loop
async def test_what_else_is_asked_of_a_silent_worker_goes_on_elsewhere_too(topic: str, tmp_path: Path) -> None:
    silent, living = in_order(teller(3, IS_SILENT), teller())
    async with mesh_of(topic, tmp_path, silent, living, stall_s=STALL_S) as mesh:
        readers = [Reader() for _ in range(8)]
        await asyncio.gather(*(reader.follow(mesh, a_job()) for reader in readers))
    assert {reader.text for reader in readers} == {WHOLE}


@in_a_loop
async def test_the_end_of_a_text_that_no_token_showed_is_told_once(topic: str, tmp_path: Path) -> None:
    def ends(connection: Connection, request_id: str) -> Any:
        return sends(result_frame(request_id, f"{WHOLE}.", len(STORY)))(connection, request_id)

    dying, living = in_order(teller(len(STORY), refuses()), teller(0, ends))
    async with mesh_of(topic, tmp_path, dying, living) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
    assert reader.text == f"{WHOLE}."


# --- Who may go on ---


@in_a_loop
async def test_only_a_worker_with_the_same_model_goes_on(topic: str, tmp_path: Path) -> None:
    other_model = refuses(ModelNotFound("the answer was begun with another model"))
    dying, lacking, living = in_order(teller(3, refuses()), teller(0, other_model), teller())
    async with mesh_of(topic, tmp_path, dying, lacking, living) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job())
    assert reader.text == WHOLE
    assert (lacking.told, answer.failovers) == ([0], 1)


@in_a_loop
async def test_a_worker_with_less_room_than_the_answer_needs_by_now_is_passed_over(topic: str, tmp_path: Path) -> None:
    too_small = refuses(InvalidRequest("the prompt has too many tokens", "context_exceeded"))
    dying, small, large = in_order(teller(3, refuses()), teller(0, too_small), teller())
    async with mesh_of(topic, tmp_path, dying, small, large) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
    assert reader.text == WHOLE


@pytest.mark.parametrize("code", ["invalid_request", "context_exceeded"])
@in_a_loop
async def test_what_no_worker_can_answer_is_not_asked_twice(topic: str, tmp_path: Path, code: str) -> None:
    first, second = in_order(*[teller(0, refuses(InvalidRequest("no", code)))] * 2)
    async with mesh_of(topic, tmp_path, first, second) as mesh:
        with pytest.raises(InvalidRequest):
            await mesh.ask(a_job())
    assert len(first.prompts) + len(second.prompts) == 1


@pytest.mark.parametrize(
    "end",
    [
        HANGS_UP,
        sends({"type": "inference_queued", "position": 0, "wait_s": 1.0}, hangs_up=True),
        refuses(WorkerLost("the worker's engine failed")),
    ],
    ids=["without a word", "in the queue", "by its own word"],
)
@in_a_loop
async def test_a_request_that_takes_one_worker_after_another_down_is_given_up(
    topic: str, tmp_path: Path, end: Script
) -> None:
    workers = in_order(*[teller(0, end)] * (qmesh.MAX_LOSSES + 2))
    async with mesh_of(topic, tmp_path, *workers) as mesh:
        with pytest.raises(WorkerLost, match="it may be what they fail at"):
            await mesh.ask(a_job())
    assert sum(len(worker.prompts) for worker in workers) == qmesh.MAX_LOSSES


@in_a_loop
async def test_a_worker_whose_connection_was_mended_is_asked_again_without_a_search(topic: str, tmp_path: Path) -> None:
    (flaky,) = in_order(teller(3))

    async def hangs_up_once(connection: Connection, request_id: str) -> bool:
        flaky.then, flaky.upto = None, len(STORY)
        return False

    flaky.then = hangs_up_once
    async with mesh_of(topic, tmp_path, flaky) as mesh:
        await Reader().follow(mesh, a_job())
        assert [record.worker_id for record in mesh.records()] == [flaky.worker_id]
        assert (await mesh.ask(a_job())).result.text == WHOLE


@pytest.mark.parametrize("upto", [0, 3])
@in_a_loop
async def test_when_the_only_worker_drains_hope_ends(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upto: int
) -> None:
    monkeypatch.setattr(qmesh, "PATIENCE_S", 0.5)
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 0.5)
    (draining,) = in_order(teller(upto))

    async def drains(connection: Connection, request_id: str) -> bool:
        draining.status, draining.then = NO_STATUS, HANGS_UP
        await connection.send(qmesh.error_frame(request_id, Refused("I go", "draining")))
        return False

    draining.then = drains
    async with mesh_of(topic, tmp_path, draining) as mesh, asyncio.timeout(PATIENCE_S / 2):
        with pytest.raises(WorkerLost if upto else NoWorkerFound):
            await mesh.ask(a_job())


@in_a_loop
async def test_that_the_only_worker_with_a_model_is_lost_does_not_mean_that_there_is_no_such_model(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 0.5)
    (dying, other) = in_order(teller(0), teller(model="another"))

    async def dies(connection: Connection, request_id: str) -> bool:
        dying.status = NO_STATUS
        return False

    dying.then = dies
    async with mesh_of(topic, tmp_path, dying, other) as mesh:
        with pytest.raises(NoWorkerFound):
            await mesh.ask(a_job(model="tiny"))


@in_a_loop
async def test_who_closes_a_client_ends_what_runs_on_it(topic: str, tmp_path: Path) -> None:
    (silent,) = in_order(teller(1, IS_SILENT))
    async with silent.on(topic):
        async with client_of(topic, tmp_path) as mesh:
            stream = mesh.stream("Tell me a story.")
            await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
        with pytest.raises(WorkerLost):
            await waiting
        assert (silent.connections, len(silent.prompts)) == (1, 1)


@in_a_loop
async def test_when_nobody_can_go_on_it_is_said_how_far_it_came(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "PATIENCE_S", 0.5)
    (dying,) = in_order(teller(3, IS_SILENT))

    async def then_vanishes(connection: Connection, request_id: str) -> bool:
        dying.upto, dying.status = 0, NO_STATUS
        return False

    dying.then = then_vanishes
    async with mesh_of(topic, tmp_path, dying) as mesh:
        reader = Reader()
        with pytest.raises(WorkerLost, match="after 3 tokens, and none is left that could go on"):
            await reader.follow(mesh, a_job())
    assert reader.text == "".join(STORY[:3])


@in_a_loop
async def test_an_answer_that_was_begun_waits_for_somebody_who_can_go_on(topic: str, tmp_path: Path) -> None:
    dying, late = in_order(teller(3), teller())
    asked_again = asyncio.Event()

    async def drains(connection: Connection, request_id: str) -> bool:
        dying.upto = 0
        if len(dying.prompts) > 1:  # there is nobody else
            asked_again.set()
        return await refuses(Refused("I go", "draining"))(connection, request_id)

    dying.then = drains
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(mesh_of(topic, tmp_path, dying))
        reader = Reader()
        following = asyncio.create_task(reader.follow(mesh, a_job()))
        await asked_again.wait()
        await stack.enter_async_context(late.on(topic))
        answer = await following
    assert reader.text == WHOLE
    assert answer.failovers == 1


# --- Workers that make no sense ---

AFTER_THREE: dict[str, Json] = {
    "a token that was told": token_frame("", 2, STORY[2]),
    "a token too far": token_frame("", 4, STORY[4]),
    "no token": qmesh.Token(3, (), "time ").to_json(""),
    "more tokens than were asked for": qmesh.Token(3, tuple(range(3, 200)), "time ").to_json(""),
    "tokens that are none": {**token_frame("", 3, "x"), "tokens": "x"},
    "an end that is not the sum": result_frame("", "Twice upon a", 3),
    "an end that counts otherwise": result_frame("", "".join(STORY[:3]), 7),
    "an end that makes no sense": {"type": "inference_result", "text": "a"},
    "something else": {"type": "status_response"},
}


@pytest.mark.parametrize("name", AFTER_THREE)
@in_a_loop
async def test_who_breaks_the_order_of_tokens_is_left_for_another(topic: str, tmp_path: Path, name: str) -> None:
    mad, living = in_order(teller(3, sends(AFTER_THREE[name])), teller())
    async with mesh_of(topic, tmp_path, mad, living) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job())
        assert reader.text == WHOLE
        assert (mad.told, living.told) == ([3], [5])
        assert answer.failovers == 1
        await Reader().follow(mesh, a_job())  # it is avoided from then on
        assert mad.told == [3]


@in_a_loop
async def test_what_is_said_of_another_request_is_not_heard(topic: str, tmp_path: Path) -> None:
    async def strays(connection: Connection, request_id: str) -> bool:
        await connection.send(token_frame("another", 3, "never "))
        for seq in range(3, len(STORY)):
            await connection.send(token_frame(request_id, seq, STORY[seq]))
        await connection.send(result_frame(request_id, WHOLE, len(STORY)))
        return True

    async with mesh_of(topic, tmp_path, *in_order(teller(3, strays))) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
    assert reader.text == WHOLE


@in_a_loop
async def test_a_mesh_of_nothing_but_nonsense_is_an_error(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, *in_order(teller(0, sends({"type": "welcome"})))) as mesh:
        with pytest.raises(WireError):
            await mesh.ask(a_job(timeout_s=1))


# --- Hedging ---


@in_a_loop
async def test_a_second_worker_is_asked_when_the_first_token_is_late_and_the_loser_is_told(
    topic: str, tmp_path: Path
) -> None:
    late, quick = in_order(teller(0, IS_SILENT), teller())
    async with mesh_of(topic, tmp_path, late, quick) as mesh:
        reader = Reader()
        job = a_job()
        answer = await reader.follow(mesh, job, hedge_s=0.1)
        async with asyncio.timeout(PATIENCE_S):
            assert await late.cancelled.get() == job.request_id
    assert reader.text == WHOLE
    assert reader.selected == [str(late.worker_id), str(quick.worker_id)]
    assert answer.failovers == 0


@in_a_loop
async def test_while_the_first_token_is_in_time_nobody_else_is_asked(topic: str, tmp_path: Path) -> None:
    first, second = in_order(teller(), teller())
    async with mesh_of(topic, tmp_path, first, second) as mesh:
        await Reader().follow(mesh, a_job(), hedge_s=PATIENCE_S)
    assert (len(first.prompts), len(second.prompts)) == (1, 0)


@in_a_loop
async def test_a_hedge_without_a_second_worker_is_none(topic: str, tmp_path: Path) -> None:
    async def later(connection: Connection, request_id: str) -> bool:
        await asyncio.sleep(0.3)
        await connection.send(token_frame(request_id, 0, "late"))
        await connection.send(result_frame(request_id, "late", 1))
        return True

    async with mesh_of(topic, tmp_path, *in_order(teller(0, later))) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job(), hedge_s=0.05)
    assert reader.text == "late"


@pytest.mark.parametrize("failing", [refuses(), HANGS_UP, sends({"type": "welcome"})], ids=["refuses", "dies", "mad"])
@in_a_loop
async def test_a_hedge_that_fails_leaves_the_first_alone(topic: str, tmp_path: Path, failing: Script) -> None:
    gate = asyncio.Event()

    async def when_the_other_failed(connection: Connection, request_id: str) -> bool:
        await gate.wait()
        for seq, word in enumerate(STORY):
            await connection.send(token_frame(request_id, seq, word))
        await connection.send(result_frame(request_id, WHOLE, len(STORY)))
        return True

    async def fails(connection: Connection, request_id: str) -> bool:
        gate.set()
        return await failing(connection, request_id)

    first, second = in_order(teller(0, when_the_other_failed), teller(0, fails))
    async with mesh_of(topic, tmp_path, first, second) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job(), hedge_s=0.05)
    assert (reader.text, answer.failovers, reader.lost) == (WHOLE, 0, [])
    assert (len(first.prompts), len(second.prompts)) == (1, 1)


@in_a_loop
async def test_where_both_of_a_race_refuse_the_right_one_is_blamed(topic: str, tmp_path: Path) -> None:
    both = asyncio.Barrier(2)

    async def refuse_together(connection: Connection, request_id: str) -> bool:
        await both.wait()
        return await refuses()(connection, request_id)

    first, second, free = in_order(teller(0, refuse_together), teller(0, refuse_together), teller())
    async with mesh_of(topic, tmp_path, first, second, free) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job(), hedge_s=0.05)
    assert reader.text == WHOLE
    assert (len(first.prompts), len(free.prompts)) == (1, 1)


@in_a_loop
async def test_with_a_hedge_a_worker_that_dies_later_is_replaced_as_ever(topic: str, tmp_path: Path) -> None:
    late, dying, living = in_order(teller(0, IS_SILENT), teller(3, refuses()), teller())
    async with mesh_of(topic, tmp_path, late, dying, living, stall_s=STALL_S) as mesh:
        reader = Reader()
        answer = await reader.follow(mesh, a_job(), hedge_s=0.05)
    assert reader.text == WHOLE
    assert answer.failovers == 1
    assert [lost.worker_id for lost in reader.lost] == [str(dying.worker_id)]


# --- The library's face ---


@in_a_loop
async def test_the_text_comes_piece_by_piece_and_then_the_answer(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, *in_order(teller())) as mesh:
        stream = mesh.stream("Tell me a story.", system="Be brief.", max_tokens=100, stop=("###",))
        assert tuple([text async for text in stream]) == STORY
        assert stream.answer.result.text == WHOLE


@in_a_loop
async def test_there_is_no_answer_before_its_end(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, *in_order(teller(1, IS_SILENT))) as mesh:
        stream = mesh.stream("Tell me a story.")
        assert await anext(stream) == STORY[0]
        with pytest.raises(WorkerLost, match="not come to its end"):
            _ = stream.answer
        await stream.aclose()


@in_a_loop
async def test_who_leaves_a_stream_early_cancels_it(topic: str, tmp_path: Path) -> None:
    (worker,) = in_order(teller(1, IS_SILENT))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        async with contextlib.aclosing(mesh.stream("Tell me a story.")) as stream:
            await anext(stream)
        async with asyncio.timeout(PATIENCE_S):
            assert await worker.cancelled.get() == worker.prompts[0]["request_id"]


@in_a_loop
async def test_what_a_question_may_say_is_sent_along(topic: str, tmp_path: Path) -> None:
    (worker,) = in_order(teller())
    async with mesh_of(topic, tmp_path, worker) as mesh:
        turns: list[qmesh.Message | Json] = [qmesh.Message("user", "Hi"), qmesh.Message("assistant", "Hello")]
        turns.append({"role": "user", "content": "A story!"})
        await mesh.ask(turns, system="Be brief.", model="tiny", timeout_s=5, temperature=0.5, seed=7)
    (asked,) = worker.prompts
    assert [message["content"] for message in asked["messages"]] == ["Be brief.", "Hi", "Hello", "A story!"]
    assert asked["model"] == "tiny"
    assert asked["timeout_s"] <= 5
    assert (asked["params"]["temperature"], asked["params"]["seed"]) == (0.5, 7)


WRONG: list[dict[str, Any]] = [
    {"temperature": -1},
    {"colour": "red"},
    {"max_tokens": "many"},
    {"system": 5},
    {"timeout_s": "x"},
    {"hedge_s": -1},
    {"hedge_s": "x"},
]


@pytest.mark.parametrize("wrong", WRONG)
@in_a_loop
async def test_a_question_that_makes_no_sense_is_an_error_at_once(
    topic: str, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    async with Client(Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))) as mesh:
        with pytest.raises(InvalidRequest):
            mesh.stream("Tell me a story.", **wrong)


def test_a_setting_of_the_environment_that_makes_no_sense_is_a_usage_error() -> None:
    with pytest.raises(qmesh.UsageError, match="QMESH_PORT"):
        Client(environ={"QMESH_PORT": "many"})


@pytest.mark.parametrize("prompt", [None, 5, ["hi"], [{"role": "robot", "content": "hi"}], []])
@in_a_loop
async def test_what_is_no_question_is_an_error_at_once(topic: str, tmp_path: Path, prompt: Any) -> None:
    async with Client(Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))) as mesh:
        with pytest.raises(InvalidRequest):
            mesh.stream(prompt)


@in_a_loop
async def test_a_client_is_used_while_it_is_open(topic: str, tmp_path: Path) -> None:
    mesh = client_of(topic, tmp_path)
    with pytest.raises(qmesh.UsageError, match="is not open"):
        await mesh.ask("Hello?")
    async with mesh:
        pass
    with pytest.raises(qmesh.UsageError, match="is not open"):
        await mesh.ask("Hello?")


@in_a_loop
async def test_who_waits_for_a_worker_is_told_why(topic: str, tmp_path: Path) -> None:
    refusing = refuses(Refused("I am full"))
    (full,) = in_order(teller(3, refusing))

    async def then_free(connection: Connection, request_id: str) -> bool:
        full.upto = 0
        if len(full.prompts) > 2:
            full.then, full.upto = None, len(STORY)
        return await refusing(connection, request_id)

    full.then = then_free
    async with mesh_of(topic, tmp_path, full) as mesh:
        reader = Reader()
        await reader.follow(mesh, a_job())
    reasons = [event.reason for event in reader.events if isinstance(event, qmesh.Waiting)]
    assert reader.text == WHOLE
    assert reasons
    assert set(reasons) == {"I am full"}


@contextlib.contextmanager
def in_a_thread(topic: str, worker: ScriptedWorker) -> Any:
    """A worker on a loop of its own, for a client that blocks."""
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def work() -> None:
        async with worker.on(topic):
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(work()))
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(PATIENCE_S)
        loop.close()


def test_a_program_without_asyncio_has_the_same(topic: str, tmp_path: Path) -> None:
    (worker,) = in_order(teller())
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))
    with in_a_thread(topic, worker), qmesh.BlockingClient(settings) as mesh:
        stream = mesh.stream("Tell me a story.")
        assert tuple(stream) == STORY
        assert stream.answer.result.text == WHOLE
        assert mesh.ask("Tell me a story.").result.text == WHOLE
        assert [status["worker_id"] for status in mesh.statuses()] == [str(worker.worker_id)]
        with pytest.raises(InvalidRequest):
            mesh.ask("Tell me a story.", temperature=-1)
        with contextlib.closing(mesh.stream("Tell me a story.")) as left:
            assert next(left) == STORY[0]


def test_a_blocking_client_is_used_while_it_is_open(topic: str, tmp_path: Path) -> None:
    mesh = qmesh.BlockingClient(Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path)))
    with pytest.raises(qmesh.UsageError, match="is not open"):
        mesh.ask("Hello?")
    with mesh:
        pass
    with pytest.raises(qmesh.UsageError, match="is not open"):
        mesh.statuses()
    with pytest.raises(qmesh.UsageError, match="opened once"), mesh:
        pass


def test_who_waits_in_another_thread_is_told_that_the_client_was_closed(topic: str, tmp_path: Path) -> None:
    (worker,) = in_order(teller(1, IS_SILENT))
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))
    with in_a_thread(topic, worker), ThreadPoolExecutor(1) as pool:
        with qmesh.BlockingClient(settings) as mesh:
            stream = mesh.stream("Tell me a story.")
            assert next(stream) == STORY[0]
            waiting = pool.submit(next, stream)
        with pytest.raises(WorkerLost):
            waiting.result(PATIENCE_S)


@pytest.mark.parametrize("hedge_s", [None, 0.1])
def test_an_interrupt_comes_through_and_leaves_the_stream_in_order(
    topic: str, tmp_path: Path, hedge_s: float | None
) -> None:
    (worker,) = in_order(teller(0, IS_SILENT))
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with in_a_thread(topic, worker), qmesh.BlockingClient(settings) as mesh:
        later = threading.Timer(0.5, interrupt)
        later.start()
        with pytest.raises(KeyboardInterrupt), contextlib.closing(mesh.stream("A story!", hedge_s=hedge_s)) as stream:
            next(stream)
        later.join()


def test_a_blocking_client_that_finds_nobody_says_so_and_ends(topic: str, tmp_path: Path) -> None:
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path), timeout_s=0.3)
    with qmesh.BlockingClient(settings) as mesh, pytest.raises(QMeshError, match="no worker was found"):
        mesh.ask("Hello?")


@in_a_loop
async def test_events_can_be_stopped_from_outside_and_the_worker_is_told(topic: str, tmp_path: Path) -> None:
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))

    def listen(worker: ScriptedWorker) -> list[qmesh.Progressed]:
        with qmesh.BlockingClient(settings) as mesh:
            events = mesh.run(qmesh.new_job("Hi"))
            heard: list[qmesh.Progressed] = []
            for event in events:
                heard.append(event)
                if isinstance(event, Token):
                    events.stop()
            assert next(events, None) is None
            return heard

    worker = ScriptedWorker(sends(token_frame("", 0, "one ")))
    async with worker.on(topic):
        heard = await asyncio.to_thread(listen, worker)
        assert await asyncio.wait_for(worker.cancelled.get(), PATIENCE_S) == worker.prompts[0]["request_id"]
    assert isinstance(heard[-1], Token)


@in_a_loop
async def test_events_raise_what_the_client_raises_and_tell_of_a_closed_one(topic: str, tmp_path: Path) -> None:
    settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))

    def listen() -> None:
        mesh = qmesh.BlockingClient(settings)
        with pytest.raises(qmesh.UsageError, match="not open"):
            mesh.run(qmesh.new_job("Hi"))
        with mesh:
            with pytest.raises(ModelNotFound):
                list(mesh.run(qmesh.new_job("Hi", model="gpt-17")))
            events = mesh.run(qmesh.new_job("Hi"))
            assert isinstance(next(events), qmesh.Discovered)
        with pytest.raises(WorkerLost, match="the client is closed"):
            list(events)

    async with ScriptedWorker(IS_SILENT).on(topic):
        await asyncio.to_thread(listen)
