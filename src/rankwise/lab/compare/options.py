"""Every option of a comparison, written once, and the file that pins them in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankwise.errors import UserError, gather, nearest
from rankwise.train.config import FitConfig, Names, Numbers, Positive, Rate

__all__ = [
    "LORA_ONLY",
    "METHODS",
    "OF_THE_GRID",
    "SHARED",
    "CompareConfig",
    "make_compare",
    "merge",
]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "head": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "bottleneck-houlsby": {"method": "bottleneck", "adapter_placement": "houlsby"},
    "bottleneck-pfeiffer": {"method": "bottleneck", "adapter_placement": "pfeiffer"},
    "prefix": {"method": "prefix"},
    "lora": {"method": "lora"},
    "lora-fixed-alpha": {"method": "lora"},
}
"""The methods that can be compared, and what each asks of a run; LoRA's r and α come on top."""

OF_THE_GRID = {
    *("method", "r", "alpha", "rank_pattern", "alpha_pattern", "adapter_placement", "lr", "seed"),
    *("out", "select", "keep_checkpoints"),
}
"""The options of ``rankwise fit`` that the grid sets for each run."""
SHARED = tuple(name for name in FitConfig.model_fields if name not in OF_THE_GRID)
"""The others, which may be given; every run has them."""
LORA_ONLY = frozenset(
    {
        *("target_modules", "exclude_modules", "layers", "rank_stabilized", "dropout", "init"),
        *("dora", "freeze_a", "bias", "tied", "lora_plus"),
        "train_nested",
    }
)
"""Those of them that only the LoRA runs have."""


def _option(default: Any, text: str, **checks: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": "Comparison"}, **checks)


class CompareConfig(BaseModel):
    """What is compared, and how the learning rate of each method is found.

    On ``search_rank``: where it is None every rank is searched by itself. The best rate of LoRA
    moves with r (docs/math.md (2)), so that one rate for all ranks would show in the curve over the
    ranks as if it were a property of the rank. It costs some three runs for each rank beside the
    ``seeds`` runs that it has anyway. A number means one search at that rank for all.

    On ``search_head``: an output layer that is new starts from noise and wants a rate that is often
    tens of times that of the update beside it. Under one rate for both, a method whose best rate
    is low trains its head too little, and what looks like the update's limit is the head's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: Names = _option(list(METHODS), f"What is compared: {', '.join(METHODS)}.")
    ranks: Numbers = _option([1, 2, 4, 8, 16, 32], "Ranks of LoRA.")
    seeds: Positive = _option(3, "Runs of each setting, each with a seed of its own.")
    alpha_ratio: Rate = _option(2.0, "In lora, α is so many times r.")
    alpha_fixed: Rate = _option(16.0, "In lora-fixed-alpha, α whatever the rank.")
    rates: Positive = _option(
        3,
        "Learning rates tried for each method, around the default of rankwise fit; an odd number. "
        "1 takes the default without a search.",
    )
    widen: int = _option(
        3, "Steps that a search may go further when its best rate is at its edge.", ge=0
    )
    search_rank: Positive | None = _option(
        None, "Search LoRA's rate at this rank alone, for all ranks; at every rank when not given."
    )
    tuning_fraction: float = _option(
        0.2, "Share of the training rows that the search is judged on.", gt=0, lt=1
    )
    tuning_rows: Positive = _option(2000, "The search is judged on so many rows at most.")
    search_head: bool = _option(
        True,
        "Search head-only's rate first, and let every other method learn its output layer at the "
        "lowest of the good ones (--head-lr), unless --head-lr is given.",
    )
    search_rows: Positive | None = _option(
        None, "The search's runs train on so many rows at most; on all the others when not given."
    )
    search_epochs: float | None = _option(
        None,
        "Epochs of the search's runs, where they are to cost less; those of the others when not "
        "given.",
        gt=0,
        le=10_000,
    )
    reference: str | None = _option(
        None,
        "What the others are compared with, such as full, head or lora-r8; full fine-tuning when "
        "it is there and nothing is named.",
    )


def make_compare(values: Mapping[str, Any], where: str) -> CompareConfig:
    """Check values into options; one error lists all that is wrong.

    Raises:
        UserError: a value does not fit, or a method is not known.
    """
    problems: list[str] = []
    try:
        config = CompareConfig.model_validate(dict(values))
    except ValidationError as error:
        for one in error.errors():
            flag = f"--{str(one['loc'][0]).replace('_', '-')}"
            said = one["msg"].removeprefix("Value error, ").removeprefix("Input ")
            problems.append(f"{flag} {said}, got {one['input']!r}.")
        gather(UserError, where, problems)
        raise
    for name in config.methods:
        if name not in METHODS:
            problems.append(
                f"--methods: '{name}' is none of {', '.join(METHODS)}.{nearest(name, METHODS)}"
            )
    if config.rates % 2 == 0:
        problems.append(f"--rates must be odd, the default in the middle, got {config.rates}.")
    if not config.methods:
        problems.append("--methods must name at least one method.")
    if any(r < 1 for r in config.ranks):
        problems.append(f"--ranks must be 1 or more, got {config.ranks}.")
    if not config.ranks and any(name.startswith("lora") for name in config.methods):
        problems.append("--ranks must name at least one rank for LoRA.")
    gather(UserError, where, problems)
    methods = [name for name in METHODS if name in config.methods]
    return config.model_copy(update={"methods": methods, "ranks": sorted({*config.ranks})})


def merge(stored: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a comparison that goes on: what was, grown by what is given.

    Methods, ranks and seeds may be added, another reference named, and the files of the rows found
    elsewhere; nothing else may change.

    Raises:
        UserError: an option that may not change is another; all of them are listed.
    """
    merged = dict(stored)
    problems: list[str] = []
    for name, value in given.items():
        before = stored.get(name)
        if name in ("methods", "ranks"):
            merged[name] = [*before, *value] if before else value
        elif name == "seeds":
            merged[name] = max(before or 1, value)
        elif name in ("reference", "data", "eval"):
            merged[name] = value
        elif before != value:
            flag = name.replace("_", "-")
            problems.append(f"--{flag} was {before!r} and is now {value!r}.")
    gather(
        UserError,
        f"'{folder}' holds a comparison with other options, whose runs cannot stand beside new "
        "ones; put them back or name another --out",
        problems,
    )
    return merged
