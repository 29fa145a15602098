"""Where PEFT and Rankwise differ on the same weights, measured against dense float64.

`python benchmarks/peft_differences.py` prints a table in Markdown; docs/peft.md holds it.
"""

from __future__ import annotations

import copy
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.errors import RankwiseError

__all__ = ["CASES", "Row", "page"]

R, ALPHA = 4, 8
SCALE = ALPHA / R


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what was measured, and the two results."""

    case: str
    measured: str
    peft: str
    rankwise: str


# --- the same adapter twice ----------------------------------------------------------------------


class Model(nn.Module):
    """One layer, run on one input; attention on it three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.layer, "in_proj_weight"):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)


def with_peft(model: nn.Module, **options: Any) -> Any:
    """A copy of the model adapted by PEFT, with random factors where the start is PEFT's own."""
    asked = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], **options}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**asked))
    return adapted if "init_lora_weights" in options else shuffled(adapted)


def shuffled(model: Any, seed: int = 1, adapter: str = "default") -> Any:
    """Random numbers in every factor, and magnitudes some way off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if f".{adapter}" not in name or "lora_" not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def with_rankwise(
    model: nn.Module, theirs: Any, names: tuple[str, ...] = ("layer",), **options: Any
):
    """The model itself, adapted by Rankwise with PEFT's numbers."""
    held = dict(theirs.named_parameters())
    factors: dict[str, rw.Factors] = {}
    for name in names:
        A, B = (_factor(held, name, side) for side in "AB")
        factors[name] = rw.Factors(A, B, SCALE)
    magnitudes = {
        name: p.detach().flatten()
        for name in (names if options.get("dora") else ())
        for key, p in held.items()
        if f".{name}.lora_magnitude_vector" in key
    }
    method = rw.LoRA(r=R, alpha=ALPHA, target_modules=names, head="freeze", **options)
    rw.attach(model, rw.Adapter(method, factors, magnitudes=magnitudes))
    return model


def _factor(held: dict[str, nn.Parameter], name: str, side: str) -> Tensor:
    """A (r, in) or B (out, r) by the name of its module here; in attention a third of B."""
    if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"):
        module, _, part = name.rpartition(".")
        whole = held[f"base_model.model.{module}.lora_{side}.default.weight"].detach()
        return whole if side == "A" else whole.chunk(3)["qkv".index(part[0])]
    module = name.replace(".out_proj", ".base_layer.out_proj")
    for key in (f"lora_{side}.default.weight", f"lora_embedding_{side}.default"):
        found = held.get(f"base_model.model.{module}.{key}")
        if found is not None:
            return found.detach().flatten(1)
    raise KeyError(name)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in Frobenius norms."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.3g}"


def outcome(run: Callable[[], float]) -> str:
    """The number, or what was raised instead."""
    try:
        return number(run())
    except RankwiseError as error:
        return f"refused: {_first(error)}"
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is the result
        return f"{type(error).__name__}: {_first(error)}"


def _first(error: Exception) -> str:
    line = str(error).splitlines()[0].replace("|", "\\|")
    return line if len(line) <= 90 else line[:87] + "..."


# --- convolutions --------------------------------------------------------------------------------


def convolutions() -> Iterator[Row]:
    """Geometries beside stride and padding."""
    geometries: dict[str, dict[str, Any]] = {
        "`dilation=2`": {"dilation": 2},
        '`dilation=2, padding="same"`': {"dilation": 2, "padding": "same"},
        '`padding=1, padding_mode="reflect"`': {"padding": 1, "padding_mode": "reflect"},
    }
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    for words, options in geometries.items():
        base = Model(nn.Conv2d(4, 6, 3, **options)).double()
        theirs = with_peft(base)
        ours = with_rankwise(copy.deepcopy(base), theirs)
        truth = copy.deepcopy(base)
        A, B = (_factor(dict(theirs.named_parameters()), "layer", side) for side in "AB")
        with torch.no_grad():
            truth.layer.weight += SCALE * (B @ A).view(truth.layer.weight.shape)
        yield Row(
            f"Conv2d, {words}",
            "error of the output",
            outcome(lambda t=theirs, w=truth: relative(t(x), w(x))),
            outcome(lambda o=ours, w=truth: relative(o(x), w(x))),
        )
    yield grouped(x)


