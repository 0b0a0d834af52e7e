"""The command line: what a person types and sees, and the exit codes that scripts go by."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
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


@pytest.fixture
def refused(
    nobody: harness.Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that is refused, and returns what is said; in this process, as it is over with its arguments."""
    for name in os.environ.keys() - nobody.env.keys():
        monkeypatch.delenv(name)
    for name, value in nobody.env.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> str:
        try:
            code: object = qmesh.main(arguments)
        except SystemExit as end:
            code = end.code
        stdout, stderr = capsys.readouterr()
        assert (code, stdout) == (2, "")
        return stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("conquer",), "invalid choice: 'conquer'"),
        (("prompt",), "TEXT"),
        (("prompt", ""), "the prompt is empty"),
        (("prompt", "  \n"), "the prompt is empty"),
        (("prompt", "hi", "--temperature", "-1"), "--temperature: must be from 0 to 100, not -1.0"),
        (("prompt", "hi", "--max-tokens", "0"), "--max-tokens: must be from 1"),
        (("prompt", "hi", "--stop", ""), "--stop: takes up to"),
        (("prompt", "hi", "--sample-seed", "-1"), "--sample-seed: must be from 0 to "),
        (("chat", "--worker", "ab"), "a worker is named by 6 or more of its id's first digits, not 'ab'"),
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
        (("init",), "FILE"),
        (("seal",), "OUT.pyz"),
        (("seal", "lab.pyz"), "only an archive can be sealed: `python build_zipapp.py` makes dist/qmesh.pyz"),
        (("status", "--key", "no/such/file"), "the key file no/such/file cannot be read (No such file or directory)"),
    ],
)
def test_what_makes_no_sense_is_refused_with_exit_code_2(
    refused: Callable[..., str], arguments: tuple[str, ...], said: str
) -> None:
    stderr = refused(*arguments)
    assert said in stderr
    assert "Traceback" not in stderr


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
    command = [*harness.running(mesh.program), *arguments]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=mesh.env, cwd=harness.ROOT
    ) as process:
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
    header, *rows, last = two_workers.run("status").stdout.splitlines()
    assert header.split()[:4] == ["WORKER", "STATE", "SCORE", "CPU"]
    assert sorted(row.split()[0] for row in rows) == sorted(w.worker_id[:6] for w in two_workers.processes)
    assert last == f"2 workers in the open mesh '{two_workers.topic}'"


def test_the_json_of_a_status_holds_what_is_promised(two_workers: harness.Mesh) -> None:
    status = two_workers.json("status")
    assert set(status) == {"workers", "unreachable", "network", "mesh", "elapsed_ms"}
    assert status["mesh"] == {"topic": two_workers.topic, "open": True, "fingerprint": "open"}
    promised = {"worker_id", "health", "models", "slots", "queue", "speed", "gpu", "mesh", "network", "run_id", "agent"}
    for worker in status["workers"]:
        assert promised | {"uptime_s", "address"} <= set(worker)
        assert worker["network"]["connections_dropped"] == {}
        assert worker["mesh"] == status["mesh"]
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


def test_the_models_that_can_be_fetched_are_listed_and_nothing_is_fetched(nobody: harness.Mesh) -> None:
    listed = nobody.json("pull", "--list")["models"]
    shown = nobody.run("pull", "--list").stdout
    assert [model["name"] for model in listed] == [line.split()[0] for line in shown.splitlines()[1:-1]]
    assert "python qmesh.py pull hf:OWNER/REPO/FILE.gguf" in shown
    refused = nobody.run("pull", "--list", "smollm2-135m")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--list names what can be fetched, and fetches nothing" in refused.stderr


def test_the_version_tells_what_runs_and_in_which_mesh(nobody: harness.Mesh) -> None:
    told = nobody.json("version")
    assert (told["version"], told["file"], told["parts"]) == (qmesh.__version__, str(nobody.program), {})
    lines = nobody.run("version").stdout.splitlines()
    assert lines[0] == f"qmesh {qmesh.__version__} (protocol {qmesh.PROTOCOL_VERSION})"
    assert lines[1:] == [f"{name:9} {value}" for name, value in qmesh.version_lines(told)]
    assert any(line.startswith("mesh ") and nobody.topic in line for line in lines)


# --- What goes on until it is stopped ---


