"""The engine's speed on a quiet machine and beside a busy neighbour, by how long its threads spin before they sleep.

    python tests/bench/contention.py [--rounds N] [--out DIR]

Each figure comes from a process of its own, since the number is read once; the four cases take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import report  # noqa: E402

import qmesh  # noqa: E402

TOKENS = 6  # few, for beside a neighbour a spinning engine needs seconds for each
ONE = "--one"  # what the process of one figure is started with
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
        command = ["nice", "-n", str(qmesh.DEFAULT_NICE), sys.executable, __file__, ONE]
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def threads() -> int:
    return psutil.cpu_count(logical=False) or 1


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    print(f"{report.needed_model().stem}, {threads()} threads, nice {qmesh.DEFAULT_NICE}", flush=True)
    found: dict[tuple[bool, str], list[float]] = {(busy, name): [] for busy in (False, True) for name in ROUNDS}
    for _ in range(arguments.rounds):
        for (busy, name), speeds in found.items():
            speeds.append(run(ROUNDS[name], busy=busy))
    theirs, ours = ROUNDS
    for busy, place in {False: "on a quiet machine", True: "beside one busy process"}.items():
        sides = found[busy, ours], found[busy, theirs]
        yield report.ratio(f"spinning {ours}, {place}", sides, "tokens/s", peer=theirs)


def make_parser() -> argparse.ArgumentParser:
    return report.parser(__doc__, rounds=5)


if __name__ == "__main__":
    if sys.argv[1:] == [ONE]:
        print(measure(report.MODEL, threads()))
    else:
        report.main("contention", make_parser(), figures)
