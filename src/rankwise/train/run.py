"""fit: from a config to a run folder that holds the adapter and all it takes to run it again."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rankwise.attaching import attachment, updates_of
from rankwise.errors import RankwiseError, UserError
from rankwise.io.adapters import save_adapter
from rankwise.io.files import write_text
from rankwise.layers import Offset, restore_frozen
from rankwise.merging import check_effect
from rankwise.methods.full import Full
from rankwise.train import answers as row_answers
from rankwise.train import manifest as record
from rankwise.train.answers import Answers, write_answers
from rankwise.train.config import FitConfig
from rankwise.train.config_file import dump_config
from rankwise.train.evaluate import Rows
from rankwise.train.folder import claim, refuse_used
from rankwise.train.frozen_cache import serving
from rankwise.train.loop import Diverged, Loop
from rankwise.train.memory import PeakMemory
from rankwise.train.metrics import main_metric
from rankwise.train.model import Base, class_names, load_base, load_config
from rankwise.train.precision import choose_device
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.resume import refuse_changes, refuse_other_device
from rankwise.train.setup import Data, Prepared, encoded_rows, in_order, listed, load_data, prepare
from rankwise.train.signals import Interrupted

__all__ = [
    "Common",
    "FitResult",
    "Run",
    "begin",
    "earlier",
    "fit",
    "load_common",
    "seed_everything",
]


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

    The folder holds ``adapter/`` (the best by the metric) and ``last/``, or with ``select: last``
    the last as ``adapter/`` alone; ``answers.safetensors`` (what the adapter answered to each
    evaluation row), ``checkpoints/``, ``metrics.jsonl``, ``config.yaml`` and ``manifest.json``.

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
    common = load_common(config, resume=resume, reporter=watcher, data=data)

    def make(before: Mapping[str, Any] | None) -> Prepared:
        return prepare(config, common.base, common.train, before, watcher)

    with begin(config, common, make, watcher, resume=resume) as run:
        run.loop.run()
        return run.finish()


@dataclass(frozen=True)
class Common:
    """What runs on the same rows and base have in common.

    Attributes:
        data: the examples.
        metric: the metric that picks the best.
        base: the loaded base, with nothing attached.
        train, held: the rows as tokens.
        device: where it is trained.
        memory: watches from before the base was loaded.
    """

    data: Data
    metric: str
    base: Base
    train: Rows
    held: Rows
    device: torch.device
    memory: PeakMemory


def load_common(
    config: FitConfig, *, resume: bool, reporter: Reporter, data: Data | None = None
) -> Common:
    """Load what a run begins from, with every generator seeded as the config says.

    Raises:
        UserError, ArtifactError, EnvironmentFault: each says what is wrong and how to mend it.
    """
    device = choose_device(config.device)
    before = earlier(Path(config.out), resume, device)
    memory = PeakMemory(device, (before or {}).get("memory"))
    seed_everything(config.seed)
    named = class_names(load_config(config.model, config.revision))
    examples = in_order(data or load_data(config), named)
    for note in examples.notes:
        reporter.note(note)
    metric = main_metric(examples.train.task, config.metric)
    base = load_base(
        config.model,
        examples.train.task,
        examples.train.label_names,
        revision=config.revision,
    )
    if base.foreign:
        note = (
            f"The checkpoint's output layer was trained for other classes: {listed(base.foreign)}. "
            f"It is where the layer for {listed(examples.train.label_names)} starts from."
        )
        reporter.note(note)
        examples = replace(examples, notes=(*examples.notes, note))
    train, held = encoded_rows(config, examples, base, device, reporter)
    return Common(examples, metric, base, train, held, device, memory)


def earlier(folder: Path, resume: bool, device: torch.device) -> dict[str, Any] | None:
    """The manifest of the run to go on with; None for a new run, whose folder must be unused.

    Raises:
        UserError: the folder is in use, or its run is finished, or was begun on another device.
    """
    if not resume:
        refuse_used(folder)
        return None
    manifest = record.read_manifest(folder)
    if manifest["status"] == "finished":
        raise UserError(f"The run in '{folder}' is finished; there is nothing to resume.")
    refuse_other_device(manifest, device)
    return manifest


@contextlib.contextmanager
def begin(
    config: FitConfig,
    common: Common,
    make: Callable[[Mapping[str, Any] | None], Prepared],
    reporter: Reporter,
    *,
    resume: bool,
    together: int = 1,
) -> Generator[Run]:
    """A run that is ready to take its steps, in a folder that is held for the length of the block.

    An error that leaves the block is written into the manifest; a folder in which nothing was begun
    is removed again.

    Args:
        config: the options.
        common: what was loaded for it.
        make: gives the model, for the manifest of the run that goes on.
        reporter: told what happens.
        resume: go on from the newest valid checkpoint.
        together: how many runs share this process and their passes through the base.
    """
    folder = Path(config.out)
    existed = folder.exists()
    with claim(folder):
        try:
            # again, as another run may have been here while this one was reading its data
            before = earlier(folder, resume, common.device)
            made = make(before)
            manifest = _manifest(config, common, made, together)
            if before is not None:
                refuse_changes(before, manifest)
            record.write(folder, manifest)
            with _told(folder, manifest, common.memory), contextlib.ExitStack() as serving:
                write_text(folder / "config.yaml", dump_config(config))
                rows = serving.enter_context(_rows(config, folder, made.model, common, reporter))
                keep = functools.partial(_keep, made.model, folder, config, manifest)
                loop = Loop(made.model, *rows, config, common.metric, folder, keep, reporter)
                loop.by_products = made.kernels.attention_by_products
                if before is not None:
                    loop.resume()
                yield Run(config, common, made, manifest, loop, serving)
        except BaseException:
            if not existed and not (folder / record.NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _told(folder: Path, manifest: dict[str, Any], memory: PeakMemory) -> Generator[None]:
    """Let the manifest say how the run ended where an error ends it."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        manifest["status"] = "interrupted" if stopped else "failed"
        manifest |= {"diverged": isinstance(error, Diverged), "memory": _memory(manifest, memory)}
        if not stopped:
            manifest["reason"] = str(error) or type(error).__name__
        with contextlib.suppress(RankwiseError):  # a full disk, say, is what is being reported
            record.write(folder, manifest)
        raise


