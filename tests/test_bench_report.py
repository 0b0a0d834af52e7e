"""The benchmarks' figures: summed up, held against goals, written and drawn; and their commands, which all parse."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).with_name("bench")
sys.path.insert(0, str(BENCH))

import goals  # noqa: E402
import report  # noqa: E402
from report import Figure, Missing, Record  # noqa: E402

MACHINE = report.Machine("A processor", 2, 8.4, "Linux", "3.11.7", "0.3.36", "commit abc1234")
WAIT = next(it for it in goals.GOALS if it.key == "mesh.wait")
MOST_SVG_BYTES = 30_000


def record(part: str = "mesh", *figures: Figure, **others: object) -> Record:
    told = {"command": goals.command(part), "measured_at": "2026-11-23 07:00 UTC", "took_s": 61, "machine": MACHINE}
    return Record(**{"part": part, **told, "load": (0.1, 2.0), "others": 0.02, "figures": figures, **others})  # type: ignore[arg-type]


def goal_rows(text: str) -> dict[str, list[str]]:
    """The cells of the table of goals, by the figure; of two goals on one figure both."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row for row in rows if len(row) == 6}


def scripts() -> list[str]:
    return sorted(path.stem for path in BENCH.glob("*.py") if "make_parser" in path.read_text("utf-8"))


