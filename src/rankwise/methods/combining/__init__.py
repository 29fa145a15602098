"""Several adapters as one: sums, exact or of lower rank, and TIES, DARE and pruning."""

from rankwise.methods.combining.adapters import Combined, combine
from rankwise.methods.combining.sparse import DARE, TIES, Magnitude, Majority
from rankwise.methods.combining.sums import SVD, Combination, Concatenate, Distance, Joined

__all__ = [
    "DARE",
    "SVD",
    "TIES",
    "Combination",
    "Combined",
    "Concatenate",
    "Distance",
    "Joined",
    "Magnitude",
    "Majority",
    "combine",
]
