"""Merging an adapter into its base, with a certificate, and what its updates do."""

from rankwise.merging.certificate import Certificate, OutputCheck
from rankwise.merging.effect import EffectError, Probe, check_effect, effects
from rankwise.merging.fold import MergeError, merge, merged, unmerge
from rankwise.merging.rounding import LayerCheck

__all__ = [
    "Certificate",
    "EffectError",
    "LayerCheck",
    "MergeError",
    "OutputCheck",
    "Probe",
    "check_effect",
    "effects",
    "merge",
    "merged",
    "unmerge",
]
