"""Which weights are adapted: names, patterns, "all-linear", layer ranges, and the head."""

from rankwise.targets.heads import Head, find_head, is_transformers
from rankwise.targets.patterns import PATTERN_SECONDS, first_match, layer_index, matches
from rankwise.targets.places import Site, Target, shared_weights, sites, targets_of
from rankwise.targets.selecting import ALL_LINEAR, select

__all__ = [
    "ALL_LINEAR",
    "PATTERN_SECONDS",
    "Head",
    "Site",
    "Target",
    "find_head",
    "first_match",
    "is_transformers",
    "layer_index",
    "matches",
    "select",
    "shared_weights",
    "sites",
    "targets_of",
]
