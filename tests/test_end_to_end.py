"""The main job on real processes and the real model, from nothing told to an answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import pytest
from transcript import parts_of, written

import qmesh

PROMPT = "Why is the sky blue?"
GREEDY = ("--temperature", "0", "--max-tokens", "40")


def workers_in_status(mesh: harness.Mesh) -> set[str]:
    finished = mesh.run("status", "--json")
    assert finished.returncode in (0, 3), finished.stderr
    if finished.returncode == 3:
        return set()
    return {worker["worker_id"] for worker in json.loads(finished.stdout)["workers"]}


def test_three_workers_share_twenty_concurrent_prompts(mesh: harness.Mesh) -> None:
    workers = mesh.start_workers(3)
    status = mesh.json("status")
    assert {worker["worker_id"] for worker in status["workers"]} == {worker.worker_id for worker in workers}

    def ask(number: int) -> Any:
        return mesh.json("prompt", f"Count from {number} to {number + 3}.", "--max-tokens", "24")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert all(answer["text"] and answer["finish_reason"] in ("stop", "length") for answer in answers)
    shares = Counter(answer["worker_id"] for answer in answers)
    assert set(shares) == {worker.worker_id for worker in workers}, shares
    assert max(shares.values()) <= 14, shares


def test_a_killed_worker_is_gone_within_35_seconds_and_a_stopped_one_at_once(mesh: harness.Mesh) -> None:
    killed, stopped, survivor = mesh.start_workers(3)
    assert workers_in_status(mesh) == {killed.worker_id, stopped.worker_id, survivor.worker_id}

    assert stopped.stop() == 0
    assert stopped.worker_id not in workers_in_status(mesh)

    killed.end()
    deadline = time.monotonic() + qmesh.RECORD_TTL_S
    while killed.worker_id in workers_in_status(mesh):
        assert time.monotonic() < deadline
    assert workers_in_status(mesh) == {survivor.worker_id}


def test_greedy_output_through_the_mesh_equals_that_of_llama_cpp_python(two_workers: harness.Mesh) -> None:
    import llama_cpp

    # The types decide about the last bits, and so about close calls.
    attention: Any = {"flash_attn": True, "type_k": qmesh.UNIFORM_CACHE[0], "type_v": qmesh.UNIFORM_CACHE[1]}
    llama = llama_cpp.Llama(str(two_workers.model), n_ctx=1024, n_threads=2, **attention, verbose=False)
    own: Any = llama.create_chat_completion(
        [{"role": "user", "content": PROMPT}], temperature=0, max_tokens=40, repeat_penalty=1.0
    )
    answer = two_workers.json("prompt", PROMPT, *GREEDY)
    assert answer["text"] == own["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == own["usage"]["completion_tokens"]
    llama.close()


def test_an_answer_goes_to_stdout_and_nothing_else_does(two_workers: harness.Mesh) -> None:
    whole = two_workers.json("prompt", PROMPT, *GREEDY)["text"]
    streamed = two_workers.run("prompt", PROMPT, *GREEDY)
    assert (streamed.returncode, streamed.stdout, streamed.stderr) == (0, whole + "\n", "")
    assert two_workers.run("prompt", "-", *GREEDY, "--no-stream", stdin=PROMPT).stdout == whole + "\n"


STORY = ("Write a long story about a fox.", "--temperature", "0", "--max-tokens", "200")


def kill_whoever_is_at_work(mesh: harness.Mesh) -> harness.Process:
    """Kill the worker that has a request, as a cut cord would."""
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=mesh.topic, state_dir=str(mesh.state_dir))
    deadline = time.monotonic() + harness.COMMAND_TIMEOUT_S
    with qmesh.BlockingClient(settings) as watching:
        while time.monotonic() < deadline:
            for status in watching.statuses():
                if status["queue"]["active"]:
                    (worker,) = [each for each in mesh.processes if each.worker_id == status["worker_id"]]
                    worker.popen.kill()
                    return worker
    raise AssertionError("no worker was ever at work")


def test_an_answer_whose_worker_is_killed_goes_on_at_another_without_a_gap_in_the_text(mesh: harness.Mesh) -> None:
    mesh.start_workers(2)
    whole = mesh.json("prompt", *STORY)
    with mesh.popen("prompt", *STORY) as asking:
        assert asking.stdout is not None
        assert asking.stderr is not None
        begun = asking.stdout.read(10)
        killed = kill_whoever_is_at_work(mesh)
        rest, stderr = asking.stdout.read(), asking.stderr.read()
    assert asking.returncode == 0, stderr
    assert begun + rest == whole["text"] + "\n"
    told = rf"🔁 Lost worker {killed.worker_id[:6]} after \d+ tokens? \(.*\); \w{{6}} went on\n"
    assert re.fullmatch(told, stderr)


def test_when_the_only_worker_is_killed_the_error_says_how_far_the_answer_came(mesh: harness.Mesh) -> None:
    worker = mesh.start_worker()
    asking = mesh.popen("prompt", *STORY, "--timeout", "8")
    assert asking.stdout is not None
    begun = asking.stdout.read(10)
    worker.popen.kill()
    rest, stderr = asking.communicate(timeout=harness.COMMAND_TIMEOUT_S)
    assert asking.returncode == 1
    assert len(begun + rest) > 10
    assert re.search(r"the worker was lost after \d+ tokens, and none is left that could go on", stderr)
    assert "Traceback" not in stderr


EXAMPLES = [block for block in parts_of(written()).blocks["python"] if "qmesh." in block]


@pytest.fixture(scope="module")
def terse(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[harness.Mesh]:
    """A mesh whose worker has room for 200 tokens of an answer, however many are asked for."""
    with harness.Mesh(tmp_path_factory.mktemp("terse"), model_path) as mesh:
        mesh.start_worker("--ctx", "256")
        yield mesh


@pytest.mark.parametrize("example", EXAMPLES, ids=["asyncio", "blocking"])
def test_the_readmes_programs_print_an_answer(terse: harness.Mesh, example: str) -> None:
    env = terse.env | {"PYTHONPATH": str(harness.ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", example],
        env=env,
        capture_output=True,
        text=True,
        timeout=harness.COMMAND_TIMEOUT_S,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert len(finished.stdout.split()) > 5


def test_a_worker_keeps_its_id_over_a_restart_and_a_second_one_has_its_own(mesh: harness.Mesh) -> None:
    first = mesh.start_worker()
    second = mesh.start_worker()
    assert first.worker_id != second.worker_id
    first.stop()
    assert mesh.start_worker().worker_id == first.worker_id


def test_status_tells_how_busy_the_graphics_cards_are(mesh: harness.Mesh, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA T4, 300, 15360, 7'\n")
    program.chmod(0o755)
    mesh.start_worker("--gpu-layers", "0", env={"PATH": f"{program.parent}:{os.environ['PATH']}"})
    cards: list[Any] = []
    while not cards:  # it is asked for once the worker is ready
        (worker,) = mesh.json("status")["workers"]
        cards = worker["gpu"]["cards"]
    assert cards == [
        {"name": "NVIDIA T4", "memory_used": 300 * 2**20, "memory_total": 15360 * 2**20, "utilization": 7.0}
    ]
    assert worker["gpu"]["layers"] == 0
