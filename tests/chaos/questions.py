"""What is asked, and what an undisturbed worker answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import harness
from actors import Asker
from story import Question, Story, complaints

WARM_UP = Question("Say hello.", 4)
STREAM = Question("Write a long story about a fox.", 96)  # a second and a half: longer than a worker's grace
KEEP_BUSY = Question("Write a long story about a wizard.", 300)
LONG_PROMPT = Question(
    "Here are some facts. " + " ".join(f"The square of {n} is {n * n}." for n in range(2, 42)) + " Tell me a story.", 24
)
QUICK = (
    Question("Count from 1 to 20.", 24),
    Question("Name the colours of a rainbow.", 24),
    Question("What is a bicycle?", 24),
    Question("Describe the sea.", 24),
    Question("Who was Isaac Newton?", 24),
)
EVERYTHING = (WARM_UP, STREAM, KEEP_BUSY, LONG_PROMPT, *QUICK)


def learn(directory: Path, model: Path, questions: Sequence[Question] = EVERYTHING) -> dict[Question, Story]:
    """The stories of questions, asked of one worker with nothing else to do; each twice, and alike."""
    known = {}
    directory.mkdir(exist_ok=True)
    with harness.Mesh(directory, model) as mesh:
        mesh.start_worker("--slots", "1")
        asker = Asker(mesh, directory / "asker", {})
        try:
            for question in questions:
                first, again = asker.ask(question), asker.ask(question)
                asker.follow(first, again)
                assert first.is_whole, f"{question.text!r} has no answer: {first.ending}\n{asker.stderr}"
                assert first.ids, f"{question.text!r} is answered by nothing"
                assert not (wrong := [*complaints(first, first), *complaints(again, first)]), wrong
                known[question] = first
            asker.leave()
        finally:
            asker.end()
    return known
