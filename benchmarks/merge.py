"""What merging costs: PEFT and rankwise.merge in alternation on a model of 1.1B parameters.

`python benchmarks/merge.py` prints the ratio; `--layers 2` is the same on less. Nothing is trained:
the weights are random, and so are the factors, the same for both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import rankwise as rw

HIDDEN, INTERMEDIATE, HEADS = 2048, 5632, 256
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HEADS),
    "v_proj": (HIDDEN, HEADS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
R, ALPHA = 16, 32


def block() -> nn.ModuleDict:
    """The linear layers of one layer of a 1.1B Llama, in bfloat16, with its size of weights."""
    layers = nn.ModuleDict()
    for name, (inner, outer) in SHAPES.items():
        layers[name] = linear = nn.Linear(inner, outer, bias=False, device="meta")
        weight = torch.empty(outer, inner, dtype=torch.bfloat16).normal_(std=0.02)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return layers


def model(layers: int, dtype: torch.dtype) -> nn.ModuleList:
    """So many layers; merging asks for no forward."""
    torch.manual_seed(0)
    return nn.ModuleList(block() for _ in range(layers)).to(dtype)


def filled(adapted: nn.Module) -> None:
    """Numbers for every B, some percent of the weight each."""
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.002)


def with_peft(plain: nn.Module) -> tuple[float, float]:
    """Wall and processor seconds of merge_and_unload."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(SHAPES))
    adapted: Any = peft.get_peft_model(plain, config)
    filled(adapted)
    return timed(adapted.merge_and_unload)


def with_rankwise(plain: nn.Module, keep: bool) -> tuple[float, float]:
    """Wall and processor seconds of merge, certificate included."""
    rw.attach(plain, rw.LoRA(r=R, alpha=ALPHA, target_modules=list(SHAPES)))
    filled(plain)
    return timed(lambda: rw.merge(plain, keep=keep))


def timed(work: Any) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    ways = {
        "PEFT merge_and_unload": with_peft,
        "rankwise.merge(keep=False)": lambda plain: with_rankwise(plain, keep=False),
        "rankwise.merge()": lambda plain: with_rankwise(plain, keep=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, way in ways.items():
            times[name].append(way(model(asked.layers, dtype)))
    print(f"{machine()}; {asked.layers} layers, {asked.dtype}, r = {R}, {asked.rounds} rounds.\n")
    print("| | wall s | processor s | PEFT / this, wall | processor |\n|---|---|---|---|---|")
    peers = times["PEFT merge_and_unload"]
    for name, rows in times.items():
        wall, processor = (statistics.median(r[i] for r in rows) for i in (0, 1))
        ratios = [
            statistics.median(p[i] / r[i] for p, r in zip(peers, rows, strict=True)) for i in (0, 1)
        ]
        print(f"| {name} | {wall:.3f} | {processor:.3f} | {ratios[0]:.1f} | {ratios[1]:.1f} |")


def machine() -> str:
    """The processor, the threads and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    packages = ", ".join(f"{p} {version(p)}" for p in ("peft", "rankwise", "torch"))
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread(s), {packages}"


if __name__ == "__main__":
    main()
