"""The README's chapter on a whole lab, typed as it stands there at bare computers of one LAN, which show what it shows.

Three things are not as they are there. `scp` copies straight into the other computer's home. `sudo` asks for no
password. And `systemctl` does what systemd does with a unit's User, Environment, StateDirectory, CacheDirectory and
ExecStart, and what the unit closes stays open; it returns when the worker serves.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness
import pytest
from archives import Archives
from lan import POLL_S, Lan
from machines import Computer, no_computers, require
from transcript import LAB, Typed, chapter_of, looks_like, masked, sessions_in, written

PATIENCE_S = 60.0
QUIET_S = 0.5  # after which a command that runs on has said what it says at its start
CARRIED = "qmesh.pyz"  # as the chapter calls the archive that carries everything
UNITS = Path("/etc/systemd/system")
PLACES = {"StateDirectory": ("%S", Path("/var/lib")), "CacheDirectory": ("%C", Path("/var/cache"))}


def typed_in_the_lab() -> list[Typed]:
    return [typed for session in sessions_in(chapter_of(written(), LAB)) for typed in session]


@dataclass
class Lab:
    """Computers, at whose terminals somebody types."""

    machines: dict[str, Computer]
    services: dict[tuple[str, str], harness.Process] = field(default_factory=dict)
    running: list[tuple[subprocess.Popen[bytes], int]] = field(default_factory=list)

    def end(self) -> None:
        for process, terminal in self.running:
            process.kill()
            process.wait()
            os.close(terminal)

    def types(self, typed: Typed) -> str:
        """What the terminal shows until the command is over, or of one that runs on (`&`), until it says no more."""
        machine = self.machines[typed.machine]
        words = shlex.split(typed.command)
        if words[0] == "scp":
            self._copy(machine, words[1], words[2])
            return ""
        if words[:2] == ["sudo", "systemctl"]:
            return self._control(machine, words[2], words[-1])
        home = machine.home
        machine.user = "root" if words[0] == "sudo" else "user"
        try:
            return self._at_a_terminal(machine, home, typed)
        finally:
            machine.user = "user"

    def _copy(self, machine: Computer, name: str, target: str) -> None:
        other, _, new_name = target.partition(":")
        shutil.copyfile(machine.here(name), (place := self.machines[other].here(new_name or name)))
        shutil.copymode(machine.here(name), place)
        os.chown(place, self.machines[other].uid, self.machines[other].uid)

    def _at_a_terminal(self, machine: Computer, home: Path, typed: Typed) -> str:
        command = typed.command.removeprefix("sudo ")
        runs_on = command.endswith(" &")
        script = f"cd {home} && exec {command.removesuffix(' &')}" if runs_on else f"cd {home} && {command}"
        ours, theirs = pty.openpty()
        env = machine.env | {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120"}
        process = subprocess.Popen(
            [*machine.login, "/bin/sh", "-c", script],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
        )
        self.running.append((process, ours))
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.suppress(OSError):  # the end of a terminal
            while not (runs_on and looks_like(shown.decode(errors="replace"), typed.shown)):
                assert time.monotonic() < deadline, shown.decode()
                if select.select([ours], [], [], POLL_S)[0]:
                    shown += os.read(ours, 65536)
            while select.select([ours], [], [], QUIET_S)[0]:
                shown += os.read(ours, 65536)
        if not runs_on:
            assert process.wait(PATIENCE_S) == 0, shown.decode()
        return shown.decode()

    # --- systemd ---

    def _control(self, machine: Computer, verb: str, name: str) -> str:
        if verb in ("restart", "stop"):
            service = self.services.pop((machine.name, name))
            assert service.stop() == 0, service.stderr
        if verb in ("enable", "restart"):
            self.services[machine.name, name] = _start_unit(machine, name)
        return ""


def _start_unit(machine: Computer, name: str) -> harness.Process:
    text = machine.here(UNITS / f"{name}.service").read_text("utf-8")
    told = [(key, value) for key, _, value in (line.partition("=") for line in text.splitlines()) if value]
    unit = dict(told)
    machine.user = unit["User"]
    env, places = machine.env, dict(PLACES.values())
    for kind, (_, place) in PLACES.items():
        if kind in unit:
            folder = machine.here(place / unit[kind])
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chown(folder, machine.uid, machine.uid)
    for assignment in (shlex.split(value)[0] for key, value in told if key == "Environment"):
        variable, _, value = assignment.partition("=")
        env[variable] = re.sub("%[SC]", lambda found: str(places[found[0]]), value)
    command = [*machine.login, *(word.replace("$$", "$") for word in shlex.split(unit["ExecStart"]))]
    process = harness.Process(command, env, machine.directory / f"{name}-{len(machine.processes)}.log")
    machine.processes.append(process)
    deadline = time.monotonic() + PATIENCE_S
    while "🚀" not in process.stderr:
        assert process.popen.poll() is None, process.stderr
        assert time.monotonic() < deadline, process.stderr
        time.sleep(POLL_S)
    return process


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Iterator[Lab]:
    require(no_computers())
    names = dict.fromkeys(typed.machine for typed in typed_in_the_lab())
    with Lan(tmp_path_factory.mktemp("rollout"), Path("none")) as lan:
        machines = {name: lan.machine_of(Computer, name) for name in names}
        hosts = "".join(f"{machine.address_in(lan)} {name}\n" for name, machine in machines.items())
        for machine in machines.values():
            with machine.here("/etc/hosts").open("a") as file:
                file.write(hosts)
        machines["desk"].copy(archives.whole, CARRIED)
        lab = Lab(machines)
        try:
            yield lab
        finally:
            lab.end()
        assert lan.strays == Counter()


def test_what_the_readme_types_on_the_machines_of_a_lab_shows_what_it_shows(lab: Lab) -> None:
    for typed in typed_in_the_lab():
        shown = lab.types(typed)
        assert looks_like(shown, typed.shown), f"{typed.machine}$ {typed.command}\n{masked(shown)}"