def _keep(
    model: nn.Module, folder: Path, config: FitConfig, manifest: Mapping[str, Any], answers: Answers
) -> None:
    """Write the adapter as it is now, and what it answered."""
    _save(model, folder / "adapter", config)
    evaluation = manifest["data"]["eval"]["fingerprint"]
    write_answers(folder / row_answers.NAME, answers, evaluation)


@dataclass(frozen=True)
class Run:
    """A run between its begin and its end.

    Attributes:
        config: the options.
        common: what it began from.
        made: the model with its method.
        manifest: what its manifest.json says, which :meth:`finish` completes.
        loop: takes its steps.
        serving: what is kept of the frozen layers while it does.
    """

    config: FitConfig
    common: Common
    made: Prepared
    manifest: dict[str, Any]
    loop: Loop
    serving: contextlib.ExitStack

    def finish(self) -> FitResult:
        """After the last step: save what was learned and write the results into the manifest.

        Raises:
            UserError: something that trained never got a gradient, or has no effect.
        """
        self.serving.close()
        folder, model, progress = self.loop.folder, self.made.model, self.loop.progress
        if self.config.select == "best":
            _save(model, folder / "last", self.config)
        adapter = folder / "adapter"
        self.manifest.update(
            metrics=dict(progress.best_metrics),
            best_step=progress.best_step,
            steps=progress.step,
            skipped_steps=progress.skipped,
            micro_batch=progress.micro_batch,
            seconds={"train": progress.seconds, "eval": progress.eval_seconds},
            memory=_memory(self.manifest, self.common.memory),
            artifact_bytes=sum(f.stat().st_size for f in adapter.rglob("*") if f.is_file()),
        )
        _refuse_idle(self.loop, model, self.common.held)
        self.manifest["status"] = "finished"
        record.write(folder, self.manifest)
        restore_frozen(model)
        return FitResult(folder, self.manifest, model, self.common.base.tokenizer)


def _memory(manifest: Mapping[str, Any], memory: PeakMemory) -> dict[str, Any] | None:
    """The most memory of a run; None where others shared the process with it."""
    return memory.record() if manifest["together"] == 1 else None


@contextlib.contextmanager
def _rows(
    config: FitConfig, folder: Path, model: nn.Module, common: Common, watcher: Reporter
) -> Generator[tuple[Rows, Rows]]:
    """The rows, with what the frozen layers give for them where that is to be kept."""
    if not config.cache:
        yield common.train, common.held
        return
    limit, size = 1e9 * config.cache, config.eval_batch_size
    with serving(model, common.train, common.held, folder, size, limit, watcher) as rows:
        yield rows


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _manifest(config: FitConfig, common: Common, made: Prepared, together: int) -> dict[str, Any]:
    name, options = record.method_record(config)
    done, data = attachment(made.model), common.data
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
        "metric": common.metric,
        "metrics": {},
        "counts": record.counts(made.model),
        "seconds": {"train": 0.0, "eval": 0.0},
        "together": together,
        "memory": None,
        "artifact_bytes": 0,
        "data": {
            "train": record.describe_data(data.train),
            "eval": record.describe_data(data.held),
        },
        "base": {"source": common.base.source, "fingerprint": common.base.fingerprint},
        "notes": [*data.notes, *done.notes],
        **record.surroundings(
            common.device, made.choice.name, made.choice.reason, made.kernels.record()
        ),
    }


def _save(model: nn.Module, folder: Path, config: FitConfig) -> None:
    save_adapter(model, folder, base_model_name=config.model)


def _refuse_idle(loop: Loop, model: nn.Module, held: Rows) -> None:
    """After training: whatever got no gradient or has no effect is an error that names it.

    One factor of an update may be without a gradient, as the other one is zero at the first step.
    In full fine-tuning nobody asked for the layers that the task does not use; nor did anybody for
    each bias, and that of the keys has no gradient but what rounding leaves.
    """
    if isinstance(attachment(model).method, Full):
        return
    silent = set(loop.silent_parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    pairs: dict[str, set[str]] = {}
    for name, update in updates_of(model).items():
        trained = {names[id(p)] for p in update.trained()}
        if isinstance(update, Offset):
            silent -= trained
        elif trained:
            pairs[name] = trained
    idle = [name for name, pair in pairs.items() if pair <= silent]
    idle.extend(sorted(silent.difference(*pairs.values())))
    if idle:
        raise UserError(
            f"{len(idle)} of what trained never got a gradient and learned nothing: "
            f"{listed(idle)}. The model does not use it for this task; leave it out with "
            "--exclude-modules, or out of --modules-to-save."
        )
    if pairs:
        batch = held.batch(list(range(min(8, len(held.encoded)))))
        batch.pop("labels", None)
        check_effect(model, batch)
