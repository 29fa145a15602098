"""Several adapters in one batch of a transformers model: trained, searched with beams, counted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise as rw
from counting import kept_for_backward
from mixed import move
from rankwise.attaching import updates_of
from rankwise.errors import UserError

NAMES, ROWS, STEPS = ("a", "b", "c"), 3, 20
RATES = {"a": 3e-3, "b": 1e-3, "c": 1e-2}
RANKS = {"a": 2, "b": 5, "c": 3}


def classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return model.double().train()


def put_on(model: nn.Module, name: str) -> None:
    torch.manual_seed(100 + ord(name))
    rw.attach(model, rw.LoRA(r=RANKS[name], target_modules=["query", "value", "dense"],
              exclude_modules=["pooler.dense"], bias="adapted"), name=name)  # fmt: skip


def batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows for all three, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 26, (3 * ROWS, 7), generator=draw)
    mask = torch.arange(7)[None] < torch.randint(3, 8, (3 * ROWS, 1), generator=draw)
    labels = torch.randint(0, 3, (3 * ROWS,), generator=draw)
    return {"input_ids": ids, "attention_mask": mask.long()}, labels


def held(model: nn.Module, name: str) -> dict[str, Tensor]:
    parts = {**updates_of(model, name), **rw.attachment(model, name).copies}
    return {f"{n} {k}": p for n, m in parts.items() for k, p in m.named_parameters()}


def run_alone(base: Any, name: str, place: int) -> tuple[dict[str, Tensor], list[float]]:
    model = copy.deepcopy(base)
    put_on(model, name)
    optimizer = torch.optim.AdamW(rw.parameter_groups(model, RATES[name], weight_decay=0.1))
    losses: list[float] = []
    mine = slice(place * ROWS, (place + 1) * ROWS)
    for step in range(STEPS):
        inputs, labels = batch(step)
        logits = model(**{k: v[mine] for k, v in inputs.items()}).logits
        loss = F.cross_entropy(logits, labels[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return held(model, name), losses


def test_adapters_of_every_method_in_one_batch(bert: Path):
    """Biases of norms, networks behind layers, prefixes, updates of words, and heads."""
    model = classifier(bert).eval()
    words = {"target_modules": ["word_embeddings", "key"], "dora": True, "bias": "all"}
    methods = {
        "bitfit": rw.BitFit(),
        "houlsby": rw.Bottleneck(3, rw.Houlsby()),
        "prefix": rw.PrefixTuning(length=2),
        "lora": rw.LoRA(r=2, **words),
        "head": rw.HeadOnly(),
    }
    for name, method in methods.items():
        rw.attach(model, method, name=name)
    move(model, list(methods))
    inputs, _ = batch(1)
    names = ["lora", "bitfit", None, "prefix", "houlsby", "bitfit", "head", "prefix", "lora"]
    with torch.no_grad():
        with rw.using_rows(model, names):
            found = model(**inputs).logits
        for i, name in enumerate(names):
            with rw.using(model, *(() if name is None else (name,))):
                alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-11, atol=1e-11)
    assert len({round(row[0].item(), 6) for row in found}) == len(names)


@pytest.mark.parametrize("order", ["in turn", "shuffled"])
def test_three_adapters_trained_in_one_pass_are_those_of_three_runs(bert: Path, order: str):
    """Ranks, seeds and rates differ; heads and biases train as well."""
    base = classifier(bert)
    model = copy.deepcopy(base)
    for name in NAMES:
        put_on(model, name)
    each = [rw.parameter_groups(model, RATES[n], name=n, weight_decay=0.1) for n in NAMES]
    groups = [group for own in each for group in own]
    assert {g["lr"] for g in groups} == set(RATES.values())
    optimizer = torch.optim.AdamW(groups)
    names = [name for name in NAMES for _ in range(ROWS)]
    at = list(range(len(names)))
    if order == "shuffled":
        at = torch.randperm(len(names)).tolist()
    back = torch.tensor(at).argsort()
    losses: list[list[float]] = []
    with rw.using_rows(model, [names[i] for i in at]):
        for step in range(STEPS):
            inputs, labels = batch(step)
            logits = model(**{k: v[at] for k, v in inputs.items()}).logits[back]
            each = F.cross_entropy(logits, labels, reduction="none").view(3, ROWS).mean(1)
            each.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(each.tolist())
    for place, name in enumerate(NAMES):
        expected, alone = run_alone(base, name, place)
        assert alone[-1] != alone[0]
        torch.testing.assert_close([row[place] for row in losses], alone, rtol=1e-9, atol=1e-9)
        found = held(model, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-8)


def test_the_groups_of_one_adapter_have_its_head_where_it_does_not_hang(bert: Path):
    model = classifier(bert)
    for name in NAMES:
        put_on(model, name)
    for name in NAMES:
        groups = rw.parameter_groups(model, 1.0, name=name, lora_plus=16.0)
        mine = {id(p) for group in groups for p in group["params"]}
        assert mine == {id(p) for p in held(model, name).values()}
        assert {group["lr"] for group in groups} == {1.0, 16.0}
    with pytest.raises(UserError, match="no adapter named 'd'"):
        rw.parameter_groups(model, 1.0, name="d")
    rw.set_trainable(model, "a")
    with pytest.raises(UserError, match="Nothing trains"):
        rw.parameter_groups(model, 1.0, name="b")


# --- generation ----------------------------------------------------------------------------------


def language_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    targets = ["c_attn", "c_fc"] if folder.name == "gpt2" else ["q_proj", "down_proj"]
    for i, name in enumerate(NAMES):
        rw.attach(model, rw.LoRA(r=i + 1, target_modules=targets, head="freeze"), name=name)
        with torch.no_grad():
            for update in updates_of(model, name).values():
                for p in update.trained():
                    p.normal_(std=0.3)
    return model


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_by_several_adapters_at_once(kind: str, beams: int, gpt2: Path, llama: Path):
    model = language_model({"gpt2": gpt2, "llama": llama}[kind])
    ids, names = torch.randint(0, 200, (4, 5)), ["b", "a", None, "b"]
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    expected: list[Tensor] = []
    for row, name in zip(ids, names, strict=True):
        with rw.using(model, *(() if name is None else (name,))):
            one = row[None]
            expected.append(model.generate(one, attention_mask=torch.ones_like(one), **options))
    with rw.using_rows(model, names):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, torch.cat(expected))
    assert len({tuple(row[5:]) for row in found.tolist()}) == 4


def test_a_model_that_asks_for_the_dtype_of_a_weight():
    """T5 does, of its last layer, and calls it all the same."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    model = T5EncoderModel(config).eval()
    for i, name in enumerate(NAMES):
        rw.attach(model, rw.LoRA(r=i + 1, target_modules=["wo", "q"], head="freeze"), name=name)
        with torch.no_grad():
            for update in updates_of(model, name).values():
                for p in update.trained():
                    p.normal_(std=0.3)
    ids = torch.randint(0, 20, (3, 4))
    with torch.no_grad():
        with rw.using_rows(model, ["c", None, "a"]):
            found = model(ids).last_hidden_state
        for i, name in enumerate(("c", None, "a")):
            with rw.using(model, *(() if name is None else (name,))):
                expected = model(ids[i : i + 1]).last_hidden_state[0]
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


