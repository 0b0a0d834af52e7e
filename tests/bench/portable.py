"""What it costs that an engine runs on every processor: the gathered one against the one installed here.

    python tests/bench/portable.py [--engine FOLDER] [--rounds N] [--streams N ...]

Both run in a worker, with the same model, threads and context, and take turns within each round. Figures are medians
over the rounds, ratios medians of the ratios within a round. Whether the installed one was built for this very
processor is for you to know: pip does that where it compiles. `build_zipapp.py --engine` leaves the other in
build/engine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import engine  # noqa: E402
import peers  # noqa: E402

import qmesh  # noqa: E402

Speeds = dict[tuple[str, int, str], list[float]]
WRITING, READING = "written", "of a prompt"


async def measure(side: peers.Peer, streams: int, number: int) -> tuple[float, float]:
    """Tokens per second, of all streams together: of answers as they are written, and of prompts that are read."""
    prompts = range(number, number + streams)
    answers = engine.Figures()
    answers.add(await side.load([engine.short_prompt(at) for at in prompts], engine.TOKENS))
    read = await side.load([engine.long_prompt(at) for at in prompts], 2)
    wait_s = max(stream.times[0] for stream in read) - min(stream.started for stream in read)
    return answers.speeds[0], streams * engine.LONG_PROMPT_TOKENS / wait_s


async def in_turn(sides: Sequence[peers.Peer], counts: Sequence[int], rounds: int) -> Speeds:
    speeds: Speeds = {}
    number = 0
    for turn in range(-1, rounds):  # the first round warms up
        for count in counts:
            for side in engine.rotated(sides, turn):
                written, read = await measure(side, count, number)
                number += count
                if turn >= 0:
                    speeds.setdefault((side.name, count, WRITING), []).append(written)
                    speeds.setdefault((side.name, count, READING), []).append(read)
    return speeds


def report(speeds: Speeds, names: Sequence[str], counts: Sequence[int]) -> str:
    lines = [f"| tokens/s | streams | {' | '.join(names)} | ratio (spread) |", "|---|---|---|---|---|"]
    for what in (WRITING, READING):
        for count in counts:
            installed, gathered = (speeds[name, count, what] for name in names)
            ratios = [b / a for a, b in zip(installed, gathered, strict=True)]
            cells = [f"{statistics.median(it):.1f}" for it in (installed, gathered)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            lines.append(f"| {what} | {count} | {' | '.join(cells)} | {spread} |")
    return "\n".join(lines)


async def main(arguments: argparse.Namespace) -> None:
    model = ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
    setup = peers.Setup(model, max(arguments.streams), arguments.context, psutil.cpu_count(logical=False) or 1)
    with tempfile.TemporaryDirectory() as directory:

        class GatheredWorker(peers.QmeshWorker):
            name = "gathered engine"

            def __init__(self, setup: peers.Setup) -> None:
                super().__init__(setup, Path(directory), arguments.engine)

        async with peers.running(setup, GatheredWorker) as sides:
            print(f"{model.stem}, {setup.threads} threads; {engine.machine()}", flush=True)
            speeds = await in_turn(sides, arguments.streams, arguments.rounds)
            print(report(speeds, [side.name for side in sides], arguments.streams))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, default=ROOT / "build" / "engine", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    asyncio.run(main(parser.parse_args()))
