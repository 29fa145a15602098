"""Exported models: run by torch.export and onnxruntime alone, and refused where they differ."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import EnvironmentFault, RankwiseError, UserError
from rankwise.train.exported import ExportReport, Format, Onnx, TorchExport, export_model
from rankwise.train.graph import ExportError

IDS = torch.randint(12, (3, 4), generator=torch.Generator().manual_seed(1))
FORMS: list[Format] = [TorchExport(), Onnx()]


class Tagger(nn.Module):
    """An embedding, a layer and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.words(ids))))


def adapted(merged: bool) -> nn.Module:
    """A tagger with updates that do something, on all three kinds of places."""
    model = Tagger()
    rw.attach(model, rw.LoRA(r=2, target_modules=["words", "inner"], dora=True, head="train"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    if merged:
        rw.merge(model, keep=False)
    return model


def run_alone(folder: Path, inputs: Mapping[str, Tensor], output: str = "output") -> Tensor:
    """What the file in the folder computes, by torch.export or onnxruntime alone."""
    if (folder / "model.pt2").exists():
        return torch.export.load(folder / "model.pt2").module()(**inputs)[output]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (found,) = session.run([output], {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("form", FORMS, ids=["torch-export", "onnx"])
def test_the_file_computes_what_the_model_computes_on_other_shapes(
    form: Format, merged: bool, tmp_path: Path
):
    model = adapted(merged).train()
    report = export_model(model, tmp_path / "out", {"ids": IDS}, form)
    assert model.training
    assert any(p.requires_grad for p in model.parameters())
    assert [p.name for p in (tmp_path / "out").iterdir()] == [form.file]
    for rows, length in ((1, 1), (5, 9)):
        ids = torch.randint(12, (rows, length))
        found = run_alone(tmp_path / "out", {"ids": ids})
        torch.testing.assert_close(found, model.eval()(ids).detach(), rtol=1e-5, atol=1e-5)
    checked = [check.shapes for check in report.checks]
    assert checked == [{"ids": (3, 4)}, {"ids": (1, 2)}]
    assert all(check.error <= check.tolerance < 1e-3 for check in report.checks)
    content = (tmp_path / "out" / form.file).read_bytes()
    assert report.sha256 == {form.file: hashlib.sha256(content).hexdigest()}


def test_the_names_of_open_axes_are_in_the_onnx_file(tmp_path: Path):
    import onnx

    axes = {"ids": {0: "rows", 1: "words"}}
    export_model(adapted(merged=True), tmp_path / "out", IDS, Onnx(opset=18), dynamic=axes)
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert {o.version for o in written.opset_import if o.domain == ""} == {18}
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    }
    assert shapes == {"ids": ["rows", "words"], "output": ["rows", "words", 3]}


def told(report: ExportReport) -> str:
    return report.line().partition(";")[2].strip()


def test_the_report_says_what_was_checked_and_what_the_file_takes(tmp_path: Path):
    report = export_model(Tagger(), tmp_path / "open", IDS, TorchExport())
    assert told(report) == "takes any batch, any length"
    assert report.to_json() == {
        "format": "torch-export",
        "sha256": {"model.pt2": f"sha256:{report.sha256['model.pt2']}"},
        "inputs": {"ids": {"0": "batch", "1": "length"}},
        "outputs": ["output"],
        "longest": {"batch": None, "length": None},
        "error": report.error,
        "checks": [
            {
                "shapes": {"ids": shape},
                "error": check.error,
                "tolerance": check.tolerance,
            }
            for shape, check in zip([[3, 4], [1, 2]], report.checks, strict=True)
        ],
        "versions": {"torch": str(torch.__version__)},
    }
    fixed = export_model(Tagger(), tmp_path / "fixed", IDS, TorchExport(), dynamic={})
    assert told(fixed) == "takes this shape alone"
    assert len(fixed.checks) == 1


def test_what_a_mask_leaves_out_is_not_compared(tmp_path: Path):
    class Noisy(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            noise = torch.rand_like(x) * (1 - attention_mask[..., None])
            return x * 2 + noise

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    example = {"x": torch.randn(3, 4, 2), "attention_mask": mask}
    axes = {"x": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    report = export_model(Noisy(), tmp_path / "out", example, TorchExport(), dynamic=axes)
    assert report.error == 0


# --- what is refused -----------------------------------------------------------------------------


def refused(folder: Path, model: nn.Module, example: Any, form: Format) -> RankwiseError:
    with pytest.raises(RankwiseError) as caught:
        export_model(model, folder / "out", example, form)
    return caught.value


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path):
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    error = refused(tmp_path, Random(), torch.zeros(3, 4), TorchExport())
    assert isinstance(error, ExportError)
    assert error.exit_code == 3
    assert "computes something else than the model: on inputs x (3, 4)" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_followed_is_told_and_leaves_nothing(tmp_path: Path):
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    error = refused(tmp_path, Chooses(), torch.ones(3, 4), TorchExport())
    assert isinstance(error, ExportError)
    assert "Chooses cannot be written as torch-export and run: " in str(error)
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_cannot_run_is_told_with_the_way_out(tmp_path: Path):
    error = refused(tmp_path, Tagger().bfloat16(), IDS, Onnx())
    assert "Export it in float32 (--dtype float32), not in bfloat16." in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    error = refused(tmp_path, Tagger(), IDS, Onnx())
    assert isinstance(error, EnvironmentFault)
    assert f"the package {name}, which is not installed" in str(error)
    assert 'pip install "rankwise[onnx]"' in str(error)


def test_a_folder_that_holds_something_is_not_written_over(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    error = refused(tmp_path, Tagger(), IDS, TorchExport())
    assert isinstance(error, UserError)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_example_that_does_not_fit_leaves_nothing(tmp_path: Path):
    assert isinstance(refused(tmp_path, Tagger(), [IDS, IDS], TorchExport()), UserError)
    assert list(tmp_path.iterdir()) == []
