"""Several adapters on one base, tried one after the other on the same labelled rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rankwise.attaching import attach, attached, detach
from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import Examples, load_examples
from rankwise.errors import UserError
from rankwise.methods.adapter import Adapter
from rankwise.train.answers import Answers
from rankwise.train.config import FitConfig, make_config
from rankwise.train.evaluate import Rows, measure
from rankwise.train.metrics import main_metric
from rankwise.train.model import Base, class_names, load_base, load_config
from rankwise.train.precision import choose_device
from rankwise.train.predict import examples_of_file
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.restore import Restored, restore
from rankwise.train.setup import Data, column_names, in_order, load_data, longest_input

__all__ = ["Bench", "Quality", "bench_of_model", "bench_of_run", "bench_of_tuning"]


@dataclass(frozen=True, eq=False)
class Quality:
    """How well an adapter does.

    Attributes:
        metrics: over all rows.
        answers: to each row, for comparing with another adapter row by row.
    """

    metrics: dict[str, float]
    answers: Answers


@dataclass(frozen=True)
class Bench:
    """A bare base and the rows that adapters are tried on.

    Attributes:
        base: without an adapter.
        rows: with labels.
        metric: the one that counts.
        batch_size: rows in one pass.
    """

    base: Base
    rows: Rows
    metric: str
    batch_size: int

    def tried(self, adapters: Iterable[Adapter], reporter: Reporter) -> Iterator[Quality]:
        """The quality of each adapter, in order; the base is bare again after each.

        Raises:
            ArtifactError: an adapter does not fit the base.
        """
        model = self.base.model
        for adapter in adapters:
            attach(model, adapter)
            try:
                yield Quality(*measure(model, self.rows, self.batch_size, reporter))
            finally:
                detach(model)


def bench_of_run(
    run: str, data: str, *, model: str | None = None, reporter: Reporter | None = None
) -> Bench:
    """The base of a run and the rows of a file, read as the run's own were.

    Raises:
        UserError, ArtifactError, EnvironmentFault: as of restoring a run and reading its data.
    """
    restored = restore(run, model=model)
    detach(restored.base.model)
    examples = examples_of_file(restored, data)
    return _bench(restored.base, examples, restored.config, restored.manifest["metric"], reporter)


def bench_of_tuning(restored: Restored, reporter: Reporter | None = None) -> Bench:
    """The base of a run, bare again, and the rows that were held out of its training.

    Raises:
        UserError: the run had rows of its own to evaluate on, or its data have changed since.
    """
    config, manifest = restored.config, restored.manifest
    if config.eval is not None:
        raise UserError("The run was evaluated on a file of its own; nothing was held out of it.")
    held = in_order(load_data(config), manifest["label_names"]).held
    if held.fingerprint != manifest["data"]["eval"]["fingerprint"]:
        raise UserError(
            f"The rows of '{config.data}' are not what they were when '{config.out}' was trained. "
            "Put them back, or name another --out."
        )
    detach(restored.base.model)
    return _bench(restored.base, held, config, manifest["metric"], reporter)


def bench_of_model(
    model: str, data: str, *, reporter: Reporter | None = None, config: FitConfig | None = None
) -> Bench:
    """A base and the rows of a labelled file, for an adapter that no run of Rankwise left.

    Classes are numbered as the base's config names them; where it names none, in the order of
    their names, as ``rankwise fit`` does it.

    Raises:
        UserError, ArtifactError, EnvironmentFault: as of loading a model and reading data.
    """
    config = config or make_config({"model": model, "data": data, "out": "-"}, "trim")
    examples = load_examples(data, config.task, column_names(config))
    known = class_names(load_config(model, config.revision))
    examples = in_order(Data(examples, examples), known).held
    base = load_base(model, examples.task, examples.label_names, revision=config.revision)
    metric = main_metric(examples.task, config.metric)
    return _bench(base, examples, config, metric, reporter)


def _bench(
    base: Base, examples: Examples, config: FitConfig, metric: str, reporter: Reporter | None
) -> Bench:
    watcher = reporter or Silent()
    if examples.task != "causal-lm" and (examples.labels is None or examples.unlabelled):
        raise UserError(
            f"{examples.source} has rows without labels, and a quality cannot be measured on "
            "them. Name a file whose rows all have one."
        )
    assert not attached(base.model)
    device: torch.device = choose_device(config.device)
    base.model.to(device)  # type: ignore[arg-type]
    encoded = encode(examples, base.tokenizer, longest_input(config, base))
    for note in (*examples.notes, *encoded.notes):
        watcher.note(note)
    rows = Rows(encoded, examples.task, padding_id(base.tokenizer), device)
    return Bench(base, rows, metric, config.eval_batch_size)
