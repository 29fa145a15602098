"""recompute_activations on whole models: the bits, the bytes, and what other verbs make of it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankwise as rw
from counting import bytes_kept
from rankwise.layers import LoRALayer

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
WIDE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {  # class, config, and how many norms, activations and gated MLPs there are
    "Llama": ("LlamaForCausalLM", transformers.LlamaConfig(**WIDE), (5, 0, 2)),
    "Qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config(**WIDE, head_dim=8), (9, 0, 2)),
    "Gemma2": ("Gemma2ForCausalLM", transformers.Gemma2Config(**WIDE, head_dim=8), (9, 0, 2)),
    "Phi3": (
        "Phi3ForCausalLM",
        transformers.Phi3Config(
            **WIDE, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
        ),
        (5, 0, 2),
    ),
    "GPT2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=40,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        (5, 2, 0),
    ),
    "Bert": (
        "BertForMaskedLM",
        transformers.BertConfig(**SIZES, intermediate_size=48, **CALM),
        (6, 3, 0),
    ),
}


def attached(name: str, dtype: torch.dtype, dropout: float = 0.0, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    made = getattr(transformers, kind)(copy.deepcopy(config)).to(dtype).train()
    kinds = {
        n.rsplit(".", 1)[-1]
        for n, m in made.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D")
    }
    targets = sorted(kinds - {"lm_head", "decoder"})
    rw.attach(made, rw.LoRA(2, 4, target_modules=targets, dropout=dropout, head="freeze", **more))
    for parameter_name, parameter in made.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return made


def results(model: nn.Module) -> dict[str, Tensor]:
    """The loss and the gradients of one step."""
    torch.manual_seed(1)  # for dropout
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def kept(model: nn.Module, **batch: Tensor) -> int:
    """Bytes of all storages kept for backward, parameters and buffers left out."""
    return bytes_kept(lambda: model(**batch).loss, *model.parameters(), *model.buffers())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same_bit_for_bit(name: str, dtype: torch.dtype, dropout: float):
    model = attached(name, dtype, dropout)
    before, bytes_before = results(model), kept(model, input_ids=IDS, labels=IDS)
    done = rw.recompute_activations(model)
    found = (len(done.norms), len(done.activations), len(done.gated))
    assert found == MODELS[name][2]
    assert len(before) > 8
    assert equal(results(model), before)
    assert kept(model, input_ids=IDS, labels=IDS) < 0.85 * bytes_before


def test_gradients_are_those_of_the_plain_model_with_the_sum_of_weights():
    """In float64 against autograd through W0 + s B A, by the chain rule."""
    model = attached("Llama", torch.float64)
    plain = copy.deepcopy(model)
    updates = {n: m.update for n, m in plain.named_modules() if isinstance(m, LoRALayer)}
    rw.recompute_activations(model)
    found = results(model)
    rw.detach(plain)
    weights = {
        f"{name}.weight": plain.get_parameter(f"{name}.weight") + update.factors().delta().detach()
        for name, update in updates.items()
    }
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    batch = {"input_ids": IDS, "labels": IDS}
    loss = torch.func.functional_call(plain, weights, (), batch).loss
    torch.testing.assert_close(loss.detach(), found["loss"])
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for (name, update), G in zip(updates.items(), gradients, strict=True):
        s, A, B = update.scale, update.lora_A.detach(), update.lora_B.detach()
        torch.testing.assert_close(found[f"{name}.updates.default.lora_A"], s * B.T @ G)
        torch.testing.assert_close(found[f"{name}.updates.default.lora_B"], s * G @ A.T)


def bytes_per_token(prepare: Callable[[nn.Module], object], width: int = 256) -> float:
    """Bytes kept for each token by one layer of a bfloat16 Llama, over the width."""
    found: list[int] = []
    tokens = torch.arange(32)[None]
    for layers in (2, 3):
        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=7 * width // 2,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_hidden_layers=layers,
            vocab_size=32,
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        rw.attach(model, rw.LoRA(8, 16, target_modules=names, head="freeze"))
        prepare(model)
        found.append(kept(model, input_ids=tokens, labels=tokens))
    return (found[1] - found[0]) / (tokens.numel() * width)


def test_a_layer_of_a_llama_keeps_a_bound_of_bytes_for_each_token():
    assert bytes_per_token(lambda model: None) > 40
    assert bytes_per_token(rw.recompute_activations) < 24  # 23 of the plain frozen layer, and P


def test_the_way_back():
    model = attached("Llama", torch.bfloat16)
    before, size = results(model), kept(model, input_ids=IDS, labels=IDS)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    done = rw.recompute_activations(model)
    assert rw.recompute_activations(model) == done
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert rw.keep_activations(model) == len(done.norms) + len(done.gated)
    assert rw.keep_activations(model) == 0
    assert not any("forward" in vars(m) for m in model.modules())
    assert equal(results(model), before)
    assert kept(model, input_ids=IDS, labels=IDS) == size


def _saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["copy", "pickle", "save"],
)
def test_a_copy_recomputes_by_itself(again: Callable[[nn.Module], nn.Module]):
    model = attached("Llama", torch.bfloat16)
    rw.recompute_activations(model)
    before, size = results(model), kept(model, input_ids=IDS, labels=IDS)
    twin = again(model)
    assert kept(twin, input_ids=IDS, labels=IDS) == size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert equal(results(twin), before)


def _merge(model: nn.Module) -> None:
    rw.merge(model)


def _merge_and_back(model: nn.Module) -> None:
    rw.merge(model)
    rw.unmerge(model)


def _detach(model: nn.Module) -> None:
    rw.detach(model)


def _attach_another(model: nn.Module) -> None:
    torch.manual_seed(4)
    rw.attach(model, rw.LoRA(1, 2, target_modules=["down_proj"], head="freeze"), name="more")


def _train_biases(model: nn.Module) -> None:
    rw.attach(model, rw.BitFit(), name="more")


@pytest.mark.parametrize("then", [_merge, _merge_and_back, _detach, _attach_another])
def test_the_other_verbs_do_what_they_do_without_it(then: Callable[[nn.Module], None]):
    plain, model = attached("Llama", torch.float32), attached("Llama", torch.float32)
    rw.recompute_activations(model)
    then(plain)
    then(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_rows_of_a_batch_through_different_adapters():
    plain, model = attached("Llama", torch.bfloat16, 0.3), attached("Llama", torch.bfloat16, 0.3)
    rw.recompute_activations(model)
    found: list[dict[str, Tensor]] = []
    for made in (plain, model):
        _attach_another(made)
        with rw.using_rows(made, ["more", "default"]):
            found.append(results(made))
    assert any(".more." in name for name in found[0])
    assert equal(*found)


def test_biases_of_norms_train_and_merge():
    plain, model = attached("Bert", torch.float32), attached("Bert", torch.float32)
    count = sum(map(len, vars(rw.recompute_activations(model)).values()))
    for made in (plain, model):
        _train_biases(made)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "lora" not in name:
                    parameter.add_(0.5)
    assert equal(results(model), results(plain))
    assert any("LayerNorm" in name for name in results(model))
    for made in (plain, model):
        rw.merge(made)
    assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)
    rw.unmerge(model)
    rw.detach(model)
    assert rw.keep_activations(model) == count


def test_a_norm_that_begins_to_train_gets_its_gradient():
    plain, model = attached("Llama", torch.bfloat16), attached("Llama", torch.bfloat16)
    rw.recompute_activations(model)
    for made in (plain, model):
        made.model.layers[0].input_layernorm.weight.requires_grad_()
    found = results(model)
    assert "model.layers.0.input_layernorm.weight" in found
    assert equal(found, results(plain))
    assert "model.layers.0.input_layernorm" not in rw.recompute_activations(model).norms


def test_a_norm_that_is_used_twice():
    plain, model = attached("Llama", torch.bfloat16), attached("Llama", torch.bfloat16)
    for made in (plain, model):
        for layer in made.model.layers:
            layer.post_attention_layernorm = layer.input_layernorm = made.model.norm
    rw.recompute_activations(model)
    assert equal(results(model), results(plain))


def test_hooks_see_what_they_saw():
    plain, model = attached("Llama", torch.bfloat16), attached("Llama", torch.bfloat16)
    rw.recompute_activations(model)
    seen: list[list[str]] = [[], []]
    for made, names in zip((plain, model), seen, strict=True):
        layer = made.model.layers[1]
        for part in ("mlp", "mlp.act_fn", "input_layernorm"):
            module = layer.get_submodule(part)
            module.register_forward_hook(lambda m, a, y, part=part, to=names: to.append(part))
            module.register_full_backward_hook(lambda m, a, b, part=part, to=names: to.append(part))
    assert equal(results(model), results(plain))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool):
    plain, model = attached("Llama", torch.bfloat16, 0.3), attached("Llama", torch.bfloat16, 0.3)
    rw.recompute_activations(model)
    for made in (plain, model):
        made.activation_checkpointing_enable({"use_reentrant": reentrant})
        made.enable_input_require_grads()
    assert equal(results(model), results(plain))


def test_under_autocast():
    model = attached("Llama", torch.float32)
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(results(model))
        rw.recompute_activations(model)
    torch.testing.assert_close(*found)


def test_a_model_compiles_without_a_graph_break():
    model = attached("Llama", torch.float32)
    before = results(model)
    rw.recompute_activations(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), before["loss"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, before[name])


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_parameters_that_are_others_in_backward(name: str):
    """functional_call lends them to the forward alone, and loading by assignment replaces them."""
    model = attached(name, torch.float32)
    lent = {n: 3 * p.detach() + 1 for n, p in model.named_parameters() if "orm" in n}
    found: list[dict[str, Tensor]] = []
    for recomputing in (False, True):
        again = copy.deepcopy(model)
        if recomputing:
            rw.recompute_activations(again)
        batch = {"input_ids": IDS, "labels": IDS}
        loss = torch.func.functional_call(again, lent, (), batch).loss
        again(**batch).loss.backward()
        again.load_state_dict({n: t + 1 for n, t in lent.items()}, strict=False, assign=True)
        loss.backward()
        found.append({n: p.grad for n, p in again.named_parameters() if p.grad is not None})
    assert found[0]
    assert equal(*found)


def test_a_hook_that_writes_behind_autograd():
    plain, again = (attached("Llama", torch.float32) for _ in range(2))
    rw.recompute_activations(again)
    for model in (plain, again):
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.register_forward_hook(_double)
    assert equal(results(plain), results(again))


def _double(_module: nn.Module, _inputs: object, made: Tensor) -> None:
    made.data.mul_(2)
