"""The linear case, where what rank and scaling do can be computed and set beside what trains."""

from rankwise.lab.theory.page import summary
from rankwise.lab.theory.records import Bound, Cell, Inputs, Samples, Theory, TheoryRecord
from rankwise.lab.theory.running import REPORT, run_theory

__all__ = [
    "REPORT",
    "Bound",
    "Cell",
    "Inputs",
    "Samples",
    "Theory",
    "TheoryRecord",
    "run_theory",
    "summary",
]
