"""extract: the base with the extracted adapter is the tuned model, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.io.peft_alone import read_peft_alone
from rankwise.spectrum import difference
from rankwise.train.extracting import extract

QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.1.attention.self.key"


def classifier(source: Path) -> Any:
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=3).eval()


def planted(model: Any, name: str, k: int) -> None:
    weight = model.get_submodule(name).weight
    weight.data += 0.1 * torch.randn(weight.shape[0], k) @ torch.randn(k, weight.shape[1])


@pytest.fixture
def tuned(bert: Path, tmp_path: Path) -> Path:
    """BERT with a new head, two layers changed by ranks 3 and 5, a norm, a bias and one row."""
    model = classifier(bert)
    planted(model, QUERY, 3)
    planted(model, KEY, 5)
    model.bert.encoder.layer[0].output.LayerNorm.weight.data *= 1.5
    model.bert.encoder.layer[0].attention.self.value.bias.data += 0.5
    model.bert.embeddings.word_embeddings.weight.data[7] += 1
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").exists()
    return tmp_path / "tuned"


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 7, 9, 12, 3]])).logits


def test_the_base_with_the_adapter_is_the_tuned_model(
    bert: Path, tuned: Path, tmp_path: Path
) -> None:
    found = extract(str(bert), str(tuned), tmp_path / "out", r=5)
    assert set(found.layers) == {QUERY, KEY}
    assert found.held > 1 - 1e-9
    assert found.biases == 1
    assert set(found.whole) == {
        "classifier",
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.embeddings.word_embeddings",
    }
    assert found.left_out == ()
    wanted = answers(classifier(tuned))
    for use in (rankwise_model, peft_model):
        base = classifier(bert)
        assert (answers(base) - wanted).abs().max() > 0.1
        torch.testing.assert_close(answers(use(base, tmp_path / "out")), wanted)


def rankwise_model(base: Any, folder: Path) -> Any:
    rw.load_adapter(base, folder)
    assert rw.merge(base).passed
    return base


def peft_model(base: Any, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def test_the_tail_is_what_numpy_says(bert: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(bert), str(tuned), tmp_path / "out", r=2)
    pairs = [classifier(p).get_submodule(KEY).weight.detach().double() for p in (tuned, bert)]
    delta = (pairs[0] - pairs[1]).numpy()
    s = np.linalg.svd(delta, compute_uv=False)
    layer = found.layers[KEY]
    assert layer.norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert layer.lost == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-5)
    assert layer.base_norm == pytest.approx(pairs[1].norm().item())
    factors = read_peft_alone(tmp_path / "out").factors[KEY]
    assert np.linalg.norm(delta - factors.delta().numpy()) == pytest.approx(layer.lost, rel=1e-4)


def test_energy_finds_the_planted_ranks(bert: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(bert), str(tuned), tmp_path / "out", energy=0.999999)
    assert {n: layer.r for n, layer in found.layers.items()} == {QUERY: 3, KEY: 5}


def test_only_lora_lists_what_it_leaves_out(bert: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(bert), str(tuned), tmp_path / "out", r=5, only_lora=True)
    adapter = read_peft_alone(tmp_path / "out").adapter
    assert (adapter.modules, adapter.biases) == ((), {})
    told = " ".join(found.left_out)
    for name in ("classifier", "LayerNorm", "word_embeddings", "value.bias (a bias)"):
        assert name in told


def test_a_merged_run_gives_its_adapter_back(
    finished: Callable[[str], Path], bert: Path, tmp_path: Path
) -> None:
    from rankwise.train.export import merge_run

    merge_run(finished("single"), tmp_path / "merged", dtype="float32")
    extract(str(bert), str(tmp_path / "merged"), tmp_path / "out", r=2)
    own = read_peft_alone(finished("single") / "adapter").factors
    found = read_peft_alone(tmp_path / "out").factors
    assert found.keys() == own.keys()
    for name, f in own.items():
        torch.testing.assert_close(found[name].delta(), f.delta(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_with_its_own_layers_and_a_tied_embedding(
    gpt2: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Conv1D lies (in, out); the output layer is the embedding, and must follow it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=dtype)
    planted(model, "transformer.h.0.attn.c_attn", 2)
    model.transformer.wte.weight.data[3] += 1
    model.save_pretrained(tmp_path / "tuned")
    found = extract(str(gpt2), str(tmp_path / "tuned"), tmp_path / "out", r=32)
    assert set(found.whole) == {"transformer.wte", "lm_head"}
    base = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).eval()
    rw.load_adapter(base, tmp_path / "out")
    near = 1e-5 if dtype == torch.float32 else 0.1  # the other weights were rounded as well
    torch.testing.assert_close(answers(base), answers(wanted), atol=near, rtol=1e-4)
    rounding = [layer.rounding for layer in found.layers.values()]
    assert (min(rounding) > 0) == (dtype == torch.bfloat16)


def test_what_cannot_be_extracted_is_refused(
    bert: Path, gpt2: Path, tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="are the same"):
        extract(str(bert), str(bert), tmp_path / "out", r=1)
    with pytest.raises(UserError, match="no weight in common"):
        extract(str(gpt2), str(bert), tmp_path / "out", r=1)
    model = classifier(bert)
    model.bert.resize_token_embeddings(30, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    with pytest.raises(UserError, match=r"word_embeddings.weight' is \(\d+, 32\) in the base"):
        extract(str(bert), str(tmp_path / "resized"), tmp_path / "out", r=1)
    model = classifier(bert)
    model.get_submodule(QUERY).weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ArtifactError, match="not finite"):
        extract(str(bert), str(tmp_path / "nan"), tmp_path / "out", r=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["classifier", "bert.embeddings.LayerNorm", "bert.embeddings.position_embeddings"]
)
def test_what_is_saved_whole_must_be_finite(bert: Path, tmp_path: Path, name: str) -> None:
    model = classifier(bert)
    planted(model, QUERY, 1)
    model.get_submodule(name).weight.data.view(-1)[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ArtifactError, match=rf"not finite:.*'{name}.weight'"):
        extract(str(bert), str(tmp_path / "nan"), tmp_path / "out", r=1)
    assert not (tmp_path / "out").exists()
    assert extract(str(bert), str(tmp_path / "nan"), tmp_path / "out", r=1, only_lora=True).layers


def test_where_no_weight_of_a_linear_layer_differs_what_does_is_said(
    bert: Path, tmp_path: Path
) -> None:
    model = classifier(bert)
    model.get_submodule(QUERY).bias.data += 1
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match=rf"What differs: classifier, {QUERY}.bias\."):
        extract(str(bert), str(tmp_path / "tuned"), tmp_path / "out", r=1, only_lora=True)


def test_experts_that_the_files_name_otherwise_are_left_alone_or_refused(tmp_path: Path) -> None:
    """transformers joins the experts of a block into one tensor, and saves them one by one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    places = [str(tmp_path / name) for name in ("base", "attention", "experts")]
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(places[0])
    planted(model, "model.layers.1.self_attn.k_proj", 2)
    wanted = answers(model)
    model.save_pretrained(places[1])
    model.model.layers[0].mlp.experts.down_proj.data[2] += 1
    model.save_pretrained(places[2])

    found = extract(places[0], places[1], tmp_path / "out", r=2)
    assert (set(found.layers), found.left_out) == ({"model.layers.1.self_attn.k_proj"}, ())
    base = MixtralForCausalLM.from_pretrained(places[0]).eval()
    rw.load_adapter(base, tmp_path / "out")
    torch.testing.assert_close(answers(base), wanted, atol=1e-5, rtol=1e-4)

    name = r"model.layers.0.block_sparse_moe.experts.2.w2.weight"
    with pytest.raises(UserError, match=rf"^Tensors that differ \(1\).*'{name}'.*--only-lora"):
        extract(places[0], places[2], tmp_path / "refused", r=2)
    assert not (tmp_path / "refused").exists()
    found = extract(places[0], places[2], tmp_path / "rest", r=2, only_lora=True)
    assert set(found.layers) == {"model.layers.1.self_attn.k_proj"}
    assert any(name in text for text in found.left_out)


