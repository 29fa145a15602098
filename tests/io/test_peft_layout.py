"""Rankwise's notes in a PEFT file: through text and back, and nothing else let through."""

import json

import pytest

from rankwise.errors import ArtifactError
from rankwise.io.peft_layout import Notes, Share
from rankwise.layers import Split

FULL = Notes(
    shares={"a.q": Share(4, 1 / 3, (0, 4)), "b": Share(2, 8.0, (1, 5), start=2)},
    split={"a": Split(("q", "k"), (4, 2)), "c": Split(("x", "y"), heads=2)},
    own=("d.q_proj",),
    tied={"out": "embed"},
    biases=("a.bias",),
    tokens={"embed": "m.embed"},
    freeze_A=True,
    dropout=0.1,
    slot=16,
)


def test_notes_survive_their_way_through_text():
    assert Notes.from_json(FULL.to_json(), "here") == FULL
    assert Notes.from_json(None, "here") == Notes()
    assert Notes().to_json() is None


GOOD = json.loads(FULL.to_json() or "")
DAMAGE = [
    ("nonsense", "not valid JSON"),
    (json.dumps({"version": 2}), "not of version 1"),
    ({"shares": []}, "list in the place of an object"),
    ({"shares": {"a": [1, 2.0, 0, 1]}}, "in the place of a list of 5"),
    ({"shares": {"a": [0, 2.0, 0, 0, 0]}}, "ranks and rows do not add up"),
    ({"shares": {"a": [2, 2.0, 0, 1, 0]}}, "ranks and rows do not add up"),
    ({"shares": {"a": [2, -2.0, 0, 2, 0]}}, "ranks and rows do not add up"),
    ({"shares": {"a": [2, 1e999, 0, 2, 0]}}, "not finite"),
    ({"shares": {"a": [True, 2.0, 0, 1, 0]}}, "not whole"),
    ({"shares": {"a": [10**30, 2.0, 0, 10**30, 0]}}, "not whole"),
    ({"split": {"a": [["q"], None, 0]}}, "two or more different names"),
    ({"split": {"a": [["q", "k"], [0, 1], 0]}}, "one size above 0"),
    ({"own": [1]}, "int in the place of a name"),
    ({"own": "a"}, "str in the place of a list"),
    ({"tied": {"a": 1}}, "in the place of a name"),
    ({"biases": 3}, "in the place of a list"),
    ({"dropout": "0.1"}, "in the place of a number"),
    ({"slot": 1.5}, "not whole"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE, ids=[str(c) for c, _ in DAMAGE])
def test_damaged_notes_are_refused(change: object, message: str):
    text = change if isinstance(change, str) else json.dumps({**GOOD, **change})  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match=f"(?s)here.*rankwise.layout.*{message}"):
        Notes.from_json(text.replace("Infinity", "1e999"), "here")
