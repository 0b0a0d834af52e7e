"""The engine against its peers: tokens per second, waits and gaps at 1, 4 and 8 streams, memory, long prompts.

    python tests/bench/engine.py [--rounds N] [--streams N ...] [--peers NAME ...] [--out FOLDER]

All sides run the same model, threads and context, and take turns within each round. The table shows medians over
the rounds; ratios are medians of the ratios within a round, since a shared machine changes its mind between two.
`--out` also writes engine.json, engine.md and engine.svg; tests/bench/requirements.txt has what draws that. The first
run sets the peers up under ~/.cache/qmesh-bench (or QMESH_BENCH_DIR): about fifteen minutes, most of it for building.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import peers  # noqa: E402

import qmesh  # noqa: E402

PEERS = (peers.BuiltLlamaServer, peers.PrebuiltLlamaServer, peers.PythonServer, peers.NodePeer)
TOKENS = 128
LONG_PROMPT_TOKENS = 1500
GOALS: dict[str, dict[int, float]] = {
    peers.BuiltLlamaServer.name: {1: 1.10, 4: 1.10, 8: 1.10},
    peers.PrebuiltLlamaServer.name: {1: 1.10, 4: 1.10, 8: 1.10},
    peers.PythonServer.name: {4: 2.0},
    peers.NodePeer.name: {1: 2.5, 4: 2.5, 8: 2.5},
}


def short_prompt(number: int) -> str:
    """About fifty tokens that no other prompt begins with, and that a small model goes on with for ever."""
    return " ".join(str(1000 * number + count) for count in range(100, 110))


def long_prompt(number: int) -> str:
    return short_prompt(number) + " and" * (LONG_PROMPT_TOKENS - 50)


class Figures:
    """What one side did in all rounds at one number of streams."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.waits: list[float] = []
        self.gaps: list[float] = []

    def add(self, streams: Sequence[peers.Stream]) -> None:
        began = min(stream.started for stream in streams)
        ended = max(stream.times[-1] for stream in streams)
        self.speeds.append(sum(len(stream.times) for stream in streams) / (ended - began))
        self.waits += [stream.first_token_ms for stream in streams]
        self.gaps += [stream.longest_gap_ms for stream in streams]

    def to_json(self) -> dict[str, float]:
        waits = sorted(self.waits)
        return {
            "tokens_per_s": round(statistics.median(self.speeds), 1),
            "tokens_per_s_min": round(min(self.speeds), 1),
            "tokens_per_s_max": round(max(self.speeds), 1),
            "first_token_ms_p50": round(statistics.median(waits), 1),
            "first_token_ms_p99": round(waits[min(len(waits) - 1, int(0.99 * len(waits)))], 1),
            "longest_gap_ms": round(max(self.gaps), 1),
        }


async def streams_in_turn(
    sides: Sequence[peers.Peer], counts: Sequence[int], rounds: int
) -> dict[tuple[str, int], Figures]:
    figures = {(side.name, count): Figures() for side in sides for count in counts}
    number = 0
    for turn in range(-1, rounds):  # the first round warms up
        for count in counts:
            for side in rotated(sides, turn):
                prompts = [short_prompt(number := number + 1) for _ in range(count)]
                streams = await side.load(prompts, TOKENS)
                lengths = [len(stream.times) for stream in streams]
                assert min(lengths) > TOKENS // 2, f"{side.name} stopped early: {lengths}"
                if turn >= 0:
                    figures[side.name, count].add(streams)
    return figures


def rotated(sides: Sequence[peers.Peer], by: int) -> list[peers.Peer]:
    """No side always follows the same one."""
    start = by % len(sides)
    return [*sides[start:], *sides[:start]]


async def long_prompts(side: peers.Peer, rounds: int) -> dict[str, float]:
    """A stream disturbed by a long prompt, and the first token of a long conversation's second turn."""
    gaps, cold, warm = [], [], []
    for number in range(10_000, 10_000 + rounds):
        calm = asyncio.create_task(side.load([short_prompt(number)], 2 * TOKENS))
        await asyncio.sleep(0.5)  # it streams by now; a figure, not a condition
        await side.load([long_prompt(number + 50_000)], 2)
        [stream] = await calm
        gaps.append(stream.longest_gap_ms)
        [first] = await side.load([long_prompt(number)], 2)
        cold.append(first.first_token_ms)
        [second] = await side.load([long_prompt(number) + " and then?"], 2)
        warm.append(second.first_token_ms)
    middle = statistics.median
    return {
        "gap_beside_long_prompt_ms": round(middle(gaps), 1),
        "first_token_cold_ms": round(middle(cold), 1),
        "first_token_second_turn_ms": round(middle(warm), 1),
        "second_turn_speedup": round(middle(c / w for c, w in zip(cold, warm, strict=True)), 1),
    }


