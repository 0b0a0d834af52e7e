"""Archives that carry everything, on bare machines: one file is copied, and worker and client run from it.

The archives are those of the folder that QMESH_TEST_ARCHIVES names; without it they are built from the wheel in
build/wheels. Where neither is there, or machines cannot be made, the tests are skipped; QMESH_TEST_BARE=required makes
that an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import Archives
from harness import COMMAND_TIMEOUT_S
from lan import Lan, settle
from machines import Account, Bare, Computer, no_accounts, no_computers, require

import qmesh

SOON_S = 15.0  # the pause between two beacons, and half of it
CACHE = Path(".cache/qmesh")  # in a home
QUESTION = ("prompt", "Why is the sky blue?", "--temperature", "0", "--max-tokens")
LONG = "120"  # tokens: some seconds
GLANCE_S = 0.002  # between two looks at something that is over in half a second
STARTS = 10
KILLED = 3

# What a worker does before it serves: it has unpacked what its archive carries.
UNPACK = """
import qmesh
for part in qmesh.carried().parts.values():
    print(qmesh.unpacked_part(part))
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """Where accounts are made; none is plugged in."""
    require(no_accounts())
    with Lan(tmp_path_factory.mktemp("accounts"), Path("none")) as lan:
        yield lan


@pytest.fixture
def new_account(network: Lan) -> Callable[[Path], Account]:
    numbers = itertools.count(len(network.machines))

    def make(program: Path) -> Account:
        account = network.machine_of(Account, f"account{next(numbers)}", plugged=False)
        account.program = account.copy(program, "qmesh.pyz")
        return account

    return make


@pytest.fixture(scope="module")
def used(network: Lan, archives: Archives) -> Account:
    """An account where a worker has run, and was stopped."""
    account = network.machine_of(Account, "used", plugged=False)
    account.program = account.copy(archives.whole, "qmesh.pyz")
    worker = account.start_worker()
    assert worker.stop() == 0, worker.stderr
    return account


def parts_in(machine: Bare, cache: Path = CACHE) -> list[str]:
    """What was unpacked, and what was left behind; locks and folders that stay empty apart."""
    folder = machine.here(cache)
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (qmesh.IN_USE, qmesh.UNPACKING))


def whole_parts(archive: Path, *kinds: str) -> list[str]:
    contents = qmesh.read_contents(archive)
    assert contents is not None
    return sorted(contents.parts[kind].folder for kind in kinds)


def answers(machine: Bare) -> None:
    """A worker runs on the machine, and a client there is answered."""
    worker = machine.start_worker()
    try:
        answer = machine.json(*QUESTION, "8")
        assert answer["worker_id"] == worker.worker_id
        assert answer["text"].strip()
    finally:
        assert worker.stop() == 0, worker.stderr


def python(machine: Bare, script: str) -> list[str]:
    """The command by which a user runs a script that imports the program from the archive."""
    return [*machine.login, "/usr/bin/env", f"PYTHONPATH={machine.program}", machine.interpreter, "-c", script]


