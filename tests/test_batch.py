"""Batch: a file of questions, each answered once, whatever is killed, lost, full or broken meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import pty
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import harness
import pytest
from loop import PATIENCE_S, in_a_loop
from scripted_worker import IS_SILENT, ScriptedWorker, health_of, in_turn, refuses, result_frame, sends, token_frame

import qmesh
from qmesh import Batch, BatchDisplay, Connection, Json, Ledger, Settings

pytestmark = pytest.mark.usefixtures("parting_without_waiting")


@pytest.fixture
def place(tmp_path: Path) -> harness.Mesh:
    """A mesh of this test's own, whose workers are scripted; commands on it need no model."""
    return harness.Mesh(tmp_path, Path("none"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What batches within this process say to people."""
    lines: list[str] = []
    monkeypatch.setattr(BatchDisplay, "say", lambda self, line: lines.append(line))
    monkeypatch.setattr(BatchDisplay, "draw", lambda self, *how_far: None)
    return lines


# --- Questions, workers that echo them, and runs ---


def asks(number: int) -> Json:
    """A question, every other one in OpenAI's shape."""
    if number % 2:
        return {"id": f"q{number}", "prompt": f"question {number}", "max_tokens": 8}
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 8}
    return {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, questions: Iterable[Json | str]) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in questions]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read(path: Path) -> list[Json]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def set_mode(path: Path, mode: int) -> None:
    path.chmod(mode)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def name_of(line: Json) -> Any:
    return line["custom_id"] if "custom_id" in line else line["id"]


def text_of(line: Json) -> str | None:
    if line.get("error") is not None:
        return None
    if "custom_id" in line:
        return str(line["response"]["body"]["choices"][0]["message"]["content"])
    return str(line["text"])


def codes_of(lines: Iterable[Json]) -> dict[Any, str]:
    return {name_of(line): line["error"]["code"] for line in lines if line.get("error") is not None}


def check_each_once(path: Path, count: int) -> None:
    """The oracle: q0, q1, ... each once, each with the answer to its own question."""
    lines = read(path)
    assert Counter(map(name_of, lines)) == Counter(f"q{number}" for number in range(count))
    assert [text_of(line) for line in lines] == [f"answer to question {name_of(line)[1:]}" for line in lines]


class Gate:
    """What answers wait behind while it is closed."""

    def __init__(self) -> None:
        self._is_open = True
        self._waiting: list[asyncio.Event] = []

    def clear(self) -> None:
        self._is_open = False

    def set(self) -> None:
        self._is_open = True
        while self._waiting:
            self.let_one()

    def let_one(self) -> None:
        self._waiting.pop(0).set()

    async def wait(self) -> None:
        if not self._is_open:
            self._waiting.append(asyncio.Event())
            await self._waiting[-1].wait()


class Echo:
    """A worker that answers "answer to" what it is asked, while `gate` is open. at_once: the most it had at a time."""

    def __init__(self, *, slots: int = 4, model: str = "tiny") -> None:
        self.worker = ScriptedWorker(self.script, model=model)
        self.slots = slots
        self.others = 0
        self.gate = Gate()
        self.active: set[str] = set()
        self.at_once = 0
        self.answered = 0
        self.on_prompt: Callable[[], None] = lambda: None
        self._answers: set[asyncio.Task[None]] = set()
        self.tell()

    def tell(self) -> None:
        """What its status says from now on."""
        held = {"active": len(self.active) + self.others, "waiting": 0, "capacity": 16}
        load = {"health": health_of(80), "slots": self.slots, "queue": held, "speed": 1.0}
        self.worker.status = {**load, "models": [{"name": self.worker.model}]}

    async def script(self, connection: Connection, request_id: str) -> bool:
        self.active.add(request_id)
        self.at_once = max(self.at_once, len(self.active))
        self.tell()
        body = next(each for each in reversed(self.worker.prompts) if each["request_id"] == request_id)
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        self.on_prompt()
        self._answers.add(asyncio.create_task(self._answer(connection, request_id, question)))
        return True

    async def _answer(self, connection: Connection, request_id: str, question: str) -> None:
        with contextlib.suppress(qmesh.QMeshError):
            await self.gate.wait()
            await connection.send(token_frame(request_id, 0, f"answer to {question}"))
            await connection.send(result_frame(request_id, f"answer to {question}"))
            self.answered += 1
        self.active.discard(request_id)
        self.tell()

    @contextlib.asynccontextmanager
    async def on(self, topic: str) -> AsyncIterator[Echo]:
        async with self.worker.on(topic):
            yield self


class Run:
    """One run of a batch within this process; `stop` is its Ctrl-C."""

    def __init__(self, place: harness.Mesh, *, parallel: int = 64, give_up_s: float | None = None, **more: Any) -> None:
        state_dir = str(place.state_dir)
        self._settings = Settings(host=qmesh.LOOPBACK, topic=place.topic, state_dir=state_dir, **more)
        self._ledger = Ledger(place.directory / "in.jsonl", place.directory / "out.jsonl")
        self._limits: dict[str, Any] = {"parallel": parallel, "give_up_s": give_up_s}
        self.stop = asyncio.Event()

    async def to_its_end(self) -> Json:
        """Its summary."""
        display = BatchDisplay(shown=False)
        with self._ledger as ledger:
            batch = Batch(ledger, self._settings, display, **self._limits)
            if ledger.left:
                await batch.run(self.stop)
            return qmesh.batch_summary(ledger, batch.tally, 0.0)


