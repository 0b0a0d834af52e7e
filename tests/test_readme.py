"""What people wrote of the README holds: its commands do what it says, its paths, links and numbers are true.

Commands are found in the text: in its blocks, and between backticks. Each is typed at a terminal, in a folder with a
fresh archive and a small model, beside a worker and a gateway. What takes minutes, or another machine, stands in
ELSEWHERE, with what looks after it instead.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import pty
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
import reference
import tiny_models
from transcript import (
    CHAT,
    LAB,
    Typed,
    inline_code,
    looks_like,
    masked,
    sessions_in,
    typed_in_block,
    without_chapter,
    written,
)

import qmesh

TEXT = written()
ON_ONE_LINE = " ".join(TEXT.split())
PATIENCE_S = 60.0
FRAME_S = 0.1

# --- What is a command ---

PROGRAM = r"(\.venv/bin/)?(python3?|pip|pytest)|uv|pipx|conda|curl|docker|ollama|local-ai|chmod|icacls|kill|source"
OWN_COMMANDS = tuple(reference.commands_of(qmesh.make_parser()))
SCRIPT = r"(tests|\.ci)/\S+|\w+\.py"
NO_COMMAND = (
    r"[-/@{:].*",  # flags, paths of a gateway, decorators, JSON, a comment in a stream
    r"(GET|POST) /.*",
    r".*\(.*",  # Python
    r"User: \.\.\.",  # of a conversation
    r"(closed|open) mesh .*",  # as shown
)


def is_command(code: str) -> bool:
    """Whether code between backticks is one. Raises ValueError when that cannot be told."""
    first, *more = code.split(" ")
    if not more:
        return False  # a name, of a command or a file
    if re.fullmatch(f"{PROGRAM}|{SCRIPT}", first) or first in OWN_COMMANDS:
        return True
    if any(re.fullmatch(pattern, code) for pattern in NO_COMMAND):
        return False
    raise ValueError(f"is `{code}` a command? Tell it in PROGRAM or in NO_COMMAND")


def sessions() -> list[list[Typed]]:
    """What is typed one behind the other: each block, and each command in the prose for itself."""
    text = without_chapter(TEXT, LAB)
    blocks = sessions_in(text)
    known = {typed.command for block in blocks for typed in block}
    inline = dict.fromkeys(in_full(code) for code in inline_code(TEXT) if is_command(code))
    return blocks + [[Typed("", code)] for code in inline if code not in known]


def in_full(command: str) -> str:
    """As it is typed: `status --json` is told for short."""
    if command.split(" ")[0] in OWN_COMMANDS:
        return f"python qmesh.pyz {command}"
    return re.sub(r"^python3 (?=qmesh)", "python ", command)


SESSIONS = sessions()
COMMANDS = [typed.command for session in SESSIONS for typed in session if typed.machine != CHAT]


# --- What is not typed here ---

Check = Callable[[str], bool]


def accepted(command: str) -> bool:
    """Its parser takes the command as it stands, but for what is left open."""
    words = shlex.split(command)
    if words[1] == "qmesh.pyz":
        qmesh.make_parser().parse_args(words[2:])
        return True
    asked = [sys.executable, *words[1:], "--help"]
    finished = subprocess.run(asked, cwd=harness.ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    flags = {word for word in words[1:] if word.startswith("--")}
    return finished.returncode == 0 and all(flag in finished.stdout for flag in flags)


def stands_in(file: str, *words: str) -> Check:
    """That file does it."""
    return lambda _: all(word in (harness.ROOT / file).read_text("utf-8") for word in words)


def file_exists(command: str) -> bool:
    return (harness.ROOT / shlex.split(command)[-1]).exists()


def of_others(command: str) -> bool:
    """Another program's: there is nothing of this one to check."""
    return "qmesh" not in command


ELSEWHERE: dict[str, tuple[str, Check]] = {
    r"python3 -m venv .* qmesh\.py demo .*": ("installs first", stands_in("tests/test_cli.py", '"demo", QUESTION')),
    r"python3 -m venv .* -m pytest": ("runs all tests", stands_in(".ci/run", "^python3 -m venv .*-m pytest$")),
    r"python build_zipapp\.py --engine --model FILE\.gguf": ("compiles for minutes, if need be", accepted),
    r"python (tests/bench/\w+\.py|-m tests\.bench)\b.*": ("measures for minutes", accepted),
    r"python tests/chaos/matrix\.py .*": ("takes half an hour", accepted),
    r"python tests/chaos/soak\.py .*": ("takes minutes", stands_in(".ci/run", "tests/chaos/soak.py --minutes")),
    r"python -m pytest (-n 0 )?tests/\w+\.py": ("is one of these", file_exists),
    r"python tests/measure\.py .*": ("runs tests", accepted),
    r"python qmesh\.pyz pull (NAME|hf:.*)": ("downloads", accepted),
    r"python qmesh\.py": ("stands for any command", lambda _: True),
    r"(pip|conda) install .*llama-cpp-python.*": ("downloads", of_others),
    r"pip install (\.|'\.\[worker\]')": ("downloads", stands_in("tests/test_service.py", '"install"', "optional-dep")),
    r"(uv|pipx) run \S*qmesh\.py worker": ("downloads", stands_in("qmesh.py", "# /// script\n")),
    r"icacls .*": ("is for Windows", of_others),
    r"kill -9": ("is a fault", of_others),
    r"(ollama|docker|local-ai|chmod) .*|curl -LO .*": ("is another system's, cited", of_others),
}


