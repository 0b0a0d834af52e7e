"""The engine's speed on a quiet machine and beside a busy neighbour, by how long its threads spin before they sleep.

    python tests/bench/contention.py [--repeats N]

Each figure comes from a process of its own, since the number is read once; the four cases take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import qmesh  # noqa: E402

TOKENS = 6  # few, for beside a neighbour a spinning engine needs seconds for each
NEIGHBOUR = "while True: pass"
ROUNDS = {"as GNU's OpenMP has it": 300_000, "as a worker sets it": qmesh.SPIN_ROUNDS}


def measure(model: Path, threads: int) -> float:
    """Tokens per second of one greedy answer, after one to warm up."""
    plan = qmesh.EnginePlan(qmesh.read_model(model), 1, 512, threads, qmesh.GpuChoice(0, None, "benchmark"))
    batcher = qmesh.Batcher(qmesh.LlamaModel(plan), plan, "bench", time.monotonic)
    seconds = 0.0
    for ticket, tokens in enumerate((1, TOKENS)):
        sampling = qmesh.Sampling(max_tokens=tokens, temperature=0)
        job = qmesh.Job(str(ticket), messages=(qmesh.Message("user", "Tell a story about a cat."),), params=sampling)
        batcher.submit(ticket, "bench", job)
        started = time.perf_counter()
        while not batcher.idle:
            batcher.step()
        seconds = time.perf_counter() - started
    return TOKENS / seconds


def run(rounds: int, *, busy: bool) -> float:
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if busy else None
    try:
        env = {**os.environ, "GOMP_SPINCOUNT": str(rounds)}
        command = ["nice", "-n", str(qmesh.DEFAULT_NICE), sys.executable, __file__, "--one"]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or 1
    if arguments.one:
        print(measure(ROOT / "models" / qmesh.DEFAULT_MODEL.file_name, threads))
        return
    cases = [(busy, name) for busy in (False, True) for name in ROUNDS]
    found: dict[tuple[bool, str], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for busy, name in cases:
            found[busy, name].append(run(ROUNDS[name], busy=busy))
    print(f"{qmesh.DEFAULT_MODEL.file_name}, {threads} threads, nice {qmesh.DEFAULT_NICE}, tokens/s")
    for (busy, name), speeds in found.items():
        place = "beside one busy process" if busy else "on a quiet machine"
        spread = f"(from {min(speeds):.1f} to {max(speeds):.1f})"
        print(f"{place:>24}, spinning {name:<22}: {statistics.median(speeds):6.1f} {spread}")


if __name__ == "__main__":
    main()
