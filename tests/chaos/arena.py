"""Where a fault is let loose: workers, clients, and what must be true of them afterwards.

An `Arena` is made for one fault: workers start, requests are asked, the fault strikes, and when the `with` block ends
the invariants are checked. What is found broken is written down, not raised, so that a run of many faults goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

import harness
import lan
import psutil
import wire_proxy
from actors import (
    ANSWER_TIMEOUT_S,
    FOOTPRINT_TIMEOUT_S,
    FOUND_TIMEOUT_S,
    GRACE_S,
    LEAKS,
    QUIET_TIMEOUT_S,
    STAGE_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Asker,
    Footprint,
    Server,
    TimedOut,
    wait_until,
)
from questions import WARM_UP
from story import Question, Story, complaints

Known = Mapping[Question, Story]
"""The story of each question in an undisturbed run."""

NOTHING: Mapping[str, str] = {}


class Arena:
    """Workers under test and the clients that ask them. Use as a context manager; its end checks the invariants.

    broken: what was found to be untrue. home: where clients stand.
    """

    def __init__(self, directory: Path, known: Known, rng: Random) -> None:
        self.directory = directory
        self.known = known
        self.rng = rng
        self.home: harness.Place
        self.servers: list[Server] = []
        self.askers: list[Asker] = []
        self.broken: list[str] = []
        self.notes: list[str] = []
        self.measured: list[tuple[str, float]] = []
        self.struck_at: float | None = None
        self.before: dict[Server, Footprint] = {}
        self._made = contextlib.ExitStack()

    def _make(self) -> None:
        """Make the places; what has to be undone goes onto `_made`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        try:
            self._make()
            self.watcher = self._start_asker(self.home, NOTHING, ())
        except BaseException:
            self._made.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        try:
            if error is None:
                self._settle()
            elif isinstance(error, (AssertionError, subprocess.TimeoutExpired)):
                self.broken.append(f"{type(error).__name__}: {error}")
            self.broken += self._logged()
        except (AssertionError, OSError, ValueError, psutil.Error, subprocess.TimeoutExpired) as late:
            self.broken.append(f"{type(late).__name__}: {late}")
        finally:
            for server in self.servers:
                with contextlib.suppress(ProcessLookupError):
                    server.resume()  # a suspended process cannot be closed
            self._made.close()
        return isinstance(error, (AssertionError, subprocess.TimeoutExpired))

    # --- Clients ---

    def _start_asker(self, place: harness.Place, env: Mapping[str, str], prefix: Sequence[str]) -> Asker:
        asker = Asker(place, self.directory / f"asker-{secrets.token_hex(4)}", env, prefix)
        self._made.callback(asker.end)
        return asker

    def new_asker(
        self, *, place: harness.Place | None = None, env: Mapping[str, str] = NOTHING, prefix: Sequence[str] = ()
    ) -> Asker:
        """A client of its own process; at home, unless it is to be elsewhere."""
        asker = self._start_asker(place or self.home, env, prefix)
        self.askers.append(asker)
        return asker

    @functools.cached_property
    def asker(self) -> Asker:
        """The client that most requests come from; opened when it is needed first, as a command is."""
        return self.new_asker()

    @property
    def stories(self) -> list[Story]:
        """Of every request that a client asked who was not killed."""
        return [story for asker in self.askers if not asker.killed for story in asker.stories.values()]

    # --- Workers ---

    def _adopt(self, process: harness.Process, host: str) -> Server:
        server = Server(process, host)
        self.servers.append(server)
        return server

    def get_ready(self) -> None:
        """Have each worker answer once, and note what it then holds of the system."""
        for server in self.servers:
            if server not in self.before:
                self.watcher.status(server)  # the watcher's connection stays
                descriptors = server.footprint().descriptors
                wait_until(functools.partial(self._answers, server), STAGE_TIMEOUT_S, "a worker that takes work")
                self.before[server] = Footprint(descriptors, server.footprint().threads)

    def server_of(self, story: Story) -> Server:
        """The worker that a request was given to, last."""
        return next(server for server in self.servers if server.worker_id == story.selected[-1])

    def others(self, *servers: Server) -> list[Server]:
        return [server for server in self.servers if server not in servers]

    def occupy(self, server: Server, question: Question) -> Story:
        """Keep one slot of a worker busy, with a request that is told to no client."""
        before = self.watcher.load(server)
        story = self.watcher.ask_at(server, question)
        wait_until(lambda: self.watcher.load(server) != before, STAGE_TIMEOUT_S, "a worker that is kept busy")
        return story

    # --- The fault and what follows ---

    def strike(self) -> None:
        """Note the moment of the fault."""
        self.struck_at = time.monotonic()

    def go_on(self, story: Story, seconds: float) -> None:
        """Let a fault last so long, or until a request is over."""
        with contextlib.suppress(TimedOut):
            self.asker.wait(lambda: story.over, seconds, "the end of a request")

    def wait_lost(self, story: Story) -> None:
        """Wait until the client has given a worker up, or has its answer."""
        before = len(story.selected)

        def holds() -> bool:
            return bool(story.lost) or len(story.selected) > before or story.over

        self.asker.wait(holds, ANSWER_TIMEOUT_S, "a client that goes on elsewhere")

    def expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.broken.append(complaint)

    def note(self, text: str) -> None:
        """For the table's reader; without the names of places that differ from run to run."""
        self.notes.append(text.replace(str(self.directory), "..."))

    def measure(self, what: str, seconds: float) -> None:
        self.measured.append((what, seconds))

    # --- The invariants ---

    def _settle(self) -> None:
        for asker in self.askers:
            if not asker.killed:
                asker.follow(*asker.stories.values())
        self.watcher.drop_all()
        for story in self.stories:
            self.broken += complaints(story, self.known[story.question])
        for server in self.servers:
            self._check_ending(server)
        survivors = [server for server in self.servers if server.ended is None and server.alive]
        for server in survivors:
            wait_until(functools.partial(self.watcher.is_idle, server), QUIET_TIMEOUT_S, "a survivor that is idle")
            self._check_answer(server, WARM_UP)
        self._check_found(survivors)
        for asker in self.askers:
            asker.leave()
            self.broken += asker.complaints()
        for server in survivors:
            self._check_footprint(server)
        self.watcher.leave()
        self.broken += self.watcher.complaints()

    def _answers(self, server: Server) -> bool:
        """Whether a worker takes a request; with the first one llama.cpp starts its threads."""
        story = self.watcher.ask_at(server, WARM_UP)
        self.watcher.follow(story)
        return story.is_whole

    def _check_answer(self, server: Server, question: Question) -> None:
        """A survivor serves on, and as well as before."""
        story = self.watcher.ask_at(server, question)
        self.watcher.follow(story)
        self.broken += complaints(story, self.known[question])
        self.expect(story.is_whole, f"a worker does not answer: {story.ending}")

    def _check_found(self, survivors: Sequence[Server]) -> None:
        """Who comes new to the mesh finds all survivors."""
        wanted = {server.worker_id for server in survivors}
        found: set[str] = set()

        def look() -> bool:
            told = json.loads(self.home.run("status", "--json").stdout)
            found.update(worker["worker_id"] for worker in told.get("workers", ()))
            return wanted <= found

        with contextlib.suppress(TimedOut):
            wait_until(look, FOUND_TIMEOUT_S, "survivors that are found")
            return
        self.broken.append(f"of the survivors {wanted} a new client finds {found}")

    def _check_ending(self, server: Server) -> None:
        popen = server.process.popen
        if server.ended is None:
            self.expect(server.alive, f"a worker ended by itself, with {popen.poll()}:\n{server.process.stderr}")
        elif server.ended == "told to stop":
            try:
                code = popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.broken.append(f"a worker that was told to stop has not within {STOP_TIMEOUT_S:g} s")
            else:
                self.expect(code == 0, f"a worker that was told to stop ended with {code}")

    def _check_footprint(self, server: Server) -> None:
        before = self.before[server]
        with contextlib.suppress(TimedOut):
            wait_until(lambda: not server.footprint().exceeds(before), FOOTPRINT_TIMEOUT_S, "a survivor's footprint")
            return
        held = [str(connection) for connection in psutil.Process(server.pid).net_connections()]
        self.broken.append(f"a survivor holds {server.footprint()} and held {before} before; connections: {held}")

    def _logged(self) -> Iterator[str]:
        """No fault may show as a traceback in what a worker says."""
        for server in (server for server in self.servers if not server.strained):
            for line in server.process.stderr.splitlines():
                if any(map(line.__contains__, LEAKS)):
                    yield f"a worker's stderr: {server.process.stderr}"
                    break


