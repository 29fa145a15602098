"""`rankwise convert`: a line for each decision, and the exit code of each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foreign import peft_folder
from rankwise.cli.app import main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["convert", *(str(word) for word in words)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_a_runs_adapter_is_made_ready_for_a_server(
    finished: Callable[[str], Path], call: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    code, out, _ = call(
        finished("llama") / "adapter", "--to", "peft", "--for", "vllm", "--out", tmp_path / "a"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("read 4 updates of rank 2, scale 2, from ")
    assert "scale: right for vLLM as it is, nothing was folded" in lines
    assert lines[-1].startswith("wrote 4 updates")
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_a_gguf_file_is_written_beside_its_base(
    llama: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    peft_folder(llama, tmp_path / "p", r=2, target_modules=["q_proj"])
    words = (tmp_path / "p", "--to", "gguf", "--base", llama, "--out", tmp_path / "g")
    code, out, _ = call(*words)
    assert code == 0
    assert "gguf: architecture llama, adapter.lora.alpha 8" in out
    assert [p.name for p in (tmp_path / "g").iterdir()] == ["adapter.gguf"]


def test_what_a_loralib_file_does_not_say_is_said_by_flags(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    state = {
        "h.0.attn.c_attn.lora_A": torch.randn(4, 8),
        "h.0.attn.c_attn.lora_B": torch.randn(16, 2),
        "wte.lora_A": torch.randn(2, 11),
        "wte.lora_B": torch.randn(8, 2),
        "classifier.weight": torch.randn(3, 8),
        "ln.weight": torch.randn(8),
    }
    torch.save(state, tmp_path / "lora.pt")
    words = (tmp_path / "lora.pt", "--to", "peft", "--out", tmp_path / "a", "--alpha", "8")
    assert call(*words)[0] == 2
    words = (*words, "--allow-pickle", "--enable-lora", "c_attn=101", "--embeddings", "wte")
    assert call(*words)[0] == 3
    code, _, err = call(*words, "--modules-to-save", "classifier", "--drop-base")
    assert code == 0, err
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["h.0.attn.c_attn", "wte"]
    assert said["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("text", ["c_attn", "c_attn=1a1", "=101"])
def test_flags_of_parts_are_checked(
    text: str, call: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    code, _, err = call(tmp_path, "--to", "peft", "--out", tmp_path / "a", "--enable-lora", text)
    assert code == 2
    assert "such as c_attn=101" in err


def test_mistakes_and_damage_have_their_codes(
    llama: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    peft_folder(llama, tmp_path / "p", r=2, target_modules=["q_proj"])
    code, _, err = call(tmp_path / "p", "--to", "gguf", "--out", tmp_path / "a")
    assert (code, "--base" in err) == (2, True)
    weights = tmp_path / "p" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = call(tmp_path / "p", "--to", "mlx", "--out", tmp_path / "a")
    assert (code, "cut off" in err) == (3, True)
    assert not (tmp_path / "a").exists()
