"""The report of a comparison is a function of its records, and shows what they hold."""

import csv
import json
import shutil
from dataclasses import replace

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab.compare.evidence import outcome_of, outcomes_of, read_evidence
from rankwise.lab.compare.folder import read_pinned
from rankwise.lab.compare.running import report_compare
from rankwise.lab.compare.searching import searching
from rankwise.lab.findings import findings
from rankwise.lab.records import read_runs

FIGURES = [
    *("quality-by-rank", "quality-by-size", "beside-reference", "training-loss", "evaluation"),
    *("update-spectrum", "wall-time", "peak-memory", "rates"),
]


@pytest.fixture
def moved(compared, tmp_path):
    """The same comparison in another folder, for a test to change."""
    folder = tmp_path / "moved"
    shutil.copytree(compared.pinned.folder, folder)
    pinned = read_pinned(folder)
    return pinned, pinned.grid


def test_the_page_shows_every_figure_with_its_numbers(compared, parse):
    found = parse(compared.report)
    assert found.wrong == []
    assert [a["id"] for a in found.all("figure")] == FIGURES
    folder = compared.pinned.folder / "csv"
    assert {p.name for p in folder.iterdir()} == {f"{n}.csv" for n in [*FIGURES, "methods", "runs"]}
    with (folder / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["status"] == "finished" and row["peak memory (bytes)"] for row in rows)
    assert "http" not in compared.report.read_text("utf-8").replace("http-equiv", "")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_browser_shows_the_page_whole(compared, shown_whole, width, scheme):
    light_or_dark = f"--blink-settings=preferredColorScheme={scheme}"
    shown_whole(compared.report, FIGURES, width, light_or_dark)


def test_the_page_says_how_the_rates_were_chosen(compared, parse):
    text = parse(compared.report).text
    assert "Of the training rows 10 were set aside for it" in text
    assert "LoRA was searched at r = 2 alone" in text
    assert "0 times at most" in text
    with (compared.pinned.folder / "csv" / "rates.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    chosen = {row["method"]: float(row["learning rate"]) for row in rows if row["chosen"] == "yes"}
    for run in compared.runs:
        assert run.config["lr"] == chosen["head-only" if run.kind == "head" else "LoRA r=2"]


def test_scores_are_those_of_the_last_step(compared):
    for run in compared.runs:
        assert run.score == run.evaluations[-1].metrics["accuracy"]
        assert run.answers is not None
        assert run.contributions.mean() == pytest.approx(run.score)
    assert "optimistic" not in "\n".join(findings(compared.runs))


def test_where_it_lies_does_not_matter_and_the_answers_do(compared, moved):
    pinned, _ = moved
    assert read_evidence(pinned).summary() == compared.summary()
    run = next((pinned.folder / "runs").iterdir())
    (run / "answers.safetensors").unlink()
    assert "left no answers" in read_evidence(pinned).summary()


def test_the_reference_is_found_by_its_key(moved):
    pinned, _ = moved
    named = replace(pinned, config=pinned.config.model_copy(update={"reference": "lora-r2"}))
    evidence = read_evidence(named)
    assert evidence.reference == "LoRA r=2"
    assert "Beside LoRA r=2" in evidence.summary()


def test_a_reference_without_a_score_does_not_cost_the_report(moved, parse):
    pinned, _ = moved
    named = replace(pinned, config=pinned.config.model_copy(update={"reference": "lora-r2"}))
    path = next((pinned.folder / "runs").glob("lora-r2-*-seed1")) / "manifest.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "diverged": True, "status": "failed"}), "utf-8")
    evidence = read_evidence(named)
    said = "Not every run of the reference that was named, lora-r2, has come to a score"
    assert evidence.reference is None
    assert said in evidence.summary()
    assert "Beside head-only" in evidence.summary()
    assert said in " ".join(parse(evidence.write()).text.split())


def test_outcomes_are_read_from_the_folders(compared, moved):
    pinned, grid = moved
    found = outcomes_of(grid, pinned.metric)
    assert len(found) == 6 + 6
    scores = {f"runs/{run.folder.name}": run.score for run in compared.runs}
    assert {name: found[name].score for name in scores} == scores


@pytest.mark.parametrize("status", ["interrupted", "running", "failed"])
def test_a_run_that_is_not_over_has_no_outcome(moved, status):
    pinned, grid = moved
    name = next(name for name in outcomes_of(grid, "accuracy") if name.startswith("runs/"))
    path = pinned.folder / name / "manifest.json"
    tree = json.loads(path.read_text()) | {"status": status}
    path.write_text(json.dumps(tree))
    assert name not in outcomes_of(grid, "accuracy")
    path.write_text(json.dumps(tree | {"diverged": True}))
    assert outcomes_of(grid, "accuracy")[name].diverged


def test_damage_is_told(moved):
    pinned, grid = moved
    run = next(p for p in (pinned.folder / "runs").iterdir() if p.name.startswith("lora-r2"))
    for path in (pinned.folder / "runs").glob("lora-r2*/spectra.json"):
        path.write_text("{")
    with pytest.raises(ArtifactError, match=r"spectra\.json' is damaged"):
        read_evidence(pinned)
    (run / "manifest.json").write_text("{")
    cell = grid.run_cell(grid.regimes()[-1], 1e-3, 0)
    with pytest.raises(ArtifactError, match="damaged"):
        outcome_of(run, cell, "accuracy")


def test_a_run_is_a_run_folder_like_any_other(compared):
    from rankwise.train.restore import restore

    run = next(run for run in read_runs(compared.pinned.folder / "runs") if run.rank == 2)
    for which in ("adapter", "last"):  # the last is what was kept
        assert restore(run.folder, which=which).manifest["name"] == "LoRA r=2"


def test_what_is_finished_is_reported_before_all_is(moved, parse):
    pinned, _ = moved
    for name in ("head-lr*-seed1", "lora-r1-lr*-seed0"):
        (run,) = (pinned.folder / "runs").glob(name)
        shutil.rmtree(run)
    evidence = report_compare(pinned.folder)
    assert (evidence.left, len(evidence.runs)) == (2, 4)
    assert evidence.summary().endswith("Not finished: 2 runs to go.")
    assert "(not finished: 2 runs to go)" in parse(evidence.report).text
    shutil.rmtree(pinned.folder / "runs")
    with pytest.raises(UserError, match=r"No run of the comparison in .* is finished yet"):
        report_compare(pinned.folder)


def test_runs_from_other_weights_are_refused(moved):
    pinned, _ = moved
    path = next((pinned.folder / "runs").iterdir()) / "manifest.json"
    tree = json.loads(path.read_text())
    tree["base"]["fingerprint"] = "another"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="began from different weights"):
        read_evidence(pinned)


def test_a_search_of_another_size_is_told(compared):
    smaller = {"search_epochs": 0.5, "search_rows": 20}
    own = replace(compared.pinned, config=compared.pinned.config.model_copy(update=smaller))
    text = searching(compared.searches, own, 0.01).sentences[0]
    assert "of the others under a schedule of its own length (1 epochs)" in text
