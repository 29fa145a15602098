"""PEFT's folders without the base: nothing lost, nothing believed, PEFT reads what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foreign import deltas, our_outputs, peft_folder, peft_outputs, quiet, same_deltas
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.peft import WEIGHTS
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Kernel, Portable, assemble
from rankwise.lowrank import Factors

PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("model", "kind", "config"),
    [
        ("bert", "AutoModel", {"target_modules": ["query", "dense"]}),
        ("gpt2", "AutoModelForCausalLM", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", "AutoModelForCausalLM", {"target_modules": ["wte", "c_proj"]}),
        (
            "llama",
            "AutoModelForCausalLM",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 3},
                "use_rslora": True,
            },
        ),
    ],
)
def test_a_folder_of_peft_comes_back_the_same(
    model: str,
    kind: str,
    config: dict[str, Any],
    request: pytest.FixtureRequest,
    tmp_path: Path,
):
    base: Path = request.getfixturevalue(model)
    want, plain = peft_folder(base, tmp_path / "a", kind, r=4, lora_alpha=8, **config)
    assert (want - plain).abs().max() > 1e-3
    portable = read_peft_alone(tmp_path / "a")
    write_peft_alone(portable, tmp_path / "b")
    assert torch.equal(peft_outputs(base, tmp_path / "b", kind), want)
    assert (our_outputs(base, portable, kind) - want).abs().max() < 1e-12
    again = read_peft_alone(tmp_path / "b")
    assert same_deltas(portable, again, 0)
    said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(portable.factors)


def test_a_head_that_trained_whole_is_kept(bert: Path, tmp_path: Path):
    kind = "AutoModelForSequenceClassification"
    config = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    peft_folder(bert, tmp_path / "a", kind, **config)
    portable = read_peft_alone(tmp_path / "a")
    assert portable.task_type == "SEQ_CLS"
    assert portable.adapter.modules == ("classifier",)
    assert set(portable.adapter.trained) == {"classifier.weight", "classifier.bias"}
    write_peft_alone(portable, tmp_path / "b")
    one, two = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_magnitudes_are_kept(llama: Path, tmp_path: Path):
    want, _ = peft_folder(
        llama, tmp_path / "a", r=2, target_modules=["q_proj", "down_proj"], use_dora=True
    )
    portable = read_peft_alone(tmp_path / "a")
    assert set(portable.adapter.magnitudes) == set(portable.factors)
    write_peft_alone(portable, tmp_path / "b")
    assert torch.equal(peft_outputs(llama, tmp_path / "b"), want)
    assert (our_outputs(llama, portable) - want).abs().max() < 1e-6


def convolution(folder: Path, groups: int) -> tuple[Any, Callable[[], nn.Module]]:
    """A model of PEFT with an adapted convolution, saved, and how to make its base."""
    import peft

    def base() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Flatten(), nn.Linear(6, 2))

    with quiet():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=groups == 1)
        model = peft.get_peft_model(base(), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(folder)
    return model, base


def test_a_convolution_keeps_its_kernel(tmp_path: Path):
    import peft

    model, base = convolution(tmp_path / "a", 1)
    portable = read_peft_alone(tmp_path / "a")
    assert portable.kernels == {"0": Kernel((4, 3, 3))}
    assert portable.factors["0"].delta().shape == (6, 36)
    write_peft_alone(portable, tmp_path / "b")
    with quiet():
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "b").eval()
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(again(x), model(x))


def test_a_convolution_in_groups_as_peft_trains_it_is_refused(tmp_path: Path):
    """PEFT's A reads all channels, so the update is no grouped one, and PEFT cannot merge it."""
    model, _ = convolution(tmp_path / "a", 2)
    with quiet(), pytest.raises(RuntimeError, match="groups"):
        model.merge_and_unload()
    with pytest.raises(ArtifactError, match="the update of '0' is dense over the channels"):
        read_peft_alone(tmp_path / "a")


