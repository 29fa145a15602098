"""Kept states of the frozen layers: the same training without running them, or a clear refusal."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise.errors import EnvironmentFault, UserError
from rankwise.train.config import FitConfig
from rankwise.train.frozen_cache import HIDDEN, Kept, find_cut
from rankwise.train.restore import restore
from rankwise.train.run import fit


def model(kind: str, layers: int = 3) -> nn.Module:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        ConvBertConfig,
        ConvBertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        LongformerConfig,
        LongformerForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40}
    deep = {**size, "num_hidden_layers": layers, "intermediate_size": 24}
    gpt = GPT2Config(n_embd=16, n_head=2, n_layer=layers, vocab_size=40, pad_token_id=0)
    made: Callable[[], nn.Module] = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**deep)),
        "roberta": lambda: RobertaForSequenceClassification(
            RobertaConfig(**deep, pad_token_id=0, max_position_embeddings=40)
        ),
        "gpt2": lambda: GPT2ForSequenceClassification(gpt),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**deep, pad_token_id=0)),
        "tied llama": lambda: LlamaForCausalLM(
            LlamaConfig(**deep, pad_token_id=0, tie_word_embeddings=True)
        ),
        "convbert": lambda: ConvBertForSequenceClassification(
            ConvBertConfig(**deep, embedding_size=16, head_ratio=1)
        ),
        "longformer": lambda: LongformerForSequenceClassification(
            LongformerConfig(**deep, attention_window=8, sep_token_id=2)
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=layers, vocab_size=40)
        ),
    }[kind]
    return made().eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_upper_blocks_train_on_what_the_lower_ones_gave(kind: str) -> None:
    made = model(kind)
    rw.attach(made, rw.LoRA(r=2, alpha=4, layers=[2], head="freeze"))
    cut = find_cut(made, batch())
    assert len(cut.skipped) == 2
    assert cut.entry.endswith(".2")
    calls: list[str] = []
    for name in cut.skipped:
        inner = next(m for m in made.get_submodule(name).modules() if isinstance(m, nn.LayerNorm)
                     or "Norm" in type(m).__name__)  # fmt: skip
        inner.register_forward_hook(lambda *_, name=name: calls.append(name))

    def gradients(**more: Any) -> list[torch.Tensor]:
        made.zero_grad()
        made(**batch(), **more).logits.square().sum().backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    with cut.installed(made):
        whole = gradients()
        with torch.no_grad():
            states = cut.states(made, batch())
        calls.clear()
        kept = gradients(**{HIDDEN: states})
        assert calls == []
    assert whole
    assert all(map(torch.equal, whole, kept))
    assert all("forward" not in vars(m) for m in made.modules())


@pytest.mark.parametrize(("kind", "entry"), [("bert", "classifier"), ("roberta", "classifier")])
def test_a_head_alone_leaves_out_every_block(kind: str, entry: str) -> None:
    made = model(kind)
    rw.attach(made, rw.HeadOnly())
    cut = find_cut(made, batch())
    assert cut.entry == entry
    assert len(cut.skipped) == 3


def test_what_trains_at_the_bottom_leaves_nothing_to_keep() -> None:
    made = model("bert")
    rw.attach(made, rw.LoRA(r=2, alpha=4, head="freeze"))
    with pytest.raises(UserError, match=r"begins at 'bert\.encoder\.layer\.0\..*--layers"):
        find_cut(made, batch())


def test_an_update_that_the_embedding_shares_with_the_head_begins_at_the_bottom() -> None:
    made = model("tied llama")
    rw.attach(made, rw.LoRA(r=2, alpha=4, target_modules=["lm_head"], tied=True, head="freeze"))
    with pytest.raises(UserError, match=r"begins at 'model\.embed_tokens'"):
        find_cut(made, batch())


def test_blocks_that_hand_on_more_than_states_are_refused() -> None:
    made = model("t5")
    names = [
        n for n, _ in made.named_modules() if n.endswith("decoder.block.2.layer.0.SelfAttention.q")
    ]
    rw.attach(made, rw.LoRA(r=2, alpha=4, target_modules=names, head="freeze"))
    with pytest.raises(UserError, match="cannot be kept: its blocks pass on more"):
        find_cut(made, {**batch(), "decoder_input_ids": torch.tensor([[1, 2], [3, 4]])})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("convbert", "or read the padding"), ("longformer", "not one vector for each token")],
)
def test_states_that_more_than_a_rows_own_tokens_make_are_refused(kind: str, reason: str) -> None:
    made = model(kind)
    rw.attach(made, rw.LoRA(r=2, alpha=4, layers=[2], head="freeze"))
    with pytest.raises(UserError, match=reason):
        find_cut(made, batch())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.attention(x, x, x, need_weights=False)[0]).tanh()


class Chain(nn.Module):
    """Three blocks, whose calls as a whole, hooks and all, are recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.heads = nn.ModuleDict({"first": nn.Linear(8, 2)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids[:, :2])  # which no row of the batch pads
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return SimpleNamespace(logits=self.heads["first"](x))


def even() -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6], [9, 4]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_what_is_recomputed_in_backward_starts_from_the_kept_states() -> None:
    made = Chain()
    rw.attach(made, rw.LoRA(r=2, alpha=4, target_modules=["blocks.2.out"], head="freeze"))
    cut = find_cut(made, even())

    def gradients(**more: Any) -> list[Tensor]:
        made.zero_grad()
        made(**even(), **more).logits.square().sum().backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    with cut.installed(made):
        whole = gradients()
        kept = gradients(**{HIDDEN: cut.states(made, even())})
    assert whole
    assert all(map(torch.equal, whole, kept))


