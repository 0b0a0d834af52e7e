"""Every fault once: see `matrix.py` for the list, and to let them loose more often."""

from __future__ import annotations

import os
from pathlib import Path

import lan
import pytest
import questions
from arena import Known
from cells import Cell, run
from matrix import CELL_TIMEOUT_S, CELLS

SEED = os.environ.get("QMESH_CHAOS_SEED", "0")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Known:
    """What an undisturbed worker answers."""
    return questions.learn(tmp_path_factory.mktemp("undisturbed"), model_path)


@pytest.mark.timeout(CELL_TIMEOUT_S)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_an_answer_survives(cell: Cell, tmp_path: Path, model_path: Path, known: Known) -> None:
    if cell.needs_lan:
        lan.require()
    outcome = run(cell, tmp_path / "scene", model_path, known, seed=SEED)
    assert not outcome.broken, "\n".join([f"with QMESH_CHAOS_SEED={SEED}:", *outcome.broken])
    if outcome.not_tried:
        pytest.skip("; ".join(outcome.not_tried))
