"""run_latency: the models, the counts, the times, and the folder with records and page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.lab.latency.counting import count_pass, sameness
from rankwise.lab.latency.page import make_page, pictures
from rankwise.lab.latency.records import (
    FORMAT,
    MERGED,
    PLAIN,
    LatencyRecord,
    Sizes,
    Timing,
    Variant,
)
from rankwise.lab.latency.timing import time_passes
from rankwise.lab.latency.variants import Models, make_models
from rankwise.lab.page import can_make_pages
from rankwise.train.config import FitConfig
from rankwise.train.manifest import surroundings
from rankwise.train.model import longest
from rankwise.train.precision import choose_device, choose_dtype
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.skeleton import make_skeleton

__all__ = ["RECORDS", "REPORT", "run_latency"]

RECORDS, REPORT, NUMBERS = "records.json", "report.html", "numbers"
KIND = "rankwise latency"
_OPTIONS = ("r", "alpha", "target_modules", "adapter_size", "prefix_length", "dtype", "device")


def run_latency(
    config: FitConfig,
    sizes: Sizes | None = None,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> LatencyRecord:
    """Time forward passes of a model plain, merged, and with each kind of adapter.

    The model is made from its config with random weights, on which the time does not depend. The
    passes are those of inference: evaluation mode, no gradients, no padding.

    Args:
        config: the model and the options of the methods.
        sizes: batches, lengths and rounds.
        out: folder for records.json, report.html and the figures' numbers; it appears whole when
            all is measured. Nothing is written when None.
        reporter: told what happens.

    Raises:
        UserError: the model or LoRA's targets cannot be had, a length is more than the model
            takes, or ``out`` holds something else.
        ArtifactError: the config is damaged.
        EnvironmentFault: a package or the device is missing, or the folder cannot be written.
    """
    sizes, watcher = sizes or Sizes(), reporter or Silent()
    if out is not None:
        can_make_pages()
    folder = None if out is None else _usable(Path(out))
    device = choose_device(config.device)
    torch.manual_seed(sizes.seed)
    plain: Any
    plain, task = make_skeleton(config.model, config.task, 2, config.revision, device="cpu")
    _refuse_lengths(plain, sizes)
    plain.config.pad_token_id = 0
    width = int(getattr(plain.config, "hidden_size", 512))
    choice = choose_dtype(config.dtype, device, width, frozen=True)
    plain.to(device, choice.dtype).requires_grad_(False)
    inputs = [
        _inputs(plain, batch, length, device) for batch in sizes.batches for length in sizes.lengths
    ]
    made = make_models(plain, config, inputs[0])
    for note in made.notes:
        watcher.note(note)
    record = dataclasses.replace(
        _counted(made, inputs[0], config, task, sizes),
        **surroundings(device, choice.name, choice.reason),
    )
    record = dataclasses.replace(record, timings=_timed(made, inputs, sizes, watcher))
    if folder is not None:
        _write(folder, record)
    return record


def _usable(folder: Path) -> Path:
    """The folder, where it is new or empty or holds what this command wrote and nothing else.

    Raises:
        UserError: it holds something else, which would be lost.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder.")
    if not folder.is_dir():
        return folder
    files.refuse_working_folder(folder)
    kind, others = None, {entry.name for entry in folder.iterdir()} - {RECORDS, REPORT, NUMBERS}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        kind = json.loads((folder / RECORDS).read_text(encoding="utf-8")).get("kind")
    if others or (kind != KIND and any(folder.iterdir())):
        raise UserError(
            f"'{folder}' is not empty, and holds more than what {KIND} wrote. Name another --out."
        )
    return folder


def _refuse_lengths(model: nn.Module, sizes: Sizes) -> None:
    most = longest(model)
    if most is not None and max(sizes.lengths) > most:
        raise UserError(
            f"--lengths asks for {max(sizes.lengths)} tokens, and the model takes {most} at most."
        )


def _inputs(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, none of them padding."""
    words = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(1, words, (batch, length)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _counted(
    made: Models, inputs: dict[str, Tensor], config: FitConfig, task: str, sizes: Sizes
) -> LatencyRecord:
    counts = {name: count_pass(model, inputs) for name, model in made.by_name.items()}
    variants = tuple(
        Variant(name, made.added[name], sum(found.operators.values()), found.flops)
        for name, found in counts.items()
    )
    plain, merged = made.by_name[PLAIN], made.by_name[MERGED]
    same = sameness(plain, merged, (counts[PLAIN], counts[MERGED]), made.certificate)
    options = config.model_dump(mode="json", include=set(_OPTIONS))
    return LatencyRecord(config.model, task, sizes, options, variants, same, (), made.notes)


def _timed(
    made: Models, inputs: list[dict[str, Tensor]], sizes: Sizes, watcher: Reporter
) -> tuple[Timing, ...]:
    """The times at every size; a smaller pass counts as less work in the progress."""
    work = [tensors["input_ids"].numel() for tensors in inputs]
    each = sizes.rounds * len(made.by_name)
    done = 0
    found: list[Timing] = []
    watcher.start("passes", sum(work) * each)
    try:
        for part, tensors in zip(work, inputs, strict=True):

            def advance(part: int = part) -> None:
                nonlocal done
                done += part
                watcher.advance(done, {})

            found += time_passes(made.by_name, tensors, sizes.rounds, sizes.seed, advance)
    finally:
        watcher.finish()
    return tuple(found)


def _write(folder: Path, record: LatencyRecord) -> None:
    """The folder, whole or not at all."""
    figures = pictures(record)
    page = make_page(record, figures)
    with files.folder(folder) as temporary:
        tree = {"format": FORMAT, "kind": KIND, **dataclasses.asdict(record)}
        files.write_json(temporary / RECORDS, tree)
        files.write_bytes(temporary / REPORT, page)
        for figure in figures:
            files.write_text(temporary / NUMBERS / f"{figure.name}.csv", figure.csv())
