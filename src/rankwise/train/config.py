"""Every option of a run, written once: flag, help, YAML key, check and record column."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rankwise.errors import UserError, gather, nearest

__all__ = ["FitConfig", "make_config", "refuse_idle"]


def split_names(value: object) -> object:
    """A list from comma-separated text; commas inside brackets belong to a pattern."""
    if not isinstance(value, str):
        return value
    parts = re.findall(r"(?:[^,(\[{]|\([^)]*\)|\[[^\]]*\]|\{[^}]*\})+", value)
    return [part.strip() for part in parts if part.strip()]


def split_pairs(value: object) -> object:
    """A mapping from comma-separated ``name=number`` text."""
    names = split_names(value)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return value
    pairs = [str(n).rpartition("=") for n in names]
    if not all(sign for _, sign, _ in pairs):
        raise ValueError("must be written as name=number, name=number")
    return {name.strip(): number.strip() for name, _, number in pairs}


def split_numbers(value: object) -> object:
    """Block numbers from text: ``"0-3,8"`` means 0, 1, 2, 3 and 8."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    numbers: list[int] = []
    for part in value.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"'{part}' is neither a number nor a range such as 4-11")
        numbers.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return list(dict.fromkeys(numbers))


Names = Annotated[list[str], BeforeValidator(split_names)]
Ranks = Annotated[dict[str, int], BeforeValidator(split_pairs)]
Alphas = Annotated[dict[str, float], BeforeValidator(split_pairs)]
Numbers = Annotated[list[int], BeforeValidator(split_numbers)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _option(default: Any, text: str, group: str, **checks: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group}, **checks)


Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]
LEARNING_RATES = {
    "lora": 1e-3,
    "head": 5e-3,
    "full": 5e-5,
    "bitfit": 1e-3,  # of 1e-4 to 1e-3 in Ben Zaken et al. 2021
    "bottleneck": 1e-3,  # of 3e-5 to 3e-3 in Houlsby et al. 2019, section 3.2
    "prefix": 1e-2,  # free keys and values: 5e-3 to 1e-2 in Liu et al. 2021, arXiv 2110.07602
}
# Options that mean something to some methods only, and to which.
_LORA = ("alpha", "alpha_pattern", "bias", "dora", "dropout", "freeze_a", "init", "lora_plus", "r",
         "rank_pattern", "rank_stabilized", "tied", "train_nested")  # fmt: skip
_MEANT_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LORA, ("lora",)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers"), ("lora", "bottleneck")),
    **dict.fromkeys(("adapter_size", "adapter_placement"), ("bottleneck",)),
    "prefix_length": ("prefix",),
    "head_lr": ("lora", "bitfit", "bottleneck", "prefix", "full"),
    "head": ("lora", "bitfit", "bottleneck", "prefix"),
    "modules_to_save": ("lora", "head", "bitfit", "bottleneck", "prefix"),
}
MODEL, DATA, METHOD, TRAINING, RUN = "Model", "Data", "Method", "Training", "Run"