def test_a_gateway_tells_where_it_is_and_that_it_has_stopped(nobody: harness.Mesh) -> None:
    gateway = nobody.start_gateway()
    assert gateway.ready["event"] == "ready"
    assert gateway.ready["url"].startswith(f"http://{harness.LOOPBACK}:")
    assert (gateway.stop(), json.loads(gateway.stdout.read())) == (0, {"event": "stopped"})
    gateway.end()


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_watch_of_a_mesh_without_workers_goes_on_until_it_is_interrupted(
    nobody: harness.Mesh, flags: tuple[str, ...]
) -> None:
    with nobody.popen("status", "--watch", "0.5", "--timeout", "0.5", *flags) as watching:
        assert watching.stdout is not None
        looks = [watching.stdout.readline() for _ in range(4)]
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=20)
    assert (watching.returncode, stderr) == (0, "")
    if flags:
        assert [json.loads(look)["workers"] for look in looks] == [[]] * 4
    else:
        assert "No worker answers in the open mesh" in looks[1]


def test_a_chat_in_which_nothing_is_said_and_a_batch_of_nothing_end_well(nobody: harness.Mesh) -> None:
    questions = nobody.directory / "in.jsonl"
    questions.touch()
    assert nobody.run("chat").returncode == 0
    assert nobody.json("batch", str(questions), "-o", str(nobody.directory / "out.jsonl"))["total"] == 0


# --- The key of a closed mesh ---


def make_key(mesh: harness.Mesh, name: str = "lab.key", *arguments: str) -> Path:
    """A key file, as `init` makes it."""
    path = mesh.directory / name
    finished = mesh.run("init", str(path), *arguments)
    assert finished.returncode == 0, finished.stderr
    return path


def secrets_of(path: Path) -> list[str]:
    """What of a key file must not be shown, in the forms in which it might be."""
    keys = qmesh.parse_mesh_keys(path.read_text("ascii"))
    return [form for key in keys for form in (key.text[7:27], key.secret.hex()[:20], repr(key.secret)[2:12])]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_key_file_is_made_for_this_user_alone_and_its_path_is_all_that_is_printed(
    nobody: harness.Mesh, umask: int
) -> None:
    path = nobody.directory / "lab.key"
    before = os.umask(umask)
    try:
        finished = nobody.run("init", str(path))
    finally:
        os.umask(before)
    assert (finished.returncode, finished.stdout) == (0, f"{path}\n")
    assert path.stat().st_mode & 0o777 == 0o600
    (key,) = qmesh.parse_mesh_keys(path.read_text("ascii"))
    assert f"({qmesh.MeshKeys.derive(nobody.topic, key).fingerprint})" in finished.stderr
    assert f"worker --key {path}" in finished.stderr
    assert not [secret for secret in secrets_of(path) if secret in finished.stderr]


def test_every_key_is_another(nobody: harness.Mesh) -> None:
    texts = {make_key(nobody, f"{number}.key").read_text("ascii") for number in range(3)}
    assert len(texts) == 3


def test_a_key_file_that_is_there_is_never_replaced(nobody: harness.Mesh) -> None:
    path = nobody.directory / "lab.key"
    path.write_text("precious")
    finished = nobody.run("init", str(path))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert f"{path} is there already; its key may be in use" in finished.stderr
    assert path.read_text() == "precious"
    link = nobody.directory / "link.key"
    link.symlink_to(nobody.directory / "nowhere")
    assert nobody.run("init", str(link)).returncode == 2
    assert not (nobody.directory / "nowhere").exists()


def test_a_key_file_that_cannot_be_made_is_named(nobody: harness.Mesh) -> None:
    finished = nobody.run("init", str(nobody.directory / "missing" / "lab.key"))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "lab.key cannot be written: there is no folder" in finished.stderr


def test_a_key_that_replaces_another_stands_before_it_in_its_file(nobody: harness.Mesh) -> None:
    old = make_key(nobody, "old.key")
    newer = make_key(nobody, "newer.key", "--replace", str(old), "--until", "2099-12-31")
    newest = make_key(nobody, "newest.key", "--replace", str(newer), "--until", "2099-12-31")
    keys = {path: qmesh.parse_mesh_keys(path.read_text("ascii")) for path in (old, newer, newest)}
    replaced = [dataclasses.replace(keys[path][0], until=datetime.date(2099, 12, 31)) for path in (newer, old)]
    assert keys[newer][1:] == (replaced[1],)
    assert keys[newest][1:] == tuple(replaced)  # the oldest counts until its own last day
    assert [len({key.secret for key in each}) for each in keys.values()] == [1, 2, 3]
    assert [path.stat().st_mode & 0o777 for path in keys] == [0o600] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--replace", "OLD"), "--replace OLD and --until YYYY-MM-DD belong together"),
        (("--until", "2099-12-31"), "--replace OLD and --until YYYY-MM-DD belong together"),
        (("--replace", "OLD", "--until", "soon"), "until YYYY-MM-DD"),
        (("--replace", "OLD", "--until", ""), "until YYYY-MM-DD"),
        (("--replace", "OLD", "--until", "31 December 2099"), "until YYYY-MM-DD"),
        (("--replace", "OLD", "--until", "2099-02-30"), "until YYYY-MM-DD"),
        (("--replace", "OLD", "--until", "2020-01-01"), "that day is over"),
        (("--replace", "MISSING", "--until", "2099-12-31"), "MISSING cannot be read (No such file or directory)"),
        (("--replace", "NO KEY", "--until", "2099-12-31"), "there is no mesh key in it"),
    ],
)
def test_a_key_that_cannot_be_replaced_leaves_no_file(
    nobody: harness.Mesh, refused: Callable[..., str], arguments: tuple[str, ...], said: str
) -> None:
    old = nobody.directory / "OLD"
    old.write_text(f"{qmesh.MeshKey(bytes(range(32))).text}\n", "ascii")
    old.chmod(0o600)
    (nobody.directory / "NO KEY").touch(mode=0o600)
    paths = {name: str(nobody.directory / name) for name in ("OLD", "MISSING", "NO KEY")}
    target = nobody.directory / "new.key"
    stderr = refused("init", str(target), *(paths.get(word, word) for word in arguments))
    assert said in stderr
    assert not target.exists()
    assert not [secret for secret in secrets_of(old) if secret in stderr]


