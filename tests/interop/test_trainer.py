"""transformers.Trainer trains an attached model: only adapters change, checkpoints load back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import rankwise as rw

pytest.importorskip("accelerate")

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(hidden_dropout_prob=0.0, **SMALL))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SMALL))


def rows(number: int = 16) -> list[dict[str, Any]]:
    ids = torch.randint(1, 32, (number, 6), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": row[0] % 2}
        for row in ids
    ]


def language_rows() -> list[dict[str, Any]]:
    return [{**row, "labels": row["input_ids"]} for row in rows()]


def fit(model: nn.Module, data: list[dict[str, Any]], folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_steps=4,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}


def test_the_trainer_changes_adapters_and_head_and_nothing_else(tmp_path: Path):
    model = bert()
    rw.attach(model, rw.LoRA(r=2, target_modules=["query", "value"]))
    before = state(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    fit(model, rows(), tmp_path)
    assert changed(model, before) == trainable
    assert len(trainable) == 4 * 2 + 2


def test_a_checkpoint_of_the_trainer_loads_back(tmp_path: Path):
    model = bert()
    base = state(model)
    method = rw.LoRA(r=2, target_modules=["query", "value"])
    rw.attach(model, method)
    fit(model, rows(), tmp_path)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    fresh = bert()
    fresh.load_state_dict(base)
    rw.attach(fresh, method)
    fresh.load_state_dict(saved)
    ids = torch.stack([row["input_ids"] for row in rows()])
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)


def test_the_trainer_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path):
    torch.manual_seed(3)
    straight, halted = bert(), bert()
    halted.load_state_dict(straight.state_dict())
    method = rw.LoRA(r=2, target_modules=["query", "value"])
    for model in (straight, halted):
        torch.manual_seed(4)
        rw.attach(model, method)
    fit(straight, rows(), tmp_path / "a", save_strategy="steps")
    torch.manual_seed(4)
    trainer = fit(halted, rows(), tmp_path / "b", save_strategy="steps")
    expected = state(straight)
    assert changed(halted, expected) == set()
    with torch.no_grad():
        for parameter in halted.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert changed(halted, expected) == set()


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_keeps_the_gradients(options: dict[str, bool]):
    """Frozen embeddings give blocks an input without gradient, which lost them in other libraries.

    With re-entrant checkpointing torch needs one input that requires a gradient; transformers'
    enable_input_require_grads gives it one.
    """
    model = llama().train()
    rw.attach(model, rw.LoRA(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.stack([row["input_ids"] for row in rows()])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable(options or None)
    if options.get("use_reentrant"):
        model.enable_input_require_grads()
    checkpointed = gradients()
    assert set(plain) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(checkpointed) == set(plain)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(checkpointed[name], gradient)


def test_the_trainer_with_gradient_checkpointing_trains_every_adapter(tmp_path: Path):
    model = llama()
    rw.attach(model, rw.LoRA(r=2, target_modules="all-linear"))
    before = state(model)
    fit(model, language_rows(), tmp_path, activation_checkpointing=True, save_strategy="no")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed(model, before) == trainable
    assert len(trainable) == 14 * 2


def test_an_attached_language_model_generates_what_its_forward_says():
    model: Any = llama().eval()
    rw.attach(model, rw.LoRA(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[1, 5, 9]])
    greedy = ids
    with torch.no_grad():
        for _ in range(4):
            following = model(greedy).logits[:, -1].argmax(-1, keepdim=True)
            greedy = torch.cat([greedy, following], dim=1)
        found = model.generate(
            ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(found, greedy)
