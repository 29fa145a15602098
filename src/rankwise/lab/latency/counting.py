"""What a forward pass runs: its operators and floating-point operations, and whether two agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rankwise.lab.latency.records import Sameness
from rankwise.merging import Certificate

__all__ = ["Counts", "count_pass", "sameness"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """The operators of a forward pass by name, and its floating-point operations."""

    operators: Mapping[str, int]
    flops: int


def count_pass(model: nn.Module, inputs: Mapping[str, Tensor]) -> Counts:
    """Run a forward pass and count what it runs."""
    flops, operators = FlopCounterMode(display=False, custom_mapping=_MORE), _Operators()
    with torch.no_grad(), flops, operators:
        model(**inputs)
    return Counts(dict(operators.found), flops.get_total_flops())


def sameness(
    plain: nn.Module,
    merged: nn.Module,
    counts: tuple[Counts, Counts],
    certificate: Certificate,
) -> Sameness:
    """Whether the merged model runs the computation of the plain one, which was counted first."""
    kinds = [[(n, type(m)) for n, m in model.named_modules()] for model in (plain, merged)]
    checked = certificate.outputs
    assert checked is not None
    return Sameness(
        modules=kinds[0] == kinds[1],
        operators=counts[0].operators == counts[1].operators,
        flops=counts[0].flops == counts[1].flops,
        outputs=certificate.passed,
        error=checked.error,
        tolerance=checked.tolerance,
        effect=checked.effect,
    )


def _addmm(_: Shape, a: Shape, b: Shape, *_args: object, **_kwargs: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(q: Shape, k: Shape, v: Shape, *_args: object, **_kwargs: object) -> int:
    return sdpa_flop_count(q, k, v)


# what torch's counter passes over, from the shapes of the arguments
_MORE = {
    torch.ops.aten.addmm_: _addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


class _Operators(TorchDispatchMode):
    """Counts the operators that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
