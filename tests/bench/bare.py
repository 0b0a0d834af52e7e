"""From a copied file to the first token, on computers that have Python and nothing else.

    python tests/bench/bare.py [--archives DIR] [--rounds N] [--out DIR]

The archive carries an engine and a model, as `build_zipapp.py --engine --model FILE` makes it. Each round has two new
computers (tests/machines.py) on a LAN of their own, with a copy of it in a home that is empty otherwise. Two commands
are typed, with no flag that matters: `worker` on one, and `prompt` on the other as soon as the worker says that it
serves. Then the worker is stopped and started once more, now that engine and model are unpacked. The file was written a
moment before, so it is in the page cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import archive as archives  # noqa: E402
import report  # noqa: E402
from lan import Lan  # noqa: E402
from machines import Computer, no_computers  # noqa: E402

import qmesh  # noqa: E402

QUESTION = ("prompt", "Why is the sky blue?", "--temperature", "0", "--max-tokens", "16")


@dataclass(frozen=True)
class Trial:
    """Seconds, each from the typing of a command; `token_s` from that of the first one."""

    copy_s: float
    serves_s: float
    asked_s: float
    token_s: float
    serves_again_s: float


def trial(archive: Path) -> Trial:
    with tempfile.TemporaryDirectory() as directory, Lan(Path(directory), Path("none")) as lan:
        serving, asking = (lan.machine_of(Computer, name) for name in ("serving", "asking"))
        serving.worker_flags = ()
        started = time.monotonic()
        serving.program = serving.copy(archive)
        copied = time.monotonic()
        asking.program = asking.copy(archive)
        typed = time.monotonic()
        worker = serving.start_worker()
        serves = time.monotonic()
        prompt = asking.popen(*QUESTION)
        assert prompt.stdout is not None
        assert prompt.stdout.read(1)
        token = time.monotonic()
        prompt.communicate()
        assert worker.stop() == 0
        typed_again = time.monotonic()
        assert serving.start_worker().ready
        again = time.monotonic()
    return Trial(copied - started, serves - typed, token - serves, token - typed, again - typed_again)


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    reason = no_computers()
    if reason is not None:
        raise report.CannotMeasure(reason)
    archive = archives.one_with(arguments.archives, {qmesh.ENGINE, qmesh.MODEL})
    print(f"{archive.name}, {archive.stat().st_size:,} bytes", flush=True)
    trials = []
    for turn in range(arguments.rounds):
        trials.append(trial(archive))
        print(f"round {turn + 1}: {trials[-1]}", file=sys.stderr, flush=True)
    for name, label in (
        ("copy_s", "the file is copied on one disk"),
        ("serves_s", "`worker`, for the first time: unpack, load, serve"),
        ("asked_s", "`prompt` on another machine: to the first token"),
        ("token_s", "both"),
        ("serves_again_s", "`worker`, from the second time on"),
    ):
        yield report.Figure.of(label, [getattr(it, name) for it in trials], "s")


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=5)
    archives.add_archives_option(parser)
    return parser


if __name__ == "__main__":
    report.main("bare", make_parser(), figures)
