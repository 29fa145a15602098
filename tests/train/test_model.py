import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import ArtifactError, EnvironmentFault, RankwiseError, UserError
from rankwise.train.model import (
    class_names,
    fingerprint_folder,
    fresh_modules,
    is_local,
    load_base,
    load_config,
)

Alter = Callable[..., Path]


@pytest.fixture
def altered(bert: Path, tmp_path: Path) -> Alter:
    """A copy of the BERT folder with other entries in its config.json."""

    def make(**config: Any) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(bert, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return make


def refused(kind: type[RankwiseError], source: Path | str, task: str = "classification") -> str:
    with pytest.raises(RankwiseError) as caught:
        load_base(str(source), task, ("a", "b"))
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def test_a_missing_folder_names_the_nearest(bert: Path) -> None:
    assert f"Did you mean '{bert}'" in refused(UserError, bert.with_name("berd"))


def test_folders_that_hold_no_model(tmp_path: Path, finished: Callable[[str], Path]) -> None:
    assert "no config.json" in refused(UserError, tmp_path)
    assert "holds an adapter, not a model" in refused(UserError, finished("single") / "adapter")
    (tmp_path / "weights").touch()
    assert "is a file" in refused(UserError, tmp_path / "weights")


def test_pickled_weights_are_not_read(altered: Alter, tmp_path: Path) -> None:
    folder, sign = altered(), tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (sign,))

    (folder / "model.safetensors").unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    message = refused(UserError, folder)
    assert "pytorch_model.bin, which could run code" in message
    assert "safetensors" in message
    assert not sign.exists()


@pytest.mark.parametrize("kind", ["bert", "never-heard-of"])
def test_code_that_comes_with_a_model_is_not_run(altered: Alter, kind: str) -> None:
    folder = altered(model_type=kind, auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    message = refused(UserError, folder)
    assert "auto_map" in message
    assert "trust_remote_code" not in message


def test_damaged_files(altered: Alter) -> None:
    folder = altered()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(folder) in refused(ArtifactError, folder)
    weights.write_bytes(b"")
    assert str(folder) in refused(ArtifactError, folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{not json")
    assert "not readable JSON" in refused(ArtifactError, folder)
    assert ArtifactError.exit_code == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "wide"), ("num_hidden_layers", [2]), ("hidden_dropout_prob", {})],
)
def test_a_field_of_the_config_of_another_kind(altered: Alter, key: str, value: object) -> None:
    message = refused(ArtifactError, altered(**{key: value}))
    assert "is damaged" in message
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000])
def test_a_config_that_is_no_object(altered: Alter, text: str) -> None:
    folder = altered()
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(ArtifactError, folder)


def test_weights_of_another_size_than_the_config_says(altered: Alter) -> None:
    message = refused(ArtifactError, altered(intermediate_size=48))
    assert "not those of its config.json" in message
    assert "bert.encoder.layer.0" in message


def test_layers_that_the_weights_lack(altered: Alter) -> None:
    assert "bert.encoder.layer.2" in refused(ArtifactError, altered(num_hidden_layers=3))


def test_a_hub_name_without_a_network_fails_fast() -> None:
    began = time.monotonic()
    message = refused(EnvironmentFault, "nobody/has-this-model")
    assert time.monotonic() - began < 5
    assert "HF_HUB_OFFLINE=1 forbids the network" in message
    assert EnvironmentFault.exit_code == 4


def test_what_is_a_path_and_what_a_hub_name(bert: Path) -> None:
    assert all(map(is_local, (str(bert), "./model", "../model", "~/model", "models/a/b")))
    assert not any(map(is_local, ("roberta-base", "nobody/has-this-model")))


def test_an_architecture_without_the_task(tmp_path: Path, rows: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tiny: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "image_size": 8,
    }
    config = CLIPVisionConfig(**tiny, num_attention_heads=2, patch_size=4)
    CLIPVisionModel(config).save_pretrained(tmp_path)
    assert str(tmp_path) in refused(ArtifactError, tmp_path)


def test_a_base_without_a_head_gets_a_fresh_one(bert: Path) -> None:
    base = load_base(str(bert), "classification", ("no", "yes", "perhaps"))
    assert base.fresh == ("classifier.bias", "classifier.weight")
    model: Any = base.model
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert model.config.label2id == {"no": 0, "yes": 1, "perhaps": 2}
    assert not model.training
    assert (base.source, base.longest) == (str(bert), 64)
    assert load_base(str(bert), "regression").model.config.num_labels == 1


def test_the_weights_are_those_of_the_file(bert: Path) -> None:
    from transformers import BertModel

    found = load_base(str(bert), "classification", ("a", "b")).model.state_dict()
    for name, tensor in BertModel.from_pretrained(bert).state_dict().items():
        assert torch.equal(found[f"bert.{name}"], tensor)


