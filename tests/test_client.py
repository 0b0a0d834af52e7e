"""Client: real workers, and scripted ones on the real wire that refuse, lie, fall silent and die."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
from loop import PATIENCE_S, in_a_loop
from members import member, node_key
from scripted_worker import (
    HANGS_UP,
    IS_SILENT,
    NO_STATUS,
    ScriptedWorker,
    announced,
    client_of,
    health_of,
    in_turn,
    mesh_of,
    record_of,
    refuses,
    result_frame,
    says,
    sends,
    token_frame,
    until_known,
)

import qmesh
from qmesh import (
    LOOPBACK,
    Answer,
    Client,
    DeadlineExceeded,
    Discovered,
    InvalidRequest,
    Job,
    Json,
    ModelNotFound,
    NodeId,
    NoWorkerFound,
    QMeshError,
    Queued,
    Refused,
    Sampling,
    Selected,
    Settings,
    Token,
    WireError,
)

pytestmark = pytest.mark.usefixtures("parting_without_waiting")


def job(*, timeout_s: float = PATIENCE_S, prompt: str = "1 2 3 4 5 6", **more: Any) -> Job:
    params = Sampling(max_tokens=8, temperature=0)
    return Job(secrets.token_hex(8), prompt=prompt, params=params, timeout_s=timeout_s, **more)


class Stopwatch:
    def __init__(self) -> None:
        self._started = asyncio.get_running_loop().time()

    @property
    def seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._started


# --- Real workers ---


@in_a_loop
async def test_what_happens_on_the_way_to_an_answer_is_told_in_order(two_workers: harness.Mesh) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        events = [event async for event in mesh.run(job())]
        discovered, selected, *pieces, answer = events
        assert isinstance(discovered, Discovered)
        assert 1 <= discovered.workers <= 2  # they have only just started, and may not know each other yet
        assert isinstance(selected, Selected)
        assert isinstance(answer, Answer)
        assert selected.worker_id == answer.result.worker_id
        assert selected.worker_id in [worker.worker_id for worker in two_workers.processes]
        assert all(isinstance(piece, Token) for piece in pieces)
        text = "".join(piece.text for piece in pieces if isinstance(piece, Token))
        assert text == answer.result.text != ""
        assert answer.result.usage["completion_tokens"] == 8
        assert 0 < answer.discover_ms < answer.first_token_ms < answer.total_ms


@in_a_loop
async def test_complete_returns_the_answer_whole(two_workers: harness.Mesh) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        body = (await mesh.ask(job())).to_json()
        assert body["text"] != ""
        assert body["finish_reason"] == "length"
        assert body["failovers"] == 0
        assert body["timings"]["total_ms"] >= body["timings"]["first_token_ms"] > 0


@in_a_loop
async def test_many_requests_at_once_are_all_answered(two_workers: harness.Mesh) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        answers = await asyncio.gather(*(mesh.ask(job()) for _ in range(6)))
        assert [answer.result.usage["completion_tokens"] for answer in answers] == [8] * 6


@in_a_loop
async def test_the_status_of_every_worker_is_told(two_workers: harness.Mesh) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        await until_known(mesh, 2)
        workers, silent = await mesh.statuses()
        expected = {worker.worker_id: worker.ready["tcp"] for worker in two_workers.processes}
        assert {status["worker_id"]: status["address"] for status in workers} == expected
        assert [status["worker_id"] for status in workers] == sorted(expected)
        assert silent == []


@in_a_loop
async def test_a_model_that_no_worker_has_is_not_found_and_those_that_exist_are_named(
    two_workers: harness.Mesh,
) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        model = two_workers.processes[0].ready["model"]
        with pytest.raises(ModelNotFound, match=f"no worker has the model gpt-17; the mesh has: {model}$"):
            await mesh.ask(job(model="gpt-17"))


@in_a_loop
async def test_what_a_worker_finds_wrong_with_a_request_is_raised(two_workers: harness.Mesh) -> None:
    async with client_of(two_workers.topic, two_workers.state_dir) as mesh:
        with pytest.raises(InvalidRequest, match=r"the prompt has .* tokens and this worker's context holds"):
            await mesh.ask(job(prompt="one two " * 1024))


# --- Nobody there ---


@in_a_loop
async def test_when_nobody_is_found_it_is_said_what_was_tried(topic: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind((LOOPBACK, 0))
        peer = f"{LOOPBACK}:{deaf.getsockname()[1]}"
        async with client_of(topic, tmp_path, peers=(peer,)) as mesh:
            with pytest.raises(NoWorkerFound) as caught:
                await mesh.ask(job(timeout_s=0.3))
    for tried in ("beacons on 127.0.0.1", str(qmesh.BEACON_PORT), topic, f"--peer {peer}"):
        assert tried in str(caught.value)


@in_a_loop
async def test_a_patient_request_is_not_a_reason_to_search_for_ever(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 0.3)
    async with client_of(topic, tmp_path) as mesh, asyncio.timeout(20):
        with pytest.raises(NoWorkerFound):
            await mesh.ask(job(timeout_s=300))


@in_a_loop
async def test_a_worker_that_joins_while_the_client_searches_is_found(topic: str, tmp_path: Path) -> None:
    async with client_of(topic, tmp_path) as mesh:
        asking = asyncio.create_task(mesh.ask(job()))
        await asyncio.sleep(0)  # the search begins
        async with ScriptedWorker(says("late")).on(topic):
            assert (await asking).result.text == "late"


@in_a_loop
async def test_a_client_that_was_open_for_long_finds_who_came_meanwhile_at_once(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BEACON_TIMES_S", (0.0, 0.05))  # and the next one ten seconds later
    async with client_of(topic, tmp_path) as mesh:
        with pytest.raises(NoWorkerFound):
            await mesh.ask(job(timeout_s=0.3))
        async with ScriptedWorker(says("hello")).on(topic):
            watch = Stopwatch()
            assert (await mesh.ask(job())).result.text == "hello"
            assert watch.seconds < qmesh.BEACON_PERIOD_S / 2


@in_a_loop
async def test_a_client_that_stays_open_goes_on_knowing_the_workers(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "ANNOUNCE_PERIOD_S", 0.05)
    monkeypatch.setattr(qmesh, "RECORD_TTL_S", 0.5)
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("hello"))) as mesh:
        watch = Stopwatch()
        while watch.seconds < 3 * qmesh.RECORD_TTL_S:
            assert mesh.records()
            await asyncio.sleep(0.05)


@in_a_loop
async def test_peers_that_were_met_are_remembered_for_the_next_time(topic: str, tmp_path: Path) -> None:
    async with ScriptedWorker(says("hello")).on(topic, beacons=False) as worker:
        host, port = worker.udp_address
        async with client_of(topic, tmp_path, peers=(f"{host}:{port}",)) as told:
            await told.ask(job())
        async with client_of(topic, tmp_path) as remembering:
            assert (await remembering.ask(job())).result.text == "hello"


# --- Whom it chooses ---


@in_a_loop
async def test_a_client_that_knows_nobody_yet_hears_of_all_before_it_chooses(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "DISCOVERY_GATHER_S", PATIENCE_S)  # what ends it is the search
    slow, slower, best = (ScriptedWorker(says("hello"), score=score) for score in (50, 40, 90))
    async with slow.on(topic), slower.on(topic), best.on(topic):
        known = 0
        async with asyncio.timeout(PATIENCE_S):  # until they know each other, too
            while known < 3:
                async with client_of(topic, tmp_path / secrets.token_hex(4)) as mesh:
                    await mesh.discover()
                    known = len(mesh.records())
        async with client_of(topic, tmp_path / "another") as mesh:
            await mesh.ask(job())
        assert (len(slow.prompts), len(slower.prompts), len(best.prompts)) == (0, 0, 1)


@in_a_loop
async def test_the_highest_fresh_score_wins_whatever_the_records_say(topic: str, tmp_path: Path) -> None:
    stale = ScriptedWorker(says("stale"), score=40, told_score=95)
    best = ScriptedWorker(says("best"), score=85, told_score=50)
    good = ScriptedWorker(says("good"), score=70, told_score=80)
    async with mesh_of(topic, tmp_path, stale, best, good) as mesh:
        events = [event async for event in mesh.run(job())]
        (selected,) = [event for event in events if isinstance(event, Selected)]
        assert (selected.worker_id, selected.health.score) == (str(best.worker_id), 85)
        assert (len(stale.prompts), len(best.prompts), len(good.prompts)) == (0, 1, 0)


@in_a_loop
async def test_equals_share_the_work(topic: str, tmp_path: Path) -> None:
    one, other = ScriptedWorker(says("1"), score=80), ScriptedWorker(says("2"), score=81)
    async with mesh_of(topic, tmp_path, one, other) as mesh:
        for _ in range(16):
            await mesh.ask(job())
        assert len(one.prompts) + len(other.prompts) == 16
        assert min(len(one.prompts), len(other.prompts)) >= 3


@in_a_loop
async def test_only_the_three_most_promising_are_asked_for_their_status(topic: str, tmp_path: Path) -> None:
    workers = [ScriptedWorker(says("hello"), score=score) for score in (90, 80, 70, 60, 50)]
    async with mesh_of(topic, tmp_path, *workers) as mesh:
        await mesh.ask(job())
        assert [worker.statuses for worker in workers] == [1, 1, 1, 0, 0]


@in_a_loop
async def test_when_the_most_promising_are_overloaded_by_now_the_next_are_asked(topic: str, tmp_path: Path) -> None:
    overloaded = [ScriptedWorker(says("no"), score=10, told_score=score) for score in (95, 90, 85)]
    free = ScriptedWorker(says("yes"), score=30)
    async with mesh_of(topic, tmp_path, *overloaded, free) as mesh:
        assert (await mesh.ask(job())).result.text == "yes"
        assert [worker.prompts for worker in overloaded] == [[], [], []]


def with_requests(count: int, *, score: float) -> ScriptedWorker:
    """A worker of four slots that has so many requests."""
    worker = ScriptedWorker(says("hello"), score=score)
    queue = {"active": min(count, 4), "waiting": max(0, count - 4), "capacity": 16}
    load = {"health": health_of(score), "slots": 4, "queue": queue, "speed": 1.0}
    worker.status = {**load, "models": [{"name": "tiny"}]}
    return worker


@in_a_loop
async def test_a_slot_that_is_free_goes_before_a_higher_score(topic: str, tmp_path: Path) -> None:
    idle, full = with_requests(3, score=70), with_requests(4, score=90)
    async with mesh_of(topic, tmp_path, idle, full) as mesh:
        await mesh.ask(job())
    assert (len(idle.prompts), len(full.prompts)) == (1, 0)


@in_a_loop
async def test_while_none_has_a_slot_free_more_are_asked(topic: str, tmp_path: Path) -> None:
    full = [with_requests(4, score=score) for score in (95, 90, 85, 80)]
    free = with_requests(0, score=60)
    async with mesh_of(topic, tmp_path, *full, free) as mesh:
        await mesh.ask(job())
    assert [len(worker.prompts) for worker in full] == [0] * 4
    assert len(free.prompts) == 1


@in_a_loop
async def test_where_no_slot_is_free_the_shortest_line_is_taken(topic: str, tmp_path: Path) -> None:
    workers = [with_requests(count, score=score) for count, score in ((7, 90), (5, 70), (5, 75), (6, 80))]
    async with mesh_of(topic, tmp_path, *workers) as mesh:
        await mesh.ask(job())
    assert [len(worker.prompts) for worker in workers] == [0, 0, 1, 0]


# --- Conversations ---

HELLO: list[Json] = [{"role": "user", "content": "Hello"}]
WENT_ON: list[Json] = [*HELLO, {"role": "assistant", "content": " Hi! "}, {"role": "user", "content": "How are you?"}]


async def in_two_turns(mesh: Client, first: ScriptedWorker) -> None:
    """A conversation that `first`, the best at its beginning, begins, and that goes on when it is the worse one."""
    first.score = 95
    await mesh.ask(HELLO)
    first.score = 70
    await mesh.ask(WENT_ON)


@in_a_loop
async def test_a_conversation_goes_on_where_its_context_is(topic: str, tmp_path: Path) -> None:
    one, other = ScriptedWorker(says("Hi", "!"), score=85), ScriptedWorker(says("Hi", "!"), score=85)
    async with mesh_of(topic, tmp_path, one, other) as mesh:
        await in_two_turns(mesh, one)
        assert (len(one.prompts), len(other.prompts)) == (2, 0)
        await mesh.ask([{"role": "user", "content": "Bye"}, *WENT_ON[1:]])  # another conversation
        assert (len(one.prompts), len(other.prompts)) == (2, 1)


@in_a_loop
async def test_so_does_one_whose_last_answer_was_cut(topic: str, tmp_path: Path) -> None:
    one, other = ScriptedWorker(says("Hi", "!"), score=95), ScriptedWorker(says("Hi", "!"), score=85)
    async with mesh_of(topic, tmp_path, one, other) as mesh:
        pieces = mesh.stream(HELLO)
        said = await anext(pieces)
        await pieces.aclose()
        one.score = 70
        await mesh.ask([*HELLO, {"role": "assistant", "content": said}, WENT_ON[-1]])
    assert (len(one.prompts), len(other.prompts)) == (2, 0)


@in_a_loop
async def test_an_answer_bears_the_id_that_its_worker_has_proved(topic: str, tmp_path: Path) -> None:
    """And not the one that it calls itself by."""
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("hello"))) as mesh:
        (record,) = mesh.records()
        assert (await mesh.ask(job())).result.worker_id == str(record.worker_id)


@pytest.mark.parametrize("change", [{"score": 50}, {"status": NO_STATUS}], ids=["busy", "silent"])
@in_a_loop
async def test_a_conversation_leaves_a_worker_that_is_not_healthy(topic: str, tmp_path: Path, change: Json) -> None:
    one, other = ScriptedWorker(says("Hi", "!"), score=90), ScriptedWorker(says("Hi", "!"), score=75)
    async with mesh_of(topic, tmp_path, one, other) as mesh:
        await mesh.ask(HELLO)
        for name, value in change.items():
            setattr(one, name, value)
        await mesh.ask(WENT_ON)
    assert (len(one.prompts), len(other.prompts)) == (1, 1)


@in_a_loop
async def test_a_conversation_does_not_wait_for_its_worker_while_another_has_a_slot_free(
    topic: str, tmp_path: Path
) -> None:
    one, other = with_requests(0, score=90), with_requests(0, score=75)
    one.script = other.script = says("Hi", "!")
    async with mesh_of(topic, tmp_path, one, other) as mesh:
        await mesh.ask(HELLO)
        one.status = with_requests(4, score=90).status
        await mesh.ask(WENT_ON)
    assert (len(one.prompts), len(other.prompts)) == (1, 1)


@in_a_loop
async def test_the_worker_that_is_asked_for_is_taken(topic: str, tmp_path: Path) -> None:
    best, wanted = ScriptedWorker(says("best"), score=95), ScriptedWorker(says("wanted"), score=40)
    async with mesh_of(topic, tmp_path, best, wanted) as mesh:
        for digits in (wanted.worker_id.short, wanted.worker_id.short.upper()):
            assert (await mesh.ask(job(), worker=digits)).result.text == "wanted"
        assert "".join([text async for text in mesh.stream("Hi", worker=str(wanted.worker_id))]) == "wanted"


@in_a_loop
async def test_a_worker_that_is_asked_for_and_not_there_is_an_error_that_names_those_that_are(
    topic: str, tmp_path: Path
) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("best"))) as mesh:
        (there,) = mesh.records()
        with pytest.raises(NoWorkerFound, match=f"no worker 000000; the mesh has: {there.worker_id.short}"):
            await mesh.ask(job(), worker="000000")
        for wrong in ("best", "abc", "g" * 64, "0" * 65, ""):
            with pytest.raises(InvalidRequest, match="6 or more of its id's first digits, not "):
                await mesh.ask(job(), worker=wrong)


@in_a_loop
async def test_when_the_worker_that_was_asked_for_is_lost_another_goes_on(topic: str, tmp_path: Path) -> None:
    wanted, other = ScriptedWorker(HANGS_UP, score=90), ScriptedWorker(says("other"), score=40)
    async with mesh_of(topic, tmp_path, wanted, other) as mesh:
        answer = await mesh.ask(job(), worker=wanted.worker_id.short)
        assert (answer.result.text, answer.failovers) == ("other", 1)


def test_who_had_a_slot_free_is_asked_first() -> None:
    full = replace(hint(1, "10.0.0.1", score=90), free_slots=0)
    free = hint(2, "10.0.0.2", score=50)
    assert qmesh.rank_workers([full, free], random.Random(0)) == [free, full]


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({"slots": 4, "queue": {"active": 3, "waiting": 0}}, 0),
        ({"slots": 4, "queue": {"active": 4, "waiting": 0}}, 0.25),
        ({"slots": 2, "queue": {"active": 2, "waiting": 3}}, 2),
        ({"slots": 0, "queue": {"active": 0, "waiting": 0}}, 1),
        ({}, math.inf),
        ({"slots": "many", "queue": {}}, math.inf),
    ],
)
def test_a_line_is_told_by_the_status(status: Json, line: float) -> None:
    assert qmesh.line_in(status) == line


@in_a_loop
async def test_only_workers_with_the_model_are_asked(topic: str, tmp_path: Path) -> None:
    other, right = ScriptedWorker(says("no"), score=99, model="big"), ScriptedWorker(says("yes"), model="tiny")
    async with mesh_of(topic, tmp_path, other, right) as mesh:
        assert (await mesh.ask(job(model="Tiny.gguf"))).result.text == "yes"
        assert other.statuses == 0


@in_a_loop
async def test_a_worker_whose_model_only_begins_like_the_one_wanted_is_passed_over(topic: str, tmp_path: Path) -> None:
    name = "a-model-of-many-words-that-says-all-about-itself-in-"  # longer than a record can tell
    other = ScriptedWorker(refuses(ModelNotFound("this worker has another")), score=99, model=f"{name}Q8")
    right = ScriptedWorker(says("yes"), score=50, model=f"{name}Q4")
    async with mesh_of(topic, tmp_path, other, right) as mesh:
        assert (await mesh.ask(job(model=f"{name}Q4"))).result.text == "yes"


@in_a_loop
async def test_a_worker_that_answers_under_another_id_is_not_used(topic: str, tmp_path: Path) -> None:
    impostor = ScriptedWorker(says("no"), score=99, tcp_key=node_key(666))
    honest = ScriptedWorker(says("yes"), score=50)
    async with mesh_of(topic, tmp_path, impostor, honest) as mesh:
        assert (await mesh.ask(job())).result.text == "yes"
        assert (impostor.statuses, impostor.prompts) == (0, [])


@in_a_loop
async def test_who_announces_anothers_id_keeps_nobody_from_that_worker(topic: str, tmp_path: Path) -> None:
    honest, met = ScriptedWorker(says("yes")), asyncio.Queue[str]()

    async def meet(connection: qmesh.Connection) -> None:
        met.put_nowait(connection.peer_id)

    liar = qmesh.TcpServer(meet, member(666, qmesh.MeshKeys.derive(topic)))
    _, port = await liar.start("127.0.0.2", 0)
    lie = replace(record_of(honest.worker_id, port, score=100), stamp=2**32 - 1000)
    lying = announced(topic, lie, host="127.0.0.2")
    async with honest.on(topic), lying as udp, client_of(topic, tmp_path, peers=(qmesh.format_address(udp),)) as mesh:
        async with asyncio.timeout(PATIENCE_S):
            while [record.address for record in mesh.records()] != [("127.0.0.2", port)]:
                await mesh.discover()
                await asyncio.sleep(0.01)
        assert (await mesh.ask(job())).result.text == "yes"
    await liar.stop()
    assert met.qsize() == 1  # it was seen through once, and not believed again


@in_a_loop
async def test_any_number_of_invented_workers_keeps_nobody_from_the_one_that_beacons(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "STATUS_TIMEOUT_S", 1.0)
    honest, silent = ScriptedWorker(says("yes"), score=30), socket.socket()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(silent)
        silent.bind(("127.0.0.2", 0))
        silent.listen()  # it accepts, and never says a word
        await stack.enter_async_context(honest.on(topic))
        peers = []
        for number in range(1, 10):
            record = record_of(NodeId(number), silent.getsockname()[1], score=100)
            announcing = announced(topic, record, beacons=False, host="127.0.0.2")
            peers.append(qmesh.format_address(await stack.enter_async_context(announcing)))
        mesh = await stack.enter_async_context(client_of(topic, tmp_path, peers=tuple(peers)))
        await until_known(mesh, 10)
        watch = Stopwatch()
        assert (await mesh.ask(job())).result.text == "yes"
        assert watch.seconds < 3 * qmesh.STATUS_TIMEOUT_S  # it is among the first who are asked


def hint(number: int, host: str, *, stamp: int = 1, score: int = 80) -> qmesh.WorkerRecord:
    return replace(record_of(NodeId(number), 47475, score=score), address=(host, 47475), stamp=stamp)


def test_of_a_workers_addresses_its_own_word_counts_most_then_that_which_leads_further() -> None:
    known = qmesh.KnownWorkers()
    known.heard_of([hint(1, LOOPBACK), hint(1, "10.0.0.9", stamp=9), hint(1, "10.0.0.1")], 0.0, own_word=False)
    assert [record.address[0] for record in known.records(1.0)] == ["10.0.0.9"]
    known.heard_of([hint(1, "10.0.0.1")], 1.0, own_word=True)
    assert [record.address[0] for record in known.records(1.0)] == ["10.0.0.1"]


def test_an_address_that_failed_comes_after_others_and_counts_again_once_heard_of() -> None:
    known, one, other = qmesh.KnownWorkers(), hint(1, "10.0.0.1"), hint(1, "10.0.0.2", stamp=9)
    known.heard_of([one], 0.0, own_word=True)
    known.failed(one, 1.0)
    assert known.records(1.0) == []
    known.heard_of([one, other], 2.0, own_word=False)
    assert known.records(2.0) == [other]
    known.failed(other, 3.0)
    known.heard_of([one], 4.0, own_word=True)
    assert known.records(4.0) == [one]


def test_where_somebody_else_answered_a_worker_is_not_looked_for_again_for_a_while() -> None:
    known, lie = qmesh.KnownWorkers(), hint(1, "10.0.0.66", stamp=2**32 - 1)
    known.heard_of([lie], 0.0, own_word=True)
    known.failed(lie, 0.0, is_another=True)
    known.heard_of([lie], 1.0, own_word=True)
    assert known.records(1.0) == []
    known.heard_of([lie], 40.0, own_word=True)
    assert known.records(40.0) == [lie]


def test_who_failed_lately_is_asked_last_and_one_that_spoke_for_itself_among_the_first() -> None:
    known = qmesh.KnownWorkers()
    records = [hint(number, f"10.0.0.{number}") for number in range(1, 8)]
    known.heard_of(records, 0.0, own_word=False)
    known.heard_of(records[5:6], 0.0, own_word=True)
    known.failed(records[0], 0.5)
    known.heard_of(records, 1.0, own_word=False)
    sound, failed = known.in_order(records, 1.0)
    assert [int(record.worker_id) for record in sound] == [2, 3, 6, 4, 5, 7]
    assert failed == records[:1]


def test_a_worker_that_fails_is_avoided_for_longer_each_time_until_it_serves_again() -> None:
    known, one = qmesh.KnownWorkers(), hint(1, "10.0.0.1")
    now = 0.0
    for avoided_s in (5.0, 10.0, 20.0, 40.0, 80.0, 80.0):
        known.heard_of([one], now, own_word=True)
        known.failed(one, now)
        assert known.in_order([one], now + avoided_s - 0.1) == ([], [one])
        now += avoided_s
        assert known.in_order([one], now) == ([one], [])
    known.heard_of([one], now - 1.0, own_word=True)
    known.failed(one, now)
    assert known.records(now) == []
    known.served(one)
    assert known.records(now) == [one]  # also where it was not heard of since it failed
    for _ in range(5):  # requests that all find the same
        known.failed(one, now)
    assert known.in_order([one], now + 5.0) == ([one], [])


@in_a_loop
async def test_the_name_of_a_model_that_a_peer_made_up_cannot_steer_a_terminal(topic: str, tmp_path: Path) -> None:
    evil = ScriptedWorker(says("no"), model="a\x1b]0;b\x07")
    async with mesh_of(topic, tmp_path, evil) as mesh:
        with pytest.raises(ModelNotFound) as caught:
            await mesh.ask(job(model="good"))
    assert "the mesh has: a?]0;b?" in str(caught.value)


# --- Refusals ---


@pytest.mark.parametrize("code", ["overloaded", "draining"])
@in_a_loop
async def test_when_one_worker_refuses_the_next_is_taken(topic: str, tmp_path: Path, code: str) -> None:
    full = ScriptedWorker(refuses(Refused("not now", code)), score=90)
    free = ScriptedWorker(says("hello"), score=70)
    async with mesh_of(topic, tmp_path, full, free) as mesh:
        events = [event async for event in mesh.run(job())]
        tried = [event.worker_id for event in events if isinstance(event, Selected)]
        assert tried == [str(full.worker_id), str(free.worker_id)]
        assert isinstance(events[-1], Answer)
        assert events[-1].result.text == "hello"
        assert len(full.prompts) == 1


@in_a_loop
async def test_when_all_refuse_they_are_tried_again_until_one_takes_it(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(in_turn(refuses(), refuses(), says("at last")))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        assert (await mesh.ask(job())).result.text == "at last"
        assert len(worker.prompts) == 3


@in_a_loop
async def test_when_all_refuse_to_the_end_their_refusal_is_raised_in_time(topic: str, tmp_path: Path) -> None:
    workers = [ScriptedWorker(refuses()), ScriptedWorker(refuses())]
    async with mesh_of(topic, tmp_path, *workers) as mesh:
        watch = Stopwatch()
        with pytest.raises(Refused, match="the queue is full"):
            await mesh.ask(job(timeout_s=1.5))
        assert watch.seconds < 10
        assert all(len(worker.prompts) > 1 for worker in workers)


@in_a_loop
async def test_a_worker_that_died_does_not_hide_that_the_other_is_overloaded(topic: str, tmp_path: Path) -> None:
    dying, busy = ScriptedWorker(HANGS_UP), ScriptedWorker(says("no"), score=10)
    async with mesh_of(topic, tmp_path, dying, busy) as mesh:
        with pytest.raises(Refused):
            await mesh.ask(job(timeout_s=1))


class Unhurried(random.Random):
    """Draws the longest pause there can be."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


