"""Merging an adapter into its base, with a certificate, and what its updates do."""

from rankwise.merge.certificate import Certificate, OutputCheck
from rankwise.merge.effect import EffectError, Probe, check_effect, effects
from rankwise.merge.fold import MergeError, merge, merged, unmerge
from rankwise.merge.rounding import LayerCheck

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
