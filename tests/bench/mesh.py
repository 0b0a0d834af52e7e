"""What the mesh costs: tokens per second and time to first token against the bare engine, cold starts, memory.

    python tests/bench/mesh.py [--repeats N] [--workers N ...]

Both sides take turns in one run, on the same model, threads and prompt; medians are printed, with the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import queue
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402

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


def spread(values: Sequence[float], unit: str) -> str:
    return f"{statistics.median(values):8.1f} {unit} (from {min(values):.1f} to {max(values):.1f})"


async def compare(mesh: harness.Mesh, repeats: int, threads: int) -> None:
    worker = mesh.start_worker("--threads", str(threads), "--slots", "4", "--nice", "0")
    settings = qmesh.Settings(host="127.0.0.1", topic=mesh.topic, state_dir=str(mesh.state_dir))
    bare = Bare(mesh.model, threads)
    sides: dict[str, list[Run]] = {"bare engine": [], "through the mesh": []}
    async with qmesh.Client(settings) as client:
        bare.run()
        await run_through(client)
        for _ in range(repeats):
            sides["bare engine"].append(await asyncio.to_thread(bare.run))
            sides["through the mesh"].append(await run_through(client))
    bare.close()
    worker.end()
    for name, runs in sides.items():
        print(f"{name:>18}: {spread([run.tokens_per_s for run in runs], 'tokens/s')}")
        print(f"{'':>18}  {spread([run.first_token_ms for run in runs], 'ms to the first token, warm')}")
    speed = [[run.tokens_per_s for run in runs] for runs in sides.values()]
    wait = [[run.first_token_ms for run in runs] for runs in sides.values()]
    print(f"{'ratio of speeds':>18}: {statistics.median(speed[1]) / statistics.median(speed[0]):8.3f} (goal 0.97)")
    print(f"{'added wait':>18}: {statistics.median(wait[1]) - statistics.median(wait[0]):8.1f} ms (goal 5)")


def cold_start(mesh: harness.Mesh) -> tuple[float, float]:
    """Milliseconds from the start of a `prompt` process to its first character, and its memory in MB then."""
    started = time.perf_counter()
    with mesh.popen("prompt", "Say hello.", "--max-tokens", "48", "--temperature", "0") as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(1), "no answer"
        first_ms = 1000 * (time.perf_counter() - started)
        memory_mb = psutil.Process(asking.pid).memory_info().rss / 1e6
        asking.communicate()
    return first_ms, memory_mb


def start_up_ms(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - started)


def cold_starts(mesh: harness.Mesh, workers: int, repeats: int) -> None:
    started = mesh.start_workers(workers, "--slots", "2")
    cold_start(mesh)
    runs = [cold_start(mesh) for _ in range(repeats)]
    print(f"{workers:>3} workers, start of `prompt` to its first token: {spread([run[0] for run in runs], 'ms')}")
    print(f"{'':>12}memory of the client: {spread([run[1] for run in runs], 'MB')} (goal 45)")
    for worker in started:
        worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 10])
    arguments = parser.parse_args()
    model = ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
    threads = psutil.cpu_count(logical=False) or 1
    print(f"{model.stem}, {TOKENS} tokens, {threads} threads, median of {arguments.repeats}")
    with tempfile.TemporaryDirectory() as directory, harness.Mesh(Path(directory), model) as mesh:
        asyncio.run(compare(mesh, arguments.repeats, threads))
        for workers in arguments.workers:
            cold_starts(mesh, workers, arguments.repeats)
    for name, command in {"python -c pass": ("-c", "pass"), "--help": ("qmesh.py", "--help")}.items():
        print(f"{name:>18}: {spread([start_up_ms(*command) for _ in range(arguments.repeats)], 'ms')}")


if __name__ == "__main__":
    main()
