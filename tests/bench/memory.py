"""What a client, a worker and a DHT node take of the memory.

    python tests/bench/memory.py [--rounds N] [--nodes N] [--archives DIR] [--out DIR]

A client is a `prompt` process at the first character of its answer. A worker has answered once, and so has the bare
engine beside it: a process with the same engine, slots and context, of which is subtracted what importing the program
took, so that nothing of QMesh is in it. The program is started from its source, and from its archive in DIR. DHT nodes
are those of a simulated mesh that came together by itself, in which each announces a worker.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import archive  # noqa: E402
import goals  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
from virtual_network import VirtualNetwork, employ, grow  # noqa: E402

MB = 1e6
SEED = 1
GOAL_NODES = 1000  # of the mesh that the goal is about
ASK = ("prompt", "Say hello.", "--max-tokens", "32", "--temperature", "0")
SLOTS, CONTEXT = 4, 1024
# Answers once with the engine alone, and prints the bytes of its process without what importing the program took.
BARE_ENGINE = """
import pathlib, psutil, sys, time
root, model, slots, context, question = sys.argv[1:]
taken = lambda: psutil.Process().memory_info().rss
before = taken()
sys.path.insert(0, root)
import qmesh
program = taken() - before
gpu = qmesh.GpuChoice(0, None, "benchmark")
plan = qmesh.EnginePlan(qmesh.read_model(pathlib.Path(model)), int(slots), int(context), 1, gpu)
batcher = qmesh.Batcher(qmesh.LlamaModel(plan), plan, "bare", time.monotonic)
params = qmesh.Sampling(max_tokens=32, temperature=0)
batcher.submit(1, "bench", qmesh.Job("1", messages=(qmesh.Message("user", question),), params=params))
while not batcher.idle:
    batcher.step()
print(taken() - program)
"""


def taken_mb(pid: int | None = None) -> float:
    return float(psutil.Process(pid).memory_info().rss / MB)


# --- A client, and a worker beside the bare engine ---


def client_mb(mesh: harness.Mesh) -> float:
    """At the first character of an answer."""
    with mesh.popen(*ASK) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(1), "no answer"
        taken = taken_mb(asking.pid)
        asking.communicate()
    return taken


def worker_and_client_mb(directory: Path, model: Path, program: Path) -> tuple[float, float]:
    """A worker that has answered, and the client that had the answer."""
    with harness.Mesh(directory, model, program) as mesh:
        mesh.as_typed = True
        worker = mesh.start_worker("--slots", str(SLOTS), "--ctx", str(CONTEXT), "--nice", "0")
        client = client_mb(mesh)
        return taken_mb(worker.popen.pid), client


def bare_mb(model: Path) -> float:
    command = [sys.executable, "-c", BARE_ENGINE, str(report.ROOT), str(model), str(SLOTS), str(CONTEXT), ASK[1]]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run([sys.executable, "-c", "import qmesh"], check=True, cwd=report.ROOT, env=env)
        told = subprocess.run(
            command, check=True, capture_output=True, text=True, env=env, timeout=harness.COMMAND_TIMEOUT_S
        )
    return float(told.stdout) / MB


# --- A DHT node ---


def mesh_of(nodes: int) -> tuple[float, float]:
    """Megabytes of each node of a mesh, and how many others it knows."""
    network, rng = VirtualNetwork(SEED, beacons=False, record=False), random.Random(SEED)
    before = taken_mb()
    mesh = grow(network, nodes, rng)
    employ(network, mesh)
    gc.collect()
    return (taken_mb() - before) / nodes, statistics.mean(len(node.engine.table) for node in mesh)


def node_figures(nodes: int) -> Iterator[report.Item]:
    """In a process of its own: what others freed before would hide some of it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        taken, known = pool.submit(mesh_of, nodes).result()
    goal = "memory.node" if nodes == GOAL_NODES else ""
    yield report.Figure.of(f"DHT node among {nodes:,}, which knows {known:.0f} of them", [taken], "MB", goal)


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    yield from node_figures(arguments.nodes)
    model = report.needed_model()
    programs, missing = archive.programs(arguments.archives)
    yield from missing
    engines: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        engines.append(bare_mb(model))
        for name, program in programs.items():
            with tempfile.TemporaryDirectory() as directory:
                taken[name].append(worker_and_client_mb(Path(directory), model, program))
    for name, both in taken.items():
        workers, clients = zip(*both, strict=True)
        goal = goals.program_key("memory.client", name)
        yield report.Figure.of(f"client at its first token, {name}", clients, "MB", goal)
        goal = goals.program_key("memory.worker", name)
        yield report.added(f"worker, {name}", (workers, engines), "MB", peer="bare engine", goal=goal)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--nodes", type=int, default=GOAL_NODES, help="of the simulated mesh")
    archive.add_archives_option(parser)
    return parser


if __name__ == "__main__":
    report.main("memory", make_parser(), figures)
