"""`python -m experiments.ranks` on a small comparison: what it adds and says, and nothing twice."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from experiments.ranks.__main__ import TABLE, main, run
from experiments.ranks.study import read_study

from rankwise.lab.compare.folder import begin, pin
from rankwise.lab.compare.work import work_of
from rankwise.train.answers import read_answers
from rankwise.train.reporter import Silent
from rankwise.train.run import fit

RANKS = (1, 2, 4)


def begun(out: Path, bert: Path, rows: Path) -> Any:
    """A comparison of LoRA alone at three ranks, without a search and without a run yet."""
    given = {"data": str(rows / "train.tsv"), "eval": str(rows / "dev.tsv"), "model": str(bert)}
    given |= {"device": "cpu", "epochs": 1, "batch_size": 8, "pack": "no"}
    wanted = {"methods": ["lora"], "ranks": list(RANKS), "seeds": 3, "rates": 1}
    pinned = begin(out / "results", given, wanted, Silent())
    pin(pinned)
    return pinned


@pytest.fixture(scope="module")
def made(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An experiment whose comparison lacks the last seed, and the tables of its ranks."""
    folder = tmp_path_factory.mktemp("experiment")
    pinned = begun(folder, bert, rows)
    for cell in work_of(pinned.grid, {}, pinned.metric).cells:
        if cell.config.seed < 2:
            fit(cell.config)
    return folder, tables_of(folder)


def tables_of(folder: Path, rows: dict[str, str] | None = None, results: str = "results") -> str:
    return run(read_study(folder, rows or {}, Silent(), results), Silent())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(text: str) -> dict[str, list[str]]:
    """The cells of the first table by what stands in front of them."""
    lines = text.split("\n\n")[1].splitlines()[2:]
    return {row[0]: row[1:] for row in ([c.strip() for c in x[1:-1].split("|")] for x in lines)}


def stamps(folder: Path) -> dict[str, int]:
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in kept}


def test_every_rank_stands_beside_the_best_with_its_size(made):
    folder, text = made
    found = cells(text)
    ends = ("advised and cut", "advised and trained")
    assert list(found) == [f"r = {r}" for r in RANKS] + [f"nested to {r}" for r in RANKS] + [*ends]
    assert all(found[f"nested to {r}"][0] == found[f"r = {r}"][0] for r in RANKS)
    assert (folder / "ranks" / TABLE).read_text(encoding="utf-8") == text
    assert "21 evaluation rows, 2 seeds." in text


