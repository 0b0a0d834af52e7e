"""What it costs that an engine runs on every processor: the gathered one against the one installed here.

    python tests/bench/portable.py [--archives DIR] [--rounds N] [--streams N ...] [--out DIR]

Both run in a worker, with the same model, threads and context, and take turns within each round. Tokens are counted
per second of processor time that the worker took, so that what else runs on the machine matters little; with several
threads the waiting of one for another is in it. Whether the installed one was built for this very processor is for you
to know: pip does that where it compiles. The other is that of the archive with an engine alone in DIR, which
`build_zipapp.py --engine` makes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import archive  # noqa: E402
import engine  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

import qmesh  # noqa: E402

Speeds = dict[tuple[str, int, str], list[float]]
TOKENS = 64  # of an answer
PROMPT_TOKENS = 300  # so many of the same word; some fifty before them are of no other prompt
CONTEXT = 1024  # tokens per slot
UNUSED = 100_000  # numbers that no answer's prompt has
WRITING, READING = "written", "of a prompt"


async def measure(side: peers.Peer, streams: int, number: int) -> tuple[float, float]:
    """Tokens per second of processor time: of answers as they are written, and of prompts that are read."""
    numbers = range(number, number + streams)
    began_s = processor_s(side)
    answers = await side.load([engine.short_prompt(at) for at in numbers], TOKENS)
    written_s = processor_s(side)
    await side.load([engine.short_prompt(at + UNUSED) + " and" * PROMPT_TOKENS for at in numbers], 1)
    read_s = processor_s(side)
    written = sum(len(answer.times) for answer in answers)
    return written / (written_s - began_s), streams * PROMPT_TOKENS / (read_s - written_s)


def processor_s(side: peers.Peer) -> float:
    """What a side's process took of the processor since it began."""
    times = psutil.Process(side.popen.pid).cpu_times()
    return float(times.user + times.system)


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


def speed_figures(speeds: Speeds, names: Sequence[str], counts: Sequence[int]) -> Iterator[report.Item]:
    installed, gathered = names
    for what in (WRITING, READING):
        for count in counts:
            group = f"{what}, {qmesh.plural(count, 'stream')}"
            sides = speeds[gathered, count, what], speeds[installed, count, what]
            yield report.ratio(f"tokens by processor, {group}", sides, "tokens/s", peer="installed", group=group)


async def compare(arguments: argparse.Namespace, carrying: Path) -> list[report.Item]:
    setup = peers.Setup(report.needed_model(), max(arguments.streams), CONTEXT, arguments.threads)
    contents = qmesh.read_contents(carrying)
    assert contents is not None
    with tempfile.TemporaryDirectory() as directory:
        gathered = qmesh.Cache(Path(directory) / "cache").unpack(carrying, contents.parts[qmesh.ENGINE])

        class GatheredWorker(peers.QmeshWorker):
            name = "gathered engine"

            def __init__(self, setup: peers.Setup) -> None:
                super().__init__(setup, Path(directory), gathered.path)

        async with peers.running(setup, GatheredWorker) as sides:
            print(f"{setup.model.stem}, {qmesh.plural(setup.threads, 'thread')}", flush=True)
            speeds = await in_turn(sides, arguments.streams, arguments.rounds)
            return list(speed_figures(speeds, [side.name for side in sides], arguments.streams))


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    yield from asyncio.run(compare(arguments, archive.one_with(arguments.archives, {qmesh.ENGINE})))


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    archive.add_archives_option(parser)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    report.main("portable", make_parser(), figures)
