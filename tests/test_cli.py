"""Section 19, the command line: what a person types and sees, and the exit codes that scripts go by."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import psutil
import pytest

import qmesh

README = (harness.ROOT / "README.md").read_text("utf-8")
QUESTION = "Why is the sky blue?"


@pytest.fixture
def nobody(tmp_path: Path) -> harness.Mesh:
    """A mesh without a worker; commands on it need no model."""
    return harness.Mesh(tmp_path, Path("none"))


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- Usage ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("conquer",), "invalid choice: 'conquer'"),
        (("prompt",), "TEXT"),
        (("prompt", ""), "the prompt is empty"),
        (("prompt", "  \n"), "the prompt is empty"),
        (("prompt", "hi", "--temperature", "-1"), "temperature must be from 0 to 100, not -1.0"),
        (("prompt", "hi", "--max-tokens", "0"), "max_tokens must be from 1"),
        (("prompt", "hi", "--stop", ""), "stop takes up to"),
        (("prompt", "hi", "--timeout", "never"), "--timeout: a number of seconds is needed, not 'never'"),
        (("prompt", "hi", "--host", "localhost"), "--host: an IP address of this machine is needed"),
        (("prompt", "hi", "--host", ""), "--host: an IP address of this machine is needed"),
        (("prompt", "hi", "--peer", "a:b"), "--peer: a port is a number from 0 to 65535"),
        (("prompt", "hi", "--peer", "0.0.0.0"), "--peer: 0.0.0.0 is no address of a single machine"),
        (("prompt", "hi", "--peer", "239.192.77.77:5"), "--peer: 239.192.77.77:5 is no address of a single machine"),
        (("prompt", "hi", "--peer", "lab7:0"), "--peer: lab7:0 is no address of a single machine"),
        (("prompt", "hi", "--json-schema", "no/such/file"), "--json-schema no/such/file: No such file"),
        (("status", "--log-level", "loud"), "--log-level: one of debug, info, warning, error"),
        (("worker", "--slots", "0"), "a whole number from 1 to 64 is needed, not '0'"),
        (("worker", "--gpu-layers", "many"), "--gpu-layers: a number of layers is needed"),
        (("worker", "--port", "70000"), "--port: a port is a number from 0 to 65535"),
    ],
)
def test_what_makes_no_sense_is_refused_with_exit_code_2(
    nobody: harness.Mesh, arguments: tuple[str, ...], said: str
) -> None:
    finished = nobody.run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_peer_whose_name_cannot_be_resolved_is_named_and_does_not_keep_others_from_answering(
    nobody: harness.Mesh, two_workers: harness.Mesh
) -> None:
    """It may be resolved in a minute, and others may be found without it."""
    alone = nobody.run("prompt", "hi", "--peer", ".nowhere")
    assert alone.returncode == qmesh.NoWorkerFound.exit_code
    assert "the peer .nowhere cannot be resolved" in alone.stderr
    assert "--peer .nowhere (cannot be resolved: " in alone.stderr
    assert two_workers.json("prompt", "hi", "--max-tokens", "2", "--peer", ".nowhere")["text"]


def test_a_bad_variable_of_the_environment_is_named(nobody: harness.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_LAYERS", "few")
    finished = nobody.run("status")
    assert finished.returncode == 2
    assert "GPU_LAYERS: a number of layers is needed (-1 all, 0 none), not 'few'" in finished.stderr


# --- Nobody is there ---


@pytest.mark.parametrize("command", [("prompt", "hi"), ("status",)])
def test_where_nobody_is_it_says_what_was_tried_and_what_to_do(nobody: harness.Mesh, command: tuple[str, ...]) -> None:
    finished = nobody.run(*command, "--timeout", "1", "--peer", "127.0.0.1:9")
    assert (finished.returncode, finished.stdout) == (3, "")
    assert "no worker was found in 1.0 s; tried: beacons on 127.0.0.1" in finished.stderr
    assert "--peer 127.0.0.1:9" in finished.stderr
    assert "Start one with `python qmesh.py worker`" in finished.stderr


def test_an_error_is_json_too_where_json_was_asked_for(nobody: harness.Mesh) -> None:
    finished = nobody.run("prompt", "hi", "--timeout", "1", "--json")
    assert finished.returncode == 3
    assert json.loads(finished.stdout)["error"]["message"] in finished.stderr


# --- Asking ---


def test_an_unknown_model_is_exit_code_5_and_those_that_exist_are_named(two_workers: harness.Mesh) -> None:
    finished = two_workers.run("prompt", "hi", "--model", "gpt-17")
    assert (finished.returncode, finished.stdout) == (5, "")
    assert "no worker has the model gpt-17; the mesh has: SmolLM2-135M-Instruct.Q4_1" in finished.stderr


def test_a_model_is_known_by_name_whatever_its_case_and_ending(two_workers: harness.Mesh) -> None:
    answer = two_workers.json("prompt", "hi", "--model", "smollm2-135m-instruct.q4_1.GGUF", "--max-tokens", "2")
    assert answer["model"] == "SmolLM2-135M-Instruct.Q4_1"


def test_an_over_long_prompt_is_refused_with_the_numbers(two_workers: harness.Mesh) -> None:
    finished = two_workers.run("prompt", "-", stdin="word " * 3000)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert re.search(r"the prompt has 3,\d\d\d tokens and this worker's context holds 1,024", finished.stderr)


def test_when_every_worker_is_full_it_is_exit_code_4(mesh: harness.Mesh) -> None:
    mesh.start_worker("--queue", "1", "--slots", "1")
    with mesh.popen("prompt", "Write a long story.", "--max-tokens", "900", "--temperature", "0") as busy:
        assert busy.stdout is not None
        assert busy.stdout.read(1)
        finished = mesh.run("prompt", "hi", "--timeout", "1.5")
        busy.kill()
    assert (finished.returncode, finished.stdout) == (4, "")
    assert "this worker's queue is full (1 requests)" in finished.stderr


def test_sampling_flags_reach_the_worker(two_workers: harness.Mesh, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}')
    flags = ("--json-schema", str(schema), "--max-tokens", "40", "--temperature", "0.1", "--sample-seed", "1")
    answer = two_workers.json("prompt", "How old is Ann?", "--system", "Be brief.", *flags)
    assert isinstance(json.loads(answer["text"])["age"], int)
    stopped = two_workers.json("prompt", "Count: 1, 2, 3, 4", "--temperature", "0", "--stop", "3", "--max-tokens", "30")
    assert "3" not in stopped["text"]


def test_the_json_of_an_answer_holds_what_is_promised(two_workers: harness.Mesh) -> None:
    answer = two_workers.json("prompt", QUESTION, "--max-tokens", "4")
    assert set(answer) == {"text", "worker_id", "model", "finish_reason", "usage", "failovers", "timings"}
    assert set(answer["timings"]) == {"discover_ms", "first_token_ms", "total_ms", "tokens_per_s"}
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert answer["worker_id"] in {worker.worker_id for worker in two_workers.processes}


def test_on_a_terminal_the_familiar_lines_stand_around_the_answer(two_workers: harness.Mesh) -> None:
    shown = on_a_terminal(two_workers, "prompt", QUESTION, "--max-tokens", "6")
    lines = [r"🌐 Discovered \d workers?", r"✅ Selected worker [0-9a-f]{6} \(health: \d+\)", "📤 Sending prompt..."]
    assert re.search("\r\n".join([*lines, r"📥 Response: .*", r"⏱️  Total time: \d+\.\ds", ""]), shown, re.DOTALL), shown


def on_a_terminal(mesh: harness.Mesh, *arguments: str) -> str:
    """What a person sees who runs a command, to its end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(mesh.program), *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=mesh.env) as process:
        os.close(theirs)
        shown = b""
        while chunk := read_terminal(ours):
            shown += chunk
        process.wait(harness.COMMAND_TIMEOUT_S)
    os.close(ours)
    return shown.decode()


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how Linux says that the other side has closed
        return b""


