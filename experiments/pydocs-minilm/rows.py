"""Write the demo's rows, cut from this Python's own standard library, to runs/pydocs-minilm/."""

from pathlib import Path

from rankwise.data.pydocs import docstrings
from rankwise.lab.demo import Demo, write_rows

demo = Demo()
rows = docstrings(demo.seed, demo.train_rows, demo.heldout_rows)
write_rows(Path("runs/pydocs-minilm"), *rows)
