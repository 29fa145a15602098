"""What a forward pass costs with each kind of adapter, and that a merged one costs nothing."""

from rankwise.lab.latency.page import findings
from rankwise.lab.latency.records import Interval, LatencyRecord, Sameness, Sizes, Timing, Variant
from rankwise.lab.latency.running import RECORDS, REPORT, run_latency

__all__ = [
    "RECORDS",
    "REPORT",
    "Interval",
    "LatencyRecord",
    "Sameness",
    "Sizes",
    "Timing",
    "Variant",
    "findings",
    "run_latency",
]
