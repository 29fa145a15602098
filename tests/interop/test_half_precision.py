"""Files in bfloat16 and float16: what inspect, trim and extract say of them is what NumPy finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foreign import load, outputs, quiet, random_factors
from rankwise.errors import ArtifactError, UserError
from rankwise.io.convert import Wishes
from rankwise.io.loralib import Unsaid
from rankwise.io.trimming import trim_adapter
from rankwise.lab.inspecting import inspect_adapter
from rankwise.methods.trimming import Prefix
from rankwise.spectrum import Budget, Energy, MaxError, Promise, Top
from rankwise.train.extracting import extract

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYERS = [
    f"model.layers.{i}.{name}"
    for i in (0, 1)
    for name in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """PEFT's own folder of an adapter whose model was cast, with random factors of rank 4 and 3."""

    def make(dtype: torch.dtype, **more: Any) -> Path:
        patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
        config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **patterns, **more}
        with quiet():
            model = peft.get_peft_model(load(llama), peft.LoraConfig(**config))
            random_factors(model)
            model.to(dtype).save_pretrained(tmp_path / "own")
        tensors = load_file(tmp_path / "own" / WEIGHTS)
        assert {t.dtype for t in tensors.values()} == {dtype}
        return tmp_path / "own"

    return make


def dense(folder: Path) -> dict[str, np.ndarray]:
    """s · B A of every layer of a file of PEFT in float64, by its numbers and configuration."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    found: dict[str, np.ndarray] = {}
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        A, B = (tensors[key.replace("lora_A", f"lora_{side}")].double().numpy() for side in "AB")
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        r, alpha = (
            next((v for end, v in config[patterns].items() if name.endswith(end)), config[plain])
            for patterns, plain in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        assert len(A) == r
        found[name] = alpha / r * (B @ A)
    return found


def error(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """‖δ − δ'‖ / ‖δ‖ over all layers; what is not in the file is zero."""
    lost = [np.linalg.norm(d - found.get(name, 0)) for name, d in wanted.items()]
    whole = [np.linalg.norm(d) for d in wanted.values()]
    return float(np.linalg.norm(lost) / np.linalg.norm(whole))


@HALF
def test_inspect_finds_the_singular_values_of_the_file(
    dtype: torch.dtype, saved: Callable[..., Path], half: Callable[[Path], Path], llama: Path
) -> None:
    """W0 comes from a file in bfloat16 as well."""
    folder, base = saved(dtype), half(llama)
    wanted, weights = dense(folder), load_file(base / "model.safetensors")
    found = inspect_adapter(folder, wishes=Wishes(base=base))
    assert [layer.name for layer in found.layers] == LAYERS
    for layer in found.layers:
        delta, weight = wanted[layer.name], weights[f"{layer.name}.weight"].double().numpy()
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        r = 3 if "v_proj" in layer.name else 4
        np.testing.assert_allclose(layer.spectrum.values, s[:r], rtol=1e-12)
        assert layer.spectrum.rank == r
        assert layer.spectrum.stable_rank == pytest.approx(np.sum(s**2) / s[0] ** 2, rel=1e-12)
        assert layer.base_norm == pytest.approx(np.linalg.norm(weight), rel=1e-12)
        along = np.linalg.norm(u[:, :r].T @ weight @ vh[:r].T)
        assert layer.amplification == pytest.approx(np.linalg.norm(delta) / along, rel=1e-5)