def test_an_interrupt_ends_the_answer_with_a_clean_line_and_130(two_workers: harness.Mesh) -> None:
    with two_workers.popen("prompt", "Write a long story.", "--max-tokens", "900", "--temperature", "0") as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(5)
        asking.send_signal(signal.SIGINT)
        rest, stderr = asking.communicate(timeout=20)
    assert asking.returncode == 130
    assert rest.endswith("\n")
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 10
    while any(worker["queue"]["active"] for worker in two_workers.json("status")["workers"]):
        assert time.monotonic() < deadline, "the worker goes on for nobody"


def test_a_reader_that_has_seen_enough_is_no_error(two_workers: harness.Mesh) -> None:
    with two_workers.popen("prompt", "Write a long story.", "--max-tokens", "100") as asking:
        assert asking.stdout is not None
        asking.stdout.read(1)
        asking.stdout.close()
        assert asking.stderr is not None
        assert asking.stderr.read() == ""


# --- Status, models ---


def test_the_status_is_a_table_of_all_workers(two_workers: harness.Mesh) -> None:
    header, *rows = two_workers.run("status").stdout.splitlines()
    assert header.split()[:4] == ["WORKER", "STATE", "SCORE", "CPU"]
    assert sorted(row.split()[0] for row in rows) == sorted(w.worker_id[:6] for w in two_workers.processes)


