"""PEFT's adapter folder: written so that every reader agrees, read so that nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io import files
from rankwise.io.base import Base
from rankwise.io.peft_config import CONFIG, PeftConfig, read_config
from rankwise.io.peft_extras import Exact
from rankwise.io.peft_keys import named
from rankwise.io.peft_layout import METADATA_KEY as LAYOUT_KEY
from rankwise.io.peft_layout import Notes
from rankwise.io.peft_meaning import Meaning, meaning
from rankwise.io.peft_places import Places, place
from rankwise.io.peft_read import Reading, adapter_from
from rankwise.io.peft_write import content
from rankwise.io.pickles import read_pickle
from rankwise.io.sketch import METADATA_KEY, Sketch, agree, differences
from rankwise.io.tensors import TensorFile, all_finite, read_tensors, shown, write_tensors
from rankwise.methods.adapter import Adapter

__all__ = ["PICKLE", "WEIGHTS", "peft_config", "read_peft", "write_peft"]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_TRAINED_KEY = "rankwise.trained"


def write_peft(
    adapter: Adapter, folder: str | os.PathLike[str], base: Base, *, revision: str | None = None
) -> Path:
    """Write an adapter as PEFT's folder: adapter_config.json and adapter_model.safetensors.

    PEFT and transformers load it, and it has every key that vLLM, SGLang and the converters ask for
    (read in their sources, not run). Factors are as they are in memory, float32 as a rule, and a
    start (A0, B0) is in them as a pair of rank 2r. Biases and rows of embeddings that trained are
    there as they are by now, in float64, so that what was added comes back exactly.

    What Rankwise adds lies in the metadata of the safetensors file, which the others ignore: the
    sketch of the base, the list of modules trained whole, and how to take apart again what PEFT
    holds as one. Base weights are not written, but for modules whose names PEFT cannot tell from
    those of modules trained whole (:attr:`rankwise.io.base.Base.bystanders`).

    PEFT has no form for some updates: DoRA of an attention, of a parameter or of a convolution with
    groups, an attention whose query, key and value have other sizes, a module that hangs in several
    places, rows of an embedding that is tied without PEFT's knowledge. Such a file has the
    ``peft_type`` RANKWISE_LORA, so that PEFT refuses it and never runs a part of it.

    The folder appears whole or not at all, in the place of what was there.

    Raises:
        UserError: the adapter holds NaN or infinity, or names that PEFT's format cannot tell apart.
        EnvironmentFault: the disk refuses.
    """
    made = content(adapter, base, revision=revision)
    broken = [shown(k) for k, t in made.tensors.items() if not all_finite(t)]
    gather(UserError, "The adapter is not finite and is not saved; training diverged", broken)
    metadata = {
        METADATA_KEY: base.sketch.to_json(),
        _TRAINED_KEY: json.dumps(list(adapter.modules)),
    }
    notes = made.notes.to_json()
    if notes is not None:
        metadata[LAYOUT_KEY] = notes
    with files.folder(folder) as inside:
        write_tensors(inside / WEIGHTS, made.tensors, metadata)
        files.write_json(inside / CONFIG, made.config)
    return Path(folder)


def peft_config(
    adapter: Adapter, base: Base, *, revision: str | None = None
) -> Mapping[str, object]:
    """The content of adapter_config.json, checked to mean this adapter and no other.

    Training may call this before the first step, to learn early that a model's names cannot be
    expressed.

    Raises:
        UserError: PEFT's matching rules cannot name these modules exactly, or the method's r and
            alpha are not those of the factors.
    """
    return content(adapter, base, revision=revision).config


def read_peft(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    allow_nonfinite: bool = False,
    allow_pickle: bool = False,
) -> Adapter:
    """Read PEFT's folder for a model, strictly; the model is only looked at.

    Every tensor of the file must have its place, every weight that the configuration means on this
    model must be filled, rank, alpha, shapes and dtypes must agree, and where the file tells about
    its base (Rankwise's sketch, or weights that PEFT adds) it must be this one. Names may hold what
    torch.compile, DistributedDataParallel, FSDP and PEFT put into them, or lack PEFT's prefix.

    The adapter computes what PEFT 0.21 computes with it, so that the update of the output
    projection of an nn.MultiheadAttention, which PEFT adds twice, is doubled. One case differs: of
    a convolution with a padding_mode PEFT runs the update on zeros and merges it as it is run here.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the base, which may carry other adapters.
        allow_nonfinite: whether NaN and infinity are let pass.
        allow_pickle: whether adapter_model.bin is opened where there is no safetensors file; it is
            read with torch's loader for tensors alone, which runs no code of the file.

    Raises:
        UserError: there is no such folder or file.
        ArtifactError: lists all that is wrong with the adapter or its fit to this model.
        EnvironmentFault: a file cannot be read.
    """
    home = Path(folder)
    config = read_config(home / CONFIG)
    path, file = _weights(home, allow_nonfinite, allow_pickle)
    where = f"'{path}'"
    notes = Notes.from_json(file.metadata.get(LAYOUT_KEY), where)
    told = file.metadata.get(_TRAINED_KEY)
    trained = None if told is None else _told(told, where)
    tensors, exact = Exact.apart(file.tensors)
    meant = meaning(config, notes, model, trained)
    places = place(named(tensors), config, notes, meant)
    adapter, contradictions = adapter_from(Reading(config, notes, exact, meant, places))
    problems = [
        *_other_base(places, file, where, model, meant),
        *places.problems,
        *contradictions,
    ]
    gather(ArtifactError, _title(home, config, model), problems)
    assert adapter is not None
    return adapter


def _title(home: Path, config: PeftConfig, model: nn.Module) -> str:
    made_for = f", made for '{config.base_model_name}'," if config.base_model_name else ""
    return f"The adapter in '{home}'{made_for} does not fit this {type(model).__name__}"


def _weights(home: Path, allow_nonfinite: bool, allow_pickle: bool) -> tuple[Path, TensorFile]:
    """The tensors of a folder, and the file they are in."""
    path = home / WEIGHTS
    if path.exists():
        return path, read_tensors(path, allow_nonfinite=allow_nonfinite)
    pickles = [p.name for end in ("bin", "pt", "pth") for p in home.glob(f"adapter_model*.{end}")]
    if allow_pickle and PICKLE in pickles:
        pickle = home / PICKLE
        return pickle, TensorFile(read_pickle(pickle, allow_nonfinite=allow_nonfinite), {})
    if pickles:
        raise ArtifactError(
            f"'{home}' holds '{pickles[0]}' and no '{WEIGHTS}'. A pickle can run any code when it "
            "is opened, so Rankwise does not open it. Convert to safetensors where the file is "
            "trusted: load it with PEFT and call save_pretrained(folder). Or open it here with "
            f"allow_pickle=True, which reads {PICKLE} for its tensors alone."
        )
    return path, read_tensors(path, allow_nonfinite=allow_nonfinite)


def _told(text: str, where: str) -> list[str]:
    """The list of modules trained whole that :func:`write_peft` put into the metadata."""
    try:
        names: object = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if isinstance(names, list) and all(isinstance(n, str) for n in cast("list[object]", names)):
        return cast("list[str]", names)
    raise ArtifactError(f"{where}: the entry '{_TRAINED_KEY}' of its metadata is damaged.")


def _other_base(
    places: Places, file: TensorFile, where: str, model: nn.Module, meant: Meaning
) -> Iterator[str]:
    """What tells that the adapter was made on other weights than this model's."""
    text = file.metadata.get(METADATA_KEY)
    if text is not None:
        yield from differences(Sketch.from_json(text, where), model)
    for name, tensor in places.base.items():
        owner, _, key = name.rpartition(".")
        here: Tensor = dict(meant.modules[owner].named_parameters(recurse=False))[key]
        if not agree(tensor, here):
            yield (
                f"it carries a base tensor {tuple(tensor.shape)} for '{name}' that is not the one "
                "of this model: the base was another, or this was resized or trained as well. "
                "Rankwise does not replace base weights; load that base first."
            )
