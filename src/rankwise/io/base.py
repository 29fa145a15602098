"""What an adapter file has to know about the base: its modules, what is tied, its sketch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankwise.io.peft_names import saved_entries, within
from rankwise.io.sketch import Sketch, own_modules, sketch
from rankwise.layers import layout_of
from rankwise.methods.adapter import Adapter
from rankwise.methods.additions import tied_sites
from rankwise.targets import Target, is_transformers, sites, targets_of

__all__ = ["Base", "base_of", "input_embedding", "name_of", "tied_targets", "tied_vocabulary"]

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
        modules: the base's own modules, live, by name.
        targets: the adapted weights by name, in the order of the model.
        places: in how many places of the model each module hangs.
        name: what the base is called, a hub name or a folder; None when unknown.
        task_type: PEFT's word for what the model does; None when it has none.
        sketch: some numbers of the adapted weights.
        partners: the other modules that hold the weight of an adapted one, as weights that have
            the same update; empty unless the method ties them.
        shared: embeddings with trained rows whose weight another module holds as well.
        vocabulary: the input embedding and the output layers tied to it, by PEFT's rule; empty
            when nothing is tied.
        bystanders: tensors of modules that PEFT's names for the trained modules also mean, by
            full name; PEFT fails to load a file without them.
    """

    modules: Mapping[str, nn.Module]
    targets: Mapping[str, Target]
    places: Mapping[str, int]
    name: str | None
    task_type: str | None
    sketch: Sketch
    partners: Mapping[str, tuple[Target, ...]] = field(
        default_factory=dict[str, tuple[Target, ...]]
    )
    shared: frozenset[str] = frozenset()
    vocabulary: tuple[str, ...] = ()
    bystanders: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def names(self) -> tuple[str, ...]:
        """Every module name of the base, without those inside adapted layers."""
        return tuple(self.modules)


def base_of(model: nn.Module, adapter: Adapter, name: str | None = None) -> Base:
    """Look at the base of an adapter: a model that carries it, or one that it is for.

    Without a ``name`` it is the one that a transformers model was loaded by.
    """
    modules = own_modules(model)
    targets = targets_of(model, adapter.method.split)
    called = name or name_of(model)
    known = [n for n in targets if n in adapter.factors]
    tied = adapter.method.tied
    return Base(
        modules=modules,
        targets={n: targets[n] for n in known},
        places={n: len(site.places) for n, site in sites(model).items()},
        name=called,
        task_type=_task_type(model, modules, adapter.modules),
        sketch=sketch(model, [*adapter.factors, *adapter.tokens], called),
        partners={n: found for n in known if tied and (found := tied_targets(model, targets[n]))},
        shared=frozenset(n for n in adapter.tokens if n in modules and tied_sites(model, n)),
        vocabulary=tied_vocabulary(model),
        bystanders=_bystanders(modules, adapter.modules),
    )


def tied_targets(model: nn.Module, target: Target) -> tuple[Target, ...]:
    """The weights of other modules that are the same tensor as this one."""
    return tuple(Target(s, layout_of(s.base)) for s in tied_sites(model, target.site.name))


def name_of(model: nn.Module) -> str | None:
    """What a transformers model was loaded by, or None."""
    if not is_transformers(model):
        return None
    config: object = model.config
    name: object = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def input_embedding(model: nn.Module) -> str | None:
    """The name of a transformers model's input embedding, or None."""
    if not is_transformers(model):
        return None
    try:
        module: object = model.get_input_embeddings()  # type: ignore[operator]
    except RuntimeError:  # an image model says so, for instance
        return None
    found = (n for n, s in sites(model).items() if module in (s.module, s.base))
    return next(found, None)


def tied_vocabulary(model: nn.Module) -> tuple[str, ...]:
    """The input embedding and the layers that share its weight, where PEFT takes note of that.

    PEFT asks the configuration of a transformers model (``tie_word_embeddings``); other models
    have nothing tied in its eyes.
    """
    embedding = input_embedding(model)
    if embedding is None or getattr(model.config, "tie_word_embeddings", None) is not True:
        return ()
    others = [site.name for site in tied_sites(model, embedding)]
    return (embedding, *others) if others else ()


def _bystanders(modules: Mapping[str, nn.Module], trained: Collection[str]) -> dict[str, Tensor]:
    ends = saved_entries(trained, list(modules))
    return {
        f"{name}.{key}": tensor.detach().to("cpu")
        for name, module in modules.items()
        if name.endswith(ends) and not within(name, trained)
        for key, tensor in module.state_dict().items()
    }


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