def test_the_json_of_a_status_holds_what_is_promised(two_workers: harness.Mesh) -> None:
    status = two_workers.json("status")
    assert set(status) == {"workers", "unreachable", "network", "elapsed_ms"}
    promised = {"worker_id", "health", "models", "slots", "queue", "speed", "gpu", "network", "run_id", "agent"}
    for worker in status["workers"]:
        assert promised | {"uptime_s", "address"} <= set(worker)
        assert worker["network"]["connections_refused"] == 0
    for network in (status["network"], *(worker["network"] for worker in status["workers"])):
        assert {"peers", "sent", "received", "dropped", "strangers", "interfaces"} <= set(network)
        assert network["received"]["bytes"] > 0
    for worker in status["workers"]:
        assert worker["health"]["state"] in ("healthy", "busy", "overloaded")


def test_models_are_listed_as_their_headers_describe_them(nobody: harness.Mesh, model_path: Path) -> None:
    listed = {model["name"]: model for model in nobody.json("models")["models"]}
    model = listed[model_path.stem]
    assert (model["architecture"], model["quantization"], model["context_length"]) == ("llama", "Q4_1", 8192)
    assert "98 MB" in nobody.run("models").stdout


# --- A worker that cannot start ---


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is cut off within its header"), (b"PK\x03\x04 no model", "it is not a GGUF file")],
)
def test_a_worker_without_a_usable_model_says_so(nobody: harness.Mesh, content: bytes, said: str) -> None:
    path = nobody.directory / "broken.gguf"
    path.write_bytes(content)
    finished = nobody.run("worker", "--model", str(path), "--port", "0")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert said in finished.stderr
    assert "qmesh.py pull" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_worker_with_a_model_that_is_not_here_names_those_that_are(nobody: harness.Mesh, model_path: Path) -> None:
    finished = nobody.run("worker", "--model", "gpt-17", "--port", "0")
    assert (finished.returncode, finished.stdout) == (5, "")
    assert f"there is no model file gpt-17; models here: {model_path.stem}" in finished.stderr


def test_one_interrupt_ends_a_prompt_that_waits_for_its_text(nobody: harness.Mesh) -> None:
    command = [sys.executable, str(nobody.program), "prompt", "-"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stderr=subprocess.PIPE, env=nobody.env) as waiting:
        deadline = time.monotonic() + 20
        while psutil.Process(waiting.pid).status() != psutil.STATUS_SLEEPING or not reads_terminal(waiting.pid):
            assert time.monotonic() < deadline
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(10) == 130
    os.close(ours)
    os.close(theirs)


def reads_terminal(pid: int) -> bool:
    """Whether a process stands in a read of its standard input (Linux tells)."""
    return Path(f"/proc/{pid}/wchan").read_text() in ("n_tty_read", "wait_woken", "0")


