"""Which rank a task needs: a probe of a generous rank, and what of it can be left out."""

from rankwise.lab.advising.options import Advise, without_rank
from rankwise.lab.advising.page import RECORDS, REPORT, summary
from rankwise.lab.advising.records import Advice, Step, Trial
from rankwise.lab.advising.running import CONFIG, TRIMMED, advise

__all__ = [
    "CONFIG",
    "RECORDS",
    "REPORT",
    "TRIMMED",
    "Advice",
    "Advise",
    "Step",
    "Trial",
    "advise",
    "summary",
    "without_rank",
]
