"""Section 21: what a person sees in a terminal, and what becomes of what is typed there."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop import PATIENCE_S, in_a_loop
from scripted_worker import (
    ScriptedWorker,
    health_of,
    in_turn,
    refuses,
    result_frame,
    says,
    sends,
    token_frame,
)

import qmesh
from qmesh import Conversation, Json, Look, MeshHistory, Message, watch_lines

pytestmark = pytest.mark.usefixtures("parting_without_waiting")

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ENTER, LEAVE = re.escape("\x1b[?1049h"), re.escape("\x1b[?1049l")
SHORT = ("--max-tokens", "4", "--temperature", "0")


# --- Rendering ---


def a_worker(number: int, *, active: int = 0, waiting: int = 0, score: float = 80, model: str = "tiny") -> Json:
    queue = {"active": active, "waiting": waiting, "capacity": 16}
    load = {"health": health_of(score), "slots": 4, "queue": queue, "speed": 12.5}
    return {
        "worker_id": f"{number:06x}" + "0" * 58,
        "address": ["10.0.0.7", 47475],
        "models": [{"name": model}],
        **load,
    }


def is_silent(number: int, error: str = "it cannot be reached") -> Json:
    return {"worker_id": f"{number:06x}" + "0" * 58, "address": ["10.0.0.7", 47475], "error": error}


def shown(
    workers: list[Json], silent: list[Json], width: int, height: int = 24, *, colour: bool = False, times: int = 1
) -> list[str]:
    history = MeshHistory()
    for now in range(times):
        history.take(workers, silent, now)
    look = Look("open mesh 'lab'", workers, silent, times, 2.0)
    return watch_lines(look, history, width, height, colour=colour)


LONG = "SmolLM2-135M-Instruct.Q4_1"


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, "WORKER STATE ACTIVE SLOTS IN USE"),
        (80, "WORKER STATE SCORE ACTIVE WAITING SLOTS IN USE TOKENS/S MODEL"),
        (120, "WORKER STATE SCORE CPU MEMORY ACTIVE WAITING SLOTS IN USE TOKENS/S MODEL ADDRESS"),
    ],
)
def test_a_narrower_screen_shows_fewer_columns_and_the_most_telling_ones(width: int, columns: str) -> None:
    lines = shown([a_worker(1, active=2, model=LONG), a_worker(2, score=40, model=LONG)], [], width, times=40)
    (at,) = (at for at, line in enumerate(lines) if line.startswith("WORKER"))
    assert lines[at].split() == columns.split()
    assert [line.split()[:2] for line in lines[at + 1 :]] == [["000001", "healthy"], ["000002", "busy"]]
    assert max(map(qmesh.cells, lines)) <= width


def test_where_there_is_room_names_are_whole_and_totals_are_on_one_line() -> None:
    first, _, row = shown([a_worker(1, active=2, waiting=1, model=LONG)], [], 160)
    assert first == "1 worker in the open mesh 'lab', every 2 s: 2 of 4 slots in use, 1 waiting, 12 tokens/s"
    assert f"  {LONG}  10.0.0.7:47475" in row


def test_a_name_that_does_not_fit_is_cut_with_a_sign() -> None:
    row = shown([a_worker(1, model=LONG)], [], 80)[-1]
    assert re.search(r"  SmolLM2-\S+…$", row)
    assert qmesh.cells(row) <= 80


def test_a_name_in_wide_letters_takes_the_room_that_it_takes() -> None:
    workers = [a_worker(1, model="\u65e5\u672c\u8a9e" * 9), a_worker(2)]
    assert max(map(qmesh.cells, shown(workers, [], 80))) <= 80
    rows = shown(workers, [], 140)[-2:]
    assert [qmesh.cells(row.partition("10.0.0.7")[0]) for row in rows] == [126, 126]


@pytest.mark.parametrize(("height", "kept"), [(12, 8), (6, 2), (5, 1)])
def test_a_short_screen_says_how_many_workers_it_does_not_show(height: int, kept: int) -> None:
    lines = shown([a_worker(number) for number in range(20)], [], 80, height)
    assert len(lines) == height
    assert lines[-1] == f"... and {20 - kept} more workers"
    assert sum(line.startswith("0000") for line in lines) == kept


def test_who_does_not_answer_is_named_with_the_reason_below_the_workers() -> None:
    lines = shown([a_worker(1)], [is_silent(2, "no answer\x1b[2J in 2 s")], 80)
    assert lines[-1] == "000002 does not answer: no answer?[2J in 2 s"
    assert "000002 does not answer" not in "\n".join(shown([a_worker(1)], [is_silent(2)], 80, height=4))


def test_where_nobody_is_it_says_that_it_goes_on_looking() -> None:
    assert shown([], [], 80) == ["No worker answers in the open mesh 'lab'; looking again every 2 s"]


def test_colour_adds_nothing_that_is_not_said_in_words() -> None:
    workers = [a_worker(1), a_worker(2, score=40), a_worker(3, score=10)]
    plain, coloured = (shown(workers, [is_silent(4)], 80, colour=colour) for colour in (False, True))
    assert [ESCAPES.sub("", line) for line in coloured] == plain
    assert not ESCAPES.search("".join(plain))
    for state, code in (("healthy", 32), ("busy", 33), ("overloaded", 31)):
        assert f"\x1b[{code}m{state}" in "".join(coloured)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "expected"),
    [
        (Tty(), {}, (True, True)),
        (Tty(), {"NO_COLOR": "1"}, (True, False)),
        (Tty(), {"TERM": "dumb"}, (False, False)),
        (io.StringIO(), {}, (False, False)),
    ],
)
def test_colour_is_for_terminals_that_have_it_and_people_who_want_it(
    stream: io.StringIO, environ: dict[str, str], expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert (qmesh.takes_escapes(stream), qmesh.takes_colour(stream)) == expected


def test_a_screen_is_given_back_whatever_ends_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    stream = Tty()
    with contextlib.suppress(ZeroDivisionError), qmesh.Screen.on(stream) as screen:
        screen.draw(["one", "two"], 3)
        screen.draw(["one", "two", "three"], 3)  # which fill it: another line would move them all
        raise ZeroDivisionError
    between = re.fullmatch(f"{ENTER}.*?(\x1b\\[H.*){re.escape(chr(27))}\\[\\?7h.*{LEAVE}", stream.getvalue(), re.DOTALL)
    assert between is not None
    assert between[1] == "\x1b[H\x1b[Kone\n\x1b[Ktwo\n\x1b[J\x1b[H\x1b[Kone\n\x1b[Ktwo\n\x1b[Kthree"


texts = st.text(max_size=40)
figures = st.integers(0, 10**6)


@given(
    st.lists(st.builds(a_worker, figures, active=figures, waiting=figures, score=st.integers(0, 100), model=texts)),
    st.lists(st.builds(is_silent, figures, texts), max_size=5),
    st.integers(1, 200),
    st.integers(1, 40),
)
def test_no_line_is_too_wide_and_no_screen_too_long(
    workers: list[Json], silent: list[Json], width: int, height: int
) -> None:
    lines = shown(workers, silent, width, height)
    assert len(lines) <= height
    assert max(map(qmesh.cells, lines)) <= width


# --- What was seen ---


def test_load_is_shown_look_by_look_with_a_gap_where_a_worker_did_not_answer() -> None:
    history = MeshHistory()
    for now, active in enumerate((0, 1, 4)):
        history.take([a_worker(1, active=active)], [], now)
    history.take([], [is_silent(1)], 4)
    history.take([a_worker(1, active=4, waiting=9)], [], 5)
    load = history.load(a_worker(1)["worker_id"])
    assert (load.strip(), len(load)) == ("▁▃█ █", qmesh.LOAD_SAMPLES)
    for now in range(100):
        history.take([a_worker(1)], [], now)
    assert history.load(a_worker(1)["worker_id"]) == "▁" * qmesh.LOAD_SAMPLES


def test_it_is_told_for_a_while_who_came_and_who_left() -> None:
    history = MeshHistory()
    history.take([a_worker(1)], [], 0)
    assert history.news(0) == []  # who is there at first did not come just now
    history.take([a_worker(1), a_worker(2)], [], 10)
    history.take([a_worker(2)], [is_silent(1)], 12)
    assert history.news(15) == ["3 s ago: 000001 left", "5 s ago: 000002 came"]
    history.take([a_worker(2)], [], 14)  # it is heard of no more, which is no news
    assert history.news(15) == ["3 s ago: 000001 left", "5 s ago: 000002 came"]
    assert history.news(12 + qmesh.NEWS_S) == [f"{qmesh.NEWS_S:.0f} s ago: 000001 left"]
    assert history.news(13 + qmesh.NEWS_S) == []


def test_of_workers_of_whom_nothing_is_heard_any_more_nothing_is_kept() -> None:
    history = MeshHistory()
    history.take([a_worker(1, active=4)], [], 0)
    history.take([], [], 1)
    history.take([a_worker(1)], [], 2)
    assert history.load(a_worker(1)["worker_id"]).strip() == "▁"


# --- A conversation ---


def talked() -> Conversation:
    talk = Conversation("Be brief.")
    for question, answer, cut in (("Who?", "Ada.", False), ("Where?", "In Lon", True)):
        talk.pending = question
        talk.answered(answer, model="tiny", worker_id="ab12cd" + "0" * 58, cut=cut)
    return talk


def test_a_conversation_is_asked_with_all_that_was_said_and_an_answer_that_was_cut_as_it_is() -> None:
    talk = talked()
    talk.pending = "When?"
    pairs = [(message.role, message.content) for message in talk.messages()]
    assert pairs[:3] == [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada.")]
    assert pairs[3:] == [("user", "Where?"), ("assistant", "In Lon"), ("user", "When?")]
    assert talk.holder.startswith("ab12cd")


def test_of_an_answer_that_was_cut_before_its_first_word_only_the_question_is_kept() -> None:
    talk = talked()
    talk.pending = "When?"
    talk.answered(" ", model="", worker_id="", cut=True)
    assert (talk.pending, len(talk.turns)) == ("When?", 2)


def test_asking_again_takes_the_last_answer_back() -> None:
    talk = talked()
    assert talk.ask_again()
    assert talk.messages()[-1] == Message("user", "Where?")
    assert talk.ask_again()  # it has no answer yet
    assert len(talk.turns) == 1
    assert not Conversation(None).ask_again()


def test_the_oldest_turns_are_forgotten_first() -> None:
    talk = talked()
    assert talk.forget(1) == 1
    assert [turn.question for turn in talk.turns] == ["Where?"]
    assert talk.forget(5) == 1


def test_a_saved_conversation_marks_what_was_cut_and_can_be_asked_on(tmp_path: Path) -> None:
    talk = talked()
    talk.save(tmp_path / "a.md", replace_it=False)
    talk.save(tmp_path / "a.json", replace_it=False)
    assert (tmp_path / "a.md").read_text("utf-8").endswith("## tiny (worker ab12cd)\n\nIn Lon\n\n*(cut here)*\n")
    said = json.loads((tmp_path / "a.json").read_bytes())
    assert [turn.get("cut", False) for turn in said] == [False, False, False, False, True]
    assert list(qmesh.new_job(said).messages) == talk.messages()
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


def test_saving_never_overwrites_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("precious")
    with pytest.raises(qmesh.UsageError, match=r"is there already: `/save! \S+a.md` overwrites it"):
        talked().save(path, replace_it=False)
    assert path.read_text() == "precious"
    talked().save(path, replace_it=True)
    assert "Ada." in path.read_text()
    with pytest.raises(qmesh.UsageError, match="cannot be written"):
        talked().save(tmp_path / "no" / "a.md", replace_it=False)


# --- Typing, with workers of whom the model is scripted ---


Typed = Callable[..., Any]


@pytest.fixture
def typed(topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Has a chat read these lines from a pipe, beside the workers of the test's loop; returns its exit code."""

    def talk(lines: list[str], worker: str | None, timeout_s: float) -> int:
        settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=topic, state_dir=str(tmp_path))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        asking = qmesh.ChatChoices(None, worker, timeout_s, {"max_tokens": 8})
        with qmesh.BlockingClient(settings) as mesh:
            return qmesh.Chat(mesh, Conversation(None), asking, qmesh.TypedLines(None)).run()

    async def run(*lines: str, worker: str | None = None, timeout_s: float = 20) -> int:
        return await asyncio.to_thread(talk, list(lines), worker, timeout_s)

    return run