def test_a_convolution_in_groups_of_its_own_is_kept(tmp_path: Path):
    import peft

    _, base = convolution(tmp_path / "x", 2)
    f = Factors(torch.randn(3, 18), torch.randn(6, 3), 0.5)
    portable = Portable(assemble({"0": f}), kernels={"0": Kernel((2, 3, 3), 2)})
    write_peft_alone(portable, tmp_path / "a")
    back = read_peft_alone(tmp_path / "a")
    assert same_deltas(back, portable, 0)
    assert back.kernels == portable.kernels
    with quiet():
        model = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    x, plain = torch.randn(2, 4, 3, 3), base()
    plain[0].weight.data += f.delta().reshape(plain[0].weight.shape)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_bias_on_b_is_an_added_bias(tmp_path: Path):
    import peft

    def base() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))

    f = {
        n: Factors(torch.randn(2, i), torch.randn(o, 2), 0.5)
        for n, o, i in (("0", 6, 4), ("1", 2, 6))
    }
    added = torch.randn(6)
    portable = Portable(assemble(f, biases={"0.bias": added}))
    write_peft_alone(portable, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_bias"] is True
    with quiet():
        model = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    x, plain = torch.randn(3, 4), base()
    plain[0].bias.data += added
    for name, own in f.items():
        plain.get_submodule(name).weight.data += own.delta()
    torch.testing.assert_close(model(x), plain(x))


def test_a_bias_without_an_update_needs_the_base(tmp_path: Path):
    f = {"0": Factors(torch.randn(2, 4), torch.randn(6, 2), 0.5)}
    portable = Portable(assemble(f, biases={"norm.bias": torch.ones(6)}))
    with pytest.raises(UserError, match=r"the bias 'norm\.bias' trained.*rankwise\.load_adapter"):
        write_peft_alone(portable, tmp_path / "a")


def test_a_pickled_folder_is_read_on_request(llama: Path, tmp_path: Path):
    peft_folder(llama, tmp_path / "a", r=2, target_modules=["q_proj"])
    portable = read_peft_alone(tmp_path / "a")
    torch.save(load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="is a pickle"):
        read_peft_alone(tmp_path / "a")
    assert same_deltas(read_peft_alone(tmp_path / "a", allow_pickle=True), portable, 0)


def test_what_rankwise_wrote_keeps_its_sketch_and_its_list(tmp_path: Path):
    from safetensors import safe_open

    import rankwise
    from rankwise.io.adapters import save_adapter

    names = {"body": (4, 4), "lm_head": (4, 4), "head": (4, 2)}
    model = nn.ModuleDict({n: nn.Linear(*s) for n, s in names.items()})
    rankwise.attach(model, rankwise.LoRA(r=1, target_modules=["body"], head="train"))
    save_adapter(model, tmp_path / "a")
    portable = read_peft_alone(tmp_path / "a")
    assert portable.adapter.modules == ("head",)  # 'lm_head' is there for PEFT alone
    assert "left out: 2 tensors of the base" in portable.notes[0]
    write_peft_alone(portable, tmp_path / "b")
    told: list[dict[str, str]] = []
    for folder in ("a", "b"):
        with safe_open(tmp_path / folder / WEIGHTS, "pt") as file:
            told.append(file.metadata())
    assert told[0] == told[1]


def test_a_list_of_rankwise_that_is_damaged_is_refused(changed: Callable[..., Path]):
    folder = changed()
    tensors = load_file(folder / WEIGHTS)
    for text in ("[", "[1]", "{}"):
        save_file(tensors, folder / WEIGHTS, {"rankwise.trained": text})
        with pytest.raises(ArtifactError, match=r"'rankwise\.trained' is damaged"):
            read_peft_alone(folder)


def test_biases_of_the_base_are_told_by_the_base(bert: Path, tmp_path: Path):
    kind = "AutoModel"
    peft_folder(bert, tmp_path / "a", kind, target_modules=["query"], bias="lora_only")
    file = tmp_path / "a" / WEIGHTS
    tensors = {k: t + k.endswith("bias") for k, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match="biases are stored as values, and the base"):
        read_peft_alone(tmp_path / "a")
    portable = read_peft_alone(tmp_path / "a", base=blueprint(bert))
    assert len(portable.adapter.biases) == 2
    write_peft_alone(portable, tmp_path / "b")  # as biases on B
    want = peft_outputs(bert, tmp_path / "a", kind)
    assert (peft_outputs(bert, tmp_path / "b", kind) - want).abs().max() < 1e-6
    assert (our_outputs(bert, portable, kind) - want).abs().max() < 1e-6


@pytest.fixture
def changed(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder of PEFT with other tensors or another config."""

    def make(
        tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "a"
        targets = ["q_proj", "v_proj"]
        peft_folder(llama, folder, r=2, lora_alpha=4, target_modules=targets)
        if tensors is not None:
            save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        said = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(said))
        return folder

    return make


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
            {},
            "q_proj' has no B",
        ),
        (
            lambda t: t | {"model.x.lora_A.weight": torch.ones(2, 2)},
            {},
            "x' has no B|does not mean",
        ),
        (lambda t: t | {f"{Q}.odd": torch.ones(2)}, {}, r"q_proj\.odd' is no part of an update"),
        (
            lambda t: {k.replace("_A.", "_A.x.").replace("_B.", "_B.y."): v for k, v in t.items()},
            {},
            "mix several adapters",
        ),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, {}, "is torch.int8"),
        (lambda t: {k: v.mT.contiguous() for k, v in t.items()}, {}, "and r is 2 in"),
        (lambda t: {f"{PREFIX}norm.weight": torch.ones(2)}, {}, "holds no low-rank factors"),
        (None, {"r": 3}, r"has shape \(2, 32\), and r is 3"),
        (None, {"target_modules": ["q_proj"]}, "target_modules does not mean it"),
        (None, {"use_dora": True}, "has no lora_magnitude_vector"),
        (lambda t: t | {f"{PREFIX}x.lora_B.bias": torch.ones(2)}, {}, "a bias on B and no factors"),
        (
            lambda t: t | {f"{PREFIX}lm_head.lora_magnitude_vector": torch.ones(2)},
            {},
            "lora_magnitude_vector and no factors",
        ),
    ],
)
def test_what_is_wrong_is_named(
    changed: Callable[..., Path], tensors: Any, config: dict[str, Any], told: str
):
    with pytest.raises(ArtifactError, match=told):
        read_peft_alone(changed(tensors, **config))


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (lambda t: t | {f"{PREFIX}norm.bias": torch.ones(2)}, {}, r"the base \(--base\) tells"),
        (lambda t: t | {f"{Q}.base_layer.x.lora_A.weight": torch.ones(2, 2)}, {}, "wrapped twice"),
        (None, {"target_parameters": ["experts.up"]}, "that only the model can tell"),
        (None, {"peft_type": "RANKWISE_LORA"}, "banks of experts"),
        (
            lambda t: t | {f"{PREFIX}e.token_adapter.trainable_tokens_delta": torch.ones(2, 2)},
            {},
            "trained rows of an embedding, which are stored as values",
        ),
    ],
)
def test_what_the_model_alone_tells_is_no_damage(
    changed: Callable[..., Path], tensors: Any, config: dict[str, Any], told: str
):
    with pytest.raises(UserError, match=told) as caught:
        read_peft_alone(changed(tensors, **config))
    assert "in Python: rankwise.load_adapter" in str(caught.value)


def test_a_tensor_that_may_be_the_bases_needs_the_base(changed: Callable[..., Path], llama: Path):
    base = blueprint(llama)
    key = "model.norm.weight"
    folder = changed(lambda t: t | {PREFIX + key: base.fetch(key)})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' .*which --base would tell"):
        read_peft_alone(folder)
    assert "left out: 1 tensors" in read_peft_alone(folder, base=base).notes[0]
    shutil.rmtree(folder)
    folder = changed(lambda t: t | {PREFIX + key: base.fetch(key) + 1})
    with pytest.raises(ArtifactError, match="it trained as well"):
        read_peft_alone(folder, base=base)


def test_other_spellings_of_one_adapter_are_understood(changed: Callable[..., Path]):
    plain = deltas(read_peft_alone(changed()))

    def spelled(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pairs = ((k.replace("layers", "_orig_mod.layers"), v) for k, v in t.items())
        return {k.replace(".weight", ".default.weight"): v for k, v in pairs}

    again = deltas(read_peft_alone(changed(spelled)))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[k], again[k]) for k in plain)
