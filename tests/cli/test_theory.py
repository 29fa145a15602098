"""`rankwise theory` as a command; what it computes is tested in tests/lab/theory."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.cli.app import main
from rankwise.lab.theory import Theory
from rankwise.lab.theory.experiments import jobs
from rankwise.lab.theory.records import TheoryRecord, read_record, write_record


def left(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_first_piece_goes_on_and_prints_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = TheoryRecord(Theory(steps=2, seed=5))
    out = tmp_path / "theory"
    write_record(out / "records.json", record)
    assert left("theory", "--out", out, "--steps", "2", "--seed", "5") == 0
    told = capsys.readouterr()
    assert "The rank bounds the error" in told.out
    assert f"report: {out / 'report.html'}" in told.out
    assert (out / "report.html").exists()
    assert next(jobs(read_record(out / "records.json")), None) is None


def test_a_wrong_flag_is_a_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert left("theory", "--rank", "8") == 2
    assert "--rank" in capsys.readouterr().err


def test_a_value_out_of_range_is_a_mistake_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left("theory", "--out", tmp_path / "t", "--steps", "0") == 2
    assert "--steps" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_folder_of_other_options_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(tmp_path / "records.json", TheoryRecord(Theory(seed=1)))
    assert left("theory", "--out", tmp_path) == 2
    assert "seed 1 and not 0" in capsys.readouterr().err