def asked(worker: ScriptedWorker, at: int = -1) -> list[str]:
    return [message["content"] for message in worker.prompts[at]["messages"]]


@in_a_loop
async def test_each_line_is_a_turn_over_one_connection(
    topic: str, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedWorker(in_turn(says("I am ", "Ada."), says("Yes."))).on(topic) as worker:
        assert await typed("Who?", "", "Really, \\", "Ada?") == 0
    assert asked(worker) == ["Who?", "I am Ada.", "Really, \nAda?"]
    assert worker.connections == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("I am Ada.\nYes.\n", "")


@in_a_loop
async def test_an_answer_outlives_its_worker_and_a_line_tells_of_it(
    topic: str, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = ScriptedWorker(sends(token_frame("", 0, "one "), hangs_up=True))
    heir = ScriptedWorker(in_turn(sends(token_frame("", 1, "two"), result_frame("", "one two", 2)), says("three")))
    async with dying.on(topic), heir.on(topic):
        assert await typed("Count.", f"/worker {heir.worker_id}", "On.", worker=str(dying.worker_id)) == 0
    assert asked(heir) == ["Count.", "one two", "On."]
    said = capsys.readouterr()
    assert said.out == "one two\nthree\n"
    line = f"🔁 Lost worker {dying.worker_id.short} after 1 token"
    assert line in said.err
    assert f"; {heir.worker_id.short} went on" in said.err


@in_a_loop
async def test_a_full_context_is_spoken_of_and_the_question_kept(
    topic: str, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = refuses(qmesh.InvalidRequest("the prompt has 9 tokens too many", code="context_exceeded"))
    async with ScriptedWorker(in_turn(says("one"), says("two"), too_long, says("three"))).on(topic) as worker:
        assert await typed("1", "2", "3", "/forget 1", "/retry") == 1
    assert asked(worker) == ["2", "two", "3"]
    said = capsys.readouterr()
    assert said.out == "one\ntwo\nthree\n"
    assert "the prompt has 9 tokens too many" in said.err
    assert "/forget N drops the oldest N turns" in said.err
    assert "forgot 1 turn; 1 turn left" in said.err


@in_a_loop
async def test_commands_change_how_it_is_asked(
    topic: str, typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = ("/system Be kind.", "/model TINY", "/status", "/model", f"/save {tmp_path}/a.json")
    async with ScriptedWorker(says("Yes.")).on(topic) as worker:
        assert await typed("Hi", *commands, "/retry", "/new", "//help", "/quit", "never asked") == 0
    assert [asked(worker, at) for at in range(3)] == [["Hi"], ["Be kind.", "Hi"], ["Be kind.", "/help"]]
    assert [prompt.get("model") for prompt in worker.prompts] == [None, "TINY", "TINY"]
    assert len(worker.prompts) == 3
    said = capsys.readouterr()
    assert said.out == "Yes.\n" * 3
    assert re.search(rf"^{worker.worker_id.short}\*  healthy .*\n\* holds this conversation$", said.err, re.MULTILINE)
    assert "* tiny  (1 worker)\nasking for TINY" in said.err
    assert f"saved 1 turn to {tmp_path}/a.json as JSON\n" in said.err
    assert json.loads((tmp_path / "a.json").read_bytes())[1:] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes."},
    ]


@pytest.mark.parametrize(
    ("line", "said", "exit_code"),
    [
        ("/bye now", "there is no command /bye; to ask about it, begin with //", 2),
        ("/forget x", "a number of turns is needed", 2),
        ("/worker me", "a worker is named by 6 or more of its id's first digits, not 'me'", 2),
        ("/save", "a file is needed", 2),
        ("/retry", "nothing was asked yet", 2),
        ("/model gpt-17", "no worker has the model gpt-17; the mesh has: tiny", 5),
    ],
)
def test_a_command_that_makes_no_sense_is_spoken_of_and_the_chat_goes_on(
    topic: str, typed: Typed, capsys: pytest.CaptureFixture[str], line: str, said: str, exit_code: int
) -> None:
    @in_a_loop
    async def talk() -> None:
        async with ScriptedWorker(says("Yes.")).on(topic):
            assert await typed(line, "Hi") == exit_code

    talk()
    told = capsys.readouterr()
    assert told.out == "Yes.\n"
    assert said in told.err


@in_a_loop
async def test_the_help_of_a_chat_fits_a_usual_terminal(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    assert await typed("/help") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert [line for line in lines if len(line) > 80] == []


@in_a_loop
async def test_where_nobody_is_the_chat_goes_on_and_the_question_is_asked_later(
    topic: str, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await typed("Hi", "/retry", timeout_s=0.5) == qmesh.NoWorkerFound.exit_code
    assert capsys.readouterr().err.count("no worker was found in ") == 2


# --- Real processes at a terminal ---

BECOME_ITS_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Seat:
    """A person at a terminal in which a command of the program runs."""

    def __init__(self, mesh: harness.Mesh, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(80, 24)
        command = [sys.executable, "-c", BECOME_ITS_TERMINAL, *harness.running(mesh.program), *arguments]
        env = mesh.env | {"TERM": "xterm"}
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=harness.ROOT, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def types(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def interrupts(self) -> None:
        """Ctrl-C, once the program waits for what is typed: one that comes between a prompt and the wait behind it
        Python's readline notices only with the next key.
        """
        deadline = time.monotonic() + PATIENCE_S
        while psutil.Process(self._process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.types("\x03")

    def sees(self, pattern: str) -> re.Match[str]:
        """Wait until it is shown, behind what was seen before; and look no further back from then on."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.shown += os.read(self._ours, 65536).decode(errors="replace")
        self.shown = self.shown[found.end() :]
        return found

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def leaves(self) -> int:
        """The exit code; what is shown to the end is in `shown`."""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(self._ours, 65536):
                self.shown += data.decode(errors="replace")
        return self._process.wait(PATIENCE_S)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


Seats = Callable[..., Seat]


@pytest.fixture
def seat() -> Iterator[Seats]:
    taken: list[Seat] = []

    def take(mesh: harness.Mesh, *arguments: str) -> Seat:
        taken.append(Seat(mesh, *arguments))
        return taken[-1]

    yield take
    for each in taken:
        each.end()


def test_ctrl_c_stops_an_answer_and_not_the_chat(two_workers: harness.Mesh, seat: Seats) -> None:
    person = seat(two_workers, "chat", "--max-tokens", "900", "--temperature", "0", "--no-history")
    person.sees("Ctrl-D leaves\r\n.*> ")
    person.types("Write a long story.\r")
    person.sees(r"story\.\r\n.*\w+ \w+ \w+ ")
    person.types("\x03")
    person.sees("what was written is kept, and /retry asks again.*> ")
    person.types("/forget 1\r")
    person.sees("forgot 1 turn; 0 turns left\r\n.*> ")
    person.types("half a question")
    person.sees("half a question")
    person.interrupts()
    person.sees("Ctrl-C again, or Ctrl-D, leaves.*> ")
    person.types("/help\r")  # so the next one is the first again
    person.sees("/quit .*> ")
    person.interrupts()
    person.sees("Ctrl-C again, or Ctrl-D, leaves.*> ")
    person.interrupts()
    assert person.leaves() == 0


def test_an_answer_in_a_terminal_outlives_its_worker(mesh: harness.Mesh, seat: Seats) -> None:
    workers = {worker.worker_id[:6]: worker for worker in mesh.start_workers(2)}
    first, heir = workers
    person = seat(mesh, "chat", "--worker", first, "--max-tokens", "100", "--temperature", "0", "--no-history")
    person.sees("> ")
    person.types("Write a long story.\r")
    person.sees(r"story\.\r\n.*\w+ \w+ ")
    workers[first].end()
    person.sees(rf"Lost worker {first} after \d+ tokens .*; {heir} went on\r\n")
    person.sees(rf"worker {heir} · \d+ tokens · \d+ tokens/s.*> ")
    person.types("\x04")
    assert person.leaves() == 0


def test_what_was_typed_can_be_had_again_the_next_time_unless_nothing_is_kept(
    two_workers: harness.Mesh, seat: Seats
) -> None:
    def histories() -> list[Path]:
        return list(two_workers.state_dir.glob(f"*/client/{qmesh.HISTORY_FILE}"))

    for flags in (("--no-history",), ()):
        assert histories() == []
        person = seat(two_workers, "chat", *flags)
        person.sees("> ")
        person.types("/system two \\\rlines\r")
        person.sees("two \r\n.*lines\r\n.*> ")
        person.types("\x04")
        assert person.leaves() == 0
    (path,) = histories()
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a", encoding="utf-8") as file:
        file.write("damaged\n" + '"/bye"\n' * (2 * qmesh.MAX_HISTORY) + '"/help"\n')
    person = seat(two_workers, "chat")
    person.sees("> ")
    person.types("\x1b[A\r")
    person.sees("/help.*COMMAND.*> ")
    assert len(path.read_text("utf-8").splitlines()) <= qmesh.MAX_HISTORY + 1


def test_lines_that_are_pasted_make_one_turn(two_workers: harness.Mesh, seat: Seats) -> None:
    person = seat(two_workers, "chat", *SHORT, "--no-history")
    person.sees("> ")
    person.types("\x1b[200~/system one\ntwo\x1b[201~\r")
    person.sees("one\r\n.*two\r\n.*one\r\ntwo\r\n.*> ")


def test_a_pipe_gets_answers_alone_and_the_exit_code_of_the_last_failure(two_workers: harness.Mesh) -> None:
    finished = two_workers.run("chat", *SHORT, stdin="What is 1+1?\n/nope\nAnd 2+2?\n")
    assert finished.returncode == 2
    assert len(finished.stdout.splitlines()) >= 2
    assert finished.stderr.startswith("error: there is no command /nope")
    assert finished.stderr.count("\n") == 2


@pytest.mark.parametrize("flags", [("--temperature", "-1"), ("--worker", "ab"), ("--worker", "quick!")])
def test_a_chat_that_could_never_ask_is_refused_at_once(tmp_path: Path, flags: tuple[str, ...]) -> None:
    finished = harness.Mesh(tmp_path, Path("none")).run("chat", *flags, stdin="Hi\n")
    assert (finished.returncode, finished.stdout) == (2, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watched_mesh_is_drawn_in_place_follows_the_size_and_leaves_the_screen_as_it_was(
    two_workers: harness.Mesh, seat: Seats, number: signal.Signals
) -> None:
    person = seat(two_workers, "status", "--watch", "0.5")
    person.sees(ENTER)
    person.sees(re.escape("\x1b[H") + "[^H]*2 workers in the open mesh.*SCORE.*MODEL")
    person.sees(".*".join(sorted(worker.worker_id[:6] for worker in two_workers.processes)))
    person.sees(re.escape("\x1b[J"))
    person.resize(40, 5)
    person.sees(re.escape("\x1b[H") + r"[^\n]{30,60}\r\n[^\n]*\r\n[^\n]*ACTIVE  SLOTS IN USE\x1b\[0m\r\n")
    person.signal(number)
    assert person.leaves() == 0
    assert re.search(LEAVE, person.shown)


def test_who_comes_later_is_seen_by_one_who_watches_from_the_start(topic: str, tmp_path: Path) -> None:
    """As JSON, a line for each look."""
    env = harness.Mesh(tmp_path, Path("none")).env | {"QMESH_TOPIC": topic}
    command = [*harness.running(harness.PROGRAM), "status", "--watch", "0.5", "--json"]

    @in_a_loop
    async def watch() -> None:
        watching = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=env, cwd=harness.ROOT)
        assert watching.stdout is not None
        try:
            first = json.loads(await watching.stdout.readline())
            assert (first["workers"], first["unreachable"]) == ([], [])
            async with ScriptedWorker(says("Yes.")).on(topic) as worker:
                while not (look := json.loads(await watching.stdout.readline()))["workers"]:
                    pass
                assert [status["worker_id"] for status in look["workers"]] == [str(worker.worker_id)]
                assert look.keys() == {"time", "workers", "unreachable", "network", "mesh", "elapsed_ms"}
            while not (look := json.loads(await watching.stdout.readline()))["unreachable"]:
                pass
            watching.send_signal(signal.SIGINT)
            assert await watching.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                watching.kill()
            await watching.wait()

    watch()


def test_without_a_terminal_a_watched_mesh_is_a_plain_table_each_time(two_workers: harness.Mesh) -> None:
    with two_workers.popen("status", "--watch", "0.5") as watching:
        assert watching.stdout is not None
        told = ""
        while told.count("2 workers in the open mesh") < 2:
            told += watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        told += watching.stdout.read()
        assert watching.wait(PATIENCE_S) == 0
    assert not ESCAPES.search(told)
    assert all(worker.worker_id[:6] in told for worker in two_workers.processes)