GLANCE_S = 0.01  # between two looks at what another process does


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - a file, or another process, makes it so
            await asyncio.sleep(GLANCE_S)


async def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    return process.returncode, stdout, stderr


# --- Shapes ---


@in_a_loop
async def test_each_line_is_answered_in_its_own_shape(place: harness.Mesh, source: Path, target: Path) -> None:
    write(
        source,
        [
            asks(0),
            asks(1),
            {"prompt": "question 2"},
            {"id": 7, "messages": [{"role": "user", "content": "question 3"}]},
        ],
    )
    async with Echo().on(place.topic):
        summary = await Run(place).to_its_end()
    assert (summary["total"], summary["answered"], summary["failed"], summary["left"]) == (4, 4, {}, 0)
    lines = {name_of(line): line for line in read(target)}
    assert sorted(lines, key=str) == [3, 7, "q0", "q1"]
    theirs, plain = lines["q0"], lines["q1"]
    assert set(theirs) == {"id", "custom_id", "response", "error"}
    assert theirs["id"].startswith("batch_req_")
    assert set(theirs["response"]) == {"status_code", "request_id", "body"}
    assert theirs["response"]["status_code"] == 200
    assert theirs["response"]["body"]["object"] == "chat.completion"
    told = {"id", "text", "worker_id", "model", "finish_reason", "usage", "failovers", "request_id"}
    assert set(plain) == told
    assert (plain["text"], plain["failovers"]) == ("answer to question 1", 0)


@in_a_loop
async def test_a_line_of_openais_may_want_several_choices_of_several_prompts(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    chat = asks(0)["body"] | {"n": 3}
    write(
        source,
        [asks(0) | {"body": chat}, asks(0) | {"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "a"}}],
    )
    async with Echo(slots=1).on(place.topic) as echo:
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["this_run"]["tokens"]["completion_tokens"]) == (2, 4)
    assert echo.at_once == 1
    bodies = {line["custom_id"]: line["response"]["body"] for line in read(target)}
    texts = [choice["message"]["content"] for choice in bodies["q0"]["choices"]]
    assert texts == ["answer to question 0"] * 3
    assert (bodies["x"]["object"], bodies["x"]["choices"][0]["text"]) == ("text_completion", "answer to a")


@in_a_loop
async def test_a_line_may_ask_for_a_worker_and_fails_where_that_is_not_there(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    async with Echo().on(place.topic) as one, Echo().on(place.topic):
        wanted = str(one.worker.worker_id)[:8]
        write(
            source,
            [
                asks(0) | {"custom_id": name, "body": asks(0)["body"] | {"worker": worker}}
                for name, worker in (("a", wanted), ("b", "0" * 8))
            ],
        )
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["failed"]) == (1, {"no_worker": 1})
    assert one.answered == 1
    assert codes_of(read(target)) == {"b": "no_worker"}


@in_a_loop
async def test_sampling_the_system_prompt_and_the_model_of_a_line_reach_the_worker(
    place: harness.Mesh, source: Path
) -> None:
    write(
        source, [{"prompt": "a", "system": "Be brief.", "model": "tiny", "temperature": 0.5, "stop": ["x"], "seed": 3}]
    )
    async with Echo().on(place.topic) as echo:
        await Run(place, model="another").to_its_end()
    (sent,) = echo.worker.prompts
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]
    assert sent["model"] == "tiny"
    params = sent["params"]
    assert (params["temperature"], params["stop"], params["seed"]) == (0.5, ["x"], 3)


BROKEN = {
    1: ("{half", "not JSON"),
    2: ("[1]", "not an object"),
    3: ('{"prompt": "hi", "prompt": "ho"}', "a key stands twice"),
    4: ('{"id": "a"}', "either prompt or messages is needed, and not both"),
    5: ('{"id": "b", "prompt": ""}', "the prompt is empty"),
    6: ('{"id": ["c"], "prompt": "hi"}', "id must be a whole number"),
    7: ('{"id": "d", "prompt": "hi", "label": 3}', "unknown parameter: label"),
    8: ('{"id": "e", "prompt": "hi", "temperature": "hot"}', "temperature must be a number"),
    9: ('{"id": "f", "prompt": "hi", "model": 3}', "model must be text"),
    10: ('{"custom_id": "g", "url": "/v1/images", "body": {}}', "url must be one of /v1/chat/completions"),
    11: ('{"custom_id": "h", "url": "/v1/completions", "method": "GET", "body": {}}', "method must be one of POST"),
    12: ('{"custom_id": "i", "url": "/v1/completions"}', "body must be an object"),
    13: ('{"custom_id": 5, "url": "/v1/completions", "body": {"prompt": "hi"}}', "custom_id must be text"),
    14: ('{"id": "\\ud800", "prompt": "hi"}', "half a surrogate pair"),
    15: ('{"id": "good", "prompt": "again"}', "the id good is that of an earlier line already"),
    16: ('{"prompt": "' + "long" * 300 + '"}', "more than 1,000 bytes"),
    17: ('{"id": "j", "prompt": "\udcff"}', "not JSON (UnicodeDecodeError"),
    18: (json.dumps(asks(0) | {"custom_id": "k", "body": {"messages": [], "tools": [{}]}}), "tools is not supported"),
    19: (
        json.dumps(asks(0) | {"custom_id": "l", "body": asks(0)["body"] | {"stream": True}}),
        "stream is not supported",
    ),
}


@in_a_loop
async def test_each_broken_line_gets_an_error_of_its_own_and_the_others_are_answered(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "MAX_BATCH_LINE_BYTES", 1000)
    first = '\ufeff{"id": "good", "prompt": "question 0"}'
    lines = ["", first, *(line for line, _ in BROKEN.values()), "  ", json.dumps(asks(1))]
    put(source, "\r\n".join(lines).encode(errors="surrogateescape").removeprefix(b"\r\n"))
    async with Echo().on(place.topic):
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["failed"], summary["left"]) == (2, {"invalid_request": len(BROKEN)}, 0)
    said = [line["error"]["message"] for line in read(target) if line.get("error") is not None]
    assert len(said) == len(BROKEN)
    for number, (_, words) in BROKEN.items():
        (message,) = (each for each in said if each.startswith(f"line {number + 1}: "))
        assert words in message


