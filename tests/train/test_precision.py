import hashlib

import pytest
import torch
from torch import nn

from rankwise.attaching import attach
from rankwise.errors import EnvironmentFault
from rankwise.methods.lora import LoRA
from rankwise.train.precision import (
    Choice,
    allocation_failed,
    cast_frozen,
    choose_device,
    choose_dtype,
)

CPU = torch.device("cpu")


class Network(nn.Module):
    """An encoder with a buffer, and a head that is to train."""

    frequencies: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("frequencies", torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)).float() * self.frequencies)


def test_a_named_device_is_taken_or_refused() -> None:
    assert choose_device("cpu") == CPU
    missing = [n for n in ("cuda", "mps") if not getattr(torch.backends, n).is_built()]
    for name in missing:
        with pytest.raises(EnvironmentFault, match=f"--device {name} was asked for") as caught:
            choose_device(name)
        assert caught.value.exit_code == 4
        assert "cpu" in str(caught.value)


def test_auto_takes_the_best_device_there_is() -> None:
    found = choose_device("auto").type
    assert found == ("cuda" if torch.cuda.is_available() else found)
    assert found in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_format_is_taken(name: str) -> None:
    assert choose_dtype(name, CPU, 32, True).dtype == getattr(torch, name)


def test_auto_measures_a_frozen_base_and_keeps_a_training_one_in_float32() -> None:
    assert choose_dtype("auto", CPU, 32, False).dtype == torch.float32
    choice = choose_dtype("auto", CPU, 64, True)
    assert choice.dtype in (torch.float32, torch.bfloat16)
    assert "measured here" in choice.reason


def test_a_choice_has_the_name_that_flags_use() -> None:
    assert Choice(torch.bfloat16, "asked for").name == "bfloat16"


def test_only_what_is_frozen_is_cast() -> None:
    model = Network()
    attach(model, LoRA(r=2, target_modules="body", head="train"))
    cast_frozen(model, torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds == {
        "body.base_layer.weight": torch.bfloat16,
        "body.base_layer.bias": torch.bfloat16,
        "body.updates.default.lora_A": torch.float32,
        "body.updates.default.lora_B": torch.float32,
        "head.weight": torch.float32,
        "head.bias": torch.float32,
        "frequencies": torch.float32,
    }


def test_a_trained_head_takes_the_base_s_bfloat16() -> None:
    class Plain(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = Plain()
    attach(model, LoRA(r=2, target_modules="body", head="train"))
    cast_frozen(model, torch.bfloat16)
    out = model(torch.randn(3, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    out.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    factors = {f"body.updates.default.lora_{side}" for side in "AB"}
    assert trained == factors | {"head.weight", "head.bias"}


def test_training_on_a_cast_base_leaves_its_bits() -> None:
    model = Network()
    attach(model, LoRA(r=2, target_modules="body", head="train"))
    cast_frozen(model, torch.bfloat16)

    def bits() -> str:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        raw = b"".join(p.detach().view(torch.int16).numpy().tobytes() for p in frozen)
        return hashlib.sha256(raw).hexdigest()

    before = bits()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
    assert bits() == before


def test_what_counts_as_running_out_of_memory() -> None:
    assert allocation_failed(torch.OutOfMemoryError("CUDA out of memory"))
    assert allocation_failed(MemoryError())
    assert not allocation_failed(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not allocation_failed(ValueError("not enough memory"))


def test_the_cpu_s_own_words_count() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert allocation_failed(caught.value)


def test_a_copy_in_the_middle_gives_the_bases_format_and_a_head_its_own() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import rankwise as rw

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([[1, 2, 3]])
    wanted = model(ids).logits
    rw.attach(model, rw.LoRA(modules_to_save=["embed_tokens"], head="train"))
    cast_frozen(model, torch.bfloat16)
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, wanted, atol=0.02)
    logits.sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.grad is not None for p in trained.values())
    rw.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids).logits.dtype == torch.bfloat16
