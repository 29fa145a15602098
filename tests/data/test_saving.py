"""Examples come back as they were saved, whatever their form."""

from pathlib import Path

import pytest

from rankwise.data.examples import Examples, load_examples
from rankwise.data.saving import json_lines
from rankwise.errors import UserError

ODD = 'quotes " and \\ and\ttabs\nand lines\u2028 é 漢 \x85'
CHAT = [{"role": "user", "content": ODD}, {"role": "assistant", "content": "yes"}]
LINES = [1, 2, 3]


def classes(labels: list[int], names: tuple[str, ...], **more: list[str]) -> Examples:
    texts = ["a b", ODD, "c"]
    return Examples(
        "classification", "s", LINES, texts=texts, labels=labels, label_names=names, **more
    )


def scores(*labels: float) -> Examples:
    return Examples("regression", "s", LINES, texts=["a", "b", "c"], labels=list(labels))


GIVEN = {
    "text": classes([1, 0, 1], ("x", "y")),
    "numbers for names": classes([2, 0, 1], ("1", "2", "10")),
    "fractions for names": classes([1, 0, 1], ("0.5", "1.5")),
    "plus and minus": classes([1, 0, 1], ("+", "-")),
    "pair": classes([0, 1, 0], ("no", "yes"), pairs=["d", ODD, "f"]),
    "score": scores(0.1, 2.0, -1e-9),
    "whole scores": scores(1.0, 2.0, 3.0),
    "plain": Examples("causal-lm", "s", LINES, texts=["a", ODD, "c"]),
    "prompt": Examples("causal-lm", "s", LINES, prompts=[("a ", " b"), (ODD, "d"), ("e", "f")]),
    "messages": Examples("causal-lm", "s", LINES, messages=[CHAT, CHAT[:], CHAT[:]]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_examples_come_back_as_they_were_saved(tmp_path: Path, name: str) -> None:
    given = GIVEN[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(json_lines(given), encoding="utf-8", newline="")
    found = load_examples(file, given.task)
    assert found.fingerprint == given.fingerprint
    assert (found.label_names, found.form) == (given.label_names, given.form)
    assert found.notes == ()


def test_a_class_without_rows_is_known_again_by_its_name(tmp_path: Path) -> None:
    given = classes([1, 1, 2], ("x", "y", "z"))
    file = tmp_path / "rows.jsonl"
    file.write_text(json_lines(given), encoding="utf-8")
    found = load_examples(file, given.task, label_names=given.label_names)
    assert found.fingerprint == given.fingerprint


def test_rows_without_a_known_label_are_refused() -> None:
    given = Examples("regression", "s", [1], texts=["a"], labels=[0.0], unlabelled=frozenset({0}))
    with pytest.raises(UserError, match="have no label"):
        json_lines(given)
