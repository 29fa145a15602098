"""The same adapter twice: by Rankwise on one copy of a model and by PEFT on another."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.attaching import updates_of

R, ALPHA = 4, 10
TARGETS: dict[str, Any] = {"target_modules": ["query", "value"]}


class One(nn.Module):
    """A model with a single layer, run on one input; attention on it three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.layer, "in_proj_weight"):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)


class Two(nn.Module):
    """Two linear layers, the second of which is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Blocks(nn.Module):
    """Repeated query and value, and an output layer."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 16)})
            for _ in range(count)
        )
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["query"](x)) * block["value"](x)
        return self.classifier(x)


@dataclass(frozen=True)
class Half:
    """One trained tensor: whose it is here, and where it is in PEFT.

    ``view`` reads PEFT's tensor, or its gradient, in the shape that ours has.
    """

    name: str
    side: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor] = field(repr=False)


def with_peft(model: nn.Module, base_dtype: bool = False, **config: Any) -> Any:
    """A copy of the model adapted by PEFT, its factors in the base's dtype if ``base_dtype``."""
    import peft

    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D: fan_in_fan_out is set, with a warning
        return peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**options), autocast_adapter_dtype=not base_dtype
        )


def with_rankwise(model: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    """The model itself, adapted by Rankwise."""
    asked = {"r": R, "alpha": ALPHA, "target_modules": ["layer"], "head": "freeze", **options}
    rw.attach(model, rw.LoRA(**asked), name=name)
    return model


def halves(theirs: nn.Module, adapter: str = "default") -> Iterator[Half]:
    """Every factor and magnitude of a PEFT model, by the name that Rankwise gives to its weight."""
    from peft.tuners.lora import layer as lora

    for path, module in list(theirs.get_submodule("base_model.model").named_modules()):
        if not isinstance(module, lora.LoraLayer):
            continue
        name, held = path.replace(".base_layer", ""), dict(module.named_parameters())
        tables = (module.lora_A, module.lora_B, module.lora_embedding_A, module.lora_embedding_B)
        if not any(adapter in table for table in tables):
            continue
        if isinstance(module, lora.Embedding):
            A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if isinstance(module, lora.MultiheadAttention):
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                yield Half(f"{name}.{part}", "lora_A", A, _whole)
                yield Half(f"{name}.{part}", "lora_B", B, functools.partial(_third, i))
        elif isinstance(module, lora.ParamWrapper):
            place, experts = f"{name}.{module.parameter_name}", module.num_experts
            bank = module._param_ndim == 3
            yield Half(
                place, "lora_A", A, functools.partial(_down_of_bank, experts) if bank else _whole
            )
            yield Half(
                place, "lora_B", B, functools.partial(_up_of_bank, experts) if bank else _whole
            )
        else:
            yield Half(name, "lora_A", A, _flat)
            yield Half(name, "lora_B", B, _flat)
        magnitude = held.get(f"lora_magnitude_vector.{adapter}.weight")
        if magnitude is not None:
            yield Half(name, "magnitude", magnitude, torch.flatten)


def _whole(t: Tensor) -> Tensor:
    return t


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1)


def _third(i: int, t: Tensor) -> Tensor:
    return t.chunk(3)[i]


def _down_of_bank(experts: int, t: Tensor) -> Tensor:
    return t.reshape(experts, -1, t.shape[-1])


def _up_of_bank(experts: int, t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1, experts).permute(2, 0, 1)


def shuffle(theirs: nn.Module, seed: int = 1, adapter: str = "default") -> None:
    """Random factors, and magnitudes some way off, as after training."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for half in halves(theirs, adapter):
            if id(half.parameter) in done:
                continue
            done.add(id(half.parameter))
            noise = torch.randn(half.parameter.shape, generator=generator).to(half.parameter)
            if half.side == "magnitude":
                half.parameter.mul_(1 + 0.2 * noise)
            else:
                half.parameter.copy_(0.3 * noise)


def shuffle_ours(model: nn.Module, name: str | None = None) -> None:
    """Random numbers in all that trains in an adapter of ours."""
    with torch.no_grad():
        for update in updates_of(model, name).values():
            for parameter in update.trained():
                parameter.normal_(std=0.3)


def copy_over(theirs: nn.Module, ours: nn.Module, adapter: str = "default") -> None:
    """Give ours the numbers that PEFT has."""
    updates = updates_of(ours, adapter)
    found = list(halves(theirs, adapter))
    assert {half.name for half in found} == set(rw.attachment(ours, adapter).adapted)
    with torch.no_grad():
        for half in found:
            getattr(updates[half.name], half.side).copy_(half.view(half.parameter))


def gradient_errors(theirs: nn.Module, ours: nn.Module, adapter: str = "default") -> list[float]:
    """How far the gradients of ours are from PEFT's, relative; where PEFT has one tensor for
    several of ours (the A of attention), their sum.
    """
    updates = updates_of(ours, adapter)
    mine: dict[tuple[int, int], Tensor] = {}
    expected: dict[tuple[int, int], Tensor] = {}
    for half in halves(theirs, adapter):
        index = half.view.args[0] if isinstance(half.view, functools.partial) else -1
        key = (id(half.parameter), index)
        gradient = getattr(updates[half.name], half.side).grad
        if half.parameter.grad is None or gradient is None:
            assert half.parameter.grad is None
            assert gradient is None
            continue
        mine[key] = mine[key] + gradient if key in mine else gradient
        expected[key] = half.view(half.parameter.grad)
    return [relative(mine[key], expected[key]) for key in mine]


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in Frobenius norms."""
    off = (found.detach().double() - expected.detach().double()).norm()
    return float(off / expected.detach().double().norm())


def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output, and the gradient of the input, of a fixed random loss; others are in .grad."""
    x.grad = None
    y = model(x)
    y = y.logits if hasattr(y, "logits") else y
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y)
    (y * v).sum().backward()
    return y.detach(), x.grad


def twins(
    base: nn.Module, ours: dict[str, Any], theirs: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """The base adapted by Rankwise and a copy of it by PEFT, with the same random numbers."""
    peft_model = with_peft(base, **theirs)
    model = with_rankwise(base, **ours)
    shuffle(peft_model)
    copy_over(peft_model, model)
    return model, peft_model


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float) -> None:
    """Outputs, the gradient of the input and of all that trains agree up to the tolerance."""
    torch.manual_seed(1)
    expected, expected_dx = backward(theirs, x)
    torch.manual_seed(1)  # the same dropout
    y, dx = backward(ours, x)
    assert relative(y, expected) < tolerance
    assert (dx is None) == (expected_dx is None)
    if dx is not None and expected_dx is not None:
        assert relative(dx, expected_dx) < tolerance
    errors = gradient_errors(theirs, ours)
    assert errors
    assert max(errors) < tolerance


def two() -> tuple[Two, Tensor]:
    """The model of two layers in float64, and an input."""
    return Two().double(), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
