"""attach, load, switch and the unmerged forward: PEFT and Rankwise on Llama-shaped models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from benchmarks.speed.models import LINEAR, llama, ours, theirs
from benchmarks.speed.timing import alternate, ratio
from torch import nn

import rankwise as rw

__all__ = ["forward_rows", "rows"]

TARGETS = LINEAR["llama"]["all linear"]
ADAPTERS = 20  # the last of them is to cost what the first does


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of the table; the large model is timed in fewer rounds."""
    few = max(3, rounds // 3)
    yield _attach("Llama of 8B on meta", llama(32, 4096, torch.bfloat16, "meta"), rounds)
    base = llama(22, 2048, torch.bfloat16)
    yield _attach("Llama of 1.1B on CPU, bfloat16", base, few)
    yield from _load(base)


def forward_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Rows for one token through 224 adapted layers, for one text and for eight."""
    small = llama(32, 512, torch.float32)
    for size in (1, 8):
        yield _forward(small, size, rounds)


def _row(measure: str, on: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    made = ratio(seconds["peft"], seconds["ours"])
    middle = {n: 1e3 * sorted(s)[len(s) // 2] for n, s in seconds.items()}
    return {
        "measure": measure,
        "on": on,
        "ratio": [made.value, made.low, made.high],
        "milliseconds": middle,
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


def _attach(on: str, base: nn.Module, rounds: int) -> dict[str, Any]:
    """Taking the adapter off again is not in the times."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    method = rw.LoRA(16, 32, target_modules=TARGETS, head="freeze")
    meta = next(base.parameters()).is_meta
    more: dict[str, Any] = {"low_cpu_mem_usage": True} if meta else {}
    seconds: dict[str, list[float]] = {"peft": [], "ours": []}
    for _ in range(rounds + 1):
        took, model = _timed(lambda: peft.get_peft_model(base, config, **more))
        seconds["peft"].append(took)
        model.unload()
        took, _ = _timed(lambda: rw.attach(base, method))
        seconds["ours"].append(took)
        rw.detach(base)
    return _row("attach: PEFT / ours", on, {n: s[1:] for n, s in seconds.items()})


def _load(base: nn.Module) -> Iterator[dict[str, Any]]:
    """Loading an adapter beside others and switching to it, in turns on two copies of the base.

    In turns, because memory that no program has touched yet costs whoever asks for it first.
    """
    model: Any = ours(base, TARGETS, 16)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        rw.save_adapter(model, folder, base_model_name="a Llama")
        rw.detach(model)
        rw.load_adapter(model, folder, name="a0")
        other: Any = peft.PeftModel.from_pretrained(base, folder, adapter_name="a0")
        lean = {"low_cpu_mem_usage": True}
        ways: dict[str, Callable[[str], Any]] = {
            "ours": lambda name: rw.load_adapter(model, folder, name=name),
            "ours, mmap": lambda name: rw.load_adapter(model, folder, name=name, mmap=True),
            "peft": lambda name: other.load_adapter(folder, adapter_name=name),
            "peft, low memory": lambda name: other.load_adapter(folder, adapter_name=name, **lean),
        }
        names = dict(zip(ways, "abcd", strict=True))
        loads: dict[str, list[float]] = {way: [] for way in ways}
        switches: dict[str, list[float]] = {"peft": [], "ours": []}
        for i in range(1, ADAPTERS):
            for way, load in ways.items():
                took, _ = _timed(lambda load=load, name=f"{names[way]}{i}": load(name))
                loads[way].append(took)
            took, _ = _timed(lambda i=i: rw.set_active(model, f"a{i}"))
            switches["ours"].append(took)
            took, _ = _timed(lambda i=i: other.set_adapter(f"c{i}"))
            switches["peft"].append(took)
        other.unload()
    on = "Llama of 1.1B on CPU, bfloat16"
    for way, peer in (("ours", "peft"), ("ours, mmap", "peft"), ("ours, mmap", "peft, low memory")):
        turn = {"peft": loads[peer], "ours": loads[way]}
        yield _row(f"load an adapter beside others: {peer} / {way}", on, turn)
    yield _row("switch: PEFT / ours", on, switches)
    for way in ("ours", "ours, mmap"):
        ends = {"peft": loads[way][-3:], "ours": loads[way][:3]}
        yield _row(f"load, {way}: adapters {ADAPTERS - 2}-{ADAPTERS} / 2-4", on, ends)


def _forward(base: nn.Module, size: int, rounds: int) -> dict[str, Any]:
    """What an unmerged adapter costs one token: PEFT's overhead over ours, and merged over base."""
    ids = torch.randint(5, 32_000, (size, 1))
    adapted, merged = ours(base, TARGETS, 16).eval(), ours(base, TARGETS, 16).eval()
    rw.merge(merged, keep=False)
    models = {"base": base.eval(), "peft": theirs(base, TARGETS, 16).eval()}
    models |= {"ours": adapted, "merged": merged}

    def program(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                model(ids)

        return run

    seconds = alternate({n: program(m) for n, m in models.items()}, 3 * rounds)
    over = {
        name: [a - b for a, b in zip(seconds[name], seconds["base"], strict=True)]
        for name in ("peft", "ours")
    }
    plain = ratio(seconds["merged"], seconds["base"])
    found = _row(
        "overhead of an unmerged forward: PEFT's / ours", f"224 layers, batch {size}", over
    )
    middle = {n: 1e3 * sorted(s)[len(s) // 2] for n, s in seconds.items()}
    return {
        **found,
        "milliseconds": middle,
        "merged_over_base": [plain.value, plain.low, plain.high],
    }
