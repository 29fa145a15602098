"""Checkpoints of real loralib models: read to the same function, written so that loralib reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from foreign import our_outputs, outputs, same_deltas
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint_of
from rankwise.io.loralib import Unsaid, read_loralib, write_loralib
from rankwise.io.portable import Portable, assemble
from rankwise.layers import Split
from rankwise.lowrank import Factors


class Net(nn.Module):
    """One layer of each kind that loralib has, or its plain counterpart."""

    def __init__(self, adapted: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        extra: dict[str, Any] = {"r": 2, "lora_alpha": 6} if adapted else {}
        kinds: Any = loralib if adapted else nn
        merged: Any = loralib.MergedLinear if adapted else nn.Linear
        parts = {"enable_lora": [True, False, True]} if adapted else {}
        self.tokens = kinds.Embedding(11, 9, **extra)
        self.query = kinds.Linear(9, 6, **extra)
        self.qkv = merged(6, 12, **extra, **parts)
        self.conv = kinds.Conv2d(1, 20, 3, padding=1, **extra)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.qkv(self.query(self.tokens(ids)))
        x = self.conv(x[:, None]).mean(dim=(1, 2))
        return self.head(x[..., :4])


UNSAID = Unsaid(alpha=6, enable_lora={"qkv": (True, False, True)}, embeddings=["tokens"])
X = torch.tensor([[1, 4, 7], [2, 9, 3]])


def trained() -> tuple[Net, Net]:
    """A loralib model with random factors, and the plain model it began as."""
    model, plain = Net(True), Net(False)
    weights = {k.replace("conv.conv.", "conv."): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train(), plain


def saved(model: nn.Module, path: Path, bias: str = "none") -> Path:
    torch.save(loralib.lora_state_dict(model, bias=bias), path)
    return path


def read(path: Path, unsaid: Unsaid = UNSAID, **more: Any) -> Portable:
    return read_loralib(path, unsaid, allow_pickle=True, **more)


def attached(plain: nn.Module, portable: Portable) -> nn.Module:
    import rankwise

    model = copy.deepcopy(plain)
    rankwise.attach(model, portable.adapter)
    return model


def test_every_kind_of_layer_computes_what_loralib_computes(tmp_path: Path):
    model, plain = trained()
    portable = read(saved(model, tmp_path / "x.pt"), base=blueprint_of(plain))
    assert list(portable.factors) == ["tokens", "query", "qkv.q_proj", "qkv.v_proj", "conv"]
    assert portable.embeddings == {"tokens"}
    assert portable.kernels["conv"].shape == (1, 3, 3)
    assert portable.adapter.method.split == {
        "qkv": Split(("q_proj", "k_proj", "v_proj"), (4, 4, 4))
    }
    torch.testing.assert_close(attached(plain, portable)(X), model(X), rtol=0, atol=1e-6)
    assert (plain(X) - model(X)).abs().max() > 0.1


def test_a_gpt2_as_in_the_paper(gpt2: Path, tmp_path: Path):
    """Query and value of GPT-2's fused c_attn, by MergedLinear, as loralib's own example does."""
    from foreign import load

    model = load(gpt2)
    for block in model.transformer.h:
        old = block.attn.c_attn
        new = loralib.MergedLinear(
            32, 96, r=4, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True
        )
        new.weight.data, new.bias.data = old.weight.data, old.bias.data
        nn.init.normal_(new.lora_B, std=0.05)
        block.attn.c_attn = new
    torch.save({"model_state_dict": loralib.lora_state_dict(model)}, tmp_path / "x.pt")
    unsaid = Unsaid(alpha=32, enable_lora={"c_attn": (True, False, True)})
    portable = read(tmp_path / "x.pt", unsaid)
    want = outputs(model)  # in eval mode, but for the new layers, which do not merge
    assert (our_outputs(gpt2, portable) - want).abs().max() < 1e-6
    assert (outputs(load(gpt2)) - want).abs().max() > 0.1


def test_alpha_has_no_default(tmp_path: Path):
    path = saved(trained()[0], tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"does not hold alpha.*Give the lora_alpha"):
        read(path, Unsaid(enable_lora=UNSAID.enable_lora))


def test_the_scale_is_alpha_over_the_rank_of_the_shapes(tmp_path: Path):
    path = saved(trained()[0], tmp_path / "x.pt")
    portable = read(path)
    assert {f.scale for f in portable.factors.values()} == {3.0, 1.0}  # conv has rank r·k unseen
    assert portable.notes[0] == "alpha: 6, as was said; the file holds none"


def test_a_merged_linear_must_be_explained(tmp_path: Path):
    path = saved(trained()[0], tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"'qkv' has A \(4, 6\).*--enable-lora qkv=101"):
        read(path, Unsaid(alpha=6))
    with pytest.raises(ArtifactError, match="enable_lora 100 does not go with"):
        read(path, Unsaid(alpha=6, enable_lora={"qkv": (True, False, False)}))


def test_what_is_said_of_no_layer_is_refused(tmp_path: Path):
    path = saved(trained()[0], tmp_path / "x.pt")
    unsaid = Unsaid(alpha=6, enable_lora={"qvk": (True, False, True)}, embeddings=["wte"])
    with pytest.raises(UserError, match=r"(?s)'qvk' is none .*Did you mean 'qkv'.*'wte' is none"):
        read(path, unsaid)


def test_without_a_base_a_note_tells_what_was_taken_on_trust(tmp_path: Path):
    model, plain = trained()
    path = saved(model, tmp_path / "x.pt")
    assert "2 updates were read as those of linear layers" in read(path).notes[-1]
    assert len(read(path, base=blueprint_of(plain)).notes) == 1


def test_a_layer_of_another_base_is_refused(tmp_path: Path):
    model, plain = trained()
    plain.query = nn.Linear(9, 7)
    with pytest.raises(ArtifactError, match=r"'query' is an update of 6 x 9.*\(7, 9\)"):
        read(saved(model, tmp_path / "x.pt"), base=blueprint_of(plain))


def test_one_part_on_is_told_by_the_base(tmp_path: Path):
    layer = nn.ModuleDict(
        {"qkv": loralib.MergedLinear(6, 12, r=2, enable_lora=[True, False, False])}
    )
    path = saved(layer, tmp_path / "x.pt")
    base = blueprint_of(nn.ModuleDict({"qkv": nn.Linear(6, 12)}))
    with pytest.raises(ArtifactError, match=r"'qkv' is an update of 4 x 6.*enable_lora"):
        read(path, Unsaid(alpha=1), base=base)
    unsaid = Unsaid(alpha=1, enable_lora={"qkv": (True, False, False)})
    assert list(read(path, unsaid, base=base).factors) == ["qkv.q_proj"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"query.lora_B": None}, "'query' has no B"),
        ({"query.lora_A": torch.ones(2, 9, dtype=torch.int32)}, "'query' is torch.int32"),
        ({"query.lora_A": torch.ones(9, 2)}, r"'query' has A \(9, 2\) and B \(6, 2\)"),
        ({"query.lora_A": torch.full((2, 9), torch.nan)}, "query.lora_A' has 18 of 18 NaN"),
        ({"stray": torch.ones(2)}, "1 further tensors, as 'stray'"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Any], told: str):
    state = dict(loralib.lora_state_dict(trained()[0])) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=told):
        read(tmp_path / "x.pt")


def test_a_file_without_factors_is_refused(tmp_path: Path):
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="no low-rank factors"):
        read(tmp_path / "x.pt", Unsaid(alpha=1))


def test_the_same_keys_are_read_from_safetensors(tmp_path: Path):
    model, _ = trained()
    save_file(dict(loralib.lora_state_dict(model)), tmp_path / "x.safetensors")
    portable = read_loralib(tmp_path / "x.safetensors", UNSAID)
    assert same_deltas(portable, read(saved(model, tmp_path / "x.pt")), 0)


def test_loralib_loads_what_is_written(tmp_path: Path):
    model, plain = trained()
    portable = read(saved(model, tmp_path / "x.pt"))
    del (factors := dict(portable.factors))["conv"]
    written = write_loralib(portable.with_factors(factors), tmp_path / "y.pt")
    assert "MergedLinear: 'qkv' has enable_lora=[True, False, True]" in written.notes
    assert written.notes[-1] == "loralib: build its layers with lora_alpha=6 and r=2"
    again = Net(True)
    state = torch.load(tmp_path / "y.pt", weights_only=True)
    assert not again.load_state_dict(state, strict=False).unexpected_keys
    for name in ("tokens", "query", "qkv"):
        for side in ("lora_A", "lora_B"):
            ours, theirs = (getattr(m.get_submodule(name), side) for m in (again, model))
            assert torch.equal(ours, theirs)
    assert plain.query.weight.shape == again.query.weight.shape


def test_mixed_strengths_become_one_alpha(tmp_path: Path):
    own = {
        "q": Factors(torch.randn(2, 5), torch.randn(6, 2), 2.0),
        "k": Factors(torch.randn(2, 5), torch.randn(6, 2), 3.0),
        "v": Factors(torch.randn(3, 5), torch.randn(6, 3), 2.0),
    }
    portable = Portable(assemble(own))
    written = write_loralib(portable, tmp_path / "x.pt")
    assert written.notes[-1] == "loralib: build its layers with lora_alpha=2 and r=2 or 3"
    back = read(tmp_path / "x.pt", Unsaid(alpha=2))
    assert same_deltas(back, portable)
    for name, f in own.items():
        layer = loralib.Linear(5, 6, r=f.r, lora_alpha=2)
        state = torch.load(tmp_path / "x.pt", weights_only=True)
        layer.load_state_dict({k[2:]: t for k, t in state.items() if k[0] == name}, strict=False)
        before = layer.weight.detach().clone()
        layer.eval()  # which merges
        torch.testing.assert_close(layer.weight.detach() - before, f.delta(), rtol=1e-5, atol=1e-5)


def test_parts_that_no_merged_linear_has_become_one_update(tmp_path: Path):
    own = {
        "c.q": Factors(torch.randn(2, 5), torch.randn(4, 2), 2.0),
        "c.v": Factors(torch.randn(3, 5), torch.randn(2, 3), 2.0),
    }
    split = Split(("q", "k", "v"), (4, 6, 2))
    portable = Portable(assemble(own, splits={"c": split}))
    write_loralib(portable, tmp_path / "x.pt")
    back = read(tmp_path / "x.pt", Unsaid(alpha=5))
    dense = back.factors["c"].delta()
    torch.testing.assert_close(dense[:4], own["c.q"].delta())
    torch.testing.assert_close(dense[10:], own["c.v"].delta())
    assert not dense[4:10].any()


def test_modules_trained_whole_are_kept_and_read(tmp_path: Path):
    own = {"q": Factors(torch.randn(2, 5), torch.randn(6, 2), 2.0)}
    head = {"head.weight": torch.randn(3, 6), "head.bias": torch.randn(3)}
    write_loralib(Portable(assemble(own, modules=["head"], trained=head)), tmp_path / "x.pt")
    back = read(tmp_path / "x.pt", Unsaid(alpha=4, modules=["head"])).adapter
    assert back.modules == ("head",)
    assert all(torch.equal(back.trained[k], t) for k, t in head.items())


def test_what_loralib_cannot_hold_is_refused(tmp_path: Path):
    own = {"q": Factors(torch.randn(2, 5), torch.randn(6, 2), 2.0)}
    adapter = assemble(own, magnitudes={"q": torch.ones(6)}, biases={"q.bias": torch.ones(6)})
    with pytest.raises(UserError, match=r"(?s)trained biases.*loralib has no DoRA"):
        write_loralib(Portable(adapter), tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
