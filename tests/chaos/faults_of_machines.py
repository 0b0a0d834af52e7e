"""Machines whose disk is full or read-only, whose clock jumps, which lose their model, or have no memory left."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from actors import CLIENT_TIMEOUT_S, LEAKS, STAGE_TIMEOUT_S, Server, has_begun
from arena import LoopbackArena
from cells import Cell, NotTried, Scene
from questions import KEEP_BUSY, LONG_PROMPT, QUICK, STREAM
from stages import MID_STREAM
from story import Question, Story

import qmesh

SLOTS = ("--slots", "2")
SMALL_DISK = "64k"
DAY_S = 86_400
FAKETIME = "faketime/libfaketimeMT.so.1"  # Debian's package libfaketime
LIBRARIES = Path("/usr/lib")
HUGE = Question("one two " * (400 << 10), 1)  # 3 MB: it takes that much memory several times over to read it
PAGE = 4096
TOOL_TIMEOUT_S = 20
LOOK_S = 3.0  # at how busy the machine is without us
EARLY = 5  # tokens of an answer, behind which most of it is still to come


def ask_of(arena: LoopbackArena, victim: Server) -> Story:
    """A request that is given to this worker: the others are suspended until its answer has begun."""
    for other in arena.others(victim):
        other.suspend()
    story = arena.asker.ask(KEEP_BUSY)
    arena.asker.wait(lambda: len(story.ids) >= EARLY, STAGE_TIMEOUT_S, "an answer that has begun")
    for other in arena.others(victim):
        other.resume()
    assert arena.server_of(story) is victim, "another worker was asked"
    return story


def expect_whole(arena: LoopbackArena, *stories: Story, failovers: int | None = None) -> None:
    arena.asker.follow(*stories)
    for story in stories:
        arena.expect(story.is_whole, f"no whole answer, with a worker left that is well: {story.ending}")
        if failovers is not None and story.ending is not None:
            found = story.ending.failovers
            arena.expect(found == failovers, f"{found} failovers, where {failovers} were due: {story.lost}")


# --- The disk ---


@dataclass(frozen=True)
class Disk:
    """A small file system in a mount namespace of its own, where a process keeps its state; gone with the process.

    harm: a shell command that does it harm; $1 is its directory.
    """

    name: str
    harm: str

    def prefix(self, directory: Path, *, harmed: bool) -> tuple[str, ...]:
        """Of the command of a process that is to have such a disk."""
        directory.mkdir(parents=True, exist_ok=True)
        script = f'mount -t tmpfs -o size={SMALL_DISK} none "$1"; {self.harm if harmed else ":"}; shift; exec "$@"'
        return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(directory))

    def strike(self, pid: int, directory: Path) -> None:
        command = ["nsenter", "--mount", "--target", f"{pid}", "sh", "-c", self.harm, "sh", str(directory)]
        subprocess.run(command, check=True, capture_output=True, timeout=TOOL_TIMEOUT_S)


FULL = Disk("disk full", '{ cat /dev/zero > "$1/ballast"; true; } 2> /dev/null')
# A second view of the same files: the first one cannot be made read-only while a lock in it is held.
READ_ONLY = Disk("state directory read-only", 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"')


def _worker_starts_on(disk: Disk) -> Cell:
    """A worker starts all the same, or says why it does not."""

    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            process = arena.begin(prefix=disk.prefix(arena.mesh.state_dir, harmed=True))
            if "error" not in process.wait_ready():
                process.stop()
                arena.note("the worker starts")
            else:
                code = process.popen.wait(CLIENT_TIMEOUT_S)
                arena.expect(code > 0, f"a worker that cannot start ended with {code}")
                arena.note(f"a worker says {process.ready['error']['message']!r}")
            arena.expect(not any(leak in process.stderr for leak in LEAKS), process.stderr)
            arena.start(1, *SLOTS)
            expect_whole(arena, arena.asker.ask(STREAM))

    return Cell(disk.name, "a worker's start", play)


def _worker_runs_on(disk: Disk) -> Cell:
    """A worker goes on, and ends as it should."""

    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            arena.start(2, *SLOTS, prefix=disk.prefix(arena.mesh.state_dir, harmed=False))
            story = MID_STREAM.reach(arena)
            arena.strike()
            victim = arena.server_of(story)
            disk.strike(victim.pid, arena.mesh.state_dir)
            expect_whole(arena, story, failovers=0)
            victim.terminate()

    return Cell(disk.name, "mid-stream, at the worker", play)


def _client_lives_with(disk: Disk) -> Cell:
    """A client's disk is only for remembering peers: it answers without."""

    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            arena.start(1, *SLOTS)
            for harmed in (True, False):
                directory = arena.directory / f"client-{harmed}"
                prefix = disk.prefix(directory, harmed=harmed)
                client = arena.new_asker(prefix=prefix, env={"QMESH_STATE_DIR": str(directory)})
                story = client.ask(STREAM)
                if not harmed:
                    client.wait(partial(has_begun, story), STAGE_TIMEOUT_S, "an answer that has begun")
                    disk.strike(client.popen.pid, directory)
                client.follow(story)
                arena.expect(story.is_whole, f"no whole answer: {story.ending}")

    return Cell(disk.name, "start and mid-stream, at the client", play)


# --- The clock ---