@HALF
@pytest.mark.parametrize(
    "promise", [Top(2), Energy(0.9), Energy(1.0), MaxError(1e-3), MaxError(0.4), Budget(900)]
)
def test_trim_keeps_its_promise_against_the_numbers_of_the_file(
    dtype: torch.dtype, promise: Promise, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """The cut is in float32: in the file's own dtype its rounding alone would be above 1e-3."""
    folder = saved(dtype)
    made = trim_adapter(folder, promise, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / WEIGHTS)
    lost = error(dense(folder), dense(tmp_path / "cut"))
    assert made.trimmed.error == pytest.approx(lost, abs=1e-9)
    assert made.trimmed.allocation.error == pytest.approx(lost, abs=1e-6)
    allowed = {Energy: lambda p: np.sqrt(1 - p.share), MaxError: lambda p: p.error}
    if type(promise) in allowed:
        assert lost <= allowed[type(promise)](promise) + 1e-7
    if isinstance(promise, Budget):
        assert sum(t.numel() for t in tensors.values()) <= promise.parameters
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    short = str(dtype).removeprefix("torch.")
    assert any(f"float32: the file had {short}" in note for note in made.notes)


@HALF
def test_a_prefix_is_the_very_numbers_of_the_file(
    dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved(dtype)
    made = trim_adapter(folder, Prefix(2), tmp_path / "cut")
    before, after = (load_file(place / WEIGHTS) for place in (folder, tmp_path / "cut"))
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        whole = before[key]
        assert torch.equal(tensor, whole[:2] if "lora_A" in key else whole[:, :2])
        assert tensor.dtype == dtype
    lost = error(dense(folder), dense(tmp_path / "cut"))
    assert made.trimmed.error == pytest.approx(lost, rel=1e-9)
    assert not any("float32" in note for note in made.notes)


@HALF
@pytest.mark.parametrize("promise", [MaxError(0.4), Prefix(2)])
def test_peft_computes_with_the_cut_file_what_its_numbers_say(
    dtype: torch.dtype,
    promise: Promise | Prefix,
    saved: Callable[..., Path],
    llama: Path,
    tmp_path: Path,
) -> None:
    trim_adapter(saved(dtype), promise, tmp_path / "cut")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(load(llama), tmp_path / "cut").eval()
    by_hand = load(llama).double()
    bare = outputs(by_hand)
    for name, delta in dense(tmp_path / "cut").items():
        by_hand.get_submodule(name).weight.data += torch.from_numpy(delta)
    wanted = outputs(by_hand)
    assert (wanted - bare).abs().max() > 0.01
    torch.testing.assert_close(outputs(theirs), wanted, atol=1e-12, rtol=1e-9)


@HALF
def test_loralibs_file_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(loralib.Linear(12, 9, r=4, lora_alpha=6), loralib.Linear(9, 7, r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    torch.save(loralib.lora_state_dict(model.to(dtype)), tmp_path / "lora.pt")
    state = torch.load(tmp_path / "lora.pt", weights_only=True)
    wanted = {
        str(i): 1.5 * state[f"{i}.lora_B"].double().numpy() @ state[f"{i}.lora_A"].double().numpy()
        for i in (0, 1)
    }
    wishes = Wishes(unsaid=Unsaid(alpha=6), allow_pickle=True)
    for layer in inspect_adapter(tmp_path / "lora.pt", wishes=wishes).layers:
        s = np.linalg.svd(wanted[layer.name], compute_uv=False)
        np.testing.assert_allclose(layer.spectrum.values, s[:4], rtol=1e-12)
    made = trim_adapter(tmp_path / "lora.pt", MaxError(0.5), tmp_path / "cut", wishes)
    lost = error(wanted, dense(tmp_path / "cut"))
    assert 0 < lost <= 0.5
    assert made.trimmed.error == pytest.approx(lost, abs=1e-9)


@HALF
def test_a_number_that_half_precision_cannot_hold_is_refused(
    dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """What overflowed when it was cast is infinite in the file."""
    folder = saved(dtype)
    tensors = load_file(folder / WEIGHTS)
    key = f"{PREFIX}{LAYERS[0]}.lora_B.weight"
    tensors[key][0, 0] = float("inf")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="not finite"):
        inspect_adapter(folder)
    with pytest.raises(ArtifactError, match="not finite"):
        trim_adapter(folder, Top(1), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def pair(
    source: Path, folder: Path, base: torch.dtype, tuned: torch.dtype, size: float
) -> dict[str, np.ndarray]:
    """A base and what was tuned from it, of changes of rank 3 by a share of each weight's norm;
    gives each Δ by the files.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=base)
    model.save_pretrained(folder / "base")
    model = model.to(tuned if tuned == torch.float32 else torch.float32)
    for name in (QUERY, DOWN):
        weight = model.get_submodule(name).weight
        delta = torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1])
        weight.data += size * weight.norm() / delta.norm() * delta
    model.to(tuned).save_pretrained(folder / "tuned")
    before, after = (load_file(folder / n / "model.safetensors") for n in ("base", "tuned"))
    assert {t.dtype for t in before.values()} == {base}
    assert {t.dtype for t in after.values()} == {tuned}
    keys = [key for key in before if not torch.equal(before[key].to(tuned), after[key])]
    assert sorted(keys) == sorted(f"{name}.weight" for name in (QUERY, DOWN))
    wide = ({k: t.double().numpy() for k, t in each.items()} for each in (before, after))
    first, second = wide
    return {k.removesuffix(".weight"): second[k] - first[k] for k in keys}


@pytest.mark.parametrize(
    ("base", "tuned", "size"),
    [
        (torch.bfloat16, torch.bfloat16, 0.1),
        (torch.float16, torch.float16, 0.1),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.bfloat16, torch.float32, 1e-3),
        (torch.float16, torch.float32, 1e-3),
        (torch.bfloat16, torch.float16, 0.1),
        (torch.float32, torch.bfloat16, 0.1),
    ],
    ids=str,
)
def test_the_tail_of_a_change_between_files_is_measured(
    base: torch.dtype, tuned: torch.dtype, size: float, llama: Path, tmp_path: Path
) -> None:
    wanted = pair(llama, tmp_path, base, tuned, size)
    places = [str(tmp_path / name) for name in ("base", "tuned")]
    found = extract(*places, tmp_path / "out", r=3)
    assert set(found.layers) == set(wanted)
    got = dense(tmp_path / "out")
    for name, layer in found.layers.items():
        s = np.linalg.svd(wanted[name], compute_uv=False)
        tail, norm = np.linalg.norm(s[3:]), np.linalg.norm(s)
        assert layer.norm == pytest.approx(norm, rel=1e-6)
        assert layer.lost == pytest.approx(tail, rel=1e-4, abs=1e-6 * norm)
        lost = np.linalg.norm(wanted[name] - got[name])
        assert lost == pytest.approx(layer.lost, abs=1e-6 * norm)
        rounded = tuned != torch.float32
        assert (layer.rounding > 0) == rounded
        # of rank 3 but for the rounding of the tuned weights
        assert tail <= (2 * layer.rounding if rounded else 1e-4 * norm)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_what_differs_by_the_rounding_of_the_shorter_format_alone_is_the_same(
    llama: Path, half: Callable[[Path], Path], tmp_path: Path
) -> None:
    for places in ((llama, half(llama)), (half(llama), llama)):
        with pytest.raises(UserError, match="are the same"):
            extract(*map(str, places), tmp_path / "out", r=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_change_below_the_last_digit_of_the_base_is_a_change(
    dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    """Norms are near 1, where a step of bfloat16 is almost a hundredth."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    model = model.float()
    step = torch.finfo(dtype).eps
    name = "model.layers.0.input_layernorm"
    model.get_submodule(name).weight.data += 0.1 * step * torch.randn(32).clamp(-2, 2)
    model.get_submodule(QUERY).weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    before, after = (
        load_file(tmp_path / n / "model.safetensors")[f"{name}.weight"] for n in ("base", "tuned")
    )
    assert torch.equal(after.to(dtype), before)
    found = extract(*(str(tmp_path / n) for n in ("base", "tuned")), tmp_path / "out", r=1)
    assert set(found.whole) == {name}
    kept = load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}{name}.weight"]
    assert torch.equal(kept, after)