@pytest.mark.parametrize("command", [("status",), ("prompt", "hi"), ("worker",), ("doctor",), ("seal", "lab.pyz")])
@pytest.mark.parametrize("write", [str, str.upper, " {}".format])
def test_a_key_in_a_command_is_refused_and_not_repeated(
    refused: Callable[..., str], command: tuple[str, ...], write: Callable[[str], str]
) -> None:
    """Every user of a machine can read what its commands are."""
    key = qmesh.MeshKey(bytes(range(32))).text
    stderr = refused(*command, "--key", write(key))
    assert "--key: a key in a command can be read by everybody" in stderr
    assert "QMESH_KEY" in stderr
    assert key[7:20] not in stderr.lower()


def test_a_key_file_that_others_can_read_is_spoken_of(nobody: harness.Mesh) -> None:
    path = make_key(nobody)
    path.chmod(0o644)
    finished = nobody.run("status", "--timeout", "1", "--key", str(path))
    assert finished.returncode == 3
    assert f"other users of this machine can read the mesh's key: chmod go= {path}" in finished.stderr


def test_nobody_without_its_key_finds_a_worker_of_a_closed_mesh(mesh: harness.Mesh) -> None:
    path, wrong = make_key(mesh), make_key(mesh, "wrong.key")
    worker = mesh.start_worker("--key", str(path))
    keys = qmesh.MeshKeys.derive(mesh.topic, *qmesh.parse_mesh_keys(path.read_text("ascii")))
    told = {"topic": mesh.topic, "open": False, "fingerprint": keys.fingerprint}
    assert worker.ready["mesh"] == told
    peer = ("--peer", f"127.0.0.1:{worker.ready['udp'][1]}")
    for arguments, title in (((), f"open mesh '{mesh.topic}'"), (("--key", str(wrong)), f"closed mesh '{mesh.topic}'")):
        finished = mesh.run("prompt", "hi", "--timeout", "1.5", *arguments, *peer)
        assert (finished.returncode, finished.stdout) == (3, "")
        assert title in finished.stderr
    flags = ("prompt", "hi", "--max-tokens", "2")
    assert mesh.json(*flags, "--key", str(path))["worker_id"] == worker.worker_id
    for value in (str(path), qmesh.parse_mesh_keys(path.read_text("ascii"))[0].text):
        assert mesh.run(*flags, env={"QMESH_KEY": value}).returncode == 0
    status = mesh.json("status", "--key", str(path))
    assert status["mesh"] == status["workers"][0]["mesh"] == told
    assert mesh.run("status", "--key", str(path)).stdout.splitlines()[-1] == f"1 worker in the {keys.title}"


def test_while_a_key_is_being_replaced_members_with_the_old_and_the_new_work_together(mesh: harness.Mesh) -> None:
    old = make_key(mesh, "old.key")
    new = make_key(mesh, "new.key", "--replace", str(old), "--until", "2099-12-31")
    over = make_key(mesh, "over.key", "--replace", str(old), "--until", "2099-12-31")
    over.write_text(over.read_text("ascii").replace("2099", "2020"), "ascii")
    ids = {name: mesh.start_worker("--key", str(path)).worker_id for name, path in (("new", new), ("old", old))}
    reached = {
        path: {worker["worker_id"] for worker in mesh.json("status", "--key", str(path))["workers"]}
        for path in (new, old)
    }
    assert reached == {new: {ids["new"], ids["old"]}, old: {ids["new"], ids["old"]}}
    told = mesh.run("status", "--key", str(new)).stderr
    assert f"{ids['old'][:6]}  has another key alone" in told
    assert ids["new"][:6] not in told
    answer = mesh.json("prompt", "hi", "--max-tokens", "2", "--key", str(old))
    assert answer["worker_id"] in ids.values()
    assert mesh.run("status", "--timeout", "1.5", "--key", str(over)).returncode == 3  # another new key, no old one


