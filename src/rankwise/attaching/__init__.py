"""attach and detach on any nn.Module: what is put in, what trains, what acts, and the way back."""

from rankwise.attaching.collector import uncollected
from rankwise.attaching.lending import Lent
from rankwise.attaching.plans import Addition, Method, Placement, Plan
from rankwise.attaching.records import (
    Attachment,
    adapted_sites,
    attached,
    attachment,
    attachments,
    forget,
    kept_layers,
    lora_layers,
    low_rank_updates,
    note_kept,
    note_method,
    trained_copies,
    unmerged,
    unrouted,
    updates_of,
)
from rankwise.attaching.routing import using_rows
from rankwise.attaching.switching import base, set_active, set_trainable, using
from rankwise.attaching.verbs import attach, detach, rehearse

__all__ = [
    "Addition",
    "Attachment",
    "Lent",
    "Method",
    "Placement",
    "Plan",
    "adapted_sites",
    "attach",
    "attached",
    "attachment",
    "attachments",
    "base",
    "detach",
    "forget",
    "kept_layers",
    "lora_layers",
    "low_rank_updates",
    "note_kept",
    "note_method",
    "rehearse",
    "set_active",
    "set_trainable",
    "trained_copies",
    "uncollected",
    "unmerged",
    "unrouted",
    "updates_of",
    "using",
    "using_rows",
]