@in_a_loop
async def test_a_pause_that_outlasts_the_deadline_does_not_hide_the_refusal(topic: str, tmp_path: Path) -> None:
    async with ScriptedWorker(refuses()).on(topic):
        settings = Settings(host=LOOPBACK, topic=topic, state_dir=str(tmp_path))
        async with Client(settings, environ={}, rng=Unhurried()) as mesh:
            await until_known(mesh, 1)
            with pytest.raises(Refused, match="the queue is full"):
                await mesh.ask(job(timeout_s=4 * qmesh.RETRY_FIRST_S))  # the second pause ends behind it


@in_a_loop
async def test_when_the_one_with_the_model_is_overloaded_another_without_it_does_not_hide_that(
    topic: str, tmp_path: Path
) -> None:
    name = "a-model-of-many-words-that-says-all-about-itself-in-"
    other = ScriptedWorker(refuses(ModelNotFound("this worker has another")), model=f"{name}Q8")
    right = ScriptedWorker(says("no"), score=10, model=f"{name}Q4")
    async with mesh_of(topic, tmp_path, other, right) as mesh:
        with pytest.raises(Refused):
            await mesh.ask(job(model=f"{name}Q4", timeout_s=0.5))


@in_a_loop
async def test_workers_that_are_overloaded_by_their_own_word_are_not_bothered(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(says("no"), score=10)
    async with mesh_of(topic, tmp_path, worker) as mesh:
        with pytest.raises(Refused, match="every worker is overloaded"):
            await mesh.ask(job(timeout_s=0.5))
        assert worker.prompts == []


@in_a_loop
async def test_each_try_is_given_only_the_time_that_is_left(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(in_turn(refuses(), says("hello")))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        await mesh.ask(job(timeout_s=50))
        first, second = (prompt["timeout_s"] for prompt in worker.prompts)
        assert 50 >= first > second > 0


# --- Workers that die or fall silent ---


@pytest.mark.parametrize(
    "script",
    [HANGS_UP, sends({"type": "inference_queued", "position": 0, "wait_s": 1.0}, hangs_up=True)],
    ids=["at once", "in the queue"],
)
@in_a_loop
async def test_a_worker_that_dies_before_its_first_token_costs_only_a_moment(
    topic: str, tmp_path: Path, script: Any
) -> None:
    dying = ScriptedWorker(script, score=90)
    living = ScriptedWorker(says("hello"), score=70)
    async with mesh_of(topic, tmp_path, dying, living) as mesh:
        assert (await mesh.ask(job())).result.text == "hello"
        assert len(dying.prompts) <= 2  # a request that it had taken is tried there once more
        assert len(living.prompts) == 1


@in_a_loop
async def test_when_the_only_worker_dies_nobody_is_left(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(HANGS_UP)) as mesh:
        with pytest.raises(NoWorkerFound, match="no worker is left that answers"):
            await mesh.ask(job(timeout_s=1))


@pytest.mark.parametrize("script", [IS_SILENT, sends(token_frame("", 0, "Once"))], ids=["at once", "in the middle"])
@in_a_loop
async def test_a_worker_that_falls_silent_is_given_up_at_the_deadline(
    topic: str, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "DEADLINE_GRACE_S", 0.1)
    async with mesh_of(topic, tmp_path, ScriptedWorker(script)) as mesh:
        watch = Stopwatch()
        with pytest.raises(DeadlineExceeded):
            await mesh.ask(job(timeout_s=0.5))
        assert 0.5 <= watch.seconds < 10


@in_a_loop
async def test_a_worker_that_never_greets_holds_nobody_beyond_the_deadline(topic: str, tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as deaf:  # connects, and is silent
        record = record_of(NodeId(5), deaf.getsockname()[1])
        async with announced(topic, record), client_of(topic, tmp_path) as mesh:
            watch = Stopwatch()
            with pytest.raises(QMeshError):
                await mesh.ask(job(timeout_s=0.5))
            assert watch.seconds < qmesh.HANDSHAKE_TIMEOUT_S


@in_a_loop
async def test_a_worker_that_never_greets_does_not_keep_a_request_from_another(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "STATUS_TIMEOUT_S", 0.3)
    with socket.create_server((LOOPBACK, 0)) as deaf:
        record = record_of(NodeId(5), deaf.getsockname()[1], score=99)
        living = ScriptedWorker(says("hello"), score=50)
        async with announced(topic, record), living.on(topic), client_of(topic, tmp_path) as mesh:
            await until_known(mesh, 2)
            assert (await mesh.ask(job(timeout_s=4))).result.text == "hello"


@in_a_loop
async def test_a_worker_that_gives_no_status_is_passed_over(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "STATUS_TIMEOUT_S", 0.3)
    mute = ScriptedWorker(says("no"), told_score=99, status=NO_STATUS)
    async with mesh_of(topic, tmp_path, mute, ScriptedWorker(says("hello"), score=50)) as mesh:
        assert (await mesh.ask(job(timeout_s=4))).result.text == "hello"
        assert (mute.statuses, mute.prompts) == (1, [])


# --- Workers that make no sense ---


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "inference_token", "seq": 0, "tokens": [1]},
        {"type": "inference_token", "seq": 0, "tokens": "x", "text": "a"},
        {**result_frame("", "a"), "usage": 5},
        {"type": "inference_result", "text": "a"},
        {"type": "inference_queued", "position": None, "wait_s": 1},
        {"type": "status_response"},
        {"type": "welcome"},
    ],
    ids=str,
)
@in_a_loop
async def test_an_answer_that_makes_no_sense_is_an_error_and_no_hang(topic: str, tmp_path: Path, frame: Json) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(sends(frame))) as mesh:
        watch = Stopwatch()
        with pytest.raises(WireError):
            await mesh.ask(job(timeout_s=1))
        assert watch.seconds < PATIENCE_S / 2


