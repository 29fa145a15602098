"""The sketch of a base: unmoved by a change of dtype, moved by anything else."""

import json

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import ArtifactError
from rankwise.io.sketch import Sketch, agree, differences, own_modules, sketch

NAMES = ["blocks.0.query", "blocks.1.query", "embed"]


@pytest.mark.parametrize("first", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_change_of_dtype_leaves_the_sketch(base, first: torch.dtype, second: torch.dtype):
    for seed in range(5):
        taken = sketch(base(seed=seed).to(first), NAMES)
        assert differences(taken, base(seed=seed).to(second)) == []


def test_the_values_are_those_of_the_weight():
    layer = nn.Linear(15, 1, bias=False)
    layer.weight.data = torch.arange(15.0)[None]
    taken = sketch(nn.Sequential(layer), ["0"])
    assert taken.modules["0"] == pytest.approx((1015**0.5, 0, 2, 4, 6, 8, 10, 12, 14))


def test_another_base_is_named_with_its_first_module(base):
    taken = sketch(base(), NAMES, "tiny/base")
    (sentence,) = differences(taken, base(seed=1))
    assert "another base ('tiny/base'): the weight of 'blocks.0.query' has a sampled" in sentence
    assert "3 of 3 weights differ" in sentence


def test_a_base_trained_a_little_further_is_another(base):
    model = base()
    taken = sketch(model, NAMES)
    model.blocks[1].query.weight.data *= 1.01
    (sentence,) = differences(taken, model)
    assert "'blocks.1.query'" in sentence
    assert "1 of 3" in sentence


def test_an_adapter_on_the_base_does_not_show(base, trained):
    model = trained(rw.LoRA(r=2, target_modules=["query", "embed"], head="freeze"))
    assert sketch(model, NAMES) == sketch(base(), NAMES)


def test_it_survives_its_way_through_text(base):
    taken = sketch(base(), NAMES, "ä")
    back = Sketch.from_json(taken.to_json(), "here")
    assert back.base == "ä"
    assert differences(back, base()) == []
    for name, values in taken.modules.items():
        assert back.modules[name] == pytest.approx(values, rel=1e-5)


def test_weights_without_numbers_are_left_out():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    assert sketch(model, ["0"]).modules == {}


class Several(nn.Module):
    """Weights that are not the weight of a layer of their own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.packed = nn.MultiheadAttention(4, 2)
        self.apart = nn.MultiheadAttention(4, 2, kdim=2)
        self.fused = nn.Linear(4, 12)
        self.bank = nn.Parameter(torch.randn(2, 3, 4))
        self.owner = nn.ParameterDict({"bank": nn.Parameter(torch.randn(2, 3, 4))})


OWNED = ["packed.q_proj", "packed.v_proj", "apart.k_proj", "fused.b", "owner.bank"]


def test_parts_and_parameters_are_sketched_by_what_holds_them():
    model = Several()
    taken = sketch(model, OWNED)
    assert list(taken.modules) == [
        "packed.in_proj_weight",
        "apart.k_proj_weight",
        "fused",
        "owner.bank",
    ]
    assert taken.modules["owner.bank"][1] == pytest.approx(model.owner["bank"][0, 0, 0].item())
    assert differences(taken, model.bfloat16()) == []
    (sentence,) = differences(taken, Several(seed=1))
    assert "'packed.in_proj_weight' has a sampled norm of" in sentence
    assert "4 of 4 weights differ" in sentence


def test_an_update_of_a_part_or_a_parameter_does_not_show():
    model = Several()
    taken = sketch(model, OWNED)
    targets = ["packed.q_proj", "apart.k_proj", "owner.bank"]
    rw.attach(model, rw.LoRA(r=1, target_modules=targets, head="freeze"))
    torch.nn.init.ones_(model.owner.updates["default/bank"].lora_B)
    assert differences(taken, model) == []


def test_another_adapters_head_does_not_show(base):
    model = base()
    taken = sketch(model, ["head"])
    rw.attach(model, rw.HeadOnly())
    model.head.weight.data += 1
    assert differences(taken, model) == []
    assert list(own_modules(model)) == [name for name, _ in base().named_modules() if name]


GOOD = {"version": 2, "base": None, "modules": {"a": [1.0] * 9}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not valid JSON"),
        (json.dumps({**GOOD, "version": 3}), "no sketch of version 2"),
        (json.dumps({**GOOD, "modules": [1]}), "no sketch of version 2"),
        (json.dumps({**GOOD, "modules": {"a": [1.0] * 8}}), "damaged"),
        (json.dumps({**GOOD, "modules": {"a": ["1"] * 9}}), "damaged"),
        (json.dumps({**GOOD, "modules": {"a": [10**400] * 9}}), "damaged"),
    ],
)
def test_a_damaged_sketch_is_refused(text: str, message: str):
    assert Sketch.from_json(json.dumps(GOOD), "here").modules == {"a": (1.0,) * 9}
    with pytest.raises(ArtifactError, match=f"here.*{message}"):
        Sketch.from_json(text, "here")


def test_weights_agree_up_to_their_dtype():
    weight = torch.randn(20, 8)
    assert agree(weight, weight.bfloat16())
    assert agree(weight.half(), weight.bfloat16())
    changed = weight.clone()
    changed[3] += 0.1
    assert not agree(weight, changed)
    assert not agree(weight, weight[:10])


def test_a_sketch_of_version_1_is_compared_by_its_entries() -> None:
    """Its norms were over all numbers of a weight and not over some of them."""
    model = nn.Sequential(nn.Linear(90, 100))
    raw = json.loads(sketch(model, ["0"]).to_json())
    norm = float(model[0].weight.detach().norm())
    raw |= {"version": 1, "modules": {"0": [norm, *raw["modules"]["0"][1:]]}}
    old = Sketch.from_json(json.dumps(raw), "here")
    assert differences(old, model) == []
    (told,) = differences(old, nn.Sequential(nn.Linear(90, 100)))
    assert "was made on another base" in told
    assert "norm" not in told
    assert Sketch.from_json(old.to_json(), "there").modules == {}
