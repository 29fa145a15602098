"""Rankwise against PEFT and against the floor: `python -m benchmarks.speed` prints the table."""