def imported(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py"))


# --- Numbers ---


def test_a_spread_is_the_median_and_the_ends() -> None:
    assert report.spread([3.0, 1.0, 2.0], "ms") == "2.00 ms (1.00-3.00)"
    assert report.spread([12_345.6], "kB") == "12,346 kB"


def test_one_in_a_hundred_is_above_the_99th() -> None:
    assert report.percentile(list(range(1, 201)), 0.99) == 199
    assert report.percentile([7], 0.99) == 7


def test_a_ratio_is_taken_within_each_round() -> None:
    figure = report.ratio("speed", ([10, 40, 30], [5, 10, 30]), "tokens/s", peer="a peer")
    assert figure.values == (2.0, 4.0, 1.0)  # whose median is 2, where that of the medians is 3
    assert (figure.unit, report.spread(figure.values, "x")) == ("x", "2.00 x (1.00-4.00)")
    assert str(figure.versus) == "a peer: 10.0 tokens/s; QMesh: 30.0"


def test_sides_of_different_lengths_are_no_rounds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.ratio("speed", ([1, 2], [1]), "x", peer="a peer")


# --- Goals ---


@pytest.mark.parametrize(
    ("at_least", "of", "values", "met"),
    [
        (True, "median", (0.8, 1.0, 1.4), True),
        (True, "median", (0.8, 0.9, 1.4), False),
        (False, "median", (0.8, 1.0, 1.4), True),
        (False, "median", (1.1, 1.2, 0.1), False),
        (False, "largest", (0.1, 1.2, 0.1), False),
        (False, "p99", (*[0.5] * 199, 9.0), True),
        (False, "p99", (0.5, 9.0), False),
    ],
)
def test_a_goal_is_met_by_its_direction_and_its_statistic(
    at_least: bool, of: str, values: tuple[float, ...], met: bool
) -> None:
    goal = goals.Goal("mesh.speed", "speed", 1.0, "x", at_least=at_least, of=of)
    assert report.is_met(goal, Figure.of("speed", values, "x")) is met


def test_every_goal_belongs_to_a_part_that_is_usually_run_and_knows_its_statistic() -> None:
    for goal in goals.GOALS:
        assert goals.PARTS[goal.part].usual, goal
        assert goal.of in report.STATISTICS, goal
    assert len({goal.figure for goal in goals.GOALS}) >= len(goals.GOALS) - 1


def test_a_whole_run_and_a_quick_one_take_the_time_that_they_promise() -> None:
    assert goals.minutes() <= 45
    assert goals.minutes(quick=True) <= 7


# --- Commands ---


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("part", goals.PARTS)
def test_the_command_of_a_part_parses_with_its_script(part: str, quick: bool) -> None:
    python, script, *words = shlex.split(goals.command(part, quick=quick))
    path = report.ROOT / script
    assert (python, path.exists()) == ("python", True)
    archives = ["--archives", "somewhere"] if part in goals.WITH_ARCHIVES else []
    parsed = imported(path.name).make_parser().parse_args([*words, *archives, "--out", "there"])
    assert parsed.out == Path("there")


def test_every_script_that_gives_figures_is_a_part() -> None:
    assert {f"{name}.py" for name in scripts()} == {part.script for part in goals.PARTS.values()} | {"__main__.py"}


def test_a_part_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", type=report.one_of(goals.PARTS))
    assert parser.parse_args([]).parts == []
    with pytest.raises(SystemExit):
        parser.parse_args(["enigne"])
    assert "no part 'enigne'; there are startup, engine" in capsys.readouterr().err


# --- Markdown ---


def test_a_measured_goal_shows_what_was_measured_the_peer_and_whether_it_is_met() -> None:
    speed = report.ratio("tokens/s", ([96, 90, 99], [100, 100, 100]), "tokens/s", peer="bare engine", goal="mesh.speed")
    wait = report.added("first token", ([9.5, 9.0], [2.0, 2.0]), "ms", peer="bare engine", goal="mesh.wait")
    rows = goal_rows(report.markdown({"mesh": record("mesh", speed, wait)}))
    assert rows["through the mesh against the bare engine, tokens/s"][1:] == [
        "≥ 0.97 x",
        "0.96 x (0.90-0.99), n = 3",
        "bare engine: 100 tokens/s; QMesh: 96.0",
        "**no**",
        "`python tests/bench/mesh.py --rounds 9`",
    ]
    assert rows[WAIT.figure][2] == "7.25 ms (7.00-7.50), n = 2"


def test_a_goal_without_a_figure_says_why() -> None:
    missing = (Missing("engine.node-llama-cpp.", "node-llama-cpp needs node | npm."),)
    records = {
        "engine": record("engine", missing=missing),
        "mesh": record("mesh", error="AssertionError: the worker\ndid not start"),
        "memory": record("memory", missing=(Missing("", "there is no model"),)),
    }
    rows = goal_rows(report.markdown(records))
    assert len(rows) >= len({goal.figure for goal in goals.GOALS})
    assert rows["engine, total tokens/s against node-llama-cpp, 4 streams"][2] == (
        "not measured: node-llama-cpp needs node / npm"
    )
    assert rows["engine, total tokens/s against llama_cpp.server, 4 streams"][2] == "not measured: not in this run"
    assert rows[WAIT.figure][2] == "not measured: AssertionError: the worker did not start"
    assert rows["memory of a client, `qmesh.py`"][2] == "not measured: there is no model"
    assert rows["`--help` against `python -c pass`, `qmesh.py`"][2] == "not measured: its part was not run"


def test_other_rounds_a_loud_machine_and_a_failure_are_told_above_all_figures() -> None:
    quiet = report.markdown({"mesh": record()})
    assert "**" not in quiet.partition("| figure")[0]
    odd = record("engine", command=goals.command("engine", quick=True), others=0.4, error="Interrupted")
    head = report.markdown({"mesh": record(), "engine": odd}).partition("| figure")[0]
    assert "**Not the usual rounds or sizes** (see the command of each part): engine." in head
    assert "**The machine was not quiet**; share of it that other programs took: engine (40%)." in head
    assert "**Failed before the end**: engine." in head


# --- Files ---


def drawn_record() -> Record:
    """As many comparisons as the largest part makes."""
    peers = (goals.BUILT, goals.PREBUILT, goals.NODE, goals.PYTHON_SERVER)
    figures = [
        report.ratio("tokens/s", ([70.5, 71.25], [60, 61.5]), "tokens/s", peer=peer, group=f"{count} streams & more")
        for count in goals.ENGINE_STREAMS
        for peer in peers
    ]
    return record("engine", *figures, missing=(Missing("engine.x", "why"),))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    one, other = drawn_record(), record("mesh", Figure.of("a wait", [1.23456, 2], "ms", "mesh.wait"))
    report.write(tmp_path, other)
    report.write(tmp_path, one)
    assert report.read(tmp_path) == {"mesh": other, "engine": one}
    assert json.loads((tmp_path / report.JSON_FILE).read_text("utf-8"))["mesh"]["figures"][0]["values"] == [1.235, 2.0]


def test_a_part_measured_again_replaces_itself_alone(tmp_path: Path) -> None:
    again = record("mesh", Figure.of("a wait", [3], "ms"))
    for it in (drawn_record(), record("mesh", error="failed"), again):
        report.write(tmp_path, it)
    assert report.read(tmp_path) == {"engine": drawn_record(), "mesh": again}


def test_the_same_figures_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    written = []
    for name, order in (("one", 1), ("other", -1)):
        for it in (drawn_record(), record("mesh", Figure.of("a wait", [3], "ms")))[::order]:
            report.write(tmp_path / name, it)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"figures.json", "figures.md", "engine.svg"}


