"""Bench: what it says of a mesh, of workers that are busy, refuse, fall silent or die, and whom it leaves alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import harness
import pytest
from loop import PATIENCE_S, in_a_loop
from scripted_worker import FINGERPRINT, HANGS_UP, IS_SILENT, Script, ScriptedWorker, health_of, in_turn, refuses, says

import qmesh
from qmesh import Bench, Connection, Json, Stream, Terminal

pytestmark = pytest.mark.usefixtures("parting_without_waiting")

TOKENS = 5
STEPS = ("one_stream_tokens_per_s", "first_token_ms", "all_slots_tokens_per_s", "prefill_tokens_per_s")


@pytest.fixture
def place(tmp_path: Path) -> harness.Mesh:
    """A mesh of this test's own, whose workers are scripted; commands on it need no model."""
    return harness.Mesh(tmp_path, Path("none"))


def writer(*then: Script, after: int = 0, **more: Any) -> ScriptedWorker:
    """A worker that writes as many tokens as it is asked for. then: what it does instead, after so many requests."""

    async def write(connection: Connection, request_id: str) -> bool:
        [asked] = [body for body in worker.prompts if body["request_id"] == request_id]
        return await says(*[" 1"] * asked["params"]["max_tokens"])(connection, request_id)

    worker = ScriptedWorker(in_turn(*[write] * after, *then) if then else write, **more)
    return worker


def held(active: int, waiting: int = 0, *, slots: int = 4) -> Json:
    """The status of a worker that others use."""
    queue = {"active": active, "waiting": waiting, "capacity": 16}
    return {"health": health_of(80), "slots": slots, "queue": queue, "speed": 1.0, "models": [{"name": "tiny"}]}


def bench_of(place: harness.Mesh, *, rounds: int = 2, wanted: tuple[str, ...] = (), **more: Any) -> Bench:
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=place.topic, state_dir=str(place.state_dir), **more)
    return Bench(settings, Terminal(shown=True), rounds=rounds, max_tokens=TOKENS, wanted=wanted)


@contextlib.asynccontextmanager
async def measured(place: harness.Mesh, *workers: ScriptedWorker, **more: Any) -> AsyncIterator[Bench]:
    """A bench that has run to its end."""
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.on(place.topic))
        bench = bench_of(place, **more)
        await bench.run()
        yield bench


def rounds_of(bench: Bench, worker: ScriptedWorker) -> list[int]:
    """How many rounds each figure of a worker rests on."""
    (found,) = (each for each in bench.workers if each.record.worker_id == worker.worker_id)
    return [len(found.figures[name]) for name in STEPS]


def failure_of(bench: Bench, worker: ScriptedWorker) -> str:
    (found,) = (each for each in bench.to_json()["workers"] if each["worker_id"] == str(worker.worker_id))
    return f"{found['error']['code']}: {found['error']['message']}"


# --- Arithmetic ---


@pytest.mark.parametrize(
    ("arrivals", "speed"),
    [
        ([[(1.0, 1), (2.0, 1), (3.0, 1)]], 1.0),
        ([[(1.0, 3), (2.0, 2)]], 2.0),  # what came with the first token took no time that is known
        ([[(1.0, 1), (2.0, 1)], [(2.0, 1), (5.0, 3)]], 1.0),  # the first of any to the last of all
        ([[(1.0, 1), (2.0, 1)], []], 1.0),  # one that was cut off before it began
        ([[(1.0, 1)]], 0.0),
        ([[(1.0, 1), (1.0, 4)]], 0.0),  # all at once
        ([[]], 0.0),
    ],
)
def test_speed_is_of_the_tokens_after_the_first(arrivals: list[list[tuple[float, int]]], speed: float) -> None:
    streams = [Stream(0.0) for _ in arrivals]
    for stream, pieces in zip(streams, arrivals, strict=True):
        for now, tokens in pieces:
            stream.take(tokens, now)
    assert qmesh.tokens_per_s(streams) == speed


