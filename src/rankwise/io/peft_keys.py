"""The names of a PEFT file's tensors, whatever wrappers of the model stood in them when saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rankwise.io.tensors import shown

__all__ = ["PREFIX", "Named", "named"]

PREFIX = "base_model.model."
# What torch.compile, DistributedDataParallel and FSDP put into names.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_PARALLEL = "module."
# What PEFT calls its own tensors, where the name of the adapter stands in a plain state_dict.
_ADAPTER = re.compile(
    r"(?P<path>.+\.)?"
    r"(?:(?P<factor>lora_[AB])\.(?P<first>[^.]+)\.(?P<end>weight|bias)"
    r"|(?P<direct>lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)"
    r"\.(?P<second>[^.]+?)(?:\.weight)?)"
)


@dataclass(frozen=True)
class Named:
    """The tensors of a file by their names in a file of PEFT, without the prefix of all of them.

    Attributes:
        tensors: by name.
        changes: what was done to the names, one phrase each.
        problems: one sentence for each name that came out twice, and for a mixture of adapters.
    """

    tensors: Mapping[str, Tensor]
    changes: tuple[str, ...]
    problems: tuple[str, ...]


def named(tensors: Mapping[str, Tensor]) -> Named:
    """Bring the names into one form: without PEFT's prefix, wrappers and the adapter's name.

    Which names mean something is not decided here; a name that is none of PEFT's stays as it is.
    """
    found: dict[str, Tensor] = {}
    changes: dict[str, None] = {}
    problems: list[str] = []
    adapters: set[str] = set()
    parallel = all(key.startswith(_PARALLEL) for key in tensors)
    for key, tensor in tensors.items():
        name = key.removeprefix(_PARALLEL) if parallel else key
        for part, whose in _WRAPPERS.items():
            if part in name:
                name = name.replace(part, "")
                changes[f"'{part}' of {whose} was taken out"] = None
        if name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
        else:
            changes[f"'{PREFIX}' was not in front of all of them"] = None
        name, adapter = _without_adapter(name)
        if adapter is not None:
            adapters.add(adapter)
        if name in found:
            problems.append(f"{shown(key)} occurs twice, in two spellings.")
        found[name] = tensor
    if parallel and tensors:
        changes[f"'{_PARALLEL}' of DistributedDataParallel was taken off"] = None
    if len(adapters) > 1:
        listed = ", ".join(shown(name) for name in sorted(adapters))
        problems.append(f"its names mix several adapters ({listed}); save one of them alone.")
    changes.update((f"the adapter's name {shown(name)} was taken out", None) for name in adapters)
    return Named(found, tuple(changes), tuple(problems))


def _without_adapter(name: str) -> tuple[str, str | None]:
    """The name without the adapter's, and the adapter's."""
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return name, None
    path = match["path"] or ""
    if match["factor"]:
        return f"{path}{match['factor']}.{match['end']}", match["first"]
    # an old PEFT, or a plain state_dict, has lora_magnitude_vector.weight
    return path + match["direct"], None if match["second"] == "weight" else match["second"]
