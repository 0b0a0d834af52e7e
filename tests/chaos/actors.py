"""Real processes of both kinds: workers that faults strike, and clients that say all that happens to their requests."""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import psutil
from story import Json, Question, Story

SCRIPT = Path(__file__).with_name("asker.py")

STALL_TIMEOUT_S = 3.0  # the least that clients accept: most of a fault's time is waiting for it
GRACE_S = 1.0  # of a worker that is told to stop: shorter than the answers here, so that some are handed over
STOP_TIMEOUT_S = GRACE_S + 7.0  # leaving the mesh waits for answers of dead neighbours, llama.cpp for its step

ANSWER_TIMEOUT_S = 120.0  # for any answer here, on a machine whose cores others want too, after a stall or two
STAGE_TIMEOUT_S = 30.0  # for a request to come so far that it can be struck
CLIENT_TIMEOUT_S = 20.0  # for a client to start, to say a thing it knows, or to end
QUIET_TIMEOUT_S = 15.0  # for the last slot to be free, when the last answer is given
FOUND_TIMEOUT_S = 25.0  # for a worker that was cut off to be found again: two beacons, and a search
FOOTPRINT_TIMEOUT_S = 20.0  # for connections to be closed: also those of clients that vanished while being greeted
POLL_S = 0.02  # between two looks at a worker: shorter than any time that is measured by them

LEAKS = ("Traceback", "ResourceWarning", "was never retrieved", "was destroyed but it is pending", "never awaited")


class TimedOut(AssertionError):
    """Something that had to come did not come in time."""


def is_over(story: Story) -> bool:
    return story.over


def has_begun(story: Story) -> bool:
    return bool(story.pieces)


def wait_until(holds: Callable[[], bool], within_s: float, what: str) -> float:
    """Wait for a condition; returns how long it took."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise TimedOut(f"{what}: not within {within_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds of the system."""

    descriptors: int
    threads: int

    def exceeds(self, other: Footprint) -> bool:
        return self.descriptors > other.descriptors or self.threads > other.threads


@dataclass(eq=False)
class Server:
    """A worker under test.

    ended: how it was made to end, so that nobody wonders that it has. strained: so much that its log may show it.
    """

    process: harness.Process
    host: str
    ended: str | None = None
    strained: bool = False

    @property
    def worker_id(self) -> str:
        return self.process.worker_id

    @property
    def pid(self) -> int:
        return self.process.popen.pid

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.process.ready["tcp"][1]

    @property
    def alive(self) -> bool:
        return self.process.popen.poll() is None

    def kill(self) -> None:
        self.ended = "killed"
        self.process.popen.kill()

    def terminate(self) -> None:
        self.ended = "told to stop"
        self.process.popen.terminate()

    def suspend(self) -> None:
        self.process.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.popen.send_signal(signal.SIGCONT)

    def footprint(self) -> Footprint:
        process = psutil.Process(self.pid)
        return Footprint(process.num_fds(), process.num_threads())


