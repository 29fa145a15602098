"""What the dropout of the frozen base gives and costs while an adapter trains.

    python -m benchmarks.base_dropout [--sst2 FOLDER] [--seeds 5] [--rows 1000] [--epochs 3]

`rankwise fit` on MiniLM with its defaults but for `--head-lr 0.03`, with `--base-dropout` and with
`--no-base-dropout`, over seeds: the demo's data, and SST-2 where the folder with GLUE's train.tsv
and dev.tsv is given. The two ways take turns under each seed. A difference is of pairs of one seed,
with its standard error over the seeds, after the last step. What a step costs is in `python -m
benchmarks.speed --only steps`. Prints the table as Markdown and keeps it in benchmarks/records/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from rankwise.data.examples import ColumnNames, load_examples
from rankwise.data.pydocs import docstrings
from rankwise.lab.demo import model_folder
from rankwise.train.config import make_config
from rankwise.train.manifest import surroundings
from rankwise.train.run import fit
from rankwise.train.setup import Data

__all__ = ["compared", "once"]

RECORDS = Path(__file__).parent / "records"
WAYS = {"with": True, "without": False}
HELD = 480


def once(data: Data, seed: int, epochs: int, base_dropout: bool) -> dict[str, float]:
    """Accuracy and loss on the held-out rows, and the seconds of training."""
    with tempfile.TemporaryDirectory() as out:
        values = {"model": str(model_folder()), "data": "memory", "out": f"{out}/run"}
        values |= {"metric": "accuracy", "head_lr": 0.03, "seed": seed, "epochs": epochs}
        config = make_config({**values, "base_dropout": base_dropout}, "benchmark")
        fit(config, data=data)
        log = (Path(out) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    last = [row for row in rows if row["event"] == "eval"][-1]
    seconds = max(row["seconds"] for row in rows if "seconds" in row)
    return {"accuracy": last["accuracy"], "loss": last["loss"], "seconds": seconds}


def compared(name: str, data: Data, seeds: int, epochs: int) -> dict[str, Any]:
    """A row of the table: both ways under every seed."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        turn = list(WAYS) if seed % 2 == 0 else list(reversed(WAYS))
        for way in turn:
            found[way].append(once(data, seed, epochs, WAYS[way]))
            print(f"  {name}, seed {seed}, {way}: {found[way][-1]}", flush=True)
    return {"data": name, "seeds": seeds, "epochs": epochs, **found}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| data | measure | with | without | without − with ± SE |"
    yield "|---|---|--:|--:|--:|"
    for row in rows:
        pairs = list(zip(row["with"], row["without"], strict=True))
        for measure in ("accuracy", "loss"):
            apart = [b[measure] - a[measure] for a, b in pairs]
            spread = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
            means = [statistics.mean(r[measure] for r in row[way]) for way in WAYS]
            shown = " | ".join(f"{mean:.4g}" for mean in means)
            change = f"{statistics.mean(apart):+.3g} ± {spread:.2g}"
            yield f"| {row['data']} | {measure} | {shown} | {change} |"


def main() -> None:
    """Run the comparisons and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sst2", type=Path, help="folder with GLUE's train.tsv and dev.tsv")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="training rows of each data set")
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    about = surroundings(torch.device("cpu"), "auto", "what fit chose on this machine")
    print(f"{about['hardware']['cpu']}, {about['hardware']['threads']} threads")
    train, held = docstrings(0, asked.rows, HELD)
    sets = {f"docstrings, {asked.rows:,} rows": Data(train, held)}
    if asked.sst2 is not None:
        files = (asked.sst2 / "train.tsv", asked.rows), (asked.sst2 / "dev.tsv", None)
        train, held = (
            load_examples(str(path), "classification", ColumnNames(), limit=n) for path, n in files
        )
        sets[f"SST-2, {asked.rows:,} rows"] = Data(train, held)
    rows = [compared(name, data, asked.seeds, asked.epochs) for name, data in sets.items()]
    print("\n".join(lines(rows)))
    made = json.dumps({**about, "rows": rows}, indent=1)
    path = RECORDS / f"base-dropout-{asked.epochs}-epochs.json"
    path.write_text(made + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
