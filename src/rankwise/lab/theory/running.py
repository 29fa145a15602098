"""run_theory: every experiment, kept as it is done, and the folder with records and page."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

import torch

from rankwise.errors import UserError
from rankwise.io import files
from rankwise.lab.page import can_make_pages
from rankwise.lab.theory.experiments import Rows, jobs
from rankwise.lab.theory.page import make_page, sections
from rankwise.lab.theory.records import Theory, TheoryRecord, read_record, write_record
from rankwise.train.manifest import surroundings
from rankwise.train.reporter import Reporter, Silent
from rankwise.train.signals import Interrupted, StopRequest

__all__ = ["RECORDS", "REPORT", "run_theory"]

RECORDS = "records.json"
REPORT = "report.html"
NUMBERS = "numbers"


def run_theory(
    out: str | Path | None = None,
    theory: Theory | None = None,
    reporter: Reporter | None = None,
) -> TheoryRecord:
    """Train A and B on linear problems at every rank and scaling, beside what theory says of them.

    With a folder ``out`` the records (records.json), the page (report.html) and the numbers of
    each figure (numbers/*.csv) are written there; what the folder holds of the same run already is
    not computed again, and other files in it are left alone. Without one, nothing is written.

    Raises:
        UserError: ``out`` holds something else, or a run of other options.
        ArtifactError: ``out`` holds a damaged records.json.
        EnvironmentFault: the folder cannot be written, or a package of the page is missing.
        Interrupted: Ctrl+C or SIGTERM; what was finished is kept in records.json.
    """
    theory, reporter = theory or Theory(), reporter or Silent()
    if out is None:
        return _compute(_fresh(theory), reporter, None, None)
    can_make_pages()
    folder = Path(out)
    record = _begin(folder, theory, reporter)
    if next(jobs(record), None) is None:
        reporter.note("finished before; the page is drawn again from its records")
    else:
        with StopRequest(reporter.note) as stop:
            record = _compute(record, reporter, folder / RECORDS, stop)
        if stop.number is not None:
            reporter.note(_kept(record, folder))
            raise Interrupted(stop.number, theory.call(str(folder)))
    parts = sections(record)
    files.write_bytes(folder / REPORT, make_page(record, parts))
    for figure in (figure for part in parts for figure in part.figures):
        files.write_text(folder / NUMBERS / f"{figure.name}.csv", figure.csv())
    return record


def _begin(folder: Path, theory: Theory, reporter: Reporter) -> TheoryRecord:
    """The record to go on with: the folder's own, or an empty one."""
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a folder.")
    if not (folder / RECORDS).exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"'{folder}' is not empty, and holds no theory. Name another --out.")
        return _fresh(theory)
    found = read_record(folder / RECORDS)
    if found.theory != theory:
        was, now = dataclasses.asdict(found.theory), dataclasses.asdict(theory)
        other = ", ".join(f"{k} {was[k]} and not {now[k]}" for k in was if was[k] != now[k])
        raise UserError(
            f"'{folder}' holds a theory of other options ({other}). Name another --out, or delete "
            "it."
        )
    fresh = _fresh(theory)
    if next(jobs(found), None) is not None and (found.code, found.versions) != (
        fresh.code,
        fresh.versions,
    ):
        reporter.note("What was kept is of other code or library versions; it is computed anew.")
        return fresh
    return found


def _fresh(theory: Theory) -> TheoryRecord:
    """An empty record with its birth certificate."""
    reason = "what is learned is compared with NumPy's float64"
    return TheoryRecord(theory, **surroundings(torch.device("cpu"), "float64", reason))


def _compute(
    record: TheoryRecord, reporter: Reporter, path: Path | None, stop: StopRequest | None
) -> TheoryRecord:
    """Do what is left of the work, keeping each piece in ``path`` when it is done."""
    todo = list(jobs(record))
    done, threads = 0, torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        # threads would spend more time on waiting for each other than on matrices this small
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        reporter.start("theory", sum(job.cost for job in todo))
        stack.callback(reporter.finish)
        for job in todo:
            began = time.monotonic()
            rows = job.run()
            record = _joined(record, rows, time.monotonic() - began)
            done += job.cost
            if path is not None:
                write_record(path, record)
            reporter.advance(done, {})
            if stop is not None and stop.number is not None:
                break
    return record


def _joined(record: TheoryRecord, rows: Rows, seconds: float) -> TheoryRecord:
    grown = {name: (*getattr(record, name), *new) for name, new in rows.items()}
    return dataclasses.replace(record, seconds=record.seconds + seconds, **grown)


def _kept(record: TheoryRecord, folder: Path) -> str:
    """What a run that was stopped leaves behind."""
    ranks = len({row.r for row in record.bounds})
    cells = len({(c.optimizer, c.rule, c.r) for c in record.scaling})
    return (
        f"Kept in {folder / RECORDS}: {ranks} of {len(record.theory.ranks)} ranks against their "
        f"bounds, and {cells} rows of the scalings' heat maps. The page is not written yet."
    )