class Asker:
    """The other side of `asker.py`: sends it commands, and keeps the story of each request."""

    def __init__(
        self, place: harness.Place, directory: Path, env: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        directory.mkdir()
        self.stories: dict[str, Story] = {}
        self.faults: list[str] = []
        self.closed: Json | None = None
        self.killed = False
        self._told: dict[str, Json] = {}  # by ticket: what was asked for
        self._log = directory / "stderr.txt"
        self._changed = threading.Condition()
        self._ready = self._silent = False
        own = {"QMESH_STATE_DIR": str(directory / "state"), "QMESH_STALL_TIMEOUT": f"{STALL_TIMEOUT_S:g}"}
        command = [*place.prefix, *prefix, sys.executable, "-W", "always::ResourceWarning", str(SCRIPT)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with self._log.open("wb") as stderr:
            self.popen = subprocess.Popen(command, **pipes, stderr=stderr, env=place.client_env | own | dict(env))
        threading.Thread(target=self._listen, daemon=True).start()
        self.wait(lambda: self._ready, CLIENT_TIMEOUT_S, "a client that starts")

    # --- What it says ---

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self._changed:
                self._take(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._silent = True
            self._changed.notify_all()

    def _take(self, event: Json) -> None:
        if "id" in event:
            self.stories[event["id"]].take(event)
        elif event["event"] == "ready":
            self._ready = True
        elif event["event"] == "closed":
            self.closed = event
        elif "ticket" in event:
            self._told[event["ticket"]] = event
        else:
            self.faults.append(event["text"])

    def wait(self, holds: Callable[[], bool], within_s: float, what: str) -> None:
        """Wait until something holds of what it has said. Raises TimedOut."""
        with self._changed:
            if self._changed.wait_for(lambda: self._silent or holds(), within_s) and holds():
                return
        why = f"its process has ended:\n{self.stderr}" if self._silent else f"not within {within_s:g} s"
        raise TimedOut(f"{what}: {why}")

    @property
    def stderr(self) -> str:
        return self._log.read_text("utf-8")

    # --- What it is told ---

    def _tell(self, do: str, **fields: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self.popen.stdin.flush()

    def ask(self, question: Question, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Story:
        return self._request("ask", question, timeout_s=timeout_s)

    def ask_at(self, server: Server, question: Question, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Story:
        """Ask this worker, and no other when it fails."""
        return self._request("ask_at", question, timeout_s=timeout_s, address=server.address)

    def _request(self, do: str, question: Question, **fields: Any) -> Story:
        story = Story(secrets.token_hex(8), question)
        with self._changed:
            self.stories[story.request_id] = story
        self._tell(do, id=story.request_id, text=question.text, max_tokens=question.max_tokens, **fields)
        return story

    def take_finished(self) -> list[Story]:
        """The stories that are over; they are kept here no longer."""
        with self._changed:
            finished = [story for story in self.stories.values() if story.over]
            for story in finished:
                del self.stories[story.request_id]
        return finished

    def drop(self, story: Story) -> None:
        """Want no more of it, as a reader who closes the window."""
        self._tell("drop", id=story.request_id)

    def drop_all(self) -> None:
        for story in self.stories.values():
            if not story.over:
                self.drop(story)

    def follow(self, *stories: Story, within_s: float = ANSWER_TIMEOUT_S) -> None:
        """Wait for the end of requests, whatever it is."""
        for story in stories:
            self.wait(functools.partial(is_over, story), within_s, f"the end of request {story.request_id}")

    def status(self, server: Server) -> Json | None:
        """What a worker says of its queue and its health; None if it says nothing."""
        told = self._answer_to("status", address=server.address)
        return None if "error" in told else told

    def known(self) -> set[str]:
        """The ids of the workers that the client in it finds."""
        return set(self._answer_to("look")["workers"])

    def _answer_to(self, do: str, **fields: Any) -> Json:
        ticket = secrets.token_hex(8)
        self._tell(do, ticket=ticket, **fields)
        self.wait(lambda: ticket in self._told, CLIENT_TIMEOUT_S, f"what a client knows of {do}")
        return self._told.pop(ticket)

    def load(self, server: Server) -> tuple[int, int] | None:
        """How many requests a worker runs, and how many wait there; None if it does not say."""
        told = self.status(server)
        return None if told is None else (told["queue"]["active"], told["queue"]["waiting"])

    def is_idle(self, server: Server) -> bool:
        return self.load(server) == (0, 0)

    # --- How it ends ---

    def kill(self) -> None:
        self.killed = True
        self.popen.kill()
        self.popen.wait()

    def leave(self) -> None:
        """Close the client in it as a program does, and end."""
        if self.popen.poll() is None:
            with contextlib.suppress(OSError):
                self._tell("leave")
        try:
            self.popen.wait(CLIENT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TimedOut("a client that is told to leave: it does not end") from None
        self.wait(lambda: self._silent, CLIENT_TIMEOUT_S, "all that a client said")

    def end(self) -> None:
        """Whatever happens."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def complaints(self) -> list[str]:
        """What is wrong with a client that has left."""
        found = [f"a fault in a client: {fault}" for fault in self.faults]
        found += [
            f"a client's stderr: {line}" for line in self.stderr.splitlines() if any(map(line.__contains__, LEAKS))
        ]
        if self.killed:
            return found
        if self.popen.returncode != 0 or self.closed is None:
            return [*found, f"a client ended with {self.popen.returncode}:\n{self.stderr}"]
        if self.closed["tasks"]:
            found.append(f"a client left tasks behind: {self.closed['tasks']}")
        if self.closed["descriptors"] > 0:
            found.append(f"a client left {self.closed['descriptors']} descriptors open")
        return found
