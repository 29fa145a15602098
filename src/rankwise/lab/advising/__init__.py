"""Which rank a task needs: one probe of a generous rank, and what of it can be left out."""

from rankwise.lab.advising.options import Advise
from rankwise.lab.advising.page import RECORDS, REPORT, summary
from rankwise.lab.advising.records import Advice, Trial
from rankwise.lab.advising.running import CONFIG, TRIMMED, advise

__all__ = [
    "CONFIG",
    "RECORDS",
    "REPORT",
    "TRIMMED",
    "Advice",
    "Advise",
    "Trial",
    "advise",
    "summary",
]
