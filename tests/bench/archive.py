"""What it costs to carry the engine in one file: QMesh's own archives against those that shiv and pex make.

    python tests/bench/archive.py [PART ...] [--archives DIR] [--rounds N] [--storms N] [--model FILE] [--out DIR]

The parts are starts, storm and trouble; all, where none is named. QMesh's archives, made by `build_zipapp.py`, are
taken from DIR, of which one carries the engine alone: what it unpacks is what the others' archives are made of, and
what is installed for the plain `python qmesh.py`; so all carry the same. All else runs on a Python without packages.
shiv and pex are set up by peers.py.

Every start is with a home folder of its own, which holds all that a program unpacks: a new one is an empty cache. The
archives themselves are in the machine's page cache, for all alike. Sides take turns within each round. Processor time
is told beside each wait: it is what a start takes on any machine, however busy.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import goals  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

import qmesh  # noqa: E402

PLAIN, OURS, SHIV, PEX, PEX_VENV = f"python {goals.SOURCE}", goals.ARCHIVE, "shiv", "pex", "pex --venv"
LIMIT_S = 120
CROWD = 10  # processes that start at once
SEED = 2718
STORM_S = 4.0  # within which those are killed that are to be
LITTLE_BYTES = 1_000_000  # that a file may have where there is hardly room
SAID_CHARS = 110  # of what a program says of a trouble
MB = 1e6
# Prints the most memory that a command or a child of it took, in KiB; itself it takes less than any.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


# --- Sides ---


@dataclass(frozen=True)
class Side:
    """A way to run the program. engine, model: whether the file brings them."""

    name: str
    program: Path
    python: Path
    engine: bool = False
    model: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def at(self, program: Path) -> Side:
        return Side(self.name, program, self.python, self.engine, self.model)

    def command(self, *arguments: str) -> list[str]:
        return [str(self.python), str(self.program), *arguments]

    def worker(self, model: Path) -> list[str]:
        chosen = [] if self.model else ["--model", str(model)]
        return self.command(
            "worker", "--json", *harness.WORKER_FLAGS, "--nice", "0", "--topic", secrets.token_hex(8), *chosen
        )


def our_sides(archives: Path, python: Path) -> list[Side]:
    """QMesh's archives in a folder, by what they say they carry."""
    sides = []
    for archive in archives.glob("*.pyz"):
        contents = qmesh.read_contents(archive)
        kinds = sorted(contents.parts) if contents is not None else []
        name = " + ".join([OURS, *kinds])
        sides.append(Side(name, archive, python, qmesh.ENGINE in kinds, qmesh.MODEL in kinds))
    return sorted(sides, key=lambda side: len(side.name))


def one_with(archives: Path, kinds: Set[str]) -> Path:
    """The archive in a folder that carries just these. Raises report.CannotMeasure where there is none."""
    for archive in archives.glob("*.pyz"):
        contents = qmesh.read_contents(archive)
        if kinds == set(contents.parts if contents is not None else ()):
            return archive
    carried = " and ".join(sorted(kinds)) or "the program alone"
    raise report.CannotMeasure(f"no archive in {archives.name}/ carries {carried}: `python build_zipapp.py --help`")


def programs(archives: Path) -> tuple[dict[str, Path], list[report.Item]]:
    """The program as a file of Python, which is compiled at each start, and its archive, or why there is none."""
    found = {goals.SOURCE: harness.PROGRAM}
    try:
        return found | {goals.ARCHIVE: one_with(archives, set())}, []
    except report.CannotMeasure as reason:
        return found, [report.Missing(goals.ARCHIVE, str(reason))]


def add_archives_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archives", type=Path, default=report.ROOT / "dist", metavar="DIR", help="QMesh's own (dist)")


def unpacked_engine(folder: Path, archive: Path) -> Path:
    """The packages that an archive carries."""
    contents = qmesh.read_contents(archive)
    assert contents is not None
    cache = {"QMESH_CACHE_DIR": str(folder / "engine")}
    return qmesh.unpack(archive, contents.parts[qmesh.ENGINE], cache).path


