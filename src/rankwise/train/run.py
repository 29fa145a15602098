"""fit: from a config to a run folder that holds the adapter and all it takes to run it again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.attaching import Method, attach, attachment, lora_layers
from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import ColumnNames, Examples, load_examples
from rankwise.data.splits import leakage, require_same_form, split
from rankwise.errors import RankwiseError, UserError
from rankwise.inits import Gaussian, Kaiming
from rankwise.io.adapters import save_adapter
from rankwise.io.files import write_text
from rankwise.merging import check_effect
from rankwise.methods.full import Full
from rankwise.methods.head import HeadOnly, head_modules
from rankwise.methods.lora import LoRA
from rankwise.train import manifest as record
from rankwise.train.config import FitConfig, dump_config, make_config
from rankwise.train.evaluate import Rows
from rankwise.train.folder import claim, refuse_used
from rankwise.train.loop import Loop
from rankwise.train.metrics import main_metric
from rankwise.train.model import Base, fresh_modules, load_base, recompute_activations
from rankwise.train.precision import Choice, cast_frozen, choose_device, choose_dtype
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.signals import Interrupted

__all__ = ["Data", "FitResult", "fit", "load_data", "make_method", "seed_everything"]


@dataclass(frozen=True)
class Data:
    """Training and evaluation examples of one form."""

    train: Examples
    held: Examples
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        manifest: what its manifest.json says.
        model: the trained model with its adapter, as after the last step.
        tokenizer: its tokenizer.
    """

    folder: Path
    manifest: dict[str, Any]
    model: nn.Module
    tokenizer: Any


