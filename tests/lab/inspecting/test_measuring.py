"""An inspection of real adapters: NumPy's numbers, any format, and what it does not cover."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peft_models as small
import rankwise as rw
from foreign import load, peft_folder
from rankwise.errors import ArtifactError, UserError
from rankwise.io.blueprint import blueprint
from rankwise.io.convert import Wishes, convert
from rankwise.io.loralib import Unsaid
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.io.weights import base_weight
from rankwise.lab.inspecting import inspect_adapter
from rankwise.lab.inspecting.measuring import evidence, uncovered
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Tokens
from rankwise.train.run import fit


def test_a_run_is_measured_beside_the_base_that_it_knows(finished: Callable[[str], Path]) -> None:
    run = finished("single")
    found = inspect_adapter(run)
    portable = read_peft_alone(run / "adapter")
    assert found.base is not None
    base = blueprint(found.base)
    assert [layer.name for layer in found.layers] == list(portable.factors)
    for layer in found.layers:
        factors = portable.factors[layer.name]
        delta = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
        weight = base_weight(portable, layer.name, base).double().numpy()
        u, s, vh = np.linalg.svd(delta)
        np.testing.assert_allclose(layer.spectrum.values, s[: factors.r], rtol=1e-9)
        assert layer.base_norm == pytest.approx(np.linalg.norm(weight))
        along = u[:, : factors.r].T @ weight @ vh[: factors.r].T
        wanted = np.linalg.norm(delta) / np.linalg.norm(along)
        assert layer.amplification == pytest.approx(wanted, rel=1e-5)
        assert layer.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight))
    assert any("not covered: modules that trained whole (classifier)" in n for n in found.notes)


@pytest.mark.parametrize("to", ["loralib", "mlx", "kohya", "diffusers", "gguf"])
def test_every_format_gives_the_same_numbers(to: str, llama: Path, tmp_path: Path) -> None:
    peft_folder(llama, tmp_path / "peft", r=2, target_modules=["q_proj"], lora_alpha=4)
    convert(tmp_path / "peft", to, tmp_path / to, Wishes(base=llama, component="unet"))
    wishes = Wishes(base=llama, component="unet", unsaid=Unsaid(alpha=4), allow_pickle=True)
    first, second = (inspect_adapter(tmp_path / name, wishes=wishes) for name in ("peft", to))
    assert [layer.name.split(".")[-3:] for layer in first.layers] == [
        layer.name.split(".")[-3:] for layer in second.layers
    ]
    for a, b in zip(first.layers, second.layers, strict=True):
        assert b.spectrum.values == pytest.approx(a.spectrum.values, rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_run_with_an_adapted_tied_output_is_inspected(
    kind: str,
    request: pytest.FixtureRequest,
    options: Callable[..., Any],
    rows: Path,
    tmp_path: Path,
) -> None:
    base: Path = request.getfixturevalue(kind)
    text = {"data": str(rows / "train.txt"), "eval": str(rows / "dev.txt"), "max_steps": 1}
    made = options(tmp_path / "run", model=str(base), target_modules=["lm_head"], **text)
    layers = {layer.name: layer for layer in inspect_adapter(fit(made).folder).layers}
    norm = load(base).get_output_embeddings().weight.norm().item()
    assert layers["lm_head"].base_norm == pytest.approx(norm, rel=1e-5)


def test_a_weight_that_the_runs_base_lacks_is_left_out_and_told(
    finished: Callable[[str], Path], llama: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished("single"), tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["config"]["model"] = str(llama)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = inspect_adapter(run)
    assert {layer.base_norm for layer in found.layers} == {None}
    assert any("no ‖W0‖ and no amplification of 4 layers" in note for note in found.notes)
    with pytest.raises(UserError, match="There is no weight of"):
        inspect_adapter(run, wishes=Wishes(base=llama))


def test_a_base_in_the_cache_of_the_hub_is_the_runs_own(
    finished: Callable[[str], Path],
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(finished("single"), tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["config"]["model"] = "someone/small"
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    cache = tmp_path / "cache"
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    bare = inspect_adapter(run)
    assert bare.base is None
    assert any(
        "'someone/small', is not on this machine; name it by --base" in n for n in bare.notes
    )
    home = cache / "models--someone--small"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(bert, home / "snapshots" / "abc")
    found = inspect_adapter(run)
    own = inspect_adapter(finished("single"))
    assert found.base == "someone/small"
    assert [a.base_norm for a in found.layers] == [b.base_norm for b in own.layers]
    assert None not in {layer.base_norm for layer in found.layers}


def adapter(folder: Path, r: int, seed: int, **more: torch.Tensor) -> Path:
    torch.manual_seed(seed)
    factors = {n: Factors(torch.randn(r, 20), torch.randn(16, r), 0.5) for n in ("a.q", "a.v")}
    write_peft_alone(Portable(assemble(factors, **more)), folder)  # type: ignore[arg-type]
    return folder


def test_two_adapters_are_compared_by_the_directions_they_share(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one", 3, 1), adapter(tmp_path / "two", 4, 2)
    same = inspect_adapter(one, other=one).layers[0].overlap
    found = inspect_adapter(one, other=two).layers[0].overlap
    assert same is not None
    assert found is not None
    assert (same.reads, same.writes, same.reads_top) == pytest.approx((1, 1, 1))
    rows = [read_peft_alone(p).factors["a.q"].A.double().numpy() for p in (one, two)]
    first, second = (np.linalg.qr(A.T)[0] for A in rows)
    assert found.reads == pytest.approx(np.linalg.norm(first.T @ second) ** 2 / 3)
    assert found.chance == 4 / 20
    assert len(found.grid) == 3
    assert len(found.grid[0]) == 4


def test_an_adapter_of_another_model_is_not_compared(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 2, 1)
    other = {"b.k": Factors(torch.ones(1, 20), torch.ones(16, 1), 1.0)}
    write_peft_alone(Portable(assemble(other)), tmp_path / "other")
    with pytest.raises(UserError, match="no adapted layer in common"):
        inspect_adapter(one, other=tmp_path / "other")
    wide = {"a.q": Factors(torch.ones(1, 24), torch.ones(16, 1), 1.0)}
    write_peft_alone(Portable(assemble(wide)), tmp_path / "wide")
    with pytest.raises(UserError, match="16 by 20 here and 16 by 24 there"):
        inspect_adapter(one, other=tmp_path / "wide")


def test_an_untrained_layer_is_zero_and_nan_is_refused(tmp_path: Path) -> None:
    factors = {
        "a.q": Factors(torch.randn(3, 20), torch.zeros(16, 3), 1.0),
        "a.v": Factors(torch.randn(3, 20), torch.randn(16, 3), 1.0),
    }
    write_peft_alone(Portable(assemble(factors)), tmp_path / "half")
    found = inspect_adapter(tmp_path / "half", other=tmp_path / "half")
    assert [layer.spectrum.rank for layer in found.layers] == [0, 3]
    assert [layer.overlap is None for layer in found.layers] == [True, False]
    factors["a.v"].B[0, 0] = float("nan")
    write_peft_alone(Portable(assemble(factors)), tmp_path / "nan")
    with pytest.raises(ArtifactError, match="not finite"):
        inspect_adapter(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        inspect_adapter(tmp_path / "nan", wishes=Wishes(allow_nonfinite=True))


def test_what_has_no_singular_values_is_told(tmp_path: Path) -> None:
    factors = {"a.q": Factors(torch.randn(2, 20), torch.randn(16, 2), 1.0)}
    made = assemble(
        factors, magnitudes={"a.q": torch.ones(16)}, biases={"a.q.bias": torch.ones(16)}
    )
    made = replace(made, tokens={"wte": Tokens((1, 2, 5), torch.zeros(3, 16))})
    told = " ".join(uncovered(made))
    for words in ("1 updates have a magnitude", "1 trained biases", "3 trained rows"):
        assert words in told


def test_rows_of_an_embedding_need_the_model_and_are_told(llama: Path, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"trainable_token_indices": [5, 17]}
    peft_folder(llama, tmp_path / "rows", r=2, target_modules=["q_proj"], lora_alpha=4, **rows)
    peft_folder(llama, tmp_path / "none", r=2, target_modules=["q_proj"], lora_alpha=4)
    with pytest.raises(UserError, match=r"trained rows of an embedding.*--base MODEL"):
        inspect_adapter(tmp_path / "rows")
    wishes = Wishes(base=llama)
    found = inspect_adapter(tmp_path / "rows", other=tmp_path / "none", wishes=wishes)
    plain = inspect_adapter(tmp_path / "none", other=tmp_path / "none", wishes=wishes)
    assert "not covered: 2 trained rows of embeddings." in found.notes
    for a, b in zip(found.layers, plain.layers, strict=True):
        assert a.spectrum.values == pytest.approx(b.spectrum.values, rel=1e-9)
        assert a.base_norm == pytest.approx(b.base_norm, rel=1e-6)
        assert a.amplification == pytest.approx(b.amplification, rel=1e-4)
        assert (a.overlap, b.overlap) != (None, None)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (small.Heads, ("first.q_proj", "second.out_proj")),
        (small.Mixture, ("blocks.0.experts.up", "blocks.1.experts.flat")),
        (lambda: small.Mixture(turned=True), ("blocks.0.experts.up", "router")),
        (small.Convolutions, ("one", "three")),
    ],
)
def test_a_model_gives_the_weights_that_files_do_not(build: Any, names: tuple[str, ...]) -> None:
    """Attention, banks and convolutions, each weight of a bank by itself."""
    model = small.make(build)
    adapted = small.make(build)
    rw.attach(adapted, small.lora(*names))
    small.randomise(adapted)
    portable = Portable(rw.adapter_of(adapted))
    layers = {layer.name: layer for layer in evidence(portable, model, portable)}
    assert set(layers) == set(names)
    parameters = dict(model.named_parameters())
    for name, layer in layers.items():
        f = portable.factors[name]
        weight = parameters.get(name, parameters.get(f"{name}.weight"))
        if name == "first.q_proj":
            weight = parameters["first.in_proj_weight"][:16]
        assert weight is not None
        w = weight.detach().double()
        stored = (
            (w.mT if f.bank and model.blocks[0].experts.is_transposed else w)
            .reshape(f.bank or 1, f.out_features, f.in_features)
            .numpy()
        )
        deltas = f.delta().double().reshape(stored.shape).numpy()
        u, s, vh = np.linalg.svd(deltas, full_matrices=False)
        r = f.r
        values = np.sqrt((s[:, :r] ** 2).sum(0))
        np.testing.assert_allclose(layer.spectrum.values, values, rtol=1e-5)
        assert layer.base_norm == pytest.approx(np.linalg.norm(stored), rel=1e-6)
        along = u[:, :, :r].transpose(0, 2, 1) @ stored @ vh[:, :r].transpose(0, 2, 1)
        wanted = np.linalg.norm(deltas) / np.linalg.norm(along)
        assert layer.amplification == pytest.approx(wanted, rel=1e-4)
        assert layer.overlap is not None
        assert layer.overlap.reads == pytest.approx(1)
        assert np.array(layer.overlap.grid).shape == (r, r)
    banks = [note for note in uncovered(portable.adapter) if note.startswith("banks: ")]
    assert bool(banks) == any(f.bank for f in portable.factors.values())
