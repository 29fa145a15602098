"""PEFT's folder: every way it can be wrong, each refused with its reason, the model untouched."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import ArtifactError, UserError
from rankwise.io.adapters import load_adapter, save_adapter


def refused(folder: Path, model: torch.nn.Module, message: str) -> None:
    """Refused with exit code 3, the message, and the model as it was."""
    before = [type(m) for m in model.modules()]
    with pytest.raises(ArtifactError, match=message) as found:
        load_adapter(model, folder)
    assert found.value.exit_code == 3
    assert [type(m) for m in model.modules()] == before


QUERY = "base_model.model.blocks.1.query."


def without(*ends: str):
    return lambda tensors: {k: t for k, t in tensors.items() if not k.endswith(ends)}


def renamed(old: str, new: str):
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


def changed(end: str, make):
    return lambda tensors: {k: make(t) if k.endswith(end) else t for k, t in tensors.items()}


DAMAGE = {
    "no B": (without("1.query.lora_B.weight"), r"'blocks\.1\.query', and the file has no lora_B"),
    "no layer": (
        without("1.query.lora_B.weight", "1.query.lora_A.weight"),
        r"'blocks\.1\.query', and the file has no lora_A and no lora_B",
    ),
    "nothing of LoRA": (
        without("lora_A.weight", "lora_B.weight"),
        r"(?s)'blocks\.0\.query', and the file.*'blocks\.1\.query', and the file",
    ),
    "no head": (without("head.bias"), r"head\.bias' is missing; 'head' trained whole"),
    "other prefix": (
        renamed("base_model.model.", "model."),
        (
            r"(?s)query', and the file has no lora_A and no lora_B.*'base_model\.model\.model\.bl"
            r".*has no place in this model\. Did you mean 'base_model\.model\.blocks.*its names "
            r"were read like this: 'base_model\.model\.' was not in front of all of them"
        ),
    ),
    "other name": (
        renamed("1.query", "1.qeury"),
        r"1\.qeury\.lora_A\.weight' has no place in this model\. Did you mean '.*1\.query\.lora_A",
    ),
    "extra tensor": (
        lambda t: {**t, "base_model.model.extra.weight": torch.ones(2)},
        r"'base_model\.model\.extra\.weight' has no place",
    ),
    "extra layer": (
        lambda t: {**t, "base_model.model.fc.lora_A.weight": torch.ones(2, 8)},
        "the file has factors for 'fc', which target_modules does not mean",
    ),
    "whole numbers": (
        changed("1.query.lora_A.weight", lambda t: t.to(torch.int64)),
        r"lora_A of 'blocks\.1\.query' is torch\.int64, and floating-point",
    ),
    "transposed": (
        changed("1.query.lora_A.weight", lambda t: t.T.contiguous()),
        r"lora_A of 'blocks\.1\.query' has shape \(8, 2\), expected \(2, 8\): it is transposed",
    ),
    "rank": (
        changed("1.query.lora_B.weight", lambda t: t[:, :1].contiguous()),
        r"lora_B of 'blocks\.1\.query' has rank 1, and r is 2 in adapter_config",
    ),
    "other width": (
        changed("1.query.lora_A.weight", lambda t: torch.ones(2, 16)),
        r"has shape \(2, 16\), expected \(2, 8\): it was made for another base",
    ),
    "convolution": (
        changed("1.query.lora_A.weight", lambda t: t[..., None, None].contiguous()),
        r"has shape \(2, 8, 1, 1\), expected \(2, 8\): it was made for another base",
    ),
    "one number": (changed("1.query.lora_A.weight", lambda t: t[0, 0].clone()), r"has shape \(\)"),
    "head shape": (
        changed("head.bias", lambda t: torch.ones(5)),
        r"head\.bias' has shape \(5,\), and \(3,\) in the model",
    ),
    "embedding names": (
        renamed("1.query.lora_A.weight", "1.query.lora_embedding_A"),
        r"(?s)'blocks\.1\.query', and the file has no lora_A .*lora_embedding_A' has no place",
    ),
    "nan": (
        changed("1.query.lora_A.weight", lambda t: t.fill_(float("nan"))),
        r"blocks\.1\.query\.lora_A\.weight' has 16 of 16 NaN or infinite",
    ),
    "dora": (
        lambda t: {**t, QUERY + "lora_magnitude_vector": torch.ones(8)},
        "belongs to DoRA, and use_dora is off",
    ),
    "two adapters": (
        lambda t: {
            k.replace("lora_A.", "lora_A.x.").replace("lora_B.", "lora_B.y."): v
            for k, v in t.items()
        },
        r"mix several adapters \('x', 'y'\)",
    ),
    "two spellings": (
        lambda t: {**t, QUERY + "lora_A.default.weight": torch.ones(2, 8)},
        "occurs twice, in two spellings",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_does_not_fit_is_refused(spoil, base, case: str):
    tensors, message = DAMAGE[case]
    refused(spoil(tensors), base(), message)


SETTINGS = {
    "rank": ({"r": 4}, r"(?s)lora_A of 'blocks\.0\.query' has rank 2, and r is 4"),
    "huge rank": ({"r": 10**9}, "has rank 2, and r is 1,000,000,000"),
    "one rank": ({"rank_pattern": {"0.query": 3}}, r"'blocks\.0\.query' has rank 2, and r is 3"),
    "nothing meant": ({"target_modules": ["nope"]}, "target_modules means no module of this model"),
    "too much meant": (
        {"target_modules": ["query", "fc"]},
        r"'blocks\.0\.fc', and the file has no",
    ),
    "too little meant": ({"target_modules": ["0.query"]}, r"factors for 'blocks\.1\.query', which"),
    "malformed": ({"target_modules": "(query"}, "is not a regular expression"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_configuration_that_contradicts_the_tensors_is_refused(spoil, base, case: str):
    config, message = SETTINGS[case]
    refused(spoil(**config), base(), message)


def test_all_that_is_wrong_comes_in_one_error(spoil, base):
    folder = spoil(
        lambda t: without("0.query.lora_B.weight", "head.bias")(renamed("1.q", "1.Q")(t))
    )
    refused(
        folder,
        base(),
        r"(?s)0\.query', and the file.*1\.query', and the file.*head\.bias.*1\.Query",
    )


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_base_of_another_depth_is_refused(saved: Path, base, blocks: int):
    message = {1: r"blocks\.1\.query.* has no place", 4: r"'blocks\.3\.query', and the file has no"}
    refused(saved, base(blocks=blocks), message[blocks])


def test_a_base_of_the_same_shape_with_other_weights_is_refused(tmp_path: Path, trained, base):
    folder = save_adapter(trained(), tmp_path / "a", base_model_name="tiny/one")
    refused(
        folder,
        base(seed=1),
        r"made for 'tiny/one', does not fit this Tiny: it was made on another base \('tiny/one'\): "
        r"the weight of 'blocks\.0\.query' has a sampled norm of",
    )


def test_a_base_in_another_dtype_is_the_same_base(saved: Path, base):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        load_adapter(base().to(dtype), saved)


def test_numbers_that_are_not_finite_load_on_demand(spoil, base):
    folder = spoil(changed("1.query.lora_A.weight", lambda t: t.fill_(float("inf"))))
    model = base()
    load_adapter(model, folder, allow_nonfinite=True)
    assert model.blocks[1].query.update.lora_A.isinf().all()


def test_tensors_in_half_precision_are_widened(spoil, base, trained):
    load_adapter(model := base(), spoil(lambda t: {k: v.bfloat16() for k, v in t.items()}))
    layer = model.blocks[0].query.update
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer.lora_A, trained().blocks[0].query.update.lora_A.bfloat16().float())


@pytest.mark.parametrize(
    "spelling",
    [
        renamed("base_model.model.", "base_model.model._orig_mod."),
        renamed("base_model.model.", "_orig_mod.base_model.model."),
        lambda t: {
            k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): v
            for k, v in t.items()
        },
    ],
    ids=["compiled inside", "compiled outside", "adapter name"],
)
def test_names_of_compiled_models_and_of_plain_state_dicts_are_understood(
    spoil, base, trained, ids, spelling
):
    load_adapter(model := base(), spoil(spelling))
    assert torch.equal(model.eval()(ids), trained()(ids))


def test_base_weights_in_the_file_must_be_those_of_the_base(spoil, base, saved: Path):
    key = "base_model.model.embed.base_layer.weight"
    weight = base().embed.weight.detach()
    spoil(lambda t: {**t, key: weight.bfloat16()})
    load_adapter(base(), saved)
    for other in (weight + 0.1, weight[:10].clone()):
        folder = spoil(lambda t, other=other: {**t, key: other})
        refused(folder, base(), "'embed.weight' that is not the one of this model")


def test_a_damaged_note_in_the_metadata_is_refused(saved: Path, base):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {"rankwise.trained": "[1]"})
    refused(saved, base(), r"'rankwise\.trained' of its metadata is damaged")
    save_file(tensors, path, {"rankwise.base": "{}"})
    refused(saved, base(), "no sketch of version 2")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("content", ["bomb", "text", "cut zip"])
def test_a_pickle_is_never_opened(saved: Path, base, tmp_path: Path, content: str):
    weights = saved / "adapter_model.bin"
    sentinel = tmp_path / "sentinel"
    torch.save({"x": Bomb(sentinel)}, weights)
    if content == "text":
        weights.write_text("hello")
    if content == "cut zip":
        weights.write_bytes(weights.read_bytes()[:100])
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, base(), r"holds 'adapter_model\.bin'.*does not open it\. Convert to safetensors")
    assert not sentinel.exists()


def test_a_file_of_no_bytes_is_called_empty(saved: Path, base):
    (saved / "adapter_model.safetensors").write_bytes(b"")
    refused(saved, base(), "is empty")


def test_a_cut_file_tells_what_it_needs_and_has(saved: Path, base):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(saved, base(), r"expected \d+ bytes of data, has \d+")


def test_a_folder_without_weights_names_them(saved: Path, base):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_modle.safetensors")
    with pytest.raises(UserError, match=r"Did you mean 'adapter_modle\.safetensors'"):
        load_adapter(base(), saved)


def test_weights_behind_a_link_are_read(saved: Path, base, tmp_path: Path):
    path = saved / "adapter_model.safetensors"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    load_adapter(base(), saved)
