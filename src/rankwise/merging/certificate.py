"""The certificate of a merge: errors beside effects and rounding bounds, and whether it passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from rankwise.attaching import adapted_sites, attachments, base
from rankwise.merging.effect import (
    Probe,
    at_rest,
    difference,
    evaluating,
    instead,
    outputs,
    recorded_inputs,
)
from rankwise.merging.rounding import LayerCheck, check_layer, check_name, roundoff

__all__ = ["Certificate", "LayerCheck", "OutputCheck", "certify"]

KEPT = 0.1  # of the adapter's effect at the outputs, the part that merging may change
LOST = 0.5  # of the update itself, the part that rounding may take when there is no probe
MULTIPLE = 256  # of the unit roundoff, for what float32 loses on its way through a deep model
OUTPUTS = "outputs"


@dataclass(frozen=True)
class OutputCheck:
    """The outputs of the whole model on the probe, merged against unmerged.

    Attributes:
        error: max |merged - unmerged|.
        effect: max |unmerged - base|, the adapter's own effect; a trained head is in both.
        tolerance: max(0.1 · effect, 256 u max |unmerged|), with u the unit roundoff of float32
            (of float64 for float64 outputs).

    No rigorous bound is known through a whole network; the question is whether the merged model
    still does what the adapter does. In bfloat16 and float16 rounding may swallow a small update
    whole. Then error = effect, and as the tolerance knows nothing of the short dtype, that fails.
    """

    error: float
    effect: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What was measured of a merge, and on what.

    Attributes:
        dtype: of the merged weights, such as "float32".
        layers: one check for each adapted layer, in the model's order.
        outputs: the check of the whole model, None without a probe.
        nonfinite: names of merged or trained modules that hold a NaN or an infinity, and
            "outputs" when the merged outputs hold one that the base's outputs have not.
        untied: names of modules that shared a weight or a bias in the base and no longer do.
        probe: what the model was run on, in words.
        base: sha256 of the base's weight file, None until :meth:`with_files`.
        adapter: sha256 of the adapter's.
        merged: sha256 of the merged model's.
    """

    dtype: str
    layers: tuple[LayerCheck, ...]
    outputs: OutputCheck | None
    nonfinite: tuple[str, ...]
    untied: tuple[str, ...]
    probe: str
    base: str | None = None
    adapter: str | None = None
    merged: str | None = None

    @property
    def finite(self) -> bool:
        return not self.nonfinite

    @property
    def passed(self) -> bool:
        return not self.problems()

    @property
    def lost(self) -> float:
        """‖W' - (W0 + δ)‖ / ‖δ‖ over all layers together; 0 when nothing was added."""
        added = sum(layer.update**2 for layer in self.layers)
        missing = sum((layer.lost * layer.update) ** 2 for layer in self.layers)
        return (missing / added) ** 0.5 if added > 0 else 0.0

    def problems(self) -> tuple[str, ...]:
        """Why the merge does not pass, one clause each; empty when it does."""
        layers = {layer.name for layer in self.layers}
        found = [p for layer in self.layers if (p := layer.problem())]
        found.extend(f"not finite: {name}" for name in self.nonfinite if name not in layers)
        if self.outputs is not None and not self.outputs.passed and OUTPUTS not in self.nonfinite:
            found.append(
                f"the outputs move by {self.outputs.error:.3g} (at most "
                f"{self.outputs.tolerance:.3g} allowed) where the adapter's whole effect is "
                f"{self.outputs.effect:.3g}: {self._remedy()}"
            )
        if self.outputs is None and self.lost > LOST:
            found.append(
                f"rounding to {self.dtype} takes {self.lost:.0%} of the update: {self._remedy()}"
            )
        return tuple(found)

    def _remedy(self) -> str:
        if "float16" in self.dtype:
            return f"merge in float32 (model.float()) or keep the adapter unmerged in {self.dtype}"
        return (
            "as each layer by itself agrees, look for a module that holds a copy of a weight or "
            "tells plain layers from adapted ones, or keep the adapter unmerged"
        )

    def line(self) -> str:
        """The certificate in one line."""
        problems = self.problems()
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            return f"merge certificate FAILED: {'; '.join(problems[:3])}{more}"
        parts = [f"{len(self.layers)} layer(s) in {self.dtype}, all finite"]
        if self.layers:
            worst = max(self.layers, key=lambda layer: layer.ratio)
            parts.append(
                f"largest error against its bound at {worst.name}: {worst.error:.3g} "
                f"(bound {worst.bound:.3g}, effect {worst.effect:.3g})"
            )
            large = sum(layer.rows < layer.of for layer in self.layers)
            if large:
                parts.append(
                    f"{large} large weight(s) checked in some rows, and in sums throughout"
                )
        else:
            parts.append("nothing to add, as this method has no low-rank update")
        if self.outputs is None:
            parts.append("outputs not compared, as no probe was given")
        else:
            o = self.outputs
            parts.append(
                f"outputs: error {o.error:.3g}, effect {o.effect:.3g}, tolerance {o.tolerance:.3g}"
            )
        return f"merge certificate passed: {'; '.join(parts)}"

    def with_files(
        self, *, base: str | None = None, adapter: str | None = None, merged: str | None = None
    ) -> Certificate:
        """The same certificate with the sha256 of files; None leaves what is there."""
        return replace(
            self,
            base=base or self.base,
            adapter=adapter or self.adapter,
            merged=merged or self.merged,
        )

    def with_sums(self, sums: Mapping[str, float]) -> Certificate:
        """The same certificate with the sums of large weights that were written since."""
        layers = (replace(x, sums=sums.get(x.name, x.sums)) for x in self.layers)
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, object]:
        """The certificate as JSON has it; a number that is not finite becomes None."""
        o = self.outputs
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "layers": [_json(layer) for layer in self.layers],
            "outputs": None if o is None else _json(o),
            "finite": self.finite,
            "nonfinite": list(self.nonfinite),
            "untied": list(self.untied),
            "sha256": {"base": self.base, "adapter": self.adapter, "merged": self.merged},
            "probe": self.probe,
            "problems": list(self.problems()),
        }


