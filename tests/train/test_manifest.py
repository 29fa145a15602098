import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.attaching import attach
from rankwise.errors import ArtifactError, UserError
from rankwise.methods.full import Full
from rankwise.methods.head import HeadOnly
from rankwise.methods.lora import LoRA
from rankwise.train.config import make_config
from rankwise.train.manifest import (
    counts,
    describe_data,
    method_record,
    read_manifest,
    surroundings,
    write,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def test_counts_of_lora_by_formula_and_by_count() -> None:
    model = network()
    attach(model, LoRA(r=2, target_modules=["0"], head="train"))
    assert counts(model) == {
        "base": (5 * 7 + 7) + (7 * 3 + 3),
        "adapter": 2 * (5 + 7),
        "adapter_formula": 2 * (5 + 7),
        "head": 7 * 3 + 3,
        "trainable": 2 * (5 + 7) + (7 * 3 + 3),
    }


def test_counts_without_updates() -> None:
    every = (5 * 7 + 7) + (7 * 3 + 3)
    head, full = network(), network()
    attach(head, HeadOnly())
    attach(full, Full())
    assert counts(head) == {
        "base": every, "adapter": 0, "adapter_formula": None, "head": 24, "trainable": 24
    }  # fmt: skip
    assert counts(full) == {
        "base": every, "adapter": 0, "adapter_formula": None, "head": 0, "trainable": every
    }  # fmt: skip


def test_what_is_written_is_read_with_null_for_what_json_has_not(tmp_path: Path) -> None:
    manifest = {"format": 1, "metrics": {"pearson": math.nan, "loss": 0.5}, "all": [math.inf, (1,)]}
    write(tmp_path, manifest)
    assert "NaN" not in (tmp_path / "manifest.json").read_text()
    assert read_manifest(tmp_path) == {
        "format": 1,
        "metrics": {"pearson": None, "loss": 0.5},
        "all": [None, [1]],
    }


def test_folders_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}', "\xff"])
def test_damaged_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="manifest"):
        read_manifest(tmp_path)


def test_the_name_of_a_method() -> None:
    def record(**options: Any) -> tuple[str, dict[str, Any]]:
        return method_record(make_config({"model": "m", "data": "d", "out": "o"} | options, "test"))

    name, told = record(r=4, target_modules="query")
    assert (name, told["alpha"], told["target_modules"]) == ("LoRA r=4", 8.0, ["query"])
    assert record(method="head") == ("head-only", {"method": "head"})
    assert record(method="full")[0] == "full fine-tuning"


def test_the_surroundings_are_this_machine_s(repository: Path) -> None:
    import transformers

    found = surroundings(torch.device("cpu"), "float32", "asked for")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["hardware"]["device"] == "cpu"
    asked = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    head = subprocess.run(asked, capture_output=True, text=True, check=False)
    commit = found["code"]["commit"]
    if head.returncode == 0:
        assert commit is not None
        assert commit.rstrip("+") == head.stdout.strip()
    else:
        assert commit is None


def test_a_run_s_manifest_tells_where_it_came_from(
    finished: Callable[[str], Path], bert: Path, rows: Path, look: Any
) -> None:
    from rankwise.data.examples import load_examples
    from rankwise.train.model import fingerprint_folder

    manifest = look.manifest(finished("single"))
    assert manifest["status"] == "finished"
    assert manifest["base"] == {"source": str(bert), "fingerprint": fingerprint_folder(bert)}
    train = load_examples(rows / "train.tsv")
    assert manifest["data"]["train"] == describe_data(train)
    assert manifest["data"]["train"]["rows"] == 48
    assert manifest["data"]["eval"]["rows"] == 21
    assert manifest["label_names"] == ["0", "1"]
    assert (manifest["task"], manifest["form"], manifest["metric"]) == (
        "classification",
        "text",
        "accuracy",
    )
    assert manifest["steps"] == 18
    adapter = finished("single") / "adapter"
    assert manifest["artifact_bytes"] == sum(f.stat().st_size for f in adapter.iterdir())
    assert json.loads(json.dumps(manifest)) == manifest