def unpack(machine: Bare) -> list[str]:
    """Have the archive's parts unpacked as a worker does; returns where they are."""
    command = python(machine, UNPACK)
    finished = subprocess.run(command, env=machine.env, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout.split()


def refusal(machine: Bare, *flags: str, env: dict[str, str] | None = None) -> str:
    """The error of a worker that does not start."""
    finished = machine.run("worker", *machine.worker_flags, *flags, env=env)
    assert finished.returncode in (1, 2), finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    return finished.stderr[finished.stderr.index("error: ") :]


# --- One file, one account ---


def test_a_worker_and_a_client_run_from_one_file_in_an_account_without_anything(used: Account) -> None:
    answers(used)
    assert sorted(path.name for path in used.here("").iterdir()) == [".cache", ".local", "qmesh.pyz"]


def test_engine_and_model_are_unpacked_once(used: Account, archives: Archives) -> None:
    unpacked = whole_parts(archives.whole, qmesh.ENGINE, qmesh.MODEL)
    before = [used.here(CACHE / part).stat().st_ino for part in unpacked]
    assert sorted(unpack(used)) == [f"/mnt/home/{CACHE}/{part}" for part in unpacked]
    assert parts_in(used) == unpacked
    assert [used.here(CACHE / part).stat().st_ino for part in unpacked] == before


def test_a_client_unpacks_nothing(new_account: Callable[[Path], Account], archives: Archives) -> None:
    account = new_account(archives.whole)
    assert account.run("status", "--timeout", "0.2").returncode == 3
    assert account.start_gateway().stop() == 0
    assert not account.here(CACHE).exists()


def test_a_sealed_copy_and_an_archive_without_a_model_share_the_engine(used: Account, archives: Archives) -> None:
    before = parts_in(used)
    assert used.run("init", "/mnt/home/lab.key").returncode == 0
    sealed = used.run("seal", "/mnt/home/lab.pyz", "--key", "/mnt/home/lab.key")
    assert sealed.returncode == 0, sealed.stderr
    first = used.program
    try:
        for program in (Path("/mnt/home/lab.pyz"), used.copy(archives.engine, "engine.pyz")):
            used.program = program
            assert {Path(place).name for place in unpack(used)} <= set(before)
    finally:
        used.program = first
    assert parts_in(used) == before


# --- Unpacking, when something goes wrong ---


def unpacks(process: subprocess.Popen[Any]) -> bool:
    """Whether it is in the middle of unpacking: a file is open that is not at its place yet."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            if f"/.{qmesh.ENGINE}-" in str(descriptor.readlink()):
                return True
    return False


def test_ten_starts_at_once_unpack_one_engine_though_those_that_do_it_are_killed(
    new_account: Callable[[Path], Account], archives: Archives
) -> None:
    account = new_account(archives.engine)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": account.env}
    started = [subprocess.Popen(python(account, UNPACK), **pipes) for _ in range(STARTS)]
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    killed: list[subprocess.Popen[str]] = []
    try:
        while len(killed) < KILLED:
            assert time.monotonic() < deadline
            for process in started:
                if process not in killed and unpacks(process):
                    process.kill()
                    process.wait()
                    killed.append(process)
            time.sleep(GLANCE_S)
        [engine] = whole_parts(archives.engine, qmesh.ENGINE)
        for process in started:
            stdout, stderr = process.communicate(timeout=COMMAND_TIMEOUT_S)
            if process not in killed:
                assert (process.returncode, stdout, stderr) == (0, f"/mnt/home/{CACHE}/{engine}\n", "")
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert parts_in(account) == [engine]


def test_what_a_killed_start_left_is_removed_by_the_next(
    new_account: Callable[[Path], Account], archives: Archives
) -> None:
    account = new_account(archives.whole)
    process = subprocess.Popen(python(account, UNPACK), env=account.env)
    while not unpacks(process):
        assert process.poll() is None
        time.sleep(GLANCE_S)
    process.kill()
    process.wait()
    parts = whole_parts(archives.whole, qmesh.ENGINE, qmesh.MODEL)
    assert parts_in(account) != parts
    unpack(account)
    assert parts_in(account) == parts


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_size)


def sizes_of(engine: Path) -> dict[Path, int]:
    """Of what was unpacked; not of what Python compiled since."""
    return {path.relative_to(engine): path.stat().st_size for path in engine.rglob("*.*") if path.suffix != ".pyc"}


def test_a_cache_that_was_damaged_is_mended(used: Account, archives: Archives) -> None:
    contents = qmesh.read_contents(archives.whole)
    assert contents is not None
    parts = whole_parts(archives.whole, qmesh.ENGINE, qmesh.MODEL)
    engine, model = (used.here(CACHE / part) for part in parts)
    sizes = sizes_of(engine)
    library, weights = largest(engine, "*.so"), largest(model, "*.gguf")
    damages: list[Callable[[], object]] = [
        lambda: os.truncate(library, library.stat().st_size // 2),
        library.unlink,
        lambda: shutil.rmtree(engine / "llama_cpp"),
        lambda: os.truncate(weights, 1000),
        lambda: shutil.rmtree(model),
    ]
    for damage in damages:
        damage()
        unpack(used)
        assert parts_in(used) == parts
        assert sizes_of(engine) == sizes
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == contents.parts[qmesh.MODEL].sha256
    answers(used)


def test_where_the_home_cannot_be_written_the_temporary_folder_serves(
    new_account: Callable[[Path], Account], archives: Archives
) -> None:
    account = new_account(archives.whole)
    account.view.run("mount -t tmpfs -o mode=1777 machine /tmp && mount -o remount,bind,ro /mnt/home")
    said = refusal(account)
    assert "--state-dir" in said  # ids are to last: that place has to be chosen
    worker = account.start_worker("--state-dir", "/tmp/state")
    answer = account.json(*QUESTION, "2", "--state-dir", "/tmp/client")
    assert answer["worker_id"] == worker.worker_id
    assert worker.stop() == 0, worker.stderr
    places = account.view.path(Path("/tmp", f"qmesh-{account.uid}"))
    assert places.stat().st_mode & 0o777 == 0o700


def test_on_a_disk_that_is_full_everywhere_the_error_names_both_places_and_a_way_out(
    new_account: Callable[[Path], Account], archives: Archives
) -> None:
    account = new_account(archives.whole)
    account.here(".cache").mkdir()
    account.view.run("for full in /tmp /mnt/home/.cache; do mount -t tmpfs -o mode=1777,size=1m machine $full; done")
    said = refusal(account)
    assert "/mnt/home/.cache/qmesh" in said
    assert f"/tmp/qmesh-{account.uid}" in said
    assert "are needed" in said or "No space left" in said
    assert "QMESH_CACHE_DIR" in said
    worker = account.start_worker(env={"QMESH_CACHE_DIR": "/mnt/home/elsewhere"})
    assert worker.stop() == 0, worker.stderr
    assert parts_in(account, Path("elsewhere")) == whole_parts(archives.whole, qmesh.ENGINE, qmesh.MODEL)
    assert parts_in(account) == []


@pytest.mark.parametrize("kind", [qmesh.ENGINE, qmesh.MODEL])
def test_an_archive_that_was_damaged_on_its_way_says_so_and_leaves_nothing(
    new_account: Callable[[Path], Account], archives: Archives, kind: str
) -> None:
    account = new_account(archives.whole)
    contents = qmesh.read_contents(archives.whole)
    assert contents is not None
    part = contents.parts[kind]
    with account.here("qmesh.pyz").open("r+b") as file:
        file.seek(part.offset + part.size // 2)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    said = refusal(account)
    assert said.startswith(f"error: {account.program} is damaged: its {kind} is not what was packed\n")
    assert "Copy it to this machine once more" in said
    assert part.folder not in parts_in(account)
    assert not [name for name in parts_in(account) if name.startswith(".")]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_an_archive_that_was_copied_in_part_says_so(
    new_account: Callable[[Path], Account], archives: Archives, share: float
) -> None:
    account = new_account(archives.whole)
    os.truncate(account.here("qmesh.pyz"), int(archives.whole.stat().st_size * share))
    finished = account.run("worker")
    assert finished.returncode == 1
    assert finished.stderr.endswith(": this-file-is-damaged--copy-it-to-this-machine-again\n")


# --- One file, three computers ---


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Lan]:
    """Two computers with a worker, `lab1` and `lab2`; and `desk`, which holds the program alone."""
    require(no_computers())
    with Lan(tmp_path_factory.mktemp("lab"), Path("none")) as lan:
        lab1, lab2, desk = (lan.machine_of(Computer, name) for name in ("lab1", "lab2", "desk"))
        for machine in (lab1, lab2):
            machine.program = machine.copy(archives.whole, "qmesh.pyz")
        desk.program = desk.copy(archives.program)
        started = [machine.start_worker(ready=False) for machine in (lab1, lab2)]
        for process in started:
            process.wait_ready()
        yield lan
        assert lan.strays == Counter()


def computers(lab: Lan) -> list[Computer]:
    return [machine for machine in lab.machines if isinstance(machine, Computer)]


def test_workers_on_bare_computers_are_found_and_answer_a_bare_computer_with_the_program_alone(lab: Lan) -> None:
    lab1, lab2, desk = computers(lab)
    settle(desk.reached, {"lab1", "lab2"}, SOON_S)
    assert desk.answered_by() in {"lab1", "lab2"}
    assert lab1.heard_of() == lab2.heard_of() == {"lab1", "lab2"}


FETCH = """
import json, urllib.request
body = json.dumps({{"messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 4}}).encode()
print(urllib.request.urlopen("{url}/v1/chat/completions", body, timeout=60).read().decode())
"""


def test_a_gateway_runs_on_a_bare_computer_with_the_program_alone(lab: Lan) -> None:
    *_, desk = computers(lab)
    gateway = desk.start_gateway()
    script = FETCH.format(url=gateway.ready["url"])
    command = [*desk.login, desk.interpreter, "-c", script]
    finished = subprocess.run(command, env=desk.env, capture_output=True, text=True, check=True, timeout=90)
    assert json.loads(finished.stdout)["choices"][0]["message"]["content"]
    assert gateway.stop() == 0
    desk.processes.remove(gateway)
    gateway.end()


def test_two_users_of_a_computer_each_have_their_own(lab: Lan, archives: Archives) -> None:
    lab1, *_ = computers(lab)
    first = parts_in(lab1)
    lab1.user = "other"
    program = lab1.program
    try:
        said = refusal(lab1, env={"QMESH_CACHE_DIR": "/home/user/.cache/qmesh"})
        assert "/home/user/.cache/qmesh" in said
        worker = lab1.start_worker()
        assert worker.stop() == 0, worker.stderr
        assert parts_in(lab1) == first
        assert lab1.here("").stat().st_uid == lab1.here(CACHE).stat().st_uid == lab1.uid
    finally:
        lab1.user, lab1.program = "user", program


def test_a_computer_loses_its_power_in_mid_sentence_and_another_goes_on(lab: Lan) -> None:
    lab1, lab2, desk = computers(lab)
    settle(desk.reached, {"lab1", "lab2"}, SOON_S)
    told = desk.json(*QUESTION, LONG)
    with desk.popen(*QUESTION, LONG, "--stall-timeout", "3") as asked:
        assert asked.stdout is not None
        assert asked.stderr is not None
        begun = asked.stdout.read(1)
        [busy] = [worker["worker_id"] for worker in desk.status()["workers"] if worker["queue"]["active"]]
        [(machine, process)] = [
            (machine, process)
            for machine in (lab1, lab2)
            for process in machine.processes
            if process.worker_id == busy and process.popen.poll() is None
        ]
        machine.unplug(lab)
        process.end()
        answer = begun + asked.stdout.read()
        assert asked.wait(COMMAND_TIMEOUT_S) == 0, asked.stderr.read()
    assert answer.strip() == told["text"].strip()
