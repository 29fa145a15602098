"""Load a pre-trained transformers model and its tokenizer for a task, and say what is fresh."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankwise.data.encode import padding_id
from rankwise.errors import ArtifactError, EnvironmentFault, UserError, nearest
from rankwise.io.files import read_fault
from rankwise.methods.head import head_modules
from rankwise.targets import shared_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "AUTO_CLASSES",
    "Base",
    "class_names",
    "fingerprint_folder",
    "load_base",
    "load_config",
    "load_tokenizer",
    "longest",
]

# The class of transformers that makes a model for each task.
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Base:
    """A loaded base.

    Attributes:
        model: the model in evaluation mode, float32 unless asked otherwise.
        tokenizer: its tokenizer, with a padding token.
        source: the folder or hub name.
        fingerprint: sha256 of the weight files, or the hub commit.
        fresh: names of parameters that the checkpoint did not hold, now random.
        longest: the longest input the model takes, in tokens, or None where it has no limit.
        foreign: the classes that the checkpoint's head was trained for, where it is kept and they
            are others than the task's, or stand in another order; empty elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    fresh: tuple[str, ...]
    longest: int | None
    foreign: tuple[str, ...] = ()


def load_base(
    source: str,
    task: str,
    label_names: Sequence[str] = (),
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Base:
    """Load a model for ``task`` from a local folder or a hub, running no code that comes with it.

    ``label_names`` sets the size of a classification head; a head of another size in the
    checkpoint is replaced by a fresh one. dtype None keeps the checkpoint's own.

    Raises:
        UserError: the folder is missing or is no model folder, or the architecture has no such
            task.
        ArtifactError: a file in the folder is damaged.
        EnvironmentFault: transformers is not installed, or the hub cannot be reached.
    """
    transformers = import_transformers()
    config = load_config(source, revision)
    if is_local(source):
        _check_weights(Path(source))
    named = class_names(config)
    tokenizer = load_tokenizer(source, revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    settings: dict[str, Any] = {}
    if task == "regression":
        settings = {"num_labels": 1, "problem_type": "regression"}
    elif task == "classification":
        ids = {str(name): i for i, name in enumerate(label_names)}
        settings = {"id2label": {i: n for n, i in ids.items()}, "label2id": ids}
        settings["problem_type"] = "single_label_classification"
    for name, value in settings.items():
        setattr(config, name, value)
    config.pad_token_id = padding_id(tokenizer)
    loader = getattr(transformers, AUTO_CLASSES[task])
    with _explained(source), quiet_transformers():
        model, info = loader.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype if dtype is not None else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=task != "causal-lm",
            output_loading_info=True,
        )
    takes = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in takes]
    mismatched = [str(entry[0]) for entry in info["mismatched_keys"]]
    fresh = {*map(str, info["missing_keys"]), *mismatched}
    fresh &= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _refuse_holes(source, model, fresh, mismatched, pooler=task != "causal-lm")
    known = named if task == "classification" else ()
    return Base(
        model=model.eval(),
        tokenizer=tokenizer,
        source=source,
        fingerprint=fingerprint(source, config),
        fresh=tuple(sorted(fresh)),
        longest=longest(model, tokenizer),
        foreign=_foreign(model, fresh, known, label_names),
    )


def _foreign(
    model: nn.Module, fresh: Iterable[str], named: tuple[str, ...], wanted: Sequence[str]
) -> tuple[str, ...]:
    """The classes that a kept head knows, where they are not the wanted ones in their order."""
    head = tuple(f"{name}." for name in head_modules(model))
    same = [name.casefold() for name in named] == [str(name).casefold() for name in wanted]
    return () if same or any(name.startswith(head) for name in fresh) else named


def class_names(config: Any) -> tuple[str, ...]:
    """The classes that a checkpoint's head was trained for, in its order, by a config's id2label.

    Empty when they are transformers' own LABEL_0, LABEL_1, ..., which name nothing.
    """
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label or {}))
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def load_config(source: str, revision: str | None = None) -> Any:
    """The transformers config of a folder or hub model; see :func:`load_base` for the errors."""
    transformers = import_transformers()
    if is_local(source):
        _check_folder(Path(source))
    with _explained(source), quiet_transformers():
        raw, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
    if raw.get("auto_map"):
        raise UserError(
            f"The model '{source}' asks to run code that comes with it (auto_map in config.json). "
            "Rankwise never does. Use a model whose architecture transformers itself knows."
        )
    with _explained(source), quiet_transformers():
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model; see :func:`load_base` for the errors."""
    transformers = import_transformers()
    with _explained(source, "tokenizer"), quiet_transformers():
        return transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )


def is_local(source: str) -> bool:
    """Whether a model is named by a path: one that exists, or text that only a path can be."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault(
            "This needs the package transformers, which is not installed. "
            'Install it with: pip install "rankwise[text]"'
        ) from error
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bars or advice from transformers while a model loads; errors still raise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    # transformers imports torchao where it is there, which logs what of it this machine lacks, and
    # torch about its enumerations
    for noisy in ("torchao", "torch.utils._pytree"):
        getLogger(noisy).setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        siblings = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"There is no model folder '{folder}'.{nearest(str(folder), siblings)}")
    if not folder.is_dir():
        raise UserError(f"'{folder}' is a file; --model takes the folder that holds config.json.")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"'{folder}' holds an adapter, not a model; name the base model it belongs to."
            )
        raise UserError(f"'{folder}' is no transformers model folder: it has no config.json.")
    read_settings(folder / "config.json")