def grouped(x: Tensor) -> Row:
    base = Model(nn.Conv2d(4, 6, 3, groups=2)).double()
    theirs = with_peft(base)
    ours = copy.deepcopy(base)
    rw.attach(ours, rw.LoRA(r=3, target_modules=["layer"], head="freeze"))
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)

    def merged(model: Any, merge: Callable[[], object]) -> float:
        before = model(x)
        merge()
        return relative(model(x), before)

    return Row(
        "Conv2d, `groups=2`, merged",
        "change of the output",
        outcome(lambda: merged(theirs, theirs.merge_adapter)),
        outcome(lambda: merged(ours, lambda: rw.merge(ours))),
    )


# --- attention -----------------------------------------------------------------------------------


PARTS = ("layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.out_proj")


def attention() -> Iterator[Row]:
    """nn.MultiheadAttention, whose out_proj is read and never run."""
    base = Model(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    theirs = with_peft(base)
    ours = with_rankwise(copy.deepcopy(base), theirs, PARTS)
    held = dict(theirs.named_parameters())
    A, B = (held[f"base_model.model.layer.lora_{s}.default.weight"].detach() for s in "AB")
    out_A, out_B = (
        held[f"base_model.model.layer.base_layer.out_proj.lora_{s}.default.weight"] for s in "AB"
    )
    leaf = out_B.detach().clone().requires_grad_()
    weights = {
        "layer.in_proj_weight": base.layer.in_proj_weight.detach() + SCALE * B @ A,
        "layer.out_proj.weight": base.layer.out_proj.weight.detach()
        + SCALE * leaf @ out_A.detach(),
    }
    truth = torch.func.functional_call(base, weights, x)
    yield Row(
        "MultiheadAttention",
        "error of the output",
        number(relative(theirs(x), truth)),
        number(relative(ours(x), truth)),
    )
    truth.square().sum().backward()
    for model in (theirs, ours):
        model(x).square().sum().backward()
    mine = next(p for n, p in ours.named_parameters() if "out_proj" in n and "lora_B" in n)
    yield Row(
        "MultiheadAttention",
        "error of the gradient of `out_proj`'s B",
        number(relative(out_B.grad, leaf.grad)),
        number(relative(mine.grad, leaf.grad)),
    )
    yield from passed_by(x)


def passed_by(x: Tensor) -> Iterator[Row]:
    """Owners that read the weight of a target and never run it."""
    alone = Model(nn.MultiheadAttention(8, 2, batch_first=True)).double().eval()
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval()
    cases = {
        "MultiheadAttention, `out_proj` alone a target": (alone, "layer.out_proj"),
        "TransformerEncoderLayer in evaluation, `linear1` a target": (encoder, "linear1"),
    }
    for words, (base, target) in cases.items():
        theirs = shuffled(with_peft(base, target_modules=[target]))
        ours = copy.deepcopy(base)
        rw.attach(ours, rw.LoRA(r=R, target_modules=[target], head="freeze"))
        with torch.no_grad():
            for p in ours.parameters():
                if p.requires_grad:
                    p.normal_(std=0.3)
            plain = base(x)
            yield Row(
                words,
                "effect on the output",
                number(relative(theirs(x), plain)),
                number(relative(ours(x), plain)),
            )


# --- merging -------------------------------------------------------------------------------------


def drift() -> Iterator[Row]:
    """merge and unmerge in turn."""
    for dtype in (torch.float32, torch.bfloat16):
        base = Model(nn.Linear(256, 256).to(dtype))
        before = base.layer.weight.detach().clone()
        theirs = with_peft(base)
        ours = with_rankwise(copy.deepcopy(base), theirs)
        for cycles in (2, 100):
            for _ in range(2 if cycles == 2 else 98):
                theirs.merge_adapter()
                theirs.unmerge_adapter()
                rw.merge(ours)
                rw.unmerge(ours)
            layers = (theirs.base_model.model.layer.base_layer, ours.layer.base_layer)
            words = [
                f"{float((layer.weight != before).double().mean()):.1%}, at most "
                f"{number(float((layer.weight - before).abs().max()))}"
                for layer in layers
            ]
            yield Row(
                f"merge and unmerge {cycles} times, {str(dtype).removeprefix('torch.')}",
                "entries of the base's weight changed",
                *words,
            )


def tied() -> Iterator[Row]:
    """LoRA on an embedding that the output layer shares."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 12))
    for tie in (False, True):
        theirs = with_peft(base, target_modules=["embed_tokens"], ensure_weight_tying=tie)
        ours = copy.deepcopy(base)
        with_rankwise(ours, theirs, ("model.embed_tokens",), tied=tie)
        before, mine = theirs(ids).logits, ours(ids).logits
        plain = theirs.merge_and_unload()
        rw.merge(ours, keep=False)
        yield Row(
            f"tied embedding, merged, {'both adapted' if tie else 'the embedding adapted'}",
            "change of the logits",
            number(relative(plain(ids).logits, before)),
            number(relative(ours(ids).logits, mine)),
        )


def four_bits() -> Iterator[Row]:
    """bitsandbytes' 4-bit layers."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 256, compute_dtype=torch.float32, quant_type="nf4")
    base = Model(layer.requires_grad_(False).to("cpu"))
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    theirs, x = with_peft(base), torch.randn(16, 256)
    ours = with_rankwise(copy.deepcopy(base), theirs)
    before, mine = theirs(x), ours(x)
    theirs.merge_adapter()
    rw.merge(ours)
    found = relative(theirs(x), before), relative(ours(x), mine)
    yield Row("bitsandbytes 4-bit, merged", "change of the output", *map(number, found))
    theirs.unmerge_adapter()
    rw.unmerge(ours)
    found = relative(theirs(x), before), relative(ours(x), mine)
    yield Row("bitsandbytes 4-bit, unmerged again", "change of the output", *map(number, found))


# --- starts --------------------------------------------------------------------------------------


def starts() -> Iterator[Row]:
    """Starts that are not zero: step 0, and the base that is left behind."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "Linear": lambda: nn.Linear(64, 64),
        "Conv1D of transformers": lambda: Conv1D(64, 64),
    }
    for word, start in (("pissa", rw.PiSSA()), ("olora", rw.OLoRA())):
        for words, make in layers.items():
            base, x = Model(make()), torch.randn(16, 64)
            with torch.no_grad():
                base.layer.weight.normal_(std=0.1)
            theirs, ours = with_peft(base, init_lora_weights=word), copy.deepcopy(base)
            rw.attach(
                ours, rw.LoRA(r=R, alpha=ALPHA, target_modules=["layer"], init=start, head="freeze")
            )
            y = base(x)
            yield Row(
                f"{type(start).__name__} on {words}",
                "change of the output at step 0",
                number(relative(theirs(x), y)),
                number(relative(ours(x), y)),
            )
            if words == "Linear":
                rw.detach(ours)
                left = theirs.unload()
                yield Row(
                    f"{type(start).__name__} on {words}, adapter taken off",
                    "change of the base's weight",
                    number(relative(left.layer.weight, base.layer.weight)),
                    number(relative(ours.layer.weight, base.layer.weight)),
                )


# --- magnitudes, sums, short dtypes --------------------------------------------------------------


def magnitudes() -> Iterator[Row]:
    """DoRA with dropout, and two of them on one layer."""
    base = Model(nn.Linear(32, 24)).double()
    theirs = with_peft(base, use_dora=True, lora_dropout=0.2)
    ours = with_rankwise(copy.deepcopy(base), theirs, dora=True, dropout=0.2)
    x = torch.randn(1, 32, dtype=torch.float64)
    ours.eval()
    exact, rows = ours(x), x.expand(100_000, 32)
    with torch.no_grad():
        found = [model.train()(rows) for model in (theirs, ours)]
    yield Row(
        "DoRA with dropout 0.2, in training",
        "spread (standard deviation) of the output; error of its mean over 100,000 draws",
        *(f"{number(float(y.std(0).norm() / exact.norm()))}; {_offset(y, exact)}" for y in found),
    )
    theirs = with_peft(base, use_dora=True)
    theirs.add_adapter(
        "second", peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"], use_dora=True)
    )
    shuffled(theirs, 2, "second")
    ours = copy.deepcopy(base)
    for name in ("default", "second"):
        single = with_rankwise(copy.deepcopy(base), _Renamed(theirs, name), dora=True)
        rw.attach(ours, rw.adapter_of(single), name=name)
    outputs: list[list[Tensor]] = [[], []]
    for order in (["default", "second"], ["second", "default"]):
        theirs.base_model.set_adapter(order)
        rw.set_active(ours, *order)
        for kept, model in zip(outputs, (theirs, ours), strict=True):
            kept.append(model(x))
    yield Row(
        "two DoRA adapters on one layer",
        "difference between the two orders",
        *(number(relative(*pair)) for pair in outputs),
    )


def _offset(rows: Tensor, exact: Tensor) -> str:
    """How far the mean of the rows is from the exact one."""
    return number(relative(rows.mean(0), exact[0]))


class _Renamed:
    """The parameters of one of several adapters, under the name of the first."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in self.model.named_parameters():
            if f".{self.name}" in key or "lora_" not in key:
                yield key.replace(f".{self.name}", ".default"), parameter


def sums() -> Iterator[Row]:
    """The sum of two adapters as one."""
    base = Model(nn.Linear(64, 64)).double()
    theirs = with_peft(base)
    theirs.add_adapter("second", peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"]))
    shuffled(theirs, 2, "second")
    layer = theirs.base_model.model.layer
    exact = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    adapters = [
        rw.adapter_of(with_rankwise(copy.deepcopy(base), _Renamed(theirs, name)))
        for name in ("default", "second")
    ]
    for words in ("linear", "svd", "cat"):
        theirs.add_weighted_adapter(["default", "second"], [1.0, 1.0], words, words)
    found = " / ".join(
        number(relative(layer.get_delta_weight(w), exact)) for w in ("linear", "svd", "cat")
    )
    whole = rw.combine(adapters).adapter.factors["layer"].delta()
    short = rw.combine(adapters, how=rw.SVD(r=R)).adapter.factors["layer"].delta()
    yield Row(
        "sum of two adapters of rank 4",
        "error of δ: `linear` / `svd` to rank 4 / `cat`; `SVD(r=4)` / `Concatenate()`",
        found,
        f"{number(relative(short, exact))} / {number(relative(whole, exact))}",
    )


def short_dtypes() -> Iterator[Row]:
    """A bfloat16 base, against float64: where the two do not differ."""
    base = Model(nn.Linear(256, 256).bfloat16())
    theirs, x = with_peft(base), torch.randn(64, 256).bfloat16()
    ours, wide = with_rankwise(copy.deepcopy(base), theirs), copy.deepcopy(base).double()
    truth = with_rankwise(wide, theirs)(x.double())
    yield Row(
        "Linear in bfloat16",
        "error of the output",
        number(relative(theirs(x), truth)),
        number(relative(ours(x), truth)),
    )


CASES: tuple[Callable[[], Iterator[Row]], ...] = (
    convolutions, attention, drift, tied, four_bits, starts, magnitudes, sums, short_dtypes,
)  # fmt: skip


# --- the page ------------------------------------------------------------------------------------


def page() -> str:
    """The table with the machine and the versions it was made on."""
    lines = ["| case | measured | PEFT | Rankwise |", "|---|---|---|---|"]
    for case in CASES:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines.extend(f"| {r.case} | {r.measured} | {r.peft} | {r.rankwise} |" for r in case())
    packages = ("peft", "torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    made = (
        f"Printed by `python benchmarks/peft_differences.py` on {_processor()}, "
        f"{torch.get_num_threads()} thread(s), Python {platform.python_version()}, {versions}, "
        f"Rankwise {rw.__version__}. Errors and changes are relative (Frobenius), in float64 where "
        "nothing else is said."
    )
    return "\n".join([made, "", *lines]) + "\n"


def _processor() -> str:
    """The processor's name as Linux tells it, or its architecture."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text("utf-8").splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.stdout.write(page())
