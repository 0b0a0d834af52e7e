"""Figures in one form: what every benchmark yields, held against its goal, and written as JSON, Markdown and SVG.

A benchmark is a function from its arguments to an iterator of figures, and `main` runs it: it says what the machine is
and how busy, prints the figures, and with `--out DIR` puts them into DIR/figures.json in place of that benchmark's
earlier ones; figures.md and the plots are made of that file alone, so the same figures give the same bytes. What was
yielded before an error or Ctrl-C is written too. goals.py has what is to be reached, and the commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import goals  # noqa: E402

import qmesh  # noqa: E402

MODEL = ROOT / "models" / qmesh.DEFAULT_MODEL.file_name
JSON_FILE, MARKDOWN_FILE = "figures.json", "figures.md"
QUIET_SHARE = 0.1  # of all cores: what other programs take of a quiet machine stays below it
DIGITS = 4  # that a figure is kept and shown with; no benchmark here repeats more of them


# --- Numbers ---


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all stays below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "p99": lambda values: percentile(values, 0.99),
    "largest": max,
}


def number(value: float) -> str:
    """With three digits that count, or all before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def spread(values: Sequence[float], unit: str = "", of: str = "median") -> str:
    """The median, or another statistic, and how far the values lie apart: `1.23 ms (1.10-1.40)`."""
    middle = f"{number(STATISTICS[of](values))} {unit}".strip()
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}-{number(max(values))})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


# --- Figures ---


OURS = "QMesh"


@dataclass(frozen=True)
class Versus:
    """Both sides of a figure that compares them, a value a round each. group: what a plot draws side by side."""

    own: str
    peer: str
    group: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    unit: str

    def __str__(self) -> str:
        ours, theirs = (number(statistics.median(values)) for values in (self.ours, self.theirs))
        return f"{self.peer}: {theirs} {self.unit}; {self.own}: {ours}"


@dataclass(frozen=True)
class Figure:
    """What was measured, a value a round. goal: its key in goals.GOALS, where it has one."""

    what: str
    values: tuple[float, ...]
    unit: str
    goal: str = ""
    versus: Versus | None = None

    @staticmethod
    def of(what: str, values: Iterable[float], unit: str, goal: str = "") -> Figure:
        return Figure(what, _kept(values), unit, goal)


Sides = Sequence[Sequence[float]]
"""Ours and the peer's, a value a round each."""


def ratio(what: str, sides: Sides, unit: str, *, peer: str, own: str = OURS, group: str = "", goal: str = "") -> Figure:
    """Ours by theirs within each round, since a shared machine changes its mind between two."""
    ours, theirs = sides
    values = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Figure(what, _kept(values), "x", goal, Versus(own, peer, group or what, _kept(ours), _kept(theirs), unit))


def added(what: str, sides: Sides, unit: str, *, peer: str, own: str = OURS, group: str = "", goal: str = "") -> Figure:
    """By how much ours is more than theirs, within each round."""
    ours, theirs = sides
    values = [one - other for one, other in zip(ours, theirs, strict=True)]
    return Figure(what, _kept(values), unit, goal, Versus(own, peer, group or what, _kept(ours), _kept(theirs), unit))


