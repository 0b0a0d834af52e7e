"""Lets every fault loose on real workers, and tells what became of the answers.

    python tests/chaos/matrix.py [--rounds N] [--seed S] [--only WORDS]

Prints a Markdown table, and what was found broken behind it; ends with 1 if anything was. The same seed strikes at the
same tokens and chooses the same victims; what the system's scheduler does is another matter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import faults_of_clients  # noqa: E402
import faults_of_frames  # noqa: E402
import faults_of_machines  # noqa: E402
import faults_of_networks  # noqa: E402
import faults_of_processes  # noqa: E402
import lan  # noqa: E402
import questions  # noqa: E402
from cells import Cell, Outcome, run  # noqa: E402

import qmesh  # noqa: E402

CELLS: Sequence[Cell] = (
    *faults_of_processes.CELLS,
    *faults_of_networks.CELLS,
    *faults_of_frames.CELLS,
    *faults_of_clients.CELLS,
    *faults_of_machines.CELLS,
)
CELL_TIMEOUT_S = 240  # in which one run of any cell ends, broken or not: all its waits together
HEADER = ("fault", "at", "runs", "whole answers", "clear errors", "tokens lost or repeated", "note")
MAX_NOTES = 2  # of a cell: the first few say what the others do


def spread(seconds: Sequence[float]) -> str:
    """The median, and the most."""
    return f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f} s)"


def note_of(outcome: Outcome) -> str:
    parts = []
    if outcome.broken:
        parts.append(f"**broken: {len(outcome.broken)}**")
    if outcome.not_tried:
        parts.append(f"not tried: {outcome.not_tried[0]}")
    if outcome.moved:
        parts.append(f"another worker went on with {outcome.moved}")
    if outcome.pauses_s:
        parts.append(f"longest pause {spread(outcome.pauses_s)}")
    parts += [f"{what} after {spread(seconds)}" for what, seconds in outcome.measured.items()]
    parts += list(dict.fromkeys(outcome.notes))[:MAX_NOTES]
    return "; ".join(parts)


def row_of(cell: Cell, outcome: Outcome) -> str:
    figures = (outcome.runs, outcome.whole, outcome.errors, outcome.wrong_tokens)
    return "| " + " | ".join((cell.fault, cell.at, *map(str, figures), note_of(outcome))) + " |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault is let loose (1)")
    parser.add_argument("--seed", default="0", help="of all chance (0)")
    parser.add_argument("--only", default="", metavar="WORDS", help="faults whose name holds this (all)")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / qmesh.DEFAULT_MODEL.file_name)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    cells = [cell for cell in CELLS if arguments.only in cell.name]
    if reason := lan.unavailable():
        print(f"network faults are left out: {reason}", file=sys.stderr)
        cells = [cell for cell in cells if not cell.needs_lan]
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qmesh-chaos-") as scratch:
        known = questions.learn(Path(scratch) / "undisturbed", arguments.model)
        print("| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|", sep="\n", flush=True)
        for number, cell in enumerate(cells):
            outcome = Outcome()
            for turn in range(arguments.rounds):
                directory = Path(scratch) / f"{number}-{turn}"
                run(cell, directory, arguments.model, known, seed=f"{arguments.seed}/{turn}", into=outcome)
            print(row_of(cell, outcome), flush=True)
            broken += [f"{cell.name}: {complaint}" for complaint in outcome.broken]
    for complaint in broken:
        print(f"\n{complaint}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