# --- What it asks ---


@in_a_loop
async def test_each_worker_is_asked_alone_then_in_all_its_slots_then_to_read_and_at_last_all_of_them_at_once(
    place: harness.Mesh,
) -> None:
    one, other = writer(), writer(status=held(0, slots=2))
    async with measured(place, one, other) as bench:
        assert bench.is_whole
        assert bench.streams == 6
        assert len(bench.together) == 2
    for worker, slots in ((one, 4), (other, 2)):
        assert rounds_of(bench, worker) == [2] * len(STEPS)
        assert len(worker.prompts) == 1 + 2 * (1 + slots + 1) + 2 * slots  # the first warms it up
        assert sorted({body["params"]["max_tokens"] for body in worker.prompts}) == [1, TOKENS]
        assert all(len(body["prompt"]) > 1000 for body in worker.prompts if body["params"]["max_tokens"] == 1)
        assert {body["params"]["temperature"] for body in worker.prompts} == {0}


@in_a_loop
async def test_no_two_prompts_begin_alike_so_that_nothing_of_them_is_in_a_slots_memory(place: harness.Mesh) -> None:
    worker = writer()
    async with measured(place, worker):
        pass
    assert len({body["prompt"].split()[0] for body in worker.prompts}) == len(worker.prompts)


@in_a_loop
async def test_slots_that_others_use_are_left_to_them(place: harness.Mesh) -> None:
    worker = writer(status=held(3))
    async with measured(place, worker, rounds=1) as bench:
        assert bench.streams == 1
        assert f"{worker.worker_id.short}: others used 3 of its slots" in list(bench.lines(100))
    assert len(worker.prompts) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ({"score": 12, "told_score": 80}, "overloaded: it is overloaded (health: 12), and left alone"),
        ({"status": held(4)}, "overloaded: others use all of its slots"),
        ({"status": held(2, 2)}, "overloaded: others use all of its slots"),
    ],
)
@in_a_loop
async def test_a_worker_that_has_no_room_is_left_alone_and_the_others_are_measured(
    place: harness.Mesh, taken: dict[str, Any], said: str
) -> None:
    full, free = writer(**taken), writer()
    async with measured(place, full, free, rounds=1) as bench:
        assert failure_of(bench, full) == said
        assert rounds_of(bench, free) == [1] * len(STEPS)
        assert (bench.streams, len(bench.together)) == (4, 1)
    assert not full.prompts


# --- Workers that fail ---


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (refuses(qmesh.Refused("the queue is full")), "overloaded: the queue is full"),
        (HANGS_UP, "lost: 127.0.0.1:"),
        (refuses(qmesh.InvalidRequest("it makes no sense")), "invalid_request: it makes no sense"),
    ],
    ids=["refuses", "dies", "cannot"],
)
@in_a_loop
async def test_what_a_worker_did_before_it_failed_is_kept_and_the_others_go_on(
    place: harness.Mesh, script: Script, said: str
) -> None:
    failing, other = writer(script, after=8), writer()  # the warm-up, a whole round, and one more
    async with measured(place, failing, other) as bench:
        assert failure_of(bench, failing).startswith(said)
        assert rounds_of(bench, failing) == [2, 2, 1, 1]
        assert rounds_of(bench, other) == [2] * len(STEPS)
        assert len(bench.together) == 2


@in_a_loop
async def test_a_worker_that_dies_while_all_are_at_it_takes_the_rounds_that_it_was_in_with_it(
    place: harness.Mesh,
) -> None:
    failing, other = writer(HANGS_UP, after=1 + 2 * 6 + 4), writer()
    async with measured(place, failing, other) as bench:
        assert (bench.streams, len(bench.together)) == (4, 2)
        assert failure_of(bench, failing).startswith("lost: ")
        assert rounds_of(bench, failing) == [2] * len(STEPS)


