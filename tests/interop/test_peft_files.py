"""Adapter files between Rankwise and PEFT, both ways: the same logits from the same folder."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import rankwise as rw
from rankwise.errors import ArtifactError
from rankwise.io.adapters import load_adapter, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 7, 9, 11], [30, 2, 39, 1]])


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24, num_labels=3))


def tagger() -> nn.Module:
    return BertForTokenClassification(BertConfig(**SMALL, intermediate_size=24, num_labels=4))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1))


def llama_classifier() -> nn.Module:
    config = LlamaConfig(**SMALL, intermediate_size=24, num_labels=3, pad_token_id=0)
    return LlamaForSequenceClassification(config)


class Plain(nn.Module):
    """No model of transformers; ``fc`` is the end of ``block.fc``, ``head`` that of ``my_head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.block = nn.ModuleDict({"fc": nn.Linear(16, 16), "gate": nn.Linear(16, 16)})
        self.fc = nn.Linear(16, 16)
        self.my_head = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.block["fc"](x) * self.block["gate"](x).sigmoid()
        return self.head(self.my_head(self.fc(x)))


def make(build) -> nn.Module:
    torch.manual_seed(3)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * 0.3  # so that every layer matters
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return found if isinstance(found, Tensor) else found.logits


def randomise(model: nn.Module) -> None:
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3


def close(first: Tensor, second: Tensor) -> None:
    assert (first - second).abs().max() <= 2e-6 * max(1.0, second.abs().max().item())


def lora(*targets: str, r: int = 4, **options) -> rw.LoRA:
    return rw.LoRA(r=r, target_modules=targets, **options)


OURS = {
    "bert": (bert, lora("query", "value")),
    "bert, frozen head": (bert, lora("query", head="freeze")),
    "bert, all linear": (bert, lora("all-linear", rank_stabilized=True, alpha=3)),
    "bert, dense of one layer": (bert, lora("1.output.dense")),
    "tagger": (tagger, lora("key")),
    "gpt2": (gpt2, lora("c_attn", "c_proj")),
    "gpt2, patterns": (
        gpt2,
        lora("c_attn", "c_fc", rank_pattern={"1.attn.c_attn": 2}, alpha_pattern={"c_fc": 1.5}),
    ),
    "llama": (llama, lora("q_proj", "v_proj", "down_proj")),
    "llama, embedding": (llama, lora("embed_tokens", "q_proj")),
    "llama, output": (llama, lora("lm_head", "o_proj")),
    "llama, trained norm": (llama, lora("k_proj", modules_to_save=["model.norm"])),
    "llama, classifier": (llama_classifier, lora("up_proj")),
    "plain, only the outer": (Plain, lora("^fc$", head="train")),
    "plain, ranks of look-alikes": (
        Plain,
        lora("fc", "gate", rank_pattern={"^fc$": 1, "block.fc": 2}, head="freeze"),
    ),
    "plain, embedding": (Plain, lora("embed", "my_head", r=3, alpha=10, head="freeze")),
}


@pytest.fixture(params=OURS)
def ours(request, tmp_path: Path):
    """A folder that Rankwise wrote, how to make its base, and the logits it must give."""
    build, method = OURS[request.param]
    model = make(build)
    plain = logits(model)
    rw.attach(model, method)
    randomise(model)
    wanted = logits(model)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    return save_adapter(model, tmp_path / "adapter"), build, wanted, rw.attachment(model)


def test_peft_loads_what_rankwise_wrote(ours):
    folder, build, wanted, record = ours
    model = peft.PeftModel.from_pretrained(make(build), folder)
    close(logits(model), wanted)
    layers = [n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert set(layers) == set(record.adapted)


def test_rankwise_loads_what_it_wrote(ours):
    folder, build, wanted, record = ours
    loaded = load_adapter(model := make(build), folder)
    assert torch.equal(logits(model), wanted)
    assert set(loaded.adapted) == set(record.adapted)
    assert set(loaded.originals) == set(record.originals)


def test_transformers_loads_what_rankwise_wrote(ours):
    folder, build, wanted, _ = ours
    model = make(build)
    if not isinstance(model, Plain):  # which has no load_adapter
        model.load_adapter(str(folder))
        close(logits(model), wanted)


def test_peft_writes_the_same_names_and_numbers(ours, tmp_path: Path):
    folder, build, _, _ = ours
    again = peft.PeftModel.from_pretrained(make(build), folder)
    again.save_pretrained(tmp_path / "again")
    mine = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "again" / "adapter_model.safetensors")
    carried = {k for k in theirs if ".base_layer." in k}  # the base weight of an embedding
    assert mine.keys() == theirs.keys() - carried
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


