"""BitFit: every bias trains, and the head; nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rankwise.attaching import Plan
from rankwise.errors import UserError
from rankwise.methods.additions import add_bias, bias_sites
from rankwise.methods.head import HeadChoice, describe_copies, trained_whole, untied_notes
from rankwise.targets import Site, find_head

__all__ = ["BitFit"]


@dataclass(frozen=True)
class BitFit:
    """Train the biases alone: b = b0 + d for every bias outside the head, and the head itself.

    The biases of normalisations are among them. The d start at zero, so step 0 is the base bit for
    bit; the base's own biases are not written.

    Attributes:
        head: see :data:`rankwise.methods.head.HeadChoice`.
        modules_to_save: further modules that train whole and are saved.

    Source: Ben Zaken, Ravfogel and Goldberg 2021, arXiv 2106.10199, section 3.
    """

    head: HeadChoice = None
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    def plan(self, model: nn.Module) -> Plan:
        """A trained change of every bias, and a trained copy of the head.

        Raises:
            UserError: the model has no biases, or see :func:`rankwise.methods.head.trained_whole`.
        """
        copied = trained_whole(model, self.head, self.modules_to_save, type(self).__name__)
        found = list(_biases(model, [place.site.name for place in copied]))
        if not found:
            raise UserError(
                f"{type(model).__name__} has no biases outside its output layer, so BitFit has "
                "nothing to train; many decoders are built without them. Use LoRA."
            )
        notes = (describe_copies(copied), *untied_notes(model, copied)) if copied else ()
        return Plan(
            self,
            additions=tuple(add_bias(site, name, shape) for site, name, shape in found),
            placements=copied,
            notes=notes,
        )


def _biases(model: nn.Module, whole: Sequence[str]) -> Iterator[tuple[Site, str, tuple[int, ...]]]:
    """The biases outside the head; one that a frozen head holds as well is the head's."""
    head = find_head(model).names
    held = {id(p) for name in head for p in model.get_submodule(name).parameters()}
    for site, name, shape in bias_sites(model, (), "all", (*head, *whole)):
        if id(site.base.get_parameter(name)) not in held:
            yield site, name, shape