def elsewhere(command: str) -> str | None:
    """The entry for a command."""
    return next((pattern for pattern in ELSEWHERE if re.fullmatch(pattern, command)), None)


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_is_not_typed_here_stands_in_the_readme_and_is_looked_after(pattern: str) -> None:
    why, check = ELSEWHERE[pattern]
    commands = [command for command in COMMANDS if re.fullmatch(pattern, command)]
    assert commands, f"the README has no such command any more (it {why})"
    assert [command for command in commands if not check(command)] == []


# --- What is typed here ---

CTRL_C, CTRL_D = "\x03", "\x04"
DOCTOR = "python qmesh.pyz doctor"
LEFT_OPEN = {"FILE.gguf": "models/tiny.gguf", "ARCHIVE": "qmesh.pyz"}
RUNS_ON = {  # until Ctrl-C; what it shows by then
    r"worker": "Ctrl-C stops it",
    r"gateway": "any API key",
    r"--gateway": "any API key",
    r"--watch": r"\b1 worker in ",
    r"chat": "> ",
}
SHOWS = {
    r"curl .*/completions .*": '"finish_reason"',
    r".* pull --list": "smollm2-135m",
    r".* version": "SHA-256",
    r".* --list \S+": "qmesh.py",
    r".* status --json": '"worker_id"',
    r".* systemd": "ExecStart=",
    r".* --help": "usage: ",
    r".* --write": "^$",
}


class Terminal:
    """One in which a command runs."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C comes by it
        )
        os.close(theirs)
        self._read = b""
        self._seen = 0

    @property
    def shown(self) -> str:
        return self._read.decode(errors="replace").replace("\r", "")

    def types(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def sees(self, pattern: str) -> str:
        """Wait until it is shown, behind what was seen before; returns what is shown up to there."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.compile(pattern).search(self.shown, self._seen)) is None:
            more = self._reads() and time.monotonic() < deadline
            assert more, f"{pattern!r} is not in {self.shown!r}"
        before, self._seen = self._seen, found.end()
        return self.shown[before : self._seen]

    def ends(self) -> int:
        """The exit code; all that was shown is in `shown`."""
        deadline = time.monotonic() + PATIENCE_S
        while self._reads():
            assert time.monotonic() < deadline, self.shown
        return self._process.wait(PATIENCE_S)

    def _reads(self) -> bool:
        """Take what is shown next, if that is soon; whether there may be more."""
        if select.select([self._ours], [], [], FRAME_S)[0]:
            try:
                self._read += os.read(self._ours, 65536)
            except OSError:  # the end of a terminal
                return False
        return True

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._ours)


