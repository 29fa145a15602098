"""rankwise.json: every method there and back, and every way in which a card can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

import rankwise as rw
from rankwise.attaching import Method
from rankwise.errors import ArtifactError
from rankwise.io.cards import card_of, method_of, read_card
from rankwise.layers import Activation
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
from rankwise.methods.prefix import PrefixTuning

METHODS: dict[str, Method] = {
    "head": rw.HeadOnly(("pooler",)),
    "full": rw.Full(),
    "bitfit": BitFit(),
    "bitfit with more": BitFit("train", ["pooler"]),
    "houlsby": Bottleneck(8, Houlsby(norms=False), Activation.SILU, "freeze"),
    "pfeiffer": Bottleneck(8, Pfeiffer(norms=True)),
    "after": Bottleneck(placement=After(["a", "b.*c"], ["d"], [0, 3], norms=True)),
    "after in every block": Bottleneck(placement=After("a")),
    "prefix": PrefixTuning(5, head="train"),
}


def written(of: Method, folder: Path, **changes: Any) -> Path:
    card = {**card_of(of, "tiny", ("head",)), **changes}
    path = folder / "rankwise.json"
    path.write_text(json.dumps(card), "utf-8")
    return path


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_comes_back_from_its_card(name: str, tmp_path: Path):
    path = written(METHODS[name], tmp_path)
    card = read_card(path)
    assert (card["base_model_name_or_path"], card["modules"]) == ("tiny", ["head"])
    assert method_of(card, path) == METHODS[name]


def test_a_prefix_that_grew_is_kept_as_one_of_its_length():
    card = card_of(PrefixTuning(5, hidden=64), None, ())
    assert card["options"] == {"length": 5, "head": None}


def test_what_is_written_is_readable_by_others():
    assert card_of(Bottleneck(4, Pfeiffer()), "tiny", ("classifier",)) == {
        "format": "rankwise-trained",
        "version": 1,
        "method": "Bottleneck",
        "base_model_name_or_path": "tiny",
        "modules": ["classifier"],
        "modules_to_save": [],
        "options": {
            "size": 4,
            "activation": "gelu",
            "placement": {"kind": "pfeiffer", "norms": False},
            "head": None,
        },
    }


PLACE = {"kind": "after", "norms": False, "target_modules": ["a"], "exclude_modules": []}
NET = {"size": 4, "activation": "gelu", "placement": {"kind": "pfeiffer", "norms": False}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bitfit", None, "options must be an object"),
        ("bitfit", {}, "options lacks 'head'"),
        ("bitfit", {"head": "no"}, "head must be one of None, 'train', 'freeze'"),
        ("bitfit", {"head": ["train"]}, "head must be one of None"),
        ("prefix", {"head": None, "length": 2.5}, "length must be a whole number"),
        ("prefix", {"head": None, "length": True}, "length must be a whole number"),
        ("prefix", {"head": None, "length": 0}, "length must be a whole number of 1 or more"),
        ("houlsby", {"head": None, **NET, "size": -1}, "size must be a whole number of 1 or more"),
        ("houlsby", {"head": None, **NET, "activation": "sin"}, "activation must be one of 'relu'"),
        ("houlsby", {"head": None, **NET, "placement": "x"}, "placement must be an object"),
        (
            "houlsby",
            {"head": None, **NET, "placement": {"kind": "houlsby", "norms": 1}},
            "norms must be one of True, False",
        ),
        (
            "houlsby",
            {"head": None, **NET, "placement": {**PLACE, "layers": ["a"]}},
            "layers must be a list of int",
        ),
        ("houlsby", {"head": None, **NET, "placement": PLACE}, "placement lacks 'layers'"),
        (
            "houlsby",
            {"head": None, **NET, "placement": {**PLACE, "layers": None, "target_modules": "a"}},
            "target_modules must be a list of str",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    name: str, options: object, message: str, tmp_path: Path
):
    path = written(METHODS[name], tmp_path, options=options)
    with pytest.raises(ArtifactError, match=message) as refused:
        method_of(read_card(path), path)
    assert str(path) in str(refused.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path):
    path = written(rw.Full(), tmp_path, format="x", version=2, method="LoRA", modules_to_save=[1])
    with pytest.raises(ArtifactError) as refused:
        read_card(path)
    for part in (
        "format must be",
        "version must be 1",
        "'Bottleneck', 'PrefixTuning'",
        "a list of",
    ):
        assert part in str(refused.value)
