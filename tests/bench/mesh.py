"""What the mesh costs: tokens per second and time to first token, warm, against the bare engine.

    python tests/bench/mesh.py [--rounds N] [--out DIR]

Both sides take turns in one run, on the same model, threads and prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import queue
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import harness  # noqa: E402
import report  # noqa: E402

import qmesh  # noqa: E402

PROMPT = "Explain in detail how a bicycle stays upright."
TOKENS = 128
ENGINE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Run:
    """One answer: milliseconds to its first token, and tokens per second after that."""

    first_token_ms: float
    tokens_per_s: float


def job() -> qmesh.Job:
    sampling = qmesh.Sampling(max_tokens=TOKENS, temperature=0)
    return qmesh.Job(secrets.token_hex(8), messages=(qmesh.Message("user", PROMPT),), params=sampling)


class Bare:
    """The engine alone, in this process."""

    def __init__(self, model: Path, threads: int) -> None:
        self._events: queue.SimpleQueue[tuple[float, qmesh.EngineEvent]] = queue.SimpleQueue()
        gpu = qmesh.GpuChoice(0, None, "benchmark")
        plan = qmesh.EnginePlan(qmesh.read_model(model), slots=4, context=1024, threads=threads, gpu=gpu)
        self._engine = qmesh.Engine(plan, worker_id="bare", publish=self._take)
        self._engine.start().result(ENGINE_TIMEOUT_S)
        self._ticket = 0

    def _take(self, events: Sequence[qmesh.EngineEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            self._events.put((now, event))

    def run(self) -> Run:
        self._ticket += 1
        started = time.perf_counter()
        first = 0.0
        self._engine.submit(self._ticket, "bench", job())
        while True:
            now, (_, said) = self._events.get(timeout=ENGINE_TIMEOUT_S)
            if isinstance(said, qmesh.QMeshError):
                raise said
            first = first or now
            if isinstance(said, qmesh.Result):
                return Run(1000 * (first - started), (said.usage["completion_tokens"] - 1) / (now - first))

    def close(self) -> None:
        self._engine.stop()
        self._engine.join(10)


async def run_through(mesh: qmesh.Client) -> Run:
    started = time.perf_counter()
    first = 0.0
    async with contextlib.aclosing(mesh.run(job())) as progress:
        async for event in progress:
            if isinstance(event, qmesh.Token):
                first = first or time.perf_counter()
            elif isinstance(event, qmesh.Answer):
                seconds = time.perf_counter() - first
                return Run(1000 * (first - started), (event.result.usage["completion_tokens"] - 1) / seconds)
    raise AssertionError("an answer is the last event")


async def compare(mesh: harness.Mesh, rounds: int, threads: int) -> list[report.Item]:
    mesh.start_worker("--threads", str(threads), "--slots", "4", "--nice", "0")
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=mesh.topic, state_dir=str(mesh.state_dir))
    alone: list[Run] = []
    through: list[Run] = []
    bare = Bare(mesh.model, threads)
    async with qmesh.Client(settings) as client:
        for turn in range(-1, rounds):  # the first warms up
            one, other = await asyncio.to_thread(bare.run), await run_through(client)
            if turn >= 0:
                alone.append(one)
                through.append(other)
    bare.close()
    speeds = [[run.tokens_per_s for run in runs] for runs in (through, alone)]
    waits = [[run.first_token_ms for run in runs] for runs in (through, alone)]
    peer = "bare engine"
    return [
        report.ratio("tokens/s", speeds, "tokens/s", peer=peer, group="1 stream", goal="mesh.speed"),
        report.added("first token, warm", waits, "ms", peer=peer, group="first token, warm", goal="mesh.wait"),
    ]


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    model, threads = report.needed_model(), psutil.cpu_count(logical=False) or 1
    print(f"{model.stem}, {TOKENS} tokens, {threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), model) as mesh:
        yield from asyncio.run(compare(mesh, arguments.rounds, threads))


def make_parser() -> argparse.ArgumentParser:
    return report.parser(__doc__, rounds=9)


if __name__ == "__main__":
    report.main("mesh", make_parser(), figures)
