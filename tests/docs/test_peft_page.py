"""docs/peft.md: its code runs, its options are PEFT's, its complaints have tests, its rows too."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

peft = pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "peft.md").read_text("utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/peft.md", "exec"), namespace)


def test_every_field_of_loraconfig_has_its_line():
    named = {
        field
        for row in table(section("LoraConfig, field by field"))
        for field in re.findall(r"`(\w+)`", row[0])
    }
    assert named == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_complaint_has_its_test():
    names = re.findall(
        r"^def test_(\d+)_",
        "".join(
            (ROOT / "tests" / "interop" / name).read_text("utf-8")
            for name in ("test_pains.py", "test_pains_cost.py")
        ),
        flags=re.MULTILINE,
    )
    numbers = [row[0] for row in table(section("The fifteen complaints"))]
    assert numbers == [str(n) for n in range(1, 16)]
    assert set(names) == set(numbers)


@pytest.fixture(scope="module")
def differences() -> ModuleType:
    """benchmarks/peft_differences.py, as the command that the page names finds it."""
    pytest.importorskip("bitsandbytes")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("peft_differences")
    finally:
        sys.path.pop(0)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of which the page tells
@pytest.mark.parametrize("case", ["convolutions", "attention", "tied", "starts"])
def test_the_rows_of_the_page_are_what_the_command_prints(case: str, differences: ModuleType):
    """The digits are of one machine; what was measured, and what is more than rounding, is not."""
    shown = {tuple(row[:2]): row[2:] for row in table(section("Where the numbers differ"))}
    for row in getattr(differences, case)():
        there, here = shown[row.case, row.measured]
        assert tiny(here) == tiny(row.rankwise)
        assert tiny(there) == tiny(row.peft)


def tiny(cell: str) -> bool:
    """Whether a cell holds a number that rounding explains."""
    try:
        return float(cell) < 1e-5
    except ValueError:
        return False
