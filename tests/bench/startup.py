"""How long a command takes to start: the program and its archive beside Python itself, and `prompt` to its request.

    python tests/bench/startup.py [--rounds N] [--workers N] [--archives DIR] [--out DIR]

`--help` and `--version` of `python qmesh.py`, and of the archive with the program alone, take turns with
`python -c pass`; both have been run before, so that what Python and an archive keep is there. A `prompt` process is
watched from its start until a worker has its request, with so many workers on 127.0.0.1 and nothing remembered of them,
and then once more with the peers of the first time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import archive  # noqa: E402
import goals  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
from discovery import workers_on  # noqa: E402
from scripted_worker import says  # noqa: E402

import qmesh  # noqa: E402

PASS = "python -c pass"
NOTHING, PEERS = "nothing remembered", "peers remembered"
GOAL_WORKERS = 50


def took_ms(*command: str) -> float:
    """From a Python's start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=report.ROOT)
    return 1000 * (time.perf_counter() - started)


def command_figures(programs: dict[str, Path], rounds: int) -> Iterator[report.Item]:
    """Each command of each program in turn with Python itself."""
    for flag in ("--help", "--version"):
        commands = {PASS: ["-c", "pass"]} | {name: [str(path), flag] for name, path in programs.items()}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(-1, rounds):  # the first warms up
            for name, command in commands.items():
                ms = took_ms(*command)
                times[name] += [ms] if turn >= 0 else []
        for name in programs:
            goal = goals.program_key("startup.help", name) if flag == "--help" else ""
            yield report.ratio(f"{name} {flag}", (times[name], times[PASS]), "ms", peer=PASS, goal=goal)


async def until_asked(programs: dict[str, Path], count: int, rounds: int) -> list[report.Item]:
    """From the start of a `prompt` process until a worker has its request, in milliseconds."""
    arrived: asyncio.Queue[float] = asyncio.Queue()
    answer = says("yes")

    async def script(connection: qmesh.Connection, request_id: str) -> bool:
        arrived.put_nowait(time.perf_counter())
        return await answer(connection, request_id)

    async def start() -> tuple[float, float]:
        started = time.perf_counter()
        with mesh.popen("prompt", "Say hello.", "--json") as asking:
            text, _ = await asyncio.to_thread(asking.communicate)
        return 1000 * (arrived.get_nowait() - started), float(json.loads(text)["timings"]["discover_ms"])

    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), Path()) as mesh:
        mesh.as_typed = True
        async with workers_on(mesh.topic, count, script):
            for turn, (name, program) in itertools.product(range(-1, rounds), programs.items()):
                mesh.program, mesh.state_dir = program, Path(directory) / f"state-{name}-{turn}"
                for memory in (NOTHING, PEERS):  # the first process of a state directory leaves it peers
                    one = await start()
                    runs.setdefault((name, memory), []).extend([one] if turn >= 0 else [])
    return [figure for (name, memory), times in runs.items() for figure in request_figures(name, count, memory, times)]


def request_figures(name: str, count: int, memory: str, times: Sequence[tuple[float, float]]) -> Iterator[report.Item]:
    goal = goals.program_key("startup.request", name) if (memory, count) == (NOTHING, GOAL_WORKERS) else ""
    where = f"`{name} prompt`, {qmesh.plural(count, 'worker')}, {memory}"
    yield report.Figure.of(f"{where}: start to request", [whole for whole, _ in times], "ms", goal)
    yield report.Figure.of(f"{where}: its discovery", [part for _, part in times], "ms")


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    programs, missing = archive.programs(arguments.archives)
    yield from missing
    yield from command_figures(programs, arguments.rounds)
    yield from asyncio.run(until_asked(programs, arguments.workers, arguments.rounds))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=9)
    parser.add_argument("--workers", type=int, default=GOAL_WORKERS)
    archive.add_archives_option(parser)
    return parser


if __name__ == "__main__":
    report.main("startup", make_parser(), figures)
