"""What a person at the command line sees of a fault."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import questions
from actors import CLIENT_TIMEOUT_S, STAGE_TIMEOUT_S, Server, wait_until
from arena import Known, LoopbackArena
from questions import KEEP_BUSY
from story import ERROR, Question

EARLY_CHARS = 20  # of an answer, behind which most of it is still to come
SHORT_TIMEOUT_S = "6"
AT_ONCE_S = 2.0  # for a process to end that does nothing more; a busy machine schedules it late
PATIENT_GRACE = ("--grace", "600")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Known:
    return questions.learn(tmp_path_factory.mktemp("undisturbed"), model_path, [questions.WARM_UP, KEEP_BUSY])


@pytest.fixture
def arena(tmp_path: Path, model_path: Path, known: Known) -> Iterator[LoopbackArena]:
    """Its invariants are checked when the test is over."""
    made = LoopbackArena(tmp_path / "arena", model_path, known, Random(0))
    with made:
        yield made
    assert made.broken == []


def prompt(arena: LoopbackArena, question: Question, *flags: str) -> subprocess.Popen[str]:
    """The command, under way."""
    greedy = ("--temperature", "0", "--max-tokens", str(question.max_tokens))
    return arena.mesh.popen("prompt", question.text, *greedy, *flags)


def busy(arena: LoopbackArena) -> Server:
    """The worker that works on the only request there is."""

    def found() -> list[Server]:
        return [server for server in arena.servers if arena.watcher.load(server) == (1, 0)]

    wait_until(lambda: bool(found()), STAGE_TIMEOUT_S, "a worker with work")
    return found()[0]


def test_a_text_goes_on_and_one_line_tells_of_it(arena: LoopbackArena) -> None:
    arena.start(2)
    command = prompt(arena, KEEP_BUSY)
    assert command.stdout is not None
    begun = command.stdout.read(EARLY_CHARS)
    victim = busy(arena)
    victim.kill()
    rest, stderr = command.communicate(timeout=CLIENT_TIMEOUT_S)
    assert command.returncode == 0, stderr
    assert begun + rest == arena.known[KEEP_BUSY].text + "\n"
    (line,) = stderr.splitlines()
    assert victim.worker_id[:6] in line
    assert arena.others(victim)[0].worker_id[:6] in line


def test_json_tells_how_often_the_worker_was_replaced(arena: LoopbackArena) -> None:
    first, second = arena.start(2)
    command = prompt(arena, KEEP_BUSY, "--json")
    victim = busy(arena)
    victim.terminate()  # it hands over when its grace is over, in the middle of the answer
    stdout, stderr = command.communicate(timeout=CLIENT_TIMEOUT_S)
    assert (command.returncode, stderr) == (0, "")
    answer = json.loads(stdout)
    assert answer["text"] == arena.known[KEEP_BUSY].text
    assert answer["worker_id"] == (second if victim is first else first).worker_id
    assert answer["failovers"] == 1


def test_when_no_worker_is_left_what_was_said_stands_and_the_error_is_clear(arena: LoopbackArena) -> None:
    arena.start(1)
    command = prompt(arena, KEEP_BUSY, "--timeout", SHORT_TIMEOUT_S)
    assert command.stdout is not None
    begun = command.stdout.read(EARLY_CHARS)
    busy(arena).kill()
    rest, stderr = command.communicate(timeout=CLIENT_TIMEOUT_S)
    assert command.returncode in (1, 3, 4)
    assert arena.known[KEEP_BUSY].text.startswith((begun + rest).rstrip("\n"))
    message, remedy = stderr.splitlines()
    assert message.startswith("error: ")
    assert remedy.startswith("  ")


def test_a_draining_worker_refuses_and_a_second_signal_ends_it_at_once(arena: LoopbackArena) -> None:
    (server,) = arena.start(1, *PATIENT_GRACE)
    running = arena.watcher.ask_at(server, KEEP_BUSY)
    arena.watcher.wait(lambda: bool(running.pieces), STAGE_TIMEOUT_S, "an answer that has begun")
    server.terminate()

    def refuses() -> bool:
        late = arena.watcher.ask_at(server, KEEP_BUSY)
        arena.watcher.wait(lambda: late.over or bool(late.pieces), STAGE_TIMEOUT_S, "an answer or a refusal")
        return late.ending is not None and late.ending.kind == ERROR

    wait_until(refuses, STAGE_TIMEOUT_S, "a worker that refuses")
    assert not running.over
    server.process.popen.terminate()
    server.process.popen.wait(AT_ONCE_S)
    server.ended = "stopped at once"
