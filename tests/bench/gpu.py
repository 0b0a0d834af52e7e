"""The engine on an NVIDIA GPU against llama.cpp's own server on the same one, at 1, 8 and 32 streams.

    python tests/bench/gpu.py [--model FILE] [--rounds N] [--out DIR]

Builds llama-cpp-python and llama.cpp's server for CUDA first (once, under ~/.cache/qmesh-bench or QMESH_BENCH_DIR);
that takes nvcc and CMake, and about half an hour on a small machine.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import engine
import peers
import psutil
import report

import qmesh

STREAMS = (1, 8, 32)


async def measure(model: Path, rounds: int) -> list[report.Item]:
    setup = peers.Setup(model, max(STREAMS), 2048, psutil.cpu_count(logical=False) or 1, gpu=True)
    async with peers.running(setup, peers.BuiltLlamaServer) as sides:
        print(f"{model.stem}, {setup.slots} x {setup.context} tokens", flush=True)
        for card in await qmesh.read_gpu_load():
            print(f"{card.name}, {card.memory_used / 2**30:.1f} of {card.memory_total / 2**30:.1f} GiB in use")
        found = await engine.streams_in_turn(sides, STREAMS, rounds)
    return [*engine.peer_figures(found, STREAMS), *engine.wait_figures(found)]


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    missing = [name for name in ("nvidia-smi", "nvcc", "cmake") if shutil.which(name) is None]
    if missing:
        raise report.CannotMeasure(f"{' and '.join(missing)} cannot be found on this machine")
    yield from asyncio.run(measure(report.needed_model(arguments.model), arguments.rounds))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, default=report.MODEL)
    return parser


if __name__ == "__main__":
    report.main("gpu", make_parser(), figures)
