#!/usr/bin/env python3
"""How much of each section of qmesh.py its own tests reach, and the figures of the house.

    python tests/measure.py                 # each pure section, by its own test files alone, and the house's figures
    python tests/measure.py 6 17            # these sections
    python tests/measure.py --whole         # each section and the module by the whole suite
    python tests/measure.py 6 --missing     # with the branches that no test takes

A branch is a step from one line to another where there are two or more, as coverage.py counts them. Processes that
tests start count too, where they run this qmesh.py. Ends with 1 where a test fails.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import keyword
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from test_architecture import LAST_PURE, SOURCE, Page, downward_findings, function_lengths  # noqa: E402

MODULE = ROOT / "qmesh.py"
WHOLE: tuple[str, ...] = ()  # no test file named: the whole suite

# Section: its own test files.
OWN_TESTS: dict[int, tuple[str, ...]] = {
    1: ("test_settings.py",),
    2: ("test_values.py",),
    3: ("test_values.py",),
    4: ("test_wire.py",),
    5: ("test_keys.py",),
    6: ("test_routing.py",),
    7: ("test_lookup.py",),
    8: ("test_records.py",),
    9: ("test_dht.py",),
    10: ("test_health.py",),
    11: ("test_fair_queue.py",),
    12: ("test_metrics.py",),
    13: ("test_archive.py",),
    14: ("test_machine.py",),
    15: ("test_models.py",),
    16: ("test_engine.py", "test_embeddings.py"),
    17: ("test_udp.py",),
    18: ("test_tcp.py", "test_trust.py"),
    19: ("test_worker.py",),
    20: ("test_client.py", "test_failover.py"),
    21: ("test_doctor.py",),
    22: ("test_terminal.py",),
    23: ("test_terminal.py",),
    24: ("test_openai_api.py",),
    25: ("test_batch.py",),
    26: ("test_http.py",),
    27: ("test_page.py",),
    28: ("test_gateway.py",),
    29: ("test_bench.py",),
    30: ("test_cli.py",),
}

# So many lines of code of a function, in a row, that stand elsewhere too, whatever their names, numbers and texts.
BLOCK_LINES = 6

COVERAGE_SETTINGS = f"""
[run]
branch = true
parallel = true
include = {MODULE}
patch = subprocess, _exit
disable_warnings = no-data-collected, module-not-measured, module-not-imported
"""

Branch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reached:
    """Branches of the module that tests took, and those that they did not."""

    taken: frozenset[Branch]
    missed: frozenset[Branch]

    def within(self, lines: range) -> Reached:
        """Those that begin in these lines."""
        return Reached(*(frozenset(b for b in branches if b[0] in lines) for branches in (self.taken, self.missed)))

    def __str__(self) -> str:
        total = len(self.taken) + len(self.missed)
        share = 100 * len(self.taken) / total if total else 100.0
        return f"{share:5.1f} % of {total:5,} branches"


def section_lines(page: Page) -> dict[int, range]:
    """The lines of each section, from its banner to the next."""
    ends = [*page.starts[1:], len(page.lines) + 1]
    return {number: range(at, end) for (number, _), at, end in zip(page.banners, page.starts, ends, strict=True)}


def reached_by(tests: Sequence[str], workers: int) -> tuple[Reached, bool]:
    """What these test files reach, and whether they passed. workers: processes that run them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "coveragerc")
        settings.write_text(COVERAGE_SETTINGS + f"data_file = {folder}/coverage\n", encoding="utf-8")
        coverage = [sys.executable, "-m", "coverage"]
        chosen = [f"--rcfile={settings}"]
        pytest = ["-m", "pytest", "-q", "-n", str(workers), *(f"tests/{name}" for name in tests)]
        passed = subprocess.run([*coverage, "run", *chosen, *pytest], cwd=ROOT, stdout=sys.stderr).returncode == 0
        subprocess.run([*coverage, "combine", "-q", *chosen], cwd=ROOT, check=True)
        report = Path(folder, "report.json")
        subprocess.run([*coverage, "json", "-q", *chosen, "-o", report], cwd=ROOT, check=True)
        (found,) = json.loads(report.read_text(encoding="utf-8"))["files"].values()
    taken, missed = (frozenset(map(tuple, found[name])) for name in ("executed_branches", "missing_branches"))
    return Reached(taken, missed), passed


