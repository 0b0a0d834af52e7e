"""What the README says that the program, or a file of figures, knows better.

python tests/reference.py            prints it
python tests/reference.py --write    puts it into the README, each block between its two marks

The reference is of commands, settings, exit codes, metrics and messages, as the program has them; the table of figures
is of what `python -m tests.bench` measured last.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import report  # noqa: E402 - as the module is, it is found by the line above
from desk import SilentEngine  # noqa: E402

import qmesh  # noqa: E402

README = ROOT / "README.md"
FIGURES = ROOT / "tests" / "bench" / "results"
NOTE = "<!-- made by `python tests/reference.py --write` of what the program says: change it there -->"
COMMON = 3  # an option that so many commands take, in the same words, is told once


def reference() -> str:
    """All of it, in Markdown."""
    with mock.patch.object(sys, "argv", ["qmesh.pyz"]):  # as the README calls the program
        commands = commands_of(qmesh.make_parser())
    parts = [
        NOTE,
        *command_parts(commands),
        *parameter_parts(),
        *setting_parts(),
        *exit_code_parts(),
        *metric_parts(),
        *message_parts(),
    ]
    return "\n\n".join(parts)


def figures() -> str:
    """The table of goals, and what to know about how they were measured."""
    records = report.read(FIGURES)
    if not records:
        raise ValueError(f"there are no figures in {FIGURES}: run `python -m tests.bench --out {FIGURES}`")
    return report.summary(records)


BLOCKS = {"reference": reference, "figures": figures}


def in_readme(text: str, blocks: Mapping[str, Callable[[], str]] = BLOCKS) -> str:
    """The README with each block as it is made now."""
    for name, make in blocks.items():
        begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md lacks {begin} or {end}")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


# --- Markdown ---


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns in which nothing stands are left out."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    lines = [[head[at] for at in kept], ["---"] * len(kept), *([row[at] for at in kept] for row in rows)]
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |") for line in lines)


def folded(summary: str, *parts: str) -> str:
    return "\n\n".join([f"<details><summary>{summary}</summary>", *filter(None, parts), "</details>"])


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def codes(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


# --- Commands ---

Row = tuple[str, str, str, str]
"""Of an option: how it is typed, its variable, its default, its meaning."""
HEAD = ("option", "environment", "default", "meaning")


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]  # noqa: SLF001 - there is no public face


def commands_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Each command's summary and parser."""
    (commands,) = (action for action in actions(parser) if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001
    summaries = {action.dest: action.help or "" for action in commands._choices_actions}  # noqa: SLF001
    return {name: (summaries[name], command) for name, command in commands.choices.items()}


def row_of(action: argparse.Action) -> Row:
    """What is said of an option; its default stands at the end of its help, in ()."""
    shown = action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else "")
    shown = f"[{shown}]" if action.nargs == "?" else str(shown)
    told = re.fullmatch(r"(.*?) ?(?:\(([^()]*)\))?", action.help or "", re.DOTALL)
    assert told is not None
    default = f"{action.metavar} is {told[2]}" if action.nargs == "?" and action.option_strings else told[2]
    setting = qmesh.SETTINGS.get(action.dest)
    variable = setting.variable if setting is not None and setting.flag in action.option_strings else ""
    flag = ", ".join(action.option_strings)
    return code(f"{flag} {shown}".strip()), code(variable), default or "", told[1]


def command_parts(commands: dict[str, tuple[str, argparse.ArgumentParser]]) -> Iterator[str]:
    yield table(("command", "what it does"), [(code(name), summary) for name, (summary, _) in commands.items()])
    takers: dict[Row, list[str]] = defaultdict(list)
    for name, (_, parser) in commands.items():
        for action in actions(parser):
            takers[row_of(action)].append(name)
    common: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, taken_by in takers.items():
        if len(taken_by) >= COMMON:
            common[tuple(taken_by)].append(row)
    shared: list[Row] = []
    for names, rows in sorted(common.items(), key=lambda item: -len(item[0])):
        shared += [(f"**{whom(names, list(commands))}**", "", "", ""), *rows]
    yield folded("Options that several commands take", table(HEAD, shared))
    for name, (summary, parser) in commands.items():
        own = [row for row in map(row_of, actions(parser)) if len(takers[row]) < COMMON]
        more = parser.description if parser.description != summary else ""
        example = (parser.epilog or "").removeprefix("example:\n  ")
        yield folded(f"<code>{name}</code>", more or "", table(HEAD, own) if own else "", f"Example: {code(example)}")


