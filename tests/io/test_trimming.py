"""A cut adapter's folder: PEFT computes the same from it, and its scale needs no pattern."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_models as small
import rankwise as rw
from foreign import load, outputs, peft_folder
from rankwise.attaching import low_rank_updates
from rankwise.errors import ArtifactError, UserError
from rankwise.inits import Init
from rankwise.io.adapters import save_adapter
from rankwise.io.convert import Wishes, convert
from rankwise.io.loralib import Unsaid
from rankwise.io.peft import read_peft
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.peft_alone_keys import ModelNeeded
from rankwise.io.portable import Portable, assemble
from rankwise.io.trimming import trim_adapter, trim_on_model
from rankwise.lowrank import Factors
from rankwise.methods.trimming import Prefix, trim
from rankwise.spectrum import Energy, MaxError, Top
from rankwise.train.nested import Nested

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def llama_adapter(llama: Path, tmp_path: Path) -> Path:
    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 3}}
    peft_folder(llama, tmp_path / "own", r=3, lora_alpha=6, target_modules=TARGETS, **patterns)
    return tmp_path / "own"


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outputs(peft.PeftModel.from_pretrained(load(base), folder).eval())


def test_peft_computes_what_was_cut(llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    made = trim_adapter(llama_adapter, MaxError(0.4), tmp_path / "cut")
    assert len({f.r for f in made.trimmed.adapter.factors.values()}) > 1
    found = by_peft(llama, tmp_path / "cut")
    model = load(llama)
    for name, f in made.trimmed.adapter.factors.items():
        weight = model.get_submodule(name).weight
        weight.data += (f.B @ f.A).to(weight.dtype)
    torch.testing.assert_close(found, outputs(model), atol=1e-6, rtol=1e-5)


def test_cutting_nothing_changes_nothing_for_peft(
    llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    trim_adapter(llama_adapter, Energy(1.0), tmp_path / "cut")
    torch.testing.assert_close(
        by_peft(llama, tmp_path / "cut"), by_peft(llama, llama_adapter), atol=1e-6, rtol=1e-5
    )


def test_a_reader_without_patterns_has_the_right_scale(llama_adapter: Path, tmp_path: Path) -> None:
    """As vLLM up to 0.30 reads it: r and lora_alpha alone, the ranks from the tensors."""
    made = trim_adapter(llama_adapter, MaxError(0.4), tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["lora_alpha"] / config["r"] == 1
    assert not config["use_rslora"]
    assert any("--for vllm" in note for note in made.notes)
    convert(tmp_path / "cut", "peft", tmp_path / "served", Wishes(reader="vllm"))
    served = read_peft_alone(tmp_path / "served").factors
    for name, f in made.trimmed.adapter.factors.items():
        torch.testing.assert_close(served[name].delta(), f.delta())


def test_other_formats_are_cut_too(llama: Path, tmp_path: Path) -> None:
    peft_folder(llama, tmp_path / "own", r=3, lora_alpha=6, target_modules=["q_proj"])
    trim_adapter(tmp_path / "own", Top(2), tmp_path / "cut")
    convert(tmp_path / "own", "loralib", tmp_path / "loralib")
    wishes = Wishes(unsaid=Unsaid(alpha=6), allow_pickle=True)
    again = trim_adapter(tmp_path / "loralib", Top(2), tmp_path / "again", wishes)
    first = read_peft_alone(tmp_path / "cut").factors
    for name, f in again.trimmed.adapter.factors.items():
        torch.testing.assert_close(f.delta(), first[name].delta(), atol=1e-6, rtol=1e-4)


def test_layers_of_rank_zero_are_not_in_the_file_and_are_told(tmp_path: Path) -> None:
    factors = {
        "a": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0),
        "b": Factors(torch.randn(2, 6), 1e-6 * torch.randn(5, 2), 1.0),
    }
    write_peft_alone(Portable(assemble(factors)), tmp_path / "own")
    made = trim_adapter(tmp_path / "own", Energy(0.999), tmp_path / "cut")
    assert list(read_peft_alone(tmp_path / "cut").factors) == ["a"]
    assert any(note.startswith("rank 0: 1 updates are left out ('b')") for note in made.notes)


class Two(nn.Module):
    """Two layers whose updates have different ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def begun(init: Init, **more: Any) -> nn.Module:
    """A model whose updates have moved away from a start that is not zero."""
    model = Two()
    options: dict[str, Any] = {"r": 4, "target_modules": ["a", "b"], "head": "freeze"}
    rw.attach(model, rw.LoRA(init=init, **{**options, **more}))
    for update in low_rank_updates(model).values():
        update.lora_A.data += 0.1 * torch.randn_like(update.lora_A)
        update.lora_B.data += 0.1 * torch.randn_like(update.lora_B)
    return model


