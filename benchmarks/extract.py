"""What extracting an adapter costs: time and the most memory, on checkpoints of a 7B's shapes.

`python benchmarks/extract.py` writes two checkpoints of Llama-2-7B's layers in bfloat16 into a
temporary folder and extracts one from the other in a process of its own. `--layers 32` is the whole
model, 27 GB on the disk; the largest weights, which decide the memory, are the same with fewer.
The weights are random, and each matrix differs by a change of rank 8, the embedding (which is saved
whole) and the output layer as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
PROGRAM = """
import sys, time
import torch
from rankwise.train.extracting import extract
from rankwise.train.memory import PeakMemory
watch = PeakMemory(torch.device("cpu"))
began = time.perf_counter()
found = extract(sys.argv[1], sys.argv[2], sys.argv[3], r=16)
seconds = time.perf_counter() - began
peak = watch.record()["peak"]
saved = sum(count for _, count in found.whole.values())
print(len(found.layers), found.parameters, saved, found.held, seconds, peak)
"""


def write(folder: Path, layers: int, *, tuned: bool) -> int:
    """A checkpoint with one file for each block; gives its bytes."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for block in range(-1, layers):
        draw = torch.Generator().manual_seed(block + 1)
        save_file(dict(tensors(block, draw, tuned)), folder / f"model-{block + 2:05}.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tensors(block: int, draw: torch.Generator, tuned: bool):
    """The tensors of a block; block −1 has the embedding, the last norm and the output layer."""
    if block < 0:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            yield name, matrix((VOCABULARY, HIDDEN), draw, tuned)
        yield "model.norm.weight", torch.ones(HIDDEN).bfloat16()
        return
    for name, shape in SHAPES.items():
        yield f"model.layers.{block}.{name}.weight", matrix(shape, draw, tuned)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{block}.{name}.weight", torch.ones(HIDDEN).bfloat16()


def matrix(shape: tuple[int, int], draw: torch.Generator, tuned: bool) -> torch.Tensor:
    """A random weight, the tuned one with a change of rank 8."""
    weight = torch.randn(shape, generator=draw).mul_(0.02)
    down, up = (torch.randn(size, 8, generator=draw) for size in shape)
    if tuned:
        weight.addmm_(down, up.T, alpha=2e-3)
    return weight.bfloat16()


def main() -> None:
    """Write the pair, extract in another process, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as place:
        base, tuned, out = (Path(place) / name for name in ("base", "tuned", "adapter"))
        size = write(base, layers, tuned=False)
        write(tuned, layers, tuned=True)
        words = [sys.executable, "-c", PROGRAM, str(base), str(tuned), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    count, parameters, saved, held, seconds, peak = done.stdout.split()
    print(
        f"{layers} blocks, {size / 1e9:.1f} GB each checkpoint, {count} layers extracted at r = 16"
    )
    print(
        f"adapter: {int(parameters):,} parameters, {100 * float(held):.1f} % of the change held, "
        f"and {int(saved):,} parameters saved whole"
    )
    print(f"time: {float(seconds):.0f} s; most memory: {int(peak) / 2**30:.2f} GiB")
    print(
        f"torch {version('torch')}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