def certify(
    model: nn.Module,
    twins: Mapping[str, nn.Module],
    probe: Probe | None,
    untied: tuple[str, ...],
    sums: Mapping[str, float],
) -> Certificate:
    """Measure what a model becomes with ``twins`` in the places of its adapted layers.

    ``sums`` are those of the large weights that were summed up as they were written, by the name
    of their check.

    Runs the model on the probe three times (unmerged, base, merged), and each layer by itself on
    the inputs that it got in the unmerged run. Evaluation mode, no autocast, no gradients; the
    model is left as it was, with its adapted layers in place.
    """
    adapted = adapted_sites(model)
    places = [(site, twins[site.name]) for site, _ in adapted]
    inputs: dict[str, Tensor] = {}
    check, bad = None, list[str]()
    with at_rest(model), evaluating(*twins.values()):  # twins are not in the model
        if probe is not None:
            with recorded_inputs(adapted) as inputs:
                unmerged = outputs(model, probe)
            with base(model):
                plain = outputs(model, probe)
            with instead(places):
                merged = outputs(model, probe)
            check = _check_outputs(unmerged, plain, merged)
            bad = [OUTPUTS] if _newly_nonfinite(merged, plain) else []
        layers = tuple(
            check_layer(
                site.name,
                layer,
                parameter,
                twins[site.name],
                inputs.get(site.name),
                sums.get(check_name(site.name, parameter)),
            )
            for site, layer in adapted
            for parameter in layer.adapted()
        )
    return Certificate(
        dtype=_dtypes(model, [m.base_weight(p) for _, m in adapted for p in m.adapted()]),
        layers=layers,
        outputs=check,
        nonfinite=(*_nonfinite_copies(model), *(x.name for x in layers if not x.finite), *bad),
        untied=untied,
        probe=_described(probe),
    )


def _check_outputs(
    unmerged: tuple[Tensor, ...], plain: tuple[Tensor, ...], merged: tuple[Tensor, ...]
) -> OutputCheck:
    effect = difference(unmerged, plain)
    unit = max(roundoff(torch.promote_types(t.dtype, torch.float32)) for t in unmerged)
    sizes = [t[t.isfinite()].abs() for t in unmerged]
    largest = max((float(size.max()) for size in sizes if size.numel()), default=0.0)
    tolerance = max(KEPT * effect, MULTIPLE * unit * largest)
    return OutputCheck(difference(merged, unmerged), effect, tolerance)


def _newly_nonfinite(merged: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> bool:
    """Whether merged outputs hold a NaN, or an infinity where the base's outputs hold no equal."""
    return any(
        bool((~m.isfinite()).any() if m.shape != p.shape else (~m.isfinite() & (m != p)).any())
        for m, p in zip(merged, plain, strict=False)
    )


def _nonfinite_copies(model: nn.Module) -> list[str]:
    return [
        name
        for record in attachments(model).values()
        for name, module in record.copies.items()
        if record.active and not all(bool(p.isfinite().all()) for p in module.parameters())
    ]


def _dtypes(model: nn.Module, weights: Sequence[Tensor]) -> str:
    """The dtypes of the merged weights; of the model's parameters when nothing is merged."""
    tensors = weights or [p for p in model.parameters() if p.is_floating_point()]
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _described(probe: Probe | None) -> str:
    if probe is None:
        return "random inputs with a fixed seed, one layer at a time"
    if isinstance(probe, Mapping):
        return ", ".join(f"{name} {_shape(value)}" for name, value in probe.items())
    values = [probe] if isinstance(probe, Tensor) else probe
    return ", ".join(_shape(value) for value in values)


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _json(check: LayerCheck | OutputCheck) -> dict[str, object]:
    """Every number of a check and whether it passed; what is not finite becomes None."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(check).items()
    }
    return {**numbers, "passed": check.passed}