def _kept(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


@dataclass(frozen=True)
class Missing:
    """Why goals with this in their keys have no figure."""

    goals: str
    why: str


class CannotMeasure(Exception):
    """Something that a whole benchmark needs is not here; the message says what, and how to get it."""


Item = Figure | Missing


def needed_model(path: Path = MODEL) -> Path:
    """Raises CannotMeasure where there is none."""
    if not path.is_file():
        raise CannotMeasure(f"there is no model {path.name} in {path.parent.name}/: `python qmesh.py pull`")
    return path


# --- The machine ---


@dataclass(frozen=True)
class Machine:
    """Where figures come from, and what they are of."""

    processor: str
    cores: int
    memory_gb: float
    system: str
    python: str
    llama_cpp_python: str
    commit: str

    def __str__(self) -> str:
        sizes = f"{self.processor}, {qmesh.plural(self.cores, 'core')}, {self.memory_gb:g} GB"
        return f"{sizes}; {self.system}; Python {self.python}, llama-cpp-python {self.llama_cpp_python}; {self.commit}"

    @staticmethod
    def here() -> Machine:
        return Machine(
            processor=_processor(),
            cores=psutil.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            llama_cpp_python=_version("llama-cpp-python"),
            commit=_commit(),
        )


def _processor() -> str:
    """Its name; on Linux only the kernel's own list has it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Short, and whether the program differs from it."""
    try:
        told = [_git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "qmesh.py")]
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return f"commit {told[0]}" + (" and changes" if told[1] else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Neighbours:
    """What processes other than this one and its children take of the machine from now on."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of the clock; of all cores, in use; of this process and of those it has waited for."""
        cores, own = psutil.cpu_times(), os.times()
        idle = cores.idle + getattr(cores, "iowait", 0.0)
        counted = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # within `user`, once more
        return own.elapsed, sum(cores) - idle - counted, sum(own[:4])

    def share(self) -> float:
        """Of all cores, between 0 and 1."""
        elapsed, used, own = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return min(1.0, max(0.0, (used - own) / max(elapsed, 1e-3) / (psutil.cpu_count() or 1)))


# --- What one benchmark gave ---


@dataclass(frozen=True)
class Record:
    """One benchmark's figures, and where they come from. load: of the last minute, before and after."""

    part: str
    command: str
    measured_at: str
    took_s: int
    machine: Machine
    load: tuple[float, float]
    others: float  # share of all cores that other programs took meanwhile
    figures: tuple[Figure, ...]
    missing: tuple[Missing, ...] = ()
    error: str = ""

    @staticmethod
    def from_json(told: dict[str, Any]) -> Record:
        figures = [
            Figure(**{**it, "values": tuple(it["values"]), "versus": _versus_from(it["versus"])})
            for it in told["figures"]
        ]
        own = {"machine": Machine(**told["machine"]), "load": tuple(told["load"]), "figures": tuple(figures)}
        return Record(**{**told, **own, "missing": tuple(Missing(**it) for it in told["missing"])})

    def figure(self, goal: goals.Goal) -> Figure | None:
        return next((it for it in self.figures if it.goal == goal.key), None)

    def why_missing(self, goal: goals.Goal) -> str:
        reasons = [it.why for it in self.missing if it.goals in goal.key]
        return reasons[0] if reasons else self.error or "not in this run"


def _versus_from(told: dict[str, Any] | None) -> Versus | None:
    return None if told is None else Versus(**{**told, "ours": tuple(told["ours"]), "theirs": tuple(told["theirs"])})


Records = dict[str, Record]
"""By part."""


def read(out: Path) -> Records:
    """Those of a folder; none where there is no file yet."""
    file = out / JSON_FILE
    told = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {part: Record.from_json(it) for part, it in told.items()}


def write(out: Path, record: Record) -> None:
    """Put a record in place of an earlier one of its part, and make everything anew of all."""
    out.mkdir(parents=True, exist_ok=True)
    known = read(out) | {record.part: record}
    records = {part: known[part] for part in goals.PARTS if part in known}
    told = {part: dataclasses.asdict(it) for part, it in records.items()}
    (out / JSON_FILE).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    (out / MARKDOWN_FILE).write_text(markdown(records), "utf-8")
    for part, it in records.items():
        if bars := plot_of(it):
            (out / f"{part}.svg").write_text(svg(bars, goals.PARTS[part].title), "utf-8")


# --- Markdown ---


WHOLE, QUICK = (f"{goals.minutes(quick=quick):.0f} minutes" for quick in (False, True))
HEAD = f"""# Figures

Made by `python -m tests.bench`, which takes about {WHOLE} on two cores, and about {QUICK} with `--quick`: fewer
rounds and smaller sizes. Each figure is the median of its rounds, with the smallest and the largest; ratios are taken
within a round, in which both sides take turns. figures.json has all rounds."""


def markdown(records: Records) -> str:
    parts = [HEAD, *_warnings(records), goals_table(records)]
    for part, record in records.items():
        title = goals.PARTS[part].title
        parts += [f"## {title}", _part(record), *([f"![{title}]({part}.svg)"] if plot_of(record) else [])]
    return "\n\n".join(parts) + "\n"


def summary(records: Records) -> str:
    """What a README shows of them: the machine, what to be careful about, and the goals."""
    machines = sorted({str(record.machine).rpartition("; ")[0] for record in records.values()})
    commits = sorted({record.machine.commit.removeprefix("commit ") for record in records.values()})
    days = sorted({record.measured_at.split()[0] for record in records.values()})
    about = f"{'; '.join(machines)}; {', '.join(days)}; {', '.join(commits)}."
    return "\n\n".join([about, *_warnings(records), goals_table(records)])


def _warnings(records: Records) -> list[str]:
    fewer = [part for part, it in records.items() if it.command != goals.command(part)]
    loud = [f"{part} ({it.others:.0%})" for part, it in records.items() if it.others > QUIET_SHARE]
    failed = [part for part, it in records.items() if it.error]
    lines = []
    if fewer:
        lines.append(f"**Not the usual rounds or sizes** (see the command of each part): {', '.join(fewer)}.")
    if loud:
        lines.append(f"**The machine was not quiet**; share of it that other programs took: {', '.join(loud)}.")
    if failed:
        lines.append(f"**Failed before the end**: {', '.join(failed)}.")
    return lines


def goals_table(records: Records) -> str:
    return table(
        ["figure", "goal", "measured", "peer", "met", "command"], [_goal_row(records, it) for it in goals.GOALS]
    )


def _goal_row(records: Records, goal: goals.Goal) -> list[str]:
    command = f"`{goals.command(goal.part)}`"
    record = records.get(goal.part)
    figure = None if record is None else record.figure(goal)
    if record is None or figure is None:
        why = record.why_missing(goal) if record is not None else "its part was not run"
        return [goal.figure, str(goal), f"not measured: {_cell(why)}", "", "", command]
    rounds = f"{spread(figure.values, figure.unit, goal.of)}, n = {len(figure.values)}"
    met = "yes" if is_met(goal, figure) else "**no**"
    return [goal.figure, str(goal), rounds, str(figure.versus or ""), met, command]


def is_met(goal: goals.Goal, figure: Figure) -> bool:
    reached = STATISTICS[goal.of](figure.values)
    return reached >= goal.bound if goal.at_least else reached <= goal.bound


def _part(record: Record) -> str:
    load = "load {:.1f} before, {:.1f} after".format(*record.load)
    others = f"others took {record.others:.0%} of the machine"
    about = f"`{record.command}`, {record.measured_at}, {record.took_s} s; {record.machine}; {load}, {others}."
    lines = [about, *([f"**Failed: {_cell(record.error)}**"] if record.error else [])]
    lines += [f"Left out: {_cell(it.why)}." for it in record.missing]
    return "\n\n".join([*lines, *([figures_table(record.figures)] if record.figures else [])])


def figures_table(figures: Sequence[Figure]) -> str:
    rows = [[it.what, spread(it.values, it.unit), str(len(it.values)), str(it.versus or "")] for it in figures]
    return table(["figure", "median (from-to)", "n", "both sides"], rows)


def _cell(text: str) -> str:
    """On one line, and with nothing that ends a table's cell."""
    return " ".join(text.split()).replace("|", "/").rstrip(".")


# --- SVG ---


@dataclass(frozen=True)
class Bar:
    """A bar of a plot: the median, and from where to where the values go."""

    group: str
    side: str
    values: tuple[float, ...]
    unit: str


WIDTH, LEFT, RIGHT, ROW, GAP, TOP = 720, 200, 130, 17, 10, 40  # in SVG's units, which are pixels at first
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#64748b")


def plot_of(record: Record) -> list[Bar]:
    """Our bar and the peers' for all that was compared: in each group ours once, of the first comparison."""
    bars: dict[tuple[str, str], Bar] = {}
    compared = [it.versus for it in record.figures if it.versus is not None]
    for it in sorted(compared, key=lambda it: [one.group for one in compared].index(it.group)):
        for side, values in ((it.own, it.ours), (it.peer, it.theirs)):
            bars.setdefault((it.group, side), Bar(it.group, side, values, it.unit))
    return list(bars.values())


def svg(bars: Sequence[Bar], title: str) -> str:
    """Bars that lie, group by group, each with its spread as a line; the scale is each unit's own."""
    longest = {it.unit: 0.0 for it in bars}
    for it in bars:
        longest[it.unit] = max(longest[it.unit], *it.values)
    scales = {unit: (WIDTH - LEFT - RIGHT) / (most or 1) for unit, most in longest.items()}
    sides = list(dict.fromkeys(it.side for it in bars))
    body, y, group = [f'<text x="12" y="24" font-size="15" font-weight="600">{escape(title)}</text>'], TOP, None
    for it in bars:
        if it.group != group:
            y += GAP if group is not None else 0
            group = it.group
            body.append(_text(12, y, group, "start"))
            y += ROW
        body += _bar(it, y, scales[it.unit], COLOURS[sides.index(it.side) % len(COLOURS)])
        y += ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + GAP}" '
    head += 'font-family="system-ui, sans-serif" font-size="12" fill="#1f2937">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>", ""])


