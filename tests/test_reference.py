"""The README's reference says what the program says."""

from __future__ import annotations

import reference

import qmesh


def test_the_reference_in_the_readme_is_what_the_program_says() -> None:
    readme = reference.README.read_text("utf-8")
    assert readme == reference.in_readme(readme, reference.reference()), "run `python tests/reference.py --write`"


def test_every_exit_code_of_an_error_has_a_meaning() -> None:
    assert {error.exit_code for error in reference.all_errors()} <= qmesh.EXIT_CODES.keys()