@in_a_loop
async def test_a_worker_that_gives_no_token_has_its_share_of_time_and_no_more(place: harness.Mesh) -> None:
    silent, other = writer(IS_SILENT), writer()
    async with measured(place, silent, other, rounds=1, timeout_s=6) as bench:
        assert (
            failure_of(bench, silent) == "timeout: a short prompt brought no token within 1 s, its share of --timeout"
        )
        assert rounds_of(bench, other) == [1] * len(STEPS)
    assert len(silent.prompts) == 1
    assert silent.cancelled.qsize() == 1


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (IS_SILENT, "timeout: a prompt of 256 words brought no token within 2 s, its share of --timeout"),
        (refuses(qmesh.InvalidRequest("it is too long")), "invalid_request: it is too long"),
    ],
    ids=["slow", "small"],
)
@in_a_loop
async def test_one_for_which_the_long_prompt_is_too_much_is_measured_without(
    place: harness.Mesh, script: Script, said: str
) -> None:
    async def reads_nothing_long(connection: Connection, request_id: str) -> bool:
        is_long = worker.prompts[-1]["params"]["max_tokens"] == 1
        return await (script if is_long else usual)(connection, request_id)

    worker = writer()
    usual, worker.script = worker.script, reads_nothing_long
    async with measured(place, worker, timeout_s=6) as bench:
        assert failure_of(bench, worker) == said
        assert rounds_of(bench, worker) == [2, 2, 2, 0]
        assert len(bench.together) == 2


# --- Whom it measures ---


@in_a_loop
async def test_those_that_are_named_are_measured_and_no_others(place: harness.Mesh) -> None:
    one, two, three = writer(), writer(), writer()
    wanted = tuple(str(worker.worker_id)[:8] for worker in (one, three))
    async with measured(place, one, two, three, rounds=1, wanted=wanted) as bench:
        assert {worker.record.worker_id for worker in bench.workers} == {one.worker_id, three.worker_id}
    assert not two.prompts


@in_a_loop
async def test_those_with_a_model_are_measured_and_no_others(place: harness.Mesh) -> None:
    tiny, large = writer(), writer(model="large")
    async with measured(place, tiny, large, rounds=1, model="LARGE") as bench:
        assert [worker.record.worker_id for worker in bench.workers] == [large.worker_id]
    assert not tiny.prompts


@in_a_loop
async def test_what_is_not_there_is_named_with_what_is(place: harness.Mesh) -> None:
    async with writer().on(place.topic) as worker:
        with pytest.raises(qmesh.NoWorkerFound, match=f"no worker 000000; the mesh has: {worker.worker_id.short}"):
            await bench_of(place, wanted=("000000",)).run()
        with pytest.raises(qmesh.ModelNotFound, match="no worker has the model gpt-17; the mesh has: tiny"):
            await bench_of(place, model="gpt-17").run()


@in_a_loop
async def test_a_model_that_does_not_write_is_no_model_to_measure(place: harness.Mesh) -> None:
    model = {"name": "tiny", "kind": qmesh.EMBEDS, "fingerprint": FINGERPRINT.hex()}
    async with writer(status=held(0) | {"models": [model]}).on(place.topic) as worker:
        with pytest.raises(qmesh.ModelNotFound, match="tiny"):
            await bench_of(place).run()
    assert not worker.prompts


# --- The command ---


async def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    return process.returncode, stdout, stderr