def faketime() -> Path | None:
    """The library that tells a process another time, if it is here."""
    return next(iter(sorted(LIBRARIES.glob(f"*/{FAKETIME}"))), None)


@dataclass(frozen=True)
class Clock:
    """The time of day as some processes see it. What they measure durations by goes on as it is."""

    file: Path

    def set(self, offset_s: int) -> None:
        """At once, and never half written."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}\n")
        fresh.replace(self.file)

    @property
    def env(self) -> dict[str, str]:
        library = faketime()
        if library is None:
            raise NotTried("there is no libfaketime here")
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def offset_s(self) -> float:
        """How far it is from the real one."""
        script = "import time; print(time.time())"
        told = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | self.env, capture_output=True, check=True
        ).stdout
        return float(told) - time.time()


def _clock_jumps(days: int) -> Cell:
    """For workers and client alike: neither the answer, nor who comes later, is troubled."""

    def play(scene: Scene) -> None:
        with scene.loopback() as arena:
            clock = Clock(arena.directory / "time")
            clock.set(0)
            arena.start(2, *SLOTS, env=clock.env)
            client = arena.new_asker(env=clock.env)
            story = client.ask(KEEP_BUSY)
            client.wait(lambda: len(story.ids) >= EARLY, STAGE_TIMEOUT_S, "an answer that has begun")
            arena.strike()
            clock.set(days * DAY_S)
            arena.expect(abs(clock.offset_s() - days * DAY_S) < DAY_S / 2, "the clock does not jump")
            client.follow(story)
            later = arena.new_asker()
            second = later.ask(STREAM)
            later.follow(second)
            arena.expect(story.is_whole and second.is_whole, f"no whole answer: {story.ending}, {second.ending}")
            arena.expect(not story.lost, f"a worker that is well was left: {story.lost}")

    return Cell(f"clocks jump by {days:+d} day", "mid-stream", play)


# --- The model ---


def _own_model(arena: LoopbackArena, model: Path) -> Path:
    """A copy of the model, with the same name, for a worker to lose."""
    copy = arena.directory / "models" / model.name
    copy.parent.mkdir()
    shutil.copyfile(model, copy)
    arena.mesh.model = copy
    return copy


def _model_deleted(scene: Scene) -> None:
    with scene.loopback() as arena:
        copy = _own_model(arena, scene.model)
        arena.start(2, *SLOTS)
        story = MID_STREAM.reach(arena)
        arena.strike()
        copy.unlink()
        expect_whole(arena, story, arena.asker.ask(LONG_PROMPT), failovers=0)


def _model_cut(scene: Scene) -> None:
    """The file is cut while llama.cpp has it mapped: the kernel kills who reads on."""
    with scene.loopback() as arena:
        copy = _own_model(arena, scene.model)
        (victim,) = arena.start(1, *SLOTS)
        arena.mesh.model = scene.model
        arena.start(1, *SLOTS)
        story = ask_of(arena, victim)
        arena.strike()
        os.truncate(copy, PAGE)
        expect_whole(arena, story)
        _note_death(arena, victim)


def _note_death(arena: LoopbackArena, victim: Server) -> None:
    if not victim.alive:
        victim.ended = "crashed"
        arena.note(f"the worker died, with {victim.process.popen.returncode}")


# --- Memory and processor ---


def _out_of_memory(scene: Scene) -> None:
    """A worker gets no more memory, and is sent much; whatever becomes of it, what was asked is answered."""
    with scene.loopback() as arena:
        victim, _ = arena.start(2, *SLOTS)
        story = ask_of(arena, victim)
        arena.strike()
        victim.strained = True
        used = psutil.Process(victim.pid).memory_info().vms
        resource.prlimit(victim.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        pressure = [arena.watcher.ask_at(victim, question) for question in (HUGE, HUGE, LONG_PROMPT)]
        expect_whole(arena, story, *[arena.asker.ask(question) for question in QUICK])
        arena.watcher.follow(*pressure)
        arena.note(f"sent more than it can hold: {sorted({p.ending.text for p in pressure if p.ending})}")
        _note_death(arena, victim)
        if victim.alive:
            resource.prlimit(victim.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def busy_processor() -> Iterator[None]:
    """Other programs take all of it."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _owner_comes_back(scene: Scene) -> None:
    """A worker that yields hands over what it writes; one that does not goes on, if slowly."""
    if psutil.cpu_percent(interval=LOOK_S) > qmesh.YIELD_BELOW:
        raise NotTried("others use the processor already")
    with scene.loopback() as arena:
        (victim,) = arena.start(1, *SLOTS, "--yield")
        arena.start(1, *SLOTS)
        story = ask_of(arena, victim)
        arena.strike()
        with busy_processor():
            arena.wait_lost(story)
        expect_whole(arena, story, failovers=1)
        victim.terminate()


CELLS = [
    *(make(disk) for disk in (FULL, READ_ONLY) for make in (_worker_starts_on, _worker_runs_on, _client_lives_with)),
    *map(_clock_jumps, (1, -1)),
    Cell("model file deleted", "mid-stream", _model_deleted),
    Cell("model file cut short", "mid-stream", _model_cut),
    Cell("no more memory", "mid-stream", _out_of_memory),
    Cell("others use the processor (--yield)", "mid-stream", _owner_comes_back),
]