def test_a_layer_that_trains_is_not_left_out_where_its_weight_is_read() -> None:
    made = Chain()
    names = ["blocks.0.attention.out_proj", "blocks.2.out"]
    rw.attach(made, rw.LoRA(r=2, alpha=4, target_modules=names, head="freeze"))
    with pytest.raises(UserError, match=r"begins at 'blocks\.0\.attention'"):
        find_cut(made, even())


def test_a_head_in_a_container_that_is_never_called() -> None:
    made = Chain().requires_grad_(False)
    made.heads.requires_grad_()
    cut = find_cut(made, even())
    assert cut.entry == "heads.first"
    assert cut.skipped == ("blocks.0", "blocks.1", "blocks.2")


def test_what_trains_outside_of_all_that_is_called_is_refused() -> None:
    made = Chain().requires_grad_(False)
    with pytest.raises(UserError, match="nothing trains"):
        find_cut(made, even())
    made.heads["second"] = nn.Linear(8, 2)
    with pytest.raises(UserError, match="a part of the model trains that is not called"):
        find_cut(made, even())


def test_the_file_has_its_room_before_it_is_written_through_a_map(tmp_path: Path) -> None:
    Kept(tmp_path / "kept", [100] * 10, True, torch.zeros(1, 512))
    assert (tmp_path / "kept").stat().st_blocks * 512 >= 100 * 10 * 512 * 4


def test_a_full_disk_is_said_so() -> None:
    full = Path("/dev/full")
    if not full.exists():  # pragma: no cover
        pytest.skip("this system has no device that is always full")
    with pytest.raises(EnvironmentFault, match=r"No space left on device.*another disk"):
        Kept(full, [3, 4], True, torch.zeros(1, 8))


Options = Callable[..., FitConfig]


@pytest.mark.parametrize("more", [{"method": "head"}, {"layers": [1]}])
def test_a_run_learns_what_it_learns_without(options: Options, tmp_path: Path, more: Any) -> None:
    """The base's dropout is off, so that the frozen part gives the same each time."""
    same = {"epochs": 2, "base_dropout": False, "select": "last", **more}
    plain = fit(options(tmp_path / "plain", **same))
    kept = fit(options(tmp_path / "kept", cache=0.1, **same))
    for name, value in plain.manifest["metrics"].items():
        assert math.isclose(value, kept.manifest["metrics"][name], rel_tol=1e-4), name
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    with torch.no_grad():
        one, other = (restore(r.folder).base.model(**batch).logits for r in (plain, kept))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not list((tmp_path / "kept").glob("*.cache"))


def test_the_frozen_blocks_run_once_for_each_row(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertLayer

    seen = 0
    whole = BertLayer.forward

    def counted(self: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += len(hidden)
        return whole(self, hidden, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", counted)
    counts: list[int] = []
    for epochs in (1, 5):
        seen = 0
        fit(options(tmp_path / str(epochs), method="head", epochs=epochs, cache=0.1))
        counts.append(seen)
    assert counts[0] == counts[1]


def test_a_limit_that_is_too_low(options: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cache allows 0\.000"):
        fit(options(tmp_path / "run", method="head", cache=1e-8))
    assert not list((tmp_path / "run").glob("*.cache"))
