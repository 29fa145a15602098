"""Measure and print the table: `python -m benchmarks.speed [--rounds 15] [--only steps,verbs]`."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed import fits, loss, memory, products, steps, verbs
from transformers import logging

from rankwise.train.manifest import surroundings

RECORDS = Path(__file__).parent.parent / "records" / torch.backends.cpu.get_cpu_capability().lower()
PARTS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "steps": steps.rows,
    "memory": memory.rows,
    "verbs": verbs.rows,
    "forward": verbs.forward_rows,
    "loss": loss.rows,
    "products": products.rows,
}


def main() -> None:
    """Run the parts, print each row as it is there, and keep them as records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each comparison")
    parser.add_argument("--only", help="parts, by default all: " + ", ".join([*PARTS, "fits"]))
    parser.add_argument("--sst2", type=Path, help="folder with GLUE's train.tsv and dev.tsv")
    given = parser.parse_args()
    parts = {**PARTS, "fits": lambda _rounds: fits.rows(given.sst2)}
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    about = surroundings(torch.device("cpu"), "float32", "see the rows")
    print(
        f"{about['hardware']['cpu']}, {about['hardware']['threads']} threads; {about['versions']}"
    )
    print(f"| {'measure':58} | {'on':30} | ratio (95 %) | more |\n|---|---|---|---|")
    for name in given.only.split(",") if given.only else parts:
        found: list[dict[str, Any]] = []
        for row in parts[name](given.rounds):
            found.append(row)
            print(line(row), flush=True)
        RECORDS.mkdir(parents=True, exist_ok=True)
        made = json.dumps({**about, "rounds": given.rounds, "rows": found}, indent=1)
        (RECORDS / f"speed-{name}.json").write_text(made + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """One row of the table in Markdown."""
    value, low, high = row["ratio"]
    shown = f"{value:.2f}" if low == high else f"{value:.2f} ({low:.2f}-{high:.2f})"
    rest = {k: v for k, v in row.items() if k not in ("measure", "on", "ratio")}
    more = "; ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in rest.items())
    return f"| {row['measure']:58} | {row['on']:30} | {shown} | {more} |"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return f"{value[0]:.3g} ({value[1]:.3g}-{value[2]:.3g})"
    return (
        f"{value:,.3g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )


if __name__ == "__main__":
    main()