def report(figures: dict[tuple[str, int], Figures], counts: Sequence[int], extra: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for name, _ in figures))
    ours = peers.QmeshWorker.name
    lines = ["| side | streams | tokens/s (spread) | QMesh is | goal | first token p50 / p99 | longest gap |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for count in counts:
        for name in names:
            it = figures[name, count].to_json()
            mine, theirs = figures[ours, count].speeds, figures[name, count].speeds
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            wanted = GOALS.get(name, {}).get(count)
            goal = f"{wanted:.2f} x" if wanted else ""
            spread = f"{it['tokens_per_s']:.1f} ({it['tokens_per_s_min']:.1f}-{it['tokens_per_s_max']:.1f})"
            waits = f"{it['first_token_ms_p50']:.0f} / {it['first_token_ms_p99']:.0f} ms"
            versus = "" if name == ours else f"{ratio:.2f} x"
            lines.append(
                f"| {name} | {count} | {spread} | {versus} | {goal} | {waits} | {it['longest_gap_ms']:.0f} ms |"
            )
    lines += ["", "| side | memory | gap beside a long prompt | first token cold / second turn |", "|---|---|---|---|"]
    for name, it in extra.items():
        gap = wait = "-"
        if "second_turn_speedup" in it:
            gap = f"{it['gap_beside_long_prompt_ms']:.0f} ms"
            wait = f"{it['first_token_cold_ms']:.0f} / {it['first_token_second_turn_ms']:.0f} ms"
            wait += f" ({it['second_turn_speedup']:.1f} x)"
        lines.append(f"| {name} | {it['memory_mb']:.0f} MB | {gap} | {wait} |")
    return "\n".join(lines)


def plot(figures: dict[tuple[str, int], Figures], counts: Sequence[int], path: Path) -> None:
    from matplotlib import pyplot  # only those who want the picture need it

    names = list(dict.fromkeys(name for name, _ in figures))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [statistics.median(figures[name, count].speeds) for count in counts]
        axes.bar([place + index * width for place in range(len(counts))], heights, width, label=name)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(counts))], [qmesh.plural(count, "stream") for count in counts]
    )
    axes.set_ylabel("tokens per second, all streams together")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))  # above the bars
    figure.savefig(path, bbox_inches="tight")


def machine() -> str:
    cores, threads = psutil.cpu_count(logical=False), psutil.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, {threads} hardware threads"


async def main(arguments: argparse.Namespace) -> None:
    model = ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
    slots = max(8, *arguments.streams)
    setup = peers.Setup(model, slots, arguments.context, psutil.cpu_count(logical=False) or 1)
    chosen = [peer for peer in PEERS if not arguments.peers or peer.name in arguments.peers]
    async with peers.running(setup, *chosen) as sides:
        sizes = f"{slots} slots of {setup.context} tokens, {setup.threads} threads"
        print(f"{model.stem}, {sizes}; {machine()}", flush=True)
        figures = await streams_in_turn(sides, arguments.streams, arguments.rounds)
        extra: dict[str, dict[str, float]] = {}
        for side in sides:
            extra[side.name] = {"memory_mb": round(side.memory_mb, 1)}
            if not isinstance(side, (peers.NodePeer, peers.PythonServer)):  # which run one load at a time
                extra[side.name] |= await long_prompts(side, arguments.rounds)
    text = report(figures, arguments.streams, extra)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = [{"side": n, "streams": c, **f.to_json()} for (n, c), f in figures.items()]
        (arguments.out / "engine.json").write_text(
            json.dumps({"machine": machine(), "rows": rows, "more": extra}, indent=1)
        )
        (arguments.out / "engine.md").write_text(text + "\n")
        plot(figures, arguments.streams, arguments.out / "engine.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--peers", nargs="*", choices=[peer.name for peer in PEERS], help="default: all")
    parser.add_argument("--out", type=Path)
    asyncio.run(main(parser.parse_args()))
