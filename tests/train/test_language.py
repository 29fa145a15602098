from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankwise as rw
from rankwise.attaching import low_rank_updates
from rankwise.data.encode import Encoded
from rankwise.train import language
from rankwise.train.language import POSITIONS, positions, row_losses, summed_loss

VOCABULARY = 1003
TARGETS = [60, 90, 0, 75]  # of rows that begin with a prompt of thirty tokens


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **more,
    )
    return LlamaForCausalLM(config).double()


def bounded() -> Any:
    """A model that bounds its logits: tanh(logits / 3) · 3."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=3.0,
    )
    model = Gemma2ForCausalLM(config).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # so that the bound is felt
    return model


def batch_of(counts: list[int] = TARGETS, prompt: int = 30) -> dict[str, Tensor]:
    torch.manual_seed(1)
    length = prompt + max(counts)
    ids = torch.randint(VOCABULARY, (len(counts), length))
    mask = torch.tensor([[1] * (prompt + n) + [0] * (length - prompt - n) for n in counts])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    rows = [row[: prompt + n].tolist() for row, n in zip(labels, counts, strict=True)]
    encoded = Encoded(ids.tolist(), [len(r) for r in rows], list(range(len(rows))), rows)
    at = positions(encoded, list(range(len(rows))), length)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        POSITIONS: torch.tensor(at, dtype=torch.int64),
    }


def whole(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The losses of the rows by the logits of every token."""
    inputs = {n: v for n, v in batch.items() if n not in ("labels", POSITIONS)}
    logits = model(**inputs).logits[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(dim=1)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (loss / 7).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Largest(TorchDispatchMode):
    """The most elements that any one tensor of floating-point numbers had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest targets at a time, 64, so that those of a test are several chunks."""
    monkeypatch.setattr(language, "_BYTES", 1)


METHODS = {
    "layers": rw.LoRA(r=4, target_modules=["q_proj", "v_proj"], head="freeze"),
    "output layer": rw.LoRA(r=4, target_modules=["v_proj", "lm_head"]),
    "dora": rw.LoRA(r=4, target_modules=["lm_head"], dora=True),
    "head": rw.LoRA(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "full": rw.Full(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [llama, bounded])
def test_losses_and_gradients_are_those_of_all_logits(make: Callable[[], Any], name: str) -> None:
    model, batch = make(), batch_of()
    rw.attach(model, METHODS[name])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    wanted = whole(model, batch)
    expected = gradients(model, wanted.sum())
    with torch.no_grad():
        torch.testing.assert_close(row_losses(model, batch), wanted, rtol=1e-6, atol=1e-5)
    loss = summed_loss(model, batch)
    torch.testing.assert_close(loss, wanted.sum(), rtol=1e-6, atol=0)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    assert found
    for key, grad in found.items():
        assert (grad - expected[key]).norm() <= 1e-5 * expected[key].norm(), key
    assert wanted[2] == 0  # the row without targets
    del batch[POSITIONS]  # which are then looked for
    assert torch.equal(summed_loss(model, batch), loss)


def test_an_update_that_the_output_layer_shares_gets_the_gradient_from_there_as_well() -> None:
    model, batch = llama(tie_word_embeddings=True), batch_of()
    rw.attach(model, rw.LoRA(r=4, target_modules=["embed_tokens"], tied=True, head="freeze"))
    for update in low_rank_updates(model).values():
        nn.init.normal_(update.lora_A, std=0.1)
    expected = gradients(model, whole(model, batch).sum())
    found = gradients(model, summed_loss(model, batch))
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert (grad - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


@pytest.mark.parametrize("name", ["layers", "output layer"])
def test_the_logits_are_never_there_together(name: str) -> None:
    model, batch = llama(), batch_of()
    rw.attach(model, METHODS[name])
    summed_loss(model, batch)  # looks at the model
    with Largest() as seen:
        summed_loss(model, batch).backward()
    assert seen.elements == 64 * VOCABULARY
    with Largest() as seen:
        whole(model, batch).sum().backward()
    assert seen.elements == batch["labels"].numel() * VOCABULARY


def test_only_targets_pass_the_output_layer() -> None:
    model, batch = llama(), batch_of()
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _out: shapes.append(args[0].shape[-2]))
    row_losses(model, batch)
    assert sum(shapes) == sum(TARGETS)  # calls without rows are those that look


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    model, batch = llama(), batch_of([0, 0])
    rw.attach(model, METHODS["layers"])
    loss = summed_loss(model, batch)
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(model, loss).values())
    assert row_losses(model, batch).tolist() == [0, 0]


def test_a_half_precision_model_keeps_its_own_format() -> None:
    model, batch = llama().bfloat16(), batch_of()
    rw.attach(model, METHODS["layers"])
    wanted = whole(model, batch).sum()
    expected = gradients(model, wanted)
    loss = summed_loss(model, batch)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)
    for key, grad in gradients(model, loss).items():
        cosine = F.cosine_similarity(grad.flatten(), expected[key].flatten(), dim=0)
        assert cosine > 0.99 or expected[key].abs().max() == 0


def test_the_model_gives_its_logits_afterwards() -> None:
    model, batch = llama(), batch_of()
    before = model(batch["input_ids"]).logits
    summed_loss(model, batch)
    assert torch.equal(model(batch["input_ids"]).logits, before)
    with pytest.raises(IndexError):
        summed_loss(model, {**batch, "input_ids": batch["input_ids"] + VOCABULARY})
    assert torch.equal(model(batch["input_ids"]).logits, before)


def test_a_model_that_reads_its_own_logits_is_served_too() -> None:
    model, batch = llama(), batch_of()

    def read(_model: nn.Module, _args: object, made: Any) -> None:
        made.last = made.logits[:, -1]  # of which there is none without logits

    model.register_forward_hook(read)
    wanted = whole(model, batch).sum()
    torch.testing.assert_close(summed_loss(model, batch), wanted, rtol=1e-6, atol=0)


def test_looking_draws_no_random_numbers_and_leaves_the_mode() -> None:
    model, batch = llama(attention_dropout=0.5).train(), batch_of()
    model.lm_head.eval()
    before = torch.get_rng_state()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert language._output_layer(model, inputs) is model.lm_head
    assert torch.equal(torch.get_rng_state(), before)
    assert model.model.layers[0].training
    assert not model.lm_head.training