class Desk:
    """A user's folder with what the README takes for granted; and a worker and a gateway that run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.terminals: list[Terminal] = []
        self.url = ""
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python", "python3"):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
            (programs / name).chmod(0o755)
        self.topic = secrets.token_hex(8)
        own = {"HOST": harness.LOOPBACK, "TOPIC": self.topic, "STATE_DIR": str(folder / "state"), "PORT": "0"}
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")}
        self.env |= {f"QMESH_{name}": value for name, value in own.items()} | {"QMESH_HTTP": f"{harness.LOOPBACK}:0"}
        self.env |= {"PATH": f"{programs}:{os.environ['PATH']}", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120"}
        self.source = self._lay_out("source", "build_zipapp.py", "qmesh.py", "README.md")
        (self.source / "tests").mkdir()
        shutil.copytree(harness.ROOT / "tests" / "bench", self.source / "tests" / "bench")
        for name in ("reference.py", "desk.py"):
            shutil.copy(harness.ROOT / "tests" / name, self.source / "tests")

    def _lay_out(self, name: str, *files: str) -> Path:
        place = self.folder / name
        (place / "models").mkdir(parents=True)
        tiny_models.write_model("qwen2", place / "models" / "tiny.gguf")
        for file in files:
            shutil.copy(harness.ROOT / file, place)
        return place

    def new_folder(self) -> Path:
        """Somebody's, with a file of each kind that a command of the README is given."""
        place = self._lay_out(secrets.token_hex(4), "build_zipapp.py", "qmesh.py", "README.md")
        shutil.copy(self.source / "dist" / "qmesh.pyz", place)
        shutil.copytree(self.source / "tests", place / "tests")
        (question,) = (code for code in inline_code(TEXT) if code.startswith('{"id"'))
        (place / "in.jsonl").write_text(f"{question}\n")
        return place

    def types(self, command: str, folder: Path) -> Terminal:
        for name, value in LEFT_OPEN.items():
            command = re.sub(rf"\b{re.escape(name)}$", value, command)
        soon = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(30)
        command = re.sub(r"\b\d{4}-\d\d-\d\d\b", soon.isoformat(), command)
        command = command.replace(f"http://{harness.LOOPBACK}:{qmesh.DEFAULT_HTTP_PORT}/", self.url)
        self.terminals.append(Terminal(command, folder, self.env))
        return self.terminals[-1]

    def end(self) -> None:
        for terminal in self.terminals:
            terminal.close()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    try:
        building = desk.types("python build_zipapp.py", desk.source)
        assert building.ends() == 0, building.shown
        folder = desk.new_folder()
        worker, gateway = (desk.types(f"python qmesh.pyz {command}", folder) for command in ("worker", "gateway"))
        worker.sees(RUNS_ON["worker"])
        found = re.search(r"http://\S+/(?= in a browser)", gateway.sees(RUNS_ON["gateway"]))
        assert found is not None
        desk.url = found[0]
        yield desk
    finally:
        desk.end()


GIVEN = {  # what happened before
    r".* --replace lab\.key .*": "python qmesh.pyz init lab.key",
    r"curl -C .*": "head -c 1000000 qmesh.pyz > cut && mv cut qmesh.pyz",
}
HERE = [session for session in SESSIONS if not all(elsewhere(typed.command) for typed in session)]


@pytest.fixture(scope="module")
def examined(desk: Desk) -> Terminal:
    """Doctor, which listens for twelve seconds, while others type."""
    return desk.types(DOCTOR, desk.new_folder())


@pytest.mark.parametrize("session", HERE, ids=lambda session: session[0].command)
def test_a_command_does_what_the_readme_says_and_shows_what_it_shows(
    desk: Desk, examined: Terminal, session: list[Typed]
) -> None:
    folder = desk.new_folder()
    for typed in session:
        if typed.machine == CHAT:
            converse(desk.types("python qmesh.pyz chat", folder), typed)
        elif typed.command == DOCTOR:  # what it shows of a firewall, it shows in tests/test_doctor_lan.py
            assert (examined.ends(), examined.shown.splitlines()[-1]) == (0, "All is well")
        else:
            for before in (before for pattern, before in GIVEN.items() if re.fullmatch(pattern, typed.command)):
                assert desk.types(before, folder).ends() == 0
            shown = run(desk.types(typed.command, folder), typed.command).replace(desk.topic, qmesh.DEFAULT_TOPIC)
            if typed.shown:
                assert looks_like(shown, f"{typed.shown}..."), masked(shown)


def converse(chat: Terminal, typed: Typed) -> None:
    """A turn of a conversation: whatever the answer is, under it stands what stands in the README."""
    *_, told = typed.shown.splitlines()
    chat.sees(r"Ctrl-D leaves\s+.*> ")
    chat.types(f"{typed.command}\r")
    assert looks_like(chat.sees(r"tokens/s").splitlines()[-1], told)
    chat.sees(r"> $")  # it listens again: before, Ctrl-D would be lost
    chat.types(CTRL_D)
    assert chat.ends() == 0


def run(terminal: Terminal, command: str) -> str:
    """What a command shows to its end, or until it is ended; it must succeed."""
    words = set(shlex.split(command, comments=True))
    ready = [sign for word, sign in RUNS_ON.items() if word in words and not words & {"--print-service", "--help"}]
    for sign in ready:
        terminal.sees(sign)
    if ready:
        terminal.types(CTRL_D if "chat" in words else CTRL_C)
    assert terminal.ends() == 0, terminal.shown
    for sign in (sign for pattern, sign in SHOWS.items() if re.fullmatch(pattern, command)):
        assert re.search(sign, terminal.shown), terminal.shown
    return terminal.shown


