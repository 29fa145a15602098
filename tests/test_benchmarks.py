"""What `make bench` counts and how it compares; times themselves are never asserted."""

from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.bank import APART, SHARED, Bank, programs, rows
from benchmarks.speed.__main__ import line
from benchmarks.speed.loss import largest
from benchmarks.speed.loss import programs as programs_of_loss
from benchmarks.speed.memory import kept
from benchmarks.speed.models import LINEAR, batch_of, floor, llama, ours, theirs
from benchmarks.speed.products import masked, packing, pieces, thin
from benchmarks.speed.timing import alternate, ratio
from benchmarks.together import Grid

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT's


@pytest.mark.parametrize("layers", list(LINEAR["llama"]))
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.5), (torch.float32, 1.0)])
def test_bytes_kept_for_backward_beside_peft(layers: str, dtype: torch.dtype, most: float) -> None:
    base = llama(1, 128, dtype)
    batch = batch_of(1, 16, 32_000, None)
    targets = LINEAR["llama"][layers]
    low = kept(floor(base, "model.layers.0.input_layernorm"), batch)
    peft, own = (kept(make(base, targets), batch) - low for make in (theirs, ours))
    assert 0 < own <= most * peft


def test_the_two_losses_of_a_language_model_are_one_and_ours_is_smaller() -> None:
    model = ours(llama(1, 64, torch.float32), ["q_proj"])
    own, other, losses = programs_of_loss(model, 0.5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 2 * largest(own) < largest(other)


def test_the_products_that_are_timed_are_one_product() -> None:
    for programs_of in (thin, lambda out: packing(out, 48)):
        first, second = programs_of(40).values()
        torch.testing.assert_close(first(), second(), rtol=1e-5, atol=1e-4)


def test_the_thin_products_that_are_timed_in_pieces_are_the_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.speed.products._CACHES", 0)  # so that both have the same x
    whole, cut = pieces(40, 48).values()
    for one, other in zip(whole(), cut(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_both_begin_with_the_same_numbers() -> None:
    base = llama(1, 128, torch.float32)
    batch = batch_of(1, 16, 32_000, None)
    one, other = (make(base, LINEAR["llama"]["all linear"]).eval() for make in (theirs, ours))
    for _ in range(3):
        losses = [model(**batch).loss for model in (one, other)]
        torch.testing.assert_close(*losses)
        for model, loss in zip((one, other), losses, strict=True):
            loss.backward()
            with torch.no_grad():
                for p in (p for p in model.parameters() if p.requires_grad):
                    p.sub_(p.grad, alpha=5.0)
                    p.grad = None


def test_every_round_runs_every_program_once() -> None:
    calls: list[str] = []
    seconds = alternate({n: lambda n=n: calls.append(n) for n in ("a", "b")}, 4)
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5
    assert [len(s) for s in seconds.values()] == [4, 4]


def test_both_ways_to_add_what_dropout_spares_add_the_same() -> None:
    torch.manual_seed(0)
    two, one = masked(24, torch.float64).values()
    before = two().clone()  # each adds to the same tensor once more
    after = two().clone()
    torch.testing.assert_close(one() - after, after - before)


TINY = gpu.Shape(width=32, inner=48, layers=2, heads=4, shared_heads=2, words=60)


def test_the_rows_of_a_gpu_are_made_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    made = list(gpu.steps("tiny", TINY, 32, [16], 1, "cpu"))
    made += gpu.compiled("tiny", TINY, 32, [16], 1, "cpu")
    assert [row["measure"].split(":")[0] for row in made] == [
        "training step, query and value",
        "training step, query and value, dropout 0.05",
        "training step, all linear",
        "training step, all linear, dropout 0.05",
        "compiled training step, all linear",
    ]
    assert all(line(row).count("|") == 5 for row in made)
    assert made[-1]["graph breaks"] == 0
    for row in made:
        losses = row["losses"]
        assert losses["ours"] == pytest.approx(losses["peft"], abs=0.02)
        assert set(row["tokens a second"]) == set(row["TFLOP/s"]) == set(losses)
    assert list(gpu.memory("tiny", TINY, 32, [16], 1, "cpu")) == []  # a CPU does not tell


def test_the_flops_of_a_token_are_those_of_the_shapes() -> None:
    model = ours(TINY.model("cpu"), LINEAR["llama"]["all linear"], r=2)
    d, inner, kv = 32, 48, 16
    pairs = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
    frozen = 2 * sum(a * b for a, b in pairs) + 60 * d
    trained = 2 * 2 * sum(a + b for a, b in pairs)
    assert gpu.flops_of(model, 16) == 4 * frozen + 6 * trained + 2 * 6 * 16 * d


def test_a_ratio_is_of_rounds_and_has_an_interval() -> None:
    made = ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0])
    assert (made.low, made.value, made.high) == (2.0, 2.0, 20.0)


def test_a_row_in_markdown() -> None:
    row = {"measure": "m", "on": "here", "ratio": [1.5, 1.25, 2.0], "bytes": {"a": 1200}}
    assert line(row).split("|")[3:] == [" 1.50 (1.25-2.00) ", " bytes a 1,200 ", ""]


def small_bank(targets: list[str]) -> Bank:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = BertForSequenceClassification(config).requires_grad_(False)
    return Bank(base, targets, adapters=3, rows=2, length=5)


def test_a_bank_in_one_pass_learns_what_its_adapters_learn_one_by_one() -> None:
    steps = programs(small_bank(["query", "dense"]))
    for _ in range(4):
        shared, apart = steps[SHARED](), steps[APART]()
        torch.testing.assert_close(shared, torch.cat(apart), rtol=1e-4, atol=1e-5)
    assert len(set(shared.tolist())) == 3


def test_the_table_of_banks_has_a_row_for_each_kind_and_choice_of_layers() -> None:
    lines = list(rows(small_bank, 1))
    assert len(lines) == 2 + 4
    assert all(line.count("|") == 6 for line in lines)


def test_runs_trained_together_are_timed_beside_the_same_runs_apart(bert: Path) -> None:
    grid = Grid(str(bert), runs=2, rows=40, device="cpu")
    grid.together()
    grid.apart()
    assert all(len(found) == 1 and found[0] > 0 for found in grid.training.values())
    assert len(set(grid.losses["together"])) == 2
    assert grid.apart_by < 1e-5
