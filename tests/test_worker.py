"""Worker: a real worker process, asked in raw frames; and how it joins tokens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from loop import PATIENCE_S, in_a_loop
from raw_client import RawClient, connected, frame

import qmesh
from qmesh import Json, Queued, Result, Token, join_tokens

SHORT = {"max_tokens": 4, "temperature": 0}
LONG = {"max_tokens": 900, "temperature": 0}  # over many seconds, unless it is cut short
SLOTS, QUEUE, CONTEXT = 2, 3, 1024


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[harness.Process]:
    """One worker with two slots, and room for one request that waits."""
    with harness.Mesh(tmp_path_factory.mktemp("mesh"), model_path) as mesh:
        yield mesh.start_worker("--slots", str(SLOTS), "--queue", str(QUEUE))


def address_of(worker: harness.Process) -> qmesh.Address:
    host, port = worker.ready["tcp"]
    return host, port


def reaching(worker: harness.Process) -> contextlib.AbstractAsyncContextManager[RawClient]:
    """A connection to the worker, of somebody who was never here before."""
    mesh = qmesh.MeshKeys.derive(worker.ready["mesh"]["topic"])
    return connected(address_of(worker), identity=qmesh.Identity.ephemeral([mesh]))


@contextlib.asynccontextmanager
async def asking(worker: harness.Process) -> AsyncIterator[RawClient]:
    """A connection to the worker, once nothing of what was asked before is left in it."""
    async with reaching(worker) as client:
        await until_queue(client, active=0, waiting=0)
        yield client


async def until_queue(client: RawClient, **expected: int) -> None:
    """Wait until the worker's status says this of its queue. What else it sends meanwhile is dropped."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            queue = (await client.status())["queue"]
            if {name: queue[name] for name in expected} == expected:
                return
            await asyncio.sleep(0.02)  # leaves the processor to the worker


async def answer(client: RawClient, request_id: str) -> tuple[list[Json], Json]:
    """The pieces of an answer, and its end."""
    pieces = []
    while (body := await client.receive())["type"] == "inference_token":
        assert body["request_id"] == request_id
        pieces.append(body)
    return pieces, body


async def error_of(client: RawClient, request_id: str, **fields: Any) -> Json:
    await client.ask(request_id, **fields)
    error = await client.receive_kind("inference_error")
    assert error["request_id"] == request_id
    return error


# --- Status ---


