"""Trained biases and rows of embeddings: what was added here, what is there now in a PEFT file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.io.peft_entries import Paths
from rankwise.io.peft_forms import Form, Parameter, Plain
from rankwise.io.peft_fused import OUT, Attention
from rankwise.io.peft_names import within
from rankwise.layers import dense_weight, wide_dtype

__all__ = [
    "Exact",
    "absolute",
    "added_by",
    "bias_keys",
    "bias_parameters",
    "bias_within",
    "biases_meant",
    "change",
    "frozen_rows",
    "tokens_key",
]

_EXACT = "rankwise.exact."  # in front of the names of tensors that only Rankwise reads


@dataclass
class Exact:
    """Values that the file says in other words, as they are where the words would round them.

    A bias b0 + d is written in float64, from which d comes back to the last bit unless it is
    smaller than b0 by a factor of 2^28. The few that do not are written by themselves, under names
    that PEFT does not know and passes over.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def keep(self, kind: str, name: str, value: Tensor, back: Tensor) -> None:
        """Write a value by itself, unless it comes back as it is."""
        same = value.dtype == back.dtype and (
            torch.equal(value, back) or torch.allclose(value, back, rtol=0, atol=0, equal_nan=True)
        )
        if not same:
            self.tensors[f"{_EXACT}{kind}.{name}"] = value

    def find(self, kind: str, name: str, back: Tensor) -> Tensor:
        """The value as it was written, given what came back of it; taken out of the tensors."""
        key = f"{_EXACT}{kind}.{name}"
        kept = self.tensors.get(key)
        if kept is None or kept.shape != back.shape or not kept.is_floating_point():
            return back
        return self.tensors.pop(key)

    @staticmethod
    def apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Exact]:
        """The tensors of a file without those that only Rankwise reads, and these."""
        ours = {key: t for key, t in tensors.items() if key.startswith(_EXACT)}
        return {key: t for key, t in tensors.items() if key not in ours}, Exact(ours)


def bias_parameters(modules: Mapping[str, nn.Module], whole: Collection[str]) -> dict[str, Tensor]:
    """The biases of the base by full name, outside the modules that train whole."""
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        if not within(name, whole)
        for key, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 1 and (key == "bias" or key.endswith("_bias"))
    }


def biases_meant(which: str, forms: Collection[Form], biases: Collection[str]) -> list[str]:
    """The biases that a file of PEFT holds, of those that the base has.

    ``bias="all"`` is each one called "bias", and "lora_only" that of each module with a wrapper.
    """
    if which == "all":
        return [name for name in biases if name.endswith(".bias")]
    wrapped: list[str] = []
    for form in forms if which == "lora_only" else ():
        if isinstance(form, Attention):
            wrapped.extend((form.target, form.output))
        elif not isinstance(form, Plain):
            owner = form.target.rpartition(".")[0]
            wrapped.append(owner if isinstance(form, Parameter) else form.target)
    return [f"{name}.bias" for name in dict.fromkeys(wrapped) if f"{name}.bias" in biases]


def bias_keys(form: Form) -> dict[str, tuple[int, ...]]:
    """The biases of B that PEFT gives an update (lora_bias), and their shapes."""
    if isinstance(form, Attention):
        whole = (3 * form.size,)
        return {"lora_B.bias": whole, OUT + "lora_B.bias": (form.size,)}
    if isinstance(form, Parameter | Plain) or "lora_embedding_A" in form.wanted(1):
        return {}
    return {"lora_B.bias": (form.outputs,)}


def absolute(frozen: Tensor, change: Tensor) -> Tensor:
    """What is there in place of a frozen bias, or of frozen rows: b0 + d, in float64."""
    return frozen.detach().to("cpu", torch.float64) + change.double()


def change(frozen: Tensor, there: Tensor) -> Tensor:
    """The inverse of :func:`absolute`: what was added, in the dtype in which that trains."""
    return (there.double() - frozen.detach().to("cpu", torch.float64)).to(wide_dtype(frozen))


def bias_within(added: Tensor, scale: float) -> Tensor:
    """The bias of B whose effect, s times it, is what was added to the layer's bias."""
    return added.double() / scale


def added_by(bias: Tensor, scale: float, weight: Tensor) -> Tensor:
    """The inverse of :func:`bias_within`, in the dtype that trains beside the layer's weight."""
    return (bias.double() * scale).to(wide_dtype(weight))


def frozen_rows(embedding: nn.Module, ids: Collection[int]) -> Tensor:
    """The frozen rows of an embedding."""
    weight = dense_weight(embedding)
    return weight[torch.tensor(list(ids), device=weight.device)]


def tokens_key(name: str, paths: Paths) -> str:
    """Where PEFT has the trained rows of an embedding."""
    return f"{paths.outer(name)}.token_adapter.trainable_tokens_delta"
