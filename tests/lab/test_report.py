"""The page: whole, self-contained, escaped, the same each time, and fit for a browser."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from urllib.parse import unquote

import pytest

from rankwise.errors import EnvironmentFault, UserError
from rankwise.lab.records import read_run
from rankwise.lab.report import summary_table, write_report

FIGURES = [
    "quality-by-rank",
    "quality-by-size",
    "beside-reference",
    "training-loss",
    "evaluation",
    "update-spectrum",
    "wall-time",
    "peak-memory",
]


# --- the page as a document ----------------------------------------------------------------------


def test_the_page_is_well_formed(report, parse):
    found = parse(report)
    assert found.wrong == []
    assert found.open == []
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = [a["aria-labelledby"] for _, a in found.elements if "aria-labelledby" in a]
    assert labels
    assert set(labels) <= set(ids)
    assert found.all("html")[0]["lang"] == "en"
    assert {"charset": "utf-8"} in found.all("meta")
    assert any(m.get("name") == "viewport" for m in found.all("meta"))
    assert len(found.all("h1")) == 1


def test_the_page_loads_nothing(report, parse):
    text = report.read_text("utf-8")
    found = parse(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not [tag for tag, _ in found.elements if tag in ("script", "img", "iframe", "object")]
    links = [a[k] or "" for _, a in found.elements for k in ("href", "src", "action") if k in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert all("url(" not in (a.get("style") or "") for _, a in found.elements)
    assert not [k for _, a in found.elements for k in a if k.startswith("on")]


def test_every_figure_has_a_title_a_description_its_numbers_and_a_download(report, parse):
    found = parse(report)
    assert [a["id"] for a in found.all("figure")] == FIGURES
    drawings = [a for a in found.all("svg") if a.get("role") == "img"]
    assert [a["aria-labelledby"] for a in drawings] == [f"{name}-title" for name in FIGURES]
    assert len(found.all("figcaption")) == len(FIGURES)
    downloads = {a["download"]: a["href"] for a in found.all("a")}
    assert list(downloads) == [f"{name}.csv" for name in FIGURES]
    data = unquote(downloads["quality-by-rank.csv"].removeprefix("data:text/csv;charset=utf-8,"))
    rows = list(csv.DictReader(io.StringIO(data)))
    assert [row["r"] for row in rows] == ["", "1", "2", "4", "8", "16", "32", ""]
    assert float(rows[4]["accuracy"]) == 0.771


def test_tables_have_headers_with_scope(report, parse):
    found = parse(report)
    assert all(attrs.get("scope") in ("col", "row") for attrs in found.all("th"))
    assert found.all("table")


def test_the_page_tells_what_was_found_and_how_it_was_made(report, parse):
    text = parse(report).text
    for words in (
        "Best score: full fine-tuning, accuracy 78.9 %",
        "LoRA r=16 covers 93 % of that gap",
        "8 runs of classification on all-MiniLM-L6-v2, judged by accuracy on 872 evaluation rows.",
        "banking77/test.csv, 872 rows, fingerprint e5f6a7b8",
        "version 0.1.0, commit abc1234",
        "python 3.11.9, torch 2.13.0",
        "cpu Some CPU, cores 2, device cpu, dtype float32",
        "One note.",
        "method = lora; r = 8; alpha = 16.0",
        "passed The adapter was merged",
        "Outputs: largest error 4e-07 where 1e-05 is tolerated",
        "Layers: all 6 are within their bound.",
        "SHA-256 of merged not recorded",
    ):
        assert words in text


def test_facts_that_differ_are_all_told(tmp_path, record, lora, parse):
    runs = [
        record("head", {"method": "head"}, edit=lambda m: m["code"].update(commit="one")),
        record("LoRA", lora(2), edit=lambda m: m["code"].update(commit="two")),
    ]
    text = parse(write_report(tmp_path / "r.html", title="t", runs=runs)).text
    assert "commit one" in text
    assert "commit two" in text


def test_options_are_told_once_where_they_are_shared(tmp_path, sweep, parse):
    text = parse(write_report(tmp_path / "r.html", title="t", runs=sweep)).text
    shared, own = text.split("Of each run")
    assert "batch 32" in shared
    assert "batch" not in own
    assert "lr = 5e-05" in own


def test_long_lists_are_shortened(tmp_path, record, lora, parse):
    layers = [f"layer.{n}" for n in range(20)]
    runs = [record("LoRA", lora(2, adapted=layers))]
    text = parse(write_report(tmp_path / "r.html", title="t", runs=runs)).text
    assert "adapted = 20 of them, layer.0 to layer.19" in text


def test_a_long_path_of_the_base_is_shortened_at_the_top_alone(tmp_path, record, parse):
    source = "/".join(["", "very", "long", *["folder"] * 9, "encoder", "model"])
    run = record("head", {"method": "head"}, edit=lambda m: m["base"].update(source=source))
    text = parse(write_report(tmp_path / "r.html", title="t", runs=[run])).text
    assert "classification on encoder/model, judged by" in text
    assert f"Base model {source}, fingerprint" in text


def test_the_notes_of_the_runs_are_told_once(tmp_path, record, lora, parse):
    def noted(tree):
        tree["notes"] = ["3 rows were cut."]

    runs = [record("head", {"method": "head"}, edit=noted), record("L", lora(1), edit=noted)]
    text = parse(write_report(tmp_path / "r.html", title="t", runs=runs)).text
    assert text.count("3 rows were cut.") == 1


# --- the same each time --------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(tmp_path, sweep, spectra, certificate):
    given = {"title": "t", "certificate": certificate, "spectra": spectra}
    one = write_report(tmp_path / "a.html", runs=sweep, **given)
    two = write_report(tmp_path / "b.html", runs=sweep[::-1], **given)
    assert one.read_bytes() == two.read_bytes()


def test_where_the_runs_lie_is_not_told(tmp_path, sweep):
    text = write_report(tmp_path / "r.html", title="t", runs=sweep).read_text("utf-8")
    assert str(sweep[0].folder) not in text
    moved = tmp_path / "elsewhere"
    shutil.copytree(sweep[0].folder, moved)
    runs = [read_run(moved), *sweep[1:]]
    assert write_report(tmp_path / "s.html", title="t", runs=runs).read_text("utf-8") == text


def test_another_process_writes_the_same_bytes(tmp_path, sweep, repository):
    here = write_report(tmp_path / "a.html", title="t", runs=sweep)
    code = (
        "import sys\nfrom rankwise.lab.records import read_runs\n"
        "from rankwise.lab.report import write_report\n"
        "write_report(sys.argv[2], title='t', runs=read_runs(sys.argv[1]))\n"
    )
    folder = sweep[0].folder.parent
    environment = {**os.environ, "PYTHONPATH": str(repository / "src"), "PYTHONHASHSEED": "7"}
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "b.html")]
    subprocess.run(words, check=True, env=environment)
    assert (tmp_path / "b.html").read_bytes() == here.read_bytes()


# --- hostile and odd records ---------------------------------------------------------------------

HOSTILE = "<script>alert('x')</script><img src=x onerror=y>\"'&amp;{{ 7*7 }}"


def test_hostile_names_are_text(tmp_path, record, lora, certificate, parse):
    def poison(tree):
        tree["notes"] = [HOSTILE]
        tree["base"]["source"] = HOSTILE
        tree["config"][HOSTILE] = HOSTILE
        tree["versions"][HOSTILE] = HOSTILE
        tree["metric"] = HOSTILE
        tree["metrics"][HOSTILE] = 0.5

    certificate["layers"][0]["name"] = certificate["probe"] = certificate["dtype"] = HOSTILE
    certificate["sha256"]["base"] = HOSTILE
    path = write_report(
        tmp_path / "r.html",
        title=HOSTILE,
        runs=[
            record(HOSTILE, lora(2), edit=poison),
            record(HOSTILE, {"method": HOSTILE}, edit=poison),
        ],
        certificate=certificate,
        spectra={HOSTILE: [1.0, 0.5]},
        notes=[HOSTILE],
    )
    found = parse(path)
    assert found.wrong == []
    assert not found.all("script")
    assert not found.all("img")
    assert not [k for _, a in found.elements for k in a if k.startswith("on")]
    assert found.text.count("alert('x')") > 10
    assert "49" not in found.all("title")[0]


def test_characters_that_no_page_can_hold_are_replaced(tmp_path, record, lora):
    def odd(tree):
        tree["notes"] = ["a\x00b\x1b \ud800"]

    runs = [record("name\x07 \udfff", lora(2), edit=odd)]
    path = write_report(tmp_path / "r.html", title="t\x01", runs=runs)
    text = path.read_text("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "name\ufffd \ufffd" in text


def variants():
    def nan(tree):
        tree["metrics"].update(accuracy=float("nan"))

    def bare(tree):
        tree.update(status="running", metrics={}, artifact_bytes=None, versions={}, hardware={})
        tree["memory"] = None
        tree["data"]["eval"] = None
        tree["seconds"] = {"train": float("nan"), "eval": None}

    lora = {"method": "lora", "r": 4, "alpha": 8.0}
    return {
        "one run": ([("LoRA", lora, None)], ["quality-by-rank", "quality-by-size"]),
        "no LoRA": (
            [("head", {"method": "head"}, None), ("full", {"method": "full"}, None)],
            ["quality-by-size", "beside-reference"],
        ),
        "no head": (
            [("LoRA", lora, None), ("full", {"method": "full"}, None)],
            ["quality-by-rank", "quality-by-size", "beside-reference"],
        ),
        "a score that is no number": (
            [("head", {"method": "head"}, nan), ("LoRA", lora, None)],
            ["quality-by-rank", "quality-by-size"],
        ),
        "no score at all": ([("head", {"method": "head"}, nan), ("LoRA", lora, nan)], []),
        "a run that has just begun": ([("LoRA", lora, bare)], None),
    }


@pytest.mark.parametrize("name", variants())
def test_odd_sets_of_runs_make_a_page(tmp_path, record, name, parse):
    described, drawn = variants()[name]
    log = [] if drawn is None else None
    runs = [record(n, method, edit=edit, log=log) for n, method, edit in described]
    found = parse(write_report(tmp_path / "r.html", title=name, runs=runs))
    assert found.wrong == []
    ids = [a["id"] for a in found.all("figure")]
    others = ["training-loss", "evaluation", "wall-time", "peak-memory"]
    assert ids == ([] if drawn is None else [*drawn, *others])
    assert "Not drawn: a figure" in found.text
    assert "nan" not in found.text.lower().split()
    assert summary_table(runs)


# --- writing -------------------------------------------------------------------------------------


def test_the_folder_is_made_and_nothing_else_is_left(report):
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_a_report_is_replaced_whole(tmp_path, sweep):
    path = write_report(tmp_path / "r.html", title="one", runs=sweep[:1])
    before = path.read_bytes()
    with pytest.raises(UserError):
        write_report(path, title="two", runs=sweep[:1], spectra={"layer": [-1.0]})
    assert path.read_bytes() == before
    write_report(path, title="three", runs=sweep[:1])
    assert "three" in path.read_text("utf-8")


def test_a_folder_is_no_file(tmp_path, sweep):
    with pytest.raises(UserError, match="is a folder"):
        write_report(tmp_path, title="t", runs=sweep)


def test_a_file_in_the_place_of_a_folder_is_the_users_mistake(tmp_path, sweep):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_report(tmp_path / "file" / "r.html", title="t", runs=sweep)
    assert caught.value.exit_code == 2


def test_the_numbers_stand_beside_the_page_as_well(tmp_path, sweep, spectra, parse):
    path = write_report(
        tmp_path / "r.html", title="t", runs=sweep, spectra=spectra, numbers=tmp_path / "csv"
    )
    names = {file.name for file in (tmp_path / "csv").iterdir()}
    assert names == {f"{name}.csv" for name in [*FIGURES, "methods", "runs"]}
    links = {a["download"]: a["href"] for a in parse(path).all("a")}
    for name in FIGURES:
        embedded = unquote(links[f"{name}.csv"].removeprefix("data:text/csv;charset=utf-8,"))
        assert (tmp_path / "csv" / f"{name}.csv").read_text("utf-8") == embedded
    with (tmp_path / "csv" / "methods.csv").open(encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["LoRA r=8"]["accuracy"]) == 0.771
    assert int(rows["LoRA r=8"]["parameters: adapter"]) == 73_728
    with (tmp_path / "csv" / "runs.csv").open(encoding="utf-8") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0"] * len(sweep)


def test_the_page_compares_with_the_reference_that_was_named(tmp_path, sweep, parse):
    text = parse(write_report(tmp_path / "r.html", title="t", runs=sweep, reference="head")).text
    assert "Every method beside head only" in text
    assert "full fine-tuning 18.6 points" in text
    with pytest.raises(UserError, match="'nobody'"):
        write_report(tmp_path / "r.html", title="t", runs=sweep, reference="nobody")


def test_further_sections_follow_the_figures(tmp_path, sweep, parse):
    from rankwise.lab.costs import wall_time
    from rankwise.lab.report import Section
    from rankwise.lab.settings import group_runs

    more = replace(wall_time(group_runs(sweep)), name="more")
    section = Section("rates", "How the rates were chosen", ("By <search>.",), (more,))
    found = parse(write_report(tmp_path / "r.html", title="t", runs=sweep, sections=[section]))
    assert found.wrong == []
    assert [a["id"] for a in found.all("figure")][-1] == "more"
    assert "How the rates were chosen By <search>." in found.text


def test_no_runs_make_no_report(tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_report(tmp_path / "r.html", title="t", runs=[])
    with pytest.raises(UserError, match="at least one run"):
        summary_table([])


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_without_a_package_the_remedy_is_named(tmp_path, sweep, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentFault, match=r'pip install "rankwise\[report\]"'):
        write_report(tmp_path / "r.html", title="t", runs=sweep)
    assert list(tmp_path.glob("*.html")) == []


# --- the table for the terminal ------------------------------------------------------------------


def test_the_table_is_aligned(sweep):
    lines = summary_table(sweep).split("\n")
    assert len(lines) == 2 + len(sweep)
    assert len({len(line) for line in lines}) == 1
    edges = [m.end() for m in re.finditer(r"-+", lines[1])]
    assert all(line[edge : edge + 2].strip() == "" for line in lines for edge in edges)
    cells = [
        line[start:end] for start, end in zip([0, *edges], edges, strict=False) for line in lines
    ]
    assert all(cell for cell in cells)
    row = next(line for line in lines if line.startswith("LoRA r=8"))
    wanted = "LoRA r=8 8 16 77.1 % 1.4 73,728 73,728 76,808 0.338 % 20.2 s 501 MB 309 kB"
    assert " ".join(row.split()) == wanted


def test_the_table_is_that_of_the_page(tmp_path, sweep, parse):
    text = parse(write_report(tmp_path / "r.html", title="t", runs=sweep)).text
    for line in summary_table(sweep).split("\n")[2:]:
        assert " ".join(line.split()) in text


def test_the_table_counts_seeds_where_there_are_several(record, lora):
    runs = [record("LoRA", lora(2), seed=s) for s in (0, 1)]
    table = summary_table([*runs, record("head", {"method": "head"})])
    assert table.split("\n")[0].endswith("seeds")
    assert [line.split()[-1] for line in table.split("\n")[2:]] == ["1", "2"]


def test_a_name_cannot_steer_the_terminal(record):
    assert "\x1b" not in summary_table([record("a\x1b[2J", {"method": "head"})])