def _bar(it: Bar, y: int, scale: float, colour: str) -> list[str]:
    middle, low, high = (
        LEFT + scale * value for value in (statistics.median(it.values), min(it.values), max(it.values))
    )
    said = f"{number(statistics.median(it.values))} {it.unit}"
    return [
        _text(LEFT - 6, y, it.side, "end"),
        f'<rect x="{LEFT}" y="{y}" width="{middle - LEFT:.1f}" height="{ROW - 4}" fill="{colour}"/>',
        f'<path d="M{low:.1f} {y + 6.5}H{high:.1f}" stroke="#111827"/>',
        _text(round(high) + 6, y, said, "start"),
    ]


def _text(x: int, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y + 11}" text-anchor="{anchor}">{escape(text)}</text>'


# --- Running one benchmark ---


def parser(about: str | None, *, rounds: int = 0) -> argparse.ArgumentParser:
    """With the options that all benchmarks have. rounds: how many there are by default, at least five for ratios."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds, help="the default is %(default)s")
    made.add_argument("--out", type=Path, metavar="DIR", help="write figures.json, figures.md and plots there")
    return made


def one_of(parts: Iterable[str]) -> Callable[[str], str]:
    """What argparse checks a PART with: with `choices`, none at all would not be one of them."""
    known = list(parts)

    def part(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"no part {word!r}; there are {', '.join(known)}")
        return word

    return part


def main(part: str, made: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Iterable[Item]]) -> None:
    """Run a benchmark as its script's command line says."""
    arguments = made.parse_args()
    machine, load, started, neighbours = Machine.here(), psutil.getloadavg()[0], time.monotonic(), Neighbours()
    print(f"{machine}; load {load:.1f}", flush=True)
    items: list[Item] = []
    error = ""
    try:
        for item in measure(arguments):
            items.append(item)
    except CannotMeasure as reason:
        items.append(Missing("", str(reason)))
    except BaseException as failure:
        interrupted = isinstance(failure, KeyboardInterrupt)
        error = "interrupted" if interrupted else f"{type(failure).__name__}: {failure}".rstrip(": ")
        raise
    finally:
        figures = tuple(it for it in items if isinstance(it, Figure))
        missing = tuple(it for it in items if isinstance(it, Missing))
        record = Record(
            part=part,
            command=command_line(sys.argv),
            measured_at=now(),
            took_s=round(time.monotonic() - started),
            machine=machine,
            load=(load, psutil.getloadavg()[0]),
            others=round(neighbours.share(), 3),
            figures=figures,
            missing=missing,
            error=error,
        )
        print(f"\n{_part(record)}", flush=True)
        if arguments.out is not None:
            write(arguments.out, record)


def now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def command_line(argv: Sequence[str]) -> str:
    """As it is typed in the repository's folder, without the folders that it reads and writes."""
    script = Path(argv[0]).resolve()
    words = [script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else argv[0], *argv[1:]]
    for option in ("--out", "--archives"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(["python", *words])