def test_a_head_of_another_size_is_replaced_and_one_that_fits_is_kept(
    bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    three = load_base(str(tmp_path), "classification", ("a", "b", "c"))
    assert three.fresh == ()
    assert torch.equal(three.model.get_parameter("classifier.weight"), model.classifier.weight)
    two = load_base(str(tmp_path), "classification", ("a", "b"))
    assert two.fresh == ("classifier.bias", "classifier.weight")
    assert two.model.get_parameter("classifier.weight").shape == (2, 32)


def test_gpt2_pads_with_its_end_token(gpt2: Path) -> None:
    base = load_base(str(gpt2), "causal-lm")
    assert (
        base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.model.config.pad_token_id
    )
    assert (base.fresh, base.longest) == ((), 96)
    head = load_base(str(gpt2), "classification", ("a", "b"))
    assert head.fresh == ("score.weight",)


def test_a_tokenizer_without_any_special_token(gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    assert (
        load_base(str(tmp_path / "bare"), "classification", ("a", "b")).model.config.pad_token_id
        == 0
    )


def test_roberta_s_first_positions_are_not_for_tokens(roberta: Path) -> None:
    base = load_base(str(roberta), "classification", ("a", "b"))
    assert base.longest == 512
    ids = torch.full((1, 512), 7)
    base.model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=torch.full((1, 513), 7))


def test_a_checkpoint_keeps_its_own_format_when_none_is_asked_for(
    half: Callable[[Path], Path], bert: Path
) -> None:
    folder = str(half(bert))
    kept = load_base(folder, "classification", ("a", "b"), dtype=None)
    assert {p.dtype for p in kept.model.parameters()} == {torch.bfloat16}
    wide = load_base(folder, "classification", ("a", "b"))
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}


def test_a_fingerprint_follows_the_weights_alone(bert: Path, tmp_path: Path) -> None:
    import hashlib

    raw = (bert / "model.safetensors").read_bytes()
    assert fingerprint_folder(bert) == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert load_base(str(bert), "regression").fingerprint == fingerprint_folder(bert)
    shutil.copytree(bert, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").touch()
    assert fingerprint_folder(tmp_path / "copy") == fingerprint_folder(bert)
    (tmp_path / "copy" / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert fingerprint_folder(tmp_path / "copy") != fingerprint_folder(bert)


def test_modules_beside_the_head_that_are_fresh() -> None:
    fresh = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.out.weight", "scale"]
    assert fresh_modules(fresh, ["classifier"]) == ["bert.pooler.dense"]
    assert fresh_modules(["classifier.weight"], ["classifier"]) == []


def test_a_config_alone_is_checked_the_same_way(altered: Alter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config"):
        load_config(str(tmp_path))
    assert load_config(str(altered(hidden_size=48))).hidden_size == 48


def without(folder: Path, copy: Path, *gone: str) -> Path:
    """A copy of a model folder whose weights lack the tensors of these names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(folder / "model.safetensors")
    assert set(gone) <= set(tensors)
    kept = {n: t for n, t in tensors.items() if n not in gone}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("gone", ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"])
def test_an_embedding_that_the_weights_lack(bert: Path, tmp_path: Path, gone: str) -> None:
    """It stands outside the numbered blocks, and training on it at random would teach nothing."""
    assert f"bert.{gone}" in refused(ArtifactError, without(bert, tmp_path / "holed", gone))


def test_a_pooler_may_be_lacking_but_not_of_another_shape(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names = ("pooler.dense.weight", "pooler.dense.bias")
    folder = without(bert, tmp_path / "bare", *names)
    fresh = load_base(str(folder), "classification", ("a", "b")).fresh
    assert {f"bert.{n}" for n in names} < set(fresh)
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "bert.pooler.dense.weight" in refused(ArtifactError, folder)


@pytest.mark.parametrize("gone", ["transformer.wte.weight", "transformer.ln_f.weight"])
def test_a_language_model_may_lack_its_output_layer_alone(
    gpt2: Path, tmp_path: Path, gone: str
) -> None:
    """GPT-2's output layer is its embedding, so without that there is nothing at all."""
    message = refused(ArtifactError, without(gpt2, tmp_path / "holed", gone), "causal-lm")
    assert gone in message


def test_the_classes_that_a_kept_head_means(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    names = {0: "Yes", 1: "No"}
    model = BertForSequenceClassification.from_pretrained(bert, id2label=names)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)

    def foreign(*labels: str) -> tuple[str, ...]:
        return load_base(str(tmp_path), "classification", labels).foreign

    assert class_names(load_config(str(tmp_path))) == ("Yes", "No")
    assert class_names(load_config(str(bert))) == ()
    assert foreign("yes", "no") == ()
    assert foreign("no", "yes") == foreign("0", "1") == ("Yes", "No")
    assert foreign("a", "b", "c") == ()  # that head is replaced
