"""Training steps of Llama-shaped models on a GPU: PEFT, Rankwise, and the floor.

    python -m benchmarks.gpu [--models 1B,8B/8] [--lengths 2048,4096] [--tokens 8192]
        [--only steps,memory,compiled] [--rounds 15] [--device cuda]

bfloat16, random weights of Llama 3's shapes, r = 16, every token a target. "8B/8" is the first
eight layers of 8B. The floor is the same model with no adapters, frozen, with gradients that flow
down to the first layer; all contenders share the base's weights. A step is forward, backward and
AdamW, timed in alternation after one round more, until its loss is known. FLOPs are
those of :func:`flops_of`, the same for all. Rows are kept in benchmarks/records/ as they come.

    steps     tokens a second, without and with dropout 0.05
    memory    peak bytes of a step for one more token in one more layer, over the width d
    compiled  tokens a second under torch.compile, and its graph breaks

`python -m benchmarks.bank --device cuda` measures many adapters in one pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.__main__ import line
from benchmarks.speed.models import LINEAR, floor, ours, theirs, twin
from benchmarks.speed.steps import loss_of_targets, step_of
from benchmarks.speed.timing import alternate, ratio
from torch import Tensor, nn
from transformers import logging

import rankwise as rw
from rankwise.train.manifest import surroundings

__all__ = ["Shape", "compiled", "flops_of", "memory", "steps"]

FIRST = "model.layers.0.input_layernorm"
R = 16
PEFT_BF16 = "peft, bfloat16 adapters"
RECOMPUTING, FIT = "ours, recomputing", "as fit --recompute"
Batch = dict[str, Tensor]
Program = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """A Llama 3: its width d, the width of its MLP, heads, heads of keys and values, words."""

    width: int
    inner: int
    layers: int
    heads: int
    shared_heads: int
    words: int

    def model(self, device: str, layers: int | None = None) -> nn.Module:
        """The model in bfloat16 with random weights, frozen; or so many layers of it."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.shared_heads,
            vocab_size=self.words,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.requires_grad_(False)

    def batch(self, tokens: int, length: int, device: str) -> Batch:
        """So many tokens in rows of this length, without padding, each a target."""
        made = torch.Generator().manual_seed(0)
        ids = torch.randint(5, self.words, (max(1, tokens // length), length), generator=made)
        return {"input_ids": ids.to(device), "labels": ids.to(device)}


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32, 8, 128_256),
    "8B": Shape(4096, 14_336, 32, 32, 8, 128_256),
}


def shape_of(name: str) -> Shape:
    """The shape of "1B", "8B", or "8B/8", which is eight layers of it."""
    whole, _, layers = name.partition("/")
    shape = SHAPES[whole]
    return replace(shape, layers=int(layers)) if layers else shape


def contenders(base: nn.Module, layers: str, dropout: float) -> dict[str, nn.Module]:
    """The models that train, on the base's own weights, each with the same updates."""
    targets = LINEAR["llama"][layers]
    own = partial(ours, base, targets, R, dropout, like=twin)
    peft = partial(theirs, base, targets, R, dropout, like=twin)
    models = {
        "floor": floor(base, FIRST, like=twin),
        "peft": peft(),
        PEFT_BF16: peft(autocast_adapter_dtype=False),
        "ours": own(),
        RECOMPUTING: own(),
    }
    rw.recompute_activations(models[RECOMPUTING])
    return models


def programs(models: Mapping[str, nn.Module], batch: Batch) -> dict[str, Program]:
    """A step of each by the model's own loss, and as `fit` runs ours: by the targets' loss."""
    made = {name: step_of(model, batch) for name, model in models.items()}
    fit = models[RECOMPUTING]
    made[FIT] = step_of(fit, batch, loss_of_targets(fit, batch))
    return made


def steps(
    name: str, shape: Shape, tokens: int, lengths: Sequence[int], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """A row for each length, choice of layers and dropout."""
    base = shape.model(device)
    for length in lengths:
        batch = shape.batch(tokens, length, device)
        for layers in LINEAR["llama"]:
            for dropout in (0.0, 0.05):
                models = contenders(base, layers, dropout)
                run, flops = programs(models, batch), flops_of(models["ours"], length)
                dropped = f", dropout {dropout:g}" if dropout else ""
                yield _row(f"training step, {layers}{dropped}: PEFT / ours",
                           f"{name}, rows of {length}", run, batch, flops, rounds)  # fmt: skip
                del models, run
                gc.collect()


def _row(
    measure: str, on: str, run: Mapping[str, Program], batch: Batch, flops: float, rounds: int
) -> dict[str, Any]:
    """Tokens a second, and what share of them a product of matrices could have given."""
    device = batch["input_ids"].device
    peaks = {name: _peak(step, device) for name, step in run.items()}
    first = {name: step() for name, step in run.items()}
    seconds = alternate(run, rounds)
    middle = {name: sorted(each)[len(each) // 2] for name, each in seconds.items()}
    found: dict[str, Any] = {"measure": measure, "on": on}
    for key, one, other in (
        ("ratio", "peft", "ours"),
        ("PEFT, bfloat16 adapters / ours", PEFT_BF16, "ours"),
        ("PEFT / as fit", "peft", FIT),
        ("over floor", "ours", "floor"),
    ):
        if one in seconds and other in seconds:
            made = ratio(seconds[one], seconds[other])
            found[key] = [made.value, made.low, made.high]
    count = batch["input_ids"].numel()
    found["tokens a second"] = {name: count / each for name, each in middle.items()}
    found["TFLOP/s"] = {name: flops * count / each / 1e12 for name, each in middle.items()}
    if device.type == "cuda":
        found["TFLOP/s of one product"] = _product(device)
        found["peak GB of a step"] = {name: each / 1e9 for name, each in peaks.items()}
    found["losses"] = first
    return found


def memory(
    name: str, shape: Shape, tokens: int, lengths: Sequence[int], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """What a layer more adds to the peak of a step, by token, over the width."""
    del rounds  # counted, not timed
    less, more = 2, 4
    for dropout in (0.0, 0.05):
        found: dict[str, dict[int, int]] = {}
        for layers in (less, more):
            models = contenders(shape.model(device, layers), "all linear", dropout)
            batch = shape.batch(tokens, lengths[0], device)
            for who, step in programs(models, batch).items():
                step()  # makes the optimiser's moments
                found.setdefault(who, {})[layers] = _peak(step, torch.device(device))
            del models, step
            gc.collect()
        unit = (more - less) * batch["input_ids"].numel() * shape.width
        each = {who: (peak[more] - peak[less]) / unit for who, peak in found.items()}
        if not each["peft"]:
            return  # a CPU does not tell
        yield {
            "measure": f"peak of a step for a token in a layer, dropout {dropout:g}: ours / PEFT",
            "on": f"{name}, all linear, rows of {lengths[0]}",
            "ratio": [each[RECOMPUTING] / each["peft"]] * 3,
            "bytes over d": each,
        }


def compiled(
    name: str, shape: Shape, tokens: int, lengths: Sequence[int], rounds: int, device: str
) -> Iterator[dict[str, Any]]:
    """torch.compile of PEFT's model and of ours, all linear layers, and graph breaks in ours."""
    length = lengths[-1]
    base, batch = shape.model(device), shape.batch(tokens, length, device)
    models = contenders(base, "all linear", 0.0)
    run: dict[str, Program] = {}
    took: dict[str, float] = {}
    for who in ("peft", "ours"):
        fast: Any = torch.compile(models[who])
        run[who], start = step_of(fast, batch), time.perf_counter()
        run[who]()
        took[who] = time.perf_counter() - start
    run["ours, eager"] = step_of(models[RECOMPUTING], batch)
    flops = flops_of(models["ours"], length)
    row = _row("compiled training step, all linear: PEFT / ours", f"{name}, rows of {length}",
               run, batch, flops, rounds)  # fmt: skip
    explained = torch._dynamo.explain(models["ours"])(**batch)
    yield {**row, "seconds of the first step": took, "graph breaks": explained.graph_break_count}


def _peak(step: Program, device: torch.device) -> int:
    """The most bytes that a step holds beyond what is there before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def flops_of(model: nn.Module, length: int) -> float:
    """FLOPs of a step for a token, those that backward computes again left out.

    4 P for the P numbers of frozen linear layers, 6 s d for causal attention of rows of s tokens in
    each layer, and 6 r (in + out) for each adapted linear layer (docs/math.md (6)).
    """
    frozen = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config: Any = model.config
    attention = 6 * length * config.hidden_size * config.num_hidden_layers
    return 4.0 * frozen + attention + 6.0 * trained


def _product(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a product of bfloat16 matrices: what this GPU gives today."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (3, 10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            one @ other
        torch.cuda.synchronize(device)
    return 2 * size**3 * count / (time.perf_counter() - start) / 1e12


PARTS = {"steps": steps, "memory": memory, "compiled": compiled}


def main() -> None:
    """Run the parts, print each row as it is there, and keep them as records."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--models", default="1B,8B/8")
    parser.add_argument("--lengths", default="2048,4096", help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    logging.set_verbosity_error()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is there (torch.cuda.is_available() is False)")
    lengths = [int(length) for length in given.lengths.split(",")]
    here = surroundings(torch.device(given.device), "bfloat16", "")
    print(f"{here['hardware']['device']}; {here['versions']}\n")
    print(f"| {'measure':58} | {'on':30} | ratio (95 %) | more |\n|---|---|---|---|")
    folder = Path(__file__).parent / "records" / _folder(here["hardware"]["device"])
    for part in given.only.split(","):
        rows: list[dict[str, Any]] = []
        for name in given.models.split(","):
            for row in PARTS[part](
                name, shape_of(name), given.tokens, lengths, given.rounds, given.device
            ):
                rows.append(row)
                print(line(row), flush=True)
                folder.mkdir(parents=True, exist_ok=True)  # kept row by row: a lease may end
                made = json.dumps({**here, "rounds": given.rounds, "rows": rows}, indent=1)
                (folder / f"gpu-{part}.json").write_text(made + "\n", encoding="utf-8")
            gc.collect()


def _folder(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    main()