@pytest.mark.parametrize("init", [rw.PiSSA(), rw.OLoRA()])
@pytest.mark.parametrize("more", [{}, {"rank_stabilized": True}, {"rank_pattern": {"b": 2}}])
def test_a_prefix_of_a_started_update_is_what_nested_training_showed(
    init: Init, more: dict[str, Any], tmp_path: Path
) -> None:
    """The file holds the pair [A; A0], [B, -B0], whose first rows are no prefix."""
    model, x = begun(init, **more), torch.randn(5, 12)
    save_adapter(model, tmp_path / "own")
    for k in (1, 2, 3):
        made = trim_adapter(tmp_path / "own", Prefix(k), tmp_path / f"cut{k}")
        wanted = trim(rw.adapter_of(model), Prefix(k)).adapter
        for name, f in wanted.factors.items():
            found = made.trimmed.adapter.factors[name]
            assert torch.equal(found.delta(), f.delta())
            assert found.scale == f.scale
        alone = Two()
        rw.load_adapter(alone, tmp_path / f"cut{k}")
        with Nested(model, 0).first(k):
            torch.testing.assert_close(alone(x), model(x), atol=1e-6, rtol=1e-5)
    again = trim_adapter(tmp_path / "cut3", Prefix(1), tmp_path / "again")
    for name, f in trim(rw.adapter_of(model), Prefix(1)).adapter.factors.items():
        if "rank_pattern" not in more:  # of rank 2, 3 of 4 are all
            assert torch.equal(again.trimmed.adapter.factors[name].delta(), f.delta())


def test_a_started_update_is_one_of_its_trained_rank_with_its_start(tmp_path: Path) -> None:
    model = begun(rw.PiSSA())
    save_adapter(model, tmp_path / "own")
    found = read_peft_alone(tmp_path / "own")
    for name, f in rw.adapter_of(model).factors.items():
        own = found.factors[name]
        for part in ("A", "B", "A0", "B0"):
            assert torch.equal(getattr(own, part), getattr(f, part))
    made = trim_adapter(tmp_path / "own", MaxError(0.2), tmp_path / "cut")
    wanted = trim(rw.adapter_of(model), MaxError(0.2))
    assert made.trimmed.error == pytest.approx(wanted.error, rel=1e-6)


def test_a_note_on_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_adapter(begun(rw.PiSSA()), tmp_path / "own")
    config = tmp_path / "own" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "lora_alpha": 2 * said["lora_alpha"]}))
    with pytest.raises(ArtifactError, match="one of the two was changed"):
        trim_adapter(tmp_path / "own", Prefix(1), tmp_path / "cut")


def test_parts_in_one_update_have_no_common_first_ranks(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12))
    split = {"0": rw.Split(("q", "v"))}
    parts = ["0.q", "0.v"]
    rw.attach(model, rw.LoRA(r=2, target_modules=parts, split=split, head="freeze"))
    for update in low_rank_updates(model).values():
        nn.init.normal_(update.lora_B)
    save_adapter(model, tmp_path / "own")
    with pytest.raises(UserError, match="not the first of each part"):
        trim_adapter(tmp_path / "own", Prefix(1), tmp_path / "cut")
    trim_adapter(tmp_path / "own", Top(4), tmp_path / "cut")


def test_nothing_is_written_where_the_promise_cannot_be_kept(tmp_path: Path) -> None:
    zero = {"a": Factors(torch.randn(2, 6), torch.zeros(5, 2), 1.0)}
    write_peft_alone(Portable(assemble(zero)), tmp_path / "own")
    with pytest.raises(UserError, match="Every update is zero"):
        trim_adapter(tmp_path / "own", Top(1), tmp_path / "cut")
    with pytest.raises(UserError, match="holds an adapter that is read"):
        trim_adapter(tmp_path / "own", Top(1), tmp_path / "own")
    assert not (tmp_path / "cut").exists()


