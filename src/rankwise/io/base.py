"""What an adapter file has to know about the base: its names, its kinds of layers, its sketch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankwise.io.peft_names import saved_entries, within
from rankwise.io.sketch import Sketch, sketch
from rankwise.layers import LoRALayer, is_conv1d
from rankwise.targets import is_transformers, sites

__all__ = ["Base", "base_of"]

# The classes of transformers by the end of their name, and PEFT's word for their task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
# What PEFT adds to modules_to_save by itself for a task.
_ADDED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Base:
    """The facts about a base that an adapter file needs and a neutral Adapter does not hold.

    Attributes:
        names: every module name of the base, without those inside adapted layers.
        embeddings: names of the nn.Embedding modules.
        transposed: names of transformers' Conv1D modules.
        name: what the base is called, a hub name or a folder; None when unknown.
        task_type: PEFT's word for what the model does; None when it has none.
        sketch: some numbers of the adapted weights.
        bystanders: tensors of modules that PEFT's names for the trained modules also mean, by
            full name; PEFT fails to load a file without them.
    """

    names: tuple[str, ...]
    embeddings: frozenset[str]
    transposed: frozenset[str]
    name: str | None
    task_type: str | None
    sketch: Sketch
    bystanders: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def base_of(
    model: nn.Module,
    adapted: Iterable[str],
    trained: Collection[str] = (),
    name: str | None = None,
) -> Base:
    """Look at a model that carries an adapter, or may come to carry it.

    ``adapted`` names the adapted modules and ``trained`` the ones that train whole. Without a
    ``name`` it is the one that a transformers model was loaded by.
    """
    kinds = {n: _inner(site.module) for n, site in sites(model).items()}
    called = name or name_of(model)
    return Base(
        names=tuple(kinds),
        embeddings=frozenset(n for n, m in kinds.items() if isinstance(m, nn.Embedding)),
        transposed=frozenset(n for n, m in kinds.items() if is_conv1d(m)),
        name=called,
        task_type=_task_type(model, kinds, trained),
        sketch=sketch(model, adapted, called),
        bystanders=_bystanders(kinds, trained),
    )


def name_of(model: nn.Module) -> str | None:
    """What a transformers model was loaded by, or None."""
    if not is_transformers(model):
        return None
    config: object = model.config
    name: object = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _bystanders(modules: Mapping[str, nn.Module], trained: Collection[str]) -> dict[str, Tensor]:
    ends = saved_entries(trained, list(modules))
    return {
        f"{name}.{key}": tensor.detach().to("cpu")
        for name, module in modules.items()
        if name.endswith(ends) and not within(name, trained)
        for key, tensor in module.state_dict().items()
    }


def _inner(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoRALayer) else module


def _task_type(model: nn.Module, names: Iterable[str], trained: Collection[str]) -> str | None:
    """PEFT's word for the task, unless PEFT would then look for a head that is not saved."""
    if not is_transformers(model):
        return None
    kind = type(model).__name__
    task = next((word for end, word in _TASKS.items() if kind.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and getattr(model.config, "is_encoder_decoder", None) is not True:
        return None
    added = _ADDED.get(task or "", ())
    unsaved = [n for n in names if n.endswith(added) and n not in trained]
    return None if unsaved else task
