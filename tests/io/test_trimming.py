"""A cut adapter's folder: PEFT computes the same from it, and its scale needs no pattern."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from foreign import load, outputs, peft_folder
from rankwise.errors import UserError
from rankwise.io.convert import Wishes, convert
from rankwise.io.loralib import Unsaid
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.io.trimming import trim_adapter
from rankwise.lowrank import Factors
from rankwise.spectrum import Energy, MaxError, Top

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


def test_nothing_is_written_where_the_promise_cannot_be_kept(tmp_path: Path) -> None:
    zero = {"a": Factors(torch.randn(2, 6), torch.zeros(5, 2), 1.0)}
    write_peft_alone(Portable(assemble(zero)), tmp_path / "own")
    with pytest.raises(UserError, match="Every update is zero"):
        trim_adapter(tmp_path / "own", Top(1), tmp_path / "cut")
    with pytest.raises(UserError, match="holds an adapter that is read"):
        trim_adapter(tmp_path / "own", Top(1), tmp_path / "own")
    assert not (tmp_path / "cut").exists()