@pytest.mark.parametrize("code", ["internal", "cancelled", "nonsense", None, ["overloaded"]])
@in_a_loop
async def test_an_error_of_an_unknown_kind_is_raised_with_what_the_worker_said(
    topic: str, tmp_path: Path, code: object
) -> None:
    frame = {"type": "inference_error", "code": code, "message": "the engine failed"}
    async with mesh_of(topic, tmp_path, ScriptedWorker(sends(frame))) as mesh:
        with pytest.raises(QMeshError, match="the engine failed"):
            await mesh.ask(job())


MAD_STATUSES: dict[str, Json] = {
    "nothing": {},
    "no health": {"health": None},
    "half a health": {"health": {"score": 80}},
    "an unknown state": {"health": {**health_of(80), "state": "splendid"}},
    "a score over 100": {"health": {**health_of(80), "score": 900}},
    "a list": {"health": [80]},
}


@pytest.mark.parametrize("name", MAD_STATUSES)
@in_a_loop
async def test_a_worker_whose_status_makes_no_sense_is_passed_over(topic: str, tmp_path: Path, name: str) -> None:
    mad = ScriptedWorker(says("no"), told_score=99, status=MAD_STATUSES[name])
    async with mesh_of(topic, tmp_path, mad, ScriptedWorker(says("hello"), score=50)) as mesh:
        assert (await mesh.ask(job())).result.text == "hello"
        assert mad.prompts == []