# --- costs ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Query, key and value on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("query", "key", "value")})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts.values()])


def bank(many: int) -> tuple[nn.Module, list[str]]:
    model, names = Shared(), [f"n{i}" for i in range(many)]
    for name in names:
        method = rw.LoRA(r=1, target_modules=["query", "key", "value"], head="freeze")
        rw.attach(model, method, name=name)
    return model, names


class Products(TorchDispatchMode):
    """Counts the products, and of them those with a whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.whole = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.all += 1
            self.whole += (64, 64) in [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("many", [1, 4, 8])
def test_a_frozen_layer_runs_once_for_all(many: int, sort: bool):
    """Forward and backward, whatever the number of adapters."""
    model, names = bank(many)
    each = [name for name in names for _ in range(8 // many)]
    rows = each if sort else each[::2] + each[1::2]
    x = torch.randn(24, 64, requires_grad=True)
    with rw.using_rows(model, rows), Products() as seen:
        y = model(x)
        assert (seen.whole, seen.all) == (3, 3 + 3 * 2 * many)
        y.sum().backward()
    assert (seen.whole, seen.all) == (6, 6 + 3 * 6 * many)


@pytest.mark.parametrize("sort", [True, False])
def test_the_input_is_kept_once_for_backward(sort: bool):
    """In units of the input, which three layers and eight adapters share."""
    model, names = bank(8)
    rows = [name for name in names for _ in range(64)]
    rows = rows if sort else rows[::2] + rows[1::2]
    x = torch.randn(512, 64, requires_grad=True)
    with rw.using_rows(model, rows):
        # beside it the products x Aᵀ, of rank 1 for three layers
        assert kept_for_backward(model, x) == pytest.approx(1 + 3 / 64)
