"""What the singular values of an update say of its rank, and which ranks are worth keeping."""

from rankwise.spectrum.allocation import Allocation, Budget, Energy, Layer, MaxError, Promise, Top
from rankwise.spectrum.difference import (
    Nearest,
    chance_held,
    frobenius,
    nearest,
    rounding_norm,
    subtract,
)
from rankwise.spectrum.subspaces import Directions, amplification, chance, directions, similarity
from rankwise.spectrum.values import Gap, Spectrum, share_problems, spectrum

__all__ = [
    "Allocation",
    "Budget",
    "Directions",
    "Energy",
    "Gap",
    "Layer",
    "MaxError",
    "Nearest",
    "Promise",
    "Spectrum",
    "Top",
    "amplification",
    "chance",
    "chance_held",
    "directions",
    "frobenius",
    "nearest",
    "rounding_norm",
    "share_problems",
    "similarity",
    "spectrum",
    "subtract",
]