def test_a_promise_below_the_rounding_of_the_file_is_told(tmp_path: Path) -> None:
    """The ranks keep it in float64; float32 cannot."""
    torch.manual_seed(5)
    factors = {"a": Factors(torch.randn(4, 30), torch.randn(20, 4), 1.0)}
    write_peft_alone(Portable(assemble(factors)), tmp_path / "own")
    for promise, told in (
        (MaxError(1e-9), True),
        (Energy(1 - 1e-15), True),
        (MaxError(0.5), False),
    ):
        made = trim_adapter(tmp_path / "own", promise, tmp_path / "cut")
        written = read_peft_alone(tmp_path / "cut").factors["a"].A.dtype
        assert written == torch.float32
        assert any("rounding: the ranks keep the promise" in n for n in made.notes) is told
        assert told is (1e-9 < made.trimmed.error < 1e-5)


def test_an_update_of_two_tied_layers_is_cut_on_its_model(gpt2: Path, tmp_path: Path) -> None:
    model = load(gpt2)
    rw.attach(model, rw.LoRA(r=2, target_modules=["wte"], tied=True, head="freeze"))
    save_adapter(model, tmp_path / "own")
    assert list(read_peft_alone(tmp_path / "own").factors) == ["transformer.wte"]
    with pytest.raises(UserError, match=r"in Python: rankwise\.load_adapter") as caught:
        trim_adapter(tmp_path / "own", Top(1), tmp_path / "cut")
    assert "save it from there" not in str(caught.value)


ONLY_ON_THE_MODEL = {
    "attention": (small.Heads, small.lora("first.q_proj", "second.v_proj", "second.out_proj")),
    "experts": (small.mixtral, small.lora("q_proj", "gate_up_proj", "down_proj")),
    "rows": (small.llama, small.lora("q_proj", trainable_tokens={"embed_tokens": [3, 5]})),
    "tied": (small.Twins, small.lora("embed", tied=True)),
    "biases": (small.biased, small.lora("q_proj", bias="all")),
}


@pytest.mark.parametrize("kind", ONLY_ON_THE_MODEL)
@pytest.mark.parametrize("promise", [Top(2), MaxError(0.5), Prefix(1)])
def test_what_only_the_model_tells_is_cut_on_it(kind: str, promise: Any, tmp_path: Path) -> None:
    """The folder gives on a fresh model what the cut of the live adapter computes."""
    build, method = ONLY_ON_THE_MODEL[kind]
    model = small.make(build)
    rw.attach(model, method)
    small.randomise(model)
    save_adapter(model, tmp_path / "own")
    with pytest.raises(ModelNeeded):
        trim_adapter(tmp_path / "own", promise, tmp_path / "alone")
    base = small.make(build)
    before = small.logits(base)
    made = trim_on_model(tmp_path / "own", promise, tmp_path / "cut", base)
    assert torch.equal(small.logits(base), before)
    wanted = trim(rw.adapter_of(model), promise)
    assert made.trimmed.error == pytest.approx(wanted.error, rel=1e-5)
    by_hand, fresh = small.make(build), small.make(build)
    rw.attach(by_hand, wanted.adapter)
    rw.load_adapter(fresh, tmp_path / "cut")
    small.same(rw.adapter_of(fresh), rw.adapter_of(by_hand))
    assert not torch.equal(small.logits(fresh), before)
    assert not (tmp_path / "alone").exists()


def test_peft_reads_the_cut_of_its_own_file_with_token_rows(llama: Path, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"trainable_token_indices": [5, 17]}
    peft_folder(llama, tmp_path / "own", r=3, lora_alpha=6, target_modules=TARGETS, **rows)
    with pytest.raises(ModelNeeded, match="trained rows of an embedding"):
        trim_adapter(tmp_path / "own", Top(2), tmp_path / "cut")
    made = trim_on_model(tmp_path / "own", Top(2), tmp_path / "cut", load(llama))
    whole = read_peft(tmp_path / "own", load(llama))
    assert set(whole.tokens) == {"model.embed_tokens"}
    by_hand = load(llama)
    for name, f in made.trimmed.adapter.factors.items():
        by_hand.get_submodule(name).weight.data += f.B @ f.A
    for name, tokens in whole.tokens.items():
        by_hand.get_submodule(name).weight.data[list(tokens.ids)] += tokens.delta.float()
    torch.testing.assert_close(
        by_peft(llama, tmp_path / "cut"), outputs(by_hand), atol=1e-5, rtol=1e-5
    )