def duplicate_blocks(source: str, lines: int = BLOCK_LINES) -> list[tuple[range, range]]:
    """Places in functions that read alike for at least `lines` lines of code: (one, a later one), as its lines.

    Comments, docstrings, and brackets that stand alone do not count; names are all alike, and so are numbers and texts.
    """
    seen: dict[tuple[str, ...], range] = {}
    found: list[tuple[range, range]] = []
    for code in code_of_functions(source):
        for at in range(len(code) - lines + 1):
            numbers, said = zip(*code[at : at + lines], strict=True)
            place = range(numbers[0], numbers[-1] + 1)
            first = seen.setdefault(said, place)
            if first.stop > place.start:
                continue
            if found and first.start in found[-1][0] and place.start in found[-1][1]:  # the same, one line further
                found[-1] = range(found[-1][0].start, first.stop), range(found[-1][1].start, place.stop)
            else:
                found.append((first, place))
    return found


def code_of_functions(source: str) -> Iterator[list[tuple[int, str]]]:
    """Of each function's body the lines that hold code: (number, what it says without names, numbers and texts)."""
    tree = ast.parse(source)
    silent = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    alike = {tokenize.NUMBER: "1", tokenize.STRING: "''"}
    words: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, *alike) and token.start[0] not in silent:
            is_name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
            words.setdefault(token.start[0], []).append("x" if is_name else alike.get(token.type, token.string))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            body = range(function.body[0].lineno, (function.end_lineno or 0) + 1)
            said = ((line, " ".join(words[line])) for line in body if line in words)
            yield [(line, text) for line, text in said if set(text) - set("()[]{}, ")]


def house_figures(source: str) -> list[str]:
    """The sizes of the module, and what of it stands twice or uses what stands below."""
    tree = ast.parse(source)
    lengths = function_lengths(source)
    longest = max(lengths, key=lengths.__getitem__)
    classes = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    largest = max(classes, key=classes.__getitem__)
    blocks = duplicate_blocks(source)
    twice = f"{len(blocks)} (of {BLOCK_LINES} lines of code or more)"
    return [
        f"lines                 {len(source.splitlines()):,}",
        f"functions             {len(lengths):,}",
        f"median function       {statistics.median(lengths.values()):g} lines",
        f"longest function      {lengths[longest]} lines ({longest.partition(': ')[2]})",
        f"longest class         {classes[largest]} lines ({largest})",
        f"downward references   {len(downward_findings(source))}",
        f"duplicate blocks      {twice}",
        *(f"    {one.start}-{one.stop - 1} and {other.start}-{other.stop - 1}" for one, other in blocks),
    ]


def show(title: str, lines: range, reached: Reached, *, missing: bool) -> None:
    print(f"{title:26} {len(lines):6,} lines  {reached}", flush=True)
    for start, end in sorted(reached.missed) if missing else ():
        print(f"    line {start} to {end if end > 0 else 'the end'}", flush=True)


def measure_sections(numbers: Iterable[int], page: Page, *, workers: int, missing: bool) -> bool:
    """Print how much of each section its own tests reach. Whether all of them passed."""
    titles, lines = dict(page.banners), section_lines(page)
    runs: dict[tuple[str, ...], tuple[Reached, bool]] = {}
    for number in numbers:
        tests = OWN_TESTS[number]
        if tests not in runs:
            runs[tests] = reached_by(tests, workers)
        title = f"{number:2}  {titles[number]}"
        show(title, lines[number], runs[tests][0].within(lines[number]), missing=missing)
    return all(passed for _, passed in runs.values())


def measure_whole(page: Page, *, workers: int, missing: bool) -> bool:
    """Print how much of each section, and of the module, the whole suite reaches. Whether it passed."""
    reached, passed = reached_by(WHOLE, workers)
    titles = dict(page.banners)
    for number, lines in section_lines(page).items():
        show(f"{number:2}  {titles[number]}", lines, reached.within(lines), missing=missing)
    show("the whole module", range(len(page.lines)), reached, missing=False)
    return passed


def section_number(text: str) -> int:
    if not text.isdigit() or int(text) not in OWN_TESTS:
        raise argparse.ArgumentTypeError(f"a section's number from 1 to {max(OWN_TESTS)} is needed, not {text!r}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("sections", metavar="SECTION", type=section_number, nargs="*", help="its number")
    parser.add_argument("--whole", action="store_true", help="the whole module by the whole suite")
    parser.add_argument("--missing", action="store_true", help="list the branches that no test takes")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that run tests at once")
    options = parser.parse_args(argv)
    page = Page(SOURCE)
    print("\n".join(house_figures(SOURCE)), flush=True)
    print(flush=True)
    if options.whole:
        return 0 if measure_whole(page, workers=options.workers or os.cpu_count() or 1, missing=options.missing) else 1
    numbers = options.sections or range(1, LAST_PURE + 1)
    return 0 if measure_sections(numbers, page, workers=options.workers, missing=options.missing) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
