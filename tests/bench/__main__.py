"""All figures in one command, each against its goal and its peer, into figures.md, figures.json and plots.

    python -m tests.bench [PART ...] [--quick] [--out DIR] [--archives DIR]

Each part is a script of its own, run in a process of its own and told where to write: what has been measured stays,
whatever becomes of the parts behind it, and a part measured again takes the place of its earlier figures. The peers are
set up at the first run, under ~/.cache/qmesh-bench (or QMESH_BENCH_DIR). Everything stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import goals
import report

RESULTS = report.ROOT / "build" / "bench"  # those that the README shows lie in results/, by --out
PATIENCE = 3.0  # times as long as a part usually takes, and
SETUP_S = 1800  # to set up a peer, which may have to be built
END_S = 30  # for a part to stop what it started, when it is interrupted
INTERRUPTED = 130


def command(part: str, arguments: argparse.Namespace) -> list[str]:
    words = shlex.split(goals.command(part, quick=arguments.quick))
    if part in goals.WITH_ARCHIVES and arguments.archives is not None:
        words += ["--archives", str(arguments.archives)]
    return [sys.executable, *words[1:], "--out", str(arguments.out.resolve())]


def run(part: str, arguments: argparse.Namespace) -> str:
    """Run a part to its end. Returns what went wrong, or nothing; raises KeyboardInterrupt after Ctrl-C."""
    it = goals.PARTS[part]
    limit_s = SETUP_S + 60 * PATIENCE * (it.quick_minutes if arguments.quick else it.minutes)
    env = {**os.environ, "QMESH_HOST": "127.0.0.1"}
    process = subprocess.Popen(command(part, arguments), cwd=report.ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        return f"it was not done after {limit_s / 60:.0f} minutes"
    except KeyboardInterrupt:
        end(process)
        raise
    return f"exit code {code}" if code else ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Let a part write what it has, and leave nothing that it started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = ", ".join(f"{part} ({it.minutes:g} min)" for part, it in goals.PARTS.items())
    parser.add_argument("parts", nargs="*", metavar="PART", type=report.one_of(goals.PARTS), help=listed)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes: figures that say so")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="build/bench by default")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="where QMesh's archives are (dist)")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    parts = arguments.parts or [part for part, it in goals.PARTS.items() if it.usual]
    minutes = sum(it.quick_minutes if arguments.quick else it.minutes for it in map(goals.PARTS.__getitem__, parts))
    print(f"{len(parts)} parts, about {minutes:.0f} minutes; results in {arguments.out}", flush=True)
    for kind in (signal.SIGINT, signal.SIGTERM):  # also where it was started with the first one ignored
        signal.signal(kind, signal.default_int_handler)
    failed: dict[str, str] = {}
    try:
        for part in parts:
            print(f"\n=== {goals.PARTS[part].title}", flush=True)
            if trouble := run(part, arguments):
                failed[part] = trouble
                print(f"{part}: {trouble}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\nInterrupted; what was measured is written.", file=sys.stderr)
        return INTERRUPTED
    finally:
        print(f"\n{report.goals_table(report.read(arguments.out))}")
    for part, trouble in failed.items():
        print(f"{part} failed: {trouble}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