def other_sides(folder: Path, packages: Path, bare: Path) -> list[Side]:
    """The plain program with these packages installed, and the builders' archives of both."""
    program, site, builders = Path(qmesh.__file__), folder / "site", peers.builders_python()
    left_out = shutil.ignore_patterns("__pycache__", qmesh.SIZES_FILE)
    shutil.copytree(packages, site, ignore=left_out)
    installed = virtual_environment(folder / "installed")
    place = next((folder / "installed").glob("lib/python*/site-packages"))
    shutil.copytree(site, place, dirs_exist_ok=True)
    call(installed, "-m", "compileall", "-q", place)  # as pip does
    shutil.copy(program, site)
    shiv, pex, pex_venv = (folder / name for name in ("qmesh-shiv.pyz", "qmesh.pex", "qmesh-venv.pex"))
    start = ["-e", "qmesh:main", "-o"]
    call(builders, "-m", "shiv", "--reproducible", "--compressed", "--site-packages", site, *start, shiv)
    packed: list[str | Path] = ["-m", "pex", "--pex-root", folder / "pex", "-D", site]
    call(builders, *packed, *start, pex)
    call(builders, *packed, "--venv", *start, pex_venv)
    made = [(SHIV, shiv), (PEX, pex), (PEX_VENV, pex_venv)]
    return [Side(PLAIN, program, installed), *(Side(name, archive, bare, engine=True) for name, archive in made)]


