"""Law 5 for the methods that are compared with LoRA: BitFit, bottlenecks and prefixes."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.layers import Network, Prefix
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import Bottleneck
from rankwise.methods.prefix import PrefixTuning
from rankwise.targets import find_head
from regimes import CASES, IDS, MASK, attached, base, bits, run, train, trained

PREFIXES = [name for name in CASES if "prefix" in name]
OTHERS = [name for name in CASES if "prefix" not in name]
each = pytest.mark.parametrize("name", list(CASES))
IMPLEMENTATIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# --- step 0 --------------------------------------------------------------------------------------


@IMPLEMENTATIONS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_step_0_is_the_base_bit_for_bit(
    name: str, dtype: torch.dtype, training: bool, attention: str
):
    model = base(name).to(dtype).train(training)
    model.set_attn_implementation(attention)
    before = run(model)
    rw.attach(model, CASES[name].method)
    assert run(model).dtype == dtype
    assert torch.equal(run(model), before)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_acts_from_step_0_the_same_for_the_same_seed(name: str, attention: str):
    model = base(name).eval()
    model.set_attn_implementation(attention)
    before = run(model)
    torch.manual_seed(1)
    rw.attach(model, CASES[name].method)
    first = run(model)
    assert not torch.equal(first, before)
    with rw.base(model):
        assert torch.equal(run(model), before)
    rw.detach(model)
    for seed, same in ((1, True), (2, False)):
        torch.manual_seed(seed)
        rw.attach(model, CASES[name].method)
        assert torch.equal(run(model), first) is same
        rw.detach(model)
    assert model.config._attn_implementation == attention


# --- what trains ---------------------------------------------------------------------------------


@each
def test_exactly_the_declared_parameters_train(name: str):
    case, model = CASES[name], attached(name)
    plain = base(name)
    whole = {
        f"{n}.{key}": p.numel()
        for n in case.whole
        for key, p in plain.get_submodule(n).named_parameters()
    }
    assert {n: p.numel() for n, p in trained(model).items()} == case.trained | whole
    everything = {id(p) for p in model.parameters()}
    assert len(everything) == len({id(p) for p in plain.parameters()}) + len(case.trained)


@each
def test_training_moves_every_declared_parameter_and_no_other_bit(name: str):
    model = attached(name)
    names, before = set(trained(model)), bits(model)
    train(model)
    moved = {k for k, t in bits(model).items() if not torch.equal(t, before[k])}
    # the key's bias cancels in softmax; a gradient of rounding size may not move it
    still = {n for n in names if "key.updates" in n}
    assert moved <= names
    assert names - still <= moved


@each
def test_without_dropout_eval_equals_train_and_neither_changes_a_bit(name: str):
    model = attached(name)
    train(model)
    before = bits(model)
    torch.testing.assert_close(run(model.eval()), run(model.train()), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@each
def test_what_trains_is_in_float32_beside_a_shorter_base(name: str):
    model = base(name).to(torch.bfloat16)
    rw.attach(model, CASES[name].method)
    added = [p for u in updates_of(model).values() for p in u.trained()]
    assert {p.dtype for p in added} == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


# --- there and back ------------------------------------------------------------------------------


@each
def test_detach_gives_back_the_same_modules_parameters_and_bits(name: str):
    model = base(name).eval()
    modules = {n: id(m) for n, m in model.named_modules(remove_duplicate=False)}
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    before, y = bits(model), run(model)
    rw.attach(model, CASES[name].method)
    train(model)
    rw.detach(model)
    assert {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} == modules
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(run(model), y)


@each
def test_saved_and_loaded_it_is_equal(name: str, tmp_path: Path):
    model = attached(name)
    train(model)
    folder = rw.save_adapter(model.eval(), tmp_path / "adapter", base_model_name="tiny")
    again = base(name).eval()
    state = torch.get_rng_state()
    record = rw.load_adapter(again, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(again), run(model))
    kept = CASES[name].method
    assert record.method == (PrefixTuning(kept.length) if "grown" in name else kept)  # type: ignore[attr-defined]
    other = rw.save_adapter(again, tmp_path / "other", base_model_name="tiny")
    for file in ("trained.safetensors", "rankwise.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes()
    held = load_file(folder / "trained.safetensors")
    assert not [
        n for n in held if n in base(name).state_dict() and not n.startswith(CASES[name].whole)
    ]
    if "grown" not in name:  # of which the keys and values are kept
        assert sum(t.numel() for t in held.values()) == sum(
            p.numel() for p in trained(model).values()
        )


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_can_be_copied_and_pickled(name: str, copied: Callable[[Any], Any]):
    model = attached(name)
    train(model)
    twin = copied(model.eval())
    assert torch.equal(run(twin), run(model))
    train(twin)
    assert not torch.equal(run(twin.eval()), run(model))
    rw.detach(twin)
    assert torch.equal(run(twin), run(base(name).eval()))


@each
def test_the_head_is_found_again_on_the_attached_model(name: str):
    assert find_head(attached(name)) == find_head(base(name))


# --- beside others -------------------------------------------------------------------------------


def test_all_of_them_stand_on_one_model_and_act_as_they_are_switched():
    model = base("prefix on bert").eval()
    plain = run(model)
    methods = {
        "lora": rw.LoRA(r=2, target_modules=["query", "output.dense"], head="freeze"),
        "bias": BitFit(head="freeze"),
        "net": Bottleneck(3, head="freeze"),
        "before": PrefixTuning(2, head="freeze"),
        "also": PrefixTuning(3, hidden=4, head="freeze"),
    }  # fmt: skip
    alone: dict[str, Tensor] = {}
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        rw.attach(model, method, name=name)
        rw.set_active(model, name)
        rw.set_trainable(model, name)
        train(model)
        alone[name] = run(model)
        rw.set_active(model)
        assert torch.equal(run(model), plain)
    for name in methods:
        rw.set_active(model, name)
        assert torch.equal(run(model), alone[name])
    rw.set_active(model, *methods)
    together = run(model)
    for name in methods:  # each has a part in it
        rw.set_active(model, *(other for other in methods if other != name))
        assert (run(model) - together).abs().max() > 1e-4, name
    for name in ("net", "before"):
        rw.detach(model, name)
    rw.set_active(model, "also")
    assert torch.equal(run(model), alone["also"])
    rw.detach(model)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("name", [n for n in CASES if "bitfit" not in n])
def test_what_no_weight_can_hold_is_not_merged(name: str):
    model = attached(name)
    train(model)
    before = run(model.eval())
    kind = Prefix if "prefix" in name else Network
    with pytest.raises(UserError, match="cannot be merged") as refused:
        rw.merge(model)
    assert refused.value.exit_code == 2
    for place, update in updates_of(model).items():
        assert (f"'{place}' {kind.barrier}." in str(refused.value)) == isinstance(update, kind)
    assert torch.equal(run(model), before)


def test_bitfit_is_merged_and_unmerged():
    model = attached("bitfit on bert")
    train(model)
    before = run(model.eval())
    assert rw.merge(model, probe={"input_ids": IDS, "attention_mask": MASK}).passed
    assert {type(m).__module__.partition(".")[0] for m in model.modules()} <= {
        "torch",
        "transformers",
    }
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    rw.unmerge(model)
    assert torch.equal(run(model), before)


@each
def test_each_part_has_an_effect_and_an_untrained_bottleneck_is_named(name: str):
    model, probe = attached(name).eval(), {"input_ids": IDS, "attention_mask": MASK}
    kinds = [n for n, u in updates_of(model).items() if isinstance(u, Network | Prefix)]
    if any(isinstance(u, Network) for u in updates_of(model).values()):
        with pytest.raises(rw.EffectError, match="U and its bias are all zeros"):
            rw.check_effect(model, probe)
    train(model)
    rw.check_effect(model, probe, each=True)
    found = rw.effects(model, probe)
    assert list(found) == kinds
    assert all(size > 1e-6 for size in found.values())