@in_a_loop
async def test_status_tells_who_a_worker_is_and_how_it_does(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.send({"type": "status", "request_id": "s"})
        status = await client.receive()
        assert status["type"] == "status_response"
        assert status["request_id"] == "s"
        assert status["worker_id"] == worker.worker_id
        assert status["agent"] == qmesh.AGENT
        assert status["slots"] == SLOTS
        assert status["queue"] == {"active": 0, "waiting": 0, "capacity": QUEUE}
        assert status["speed"] >= 0
        assert status["uptime_s"] > 0
        (model,) = status["models"]
        assert (model["name"], model["context"]) == (worker.ready["model"], CONTEXT)
        health = qmesh.HealthReport.from_json(status["health"])
        assert health.score == pytest.approx(qmesh.health_score(health.cpu, health.memory, health.queue), abs=0.2)
        assert health.queue == 100


@in_a_loop
async def test_status_is_told_between_the_pieces_of_an_answer(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("r", params=LONG)
        await client.receive_kind("inference_token")
        status = await client.status()
        assert status["queue"]["active"] == 1
        assert status["health"]["queue"] < 100
        await client.receive_kind("inference_token")


# --- Answers ---


@in_a_loop
async def test_an_answer_is_streamed_without_a_gap_and_its_result_is_the_whole(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("r", params={**SHORT, "max_tokens": 12})
        pieces, result = await answer(client, "r")
        seq = 0
        for piece in pieces:
            assert piece["seq"] == seq
            seq += len(piece["tokens"])
        assert (result["type"], result["request_id"]) == ("inference_result", "r")
        assert seq == result["usage"]["completion_tokens"] == 12
        assert "".join(piece["text"] for piece in pieces) == result["text"] != ""


@in_a_loop
async def test_a_result_says_what_it_took_and_who_made_it(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("r", params=SHORT)
        result = await client.receive_kind("inference_result")
        assert result["finish_reason"] == "length"
        assert result["usage"]["completion_tokens"] == 4
        assert result["usage"]["prompt_tokens"] > 4
        assert set(result["timings"]) == {"queue_ms", "prompt_ms", "generate_ms"}
        assert (result["model"], result["worker_id"]) == (worker.ready["model"], worker.worker_id)


@in_a_loop
async def test_a_conversation_is_answered_too(worker: harness.Process) -> None:
    async with asking(worker) as client:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        await client.ask("r", messages=messages, params=SHORT)
        assert (await client.receive_kind("inference_result"))["text"] != ""


@in_a_loop
async def test_many_requests_share_a_connection_and_each_gets_its_own_whole_answer(worker: harness.Process) -> None:
    async with asking(worker) as client:
        for request_id in "abc":
            await client.ask(request_id, params={**SHORT, "max_tokens": 5 + ord(request_id) - ord("a")})
        results: dict[str, Json] = {}
        texts = dict.fromkeys("abc", "")
        while len(results) < 3:
            body = await client.receive()
            if body["type"] == "inference_token":
                texts[body["request_id"]] += body["text"]
            elif body["type"] == "inference_result":
                results[body["request_id"]] = body
        assert {request_id: body["text"] for request_id, body in results.items()} == texts
        assert [results[request_id]["usage"]["completion_tokens"] for request_id in "abc"] == [5, 6, 7]


@pytest.mark.parametrize("change", [str, str.upper, lambda name: f"{name}.gguf"], ids=["as is", "upper case", "file"])
@in_a_loop
async def test_a_model_may_be_asked_for_by_name(worker: harness.Process, change: Callable[[str], str]) -> None:
    async with asking(worker) as client:
        await client.ask("r", model=change(worker.ready["model"]), params=SHORT)
        assert (await client.receive_kind("inference_result"))["model"] == worker.ready["model"]


# --- Leaving ---


async def fill(client: RawClient) -> None:
    """Ask for three long answers: two run and one waits. Together they take the worker very long."""
    for request_id in "abc":
        await client.ask(request_id, params=LONG)
    await client.receive_kind("inference_token")
    assert (await client.status())["queue"] == {"active": 2, "waiting": 1, "capacity": 3}


async def runs_at_once(client: RawClient, request_id: str) -> None:
    """Ask something short, for which there must be a free slot: who has to wait is told so."""
    await client.ask(request_id, params=SHORT)
    while (body := await client.receive())["type"] != "inference_result":
        assert body["type"] != "inference_queued", "no slot was free"


@in_a_loop
async def test_cancel_frees_the_slot(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("a", params=LONG)
        await client.ask("b", params=LONG)
        await client.receive_kind("inference_token", "b")
        await client.send({"type": "cancel", "request_id": "b"})
        assert (await client.status())["queue"]["active"] == 1
        await runs_at_once(client, "c")


@in_a_loop
async def test_no_more_is_said_of_a_cancelled_request(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("a", params=LONG)
        await client.receive_kind("inference_token")
        await client.send({"type": "cancel", "request_id": "a"})
        await client.ask("b", params={**SHORT, "max_tokens": 12})
        await client.receive_kind("inference_token", "b")  # behind what was on its way
        while (body := await client.receive())["type"] != "inference_result":
            assert body["request_id"] == "b"
        assert body["request_id"] == "b"


@in_a_loop
async def test_a_request_that_waits_can_be_cancelled_and_those_that_run_go_on(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await fill(client)
        await client.send({"type": "cancel", "request_id": "c"})
        assert (await client.status())["queue"] == {"active": 2, "waiting": 0, "capacity": 3}
        await client.receive_kind("inference_token", "a")
        await client.receive_kind("inference_token", "b")


@in_a_loop
async def test_the_id_of_a_cancelled_request_may_be_used_again(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("r", params=LONG)
        await client.receive_kind("inference_token")
        await client.send({"type": "cancel", "request_id": "r"})
        await client.status()
        await client.ask("r", params=SHORT)
        pieces, result = await answer(client, "r")
        assert (pieces[0]["seq"], result["usage"]["completion_tokens"]) == (0, 4)


@in_a_loop
async def test_the_id_of_an_answered_request_may_be_used_again(worker: harness.Process) -> None:
    async with asking(worker) as client:
        for _ in range(2):
            await client.ask("r", params=SHORT)
            _, result = await answer(client, "r")
            assert result["type"] == "inference_result"
        for _ in range(2):
            error = await error_of(client, "s", params={"max_tokens": 0})
            assert "max_tokens" in error["message"]


@pytest.mark.parametrize("request_id", ["stranger", 7, None, ["r"]])
@in_a_loop
async def test_cancelling_what_nobody_asked_for_does_nothing(worker: harness.Process, request_id: object) -> None:
    async with asking(worker) as client:
        await client.send({"type": "cancel", "request_id": request_id})
        await client.ask("r", params=SHORT)
        await client.receive_kind("inference_result")


@pytest.mark.parametrize("leave", [RawClient.send_no_more, RawClient.abort])
@in_a_loop
async def test_who_leaves_in_the_middle_frees_slots_and_queue(
    worker: harness.Process, leave: Callable[[RawClient], None]
) -> None:
    async with reaching(worker) as watching:
        async with asking(worker) as client:
            await fill(client)
            leave(client)
            await until_queue(watching, active=0, waiting=0)
        await runs_at_once(watching, "d")


# --- Refusals ---


@in_a_loop
async def test_when_the_queue_is_full_the_next_is_refused_with_the_health(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await fill(client)
        error = await error_of(client, "d", params=SHORT)
        assert (error["code"], error["retryable"]) == ("overloaded", True)
        assert "queue is full (3 requests)" in error["message"]
        assert qmesh.HealthReport.from_json(error["health"]).queue == 0
        await client.send({"type": "cancel", "request_id": "a"})
        await client.ask("f", params=SHORT)
        await client.receive_kind("inference_queued", "f")


@in_a_loop
async def test_a_member_that_fills_the_queue_makes_room_for_others_with_what_it_asked_last(
    worker: harness.Process,
) -> None:
    async with asking(worker) as greedy, reaching(worker) as other, reaching(worker) as third:
        await fill(greedy)
        await greedy.receive_kind("inference_token", "a")
        await greedy.receive_kind("inference_token", "b")
        await other.ask("mine", params=SHORT)
        error = await greedy.receive_kind("inference_error")
        assert (error["request_id"], error["code"], error["retryable"]) == ("c", "overloaded", True)
        assert "others have fewer" in error["message"]
        error = await error_of(third, "late", params=SHORT)  # nobody has more than one that could still be turned away
        assert "queue is full" in error["message"]
        await greedy.send({"type": "cancel", "request_id": "a"})
        await other.receive_kind("inference_result", "mine")


@in_a_loop
async def test_who_waits_is_told_its_place(worker: harness.Process) -> None:
    async with asking(worker) as client:
        for request_id in "abc":
            await client.ask(request_id, params=LONG)
        queued = await client.receive_kind("inference_queued")
        assert (queued["request_id"], queued["position"]) == ("c", 0)
        assert queued["wait_s"] >= 0


@in_a_loop
async def test_another_model_is_not_found_and_the_right_one_named(worker: harness.Process) -> None:
    async with asking(worker) as client:
        error = await error_of(client, "r", model="gpt-17", params=SHORT)
        assert (error["code"], error["retryable"]) == ("model_not_found", False)
        assert "gpt-17" in error["message"]
        assert worker.ready["model"] in error["message"]


INVALID: dict[str, dict[str, Any]] = {
    "max_tokens": {"params": {"max_tokens": 0}},
    "temperature": {"params": {"temperature": "hot"}},
    "top_p": {"params": {"top_p": 2}},
    "top_k": {"params": {"top_k": 1.5}},
    "seed": {"params": {"seed": -1}},
    "stop": {"params": {"stop": [""]}},
    "json_schema": {"params": {"json_schema": "object"}},
    "unknown parameter: colour": {"params": {"colour": "red"}},
    "params must be an object": {"params": [1]},
    "timeout_s": {"timeout_s": 0},
    "model": {"model": 7},
    "prompt is empty": {"prompt": "  "},
    "prompt must be text": {"prompt": ["1"]},
    "not both": {"prompt": "1", "messages": [{"role": "user", "content": "1"}]},
    "messages[0].role": {"messages": [{"role": "robot", "content": "1"}]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "resume.tokens": {"resume": {"tokens": ["1"]}},
    "not in the model's vocabulary": {"resume": {"tokens": [10**9]}},
    "1 to 64 characters": {"request_id": "x" * 65},
}


@pytest.mark.parametrize("named", INVALID)
@in_a_loop
async def test_what_is_wrong_with_a_request_is_named(worker: harness.Process, named: str) -> None:
    fields: dict[str, Any] = {"request_id": "r", "params": SHORT, **INVALID[named]}
    async with asking(worker) as client:
        error = await error_of(client, **fields)
        assert (error["code"], error["retryable"]) == ("invalid_request", False)
        assert named in error["message"]
        await client.ask("s", params=SHORT)
        await client.receive_kind("inference_result", "s")


@in_a_loop
async def test_a_request_id_that_is_in_use_is_refused(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("twice", params=LONG)
        error = await error_of(client, "twice", params=SHORT)
        assert error["code"] == "invalid_request"
        assert "twice is in use" in error["message"]
        await client.receive_kind("inference_token", "twice")


@in_a_loop
async def test_two_clients_may_use_the_same_request_id(worker: harness.Process) -> None:
    async with asking(worker) as one, reaching(worker) as other:
        await one.ask("r", params={**SHORT, "max_tokens": 3})
        await other.ask("r", params={**SHORT, "max_tokens": 5})
        assert (await other.receive_kind("inference_result"))["usage"]["completion_tokens"] == 5
        assert (await one.receive_kind("inference_result"))["usage"]["completion_tokens"] == 3


@in_a_loop
async def test_a_prompt_that_is_longer_than_the_context_is_refused_with_both_lengths(worker: harness.Process) -> None:
    async with asking(worker) as client:
        error = await error_of(client, "r", prompt="one two " * CONTEXT, params=SHORT)
        assert (error["code"], error["retryable"]) == ("context_exceeded", False)
        assert "1,024" in error["message"]
        assert (await client.status())["queue"]["active"] == 0


@in_a_loop
async def test_an_answer_that_is_not_finished_in_time_ends_with_a_timeout(worker: harness.Process) -> None:
    async with asking(worker) as client:
        error = await error_of(client, "r", params=LONG, timeout_s=0.3)
        assert error["code"] == "timeout"
        assert (await client.status())["queue"]["active"] == 0


# --- Broken rules ---


@pytest.mark.parametrize("kind", sorted(kind for kind, told in qmesh.FRAMES.items() if told.sender != "client"))
@in_a_loop
async def test_a_client_that_speaks_like_a_worker_is_told_so_and_closed(worker: harness.Process, kind: str) -> None:
    async with asking(worker) as good, reaching(worker) as bad:
        await good.ask("r", params=LONG)
        await good.receive_kind("inference_token")
        await bad.send({"type": kind, "request_id": "r"})
        told = await bad.receive()
        assert (told["code"], told["message"]) == ("invalid_request", f"a client does not send {kind}")
        await bad.closed()
        await good.receive_kind("inference_token")


@pytest.mark.parametrize("kind", sorted(kind for kind, told in qmesh.FRAMES.items() if told.sender == "client"))
@in_a_loop
async def test_what_a_client_may_send_is_dealt_with_and_the_connection_goes_on(
    worker: harness.Process, kind: str
) -> None:
    async with asking(worker) as client:
        await client.send({"type": kind, "request_id": "r", "udp": 1, "tcp": 1})
        await client.send({"type": "status", "request_id": "s"})
        assert (await client.receive_kind("status_response", "s"))["worker_id"] == worker.worker_id


@pytest.mark.parametrize("request_id", [None, 7, ["r"]])
@in_a_loop
async def test_a_prompt_without_an_id_cannot_be_answered_and_ends_the_connection(
    worker: harness.Process, request_id: object
) -> None:
    async with asking(worker) as client:
        await client.send({"type": "prompt", "request_id": request_id, "prompt": "1"})
        assert (await client.receive())["message"] == "request_id must be text"
        await client.closed()


@in_a_loop
async def test_who_breaks_the_rules_loses_its_running_requests(worker: harness.Process) -> None:
    async with reaching(worker) as watching:
        async with asking(worker) as bad:
            await fill(bad)
            await bad.send({"type": "welcome"})
            await bad.receive_kind("inference_error")
            await until_queue(watching, active=0, waiting=0)
        await runs_at_once(watching, "d")


@in_a_loop
async def test_what_was_to_be_said_is_said_before_a_connection_ends(worker: harness.Process) -> None:
    async with asking(worker) as bad:
        prompt = qmesh.encode_frame({"type": "prompt", "request_id": "r", "prompt": ""})
        await bad.send_bytes(prompt + qmesh.encode_frame({"type": "welcome"}))
        told = [await bad.receive(), await bad.receive()]
        assert [body["message"] for body in told] == ["the prompt is empty", "a client does not send welcome"]
        await bad.closed()


HALF_A_PAIR = r'"\ud800"'  # JSON can say it, UTF-8 cannot


@pytest.mark.parametrize(
    "text",
    [
        f'{{"type":"prompt","prompt":"1","request_id":{HALF_A_PAIR}}}',
        f'{{"type":"prompt","prompt":{HALF_A_PAIR},"request_id":"r"}}',
        f'{{"type":"prompt","prompt":"1","request_id":"r","params":{{{HALF_A_PAIR}:1}}}}',
    ],
    ids=["request_id", "prompt", "name of a parameter"],
)
@in_a_loop
async def test_half_a_surrogate_pair_is_an_invalid_request(worker: harness.Process, text: str) -> None:
    async with asking(worker) as client:
        await client.send_bytes(frame(text.encode()))
        assert (await client.receive())["code"] == "invalid_request"


@in_a_loop
async def test_half_a_surrogate_pair_in_a_status_breaks_nothing(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.send_bytes(frame(f'{{"type":"status","request_id":{HALF_A_PAIR}}}'.encode()))
        told = await client.receive()
        assert told["type"] == "status_response" or told["code"] == "invalid_request"


# --- A worker at its limits ---

IDLE_S = 1.0


def changed_program(directory: Path, *changes: str) -> Path:
    """The program with other limits than its own, so that no test has to wait for them."""
    lines = ["import sys", f"sys.path.insert(0, {str(harness.ROOT)!r})", "import qmesh", *changes]
    program = directory / "changed.py"
    program.write_text("\n".join([*lines, "sys.exit(qmesh.main(sys.argv[1:]))"]), "utf-8")
    return program


@pytest.fixture(scope="module")
def strained(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[harness.Process]:
    """A worker on a machine that is busy with other things, which one request overloads; it has little patience."""
    directory = tmp_path_factory.mktemp("strained")
    program = changed_program(
        directory,
        "qmesh.SystemMonitor.sample = lambda monitor: (95.0, 95.0)",
        "qmesh.MAX_REQUESTS_PER_CONNECTION = 1",
        f"qmesh.IDLE_TIMEOUT_S = {IDLE_S}",
    )
    with harness.Mesh(directory, model_path, program) as mesh:
        yield mesh.start_worker("--slots", "1", "--queue", "2")


@in_a_loop
async def test_an_overloaded_worker_refuses_with_its_health(strained: harness.Process) -> None:
    async with asking(strained) as one:
        assert (await one.status())["health"]["score"] == 24  # 20 of it for the free queue
        await one.ask("r", params=LONG)
        await one.receive_kind("inference_token")
        async with reaching(strained) as other:
            error = await error_of(other, "s", params=SHORT)
        assert (error["code"], error["retryable"]) == ("overloaded", True)
        assert "overloaded (health 14)" in error["message"]
        assert error["health"] == {"score": 14, "cpu": 95, "memory": 95, "queue": 50, "state": "overloaded"}


@in_a_loop
async def test_there_is_a_limit_to_requests_on_one_connection(strained: harness.Process) -> None:
    async with asking(strained) as client:
        await client.ask("r", params=LONG)
        error = await error_of(client, "s", params=SHORT)
        assert (error["code"], error["retryable"]) == ("overloaded", True)
        assert "1 requests are under way on this connection" in error["message"]


@in_a_loop
async def test_a_connection_is_closed_when_nothing_is_asked_for_long(strained: harness.Process) -> None:
    async with reaching(strained) as client:
        await client.closed()


@in_a_loop
async def test_a_connection_that_waits_for_an_answer_is_not_idle(strained: harness.Process) -> None:
    async with asking(strained) as client:
        await client.ask("r", params=LONG)
        started = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < started + 2 * IDLE_S:
            assert (await client.receive())["type"] == "inference_token"
        await client.send({"type": "cancel", "request_id": "r"})
        await client.closed(after="inference_token")


# --- Being told to stop ---


async def exit_code(worker: harness.Process) -> int:
    return await asyncio.to_thread(worker.popen.wait, PATIENCE_S)


async def until_draining(client: RawClient) -> None:
    """Ask for little answers until they are refused because the worker is to stop."""
    async with asyncio.timeout(PATIENCE_S):
        for number in range(10_000):
            await client.ask(f"try {number}", params={"max_tokens": 1})
            while (body := await client.receive()).get("request_id") != f"try {number}" or "seq" in body:
                pass
            if body["type"] == "inference_error":
                assert (body["code"], body["retryable"]) == ("draining", True)
                return


@in_a_loop
async def test_a_worker_told_to_stop_refuses_finishes_and_ends_well(mesh: harness.Mesh) -> None:
    worker = mesh.start_worker("--grace", str(PATIENCE_S))
    async with reaching(worker) as running, reaching(worker) as late:
        await running.ask("r", params={**SHORT, "max_tokens": 60})
        await running.receive_kind("inference_token")
        worker.popen.send_signal(signal.SIGTERM)
        await until_draining(late)
        result = await running.receive_kind("inference_result")
        assert result["usage"]["completion_tokens"] == 60
        await running.closed()
    assert await exit_code(worker) == 0
    assert json.loads(worker.stdout.readline()) == {"event": "stopped", "worker_id": worker.worker_id}


LEAVE_SLOWLY = """
leave = qmesh.UdpNode.close
async def slowly(node):
    await qmesh.asyncio.sleep(0.5)
    await leave(node)
qmesh.UdpNode.close = slowly
"""


@in_a_loop
async def test_a_worker_told_to_stop_cuts_off_what_takes_too_long(mesh: harness.Mesh, tmp_path: Path) -> None:
    mesh.program = changed_program(tmp_path, LEAVE_SLOWLY)
    worker = mesh.start_worker("--grace", "0.3")
    async with reaching(worker) as running:
        await running.ask("r", params=LONG)
        await running.receive_kind("inference_token")
        worker.popen.send_signal(signal.SIGTERM)
        error = await running.receive_kind("inference_error")
        assert (error["request_id"], error["code"], error["retryable"]) == ("r", "draining", True)
        await running.closed()  # nothing more is said of it, however long the worker takes to leave
    assert await exit_code(worker) == 0
    assert json.loads(worker.stdout.readline())["event"] == "stopped"


@in_a_loop
async def test_a_worker_told_to_stop_twice_stops_at_once(mesh: harness.Mesh) -> None:
    worker = mesh.start_worker("--grace", str(PATIENCE_S))
    async with reaching(worker) as running, reaching(worker) as late:
        await running.ask("r", params=LONG)
        await running.receive_kind("inference_token")
        worker.popen.send_signal(signal.SIGINT)
        await until_draining(late)
        worker.popen.send_signal(signal.SIGINT)
        assert await exit_code(worker) == qmesh.EXIT_INTERRUPTED


# --- Coming back ---


async def undisturbed(worker: harness.Process, params: dict[str, Any]) -> tuple[list[int], Json]:
    """The ids of an answer that nothing happened to, and its end."""
    async with asking(worker) as client:
        await client.ask("undisturbed", params=params)
        pieces, result = await answer(client, "undisturbed")
    return [token for piece in pieces for token in piece["tokens"]], result


def ids_of(pieces: list[Json]) -> list[int]:
    return [token for piece in pieces for token in piece["tokens"]]


@in_a_loop
async def test_who_comes_back_hears_the_rest_and_nothing_is_computed_twice(worker: harness.Process) -> None:
    params = {**SHORT, "max_tokens": 40}
    ids, whole = await undisturbed(worker, params)
    async with asking(worker) as client:
        await client.ask("back", params=params)
        first = await client.receive_kind("inference_token")
        client.abort()
    heard = first["tokens"]
    async with reaching(worker) as again:
        await again.ask("back", params=params, resume={"tokens": heard})
        pieces, result = await answer(again, "back")
    assert pieces[0]["seq"] == len(heard)
    assert heard + ids_of(pieces) == ids
    assert result["text"] == whole["text"]
    assert result["usage"]["completion_tokens"] == 40
    assert result["usage"]["cached_tokens"] == result["usage"]["prompt_tokens"] - (not heard)


@in_a_loop
async def test_who_comes_back_to_an_answer_that_was_finished_meanwhile_is_told_it(worker: harness.Process) -> None:
    ids, whole = await undisturbed(worker, SHORT)
    async with asking(worker) as client, reaching(worker) as watching:
        await client.ask("done", params=SHORT)
        await answer(client, "done")  # it was said; who knows whether it was heard
        client.abort()
        speed = (await watching.status())["speed"]
        await watching.ask("done", params=SHORT, resume={"tokens": ids[:1]})
        pieces, result = await answer(watching, "done")
        assert (ids_of(pieces), result["text"]) == (ids[1:], whole["text"])
        assert (await watching.status())["speed"] == speed  # the engine had nothing to do


@in_a_loop
async def test_an_answer_goes_over_to_the_connection_on_which_it_is_asked_for_again(worker: harness.Process) -> None:
    async with asking(worker) as half_open, reaching(worker) as again:
        await half_open.ask("moved", params=LONG)
        first = await half_open.receive_kind("inference_token")
        await again.ask("moved", params=LONG, resume={"tokens": first["tokens"]})
        piece = await again.receive_kind("inference_token", "moved")
        assert piece["seq"] == len(first["tokens"])
        assert (await again.status())["queue"]["active"] == 1
        await again.send({"type": "cancel", "request_id": "moved"})
        await until_queue(again, active=0)


@in_a_loop
async def test_another_request_of_the_same_name_is_not_taken_for_one_that_goes_on(worker: harness.Process) -> None:
    async with asking(worker) as client:
        await client.ask("same", params=SHORT)
        _, first = await answer(client, "same")
        await client.ask("same", params=SHORT, prompt="a b c d e f g", resume={"tokens": []})
        _, second = await answer(client, "same")
        assert second["text"] != first["text"]


@in_a_loop
async def test_an_answer_of_another_model_is_not_gone_on_with(worker: harness.Process) -> None:
    async with asking(worker) as client:
        resume = {"tokens": [1, 2], "fingerprint": "00" * qmesh.FINGERPRINT_BYTES}
        error = await error_of(client, "r", params=SHORT, resume=resume)
        assert error["code"] == "model_not_found"


@in_a_loop
async def test_of_a_request_of_which_there_is_no_news_signs_of_life_are_given(
    mesh: harness.Mesh, tmp_path: Path
) -> None:
    mesh.program = changed_program(tmp_path, "qmesh.QUEUE_NEWS_S = 1e9")
    worker = mesh.start_worker("--slots", "1")
    async with reaching(worker) as client:
        await client.ask("a", params=LONG)
        await client.ask("b", params=SHORT)
        while client.alive < 2:
            assert (await client.receive())["type"] in ("inference_token", "inference_queued")


# --- Making way ---

OTHERS = """
levels = iter([0.0] * 3 + [90.0] * 8 + [0.0] * 10_000)
qmesh.SystemMonitor.sample = lambda monitor: (next(levels), 10.0)
qmesh.SAMPLE_PERIOD_S = 0.2
"""


@in_a_loop
async def test_with_yield_a_worker_hands_over_while_others_use_the_machine_and_comes_back(
    mesh: harness.Mesh, tmp_path: Path
) -> None:
    mesh.program = changed_program(tmp_path, OTHERS)
    worker = mesh.start_worker("--yield")
    async with reaching(worker) as running, reaching(worker) as late:
        await running.ask("r", params=LONG)
        error = await running.receive_kind("inference_error", "r")
        assert (error["code"], error["retryable"]) == ("overloaded", True)
        assert "owner needs it" in error["message"]
        assert error["health"]["state"] == "overloaded"
        refused = await error_of(late, "s", params=SHORT)
        assert "owner needs it" in refused["message"]
        async with asyncio.timeout(PATIENCE_S):
            while (await late.status())["health"]["state"] == "overloaded":
                pass
        await late.ask("t", params=SHORT)
        await late.receive_kind("inference_result", "t")


# --- Quotas ---


@in_a_loop
async def test_a_member_that_asks_too_much_is_heard_more_slowly_and_no_other(
    mesh: harness.Mesh, tmp_path: Path
) -> None:
    mesh.program = changed_program(tmp_path, "qmesh.MEMBER_BURST = 8.0", "qmesh.MEMBER_PER_S = 20.0")
    worker = mesh.start_worker()
    loop = asyncio.get_running_loop()
    async with reaching(worker) as greedy, reaching(worker) as modest:
        started = loop.time()
        for _ in range(28):
            await greedy.send({"type": "status"})
        for _ in range(4):
            await modest.status()
        assert loop.time() - started < 1.0
        for _ in range(28):
            await greedy.receive_kind("status_response")
        assert loop.time() - started >= 1.0  # for the 20 that are more than a burst


@in_a_loop
async def test_a_large_request_counts_for_many(mesh: harness.Mesh, tmp_path: Path) -> None:
    mesh.program = changed_program(tmp_path, "qmesh.MEMBER_BURST = 8.0", "qmesh.MEMBER_PER_S = 20.0")
    worker = mesh.start_worker()
    loop = asyncio.get_running_loop()
    async with reaching(worker) as client:
        started = loop.time()
        await client.send({"type": "status", "ballast": "x" * 28 * qmesh.BYTES_PER_REQUEST})
        await client.receive_kind("status_response")
        assert loop.time() - started >= 1.0


# --- Joining tokens ---


def token(seq: int, text: str) -> Token:
    return Token(seq, (100 + seq,), text)


RESULT = Result("ab", "stop", {}, {}, "tiny", "0" * 64)


def test_nothing_joins_to_nothing() -> None:
    assert join_tokens([]) == []


def test_tokens_that_wait_together_become_one_piece() -> None:
    said = [("r", token(3, "a")), ("r", token(4, "")), ("r", token(5, "b"))]
    assert join_tokens(said) == [("r", Token(3, (103, 104, 105), "ab"))]


def test_each_request_keeps_its_own_tokens() -> None:
    said = [("r", token(0, "a")), ("s", token(7, "x")), ("r", token(1, "b")), ("s", token(8, "y"))]
    assert join_tokens(said) == [("r", Token(0, (100, 101), "ab")), ("s", Token(7, (107, 108), "xy"))]


@pytest.mark.parametrize("between", [Queued(0, 1.0), RESULT, qmesh.Refused("full")])
def test_tokens_are_not_joined_across_something_else(between: qmesh.Said) -> None:
    said: list[tuple[str, qmesh.Said]] = [("r", token(0, "a")), ("r", between), ("r", token(1, "b"))]
    assert join_tokens(said) == said


def test_a_result_stays_behind_its_tokens() -> None:
    said: list[tuple[str, qmesh.Said]] = [("r", token(0, "a")), ("r", token(1, "b")), ("s", RESULT), ("r", RESULT)]
    assert join_tokens(said) == [("r", Token(0, (100, 101), "ab")), ("s", RESULT), ("r", RESULT)]


def told_to(request_id: str, said: Iterable[tuple[str, qmesh.Said]]) -> list[qmesh.Said]:
    """What one request's reader is told when every run of tokens is one piece."""
    told: list[qmesh.Said] = []
    mine = [item for owner, item in said if owner == request_id]
    for joinable, run in itertools.groupby(mine, lambda item: isinstance(item, Token)):
        if not joinable:
            told += run
            continue
        tokens = [item for item in run if isinstance(item, Token)]
        ids = itertools.chain.from_iterable(item.tokens for item in tokens)
        told.append(Token(tokens[0].seq, tuple(ids), "".join(item.text for item in tokens)))
    return told


anything = st.one_of(
    st.builds(token, st.integers(0, 99), st.text(max_size=3)),
    st.just(RESULT),
    st.builds(Queued, st.integers(0, 9), st.just(1.0)),
)


@given(st.lists(st.tuples(st.sampled_from("rst"), anything), max_size=30))
@hypothesis_settings(derandomize=True, deadline=None, max_examples=60)
def test_whatever_is_said_each_reader_is_told_it_in_as_few_pieces_as_can_be(said: list[tuple[str, qmesh.Said]]) -> None:
    joined = join_tokens(said)
    for request_id in "rst":
        assert [item for owner, item in joined if owner == request_id] == told_to(request_id, said)
    assert [entry for entry in joined if not isinstance(entry[1], Token)] == [
        entry for entry in said if not isinstance(entry[1], Token)
    ]


# --- Coming and going ---

GOING_ON = ("The sea is", "The sea was", "Once upon a time", "1 2 3")
SEVERAL = 4  # clients at once
OUTSTANDING = 24  # requests at once: well over the slots, and under what the queue takes


class Crowd:
    """Clients of one worker that ask, cancel and vanish at random, and check each answer that comes to its end."""

    def __init__(self, worker: harness.Process, whole: dict[str, str], rng: random.Random) -> None:
        self.checked = 0
        self._worker = worker
        self._whole = whole
        self._rng = rng
        self._clients: list[tuple[contextlib.AsyncExitStack, RawClient, dict[str, str]]] = []
        self._asked = 0

    @property
    def outstanding(self) -> int:
        return sum(len(asked) for _, _, asked in self._clients)

    async def ask(self) -> None:
        if self.outstanding >= OUTSTANDING:
            return
        if len(self._clients) < SEVERAL:
            stack = contextlib.AsyncExitStack()
            self._clients.append((stack, await stack.enter_async_context(reaching(self._worker)), {}))
        _, client, asked = self._rng.choice(self._clients)
        self._asked += 1
        prompt = self._rng.choice(GOING_ON)
        asked[str(self._asked)] = prompt
        params = {"max_tokens": self._rng.randint(1, 9), "temperature": 0}
        await client.ask(str(self._asked), prompt=prompt, params=params)

    async def cancel(self) -> None:
        _, client, asked = self._rng.choice(self._clients)
        if asked:
            request_id = self._rng.choice(list(asked))
            del asked[request_id]
            await client.send({"type": "cancel", "request_id": request_id})

    async def vanish(self) -> None:
        stack, client, _ = self._clients.pop(self._rng.randrange(len(self._clients)))
        client.abort()
        await stack.aclose()

    async def listen(self) -> None:
        """Hear one client until one of its answers is whole."""
        _, client, asked = self._rng.choice(self._clients)
        while asked:
            body = await client.receive()
            assert body["type"] != "inference_error", body
            if body["type"] == "inference_result" and body["request_id"] in asked:
                prompt = asked.pop(body["request_id"])
                assert self._whole[prompt].startswith(body["text"])
                assert body["text"]
                self.checked += 1
                return

    async def finish(self) -> None:
        while self.outstanding:
            await self.listen()
        for stack, _, _ in self._clients:
            await stack.aclose()
        self._clients.clear()


@in_a_loop
async def test_three_hundred_requests_cancels_and_disconnects_leave_nothing_behind(
    tmp_path: Path, mesh: harness.Mesh
) -> None:
    mesh.program = changed_program(tmp_path, "qmesh.SystemMonitor.sample = lambda monitor: (50.0, 50.0)")
    worker = mesh.start_worker("--slots", "4", "--queue", "64")
    process = psutil.Process(worker.popen.pid)
    rng = random.Random(1)
    memory = []
    async with asking(worker) as client:
        whole = {}
        for prompt in GOING_ON:
            await client.ask("w", prompt=prompt, params={"max_tokens": 10, "temperature": 0})
            whole[prompt] = str((await client.receive_kind("inference_result"))["text"])
        crowd = Crowd(worker, whole, rng)
        await crowd.ask()
        for _ in range(3):
            for _ in range(100):
                chosen = rng.choices((crowd.ask, crowd.cancel, crowd.vanish, crowd.listen), (8, 3, 1, 4))[0]
                await (chosen() if crowd.outstanding else crowd.ask())
            await crowd.finish()
            await until_queue(client, active=0, waiting=0)
            memory.append(process.memory_info().rss)
            await crowd.ask()
        await crowd.finish()
    assert crowd.checked > 40
    assert memory[2] - memory[1] < 8e6, "the worker's memory grows"
