"""docs/capabilities.md says what the code does: every cell of its table is run again."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "capabilities.md").read_text("utf-8")
LINES = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
FEATURES, TABLE = LINES[0], {row: cells for row, *cells in LINES[1:]}
REASONS = dict(re.findall(r"^(\d+)\. (.+)$", PAGE, flags=re.MULTILINE))
NEEDS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "Conv1D of": "transformers"}


@pytest.fixture(scope="module")
def capabilities() -> ModuleType:
    """benchmarks/capabilities.py, as the command that the page names finds it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("capabilities")
    finally:
        sys.path.pop(0)


def test_the_page_has_the_rows_and_columns_that_are_run(capabilities: ModuleType):
    assert list(TABLE) == list(capabilities.ROWS)
    assert list(capabilities.FEATURES) == FEATURES
    assert capabilities.HEAD in PAGE


@pytest.mark.parametrize("row", list(TABLE))
def test_a_row_is_what_it_says(row: str, capabilities: ModuleType):
    for start, package in NEEDS.items():
        if row.startswith(start):
            pytest.importorskip(package)
    for feature, cell in zip(FEATURES, TABLE[row], strict=True):
        word, _, number = cell.rstrip(")").partition(" (")
        answer = capabilities.run(row, feature)
        assert (answer.word, answer.reason) == (word, REASONS.get(number, "")), feature


def test_every_refusal_says_what_to_do_and_every_reason_is_used():
    used = set(re.findall(r"\((\d+)\)", PAGE))
    assert used == set(REASONS)
    remedies = ("Use ", "use ", "Put ", "Take ", "Exclude ", "Load ", "Name ", "name ", "Give ")
    silent = [text for text in REASONS.values() if not any(word in text for word in remedies)]
    assert [text for text in silent if "so there is no dropout" not in text] == []
