"""Adapters: small bottleneck networks behind the output projections of a transformer's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.attaching import Addition, Placement, Plan
from rankwise.errors import UserError, gather
from rankwise.layers import Activation, LoRALayer, Network, Switch, Update, is_conv1d, network
from rankwise.methods.additions import add_bias
from rankwise.methods.head import HeadChoice, describe_copies, trained_whole, untied_notes
from rankwise.targets import Site, Target, find_head, matches, select, sites

__all__ = ["After", "Bottleneck", "Houlsby", "Pfeiffer"]

# The output projections of attention and of the feed-forward part, as the architectures of
# transformers name them. The first entry of which both occur is taken.
_OUTPUTS = (
    (r".*attention\.output\.dense", r".*\.\d+\.output\.dense"),  # BERT, RoBERTa, DeBERTa, ELECTRA
    ("attn.o", r".*\.\d+\.output\.dense"),  # MPNet
    ("attention.dense", "ffn_output"),  # ALBERT
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("attn.Wo", "mlp.Wo"),  # ModernBERT
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2, GPT BigCode
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3
    ("self_attn.o_proj", "mlp.c_proj"),  # StarCoder 2
    (r".*Attention\.o", "DenseReluDense.wo"),  # T5
    (r".*_attn\.out_proj", "fc2"),  # BART, OPT, Pegasus, Whisper, CLIP, SigLIP
    ("self_attn.dense", "mlp.fc2"),  # Phi
    ("attention.o_proj", "mlp.fc2"),  # ViT, DeiT, BEiT, DINOv2, Swin
    ("attention.o_proj", "mlp.down_proj"),  # DINOv3
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "mlp.dense_4h_to_h"),  # BLOOM, Falcon
    ("attn.out_proj", "ffn.down_proj"),  # MPT
    ("attn.out_proj", "mlp.fc_out"),  # GPT-J, CodeGen
    ("attention.out_proj", "mlp.c_proj"),  # GPT-Neo
    ("attention.out_proj", "feed_forward.output_dense"),  # wav2vec 2.0, HuBERT
)


@dataclass(frozen=True)
class Houlsby:
    """Behind the output projections of attention and of the feed-forward part.

    Attributes:
        norms: whether the weights and biases of the normalisations train as well, as they did.

    Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1.
    """

    norms: bool = True


@dataclass(frozen=True)
class Pfeiffer:
    """Behind the output projections of the feed-forward part alone.

    Attributes:
        norms: whether the weights and biases of the normalisations train as well.

    Source: Pfeiffer et al. 2020, arXiv 2005.00247, section 3.1 and appendix.
    """

    norms: bool = False


@dataclass(frozen=True)
class After:
    """Behind the layers that are named.

    Attributes:
        target_modules: names, ends of names or regular expressions of Linear layers.
        exclude_modules: the same language; wins over target_modules.
        layers: numbers of the blocks, from 0; None means all.
        norms: whether the weights and biases of the normalisations train as well.
    """

    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] = ()
    layers: Sequence[int] | None = None
    norms: bool = False

    def __post_init__(self) -> None:
        names, without = self.target_modules, tuple(self.exclude_modules)
        whole = (names,) if isinstance(names, str) else tuple(names)
        object.__setattr__(self, "target_modules", whole)
        object.__setattr__(self, "exclude_modules", without)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True)
class Bottleneck:
    """Train a small network behind chosen layers: y' = y + U σ(D y + d) + u.

    D is (size, out) and U (out, size), and U starts at zero, so step 0 is the base bit for bit. The
    network reads what the layer gives, before dropout, the skip connection and the normalisation
    that follow, and what other adapters that were attached earlier add to it.

    Attributes:
        size: m, the width inside; a network has 2 · m · out + m + out parameters.
        placement: behind which layers.
        activation: σ.
        head: see :data:`rankwise.methods.head.HeadChoice`.
        modules_to_save: further modules that train whole and are saved.

    Raises:
        UserError: the size makes no sense.

    Source: Houlsby et al. 2019, arXiv 1902.00751; docs/math.md (20).
    """

    size: int = 64
    placement: Houlsby | Pfeiffer | After = Houlsby()
    activation: Activation = Activation.GELU
    head: HeadChoice = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        if not isinstance(self.size, int) or self.size < 1:
            raise UserError(
                f"Bottleneck: size must be a whole number of 1 or more, got {self.size}."
            )

    def plan(self, model: nn.Module) -> Plan:
        """A network behind every chosen layer, and a trained copy of the head.

        Raises:
            UserError: the output projections have no known names; a named layer matches nothing,
                is no Linear, or is passed by in evaluation; or see
                :func:`rankwise.methods.head.trained_whole`.
        """
        copied = trained_whole(model, self.head, self.modules_to_save, type(self).__name__)
        whole = [place.site.name for place in copied]
        chosen = self._chosen(model)
        problems = [p for t in chosen if (p := _unfit(t) or _inside(t.name, whole)) is not None]
        gather(UserError, "No bottleneck can be put there", problems)
        additions = [self._addition(target.site) for target in chosen]
        if self.placement.norms:
            additions.extend(_norms(model, (*find_head(model).names, *whole)))
        return Plan(self, tuple(additions), copied, notes=_notes(model, copied))

    def _chosen(self, model: nn.Module) -> list[Target]:
        place = self.placement
        if isinstance(place, After):
            return select(model, place.target_modules, place.exclude_modules, place.layers)
        attention, feed_forward = output_projections(model)
        behind = (attention, feed_forward) if isinstance(place, Houlsby) else (feed_forward,)
        return select(model, behind)

    def _addition(self, site: Site) -> Addition:
        def make(layer: LoRALayer, switch: Switch, _: Mapping[str, Update]) -> Network:
            return network(layer, self.size, self.activation, switch)

        return Addition(site, None, site.name, make)


def output_projections(model: nn.Module) -> tuple[str, str]:
    """Patterns of the output projections of attention and of the feed-forward part.

    Raises:
        UserError: no known naming occurs; the message lists what could be named.
    """
    names = [name for name, site in sites(model).items() if _is_linear(site.base)]
    for entry in _OUTPUTS:
        if all(any(matches(pattern, name) for name in names) for pattern in entry):
            return entry
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    named = [end for end in ends if not end.isdigit()][:12]
    listed = f" Its linear layers end in: {', '.join(named)}." if named else ""
    raise UserError(
        f"{type(model).__name__} has no output projections of attention and feed-forward of known "
        "names, so the layers must be named: Bottleneck(placement=After([...])), or "
        f"--target-modules.{listed}"
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _unfit(target: Target) -> str | None:
    """Why no network can stand behind this layer, or None."""
    module, name = target.site.base, target.name
    if not _is_linear(module) or target.layout.part is not None:
        return f"'{name}' is no Linear layer as a whole."
    for owner in _owners(target.site):
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            return (
                f"'{name}' belongs to an nn.{type(owner).__name__}, which may read its weight and "
                "not run it, and no weight holds a bottleneck."
            )
    return None


def _owners(site: Site) -> Iterator[nn.Module]:
    """Every module in which this one lies."""
    for place in site.places:
        parts = place.split(".")[:-1]
        yield from (site.root.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1))


def _inside(name: str, whole: Iterable[str]) -> str | None:
    owner = next((w for w in whole if name == w or name.startswith(w + ".")), None)
    if owner is None:
        return None
    return (
        f"'{owner}' is to be trained whole, and '{name}' in it is to have a bottleneck as well. "
        "Leave one of them out."
    )


def _norms(model: nn.Module, whole: Sequence[str]) -> Iterator[Addition]:
    """A trained change of the weight and the bias of every normalisation outside these modules."""
    for name, site in sites(model).items():
        is_norm = "norm" in type(site.base).__name__.lower() and _inside(name, whole) is None
        for parameter, tensor in site.base.named_parameters(recurse=False) if is_norm else ():
            if tensor.ndim == 1:
                yield add_bias(site, parameter, tuple(tensor.shape))


def _notes(model: nn.Module, copied: Sequence[Placement]) -> tuple[str, ...]:
    return (describe_copies(copied), *untied_notes(model, copied)) if copied else ()