# --- Killed at any moment ---


KILLS = 12


def after(count: int, do: Callable[[], None]) -> Callable[[], None]:
    """What does something when it is called for the so many-th time."""
    left = iter(range(count - 1, -1, -1))
    return lambda: do() if next(left, None) == 0 else None


@in_a_loop
async def test_killed_at_any_moment_and_started_again_each_line_is_answered_exactly_once(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    """Killed as a worker gets a question, and while the program starts; and then more is torn off than a kill tears."""
    rng, count = random.Random(22), 240
    write(source, map(asks, range(count)))
    async with Echo(slots=3).on(place.topic) as one, Echo(slots=2).on(place.topic) as other:
        for kill in range(KILLS):
            process = place.popen("batch", str(source), "-o", str(target), "--quiet")
            if kill % 4 == 3:
                await asyncio.sleep(rng.uniform(0.1, 0.4))
            else:
                one.on_prompt = other.on_prompt = after(rng.randint(1, 30), process.kill)
                await asyncio.to_thread(process.wait, PATIENCE_S)
            process.kill()
            code, _, stderr = await ended(process)
            assert code == -signal.SIGKILL, stderr
            if kill % 3 == 2:
                put(target, content(target)[: -rng.randint(1, 40)])
        done = len(content(target).splitlines())
        one.on_prompt = other.on_prompt = lambda: None
        assert 0 < done < count
        code, stdout, stderr = await ended(place.popen("batch", str(source), "-o", str(target), "--json"))
    assert (code, json.loads(stdout)["answered"]) == (0, count), stderr
    check_each_once(target, count)
    assert sorted(path.name for path in place.directory.glob("*out.jsonl*")) == ["out.jsonl"]


def test_a_batch_that_real_workers_answer_survives_a_kill(mesh: harness.Mesh, source: Path, target: Path) -> None:
    mesh.start_worker()
    questions = [{"id": number, "prompt": f"What is {number} plus 1?", "max_tokens": 6} for number in range(12)]
    write(source, questions)
    with mesh.popen("batch", str(source), "-o", str(target), "--quiet") as process:
        while not target.exists() or content(target).count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(GLANCE_S)
        process.kill()
    first = content(target)
    first = first[: first.rindex(b"\n") + 1]
    summary = mesh.json("batch", str(source), "-o", str(target))
    assert content(target).startswith(first)
    lines = read(target)
    assert sorted(line["id"] for line in lines) == list(range(12))
    assert all(line["text"] and line["usage"]["completion_tokens"] <= 6 for line in lines)
    assert (summary["total"], summary["answered"], summary["left"]) == (12, 12, 0)
    assert sum(summary["this_run"]["workers"].values()) == 12 - first.count(b"\n")
    assert mesh.json("batch", str(source), "-o", str(target))["this_run"]["workers"] == {}


# --- What stands in the output ---


@in_a_loop
async def test_what_failed_for_want_of_time_is_asked_again_by_the_next_run_and_stands_there_once(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, [*map(asks, range(6)), "{broken"])
    late = sends(qmesh.error_frame(None, qmesh.DeadlineExceeded("the deadline passed")))
    async with Echo(slots=1).on(place.topic) as echo:
        echo.worker.script = in_turn(late, echo.script, late, echo.script)
        first = await Run(place).to_its_end()
        assert (first["answered"], first["failed"]) == (4, {"timeout": 2, "invalid_request": 1})
        errors = [line["error"] for line in read(target) if line.get("error")]
        assert sorted((error["code"], error["retryable"]) for error in errors) == [
            ("invalid_request", False),
            ("timeout", True),
            ("timeout", True),
        ]
        set_mode(target, 0o640)
        asked = len(echo.worker.prompts)
        second = await Run(place).to_its_end()
        assert len(echo.worker.prompts) - asked == 2
    assert (second["answered"], second["failed"]) == (6, {"invalid_request": 1})
    assert mode_of(target) == 0o640
    assert Counter(map(name_of, read(target))) == Counter([*(f"q{number}" for number in range(6)), 7])


@in_a_loop
async def test_a_broken_line_that_was_mended_and_lines_that_were_added_are_asked_by_the_next_run(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    async with Echo().on(place.topic):
        write(source, [asks(0), "{broken", asks(2)])
        assert (await Run(place).to_its_end())["failed"] == {"invalid_request": 1}
        write(source, map(asks, range(5)))
        assert (await Run(place).to_its_end())["answered"] == 5
    check_each_once(target, 5)


TORN = [
    b"{",
    b'{"id":"batch_r',
    b'{"request_id":"batch_req_3',
    b'{"request_id":"batch_req_3_0123456789abcdef","id":"x","text":"' + b"y" * 9000,
    b"\0" * 700,
    b'{"id":"\0\0',
    b'\0\0 and the end"}',
    b'\0\0 and the end"}\n{"requ',
]


@pytest.mark.parametrize("tail", TORN)
@in_a_loop
async def test_a_torn_last_line_is_asked_again(place: harness.Mesh, source: Path, target: Path, tail: bytes) -> None:
    write(source, map(asks, range(3)))
    async with Echo().on(place.topic) as echo:
        await Run(place).to_its_end()
        lines = content(target).splitlines(keepends=True)
        put(target, b"".join(lines[:2]) + tail)
        summary = await Run(place).to_its_end()
    assert (summary["answered"], len(echo.worker.prompts)) == (3, 4)
    check_each_once(target, 3)


@pytest.mark.parametrize("tail", [each for each in TORN if not each.startswith(b"\0\0 ")])
def test_a_torn_line_that_is_all_there_is_is_known_by_its_beginning(source: Path, target: Path, tail: bytes) -> None:
    write(source, map(asks, range(3)))
    put(target, tail)
    with Ledger(source, target) as ledger:
        assert ledger.left == 3
    assert content(target) == b""


@in_a_loop
async def test_a_last_line_that_lacks_but_its_end_is_asked_again(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(3)))
    async with Echo().on(place.topic):
        await Run(place).to_its_end()
        put(target, content(target)[:-1])
        assert (await Run(place).to_its_end())["this_run"]["tokens"]["completion_tokens"] == 1
    check_each_once(target, 3)


FOREIGN = {
    "prose": b"Dear diary,\n",
    "prose without an end": b"Dear diary",
    "questions": b'{"id": "q1", "prompt": "hi"}\n',
    "one question without an end": b'{"id":"q1","prompt":"hi"}',
    "half a question without an end": b'{"id":"q1","prompt":"hi",',
    "half a note without an end": b'{"id": 7, "note": "mine",}',
    "half a batch of OpenAI's": b'{"id":"batch_req_6f2e","custom_id":"q0","resp',
    "text in UTF-16": "a diary\n".encode("utf-16"),
    "zeros, and then something": b"\0\0\0 of mine",
    "a batch of OpenAI's": b'{"id": "batch_req_6f2e", "custom_id": "q0", "response": {}, "error": null}\n',
}


@pytest.mark.parametrize("theirs", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_somebody_elses_is_refused_and_left_as_it_is(
    place: harness.Mesh, source: Path, target: Path, theirs: bytes
) -> None:
    write(source, map(asks, range(3)))
    target.write_bytes(theirs)
    with (
        pytest.raises(qmesh.UsageError, match="is none that this command writes: it is left as it is"),
        Ledger(source, target),
    ):
        pass
    assert content(target) == theirs


@in_a_loop
async def test_what_somebody_wrote_behind_the_answers_is_refused_and_left(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(3)))
    async with Echo().on(place.topic):
        await Run(place).to_its_end()
    put(target, whole := content(target) + b"a note of mine")
    with pytest.raises(qmesh.UsageError, match="its line 4 is none that this command writes"), Ledger(source, target):
        pass
    assert content(target) == whole


@pytest.mark.parametrize("sign", ["\x85", "\u2028", "\u2029"])
def test_an_answer_is_one_line_for_readers_too_that_know_more_line_ends(source: Path, target: Path, sign: str) -> None:
    write(source, [asks(1)])
    with Ledger(source, target) as ledger:
        (question,) = filter(None, qmesh.Questions(ledger, Settings()).read())
        ledger.add(question.line, {"request_id": str(question.line.mark), "text": f"a{sign}b"})
    (line,) = content(target).decode().splitlines()
    assert json.loads(line)["text"] == f"a{sign}b"


@in_a_loop
async def test_an_answer_that_cannot_be_written_fails_its_own_line_alone(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, map(asks, range(4)))
    answered = qmesh.Question.answered

    def unwritable(self: qmesh.Question, answers: Any) -> Json:
        return answered(self, answers) | ({"text": float("nan")} if self.line.name == "q1" else {})

    monkeypatch.setattr(qmesh.Question, "answered", unwritable)
    async with Echo().on(place.topic) as echo:
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["failed"]) == (3, {qmesh.WireError.code: 1})
    assert echo.answered == 3 + qmesh.BATCH_ATTEMPTS
    (error,) = [line["error"] for line in read(target) if line.get("error")]
    assert (error["message"].partition(": ")[0], error["retryable"]) == ("the answer cannot be written", True)


