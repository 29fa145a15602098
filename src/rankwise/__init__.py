"""Rankwise: low-rank updates for pre-trained PyTorch models, with the evidence for their rank."""

from rankwise.attach import Attachment, attach, attachment, base, detach
from rankwise.errors import ArtifactError, EnvironmentFault, RankwiseError, UserError
from rankwise.inits import Gaussian, Kaiming
from rankwise.lowrank import Factors
from rankwise.methods.adapter import Adapter, adapter_of
from rankwise.methods.full import Full
from rankwise.methods.head import HeadOnly
from rankwise.methods.lora import LoRA

__version__ = "0.1.0"