def most_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once: those inside of kernels too, and files as a whole
    of which a tensor is read.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        call()
    kineto: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


@pytest.mark.parametrize("exact", [True, False])
def test_a_weight_costs_both_its_copies_and_its_change(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(llama, vocab_size=12_000, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="1KB")
    for name in ("lm_head", "model.embed_tokens"):
        planted(model, name, 2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="1KB")
    monkeypatch.setattr(difference, "EXACT", 1024 if exact else 10)
    monkeypatch.setattr(difference, "_SLAB", 1 << 13)
    places = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    most = most_bytes(lambda: extract(*places, r=2))
    assert 2 + 2 + 4 <= most / model.lm_head.weight.numel() < 9


# Linux says the process's own peak in /proc; that of getrusage is at least what the process that
# started it held.
PEAK = """
import re, sys
from pathlib import Path
from rankwise.train.extracting import extract
peaks = []
for name in ("small", "large"):
    extract(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-tuned", f"{sys.argv[1]}/out", r=2)
    told = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    peaks.append(1024 * int(told[1]))
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_follows_the_largest_weight_and_not_the_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(name: str, blocks: int) -> int:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=blocks,
            num_attention_heads=4,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name, max_shard_size="5MB")
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data += 0.01 * torch.randn(parameter.shape[0], 1)
        model.save_pretrained(tmp_path / f"{name}-tuned", max_shard_size="5MB")
        return sum(p.numel() for p in model.parameters()) * 4

    make("small", 1)
    size = make("large", 20)
    assert size > 30e6
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < size / 4