def whom(names: Sequence[str], everybody: Sequence[str]) -> str:
    others = [name for name in everybody if name not in names]
    if len(others) < len(names):
        return f"every command but {codes(others)}" if others else "every command"
    return codes(names)


# --- Sampling parameters, settings, exit codes ---


def parameter_parts() -> Iterator[str]:
    rows = []
    for name, told in qmesh.PARAMETERS.items():
        limits = "" if told.limits is None else "{:,} to {:,}".format(*told.limits)
        rows.append((code(name), code(told.flag), limits, codes((name,) if told.api is None else told.api)))
    head = ("in Python and in lines of `batch`", "option", "range", "in OpenAI's API")
    yield folded("Sampling parameters", table(head, rows))


def setting_parts() -> Iterator[str]:
    yield "Flags go before the environment, and that before the defaults. Variables that have no flag:"
    yield table(("environment", "names"), [(code(name), what) for name, what in qmesh.OTHER_VARIABLES.items()])


def all_errors(root: type[qmesh.QMeshError] = qmesh.QMeshError) -> Iterator[type[qmesh.QMeshError]]:
    yield root
    for child in root.__subclasses__():
        yield from all_errors(child)


def exit_code_parts() -> Iterator[str]:
    """Exit codes, with the codes of errors, as `--json` tells them, that lead there."""
    causes: dict[int, dict[str, None]] = defaultdict(dict)
    for error in all_errors():
        if error.__module__ == qmesh.__name__:
            causes[error.exit_code][error.code] = None
    for name in qmesh.ERROR_CODES:
        causes[qmesh.error_from_frame({"code": name}).exit_code][name] = None
    rows = [(str(number), meaning, codes(causes[number])) for number, meaning in qmesh.EXIT_CODES.items()]
    yield table(("exit code", "meaning", "codes of errors in JSON"), rows)


# --- Metrics ---


class IdleWorker(qmesh.Worker):
    """One that runs no model."""

    async def _start_engine(self) -> qmesh.Engine:
        return SilentEngine()


async def metrics() -> tuple[list[qmesh.Metric], list[qmesh.Metric]]:
    """What a gateway and a worker tell."""
    with tempfile.TemporaryDirectory() as state:
        settings = qmesh.Settings(host=qmesh.LOOPBACK, port=0, topic=f"reference-{state}", state_dir=state)
        worker = IdleWorker(settings, qmesh.WorkerOptions(nice=0, grace_s=0.0), environ={})
        await worker.start()
        try:
            of_worker = [*worker.metrics(), *qmesh.gpu_metrics([qmesh.GpuLoad("", 1, 1, 0.0)])]
        finally:
            await worker.stop()
        async with qmesh.Client(settings, environ={}) as client:
            gateway = qmesh.Gateway(client, qmesh.GatewayOptions(qmesh.LOOPBACK, 0, (), 0.0, 0.0))
            of_gateway = gateway.metrics({"workers": [], "unreachable": []})
    return of_gateway, of_worker


def metric_parts() -> Iterator[str]:
    """Metrics; those of a gateway and of a worker that tell the same share a row."""
    rows: dict[tuple[str, tuple[str, ...], str], list[str]] = defaultdict(list)
    labels: dict[str, tuple[str, ...]] = {}
    told = [metric for each in asyncio.run(metrics()) for metric in each]
    for metric in told:  # what all nodes tell has more labels where there is more to tell
        labels[metric.name] = max(labels.get(metric.name, ()), metric.labels, key=len)
    for metric in told:
        rows[metric.kind, labels[metric.name], metric.about].append(metric.name)
    shown = [
        (codes(sorted(set(names))), kind, codes(of), about)
        for (kind, of, about), names in sorted(rows.items(), key=lambda row: min(row[1]))
    ]
    yield folded("Metrics", table(("metric", "kind", "labels", "what it tells"), shown))


# --- Messages ---


def message_parts() -> Iterator[str]:
    datagrams = [
        (code(kind), codes(told.required), codes(told.optional), codes(told.replies))
        for kind, told in qmesh.DATAGRAMS.items()
    ]
    frames = [(code(kind), told.sender) for kind, told in qmesh.FRAMES.items()]
    yield folded(
        "Messages between machines",
        "Over UDP, as section 4 of `qmesh.py` writes them:",
        table(("type", "fields", "optional", "answered by"), datagrams),
        "Over TCP, inside TLS:",
        table(("type", "from"), frames),
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(in_readme(README.read_text("utf-8")), "utf-8")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(*(make() for make in BLOCKS.values()), sep="\n\n")
