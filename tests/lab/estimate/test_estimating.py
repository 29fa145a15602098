"""Estimates beside what fresh processes really held, and the largest batch within a budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.lab.estimate import MOST_ROWS, Estimate, estimate
from rankwise.lab.estimate.estimating import largest
from rankwise.lab.estimate.overhead import of_process
from rankwise.train.config import make_config
from tiny import TYPED, byte_tokenizer, word_tokenizer, write

# What a process holds is known before and after a run in it. The C library is told to give freed
# memory back at once, so that the most it ever held is what the run needed.
CODE = """
import json, re, sys
from pathlib import Path
from rankwise.lab.estimate.overhead import of_process
from rankwise.train.config import make_config
from rankwise.train.model import load_base
from rankwise.train.run import fit
config = make_config(json.loads(sys.argv[1]), "test")
load_base(config.model, config.task, ("a", "b"))
before = of_process(config.task)
fit(config)
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print("held", 1024 * int(peak[1]) - before)
"""
WIDTH, LENGTH, BATCH = 192, 192, 12


def build(kind: str, folder: Path) -> Path:
    """A model of three layers whose activations are tens of MB, and rows that fill its length."""
    import transformers

    if kind == "bert":
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        words = word_tokenizer("[CLS]", "[SEP]", "[PAD]", "[UNK]", special, model_input_names=TYPED)
        settings: Any = transformers.BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            vocab_size=2000,
            pad_token_id=0,
        )
        write(folder, transformers.BertModel(settings), words)
        rows = "sentence\tlabel\n" + "".join(f"{'good ' * 180}\t{i % 2}\n" for i in range(24))
        (folder / "rows.tsv").write_text(rows, encoding="utf-8")
        return folder
    if kind == "gpt2":
        letters = byte_tokenizer("<|endoftext|>")
        settings = transformers.GPT2Config(
            vocab_size=2000, n_embd=WIDTH, n_layer=3, n_head=4, bos_token_id=256, eos_token_id=256
        )
        write(folder, transformers.GPT2LMHeadModel(settings), letters)
    else:
        letters = byte_tokenizer("</s>")
        settings = transformers.LlamaConfig(
            vocab_size=2000,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=3 * WIDTH,
            bos_token_id=None,
            eos_token_id=256,
        )
        write(folder, transformers.LlamaForCausalLM(settings), letters)
    (folder / "rows.txt").write_text(("good " * 60 + "\n") * 24, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = build(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc and tells glibc")
@pytest.mark.parametrize(
    ("kind", "method"), [("bert", "full"), ("gpt2", "lora"), ("llama", "head")]
)  # all nine, of larger models: benchmarks/estimate.py
def test_a_run_in_a_fresh_process_holds_what_was_estimated(
    kind: str, method: str, model: Callable[[str], Path], tmp_path: Path, repository: Path
) -> None:
    folder = model(kind)
    rows = str(next(folder.glob("rows.*")))
    values: dict[str, Any] = {
        "model": str(folder),
        "task": "classification" if kind == "bert" else "causal-lm",
        "method": method,
        "data": rows,
        "eval": rows,
        "out": str(tmp_path / "run"),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": BATCH,
        "eval_batch_size": BATCH,
        "max_length": LENGTH,
        "max_steps": 2,
        "pack": "no",
    }
    if method == "head" and kind != "bert":
        values["modules_to_save"] = "lm_head"
    made = estimate(make_config(values, "test"))
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(values)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(repository / "src"),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    held = int(done.stdout.split()[-1])
    own = made.peak - made.overhead - made.kept
    assert own == pytest.approx(held, rel=0.15, abs=24 << 20)  # what a run imports on its way


def of(folder: Path, budget: int | None = None, **more: Any) -> Estimate:
    values = {"model": str(folder), "data": "", "out": "", "dtype": "float32", "pack": "no"}
    values |= {"batch_size": 4, "max_length": 32, "eval_batch_size": 4}
    return estimate(make_config(values | more, "test"), budget=budget)


def test_the_peak_is_that_of_the_phase_that_holds_most(gpt2: Path) -> None:
    small, large = of(gpt2), of(gpt2, eval_batch_size=256)
    assert max(small.phases, key=lambda name: small.phases[name]) == "training step"
    assert max(large.phases, key=lambda name: large.phases[name]) == "evaluation"
    assert large.peak == large.phases["evaluation"] > small.peak
    assert small.step == large.step


def test_a_cast_base_is_loaded_beside_its_copy(gpt2: Path) -> None:
    assert 2 * of(gpt2, dtype="bfloat16").loading == 3 * of(gpt2).loading


def test_the_largest_batch_fits_and_the_next_does_not(bert: Path) -> None:
    held = of(bert).phases["training step"]
    made = of(bert, budget=held + (8 << 20))
    assert made.budget is not None
    assert made.budget.fits
    batch = made.budget.batch
    assert batch > 4
    room = made.budget.bytes - made.overhead
    found = [of(bert, batch_size=n) for n in (batch, batch + 1)]
    steps = [sum(each.step.values()) + each.kept for each in found]
    assert steps[0] <= room < steps[1]
    assert made.budget.checkpointed is not None
    assert made.budget.checkpointed > batch


def test_a_budget_below_the_libraries_holds_nothing(bert: Path) -> None:
    made = of(bert, budget=1 << 20)
    assert made.budget is not None
    assert (made.budget.fits, made.budget.batch, made.budget.checkpointed) == (False, 0, 0)


def test_a_length_that_is_cut_is_told(bert: Path) -> None:
    assert any("no more than 64 tokens" in note for note in of(bert, max_length=100).notes)


@pytest.mark.parametrize("room", [0, 99, 100, 101, 250, 1234, 99_999])
@pytest.mark.parametrize("bend", [1, 7, 40, 3000])
def test_the_largest_is_that_of_trying_them_all(room: int, bend: int) -> None:
    """Sizes that grow along two lines, as where another phase of the step becomes the peak."""

    def held(batch: int) -> int:
        return max(90 + 10 * batch, 90 + 10 * bend + 23 * (batch - bend))

    every = [batch for batch in range(1, 12_000) if held(batch) <= room]
    assert largest(held, room) == max(every, default=0)


def test_no_more_rows_are_looked_for_than_anybody_needs() -> None:
    tried: list[int] = []

    def held(batch: int) -> int:
        tried.append(batch)
        return batch

    assert largest(held, 10**12) == MOST_ROWS
    assert len(tried) < 6


def test_the_process_holds_its_libraries() -> None:
    if sys.platform == "linux":
        assert of_process("classification") > 100 << 20
