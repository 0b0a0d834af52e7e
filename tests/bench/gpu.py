"""The engine on an NVIDIA GPU against llama.cpp's own server on the same one, at 1, 8 and 32 streams.

    python tests/bench/gpu.py [--model FILE] [--rounds N]

Builds llama-cpp-python and llama.cpp's server for CUDA first (once, under ~/.cache/qmesh-bench or QMESH_BENCH_DIR);
that takes nvcc and CMake, and about half an hour on a small machine.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import engine
import peers

import qmesh

STREAMS = (1, 8, 32)


async def main(model: Path, rounds: int) -> None:
    setup = peers.Setup(model, max(STREAMS), 2048, psutil.cpu_count(logical=False) or 1, gpu=True)
    async with peers.running(setup, peers.BuiltLlamaServer) as sides:
        print(f"{model.stem}, {setup.slots} x {setup.context} tokens; {engine.machine()}", flush=True)
        for card in await qmesh.read_gpu_load():
            print(f"{card.name}, {card.memory_used / 2**30:.1f} of {card.memory_total / 2**30:.1f} GiB in use")
        figures = await engine.streams_in_turn(sides, STREAMS, rounds)
    print(engine.report(figures, STREAMS, {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=engine.ROOT / "models" / qmesh.DEFAULT_MODEL.file_name)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    missing = [name for name in ("nvidia-smi", "nvcc", "cmake") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not run: {' and '.join(missing)} cannot be found on this machine")
    asyncio.run(main(arguments.model, arguments.rounds))