def refused(capsys, message: str, *words: str) -> None:
    """Refused as the user's mistake, with exit code 2 and this message."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_another_rank_than_the_best_can_be_the_measure(made, capsys):
    folder, text = made
    main([str(folder), "--beside", "4"])
    other = capsys.readouterr().out
    assert "beside r = 4" in other
    assert cells(other)["r = 4"][2:] == ["", ""]
    assert other.split("\n\n")[2] == text.split("\n\n")[2]
    assert (folder / "ranks" / TABLE).read_text(encoding="utf-8") == text
    refused(capsys, "one of [1, 2, 4], got 3", str(folder), "--beside", "3")


def test_scores_and_differences_are_those_of_the_runs(made):
    folder, text = made
    found = cells(text)

    def score(*runs: Path) -> float:
        return sum(100 * read(r / "manifest.json")["metrics"]["accuracy"] for r in runs) / len(runs)

    apart = [score(*(folder / "results/runs").glob(f"lora-r{r}-*")) for r in RANKS]
    again = score(*(folder / "ranks").glob("advice-*/advised"))
    assert [f"{x:.1f} %" for x in apart] == [found[f"r = {r}"][1].split(" ±")[0] for r in RANKS]
    assert found["advised and trained"][1].startswith(f"{again:.1f} %")
    told = float(found["advised and trained"][2].split()[0].replace("−", "-"))
    assert told == pytest.approx(again - max(apart), abs=0.051)


def test_all_of_a_nested_run_is_the_run(made):
    folder, _ = made
    for seed in (0, 1):
        whole = folder / "ranks" / f"nested-r4-seed{seed}"
        cut = folder / "ranks" / "cuts" / f"{whole.name}-first4.json"
        manifest = read(whole / "manifest.json")
        assert manifest["config"]["train_nested"]
        assert read(cut)["metrics"] == pytest.approx(manifest["metrics"])
        rows = manifest["data"]["eval"]["fingerprint"]
        own, kept = (
            read_answers(p, rows)
            for p in (whole / "answers.safetensors", cut.with_suffix(".safetensors"))
        )
        assert (own.predictions == kept.predictions).all()


def test_the_evaluation_rows_advise_nothing(made):
    folder, _ = made
    pinned = read(folder / "results" / "compare.json")
    for out in (folder / "ranks").glob("advice-*"):
        probe, again = (read(out / n / "manifest.json") for n in ("probe-r8", "advised"))
        assert probe["config"]["eval"] is None
        assert probe["data"]["eval"]["rows"] == read(out / "advice.json")["rows"] == round(48 * 0.2)
        assert again["data"]["train"]["fingerprint"] == pinned["parts"]["train"]["fingerprint"]
        assert again["data"]["eval"]["fingerprint"] == pinned["parts"]["eval"]["fingerprint"]
        ranks = read(folder / "ranks" / "cuts" / f"{out.name}.json")["ranks"]
        assert again["counts"]["adapter"] == sum(ranks.values()) * 2 * 32  # as cut: r (in + out)


def test_nothing_is_done_twice_and_a_clone_needs_no_weights(made, tmp_path):
    folder, text = made
    before = stamps(folder)
    assert tables_of(folder) == text
    assert stamps(folder) == before
    left_out = shutil.ignore_patterns("adapter", "data", "trials-*", "*.lock")
    clone = shutil.copytree(folder, tmp_path / "clone", ignore=left_out)
    assert tables_of(clone) == text


def test_another_comparison_of_the_experiment_has_ranks_of_its_own(made, tmp_path, capsys):
    folder, text = made
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "results").rename(other / "results-again")
    (other / "ranks").rename(other / "ranks-again")
    assert tables_of(other, results="results-again") == text
    assert not (other / "ranks").exists()
    refused(capsys, "must begin with 'results', got 'runs'", str(folder), "--results", "runs")


def test_what_was_stopped_goes_on_with_rows_that_have_moved(made, rows, tmp_path):
    folder, text = made
    shutil.rmtree(folder / "results" / "data")
    moved = {"data": tmp_path / "t.tsv", "eval": tmp_path / "e.tsv"}
    for name, path in zip(("train.tsv", "dev.tsv"), moved.values(), strict=True):
        shutil.copy(rows / name, path)
    gone = folder / "ranks" / "cuts" / "advice-seed1.json"
    gone.unlink()
    shutil.rmtree(folder / "ranks" / "nested-r4-seed0")
    for cut in (folder / "ranks" / "cuts").glob("nested-r4-seed0*"):
        cut.unlink()
    before = stamps(folder)
    again = tables_of(folder, {name: str(path) for name, path in moved.items()})
    assert again.splitlines()[1:] == text.splitlines()[1:]  # the first names the file
    after = stamps(folder)
    assert gone.exists()
    assert {name for name in before if after[name] != before[name]} <= {
        "ranks/cuts/advice-seed1.safetensors",
        *(name for name in before if re.match(r"ranks/advice-seed1/(adapter|advice)", name)),
    }


def test_a_comparison_without_a_whole_seed_is_refused(bert, rows, tmp_path, capsys):
    begun(tmp_path, bert, rows)
    refused(capsys, "no seed under which LoRA is finished at every rank", str(tmp_path))
    refused(capsys, "holds no comparison", str(tmp_path / "other"), "--data", "a.tsv")
