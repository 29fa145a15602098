"""The certificate: what it says of honest merges, and that it stops those that are not."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

import rankwise
from rankwise.attaching import lora_layers, updates_of
from rankwise.layers import TokenRows
from rankwise.merging import Certificate, MergeError, fold, merge, unmerge
from rankwise.merging.rounding import LayerCheck


def outputs_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


# --- honest merges -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_outputs_are_measured_against_the_adapters_effect(net, ids, dtype):
    model = net(dtype, size=0.5)
    unmerged = outputs_of(model, ids)
    with rankwise.base(model):
        base = outputs_of(model, ids)
    certificate = merge(model, probe=ids)
    o = certificate.outputs
    assert certificate.passed
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert o.error == float((outputs_of(model, ids).double() - unmerged.double()).abs().max())
    assert o.effect == pytest.approx(float((unmerged.double() - base.double()).abs().max()))
    assert o.error <= o.tolerance == pytest.approx(0.1 * o.effect)
    assert [layer.name for layer in certificate.layers] == [
        "embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down",
    ]  # fmt: skip


def test_layers_are_measured_on_the_inputs_they_really_get(net, ids):
    model = net()
    got = {}
    for name, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: got.update({name: x[0]}))
    outputs_of(model, ids)
    checks = {layer.name: layer for layer in merge(model, probe=ids).layers}
    unmerge(model)
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            change = layer(got[name]) - layer.base_layer(got[name])
        assert checks[name].effect == pytest.approx(float(change.abs().max()), rel=1e-4)


def test_rows_of_tokens_that_trained_are_measured_whatever_the_probe_holds():
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2))
    method = rankwise.LoRA(
        r=1, target_modules=["1"], trainable_tokens={"0": [41, 47]}, head="freeze"
    )
    rankwise.attach(model, method)
    (rows,) = [u.token_delta for u in updates_of(model).values() if isinstance(u, TokenRows)]
    with torch.no_grad():
        rows.normal_()
    layers = {layer.name: layer for layer in merge(model, probe=torch.arange(6)).layers}
    assert layers["0"].effect == pytest.approx(float(rows.detach().abs().max()))


def test_without_a_probe_the_layers_alone_are_measured(net):
    certificate = merge(net())
    assert certificate.passed
    assert certificate.outputs is None
    assert certificate.to_json()["outputs"] is None
    assert "no probe was given" in certificate.line()
    assert all(layer.effect > 0 for layer in certificate.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_untrained_adapter_passes_without_any_error(net, ids, dtype):
    certificate = merge(net(dtype, size=0.0), probe=ids)
    assert certificate.passed
    assert certificate.outputs.error == certificate.outputs.effect == 0
    assert certificate.lost == 0


def test_dropout_of_owner_and_branch_is_off_and_modes_come_back(net, ids):
    model = net(dropout=0.4).train()
    model.blocks[1].eval()
    modes = {n: m.training for n, m in model.named_modules() if "updates" not in n}
    assert merge(model, probe=ids).passed
    assert {n: m.training for n, m in model.named_modules()} == {
        n: t for n, t in modes.items() if "base_layer" not in n
    }


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "encoding"])
def test_transformers_models_are_compared_at_their_logits(trained, tiny, ids, form):
    model = tiny("bert")
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules="all-linear"))
    trained(model, 0.3)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    probe = {
        "tensor": ids,
        "tuple": (ids, mask),
        "mapping": inputs,
        "encoding": transformers.BatchEncoding(inputs),
    }[form]
    with torch.no_grad():
        unmerged = model(ids).logits
        with rankwise.base(model):
            effect = float((model(ids).logits - unmerged).abs().max())
    certificate = merge(model, probe=probe)
    assert certificate.outputs.effect == pytest.approx(effect, rel=1e-4)
    assert certificate.outputs.error < 1e-5
    assert "(5, 7)" in certificate.probe


def test_infinities_that_the_base_has_too_are_no_fault(ids, trained):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 4)

        def forward(self, ids):
            return self.embed(ids).masked_fill(ids[..., None] < 5, float("-inf"))

    model = Masked()
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["embed"]))
    trained(model)
    ids[0, 0] = 1
    assert merge(model, probe=ids).passed


# --- merges that must not pass -------------------------------------------------------------------


def spoil(monkeypatch, change) -> None:
    honest = fold.merged_weight
    monkeypatch.setattr(
        fold, "merged_weight", lambda layer, *rest: change(layer, honest(layer, *rest))
    )


def scaled(layer, weight):
    return weight + 0.01 * (weight - layer.base_layer.weight.detach())


def turned(layer, weight):
    base = layer.base_layer.weight.detach()
    return base + (weight - base).T if base.shape[0] == base.shape[1] else weight


def doubled(layer, weight):
    return weight.bfloat16().to(weight.dtype)


def left_out(layer, weight):
    return layer.base_layer.weight.detach().clone()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("with_probe", [True, False])
@pytest.mark.parametrize("fault", [scaled, turned, doubled, left_out])
def test_faults_in_the_merged_weight_are_found(trained, monkeypatch, fault, keep, with_probe):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["0", "2"]))
    trained(model, 0.2)
    before, x = dict(model.named_modules()), torch.randn(4, 12)
    unmerged = outputs_of(model, x)
    spoil(monkeypatch, fault)
    with pytest.raises(MergeError, match=r"FAILED: .* of 0 is not W0 \+ δ rounded once") as caught:
        merge(model, keep=keep, probe=x if with_probe else None)
    assert not caught.value.certificate.passed
    assert dict(model.named_modules()) == before
    assert torch.equal(outputs_of(model, x), unmerged)
    monkeypatch.undo()
    assert merge(model, keep=keep, probe=x).passed


def test_a_nan_that_attention_hides_is_found_in_the_weight(trained, tiny, ids):
    model = tiny("llama")
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["q_proj"]))
    trained(model)
    name = "model.layers.1.self_attn.q_proj"
    lora_layers(model)[name].update.lora_A.data.fill_(float("nan"))
    with pytest.raises(MergeError, match=rf"{name} is not finite: look at its lora_A") as caught:
        merge(model, probe=ids)
    certificate = caught.value.certificate
    assert not certificate.finite
    assert name in certificate.nonfinite
    json.dumps(certificate.to_json(), allow_nan=False)


def test_a_trained_head_that_is_not_finite_is_found(net):
    model = net()
    model.head.weight.data[0, 0] = float("inf")
    with pytest.raises(MergeError, match="not finite: head"):
        merge(model)


@pytest.mark.parametrize("with_probe", [True, False])
def test_an_update_that_rounding_destroys_is_refused_with_the_remedy(ids, net, with_probe):
    probe = ids if with_probe else None
    model = net(torch.bfloat16, size=1e-4)
    with pytest.raises(MergeError, match=r"merge in float32 \(model.float\(\)\)") as caught:
        merge(model, probe=probe)
    assert caught.value.certificate.lost > 0.5
    assert merge(net(torch.bfloat16, size=0.5), probe=probe).passed
    assert merge(model.float(), probe=probe).passed  # the remedy


def test_an_owner_with_a_weight_of_its_own_is_found_by_the_outputs(ids, trained):
    class Caching(nn.Module):
        """Copies the weight at its first run, as an inference cache might."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 3)
            self.cache = []

        def forward(self, x):
            if type(self.linear) is nn.Linear and x.shape[0] == 5:
                self.cache = self.cache or [self.linear.weight.clone()]
                return x @ self.cache[0].T
            return self.linear(x)

    model = Caching()
    model(ids.float())
    rankwise.attach(model, rankwise.LoRA(r=2, target_modules=["linear"]))
    trained(model, 0.5)
    with pytest.raises(MergeError, match=r"the outputs move by .* holds a copy of a weight"):
        merge(model, probe=ids.float())