def test_a_plot_is_small_valid_xml_with_our_bar_once_in_each_group() -> None:
    text = report.svg(report.plot_of(drawn_record()), "Engine <&> peers")
    assert len(text.encode()) < MOST_SVG_BYTES
    space = "{http://www.w3.org/2000/svg}"
    words = [element.text for element in ET.fromstring(text).iter(f"{space}text")]
    assert words.count("QMesh") == len(goals.ENGINE_STREAMS)
    assert words.count(goals.NODE) == len(goals.ENGINE_STREAMS)
    assert words[0] == "Engine <&> peers"


def test_a_plot_of_nothing_but_zeros_can_be_drawn() -> None:
    bars = report.plot_of(record("mesh", report.added("wait", ([0.0], [0.0]), "ms", peer="a peer")))
    ET.fromstring(report.svg(bars, "zeros"))


# --- Running one ---


def run(out: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException | None) -> Record:
    """A benchmark that gives one figure and then ends, or fails."""

    def measure(arguments: argparse.Namespace) -> Iterator[report.Item]:
        yield Figure.of("a wait", range(arguments.rounds), "ms", "mesh.wait")
        if failure is not None:
            raise failure

    monkeypatch.setattr(sys, "argv", [str(BENCH / "mesh.py"), "--rounds", "2", "--out", str(out)])
    try:
        report.main("mesh", report.parser("about", rounds=5), measure)
    finally:
        (found,) = report.read(out).values()
    return found


def test_a_benchmark_writes_its_figures_and_how_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, None)
    assert (found.command, found.error) == ("python tests/bench/mesh.py --rounds 2", "")
    assert [figure.values for figure in found.figures] == [(0.0, 1.0)]
    assert found.machine == report.Machine.here()
    assert 0 <= found.others <= 1


@pytest.mark.parametrize("part", [part for part, it in goals.PARTS.items() if it.usual])
def test_what_a_whole_run_starts_is_known_as_the_usual_command(part: str) -> None:
    words = [str(report.ROOT / word) if word.endswith(".py") else word for word in shlex.split(goals.command(part))]
    assert report.command_line([*words[1:], "--archives", "/dist", "--out", "/results"]) == goals.command(part)


@pytest.mark.parametrize(
    ("failure", "told"),
    [(AssertionError("it broke"), "AssertionError: it broke"), (KeyboardInterrupt(), "interrupted")],
)
def test_what_was_measured_before_a_failure_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, told: str
) -> None:
    with pytest.raises(type(failure)):
        run(tmp_path, monkeypatch, failure)
    (found,) = report.read(tmp_path).values()
    assert (found.error, len(found.figures)) == (told, 1)


def test_what_cannot_be_measured_here_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, report.CannotMeasure("there is no model"))
    assert (found.error, found.missing) == ("", (Missing("", "there is no model"),))


def test_a_model_that_is_not_there_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(report.CannotMeasure, match=r"no model none\.gguf in .*: `python qmesh\.py pull`"):
        report.needed_model(tmp_path / "none.gguf")
