"""An adapter away from its base: factors by module name, and what a file says of the layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from rankwise.errors import ArtifactError, gather
from rankwise.io.peft_names import exact
from rankwise.layers import Split
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter
from rankwise.methods.lora import LoRA
from rankwise.methods.restate import restated
from rankwise.targets import first_match

__all__ = ["Kernel", "Portable", "assemble", "pairs"]


@dataclass(frozen=True)
class Kernel:
    """What the flat A (r, in/groups · ∏k) of a convolution was.

    Attributes:
        shape: (in/groups, *k), so that A.reshape(r, *shape) is a convolution's weight.
        groups: of the base convolution.
    """

    shape: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Portable:
    """An adapter that a file held or that is to become one, with no model at hand.

    Attributes:
        adapter: the neutral value; ``rankwise.attach(model, portable.adapter)`` puts it on a base.
        embeddings: adapted names that are embeddings, as far as the file tells or the user said.
        kernels: the shapes of adapted convolutions, by adapted name.
        fused: modules whose one update in the file holds those of several parts, below each other.
        transposed: whether the adapted weights are stored (in, out), PEFT's fan_in_fan_out.
        base: what the base is called.
        task_type: PEFT's word for the task.
        component: which model of a pipeline this is for, such as "unet".
        sketch: Rankwise's sketch of the base as one line of JSON.
        notes: what was decided on the way, one sentence each.
    """

    adapter: Adapter
    embeddings: frozenset[str] = frozenset()
    kernels: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    fused: tuple[str, ...] = ()
    transposed: bool = False
    base: str | None = None
    task_type: str | None = None
    component: str | None = None
    sketch: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def factors(self) -> Mapping[str, Factors]:
        return self.adapter.factors

    def noting(self, *sentences: str) -> Portable:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *sentences))

    def with_factors(self, factors: Mapping[str, Factors]) -> Portable:
        """The same with other factors; the method says their names, ranks and scales."""
        old = self.adapter
        made = restated(old.method, factors)
        return replace(self, adapter=replace(old, method=made, factors=dict(factors)))

    def parts(self) -> dict[str, list[str]]:
        """Adapted names that are parts, by their fused projection, in the order of its split."""
        splits = self.adapter.method.split
        found: dict[str, list[str]] = {}
        for name in self.factors:
            module, _, part = name.rpartition(".")
            key = first_match(splits, module)
            if key is not None and part in splits[key].names:
                found.setdefault(module, []).append(name)
        for module, names in found.items():
            order = self.split(module).names
            names.sort(key=lambda name: order.index(name.rpartition(".")[2]))
        return found

    def split(self, module: str) -> Split:
        """How a fused projection is split."""
        splits = self.adapter.method.split
        return splits[first_match(splits, module) or ""]


def assemble(
    factors: Mapping[str, Factors],
    *,
    trained: Mapping[str, Tensor] | None = None,
    modules: Collection[str] = (),
    magnitudes: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    splits: Mapping[str, Split] | None = None,
) -> Adapter:
    """The neutral adapter of these tensors, its method naming exactly these modules.

    ``splits`` has the fused projections by module name.
    """
    splits = splits or {}
    parts = exact(splits, splits)
    owners = {name.rpartition(".")[0] for name in biases or ()}
    method = LoRA(
        dora=bool(magnitudes),
        bias="none" if not biases else "adapted" if owners <= set(factors) else "all",
        split={parts[name]: split for name, split in splits.items()},
        head="freeze",
        modules_to_save=tuple(exact(modules, [*factors, *modules]).values()),
    )
    return Adapter(
        method=restated(method, factors),
        factors=dict(factors),
        modules=tuple(modules),
        trained=dict(trained or {}),
        magnitudes=dict(magnitudes or {}),
        biases=dict(biases or {}),
    )


def pairs(
    sides: Mapping[str, Mapping[str, Tensor]], where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each name, or all that is wrong with them.

    A must be (r, in) and B (out, r) with one r, both floating-point. Formats that store them
    transposed or with a kernel bring them into this form first.

    Raises:
        ArtifactError: a half is missing, a dtype is none, or the two do not chain.
    """
    problems: list[str] = []
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, both in sides.items():
        lacking = [side for side in "AB" if side not in both]
        if lacking:
            problems.append(f"'{name}' has no {lacking[0]}; an update needs both factors.")
            continue
        a, b = both["A"], both["B"]
        wrong = [t.dtype for t in (a, b) if not t.is_floating_point()]
        if wrong:
            problems.append(f"'{name}' is {wrong[0]}, and floating-point numbers are needed.")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.numel() * b.numel() == 0:
            problems.append(
                f"'{name}' has A {tuple(a.shape)} and B {tuple(b.shape)}; A must be (r, in) and "
                "B (out, r)."
            )
        else:
            found[name] = (a, b)
    if not sides:
        problems.append("it holds no low-rank factors.")
    gather(ArtifactError, f"{where} cannot be used", problems)
    return found