@in_a_loop
async def test_when_the_only_status_makes_no_sense_that_is_an_error(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("no"), status={})) as mesh:
        with pytest.raises((WireError, NoWorkerFound)):
            await mesh.ask(job(timeout_s=1))


@in_a_loop
async def test_those_who_do_not_answer_are_told_apart_in_the_status_of_all(topic: str, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind((LOOPBACK, 0))
        port = closed.getsockname()[1]
        living = ScriptedWorker(says("hello"))
        record = record_of(NodeId(5), port)
        async with announced(topic, record), living.on(topic), client_of(topic, tmp_path) as mesh:
            await until_known(mesh, 2)
            workers, silent = await mesh.statuses()
    assert [status["health"] for status in workers] == [health_of(80)]
    (missing,) = silent
    assert (missing["worker_id"], missing["address"]) == (str(NodeId(5)), [LOOPBACK, port])
    assert "cannot be reached" in missing["error"]


@in_a_loop
async def test_a_status_without_a_health_counts_as_no_answer(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("no"), status={})) as mesh:
        workers, silent = await mesh.statuses()
        assert (workers, len(silent)) == ([], 1)


@in_a_loop
async def test_who_comes_while_others_are_known_is_soon_told_of_to_whoever_looks_again(
    topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sooner than a client that looks at nothing would hear of it, once its first beacons are over."""
    monkeypatch.setattr(qmesh, "BEACON_TIMES_S", (0.0, 0.25))
    one, later = ScriptedWorker(says("hello")), ScriptedWorker(says("hello"))
    async with mesh_of(topic, tmp_path, one) as mesh:
        await mesh.discover(everything=True)
        assert len((await mesh.statuses())[0]) == 1
        async with later.on(topic), asyncio.timeout(qmesh.ANNOUNCE_PERIOD_S / 2):
            while len((await mesh.statuses())[0]) < 2:
                pass


@in_a_loop
async def test_what_was_tried_in_vain_is_told_with_peers_whose_names_say_nothing(topic: str, tmp_path: Path) -> None:
    async with mesh_of(topic, tmp_path, ScriptedWorker(says("hello"))):
        pass  # whom it has met it remembers
    async with client_of(topic, tmp_path, peers=(".nowhere", "127.0.0.1:9")) as mesh:
        with pytest.raises(NoWorkerFound) as found:
            await mesh.discover(timeout_s=0.3)
    said = str(found.value)
    assert "tried: beacons on 127.0.0.1 " in said
    named = r"; --peer \.nowhere \(cannot be resolved: .+\); --peer 127\.0\.0\.1:9; 1 peer remembered from earlier$"
    assert re.search(named, said)


@in_a_loop
async def test_requests_are_counted_by_how_they_ended(topic: str, tmp_path: Path) -> None:
    answers = in_turn(says("hello"), refuses(InvalidRequest("no")), sends(token_frame("", 0, "Once")))
    tally = qmesh.ClientTally()
    async with mesh_of(topic, tmp_path, ScriptedWorker(answers)) as mesh:
        async for _ in mesh.run(job(), tally=tally):
            pass
        with pytest.raises(InvalidRequest):
            async for _ in mesh.run(job(), tally=tally):
                pass
        async with contextlib.aclosing(mesh.run(job(), tally=tally)) as events:
            while not isinstance(await anext(events), Token):
                pass
    assert dict(+tally.outcomes) == {"done": 1, "invalid_request": 1, "cancelled": 1}
    assert (tally.workers_lost, tally.failovers, tally.waits) == (0, 0, 0)
    names = [metric.name for metric in tally.metrics("qmesh_gateway")]
    assert names[-3:] == [f"qmesh_gateway_{what}_total" for what in ("workers_lost", "failovers", "waits")]


def a_search(meshes: int) -> tuple[qmesh.WorkerSearch, asyncio.Queue[bool], Callable[[], bool]]:
    """One that tells when it begins, and for everything or not; and whether it is done, asked anew each time."""
    begun: asyncio.Queue[bool] = asyncio.Queue()
    search = qmesh.WorkerSearch(begun.put_nowait, meshes)
    return search, begun, functools.partial(getattr, search, "is_done")


@in_a_loop
async def test_a_search_for_all_workers_is_waited_for_though_one_for_the_first_few_has_ended() -> None:
    search, begun, is_done = a_search(2)
    search.start()
    search.start()  # as it is under way, that is no second one
    async with asyncio.timeout(PATIENCE_S):
        assert await begun.get() is False
        search.ended_in_one(0)
        assert not is_done()
        search.ended_in_one(1)
        assert is_done()
        assert search.want_everything()
        assert not is_done()
        assert await begun.get() is True
    assert not search.want_everything()
    search.ended_in_one(1)
    search.ended_in_one(1)
    assert is_done()
    search.close()


@in_a_loop
async def test_a_search_that_asked_nobody_was_none() -> None:
    search, begun, is_done = a_search(1)
    for requests in (0, 1):
        search.start()
        async with asyncio.timeout(PATIENCE_S):
            await begun.get()
        search.ended_in_one(requests)
        assert is_done() is (requests > 0)
    search.close()


@in_a_loop
async def test_where_all_workers_are_wanted_while_the_first_few_are_searched_for_another_search_follows() -> None:
    search, begun, is_done = a_search(1)
    search.start()
    async with asyncio.timeout(PATIENCE_S):
        assert await begun.get() is False
        assert search.want_everything()
        search.ended_in_one(1)
        assert not is_done()
        assert await begun.get() is True
    search.ended_in_one(1)
    assert is_done()
    search.close()
    search.start()
    await asyncio.sleep(0)
    assert begun.empty()


# --- Its connections ---


@in_a_loop
async def test_requests_one_after_another_share_a_connection(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(says("hello"))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        for _ in range(3):
            await mesh.ask(job())
        assert (worker.connections, len(worker.prompts)) == (1, 3)


@in_a_loop
async def test_a_client_that_leaves_closes_all_its_connections(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(says("hello"))
    async with worker.on(topic):
        async with client_of(topic, tmp_path) as mesh:
            await asyncio.gather(*(mesh.ask(job()) for _ in range(5)))
        async with asyncio.timeout(10):
            for _ in range(worker.connections):
                await worker.closed.get()


@in_a_loop
async def test_who_stops_listening_to_an_answer_cancels_it(topic: str, tmp_path: Path) -> None:
    worker = ScriptedWorker(sends(token_frame("", 0, "Once")))
    async with mesh_of(topic, tmp_path, worker) as mesh:
        asked = job()
        async with contextlib.aclosing(mesh.run(asked)) as progress:
            async for event in progress:
                if isinstance(event, Token):
                    break
        async with asyncio.timeout(PATIENCE_S):
            assert await worker.cancelled.get() == asked.request_id


@in_a_loop
async def test_a_place_in_the_queue_is_passed_on(topic: str, tmp_path: Path) -> None:
    async def script(connection: qmesh.Connection, request_id: str) -> bool:
        queued = sends({"type": "inference_queued", "position": 2, "wait_s": 1.5})
        return await queued(connection, request_id) and await says("hello")(connection, request_id)

    async with mesh_of(topic, tmp_path, ScriptedWorker(script)) as mesh:
        events = [event async for event in mesh.run(job())]
        assert [type(event) for event in events] == [Discovered, Selected, Queued, Token, Answer]
        assert events[2] == Queued(2, 1.5)


@in_a_loop
async def test_of_two_workers_in_a_race_the_place_in_the_line_of_the_first_one_is_told(
    topic: str, tmp_path: Path
) -> None:
    def queued(position: int) -> Json:
        return {"type": "inference_queued", "position": position, "wait_s": 1.5}

    first = ScriptedWorker(sends(queued(2)), score=90)
    second = ScriptedWorker(sends(queued(1), token_frame("", 0, "hello"), result_frame("", "hello")), score=30)
    async with mesh_of(topic, tmp_path, first, second) as mesh:
        events = [event async for event in mesh.run(job(), hedge_s=0.05)]
    assert [event for event in events if isinstance(event, Queued)] == [Queued(2, 1.5)]
    assert isinstance(events[-1], Answer)
    assert events[-1].result.worker_id == str(second.worker_id)
