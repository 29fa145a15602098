"""Runs of BitFit, bottlenecks and prefixes: config to record, resumed bit for bit, not merged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.errors import UserError
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
from rankwise.methods.prefix import PrefixTuning
from rankwise.train.config import FitConfig, make_config
from rankwise.train.config_file import dump_config
from rankwise.train.counting import count_model
from rankwise.train.export import merge_run
from rankwise.train.manifest import method_record
from rankwise.train.model import load_base
from rankwise.train.planning import plan_model
from rankwise.train.restore import restore
from rankwise.train.run import fit
from rankwise.train.setup import make_method
from rankwise.train.signals import Interrupted

METHODS = ("bitfit", "bottleneck", "prefix")
each = pytest.mark.parametrize("method", METHODS)
# BERT of two layers of 32, as in conftest.py: biases of query, key, value, both outputs and norms,
# and the wider one of the feed-forward part; the embeddings' norm and the pooler
BIASES = 2 * (5 * 32 + 64 + 2 * 32) + 2 * 32
ADDED = {
    "bitfit": BIASES,
    "bottleneck": 4 * (2 * 64 * 32 + 64 + 32) + 5 * 2 * 32,
    "prefix": 2 * 2 * 16 * 32,
}
Options = Callable[..., FitConfig]


@each
def test_a_run_leaves_a_record_and_an_adapter_that_predicts_the_same(
    method: str, options: Options, tmp_path: Path, bert: Path, look: SimpleNamespace
) -> None:
    done = fit(options(tmp_path / "run", method=method, epochs=2))
    assert done.manifest["status"] == "finished"
    counts = done.manifest["counts"]
    assert counts["adapter"] == counts["adapter_formula"] == ADDED[method]
    assert counts["head"] == 2 * 32 + 2
    assert counts["trainable"] == ADDED[method] + counts["head"]
    assert done.manifest["method"]["trained"] == ["classifier"]
    again = restore(tmp_path / "run", which="last").base.model
    kept = dict(done.model.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in again.named_parameters())
    held = sum(t.nbytes for t in look.tensors(tmp_path / "run" / "adapter").values())
    assert held == 4 * counts["trainable"]
    [counted] = count_model(config(model=str(bert), method=method), methods=[method]).methods
    assert (counted.trained, counted.file_bytes) == (counts["trainable"], held)


@each
def test_it_goes_on_bit_for_bit_where_it_was_stopped(
    method: str, options: Options, tmp_path: Path, look: SimpleNamespace
) -> None:
    whole = fit(options(tmp_path / "whole", method=method, epochs=2))
    config = options(tmp_path / "halted", method=method, epochs=2)

    class Stopper:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

        def advance(self, done: int, values: Any) -> None:
            if done == 4:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(config, reporter=Stopper())  # type: ignore[arg-type]
    halted = fit(config, resume=True)
    assert halted.manifest["metrics"] == whole.manifest["metrics"]
    for which in ("adapter", "last"):
        first, second = (look.tensors(tmp_path / run / which) for run in ("whole", "halted"))
        assert list(first) == list(second)
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_merging_is_refused_at_once_and_says_why(
    method: str, options: Options, tmp_path: Path
) -> None:
    fit(options(tmp_path / "run", method=method, max_steps=2))
    (tmp_path / "run" / "adapter" / "trained.safetensors").unlink()  # nothing of it is read
    with pytest.raises(UserError, match=r"cannot be merged: what it added .* no weight of the"):
        merge_run(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_bitfit_merges_into_a_plain_folder(options: Options, tmp_path: Path) -> None:
    fit(options(tmp_path / "run", method="bitfit", max_steps=2))
    assert merge_run(tmp_path / "run", tmp_path / "merged").passed


def test_a_decoder_learns_text_with_a_prefix(
    options: Options, tmp_path: Path, llama: Path, rows: Path
) -> None:
    texts = {"data": str(rows / "train.txt"), "eval": str(rows / "dev.txt"), "max_steps": 3}
    method = {"method": "prefix", "prefix_length": 4}
    done = fit(options(tmp_path / "run", model=str(llama), **method, **texts))
    assert done.manifest["counts"]["trainable"] == 2 * 2 * 4 * 16  # one head of 16 for the keys


@each
def test_it_trains_beside_a_base_in_bfloat16_with_recomputed_activations(
    method: str, options: Options, tmp_path: Path
) -> None:
    more = {"dtype": "bfloat16", "gradient_checkpointing": True, "max_steps": 3}
    model = fit(options(tmp_path / "run", method=method, **more)).model
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


# --- from the config -----------------------------------------------------------------------------


def config(**values: Any) -> FitConfig:
    return make_config({"model": "m", "data": "d", "out": "o", **values}, "test")


@pytest.mark.parametrize(
    ("values", "wanted", "name"),
    [
        ({"method": "bitfit"}, BitFit(), "BitFit"),
        ({"method": "prefix"}, PrefixTuning(16), "prefix L=16"),
        ({"method": "prefix", "prefix_length": 4, "head": "train"}, PrefixTuning(4, head="train"),
         "prefix L=4"),
        ({"method": "bottleneck"}, Bottleneck(64, Houlsby()), "bottleneck m=64, Houlsby"),
        ({"method": "bottleneck", "adapter_size": 8, "adapter_placement": "pfeiffer"},
         Bottleneck(8, Pfeiffer()), "bottleneck m=8, Pfeiffer"),
        ({"method": "bottleneck", "target_modules": "query,key", "layers": "0-1"},
         Bottleneck(64, After(["query", "key"], layers=[0, 1])), "bottleneck m=64, named layers"),
    ],
)  # fmt: skip
def test_options_become_a_method_and_its_record(
    values: dict[str, Any], wanted: Any, name: str, bert: Path
) -> None:
    settings = config(**values)
    base = load_base(str(bert), "classification", ["a", "b"])
    made = make_method(settings, base)
    assert made == replace(wanted, head="train")  # as the checkpoint has no head
    said, options = method_record(settings)
    assert said == name
    assert options["method"] == settings.method
    assert json.loads(json.dumps(options)) == options


def test_the_placement_is_written_down_and_stays_open_where_layers_are_named() -> None:
    assert "adapter_placement: houlsby\n" in dump_config(config(method="bottleneck"))
    assert config(method="bottleneck", target_modules="a").adapter_placement is None
    assert config(method="lora").adapter_placement is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_placement": "pfeiffer", "target_modules": "query"}, "both say behind which"),
        ({"layers": "0"}, "choose among --target-modules, which is not given"),
        ({"exclude_modules": "query"}, "choose among --target-modules, which is not given"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    values: dict[str, Any], message: str, bert: Path
) -> None:
    base = load_base(str(bert), "classification", ["a", "b"])
    with pytest.raises(UserError, match=message):
        make_method(config(method="bottleneck", **values), base)


@pytest.mark.parametrize(
    "values", [{"adapter_size": 0}, {"prefix_length": 0}, {"adapter_placement": "x"}]
)
def test_values_out_of_range_are_refused_by_their_flag(values: dict[str, Any]) -> None:
    flag = next(iter(values)).replace("_", "-")
    with pytest.raises(UserError, match=rf"--{flag}"):
        config(**values)


def test_every_method_has_a_learning_rate() -> None:
    rates = {m: config(method=m).lr for m in ("lora", "head", "full", *METHODS)}
    assert all(rate is not None and 0 < rate < 0.1 for rate in rates.values())
    assert config(method="prefix", lr=1e-4).lr == 1e-4


# --- plan ----------------------------------------------------------------------------------------


@each
def test_a_plan_tells_what_is_added_to_which_module(method: str, bert: Path) -> None:
    made = plan_model(config(model=str(bert), method=method))
    assert made.layers == ()
    assert sum(addition.parameters for addition in made.additions) == ADDED[method]
    assert made.counts["adapter"] == ADDED[method]
    kinds = {addition.kind for addition in made.additions}
    assert (
        kinds
        == {
            "bitfit": {"trained bias"},
            "bottleneck": {"bottleneck of 64, gelu", "trained bias", "trained weight"},
            "prefix": {"prefix of 16 for 2 heads"},
        }[method]
    )
    assert "classifier" in made.notes[1]