THEIRS = {
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert, regex": (bert, {"target_modules": r".*layer\.1.*\.(query|key)", "lora_alpha": 3}),
    "bert, all linear": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert, some layers": (
        bert,
        {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "bert, excluded": (bert, {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    "tagger": (tagger, {"target_modules": ["key"], "task_type": "TOKEN_CLS", "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}),
    "gpt2, default targets": (gpt2, {"task_type": "CAUSAL_LM"}),
    "llama": (llama, {"target_modules": ["q_proj", "gate_proj"], "init_lora_weights": "gaussian"}),
    "llama, embedding": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama, patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"^model\.layers\.0.*": 2, "v_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
        },
    ),
    "llama, saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "plain": (Plain, {"target_modules": ["fc", "embed"], "modules_to_save": ["head"]}),
}


def their_folder(build, options: dict[str, object], folder: Path) -> Tensor:
    """Write a folder with PEFT; gives the logits of the model it came from."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    model = peft.get_peft_model(make(build), config)
    randomise(model)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("case", THEIRS)
def test_rankwise_loads_what_peft_wrote(tmp_path: Path, case: str):
    build, options = THEIRS[case]
    wanted = their_folder(build, options, tmp_path)
    load_adapter(model := make(build), tmp_path)
    close(logits(model), wanted)


@pytest.mark.parametrize("case", ["bert", "gpt2", "llama, patterns", "plain"])
def test_what_peft_wrote_comes_back_to_peft(tmp_path: Path, case: str):
    build, options = THEIRS[case]
    wanted = their_folder(build, options, tmp_path / "theirs")
    load_adapter(model := make(build), tmp_path / "theirs")
    folder = save_adapter(model, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(make(build), folder)), wanted)


def test_an_adapter_with_a_name_lies_in_a_folder_of_its_own(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make(llama), config, adapter_name="poet")
    randomise(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "poet" / "adapter_config.json").exists()
    load_adapter(mine := make(llama), tmp_path)
    close(logits(mine), logits(model))


def test_a_plain_state_dict_of_peft_is_understood(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make(llama), config)
    randomise(model)
    model.save_pretrained(tmp_path)
    raw = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    assert all(".default." in key for key in raw)
    save_file(raw, tmp_path / "adapter_model.safetensors")
    load_adapter(mine := make(llama), tmp_path)
    close(logits(mine), logits(model))


def test_an_embedding_weight_in_the_file_is_compared_with_the_base(tmp_path: Path):
    their_folder(llama, {"target_modules": ["embed_tokens"]}, tmp_path)
    assert any(".base_layer." in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    load_adapter(make(llama), tmp_path)
    other = make(llama)
    other.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(
        ArtifactError, match=r"\(40, 16\) for 'model\.embed_tokens\.weight' that is"
    ):
        load_adapter(other, tmp_path)


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "this start changed the base's own weights"),
    "olora": ({"init_lora_weights": "olora"}, "this start changed the base's own weights"),
    "kasa": ({"kasa_config": peft.KasaConfig()}, "KaSA takes a part .* Merge it with PEFT"),
    "velora": ({"velora_config": peft.VeloraConfig(num_groups=4)}, "VeLoRA adds tensors"),
    "monteclora": ({"monteclora_config": peft.MontecloraConfig()}, "MonteCLoRA adds samplers"),
    "layers": ({"layer_replication": [[0, 2], [0, 2]]}, "Build that base first, save it"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "acts on a part of each text only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_rankwise_has_no_layer_for_is_refused_with_the_reason(tmp_path: Path, case: str):
    options, message = REFUSED[case]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    peft.get_peft_model(make(llama), config).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(make(llama), tmp_path)


def test_another_method_of_peft_is_refused(tmp_path: Path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(make(llama), config).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r'peft_type is "IA3", and \'LORA\' is needed'):
        load_adapter(make(llama), tmp_path)


def test_the_configuration_holds_what_readers_ask_for(tmp_path: Path):
    """vLLM needs r, lora_alpha and target_modules; TGI fan_in_fan_out and use_rslora as well."""
    model = make(gpt2)
    model.config._name_or_path = "some/gpt2"
    rw.attach(model, lora("c_attn"))
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert {k: config[k] for k in ("r", "lora_alpha", "target_modules")} == {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn"],
    }
    assert (config["fan_in_fan_out"], config["use_rslora"], config["bias"]) == (True, False, "none")
    assert config["base_model_name_or_path"] == "some/gpt2"
    assert config["task_type"] == "CAUSAL_LM"
    assert config.keys() <= set(peft.LoraConfig.__dataclass_fields__)
