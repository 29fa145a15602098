"""Adapters that PEFT made on tiny models, and what they compute there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.io.portable import Portable

IDS = torch.tensor([[5, 17, 13, 8, 2, 21, 9, 14]])


def random_factors(model: Any, std: float = 0.1) -> None:
    """Random numbers in every trained factor and magnitude, so that nothing is zero by chance."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT speaks of embeddings and of Conv1D, which are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(base: Path, kind: str = "AutoModelForCausalLM") -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(base).eval()


def outputs(model: Any) -> Tensor:
    """What a model computes, in float64, so that only the adapter's own numbers are compared."""
    with torch.no_grad():
        found = model.double()(IDS)
    return found.logits if "logits" in found else found.last_hidden_state


def peft_folder(base: Path, folder: Path, kind: str = "AutoModelForCausalLM", **config: Any) -> Any:
    """Save an adapter of PEFT with random factors; gives its outputs and those of the base."""
    import peft

    with quiet():
        model = peft.get_peft_model(load(base, kind), peft.LoraConfig(**config)).eval()
        random_factors(model)
        model.save_pretrained(folder)
    return outputs(model), outputs(load(base, kind))


def peft_outputs(base: Path, folder: Path, kind: str = "AutoModelForCausalLM") -> Tensor:
    """What PEFT computes from a folder, each tensor of which it must have taken."""
    import peft

    with quiet():
        model = peft.PeftModel.from_pretrained(load(base, kind), folder)
        result = peft.load_peft_weights(str(folder), device="cpu")
        taken = peft.set_peft_model_state_dict(model, result)
    assert not taken.unexpected_keys
    return outputs(model)


def our_outputs(base: Path, portable: Portable, kind: str = "AutoModelForCausalLM") -> Tensor:
    """What Rankwise computes from a neutral adapter."""
    import rankwise

    model = load(base, kind)
    rankwise.attach(model, portable.adapter)
    return outputs(model)


def deltas(portable: Portable) -> dict[str, Tensor]:
    """The dense update of each module."""
    return {name: f.delta() for name, f in portable.factors.items()}


def same_deltas(first: Portable, second: Portable, tolerance: float = 1e-6) -> bool:
    one, two = deltas(first), deltas(second)
    return set(one) == set(two) and all(
        torch.allclose(one[name], two[name], rtol=tolerance, atol=tolerance) for name in one
    )