def test_a_status_of_the_silent_is_one_json_and_exit_code_3(mesh: harness.Mesh) -> None:
    mesh.start_worker().end()
    peer = mesh.processes[0].ready["udp"]
    finished = mesh.run("status", "--json", "--timeout", "1", "--peer", f"127.0.0.1:{peer[1]}")
    assert finished.returncode == 3
    assert isinstance(json.loads(finished.stdout), dict)


def test_a_truncated_model_is_named_with_what_is_missing(nobody: harness.Mesh, model_path: Path) -> None:
    path = nobody.directory / "half.gguf"
    with model_path.open("rb") as whole:
        path.write_bytes(whole.read(40_000_000))
    finished = nobody.run("worker", "--model", str(path))
    assert finished.returncode == 1
    assert "it is cut off: 98,362,432 bytes are needed, 40,000,000 are there" in finished.stderr


def test_a_worker_whose_context_cannot_fit_gives_the_numbers(nobody: harness.Mesh, model_path: Path) -> None:
    finished = nobody.run("worker", "--model", str(model_path), "--ctx", "900000", "--slots", "64", "--port", "0")
    assert finished.returncode == 1
    assert re.search(
        r"needs about 1,?\d+\.\d GB with 64 x 900000 tokens of context.*GB of memory are free", finished.stderr
    )


def test_a_taken_port_is_named(mesh: harness.Mesh) -> None:
    taken = str(mesh.start_worker().ready["tcp"][1])
    finished = mesh.run("worker", "--model", str(mesh.model), "--port", taken, "--ctx", "256", "--slots", "1")
    assert finished.returncode == 2
    assert f"port {taken} is taken" in finished.stderr


def test_a_state_directory_that_cannot_be_used_is_named(nobody: harness.Mesh, model_path: Path) -> None:
    file = nobody.directory / "file"
    file.touch()
    finished = nobody.run("worker", "--model", str(model_path), "--state-dir", str(file))
    assert finished.returncode == 2
    assert one_line(finished.stderr).startswith(f"error: the state directory {file}/")
    assert "--state-dir DIR" in finished.stderr


# --- The README and the help ---


def test_every_command_has_help_with_an_example_and_stands_in_the_readme(nobody: harness.Mesh) -> None:
    commands = re.findall(r"^    (\w+) +\S", nobody.run("--help").stdout, re.MULTILINE)
    assert commands == ["worker", "prompt", "status", "doctor", "pull", "models", "demo"]
    for command in commands:
        shown = nobody.run(command, "--help").stdout
        assert "example:\n  qmesh.py " + command in shown
        assert f"| `{command}" in README
        flags = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE)) - {"--json"}
        assert [flag for flag in flags if flag not in README] == []


def test_every_setting_and_exit_code_of_the_readme_is_one_of_the_program(nobody: harness.Mesh) -> None:
    shown = nobody.run("--help").stdout
    for name in re.findall(r"`(QMESH_\w+|GPU_LAYERS)`", README):
        assert name in shown
    codes = re.search(r"exit codes: (.*)", shown)
    assert codes is not None
    assert f"Exit codes: {codes[1]}." in one_line(README)


def test_the_demo_answers_on_this_machine_alone(nobody: harness.Mesh, model_path: Path) -> None:
    (line,) = (line for line in README.splitlines() if " qmesh.py demo " in line)
    assert line.endswith(f'qmesh.py demo "{QUESTION}"')
    finished = nobody.run("demo", QUESTION, "--model", str(model_path), "--max-tokens", "8")
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout) > 5
    for line in ("🚀 Starting 2 workers", "🌐 Discovered", "✅ Selected worker", "⏱️  Total time", "👋 Stopping"):
        assert line in finished.stderr
    assert qmesh.DEMO_WORKERS == 2


def test_the_requirements_are_what_the_engine_checks_for() -> None:
    requirements = (harness.ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert qmesh.LLAMA_REQUIREMENT in requirements
    first, beyond = (".".join(map(str, version)) for version in qmesh.LLAMA_VERSIONS)
    assert f"llama-cpp-python>={first},<{beyond}" == qmesh.LLAMA_REQUIREMENT
