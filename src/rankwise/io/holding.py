"""What each file format and each of its readers can hold, and the reason where one cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from rankwise.errors import UserError, gather
from rankwise.io.portable import Portable

__all__ = ["FORMATS", "READERS", "Form", "Reader", "demand", "refusals"]

_MERGE = "Merge the adapter into its base (rankwise.merge) and use the merged model."
_WHAT = {
    "banks": "updates of a bank of weights (experts)",
    "biases": "trained biases",
    "convolutions": "updates of convolutions",
    "embeddings": "updates of embeddings",
    "groups": "updates of convolutions in groups",
    "kernels": "updates of convolutions with a kernel above 1",
    "magnitudes": "DoRA magnitudes",
    "modules": "modules that trained whole",
    "tied": "one update of two tied layers",
    "tokens": "trained rows of an embedding",
}


@dataclass(frozen=True)
class Form:
    """A file format, as far as it limits what can be said in it.

    Attributes:
        name: what it is called in messages.
        lacks: what it cannot hold, a key of the list above, each with the reason.
    """

    name: str
    lacks: Mapping[str, str]


@dataclass(frozen=True)
class Reader:
    """A program that loads PEFT's files, and what it makes of them.

    Attributes:
        name: what it is called in messages.
        ignores: keys of adapter_config.json that it passes over, and so reads another update.
        lacks: what it refuses or loses, each with the reason.
        modules: ends of names of modules that it accepts although they trained whole.
        note: what to know where the adapter has such a module.
        max_rank: the largest rank it takes unless told otherwise; None for no limit.
        rank_option: how it is told of a larger one.
    """

    name: str
    ignores: Collection[str]
    lacks: Mapping[str, str]
    modules: tuple[str, ...] = ()
    note: str = ""
    max_rank: int | None = None
    rank_option: str = field(default="", kw_only=True)


_TIED = "load the adapter on its base (rankwise.load_adapter) and save it from there"
_ONLY_FACTORS = "the format has A and B alone"
FORMATS: Mapping[str, Form] = {
    "peft": Form(
        "PEFT",
        {
            "banks": "how experts lie in the file depends on the model; load the adapter on it "
            "(rankwise.load_adapter) and save it from there",
            "tied": _TIED,
            "tokens": "PEFT stores the rows themselves, so the base is needed; load the adapter on "
            "it (rankwise.load_adapter) and save it from there",
        },
    ),
    "loralib": Form(
        "loralib",
        {
            "banks": "loralib has no layer for them",
            "biases": "loralib stores their values, and an adapter holds what was added to the "
            "base's",
            "kernels": "loralib's own form of them cannot hold every update",
            "magnitudes": "loralib has no DoRA",
            "tied": _TIED,
            "tokens": "loralib has no layer for them",
        },
    ),
    "mlx": Form(
        "MLX",
        {
            "banks": "mlx-lm keeps experts under other names and in other pieces",
            "biases": "mlx-lm refuses tensors that are not A, B or a magnitude",
            "convolutions": "mlx-lm has no layer for them",
            "modules": "mlx-lm refuses tensors that are not A, B or a magnitude",
            "tokens": "mlx-lm refuses tensors that are not A, B or a magnitude",
        },
    ),
    "kohya": Form(
        "kohya",
        {
            "banks": _ONLY_FACTORS,
            "biases": _ONLY_FACTORS,
            "embeddings": "its networks adapt linear layers and convolutions",
            "groups": "its lora_down has no groups",
            "modules": _ONLY_FACTORS,
            "tied": _TIED,
            "tokens": _ONLY_FACTORS,
        },
    ),
    "diffusers": Form(
        "diffusers",
        {
            "banks": _ONLY_FACTORS,
            "biases": _ONLY_FACTORS,
            "embeddings": "diffusers adapts linear layers and convolutions",
            "groups": "PEFT's own update of one reads all channels",
            "modules": _ONLY_FACTORS,
            "tied": _TIED,
            "tokens": _ONLY_FACTORS,
        },
    ),
    "gguf": Form(
        "GGUF",
        {
            "banks": "llama.cpp keeps experts under other names",
            "biases": "llama.cpp refuses tensors that are not A or B",
            "convolutions": "llama.cpp applies A and B to linear layers and the token embedding",
            "magnitudes": "llama.cpp has no DoRA",
            "modules": "llama.cpp refuses tensors that are not A or B",
            "tied": _TIED,
            "tokens": "llama.cpp refuses tensors that are not A or B",
        },
    ),
}

# Read in their sources, not run: docs/guide.md says which versions.
READERS: Mapping[str, Reader] = {
    "vllm": Reader(
        "vLLM",
        ("rank_pattern", "alpha_pattern"),
        {
            "banks": "it takes experts in another form",
            "biases": "it asks for bias none",
            "convolutions": "it has no layer for them",
            "magnitudes": "it does not support DoRA",
            "modules": "it takes none but classifier and score",
            "tied": _TIED,
            "tokens": "it does not read them",
        },
        modules=("classifier", "score"),
        note="vLLM takes classifier and score in its newest versions; older ones refuse them",
        max_rank=16,
        rank_option="--max-lora-rank",
    ),
    "sglang": Reader(
        "SGLang",
        ("rank_pattern", "alpha_pattern", "use_rslora"),
        {
            "banks": "it takes experts in another form",
            "biases": "it does not read them",
            "convolutions": "it has no layer for them",
            "magnitudes": "it does not support DoRA",
            "modules": "it does not read them, so the base's own would be served",
            "tied": _TIED,
            "tokens": "it does not read them",
        },
    ),
    "llama.cpp": Reader(
        "llama.cpp's convert_lora_to_gguf.py",
        ("alpha_pattern", "use_rslora"),
        {
            "banks": "it takes experts in another form",
            "biases": "it stops at any tensor that is not A or B",
            "convolutions": "llama.cpp has no layer for them",
            "magnitudes": "it stops at any tensor that is not A or B",
            "modules": "it stops at any tensor that is not A or B",
            "tied": _TIED,
            "tokens": "it stops at any tensor that is not A or B",
        },
    ),
    "tgi": Reader(
        "TGI and LoRAX",
        ("rank_pattern", "alpha_pattern"),
        {
            "banks": "they read A and B of linear layers alone and pass over the rest",
            "biases": "they read A and B of linear layers alone and pass over the rest",
            "convolutions": "they read A and B of linear layers alone and pass over the rest",
            "embeddings": "they read A and B of linear layers alone and pass over the rest",
            "magnitudes": "they read A and B of linear layers alone and pass over the rest",
            "modules": "they read A and B of linear layers alone and pass over the rest",
            "tied": _TIED,
            "tokens": "they read A and B of linear layers alone and pass over the rest",
        },
    ),
}


def refusals(portable: Portable, target: Form | Reader) -> Iterator[str]:
    """One sentence for each thing of the adapter that the target cannot hold."""
    held = _held(portable)
    if isinstance(target, Reader):
        held["modules"] = [n for n in held["modules"] if not n.endswith(target.modules or ("\0",))]
    for kind, names in held.items():
        if names and kind in target.lacks:
            yield (
                f"{_WHAT[kind]} ('{names[0]}'{_more(names)}): {target.lacks[kind]}."
                + ("" if "rankwise.load_adapter" in target.lacks[kind] else f" {_MERGE}")
            )


def demand(portable: Portable, target: Form | Reader) -> None:
    """Raise where the target cannot hold all of the adapter.

    Raises:
        UserError: lists what it cannot hold, and why.
    """
    title = f"{target.name} cannot hold this adapter"
    gather(UserError, title, list(refusals(portable, target)))


def _held(portable: Portable) -> dict[str, list[str]]:
    """Names by what makes them more than a plain linear update."""
    adapter = portable.adapter
    kernels = portable.kernels
    return {
        "banks": [name for name, f in adapter.factors.items() if f.bank is not None],
        "biases": list(adapter.biases),
        "convolutions": list(kernels),
        "embeddings": sorted(portable.embeddings),
        "groups": [n for n, k in kernels.items() if k.groups > 1],
        "kernels": [n for n, k in kernels.items() if any(s > 1 for s in k.shape[1:])],
        "magnitudes": list(adapter.magnitudes),
        "modules": list(adapter.modules),
        "tied": list(adapter.factors)[:1] if adapter.method.tied else [],
        "tokens": list(adapter.tokens),
    }


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
