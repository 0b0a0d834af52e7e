"""How far an answer is the same whatever else runs: beside others, on a warm slot, resumed, and again with its seed.

    python tests/bench/determinism.py [MODEL ...] [--quantize TYPE ...] [--prompts N] [--tokens N] [--out DIR]

Each prompt is answered alone and cold first; then the same answers are asked for in the other ways, and those that
are equal to the last token are counted. `--quantize` makes further models of the first one, in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import report  # noqa: E402
from desk import TOKEN_S, Desk, WatchedModel, chat, plan_for  # noqa: E402

import qmesh  # noqa: E402

SLOTS = 8
WAYS = ("again", "together", "warm", "resumed")
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q6_K": 18}  # enum llama_ftype
SUBJECTS = ("the sea", "a lost key", "winter", "an old clock", "two brothers", "the last train", "bread", "a storm")
FORMS = ("Write a short poem about {}.", "Explain {} to a child.", "List five facts about {}.", "Tell a joke about {}.")


def jobs(count: int, tokens: int, temperature: float) -> list[qmesh.Job]:
    questions = [form.format(subject) for form in FORMS for subject in SUBJECTS][:count]
    asked = [chat(text, temperature=temperature, seed=at, max_tokens=tokens) for at, text in enumerate(questions)]
    return [replace(job, timeout_s=qmesh.MAX_TIMEOUT_S) for job in asked]


def empty_desk(model: WatchedModel) -> Desk:
    desk = Desk(model)
    model.token_s = TOKEN_S  # steps take as long as what is in them, so that chunks are of many sizes
    return desk


def alone(model: WatchedModel, asked: Sequence[qmesh.Job]) -> list[list[int]]:
    answers = []
    for job in asked:
        desk = empty_desk(model)
        desk.ask(job)
        answers.append(desk.ids(0))
    return answers


def together(model: WatchedModel, asked: Sequence[qmesh.Job]) -> list[list[int]]:
    """All at once, so that prompts fill and others write beside each answer."""
    desk = empty_desk(model)
    for job in asked:
        desk.submit(job)
    desk.finish()
    return [desk.ids(ticket) for ticket in desk.told]


def warm(model: WatchedModel, asked: Sequence[qmesh.Job]) -> list[list[int]]:
    """Each on a slot that holds all of its prompt and answer, and so evaluates one token at a time."""
    answers = []
    for job in asked:
        desk = empty_desk(model)
        desk.ask(job)
        desk.ask(job)
        answers.append(desk.ids(1))
    return answers


def resumed(model: WatchedModel, asked: Sequence[qmesh.Job], whole: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each behind a random number of its tokens, which are evaluated together with the prompt."""
    rng = random.Random(1)
    answers = []
    for job, ids in zip(asked, whole, strict=True):
        cut = rng.randrange(1, max(len(ids), 2))
        desk = empty_desk(model)
        desk.ask(replace(job, resume=qmesh.Resume(tuple(ids[:cut]))))
        answers.append([*ids[:cut], *desk.ids(0)])
    return answers


def measure(path: Path, count: int, tokens: int, threads: int) -> Iterator[report.Item]:
    with contextlib.closing(WatchedModel(plan_for(path, slots=SLOTS, context=1024, threads=threads))) as model:
        for name, temperature in (("likeliest", 0.0), ("drawn", 0.8)):
            asked = jobs(count, tokens, temperature)
            whole = alone(model, asked)
            ways = [alone(model, asked), together(model, asked), warm(model, asked), resumed(model, asked, whole)]
            for told, way in zip(WAYS, ways, strict=True):
                same = sum(a == b for a, b in zip(way, whole, strict=True))
                yield report.Figure.of(f"{path.stem}, {name} tokens, {told}: the same", [100 * same / count], "%")


def figures(arguments: argparse.Namespace) -> Iterator[report.Item]:
    qmesh.llama_log()  # llama.cpp's own chatter goes into it
    with tempfile.TemporaryDirectory() as directory:
        models = [report.needed_model(path) for path in arguments.models]
        for kind in arguments.quantize:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize = TYPES[kind], True
            models.append(Path(directory) / f"{kind}.gguf")
            source, target = str(models[0]).encode(), str(models[-1]).encode()
            if llama_cpp.llama_model_quantize(source, target, params):
                raise report.CannotMeasure(f"llama.cpp cannot make {kind} of {models[0]}")
        for path in models:
            yield from measure(path, arguments.prompts, arguments.tokens, psutil.cpu_count(logical=False) or 1)


def make_parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[report.MODEL])
    parser.add_argument("--quantize", nargs="*", choices=TYPES, default=[])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    return parser


if __name__ == "__main__":
    report.main("determinism", make_parser(), figures)