def virtual_environment(folder: Path) -> Path:
    """The interpreter of a new one."""
    call(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def call(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)


# --- Homes ---


def environment(home: Path) -> dict[str, str]:
    """Of a process that knows no folder but `home`."""
    own = {"HOME": str(home), "TMPDIR": str(home.parent)}
    own |= {"QMESH_HOST": harness.LOOPBACK, "QMESH_STATE_DIR": f"{home}.state"}
    foreign = ("QMESH_", "XDG_", "SHIV_", "PEX_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | own


@contextlib.contextmanager
def new_home(folder: Path) -> Iterator[Path]:
    """An empty folder, at the same place each time: what pex unpacks has names and contents that depend on it."""
    home = folder / "home"
    home.mkdir()
    try:
        yield home
    finally:
        shutil.rmtree(home)
        shutil.rmtree(f"{home}.state", ignore_errors=True)
        Path(f"{home}.log").unlink(missing_ok=True)


def files_of(home: Path) -> dict[str, int]:
    """The size of each file; of those that are one file, one counts."""
    found: dict[int, tuple[str, int]] = {}
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.is_symlink():
            about = path.stat()
            found.setdefault(about.st_ino, (str(path.relative_to(home)), about.st_size))
    return dict(found.values())


def taken_mb(home: Path) -> float:
    return sum(files_of(home).values()) / MB


# --- Tables ---


class Took(NamedTuple):
    """Seconds of the clock, and of the processor."""

    wall: float
    cpu: float


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{report.table(header, rows)}", flush=True)


def both(times: Sequence[Took]) -> str:
    return (
        f"{report.spread([it.wall for it in times])}; {statistics.median(it.cpu for it in times):.2f}" if times else ""
    )


def last_line(text: str) -> str:
    """What a program said at last, without a table's signs and the places where it was."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return (lines or [""])[-1].replace("|", "/")


# --- 1  Starts ---


@dataclass
class Starts:
    """What one side took: the first of two starts in a row is with an empty cache."""

    version: tuple[list[Took], list[Took]] = field(default_factory=lambda: ([], []))
    ready: tuple[list[Took], list[Took]] = field(default_factory=lambda: ([], []))
    memory_mb: list[float] = field(default_factory=list)
    light_mb: float = 0.0  # what is unpacked after `--version`, and after a worker
    heavy_mb: float = 0.0
    files: int = 0


def to_end(command: Sequence[str], home: Path) -> Took:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment(home), stdout=subprocess.DEVNULL, check=True, timeout=LIMIT_S)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def to_ready(side: Side, home: Path, model: Path) -> Took:
    """Of a worker. Raises AssertionError with what it says when it does not come to that."""
    started = time.perf_counter()
    process = harness.Process(side.worker(model), environment(home), Path(f"{home}.log"))
    try:
        told = process.wait_ready()
        assert "error" not in told, told["error"]["message"]
        wall = time.perf_counter() - started
        return Took(wall, sum(psutil.Process(process.popen.pid).cpu_times()[:4]))  # its own, and that of its children
    finally:
        process.end()


def most_memory_mb(side: Side, home: Path) -> float:
    command = [sys.executable, "-S", "-c", MEASURE, *side.command("--version")]
    told = subprocess.run(command, env=environment(home), capture_output=True, check=True, timeout=LIMIT_S)
    return int(told.stdout) * 1024 / MB


def observe_starts(side: Side, it: Starts, folder: Path, model: Path) -> None:
    with new_home(folder) as home:
        for times in it.version:
            times.append(to_end(side.command("--version"), home))
        it.memory_mb.append(most_memory_mb(side, home))
        it.light_mb = taken_mb(home)
    if side.engine or side.name == PLAIN:
        with new_home(folder) as home:
            for times in it.ready:
                times.append(to_ready(side, home, model))
            it.heavy_mb, it.files = taken_mb(home), len(files_of(home))


def part_starts(sides: Sequence[Side], folder: Path, arguments: argparse.Namespace) -> Iterator[report.Item]:
    found = {side.name: Starts() for side in sides}
    for turn in range(arguments.rounds):
        start = turn % len(sides)  # no side always follows the same one
        for side in [*sides[start:], *sides[:start]]:
            observe_starts(side, found[side.name], folder, arguments.model)
        print(f"round {turn + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    header = ["seconds: median (from-to); processor", "file, MB", "`--version`, first", "second", "most memory, MB"]
    header += ["unpacked, MB", "worker ready, first", "second", "unpacked, MB (files)"]
    markdown(header, [starts_row(side, found[side.name]) for side in sides])
    for side in sides:
        yield from starts_figures(side.name, found[side.name])


def starts_figures(name: str, it: Starts) -> Iterator[report.Item]:
    for what, pair in {"`--version`": it.version, "worker ready": it.ready}.items():
        for when, times in zip(("first", "second"), pair, strict=True):
            if times:
                yield report.Figure.of(f"{what}, {when} start, {name}", [took.wall for took in times], "s")
                yield report.Figure.of(f"{what}, {when} start, {name}: processor", [took.cpu for took in times], "s")
    yield report.Figure.of(f"most memory of `--version`, {name}", it.memory_mb, "MB")


def starts_row(side: Side, it: Starts) -> list[str]:
    row = [side.name, f"{side.program.stat().st_size / MB:.1f}", *map(both, it.version)]
    row += [f"{statistics.median(it.memory_mb):.0f}", f"{it.light_mb:.0f}", *map(both, it.ready)]
    return [*row, f"{it.heavy_mb:.0f} ({it.files:,})" if it.ready[0] else ""]


# --- 2  Storm: many first starts at once, of which some are killed ---


@dataclass
class Storms:
    """What was left, by rounds. torn: files that lack or are of another size; left: files that belong to nothing."""

    killed: int = 0
    failed: int = 0  # processes that nobody had killed
    torn: int = 0
    left: int = 0
    left_mb: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    later_failed: int = 0
    said: str = ""  # by the last that failed


def unpacking(side: Side, no_model: Path) -> list[str]:
    """A command that needs what is unpacked, and ends soon after: with 0, or of QMesh's own for want of a model."""
    return side.command(*(("worker", "--port", "0", "--model", str(no_model)) if side.is_ours else ("--version",)))


def lasting(home: Path) -> dict[str, int]:
    """What a start unpacks, without what Python compiles as it imports."""
    return {name: size for name, size in files_of(home).items() if not name.endswith(".pyc")}


def storm(command: Sequence[str], code: int, home: Path, chance: random.Random, it: Storms) -> None:
    """Start a crowd and kill some, at times that `chance` chooses. code: what the command ends with."""
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    crowd = [subprocess.Popen(command, env=environment(home), **pipes) for _ in range(CROWD)]
    doomed = chance.sample(crowd, chance.randint(1, CROWD))
    started = time.perf_counter()
    for after, process in zip(sorted(chance.uniform(0, STORM_S) for _ in doomed), doomed, strict=True):
        time.sleep(max(0.0, started + after - time.perf_counter()))
        process.send_signal(signal.SIGKILL)
    for process in crowd:
        _, said = process.communicate(timeout=LIMIT_S)
        it.killed += process.returncode == -signal.SIGKILL
        if process.returncode not in (code, -signal.SIGKILL):
            it.failed += 1
            it.said = last_line(said)


def observe_storm(side: Side, it: Storms, seed: int, folder: Path, whole: Mapping[str, int]) -> None:
    command, code = unpacking(side, folder / "no-model.gguf"), int(side.is_ours)
    with new_home(folder) as home:
        storm(command, code, home, random.Random(seed), it)
        started = time.perf_counter()
        later = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=LIMIT_S)
        it.later_s.append(time.perf_counter() - started)
        if later.returncode != code:
            it.later_failed += 1
            it.said = last_line(later.stderr)
        found = lasting(home)
        it.torn += any(found.get(name) != size for name, size in whole.items())
        rubbish = [size for name, size in found.items() if name not in whole]
        it.left += bool(rubbish)
        it.left_mb.append(sum(rubbish) / MB)


def part_storm(sides: Sequence[Side], folder: Path, arguments: argparse.Namespace) -> Iterator[report.Item]:
    (folder / "no-model.gguf").touch()
    sides = [side for side in sides if side.engine and not side.model]
    found = {side.name: Storms() for side in sides}
    whole = {}
    for side in sides:
        with new_home(folder) as home:
            subprocess.run(unpacking(side, folder / "no-model.gguf"), env=environment(home), capture_output=True)
            whole[side.name] = lasting(home)
    for turn in range(arguments.storms):
        for side in sides:
            observe_storm(side, found[side.name], SEED + turn, folder, whole[side.name])
        print(f"storm {turn + 1} of {arguments.storms}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    header = [f"{arguments.storms} x {CROWD} first starts at once", "killed", "others that failed", "later start fails"]
    header += ["later start, s", "files torn", "rubbish after the later start", "at most, MB", "said"]
    markdown(header, [storm_row(name, it) for name, it in found.items()])
    for name, it in found.items():
        yield report.Figure.of(f"start after a storm, {name}", it.later_s, "s")
        yield report.Figure.of(
            f"starts that failed in storms and after them, {name}", [it.failed + it.later_failed], ""
        )


def storm_row(name: str, it: Storms) -> list[str]:
    counts = [str(count) for count in (it.killed, it.failed, it.later_failed)]
    left = [str(it.torn), str(it.left), f"{max(it.left_mb):.0f}", it.said[:SAID_CHARS]]
    return [name, *counts, report.spread(it.later_s), *left]


# --- 3  Trouble: what the file, the folder and the disk may do ---


def attempt(side: Side, home: Path, model: Path) -> str:
    """How long a worker took to be ready, or what it said."""
    try:
        return f"ready, {to_ready(side, home, model).wall:.1f} s"
    except AssertionError as failure:
        return last_line(str(failure).replace(str(home), "~"))[:SAID_CHARS]


def no_folder(side: Side, home: Path, model: Path) -> str:
    (home / "file").touch()
    return attempt(side, home / "file", model)


def no_room(side: Side, home: Path, model: Path) -> str:
    """And whether a start with room works thereafter."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE_BYTES, usual[1]))  # which children inherit
    try:
        said = attempt(side, home, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    return f"{said}; with room {attempt(side, home, model)}"


def half_a_file(side: Side, home: Path, model: Path) -> str:
    return changed(side, home, model, lambda data: data[: len(data) // 2])


def a_wrong_byte(side: Side, home: Path, model: Path) -> str:
    at = side.program.stat().st_size // 2
    return changed(side, home, model, lambda data: data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])


def changed(side: Side, home: Path, model: Path, change: Callable[[bytes], bytes]) -> str:
    copy = home / side.program.name
    copy.write_bytes(change(side.program.read_bytes()))
    return attempt(side.at(copy), home, model)


def a_library_lost(side: Side, home: Path, model: Path) -> str:
    """Of what was unpacked, as what tidies up old files does."""
    to_ready(side, home, model)
    for path in home.rglob("libllama.so*"):
        path.unlink()
    return attempt(side, home, model)


def another_name(side: Side, home: Path, model: Path) -> str:
    copy = home / f"lab{side.program.suffix}"
    shutil.copy(side.program, copy)
    return once_more(side, side.at(copy), home, model)


def a_key_added(side: Side, home: Path, model: Path) -> str:
    copy = home / side.program.name
    if side.is_ours:
        qmesh.seal(side.program, f"{qmesh.MeshKey(secrets.token_bytes(qmesh.KEY_BYTES)).text}\n", copy)
    else:
        shutil.copy(side.program, copy)
        with zipfile.ZipFile(copy, "a") as archive:
            archive.writestr(qmesh.SEALED_KEY_FILE, "key")
    return once_more(side, side.at(copy), home, model)


def once_more(side: Side, other: Side, home: Path, model: Path) -> str:
    """What another file with the same content unpacks besides."""
    to_ready(side, home, model)
    before = taken_mb(home)
    said = attempt(other, home, model)
    return f"{said}, {abs(taken_mb(home) - before):.0f} MB more"


TROUBLES = {
    "no folder can be made in the home": no_folder,
    "no file can be larger than 1 MB": no_room,
    "half of the archive": half_a_file,
    "one wrong byte in it": a_wrong_byte,
    "a library that was unpacked is gone": a_library_lost,
    "a copy with another name": another_name,
    "a copy with a key in it": a_key_added,
}


def part_trouble(sides: Sequence[Side], folder: Path, arguments: argparse.Namespace) -> Iterator[report.Item]:
    sides = [side for side in sides if side.engine and not side.model]
    rows = []
    for name, trouble in TROUBLES.items():
        row = [name]
        for side in sides:
            with new_home(folder) as home:
                row.append(trouble(side, home, arguments.model))
        rows.append(row)
    markdown(["a worker, where", *(side.name for side in sides)], rows)
    yield from ()  # what is said of troubles is words


# --- Command line ---


PARTS: dict[str, Callable[[Sequence[Side], Path, argparse.Namespace], Iterator[report.Item]]] = {
    "starts": part_starts,
    "storm": part_storm,
    "trouble": part_trouble,
}


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    report.needed_model(arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        bare = virtual_environment(folder / "bare")
        ours = our_sides(arguments.archives, bare)
        alone = one_with(arguments.archives, {qmesh.ENGINE})
        packages = unpacked_engine(folder, alone)
        sides = [*other_sides(folder, packages, bare), *ours]
        for part in arguments.parts or PARTS:
            yield from PARTS[part](sides, folder, arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__, rounds=9)
    parser.add_argument("parts", nargs="*", metavar="PART", type=report.one_of(PARTS), help=", ".join(PARTS))
    add_archives_option(parser)
    parser.add_argument("--storms", type=int, default=20)
    parser.add_argument("--model", type=Path, default=report.MODEL)
    return parser


if __name__ == "__main__":
    report.main("archive", make_parser(), figures)
