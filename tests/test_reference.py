"""The README's reference says what the program says, and its figures are those that were measured last."""

from __future__ import annotations

import reference

import qmesh


def test_what_is_made_for_the_readme_stands_there() -> None:
    readme = reference.README.read_text("utf-8")
    assert readme == reference.in_readme(readme), "run `python tests/reference.py --write`"


def test_every_exit_code_of_an_error_has_a_meaning() -> None:
    assert {error.exit_code for error in reference.all_errors()} <= qmesh.EXIT_CODES.keys()