class FitConfig(BaseModel):
    """The options of ``rankwise fit``; a YAML file holds the same keys as the flags.

    Unknown keys are errors that name the nearest key. Text that reads as a number is taken as one
    (YAML reads ``1e-4`` as text).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = _option(..., "Folder of a transformers model, or its name on a hub.", MODEL)
    revision: str | None = _option(None, "Branch, tag or commit of a hub model.", MODEL)
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "auto",
        "Number format of the frozen base; what trains stays in float32. auto measures which is "
        "faster on a CPU, and takes bfloat16 on a GPU that has it.",
        MODEL,
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _option(
        "auto", "Where to train: auto takes cuda, then mps, then cpu.", MODEL
    )

    data: str = _option(
        ..., "Training rows: a CSV, TSV, JSONL, Parquet or text file, or a hub data set.", DATA
    )
    eval: str | None = _option(
        None, "Evaluation rows; without it a part of the training rows is held out.", DATA
    )
    eval_fraction: float = _option(
        0.1, "Share of the training rows held out when there is no --eval.", DATA, gt=0, lt=1
    )
    task: Literal["auto", "classification", "regression", "causal-lm"] = _option(
        "auto", "What is learned; auto tells it from the columns and labels.", DATA
    )
    text_column: str | None = _option(None, "Column of the text.", DATA)
    pair_column: str | None = _option(None, "Column of the second text of a pair.", DATA)
    label_column: str | None = _option(None, "Column of the label or score.", DATA)
    prompt_column: str | None = _option(None, "Column of the prompt.", DATA)
    completion_column: str | None = _option(None, "Column of the completion.", DATA)
    messages_column: str | None = _option(None, "Column of the chat messages.", DATA)
    limit: Positive | None = _option(None, "Use a fixed random sample of so many rows.", DATA)
    max_length: Positive = _option(
        256, "Longest input in tokens; longer ones are cut, and counted in a note.", DATA
    )

    method: Literal["lora", "head", "full", "bitfit", "bottleneck", "prefix"] = _option(
        "lora",
        "What trains: low-rank updates, the output layer alone, everything, the biases, bottleneck "
        "networks behind layers, or a prefix of keys and values. All but full train the output "
        "layer of a classifier as well.",
        METHOD,
    )
    r: Positive = _option(8, "Rank of the updates.", METHOD)
    alpha: Rate | None = _option(None, "α in the scale α/r; 2·r when not given.", METHOD)
    target_modules: Names | None = _option(
        None,
        "Layers to adapt: names, ends of names, regular expressions, or all-linear. Attention "
        "query and value when not given.",
        METHOD,
    )
    exclude_modules: Names = _option([], "Layers to leave out, in the same language.", METHOD)
    layers: Numbers | None = _option(None, "Blocks to adapt, such as 4-11 or 0,2.", METHOD)
    rank_stabilized: bool = _option(False, "Scale by α/√r in place of α/r.", METHOD)
    rank_pattern: Ranks = _option({}, "r of some layers: name=r, name=r.", METHOD)
    alpha_pattern: Alphas = _option({}, "α of some layers: name=α, name=α.", METHOD)
    dropout: float = _option(
        0.0, "Dropout on the input of the LoRA branch.", METHOD, ge=0, lt=1, allow_inf_nan=False
    )
    init: Init = _option(
        "kaiming",
        "How A and B start. kaiming, gaussian and orthogonal are random; pissa and olora take them "
        "from the weight, eva from the inputs and lora-ga from the gradients of a few batches. The "
        "first step is the base whichever it is.",
        METHOD,
    )
    dora: bool = _option(
        False, "Train a magnitude of each output beside the direction (DoRA).", METHOD
    )
    freeze_a: bool = _option(
        False, "Leave A at its start and train B alone (LoRA-FA); needs less memory.", METHOD
    )
    bias: Literal["none", "adapted", "all"] = _option(
        "none", "Biases that train as well: none, those of the adapted layers, or all.", METHOD
    )
    tied: bool = _option(
        False,
        "Where an adapted layer shares its weight with another, put the update on both.",
        METHOD,
    )
    adapter_size: Positive = _option(64, "Width of the bottleneck networks.", METHOD)
    adapter_placement: Literal["houlsby", "pfeiffer"] | None = _option(
        None,
        "Where bottleneck networks stand: houlsby behind attention and feed-forward, with trained "
        "normalisations, pfeiffer behind feed-forward alone. With --target-modules they stand "
        "behind those layers. houlsby when neither is given.",
        METHOD,
    )
    prefix_length: Positive = _option(
        16, "Trained keys and values in front of those of each attention.", METHOD
    )
    head: Literal["auto", "train", "freeze"] = _option(
        "auto",
        "The output layer: auto trains and saves it for classification and regression, and leaves "
        "it as it is for language models.",
        METHOD,
    )
    modules_to_save: Names = _option([], "Further modules to train whole and save.", METHOD)

    epochs: float = _option(3.0, "Passes over the training rows.", TRAINING, gt=0, le=10_000)
    max_steps: Positive | None = _option(None, "Stop after so many optimiser steps.", TRAINING)
    batch_size: Positive = _option(32, "Rows in one optimiser step and pass.", TRAINING)
    accumulate: Positive = _option(
        1, "Passes whose gradients make one optimiser step, of batch_size rows each.", TRAINING
    )
    lr: Rate | None = _option(
        None,
        "Highest learning rate; by default 1e-3 for lora, bitfit and bottleneck, 5e-3 for head, "
        "1e-2 for prefix and 5e-5 for full.",
        TRAINING,
    )
    head_lr: Rate | None = _option(
        None, "Learning rate of an output layer that trains whole; lr when not given.", TRAINING
    )
    lora_plus: float = _option(
        1.0,
        "LoRA+: B's rate over A's; 1 is plain LoRA, 16 what its authors propose with a lower lr.",
        TRAINING,
        ge=1,
        allow_inf_nan=False,
    )
    train_nested: bool = _option(
        False,
        "Each step trains the first k ranks, k drawn from 1 to r, so that the adapter may be cut "
        "to its first ranks afterwards (rankwise trim --prefix).",
        TRAINING,
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay.", TRAINING, ge=0, allow_inf_nan=False)
    warmup: float = _option(
        0.06, "Share of the steps over which the learning rate rises.", TRAINING, ge=0, lt=1
    )
    max_grad_norm: Rate = _option(1.0, "Gradients are clipped to this norm.", TRAINING)
    max_skipped: Positive = _option(
        10, "End the run after so many steps in a row with a non-finite loss or gradient.", TRAINING
    )
    group_by_length: bool = _option(True, "Put rows of like length into one batch.", TRAINING)
    recompute: bool = _option(
        False, "Run norms, activations and gates again in backward: less memory.", TRAINING
    )
    gradient_checkpointing: bool = _option(
        False, "Run whole blocks again in backward: least memory, more time.", TRAINING
    )
    base_dropout: bool | None = _option(
        None,
        "Let the dropout that the base has of its own act in training; by default where the base "
        "itself trains (full), and not where it is frozen.",
        TRAINING,
    )
    cache: float = _option(
        0.0,
        "Keep what the frozen layers below the first trained one give for each row, in up to so "
        "many GB of files in the run folder: they run once, without dropout. 0 keeps nothing.",
        TRAINING,
        ge=0,
        allow_inf_nan=False,
    )
    pack: Literal["auto", "no"] = _option(
        "auto",
        "auto measures which kernels are faster on this CPU and takes those: frozen weights packed "
        "once, which takes twice their memory, and in 16 bits attention of short rows by plain "
        "products; the base's dropout is drawn by seed. no leaves the base to torch's.",
        TRAINING,
    )
    seed: int = _option(0, "Seed of everything random.", TRAINING, ge=0, lt=2**32)

    out: str = _option(..., "Folder of the run.", RUN)
    metric: str | None = _option(
        None, "Metric that picks the best adapter; the task's usual one when not given.", RUN
    )
    select: Literal["best", "last"] = _option(
        "best",
        "Which evaluation decides what is kept as the adapter: the best, or the last, so that the "
        "evaluation rows choose nothing.",
        RUN,
    )
    eval_every: Positive | None = _option(
        None, "Evaluate every so many steps; after each epoch when not given.", RUN
    )
    eval_batch_size: Positive = _option(64, "Rows in one evaluation pass.", RUN)
    save_minutes: float = _option(
        5.0, "Write a checkpoint at least this often, in minutes.", RUN, ge=0, allow_inf_nan=False
    )
    keep_checkpoints: Positive = _option(2, "How many checkpoints to keep.", RUN)

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else LEARNING_RATES[self.method]

    @property
    def base_drops(self) -> bool:
        """Whether the base's own dropout acts in training."""
        return self.method == "full" if self.base_dropout is None else self.base_dropout

    @property
    def head_ratio(self) -> float:
        """The rate of the output layer over that of the rest; where it alone trains it has lr."""
        own = None if self.method == "head" else self.head_lr
        return 1.0 if own is None else own / self.learning_rate


