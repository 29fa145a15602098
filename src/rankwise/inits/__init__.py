"""How A and B start, as values: drawn, taken from the weight, or from what the model does."""

from rankwise.inits.draws import Gaussian, Kaiming, Orthogonal
from rankwise.inits.eva import EVA
from rankwise.inits.loftq import LoftQ
from rankwise.inits.loraga import LoRAGA
from rankwise.inits.place import Fitted, Init, Place, Start
from rankwise.inits.principal import OLoRA, PiSSA

__all__ = [
    "EVA",
    "Fitted",
    "Gaussian",
    "Init",
    "Kaiming",
    "LoRAGA",
    "LoftQ",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Place",
    "Start",
]
