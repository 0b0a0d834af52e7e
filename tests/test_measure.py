"""The measure of the house: it knows every section, and sees what stands twice."""

from __future__ import annotations

from pathlib import Path

import measure
from test_architecture import SOURCE, Page

BLOCK = """
def {name}(rows):
    {total} = 0
    for {row} in rows:
        if {row} > {limit}:
            # {name} leaves out what is less
            {total} += {row}
        else:
            {total} -= 1
    return {total}
"""
ONE = BLOCK.format(name="one", total="total", row="row", limit=3)
OTHER = BLOCK.format(name="other", total="sum_", row="each", limit=500)


def test_every_section_has_tests_of_its_own_which_are_there() -> None:
    assert list(measure.OWN_TESTS) == [number for number, _ in Page(SOURCE).banners]
    tests = Path(measure.__file__).parent
    assert all((tests / name).exists() for names in measure.OWN_TESTS.values() for name in names)


def test_every_line_behind_the_first_banner_is_of_one_section() -> None:
    page = Page(SOURCE)
    lines = [line for lines in measure.section_lines(page).values() for line in lines]
    assert lines == list(range(page.starts[0], len(page.lines) + 1))


def test_what_stands_twice_in_other_words_is_found_as_one_place() -> None:
    assert measure.duplicate_blocks(ONE + OTHER, lines=4) == [(range(3, 11), range(13, 21))]


def test_what_is_shorter_than_a_block_or_does_another_thing_is_let_be() -> None:
    assert measure.duplicate_blocks(ONE + OTHER, lines=8) == []
    assert measure.duplicate_blocks(ONE + OTHER.replace("+=", "*="), lines=4) == []
    assert measure.duplicate_blocks(ONE, lines=4) == []


def test_a_share_is_of_the_branches_that_begin_in_the_section() -> None:
    reached = measure.Reached(frozenset({(1, 2), (5, 6), (5, -4)}), frozenset({(1, 3), (9, 10)}))
    assert str(reached.within(range(5, 10))).split() == ["66.7", "%", "of", "3", "branches"]
    assert str(reached.within(range(100, 200))).split() == ["100.0", "%", "of", "0", "branches"]
