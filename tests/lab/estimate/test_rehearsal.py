"""A rehearsal holds, byte for byte, what the same step on real tensors holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.attaching import attachment
from rankwise.data.encode import Encoded
from rankwise.errors import UserError
from rankwise.lab.estimate import Part, Rehearsal
from rankwise.lab.estimate.live import Live
from rankwise.train.config import FitConfig, make_config
from rankwise.train.counting import count_model
from rankwise.train.evaluate import Rows, row_losses
from rankwise.train.loop import Loop
from rankwise.train.model import load_base
from rankwise.train.reporter import Silent
from rankwise.train.setup import equip

CPU = torch.device("cpu")
CASES = [
    *((name, method) for name in ("bert", "gpt2", "llama") for method in ("full", "lora", "head")),
    *(("bert", "bitfit"), ("gpt2", "prefix"), ("llama", "bottleneck")),
]


class Watched(Live):
    """Counts real tensors: the numbers in them are asked for as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def options(folder: Path, method: str = "lora", **more: Any) -> FitConfig:
    language = folder.name != "bert" and method == "head"
    own = {"modules_to_save": "lm_head"} if language else {}
    values = {"model": str(folder), "method": method, "data": "", "out": "", "dtype": "float32"}
    values |= {"pack": "no", "max_length": 24, "batch_size": 3}
    return make_config(values | own | more, "test")


def really(config: FitConfig, rehearsal: Rehearsal, batch: int) -> tuple[int, int]:
    """Peaks of the second step and of an evaluation pass on real tensors."""
    task = rehearsal.task
    base = load_base(config.model, task, ("a", "b") if task == "classification" else ())
    lengths = [rehearsal.length] * (batch - 1) + [rehearsal.length - 1]
    ids = [[1] * n for n in lengths]
    encoded = Encoded(ids, lengths, list(range(batch)), [0] * batch if task != "causal-lm" else ids)
    rows = Rows(encoded, task, 0, CPU)
    equip(config, base, CPU, None, Silent())
    model = base.model
    live = Watched()
    for module in (model, *attachment(model).originals.values()):
        live.mark([*module.parameters(), *module.buffers()], Part.WEIGHTS)
    loop = Loop(model, rows, rows, config, "", Path(), lambda _: None, Silent())
    passes = [list(range(batch))] * min(2, config.accumulate)
    with live:
        loop.update(passes)
        live.begin()
        loop.update(passes)
        step = live.peak.total
        model.eval()
        live.begin()
        with torch.no_grad():
            row_losses(model, rows.batch(list(range(batch))), task)
    return step, live.peak.total


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_step_holds_what_it_holds_on_real_tensors(
    name: str, method: str, request: pytest.FixtureRequest
) -> None:
    config = options(request.getfixturevalue(name), method)
    rehearsal = Rehearsal(config, 2, CPU)
    step = rehearsal.step(3)
    evaluation = rehearsal.evaluation(3)
    real = really(config, rehearsal, 3)
    found = step.total, evaluation.total
    assert found == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"recompute": True, "dtype": "bfloat16"},
        {"accumulate": 3},
        {"dora": True, "init": "pissa", "target_modules": "all-linear"},
        {"freeze_a": True},
        {"dropout": 0.4, "target_modules": "all-linear"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_options_change_both_alike(more: dict[str, Any], llama: Path) -> None:
    config = options(llama, **more)
    rehearsal = Rehearsal(config, 2, CPU)
    found = rehearsal.step(3).total, rehearsal.evaluation(3).total
    near = 0.02 if config.recompute else 0.01
    assert found == pytest.approx(really(config, rehearsal, 3), rel=near)


def test_the_parts_are_those_of_counting(gpt2: Path) -> None:
    config = options(gpt2, "full")
    rehearsal = Rehearsal(config, 2, CPU)
    step = rehearsal.step(2).parts
    (counted,) = count_model(config, methods=["full"]).methods
    assert rehearsal.gradient_bytes == counted.gradient_bytes
    assert step[Part.OPTIMIZER] == pytest.approx(counted.optimizer_bytes, rel=0.01)  # and steps
    assert step[Part.WEIGHTS] == pytest.approx(4 * counted.trained, rel=0.01)  # and buffers
    vocabulary = 257
    one = 2 * rehearsal.length * vocabulary * 4  # two rows of float32 logits
    assert one <= step[Part.LOGITS] <= 5 * one


def test_a_larger_batch_holds_more_and_a_smaller_one_the_same_as_before(bert: Path) -> None:
    rehearsal = Rehearsal(options(bert), 2, CPU)
    sizes = [rehearsal.step(batch).total for batch in (2, 8, 2)]
    assert sizes[0] == sizes[2] < sizes[1]


@pytest.mark.parametrize(("way", "most"), [("gradient_checkpointing", 0.8), ("recompute", 0.9)])
def test_running_again_keeps_fewer_activations(llama: Path, way: str, most: float) -> None:
    plain, lean = (
        Rehearsal(options(llama, **{way: on}, max_length=96), 2, CPU).step(8).parts
        for on in (False, True)
    )
    assert lean[Part.ACTIVATIONS] < most * plain[Part.ACTIVATIONS]


def test_rows_are_no_longer_than_the_model_takes(bert: Path) -> None:
    assert Rehearsal(options(bert, max_length=10_000), 2, CPU).length == 64


def test_the_number_format_of_a_frozen_base_alone_can_be_lowered(bert: Path) -> None:
    with pytest.raises(UserError, match="full fine-tuning trains the base itself"):
        Rehearsal(options(bert, "full", dtype="bfloat16"), 2, CPU)


def test_packed_copies_take_twice_the_weights_that_are_packed(bert: Path) -> None:
    """Whether packing pays is measured, so the layers that are packed are all or some or none."""
    plain, packed = (Rehearsal(options(bert, pack=choice), 2, CPU) for choice in ("no", "auto"))
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32  # two blocks, and the pooler
    assert plain.packed_bytes == 0
    assert 0 <= packed.packed_bytes <= 2 * 4 * linear
    assert packed.packed_bytes % (2 * 4 * 32 * 32) == 0
    more = packed.step(2).total - plain.step(2).total
    assert more == packed.packed_bytes