def fit(
    config: FitConfig,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    data: Data | None = None,
) -> FitResult:
    """Train as the config says and leave a run folder.

    The folder holds ``adapter/`` (the best by the metric), ``last/``, ``checkpoints/``,
    ``metrics.jsonl``, ``config.yaml`` and ``manifest.json``.

    Args:
        config: every option.
        resume: go on with the run in ``config.out`` from its newest valid checkpoint.
        reporter: told what happens.
        data: examples that are in memory already; read from the config's files when None.

    Raises:
        UserError, ArtifactError, EnvironmentFault: each says what is wrong and how to mend it.
        Interrupted: a signal asked to stop; the run can be resumed.
    """
    watcher = reporter or Silent()
    folder = Path(config.out)
    _begun(folder, resume)
    device = choose_device(config.device)
    seed_everything(config.seed)
    examples = data or load_data(config)
    for note in examples.notes:
        watcher.note(note)
    metric = main_metric(examples.train.task, config.metric)
    base = load_base(
        config.model,
        examples.train.task,
        examples.train.label_names,
        revision=config.revision,
    )
    existed = folder.exists()
    with claim(folder):
        try:
            # again, as another run may have been here while this one was reading its data
            before = _begun(folder, resume)
            return _fit(config, folder, before, examples, metric, base, device, watcher)
        except BaseException:
            if not existed and not (folder / record.NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _begun(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of the run to go on with; None for a new run, whose folder must be unused."""
    if not resume:
        refuse_used(folder)
        return None
    manifest = record.read_manifest(folder)
    if manifest["status"] == "finished":
        raise UserError(f"The run in '{folder}' is finished; there is nothing to resume.")
    return manifest


def _fit(
    config: FitConfig,
    folder: Path,
    before: dict[str, Any] | None,
    data: Data,
    metric: str,
    base: Base,
    device: torch.device,
    watcher: Reporter,
) -> FitResult:
    model, train_rows, held_rows, choice = _prepare(config, data, base, device, before, watcher)
    manifest = _manifest(config, data, base, model, metric, device, choice)
    if before is not None:
        _refuse_changes(before, manifest)
    record.write(folder, manifest)
    write_text(folder / "config.yaml", dump_config(config))
    adapter = folder / "adapter"
    loop = Loop(
        model,
        train_rows,
        held_rows,
        config,
        metric,
        folder,
        lambda: _save(model, adapter, config),
        watcher,
    )
    if before is not None:
        loop.resume()
    try:
        progress = loop.run()
    except (Interrupted, KeyboardInterrupt):
        record.write(folder, manifest | {"status": "interrupted"})
        raise
    except RankwiseError:
        record.write(folder, manifest | {"status": "failed"})
        raise
    _save(model, folder / "last", config)
    manifest |= {
        "status": "finished",
        "metrics": dict(progress.best_metrics),
        "best_step": progress.best_step,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "micro_batch": progress.micro_batch,
        "seconds": {"train": progress.seconds, "eval": loop.eval_seconds},
        "artifact_bytes": sum(f.stat().st_size for f in adapter.rglob("*") if f.is_file()),
    }
    record.write(folder, manifest)
    _refuse_idle(loop, model, held_rows)
    return FitResult(folder, manifest, model, base.tokenizer)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_data(config: FitConfig) -> Data:
    """Read and check the examples a config names; hold some out when there is no --eval."""
    columns = ColumnNames(
        text=config.text_column,
        pair=config.pair_column,
        label=config.label_column,
        prompt=config.prompt_column,
        completion=config.completion_column,
        messages=config.messages_column,
    )
    train = load_examples(config.data, config.task, columns, limit=config.limit)
    notes = list(train.notes)
    if config.eval is None:
        train, held = split(train, config.eval_fraction, config.seed)
        notes.append(
            f"No --eval was given: {len(held):,} of the {len(train) + len(held):,} rows are held "
            "out for evaluation."
        )
    else:
        held = load_examples(
            config.eval,
            train.task,
            columns,
            label_names=train.label_names or None,
            fallback=True,
        )
        notes.extend(held.notes)
        require_same_form(train, held)
        shared = leakage(train, held)
        if shared.count:
            notes.append(shared.note)
    return Data(train, held, tuple(notes))


def make_method(config: FitConfig, base: Base) -> Method:
    """The method a config names; modules that the checkpoint left random train with it."""
    if config.method == "full":
        return Full()
    head = head_modules(base.model)
    fresh = fresh_modules(base.fresh, head)
    whole = tuple(dict.fromkeys([*config.modules_to_save, *fresh]))
    if config.method == "head":
        return HeadOnly(whole)
    missing = [n for n in base.fresh if n.startswith(tuple(f"{h}." for h in head))]
    if config.head == "freeze" and missing:
        raise UserError(
            f"--head freeze would keep the output layer at random values, as {_listed(missing)} "
            f"are not in the checkpoint '{base.source}', and they would be saved nowhere. Use "
            "--head train."
        )
    return LoRA(
        r=config.r,
        alpha=config.alpha,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers=config.layers,
        rank_stabilized=config.rank_stabilized,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        dropout=config.dropout,
        init={"kaiming": Kaiming(), "gaussian": Gaussian()}[config.init],
        head="train" if missing else None if config.head == "auto" else config.head,
        modules_to_save=whole,
    )


def _prepare(
    config: FitConfig,
    data: Data,
    base: Base,
    device: torch.device,
    before: dict[str, Any] | None,
    watcher: Reporter,
) -> tuple[nn.Module, Rows, Rows, Choice]:
    """The model with its method, on its device in its number format, and the encoded rows."""
    length = min(config.max_length, base.longest or config.max_length)
    pad = padding_id(base.tokenizer)
    rows: list[Rows] = []
    for name, examples in (("training", data.train), ("evaluation", data.held)):
        encoded = encode(examples, base.tokenizer, length)
        for note in encoded.notes:
            watcher.note(f"{name}: {note}")
        rows.append(Rows(encoded, examples.task, pad, device))
    model: Any = base.model
    done = attach(model, make_method(config, base))
    for note in done.notes:
        watcher.note(note)
    if config.gradient_checkpointing:
        recompute_activations(model)
    frozen = config.method != "full"
    if before is not None:
        hardware = before["hardware"]
        choice = Choice(getattr(torch, hardware["dtype"]), hardware["dtype_reason"])
    else:
        width = int(getattr(base.model.config, "hidden_size", 512))
        choice = choose_dtype(config.dtype, device, width, frozen)
    if choice.dtype != torch.float32:
        if not frozen:
            raise UserError(
                "--dtype bfloat16 is for a frozen base; full fine-tuning trains the base itself "
                "and keeps it in float32. Use --dtype float32 or auto."
            )
        cast_frozen(model, choice.dtype)
    watcher.note(f"Base in {choice.name} on {device.type} ({choice.reason}).")
    return model.to(device), rows[0], rows[1], choice


def _manifest(
    config: FitConfig,
    data: Data,
    base: Base,
    model: nn.Module,
    metric: str,
    device: torch.device,
    choice: Choice,
) -> dict[str, Any]:
    name, options = record.method_record(config)
    done = attachment(model)
    return {
        "format": 1,
        "name": name,
        "status": "running",
        "method": options | {"adapted": list(done.adapted), "trained": list(done.originals)},
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "task": data.train.task,
        "form": data.train.form,
        "label_names": list(data.train.label_names),
        "metric": metric,
        "metrics": {},
        "counts": record.counts(model),
        "seconds": {"train": 0.0, "eval": 0.0},
        "artifact_bytes": 0,
        "data": {
            "train": record.describe_data(data.train),
            "eval": record.describe_data(data.held),
        },
        "base": {"source": base.source, "fingerprint": base.fingerprint},
        "notes": [*data.notes, *done.notes],
        **record.surroundings(device, choice.name, choice.reason),
    }


def _refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on only with the same options, data and base."""
    changes: list[str] = []
    for key, value in now["config"].items():
        old = before["config"].get(key)
        if old != value and key != "out":
            changes.append(f"--{key.replace('_', '-')} was {old!r} and is now {value!r}")
    for what in ("train", "eval"):
        if before["data"][what]["fingerprint"] != now["data"][what]["fingerprint"]:
            changes.append(f"the {what} data is not what it was ({now['data'][what]['source']})")
    if before["base"]["fingerprint"] != now["base"]["fingerprint"]:
        changes.append(f"the weights of the base are not what they were ({now['base']['source']})")
    if changes:
        raise UserError(
            "The run cannot go on, because it would not be the same run: "
            + "; ".join(changes)
            + ". Put back what changed, or start a new run with another --out."
        )


def _save(model: nn.Module, folder: Path, config: FitConfig) -> None:
    save_adapter(model, folder, base_model_name=config.model)


def _refuse_idle(loop: Loop, model: nn.Module, held: Rows) -> None:
    """After training: whatever got no gradient or has no effect is an error that names it.

    One factor of an update may be without a gradient, as the other one is zero at the first step.
    In full fine-tuning nobody asked for the layers that the task does not use.
    """
    if isinstance(attachment(model).method, Full):
        return
    silent = set(loop.silent_parameters())
    pairs = {name: {f"{name}.lora_A", f"{name}.lora_B"} for name in lora_layers(model)}
    idle = [name for name, pair in pairs.items() if pair <= silent]
    idle.extend(sorted(silent.difference(*pairs.values())))
    if idle:
        raise UserError(
            f"{len(idle)} of what trained never got a gradient and learned nothing: "
            f"{_listed(idle)}. The model does not use it for this task; leave it out with "
            "--exclude-modules, or out of --modules-to-save."
        )
    if pairs:
        batch = held.batch(list(range(min(8, len(held.encoded)))))
        batch.pop("labels", None)
        check_effect(model, batch)


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def config_of_run(folder: str | Path, given: dict[str, Any]) -> FitConfig:
    """The config of the run in a folder; options that were given must say the same.

    Raises:
        UserError: an option differs from the run's.
    """
    stored = record.read_manifest(folder)["config"]
    now = make_config({**stored, **given, "out": str(folder)}, f"The options to resume '{folder}'")
    return now
