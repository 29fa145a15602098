"""A run merged into a plain transformers model folder, with its certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import Examples
from rankwise.errors import ArtifactError, RankwiseError, UserError
from rankwise.io import files
from rankwise.layers import Network, Prefix
from rankwise.merging import merge
from rankwise.train.evaluate import Rows
from rankwise.train.exported import Format, write_model
from rankwise.train.manifest import read_manifest
from rankwise.train.model import fingerprint_folder, import_transformers, quiet_transformers
from rankwise.train.predict import examples_of_file, examples_of_text
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.restore import Restored, restore
from rankwise.train.setup import in_order, load_data

if TYPE_CHECKING:
    from rankwise.merging import Certificate

__all__ = ["merge_run"]

_PROBE_ROWS = 16

# Probe texts for a run whose evaluation rows are no longer there.
_SENTENCES = (
    "The train leaves at ten past six, and nobody knows where it is going.",
    "It was the best meal we had in years, and the worst service.",
    "Return the number of items that compare equal to the given value.",
    "No.",
    "Rain is expected in the north, with strong winds along the coast by the evening.",
    "She closed the book, looked at the window, and began to laugh for no reason at all.",
    "The committee will meet again once the figures for the third quarter have been checked.",
    "What would you have done?",
)


def merge_run(
    run: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    which: str = "adapter",
    dtype: str | None = None,
    probe: str | None = None,
    exports: Sequence[Format] = (),
    reporter: Reporter | None = None,
) -> Certificate:
    """Write a run's model, its adapter merged in, as a plain transformers folder.

    The merge is measured on probe rows (``probe``, else the run's own evaluation rows, else a few
    fixed sentences), the folder is read back and must give the merged model's outputs bit for bit,
    and ``certificate.json`` in it says what was measured. What is exported as well stands beside
    the weights, and was run on the probe rows too. On any failure nothing is written.

    Args:
        run: the run folder.
        out: the folder to write; it must not exist, or be empty.
        model: where the base is now, when it has moved.
        which: "adapter" (the best) or "last".
        dtype: "float32", "bfloat16" or "float16"; the base's own when None.
        probe: a file of rows like the training rows.
        exports: further files of the merged model to write, Onnx() or TorchExport().
        reporter: told what happens.

    Raises:
        UserError: ``out`` holds something, or the options do not fit the run.
        ArtifactError: the folder does not give what was merged, or a file is damaged.
        MergeError: the merge does not give what the adapter gives.
        ExportError: a further file cannot be written, or does not give what was merged.
        EnvironmentFault: a package that an export takes is missing, or the disk refuses.
    """
    target = Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"'{target}' is there already and not empty; name another --out.")
    for form in exports:
        form.versions()  # what is missing is told before anything is loaded
    _refuse_additions(run)
    watcher = reporter or Silent()
    wanted = None if dtype is None else getattr(torch, dtype)
    loaded = restore(run, model=model, which=which, dtype=wanted)
    network: Any = loaded.base.model
    batch, described = _probe(loaded, probe, watcher)
    certificate = replace(merge(network, keep=False, probe=batch), probe=described)
    if certificate.untied:
        network.config.tie_word_embeddings = False
    with files.folder(target) as temporary:
        with quiet_transformers():
            network.save_pretrained(temporary)
            _unbound(loaded.base.tokenizer).save_pretrained(temporary)
        _read_back(network, temporary, batch)
        reports = [write_model(network, temporary, batch, form) for form in exports]
        adapter = Path(run) / which
        weights = sorted(adapter.glob("*.safetensors"))
        certificate = certificate.with_files(
            base=loaded.base.fingerprint,
            adapter=f"sha256:{files.sha256_file(weights[0])}",
            merged=fingerprint_folder(temporary),
        )
        record = {**certificate.to_json(), "read_back": "equal bit for bit"}
        record |= {"exports": [report.to_json() for report in reports]} if reports else {}
        files.write_json(temporary / "certificate.json", record)
    for report in reports:
        watcher.note(report.line())
    return certificate


def _refuse_additions(run: str | Path) -> None:
    """Refuse at once what no weight can hold, before anything is loaded.

    Raises:
        UserError: the run trained bottlenecks or a prefix; or the folder is no run.
    """
    manifest = read_manifest(run)
    barrier = {"bottleneck": Network.barrier, "prefix": Prefix.barrier}
    reason = barrier.get(manifest["method"]["method"])
    if reason is not None:
        raise UserError(
            f"The run in '{run}' ({manifest['name']}) cannot be merged: what it added to each of "
            f"its layers {reason}. Use the base with the adapter on it: rankwise predict {run}, or "
            "rankwise.load_adapter."
        )


def _unbound(tokenizer: Any) -> Any:
    """The tokenizer without the cut and the padding that it was last called with."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _probe(run: Restored, path: str | None, watcher: Reporter) -> tuple[dict[str, Tensor], str]:
    """A batch of probe rows, and words on where they come from."""
    examples, described = _probe_examples(run, path, watcher)
    encoded = encode(examples, run.base.tokenizer, run.max_length)
    rows = Rows(encoded, run.manifest["task"], padding_id(run.base.tokenizer), torch.device("cpu"))
    batch = rows.batch(list(range(len(encoded))))
    batch.pop("labels", None)
    return batch, described


def _probe_examples(run: Restored, path: str | None, watcher: Reporter) -> tuple[Examples, str]:
    if path is not None:
        found = examples_of_file(run, path, limit=_PROBE_ROWS)
        return found, f"{len(found)} rows of {path}"
    try:
        return _own_rows(run)
    except RankwiseError as error:
        watcher.note(
            f"The run's evaluation rows cannot be read, so the merge is measured on "
            f"{len(_SENTENCES)} fixed sentences (--probe names a file). {error}"
        )
        pairs = _SENTENCES[::-1] if run.manifest["form"] == "pair" else ()
        return examples_of_text(run, _SENTENCES, pairs), f"{len(_SENTENCES)} fixed sentences"


def _own_rows(run: Restored) -> tuple[Examples, str]:
    """Some of the run's evaluation rows: of its file, or of what was held out of training.

    What was held out follows from the seed, as long as the file is what it was.
    """
    config = run.config
    if config.eval is not None:
        found = examples_of_file(run, config.eval, limit=_PROBE_ROWS)
        return found, f"{len(found)} rows of {config.eval}"
    held = in_order(load_data(config), run.manifest["label_names"]).held
    found = held.subset(range(min(_PROBE_ROWS, len(held))))
    if held.fingerprint == run.manifest["data"]["eval"]["fingerprint"]:
        return found, f"{len(found)} rows held out of {config.data}"
    return found, f"{len(found)} rows of {config.data}, which has changed since the training"


def _read_back(network: Any, folder: Path, batch: Mapping[str, Tensor]) -> None:
    """The written folder, loaded by transformers alone, must compute what was merged."""
    transformers = import_transformers()
    with quiet_transformers():
        again = getattr(transformers, type(network).__name__).from_pretrained(
            folder, dtype=network.dtype
        )
    with torch.no_grad():
        wanted = network.eval()(**batch).logits
        found = again.eval()(**batch).logits
    if not torch.equal(wanted, found):
        worst = (wanted.double() - found.double()).abs().max().item()
        raise ArtifactError(
            f"The merged folder was read back and differs from the merged model by {worst:.3g}; "
            "nothing was kept. Please report this with the architecture's name."
        )