class LoopbackArena(Arena):
    """All on 127.0.0.1, where nothing leaves the machine."""

    def __init__(self, directory: Path, model: Path, known: Known, rng: Random) -> None:
        super().__init__(directory, known, rng)
        self._model = model

    def _make(self) -> None:
        self.mesh = self._made.enter_context(harness.Mesh(self.directory, self._model))
        self.home = self.mesh

    def start(
        self, count: int, *flags: str, prefix: Sequence[str] = (), env: Mapping[str, str] = NOTHING
    ) -> list[Server]:
        """Several workers at once: their models load side by side. prefix: of the command that starts each."""
        started = [self.begin(*flags, prefix=prefix, env=env) for _ in range(count)]
        for process in started:
            process.wait_ready()
        servers = [self._adopt(process, harness.LOOPBACK) for process in started]
        self.get_ready()
        return servers

    def begin(self, *flags: str, prefix: Sequence[str] = (), env: Mapping[str, str] = NOTHING) -> harness.Process:
        """Start a worker, and do not wait for what comes of it."""
        self.mesh.prefix = tuple(prefix)
        try:
            return self.mesh.start_worker("--grace", f"{GRACE_S:g}", *flags, ready=False, env=dict(env))
        finally:
            self.mesh.prefix = ()


PROXY = Path(wire_proxy.__file__)
DETOUR = """
table ip detour {{
    chain sent {{
        type nat hook output priority -100
        meta mark {mark} accept
        ip daddr {subnet} meta l4proto tcp redirect to :{port}
    }}
}}
"""