def make_config(values: Mapping[str, Any], where: str) -> FitConfig:
    """Check values into a config; one error lists all that is wrong, with the nearest key.

    ``where`` says where the values came from, for the message. A default that follows from other
    options (lr from method, α from r, metric from task) is filled in where it can be told, so that
    a recorded config stays the same when defaults change.

    Raises:
        UserError: an unknown key, a missing one, or a value that does not fit.
    """
    unknown = [k for k in values if k not in FitConfig.model_fields]
    problems = [f"'{k}' is no option.{nearest(str(k), FitConfig.model_fields)}" for k in unknown]
    known = {k: v for k, v in values.items() if k not in unknown}
    try:
        config = FitConfig.model_validate(known)
    except ValidationError as error:
        problems.extend(_explain(dict(e)) for e in error.errors())
        gather(UserError, where, problems)
        raise
    gather(UserError, where, problems)
    return config.model_copy(update=_defaults(config))


def refuse_idle(given: Collection[str], method: str) -> None:
    """Refuse options that were given and mean nothing to the method.

    A config file may hold them: it may be another method's, with the method changed by a flag.

    Raises:
        UserError: lists them, each with the methods that it is for.
    """
    problems = [
        f"--{name.replace('_', '-')} means nothing to it; it is for "
        f"{' and '.join(f'--method {m}' for m in _MEANT_FOR[name])}."
        for name in given
        if name in _MEANT_FOR and method not in _MEANT_FOR[name]
    ]
    gather(UserError, f"--method {method}", problems)


def _defaults(config: FitConfig) -> dict[str, Any]:
    """The values of options that were not given and follow from others.

    With a rank_pattern α stays open: it is 2·r of each layer.
    """
    found: dict[str, Any] = {"lr": config.learning_rate, "base_dropout": config.base_drops}
    if config.alpha is None and config.method == "lora" and not config.rank_pattern:
        found["alpha"] = 2.0 * config.r
    if config.method == "bottleneck" and config.target_modules is None:
        found["adapter_placement"] = config.adapter_placement or "houlsby"
    if config.metric is None and config.task != "auto":
        from rankwise.train.metrics import METRICS  # it imports NumPy, which takes a moment

        found["metric"] = METRICS[config.task][0]
    return found


def _explain(error: dict[str, Any]) -> str:
    key = str(error["loc"][0]) if error["loc"] else "config"
    inside = "".join(f"[{part!r}]" for part in error["loc"][1:])
    flag = f"{key}{inside} (--{key.replace('_', '-')})"
    if error["type"] == "missing":
        return f"{flag} is required: {FitConfig.model_fields[key].description}"
    if error["type"] == "literal_error":
        expected = str(error["ctx"]["expected"])
        hint = nearest(str(error["input"]), re.findall(r"'([^']+)'", expected))
        return f"{flag} must be {expected}, got {error['input']!r}.{hint}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{flag} {message}, got {error['input']!r}."