def test_the_disk_is_told_of_a_new_output_and_of_one_that_took_its_place(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[os.stat_result] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        told.append(os.fstat(handle))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write(source, map(asks, range(2)))
    for _ in range(2):
        told.clear()
        with Ledger(source, target) as ledger:
            assert os.path.samestat(told[-1], target.parent.stat())
            question = next(filter(None, qmesh.Questions(ledger, Settings()).read()))
            ledger.add(question.line, question.line.failed(qmesh.DeadlineExceeded("late")))
    assert [stat.S_ISDIR(each.st_mode) for each in told] == [False, True, False]


class BrokenDisk(io.FileIO):
    """Takes half of the first line, and then cannot take that back."""

    def write(self, data: Any) -> int:
        if self.tell() == 0:
            return super().write(bytes(data[: len(data) // 2]))
        raise OSError(errno.EIO, "Input/output error")

    def truncate(self, size: int | None = None) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_after_half_a_line_that_cannot_be_taken_back_nothing_is_written(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, map(asks, range(2)))
    opened = Path.open

    def open_path(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        is_output = self == target.resolve() and mode == "ab"
        return BrokenDisk(self, "ab") if is_output else opened(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", open_path)
    with Ledger(source, target) as ledger:
        lines = [question.line for question in filter(None, qmesh.Questions(ledger, Settings()).read())]
        with pytest.raises(qmesh.QMeshError, match="cannot be written"):
            ledger.add(lines[0], {"id": str(lines[0].mark)})
        torn = content(target)
        monkeypatch.setattr(BrokenDisk, "write", io.FileIO.write)
        with pytest.raises(qmesh.QMeshError, match="cannot be written"):
            ledger.add(lines[1], {"id": str(lines[1].mark)})
        assert content(target) == torn != b""
        assert ledger.left == 2


@in_a_loop
async def test_answers_to_other_questions_are_refused_though_the_ids_are_the_same(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(3)))
    async with Echo().on(place.topic):
        await Run(place).to_its_end()
    before = content(target)
    for others in ([asks(0), asks(2), asks(1)], [asks(0)], [asks(0), asks(1), asks(2) | {"body": {"prompt": "else"}}]):
        write(source, others)
        with pytest.raises(qmesh.UsageError, match="answers other questions than those in"):
            await Run(place).to_its_end()
    assert content(target) == before


def test_what_cannot_be_a_batch_is_refused_with_exit_code_2(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, [asks(0)])
    fifo = place.directory / "fifo"
    os.mkfifo(fifo)
    for arguments, words in [
        (("-", "-o", str(target)), "-: the questions have to be in a file, so that a later run can go on"),
        ((str(source), "-o", "-"), "-: the answers have to be in a file"),
        ((str(source), "-o", str(fifo)), "the answers have to be in a file"),
        ((str(source), "-o", str(source)), "holds the questions: name another file for the answers"),
        ((str(place.directory / "none"), "-o", str(target)), "none: No such file or directory"),
        ((str(source), "-o", str(place.directory / "none" / "out")), "there is no folder"),
        ((str(source),), "-o/--output"),
        ((str(source), "-o", str(target), "--parallel", "0"), "a whole number from 1 to"),
        ((str(source), "-o", str(target), "--key", "none"), "the key file none cannot be read"),
    ]:
        finished = place.run("batch", *arguments)
        assert (finished.returncode, finished.stdout) == (2, ""), finished.stderr
        assert words in finished.stderr
    assert not target.exists() or content(target) == b""


def test_no_file_of_somebody_elses_is_taken_for_the_lock(tmp_path: Path, target: Path) -> None:
    """Not even the questions, whatever their name is; and none of these is touched."""
    lock = tmp_path / ".out.jsonl.qmesh-lock"
    for source, size in ((tmp_path / "out.jsonl.lock", 1), (lock, 1), (lock, 0)):
        write(source, map(asks, range(size)))
        before = content(source)
        is_lock = pytest.raises(qmesh.UsageError, match="name of the output's lock")
        with is_lock if source == lock else contextlib.nullcontext(), Ledger(source, target) as ledger:
            assert ledger.left == size
            assert lock.exists()
        assert source.exists()
        assert content(source) == before
        assert lock.exists() == (source == lock)
    put(lock, b"a note")
    write(other := tmp_path / "in.jsonl", [asks(0)])
    with pytest.raises(qmesh.UsageError, match="is in the way, and no lock of ours"), Ledger(other, target):
        pass
    assert content(lock) == b"a note"


@in_a_loop
async def test_of_two_processes_with_one_output_the_second_is_refused(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(20)))
    async with Echo().on(place.topic) as echo:
        echo.gate.clear()
        first = place.popen("batch", str(source), "-o", str(target), "--quiet")
        await until(lambda: bool(echo.worker.prompts))
        link = place.directory / "link.jsonl"
        link.symlink_to(target)
        code, _, stderr = await ended(place.popen("batch", str(source), "-o", str(link)))
        assert code == 2
        assert f"another process is writing {target}" in stderr
        echo.gate.set()
        assert (await ended(first))[0] == 0
    check_each_once(target, 20)


@in_a_loop
async def test_a_full_disk_ends_it_with_whole_lines_and_the_next_run_goes_on(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(40)))
    arguments = ("batch", str(source), "-o", str(target))

    def with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    async with Echo().on(place.topic):
        full = subprocess.Popen(  # noqa: ASYNC220 - it is awaited in a thread
            [*harness.running(place.program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=place.env,
            cwd=harness.ROOT,
            preexec_fn=with_little_room,
        )
        code, _, stderr = await ended(full)
        assert code == 1
        assert "cannot be written (File too large): make room, and run the same command again" in stderr
        assert 3000 < len(content(target)) <= 5000
        read(target)
        assert (await ended(place.popen(*arguments)))[0] == 0
    check_each_once(target, 40)


# --- The mesh ---


async def looked_at(echo: Echo) -> None:
    """Long enough that the batch knows how this worker does, and has drawn its conclusions."""
    before = echo.worker.statuses
    await until(lambda: echo.worker.statuses > before + 3)


@in_a_loop
async def test_it_grows_with_the_mesh_and_makes_room_for_others(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.1)
    write(source, map(asks, range(100)))
    run = Run(place)
    async with Echo(slots=2).on(place.topic) as one:
        one.gate.clear()
        ending = asyncio.create_task(run.to_its_end())
        await until(lambda: len(one.active) == 2)
        await looked_at(one)
        assert one.at_once == 2
        async with Echo(slots=3).on(place.topic) as other:
            other.gate.clear()
            await until(lambda: len(other.active) == 3)
            assert (one.at_once, other.at_once) == (2, 3)
            other.others = 2  # two of its three slots are somebody else's now: of our three one may stay
            other.tell()
            for left in (2, 1):
                await looked_at(other)
                other.gate.let_one()
                await until(lambda left=left: len(other.active) == left)  # type: ignore[misc]
            await looked_at(other)
            assert len(other.active) == 1
            other.gate.let_one()
            await until(lambda: len(other.worker.prompts) == 4)  # the next one takes its place
            other.gate.set()
            one.gate.set()
            summary = await ending
    assert summary["answered"] == 100
    check_each_once(target, 100)


def wants(number: int, model: str | None) -> Json:
    return {"id": f"q{number}", "prompt": f"question {number}"} | ({"model": model} if model else {})


@contextlib.asynccontextmanager
async def busy_and_idle(topic: str) -> AsyncIterator[tuple[Echo, Echo]]:
    """A worker whose only slot is somebody else's, so that we stand in its line; and one that is idle."""
    busy, idle = Echo(slots=1, model="big"), Echo(slots=1)
    busy.gate.clear()
    busy.others = 1
    busy.tell()

    async def lines_up(connection: Connection, request_id: str) -> bool:
        await connection.send({"type": "inference_queued", "position": 1, "wait_s": 60.0, "request_id": request_id})
        return await busy.script(connection, request_id)

    busy.worker.script = lines_up
    async with busy.on(topic), idle.on(topic):
        yield busy, idle


@in_a_loop
async def test_questions_for_a_busy_model_hold_up_no_others(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.1)
    write(source, [wants(number, "big" if number < 20 else (None, "tiny")[number % 2]) for number in range(40)])
    async with busy_and_idle(place.topic) as (busy, idle):
        ending = asyncio.create_task(Run(place).to_its_end())
        await until(lambda: idle.answered >= 20)
        assert busy.answered == 0
        assert busy.at_once == 1
        busy.gate.set()
        assert (await ending)["answered"] == 40
    check_each_once(target, 40)


@in_a_loop
async def test_only_so_many_questions_are_held_for_a_busy_model(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.1)
    monkeypatch.setattr(qmesh, "BATCH_HELD", 3)
    write(source, [wants(number, "tiny" if number in (3, 9) else "big") for number in range(10)])
    async with busy_and_idle(place.topic) as (busy, idle):
        ending = asyncio.create_task(Run(place).to_its_end())
        await until(lambda: idle.answered == 1)
        await looked_at(idle)
        assert (busy.answered, idle.answered) == (0, 1)
        busy.gate.set()
        assert (await ending)["answered"] == 10
    check_each_once(target, 10)


@in_a_loop
async def test_no_more_are_under_way_than_parallel_says(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, map(asks, range(30)))
    async with Echo(slots=8).on(place.topic) as echo:
        echo.gate.clear()
        ending = asyncio.create_task(Run(place, parallel=3).to_its_end())
        await until(lambda: len(echo.active) == 3)
        echo.gate.set()
        await ending
    assert echo.at_once == 3
    check_each_once(target, 30)


@in_a_loop
async def test_a_question_that_would_wait_for_long_in_a_line_is_taken_back_and_asked_again(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.1)
    write(source, map(asks, range(10)))
    in_line = sends({"type": "inference_queued", "position": 9, "wait_s": 60.0})
    async with Echo(slots=2).on(place.topic) as echo:
        echo.gate.clear()
        echo.worker.script = in_turn(echo.script, in_line, echo.script)
        ending = asyncio.create_task(Run(place).to_its_end())
        async with asyncio.timeout(PATIENCE_S):
            left = await echo.worker.cancelled.get()
        assert left == echo.worker.prompts[1]["request_id"]
        echo.gate.set()
        assert (await ending)["answered"] == 10
    check_each_once(target, 10)


@in_a_loop
async def test_refusals_do_not_fail_a_question_however_many(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, map(asks, range(8)))
    async with Echo().on(place.topic) as echo:
        echo.worker.script = in_turn(*[refuses()] * 6, echo.script)
        assert (await Run(place, timeout_s=1.0).to_its_end())["answered"] == 8
    check_each_once(target, 8)


@in_a_loop
async def test_a_question_that_its_workers_fail_at_again_and_again_is_given_up_and_the_others_are_answered(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "MAX_LOSSES", 1)
    write(source, map(asks, range(4)))
    fails = {"type": "inference_error", "code": "internal", "message": "out of memory", "retryable": True}
    async with Echo(slots=1).on(place.topic) as echo:

        async def script(connection: Connection, request_id: str) -> bool:
            is_second = echo.worker.prompts[-1]["messages"][-1]["content"] == "question 1"
            return await (sends(fails) if is_second else echo.script)(connection, request_id)

        echo.worker.script = script
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["failed"]) == (3, {"lost": 1})
    assert codes_of(read(target)) == {"q1": "lost"}
    asked = [sent["messages"][-1]["content"] for sent in echo.worker.prompts]
    assert asked.count("question 1") == qmesh.BATCH_ATTEMPTS


@in_a_loop
async def test_a_model_that_nobody_has_fails_its_own_lines_alone(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, [*map(asks, range(4)), {"id": "x", "prompt": "hi", "model": "huge"}])
    async with Echo().on(place.topic):
        summary = await Run(place).to_its_end()
    assert (summary["answered"], summary["failed"]) == (4, {"model_not_found": 1})


@in_a_loop
async def test_it_waits_for_a_worker_says_so_and_goes_on_when_one_comes(
    place: harness.Mesh,
    source: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    caught: list[str],
) -> None:
    monkeypatch.setattr(qmesh, "DISCOVERY_TIMEOUT_S", 0.5)
    write(source, map(asks, range(5)))
    ending = asyncio.create_task(Run(place).to_its_end())
    await until(lambda: bool(caught))
    assert caught[0].startswith("⏳ No worker is there; waiting for one, Ctrl-C ends. Tried: beacons on 127.0.0.1")
    async with Echo().on(place.topic):
        assert (await ending)["answered"] == 5
    assert caught[1:] == ["🌐 Discovered 1 worker"]
    check_each_once(target, 5)


def test_it_gives_up_with_exit_code_3_where_that_was_asked_for(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, [asks(0), "{broken"])
    finished = place.run("batch", str(source), "-o", str(target), "--give-up", "1", "--json")
    assert finished.returncode == qmesh.NoWorkerFound.exit_code
    assert "no worker was at work for" in json.loads(finished.stdout)["error"]["message"]
    assert codes_of(read(target)) in ({}, {2: "invalid_request"})


@in_a_loop
async def test_it_does_not_give_up_where_a_worker_is_there(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before it is found, nor while it is at work, nor between two questions."""
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.01)
    write(source, map(asks, range(10)))
    async with Echo(slots=2).on(place.topic) as echo:
        echo.gate.clear()
        ending = asyncio.create_task(Run(place, give_up_s=0.0).to_its_end())
        await until(lambda: echo.worker.statuses > 9 or ending.done())
        echo.gate.set()
        assert (await ending)["answered"] == 10
    check_each_once(target, 10)


@in_a_loop
async def test_it_gives_up_where_all_workers_that_have_the_model_are_busy_with_others(
    place: harness.Mesh, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_LOOK_S", 0.1)
    write(source, [wants(0, "big")])
    async with busy_and_idle(place.topic) as (busy, _):
        with pytest.raises(qmesh.NoWorkerFound, match="no worker was at work for"):
            await Run(place, give_up_s=0.5).to_its_end()
        assert len(busy.worker.prompts) == 1


@in_a_loop
async def test_what_ends_it_is_not_missed_while_answered_lines_are_passed_over(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_YIELD_LINES", 1)
    monkeypatch.setattr(qmesh, "LOOKUP_DEADLINE_S", 0.3)
    write(source, map(asks, range(5000)))
    with Ledger(source, target) as ledger:
        for question in filter(None, qmesh.Questions(ledger, Settings()).read()):
            if question.line.mark.line < 5000:
                ledger.add(question.line, {"id": str(question.line.mark)})
    with pytest.raises(qmesh.NoWorkerFound, match="no worker was at work for"):
        await Run(place, give_up_s=0.0).to_its_end()


# --- Interrupted ---


@in_a_loop
async def test_an_interrupt_lets_what_is_under_way_end_takes_nothing_new_and_says_how_to_go_on(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(30)))
    async with Echo(slots=2).on(place.topic) as echo:
        echo.gate.clear()
        process = place.popen("batch", str(source), "-o", str(target))
        await until(lambda: len(echo.active) == 2)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "👋 Stopping: up to 5 s for 2 questions under way" not in await asyncio.to_thread(
            process.stderr.readline
        ):
            pass
        echo.gate.set()
        code, _, stderr = await ended(process)
        assert code == qmesh.EXIT_INTERRUPTED
        assert "🧮 2 of 30 answered" in stderr
        assert "Run the same command again to ask 28 lines again" in stderr
        assert "Traceback" not in stderr
        assert len(read(target)) == echo.answered == 2
        assert (await ended(place.popen("batch", str(source), "-o", str(target))))[0] == 0
    check_each_once(target, 30)


@in_a_loop
async def test_what_is_not_done_a_moment_after_an_interrupt_is_cancelled(
    place: harness.Mesh, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmesh, "BATCH_GRACE_S", 0.1)
    write(source, map(asks, range(3)))
    worker = ScriptedWorker(IS_SILENT)
    run = Run(place)
    async with worker.on(place.topic):
        ending = asyncio.create_task(run.to_its_end())
        await until(lambda: len(worker.prompts) == 3)
        run.stop.set()
        assert (await ending)["left"] == 3
        async with asyncio.timeout(PATIENCE_S):
            left = {await worker.cancelled.get() for _ in range(3)}
        assert left == {sent["request_id"] for sent in worker.prompts}
    assert read(target) == []


@in_a_loop
async def test_a_second_interrupt_ends_it_at_once(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, map(asks, range(3)))
    async with ScriptedWorker(IS_SILENT).on(place.topic):
        process = place.popen("batch", str(source), "-o", str(target))
        assert process.stderr is not None
        said = ""
        for words in ("in flight", "👋 Stopping"):
            while words not in said:
                said += await asyncio.to_thread(process.stderr.readline)
            process.send_signal(signal.SIGINT)
        code, _, stderr = await ended(process)
    assert code == qmesh.EXIT_INTERRUPTED
    assert "Stopping at once; what was under way is asked again by the same command" in stderr


# --- What is seen, and what it takes ---


@in_a_loop
async def test_on_a_terminal_a_bar_is_redrawn_in_place(place: harness.Mesh, source: Path, target: Path) -> None:
    write(source, [*map(asks, range(6)), "{broken"])
    async with Echo().on(place.topic):
        ours, theirs = pty.openpty()
        command = [*harness.running(place.program), "batch", str(source), "-o", str(target)]
        with subprocess.Popen(  # noqa: ASYNC220 - it is awaited in a thread
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=place.env, cwd=harness.ROOT
        ) as process:
            os.close(theirs)
            shown = (await asyncio.to_thread(read_terminal, ours)).decode()
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 1
        os.close(ours)
    bars = [part for part in shown.split("\r") if part.startswith("[")]
    assert bars
    assert all("/7, " in bar and "in flight" in bar for bar in bars)
    last = shown.splitlines()[-2:]
    assert last[0].startswith("🧮 6 of 7 answered; in this run 6, with 6 tokens from 1 worker, in ")
    assert last[1] == "❌ 1 failed: 1 invalid_request. out.jsonl says why each did"


def read_terminal(descriptor: int) -> bytes:
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed
        while chunk := os.read(descriptor, 4096):
            shown += chunk
    return shown


@in_a_loop
async def test_quiet_says_nothing_and_json_prints_the_summary_alone(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    write(source, map(asks, range(6)))
    async with Echo().on(place.topic) as echo:
        finished = await ended(place.popen("batch", str(source), "-o", str(target), "--quiet", "--json"))
    code, stdout, stderr = finished
    assert (code, stderr) == (0, "")
    summary = json.loads(stdout)
    this_run = summary.pop("this_run")
    assert summary == {"total": 6, "answered": 6, "failed": {}, "left": 0}
    assert this_run.pop("seconds") > 0
    assert this_run == {
        "answered": 6,
        "tokens": {"prompt_tokens": 6, "completion_tokens": 6},
        "failovers": 0,
        "workers": {str(echo.worker.worker_id): 6},
    }
    assert echo.answered == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@in_a_loop
async def test_a_file_of_200_000_lines_that_are_answered_already_takes_little_memory(
    place: harness.Mesh, source: Path, target: Path
) -> None:
    count = 200_000
    with source.open("wb") as questions, target.open("wb") as answers:
        for number in range(1, count + 1):
            question = b'{"id":"q%d","prompt":"%s"}' % (number, b"word " * 40)
            questions.write(question + b"\n")
            if number < count:
                mark = qmesh.Mark(number, qmesh.digest_of(question))
                answers.write(
                    b'{"request_id":"%s","id":"q%d","text":"%s"}\n' % (str(mark).encode(), number, b"word " * 40)
                )
    async with Echo().on(place.topic) as echo:
        peaks: list[int] = []
        echo.on_prompt = lambda: peaks.append(peak_memory_kib(process.pid))  # by then both files are read
        process = place.popen("batch", str(source), "-o", str(target), "--quiet")
        code, _, stderr = await ended(process)
    assert code == 0, stderr
    assert content(target).count(b"\n") == count
    assert max(peaks) < 128 * 1024  # both files together are ten times what is above the program itself


def peak_memory_kib(pid: int) -> int:
    """Of the program alone: what `wait4` tells begins with what the process that started it had."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(peak)