@in_a_loop
async def test_the_figures_are_a_table_and_progress_goes_to_stderr(place: harness.Mesh) -> None:
    async with writer().on(place.topic) as worker:
        code, stdout, stderr = await ended(place.popen("bench", "--rounds", "2", "--max-tokens", "5"))
    assert code == 0
    header, row, together, legend, found, asked = stdout.splitlines()
    assert re.split("  +", header) == list(qmesh.BENCH_HEADER)
    assert re.fullmatch(rf"{worker.worker_id.short}  80 +4 +(\S+ ±\d+% +){{3}}\S+ ms ±\d+% +tiny", row)
    assert re.fullmatch(r"all +4 +\S+ ±\d+%", together)
    assert legend == qmesh.BENCH_LEGEND
    assert re.fullmatch(rf"1 worker of the open mesh '{place.topic}', heard of after \d+ to \d+ ms", found)
    assert asked.startswith(f"asked by {qmesh.AGENT} on ")
    assert "This keeps them busy for 1 min 0 s at most" in stderr
    assert f"Worker {worker.worker_id.short} (health: 80), tiny: 1 and 4 streams" in stderr


@in_a_loop
async def test_the_json_holds_what_is_promised(place: harness.Mesh) -> None:
    async with writer().on(place.topic) as worker:
        code, stdout, stderr = await ended(place.popen("bench", "--rounds", "1", "--json"))
    assert (code, stderr) == (0, "")
    told = json.loads(stdout)
    assert told.keys() == {"version", "complete", "discovery", "workers", "mesh", "machine", "elapsed_ms"}
    assert (told["version"], told["complete"]) == (qmesh.__version__, True)
    assert 0 < told["discovery"]["first_ms"] <= told["discovery"]["all_ms"]
    assert told["machine"].keys() == {"platform", "python", "processors"}
    assert told["mesh"].keys() == {"topic", "open", "fingerprint", "streams", "tokens_per_s"}
    (found,) = told["workers"]
    names = {"worker_id", "address", "model", "agent", "health", "slots", "streams", "prompt_tokens", "error"}
    assert found.keys() == names | set(STEPS)
    assert (found["worker_id"], found["error"]) == (str(worker.worker_id), None)
    for figure in (told["mesh"]["tokens_per_s"], *(found[name] for name in STEPS)):
        assert figure.keys() == {"median", "min", "max", "rounds"}
        assert figure["rounds"] == 1


@in_a_loop
async def test_an_interrupt_tells_what_was_measured_so_far(place: harness.Mesh) -> None:
    async with writer(IS_SILENT, after=7).on(place.topic) as worker:
        process = place.popen("bench")
        async with asyncio.timeout(PATIENCE_S):
            while len(worker.prompts) < 8:  # noqa: ASYNC110 - another process makes it so
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code, stdout, stderr = await ended(process)
    assert code == 130
    assert re.search(rf"^{worker.worker_id.short}  80 +4 +\S+ +\S+ +\S+ +\S+ ms +tiny$", stdout, re.MULTILINE)
    assert "Traceback" not in stderr


@in_a_loop
async def test_where_no_worker_could_be_measured_the_exit_code_says_why(place: harness.Mesh) -> None:
    async with writer(status=held(4)).on(place.topic) as worker:
        code, stdout, stderr = await ended(place.popen("bench"))
        as_json = await ended(place.popen("bench", "--json"))
    assert code == qmesh.Refused.exit_code
    assert re.search(rf"^{worker.worker_id.short}  overloaded  4 +- +- +- +- +tiny$", stdout, re.MULTILINE)
    assert "error: others use all of its slots\n" in stderr
    assert (as_json[0], as_json[2]) == (code, "")
    assert json.loads(as_json[1])["workers"][0]["error"]["code"] == "overloaded"


def test_a_real_worker_has_real_figures(two_workers: harness.Mesh) -> None:
    wanted = two_workers.processes[0].worker_id
    flags = ("--worker", wanted[:8], "--rounds", "1", "--max-tokens", "8", "--timeout", "100")
    told = two_workers.json("bench", *flags)
    (found,) = told["workers"]
    assert (found["worker_id"], found["slots"], found["streams"], found["error"]) == (wanted, 4, 4, None)
    assert found["prompt_tokens"] > qmesh.BENCH_PROMPT_WORDS
    assert all(found[name]["median"] > 0 for name in STEPS)
