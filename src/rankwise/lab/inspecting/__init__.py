"""The evidence of a trained adapter: its singular values, what rank holds it, where it acts."""

from rankwise.lab.inspecting.measuring import inspect_adapter
from rankwise.lab.inspecting.page import RECORDS, REPORT, summary, write_inspection
from rankwise.lab.inspecting.records import Inspection, LayerEvidence

__all__ = [
    "RECORDS",
    "REPORT",
    "Inspection",
    "LayerEvidence",
    "inspect_adapter",
    "summary",
    "write_inspection",
]