def test_shown_is_compared_but_for_what_differs_each_time() -> None:
    alike = [
        ("Worker 0a1b2c, 12 slots, 1.5s", "Worker ffffff, 3 slots, 12s"),
        ("closed mesh abcdefg2, 98 MB", "closed mesh 22222222, 1 GB"),
        ("A   B\n1     22%", "A B\n10 2%"),
        ("a\nb\nc", "a\n...\nc"),
    ]
    assert [pair for pair in alike if not looks_like(*pair)] == []
    unlike = [
        ("All is well", "1 problem found"),
        ("Worker 0a1b2c, 12 slots", "Worker ffffff, 3 slots, 12s"),
        ("a\nb", "a"),
    ]
    assert [pair for pair in unlike if looks_like(*pair)] == []


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    machines = typed_in_block("a$ first\nsaid\nmore\n$ second\n> third\n")
    assert machines == [Typed("a", "first", "said\nmore\n"), Typed("", "second"), Typed(CHAT, "third")]
    assert typed_in_block("first  # why\n\nsecond\n") == [Typed("", "first"), Typed("", "second")]
    assert list(inline_code("`a\n b`, `c`\n```\n`d`\n```\n`e`")) == ["a b", "c", "e"]
    assert is_command("status --json")
    assert is_command("tests/fuzz.py --runs 1")
    assert not is_command("status")
    assert not is_command("--peer HOST")
    with pytest.raises(ValueError, match="is `rm -r x` a command"):
        is_command("rm -r x")


# --- What can be looked up ---

PROMISES = (  # a number that the program knows too, in the words around it
    f"multicast ({qmesh.BEACON_GROUP}, for IPv6 {qmesh.BEACON_GROUP6})",
    f"to UDP {qmesh.BEACON_PORT} of each network",
    f"UDP {qmesh.BEACON_PORT} (beacons), UDP and TCP {qmesh.DEFAULT_PORT} (workers)",
    f"on machines that ask, UDP {qmesh.CLIENT_PORT}",
    f"A record lives {qmesh.RECORD_TTL_S:g} seconds",
    f"Over {qmesh.HEALTHY_ABOVE:g} a worker is healthy, from {qmesh.OVERLOADED_BELOW:g} to",
    f"slots of {qmesh.DEFAULT_CONTEXT:,} tokens, and {qmesh.QUEUE_PER_SLOT} requests in the queue per slot",
    f"about {qmesh.DEFAULT_STALL_S:g} seconds (`--stall-timeout`)",
    f"reaches it again within {qmesh.REATTACH_TRY_S:g} seconds",
    f"finishes what it can in `--grace` seconds ({qmesh.DEFAULT_GRACE_S:g})",
    f"asked after all others for {qmesh.AVOID_FIRST_S:g} seconds, then 10, 20, up to {qmesh.AVOID_MAX_S:g}",
    f"no token after {qmesh.HEDGE_AFTER_S:g} seconds",
    f"fetches a small model ({round(qmesh.DEFAULT_MODEL.size / 1e6)} MB)",
    f"is owed {qmesh.HANDSHAKE_TIMEOUT_S:g} seconds, {qmesh.MAX_UNTRUSTED_BYTES // 1024} KiB",
    f"{qmesh.MAX_UNTRUSTED_PER_HOST} such connections from one host and {qmesh.MAX_UNTRUSTED} in all",
    f"{qmesh.CONNECTIONS_PER_S:g} connections a second are taken from one host and {qmesh.ACCEPTS_PER_S:g} from all",
    f"{qmesh.HANDSHAKES_PER_S:g} handshakes a second",
    f"A member is owed {qmesh.MAX_CONNECTIONS_PER_HOST} connections; {qmesh.MEMBER_PER_S:g} requests a second",
    f"each {qmesh.BYTES_PER_REQUEST // 1024} KiB more count for one more",
    f"{qmesh.RATE_PER_S:g} datagrams a second and {qmesh.MAX_RECORDS_PER_HOST} records",
    f"tries again every {qmesh.SERVICE_RESTART_S} seconds",
    f"`n` (up to {qmesh.MAX_CHOICES} choices)",
    f"within `--wait` seconds ({qmesh.DEFAULT_GATEWAY_WAIT_S:g})",
    f"port {qmesh.DEFAULT_HTTP_PORT} or a free one",
    f"up to {qmesh.BATCH_HELD} wait while later ones are asked",
    f"up to {qmesh.MAX_EMBED_INPUTS:,} texts, sends them {qmesh.MAX_EMBED_TEXTS} at a time",
    f"({qmesh.DEFAULT_EMBED_CONTEXT:,} tokens, unless `--ctx`",
    f"more than {qmesh.MAX_TEXT_S:g} seconds",
)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_number_is_that_of_the_program(promise: str) -> None:
    assert promise in ON_ONE_LINE


def test_every_file_that_is_named_and_every_link_is_there() -> None:
    named = {code for code in inline_code(TEXT) if re.fullmatch(SCRIPT, code)}
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [name for name in links if not name.startswith("https://")]
    assert len(named) > 10
    assert local
    places = (harness.ROOT, harness.ROOT / "tests")
    assert [name for name in [*named, *local] if not any((place / name).exists() for place in places)] == []


def test_every_anchor_has_its_heading() -> None:
    headings = re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert {"limits", "reference"} <= anchors
    assert anchors <= slugs