def test_no_log_holds_a_key_or_what_is_asked_or_answered(mesh: harness.Mesh) -> None:
    path = make_key(mesh)
    worker = mesh.start_worker("--key", str(path), "--log-level", "debug")
    question = "Repeat after me: xyzzy-plugh-frotz"
    flags = ("--key", str(path), "--log-level", "debug", "--temperature", "0", "--max-tokens", "24")
    asked = mesh.run("prompt", question, "--system", "Be brief as grue-lantern.", "--json", *flags)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)["text"].strip()
    assert len(answer) > 10
    assert worker.stop() == 0
    logs = {"client": asked.stderr, "worker": worker.stderr}
    node_key = (next(mesh.state_dir.glob("*/0/node.key"))).read_text("ascii").splitlines()[1]
    for name, log in logs.items():
        assert " DEBUG " in log or " INFO " in log, name  # it was asked to tell much
        for text in (*secrets_of(path), node_key[22:42], "xyzzy", "plugh", "grue", answer, answer[:10]):
            assert text not in log, (name, text)


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
    command = [*harness.running(nobody.program), "prompt", "-"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stderr=subprocess.PIPE, env=nobody.env, cwd=harness.ROOT) as waiting:
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


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (socket.SOCK_DGRAM, ["--port"]),
        (socket.SOCK_STREAM, ["--port"]),
        (socket.SOCK_STREAM, ["--metrics"]),
        (socket.SOCK_STREAM, ["--gateway", "--http"]),
    ],
)
def test_a_taken_port_is_named_before_a_model_is_loaded(
    nobody: harness.Mesh, kind: socket.SocketKind, flags: list[str]
) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((harness.LOOPBACK, 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = str(taken.getsockname()[1])
        finished = nobody.run("worker", *flags, port, "--model", "gpt-17")
    assert finished.returncode == 2
    assert f"port {port} is taken" in finished.stderr
    assert "Loading the model" not in finished.stderr


def test_a_state_directory_that_cannot_be_used_is_named(nobody: harness.Mesh, model_path: Path) -> None:
    file = nobody.directory / "file"
    file.touch()
    finished = nobody.run("worker", "--model", str(model_path), "--state-dir", str(file))
    assert finished.returncode == 2
    assert one_line(finished.stderr).startswith(f"error: the state directory {file}/")
    assert "--state-dir DIR" in finished.stderr


# --- Completion ---


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [(["wo"], "worker"), (["prompt", "--max"], "--max-tokens"), (["seal", "--key", "l", "--l"], "--log-level")],
    ids=" ".join,
)
def test_a_shell_completes_commands_and_flags(nobody: harness.Mesh, typed: list[str], offered: str) -> None:
    words = " ".join(["qmesh.pyz", *typed])
    script = (
        f'{nobody.run("complete").stdout}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _qmesh; echo "$COMPREPLY"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [offered]


# --- The README and the help ---


def test_every_command_has_help_with_an_example(nobody: harness.Mesh) -> None:
    commands = re.findall(r"^    (\w+) +\S", nobody.run("--help").stdout, re.MULTILINE)
    assert commands == [
        *("worker", "prompt", "chat", "batch", "gateway", "status", "bench", "doctor", "init", "seal"),
        *("pull", "models", "version", "complete", "demo"),
    ]
    for command in commands:
        assert "example:\n  python qmesh.py " + command in nobody.run(command, "--help").stdout


def test_the_help_tells_every_variable_that_the_readme_names_and_every_exit_code(nobody: harness.Mesh) -> None:
    shown = nobody.run("--help").stdout
    for name in re.findall(r"`(QMESH_\w+|GPU_LAYERS|HF_\w+)`", README):
        assert name in shown
    codes = "0 done, 1 failed, 2 usage, 3 no worker found, 4 every worker refused, 5 no such model, 130 interrupted"
    assert f"exit codes: {codes}" in one_line(shown)


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
    lines = (harness.ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert set(qmesh.ENGINE_PACKAGES.values()) <= set(lines)
    first, beyond = (".".join(map(str, version)) for version in qmesh.LLAMA_VERSIONS)
    assert f"llama-cpp-python>={first},<{beyond}" == qmesh.LLAMA_REQUIREMENT


def test_nothing_in_json_could_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"model": "a\x1b]0;b\x07\x9b2J\x7f\u202e\u2066 \u00e4\U0001f600"}
    qmesh.print_json(said)
    printed = capsys.readouterr().out
    assert json.loads(printed) == said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)
    assert "\u00e4\U0001f600" in printed
