"""Real processes of the program, on the loopback or elsewhere, each mesh with a topic of its own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "qmesh.py"
READY_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 90
LOOPBACK = "127.0.0.1"

# Small, so that many workers share a small machine.
WORKER_FLAGS = ("--port", "0", "--threads", "1", "--ctx", "1024")


def running(program: Path, *, as_typed: bool = False) -> list[str]:
    """What a command of a program begins with, run in ROOT.

    This checkout's is started by its name: of a module Python keeps the compiled form, and a file it compiles at each
    start, which is half of what a short command takes. as_typed: as people start it, for who measures that.
    """
    by_name = program == PROGRAM and not as_typed
    return [sys.executable, *(["-m", PROGRAM.stem] if by_name else [str(program)])]


class Process:
    """A worker's process, or a gateway's; `ready` is its first event."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=env, cwd=ROOT)
        self.ready: dict[str, Any] = {}

    @property
    def stdout(self) -> IO[bytes]:
        assert self.popen.stdout is not None
        return self.popen.stdout

    def wait_ready(self) -> dict[str, Any]:
        watchdog = threading.Timer(READY_TIMEOUT_S, self.popen.kill)
        watchdog.start()
        try:
            line = self.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"it did not start:\n{self.stderr}"
        self.ready = json.loads(line)
        return self.ready

    @property
    def worker_id(self) -> str:
        return str(self.ready["worker_id"])

    @property
    def stderr(self) -> str:
        return self._log.read_text("utf-8")

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.popen.terminate()
        return self.popen.wait(30)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)
        self.stdout.close()


class Place:
    """Where processes of the program run: members of one mesh, with a state directory of their own."""

    prefix: tuple[str, ...] = ()  # of every command
    as_typed = False  # see `running`
    worker_flags: tuple[str, ...] = WORKER_FLAGS

    def __init__(self, directory: Path, model: Path, topic: str, program: Path) -> None:
        self.directory = directory
        self.topic = topic
        self.state_dir = directory / "state"
        self.model = model
        self.program = program
        self.processes: list[Process] = []

    def end(self) -> None:
        for process in self.processes:
            process.end()

    @property
    def env(self) -> dict[str, str]:
        own = {"QMESH_TOPIC": self.topic, "QMESH_STATE_DIR": str(self.state_dir), "PYTHONUNBUFFERED": "1"}
        return {name: value for name, value in os.environ.items() if not name.startswith("QMESH_")} | own

    @property
    def client_env(self) -> dict[str, str]:
        return self.env

    def _command(self, *arguments: str) -> list[str]:
        return [*self.prefix, *running(self.program, as_typed=self.as_typed), *arguments]

    def start_worker(self, *flags: str, ready: bool = True, env: dict[str, str] | None = None) -> Process:
        command = self._command("worker", "--json", "--model", str(self.model), *self.worker_flags, *flags)
        process = self._start(command, f"worker-{len(self.processes)}.log", env or {})
        if ready:
            process.wait_ready()
        return process

    def start_gateway(self, *flags: str) -> Process:
        """Its `ready` tells the `url`."""
        command = self._command("gateway", "--json", "--http", f"{LOOPBACK}:0", *flags)
        process = self._start(command, f"gateway-{len(self.processes)}.log", {})
        process.wait_ready()
        return process

    def _start(self, command: list[str], log: str, env: dict[str, str]) -> Process:
        process = Process(command, self.env | env, self.directory / log)
        self.processes.append(process)
        return process

    def start_workers(self, count: int, *flags: str) -> list[Process]:
        """Several at once: their models load side by side."""
        started = [self.start_worker(*flags, ready=False) for _ in range(count)]
        for process in started:
            process.wait_ready()
        return started

    def run(
        self, *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command of the program, to its end."""
        return subprocess.run(
            self._command(*arguments),
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=self.client_env | (env or {}),
            cwd=ROOT,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """A command of the program, under way."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            self._command(*arguments), **pipes, text=True, encoding="utf-8", env=self.client_env, cwd=ROOT
        )

    def json(self, *arguments: str) -> Any:
        """What a command prints with --json; it must succeed."""
        finished = self.run(*arguments, "--json")
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)


class Mesh(Place):
    """Workers and clients with one topic, on 127.0.0.1, told no address of each other."""

    def __init__(self, directory: Path, model: Path, program: Path = PROGRAM) -> None:
        super().__init__(directory, model, f"test-{secrets.token_hex(8)}", program)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    @property
    def env(self) -> dict[str, str]:
        return super().env | {"QMESH_HOST": LOOPBACK}
