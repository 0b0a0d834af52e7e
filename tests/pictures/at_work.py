"""Draw the README's picture of a mesh at work: what terminals show, as tmux has it, as a small SVG.

    python tests/pictures/at_work.py [--model FILE] [-o FILE]

Three real workers on 127.0.0.1, `status --watch` in one pane, and in the other a question whose worker is killed while
it answers. Everything in the picture was printed by the program; drawing it anew gives other ids and other numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402

import qmesh  # noqa: E402

COMMAND = 'python qmesh.pyz prompt "Why is the sky blue?" --temperature 0 --max-tokens 110'
TOPIC = "lab"
COLUMNS, WATCHING_ROWS, ASKING_ROWS = 100, 8, 15
PATIENCE_S = 60.0
POLL_S = 0.05
BEGUN = r"Response: (?:.|\n){120}"  # so much of the answer stands there when its worker is killed

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE, MARGIN = 8.4, 19, 14, 18
BACKGROUND, FOREGROUND, FAINT = "#16181d", "#d7dae0", "#7f848e"
COLOURS = ("#3f4451", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", FOREGROUND)
SGR = re.compile(r"\x1b\[([0-9;]*)m")


class Tmux:
    """A tmux server of this picture's own, with one window."""

    def __init__(self, folder: Path) -> None:
        self._socket = str(folder / "tmux")

    def __call__(self, *arguments: str) -> str:
        command = ["tmux", "-f", os.devnull, "-S", self._socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout

    def wait_for(self, pane: str, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(text, self("capture-pane", "-p", "-t", pane)):
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing like {text!r} in:\n{self('capture-pane', '-p', '-t', pane)}")
            time.sleep(POLL_S)

    def lines(self, pane: str) -> list[str]:
        """What a pane shows, with its colours."""
        return self("capture-pane", "-e", "-p", "-t", pane).rstrip("\n").split("\n")


@contextlib.contextmanager
def tmux_of(mesh: harness.Mesh) -> Iterator[Tmux]:
    """Two panes, each a shell in a folder with the program, whose settings are those of the mesh."""
    (mesh.directory / "qmesh.pyz").symlink_to(mesh.program)
    settings = [f"export {name}={shlex.quote(value)}" for name, value in mesh.env.items() if name.startswith("QMESH_")]
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    shell = mesh.directory / "shell"
    shell.write_text("\n".join([*settings, python, "PS1='$ '", f"cd {shlex.quote(str(mesh.directory))}\n"]))
    command = f"bash --noprofile --rcfile {shlex.quote(str(shell))}"
    tmux = Tmux(mesh.directory)
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(WATCHING_ROWS + ASKING_ROWS + 1), command)
    try:
        tmux("split-window", "-v", "-l", str(ASKING_ROWS), command)
        yield tmux
    finally:
        tmux("kill-server")


def at_work(mesh: harness.Mesh) -> list[str]:
    """What the terminals show at the end: those who watch, and who asked."""
    mesh.topic = TOPIC
    workers = {worker.worker_id: worker for worker in mesh.start_workers(3)}
    with tmux_of(mesh) as tmux:
        tmux("send-keys", "-t", "0", "python qmesh.pyz status --watch 1", "Enter")
        tmux.wait_for("0", "3 workers")
        tmux("send-keys", "-t", "1", COMMAND, "Enter")
        tmux.wait_for("1", BEGUN)
        kill_the_answering_one(mesh, workers)
        tmux.wait_for("1", "Total time")
        tmux.wait_for("0", "2 workers")
        return [*tmux.lines("0")[:WATCHING_ROWS], "-" * COLUMNS, *tmux.lines("1")]


def kill_the_answering_one(mesh: harness.Mesh, workers: dict[str, harness.Process]) -> None:
    settings = qmesh.Settings(host=qmesh.LOOPBACK, topic=mesh.topic, state_dir=str(mesh.state_dir))
    deadline = time.monotonic() + PATIENCE_S
    with qmesh.BlockingClient(settings) as watching:
        while time.monotonic() < deadline:
            for status in watching.statuses():
                if status["queue"]["active"]:
                    workers[status["worker_id"]].popen.kill()
                    return
    raise SystemExit("no worker is at work")


# --- A terminal's lines as an SVG ---


def svg(lines: list[str]) -> str:
    width, height = COLUMNS * CELL_WIDTH + 2 * MARGIN, len(lines) * CELL_HEIGHT + 2 * MARGIN
    texts = "\n".join(row(line, MARGIN + (number + 0.75) * CELL_HEIGHT) for number, line in enumerate(lines))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-size="{FONT_SIZE}" '
        "font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace\">\n"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>\n{texts}\n</svg>\n'
    )


def row(line: str, y: float) -> str:
    """One line, a text for each run of equal style, each at its column, whatever the font's widths are."""
    pieces, column = [], 0
    for style, text in runs(line):
        if text.strip():
            start = column + sum(map(columns_of, text)) - sum(map(columns_of, text.lstrip()))
            spot = f'x="{MARGIN + start * CELL_WIDTH:g}" y="{y:g}"'
            pieces.append(f'<text {spot} {style} xml:space="preserve">{escape(text.strip())}</text>')
        column += sum(map(columns_of, text))
    return "".join(pieces)


def runs(line: str) -> Iterator[tuple[str, str]]:
    if set(line) == {"-"}:
        yield f'fill="{FAINT}"', "─" * len(line)
        return
    style = f'fill="{FOREGROUND}"'
    for number, part in enumerate(SGR.split(line)):
        if number % 2:
            style = style_of([int(code or 0) for code in part.split(";")])
        else:
            for piece in re.findall(r"\S+(?: \S+)*|\s+", part):  # a gap ends a run: columns stay in line
                yield style, piece


def style_of(codes: list[int]) -> str:
    style = f'fill="{FOREGROUND}"'
    for code in codes:
        if code == 1:
            style += ' font-weight="bold"'
        elif code == 2:
            style = style.replace(FOREGROUND, FAINT)
        elif 30 <= code <= 37:
            style = style.replace(FOREGROUND, COLOURS[code - 30])
    return style


def columns_of(character: str) -> int:
    if unicodedata.combining(character) or character in "\ufe0f\u200d":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / qmesh.DEFAULT_MODEL.file_name)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".svg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, harness.Mesh(Path(folder), arguments.model) as mesh:
        lines = at_work(mesh)
    arguments.output.write_text(svg(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
