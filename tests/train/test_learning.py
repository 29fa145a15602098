import math
from pathlib import Path

import numpy as np
import pytest

from rankwise.train.config import make_config
from rankwise.train.predict import examples_of_file, predict
from rankwise.train.restore import restore
from rankwise.train.run import fit

DEV_ROWS = 256


@pytest.mark.slow
def test_lora_beats_the_head_alone_on_real_text(shared: Path, minilm: Path, tmp_path: Path) -> None:
    """SST-2: the same rows, epochs and seed, and the same dev rows judged by McNemar's test.

    Of the dev rows that one alone of the two gets right, chance would give each the half; with b
    and c of them, (b - c) / sqrt(b + c) is a standard normal number.
    """
    sst2 = shared / "data" / "sst2"
    dev = (sst2 / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "dev.tsv").write_text("".join(dev[: DEV_ROWS + 1]), encoding="utf-8")
    right: dict[str, np.ndarray] = {}
    for method in ("head", "lora"):
        values = {
            "model": str(minilm),
            "data": str(sst2 / "train.tsv"),
            "eval": str(tmp_path / "dev.tsv"),
            "out": str(tmp_path / method),
            "dtype": "float32",
            "device": "cpu",
            "method": method,
            "r": 8,
            "target_modules": "query,value",
            "limit": 300,
            "epochs": 2,
            "batch_size": 8,
            "max_length": 32,
            **({} if method == "head" else {"head_lr": 0.005}),  # the rate of head-only's
            "eval_every": 10_000,  # at the end alone
        }
        loaded = restore(fit(make_config(values, "test")).folder)
        examples = examples_of_file(loaded, values["eval"])
        made = predict(loaded, examples, device="cpu")
        found = [loaded.manifest["label_names"].index(row["label"]) for row in made.rows]
        right[method] = np.array(found) == np.array(examples.labels)
        assert made.metrics is not None
        assert made.metrics["accuracy"] == pytest.approx(loaded.manifest["metrics"]["accuracy"])
    b = int((right["lora"] & ~right["head"]).sum())
    c = int((right["head"] & ~right["lora"]).sum())
    assert len(right["lora"]) == DEV_ROWS
    assert (b - c) / math.sqrt(b + c) > 3, (right["head"].mean(), right["lora"].mean(), b, c)