class LanArena(Arena):
    """Each worker on a machine of its own, and a desk for the clients, on one LAN.

    proxied: all TCP of the desk takes its way through `wire_proxy`, see `harm`.
    """

    def __init__(self, directory: Path, model: Path, known: Known, rng: Random, *, proxied: bool) -> None:
        super().__init__(directory, known, rng)
        self._model = model
        self._proxied = proxied
        self.machines: dict[Server, lan.Machine] = {}

    def _make(self) -> None:
        self.lan = self._made.enter_context(lan.Lan(self.directory / "network", self._model))
        self.desk = self.lan.machine("desk", ipv6=False)
        self.home = self.desk
        if self._proxied:
            self._start_proxy()

    def _start_proxy(self) -> None:
        space = self.desk.namespace
        space.nft(DETOUR.format(mark=wire_proxy.MARK, subnet=self.lan.subnet, port=wire_proxy.PORT))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [*space.prefix, sys.executable, str(PROXY)]
        with (self.directory / "proxy.txt").open("wb") as stderr:
            self._proxy = self._made.enter_context(subprocess.Popen(command, **pipes, stderr=stderr, text=True))
        self._made.callback(self._proxy.kill)
        self._hear_proxy()

    def _hear_proxy(self) -> None:
        assert self._proxy.stdout is not None
        assert self._proxy.stdout.readline(), "the proxy has ended"

    def harm(self, server: Server, **how: float) -> None:
        """Harm what passes to and from a worker from now on, as `wire_proxy` can; without `how`, no more."""
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(json.dumps({"host": server.host, **how}) + "\n")
        self._proxy.stdin.flush()
        self._hear_proxy()

    def drop(self, source: lan.Machine, target: lan.Machine, match: str = "") -> None:
        """Let nothing pass from one machine to another, or nothing that matches; the other way stays open."""
        way = f'iifname "{source.port_in(self.lan)}" oifname "{target.port_in(self.lan)}"'
        self.lan.drop([f"{way} {match}"])

    def start(self, count: int, *flags: str) -> list[Server]:
        machines = [self.lan.machine(f"m{len(self.machines) + number}", ipv6=False) for number in range(count)]
        started = lan.start_workers(*machines, flags=("--grace", f"{GRACE_S:g}", *flags))
        for machine, process in zip(machines, started, strict=True):
            host = machine.address_in(self.lan)
            assert host is not None
            self.machines[self._adopt(process, host)] = machine
        self.get_ready()
        return self.servers[-count:]

    def _settle(self) -> None:
        self.lan.heal()
        super()._settle()
        self.expect(not self.lan.strays, f"packets left the LAN: {self.lan.strays}")