# --- the value -----------------------------------------------------------------------------------


def layer_check(**changes: object) -> LayerCheck:
    values = {
        "name": "a.b", "error": 1e-7, "bound": 2e-6, "effect": 0.25, "ratio": 0.05,
        "weight_ratio": 0.5, "update": 1.0, "lost": 1e-6, "finite": True,
        "rows": 8, "of": 8, "sums": 0.0,
    }  # fmt: skip
    return LayerCheck(**{**values, **changes})


def certificate(*layers: LayerCheck, nonfinite: tuple[str, ...] = ()) -> Certificate:
    return Certificate("float32", layers, None, nonfinite, (), "seeded")


def test_the_json_form_is_complete_and_strict(net, ids):
    made = merge(net(), probe=ids).with_files(base="b0", merged="m0").with_files(adapter="a0")
    form = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert form["passed"] is form["finite"] is True
    assert form["dtype"] == "float32"
    assert form["sha256"] == {"base": "b0", "adapter": "a0", "merged": "m0"}
    assert form["outputs"].keys() >= {"error", "effect", "tolerance"}
    assert form["layers"][1].items() >= {"name": "blocks.0.up", "passed": True}.items()
    assert all(layer["error"] <= layer["bound"] < layer["effect"] for layer in form["layers"])
    assert form["probe"] == "int64 (5, 7)"
    assert form["problems"] == form["untied"] == []


def test_numbers_that_are_not_finite_are_null_in_json():
    nan = float("nan")
    made = certificate(layer_check(error=nan, ratio=nan))
    assert made.to_json()["layers"][0]["error"] is None
    assert made.to_json()["layers"][0]["passed"] is made.passed is False


def test_the_line_is_one_line_and_counts_what_it_leaves_out():
    good = certificate(layer_check(), layer_check(name="c", ratio=0.2)).line()
    assert good == (
        "merge certificate passed: 2 layer(s) in float32, all finite; largest error against its "
        "bound at c: 1e-07 (bound 2e-06, effect 0.25); outputs not compared, as no probe was given"
    )
    bad = certificate(*[layer_check(name=f"n{i}", weight_ratio=3.0) for i in range(5)]).line()
    assert bad.startswith("merge certificate FAILED: the merged weight of n0 is not")
    assert bad.endswith("; and 2 more")
    assert "\n" not in good + bad


def test_the_value_cannot_be_changed_and_can_be_copied():
    made = certificate(layer_check())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.dtype = "float64"
    assert copy.deepcopy(made) == made