def read_settings(file: Path) -> dict[str, Any]:
    """The config.json of a model; numbers in it may be infinite, as Mamba's are.

    Raises:
        ArtifactError: it is no JSON object.
        EnvironmentFault: it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise read_fault(file, error) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{file}' is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"'{file}' holds a {type(found).__name__}, not the config of a model.")
    return found


def _check_weights(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f" (it has {', '.join(pickled)}, which could run code when read)" if pickled else ""
        raise UserError(
            f"'{folder}' has no model.safetensors{why}. Save the model as safetensors first: "
            "model.save_pretrained(folder) in a current transformers does."
        )


@contextlib.contextmanager
def _explained(source: str, what: str = "model") -> Generator[None]:
    """Turn what transformers and the hub raise into one clear error."""
    local = is_local(source)
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if local:
            raise ArtifactError(f"The {what} in '{source}' cannot be loaded: {first}") from error
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        how = (
            "HF_HUB_OFFLINE=1 forbids the network; unset it, or name a local folder."
            if offline
            else "Check the name, the network and, for a gated model, your token; or name a local "
            "folder."
        )
        raise EnvironmentFault(
            f"The {what} '{source}' is no local folder and could not be had from the hub: {first} "
            f"{how}"
        ) from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ArtifactError(
                f"The weights in '{source}' are damaged: {error}. Fetch the model again."
            ) from error
        if is_config_fault(error):
            raise ArtifactError(f"The config of '{source}' is damaged: {in_line(error)}") from error
        raise


def is_config_fault(error: Exception) -> bool:
    """Whether huggingface_hub says that a field of a config has a value of the wrong kind."""
    return type(error).__name__.startswith("StrictDataclass")


def in_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def fingerprint(source: str, config: Any) -> str:
    """What identifies the weights: sha256 over a local folder's weight files, or a hub commit."""
    if is_local(source):
        return fingerprint_folder(Path(source))
    return f"commit:{getattr(config, '_commit_hash', None)}"


def fingerprint_folder(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in name order."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _refuse_holes(
    source: str, model: nn.Module, fresh: Iterable[str], mismatched: Collection[str], pooler: bool
) -> None:
    """Refuse a checkpoint that lacks more than its head, or, where ``pooler`` says so, its pooler.

    An output layer that shares its weight with an embedding is no head that may be lacking.
    """
    head = tuple(f"{name}." for name in head_modules(model))
    tied = {name for group in shared_weights(model) for name in group}

    def may_lack(name: str) -> bool:
        in_pooler = pooler and name not in mismatched and "pooler" in name.split(".")
        return in_pooler or (name.startswith(head) and name not in tied)

    holes = sorted(name for name in fresh if not may_lack(name))
    if holes:
        raise ArtifactError(
            f"The weights in '{source}' are not those of its config.json: {len(holes)} are missing "
            f"or have another shape, such as {', '.join(holes[:3])}. Fetch the model again."
        )


def longest(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The longest input that a model and its tokenizer take, in tokens; None without a limit."""
    limits: list[int] = []
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its like number positions from padding_idx + 1.
        taken = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ]
        limits.append(positions - max(taken, default=0))
    if tokenizer is not None and 0 < tokenizer.model_max_length < 1_000_000:
        limits.append(int(tokenizer.model_max_length))
    return min(limits) if limits else None


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep the inputs of each block alone and compute the rest again in backward.

    Raises:
        UserError: the architecture has no such way.
    """
    # transformers 5 renamed it, and drops the old name in 6
    named = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable: Any = next(found for name in named if (found := getattr(model, name, None)))
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient-checkpointing cannot be used: {error}") from error


def fresh_modules(fresh: Sequence[str], head: Sequence[str]) -> list[str]:
    """Modules outside the head that hold a fresh parameter, and so must train."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in fresh)
    inside = tuple(f"{h}." for h in head)
    return [o for o in owners if o and o not in head and not o.startswith(inside)]
