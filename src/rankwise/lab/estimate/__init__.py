"""What training needs in memory, told before it starts by rehearsing it on tensors without data."""

from rankwise.lab.estimate.estimating import KEPT, MOST_ROWS, Budget, Estimate, estimate
from rankwise.lab.estimate.live import Part
from rankwise.lab.estimate.rehearsal import Rehearsal

__all__ = ["KEPT", "MOST_ROWS", "Budget", "Estimate", "Part", "Rehearsal", "estimate"]
