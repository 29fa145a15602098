"""Every method on one task: a grid of runs, the search for their learning rates, and the report."""
