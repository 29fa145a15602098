"""The folder of a comparison: rows split once, options pinned, damage told."""

import json
import shutil
from pathlib import Path

import pytest

from rankwise.data.examples import load_examples
from rankwise.errors import ArtifactError, UserError
from rankwise.lab.compare.folder import begin, find_rows, pin, read_pinned
from rankwise.train.reporter import Silent


@pytest.fixture
def start(tmp_path, given):
    """Begins a comparison, or goes on with it."""

    def make(fit=None, compared=None, out="out"):
        fit = given() if fit is None else fit
        pinned = begin(tmp_path / out, fit, compared or {}, Silent())
        pin(pinned)
        return pinned

    return make


def content(examples):
    return {examples.content(i) for i in range(len(examples))}


def test_tuning_rows_are_cut_from_the_training_rows(start, given):
    pinned = start()
    parts = {
        name: load_examples(pinned.folder / "data" / f"{name}.jsonl", pinned.settled["task"])
        for name in pinned.parts
    }
    train, held = (load_examples(given()[key]) for key in ("data", "eval"))
    assert parts["train"].fingerprint == train.fingerprint == pinned.parts["train"].fingerprint
    assert parts["eval"].fingerprint == held.fingerprint
    fitting, tuning = content(parts["search-train"]), content(parts["search-eval"])
    assert fitting | tuning == content(train)
    assert not fitting & tuning
    assert len(parts["search-eval"]) == pytest.approx(0.2 * len(train), abs=2)
    assert {name: part.rows for name, part in pinned.parts.items()} == {
        name: len(examples) for name, examples in parts.items()
    }


def test_a_comparison_from_before_the_heads_search_goes_on_without_it(start, given):
    pinned = start()
    assert pinned.grid.head_first
    path = pinned.folder / "compare.json"
    tree = json.loads(path.read_text())
    del tree["config"]["search_head"]
    path.write_text(json.dumps(tree))
    assert not read_pinned(pinned.folder).grid.head_first
    assert not start({}, {"seeds": 7}).grid.head_first
    with pytest.raises(UserError, match="--search-head was False and is now True"):
        start({}, {"search_head": True})


def test_the_tuning_rows_have_a_limit(start):
    assert start(compared={"tuning_rows": 4}).parts["search-eval"].rows == 4


def test_without_evaluation_rows_some_are_held_out_the_same_for_all_seeds(start, given):
    fit = given()
    del fit["eval"]
    pinned = start(fit)
    train, held = (
        content(load_examples(pinned.folder / "data" / f"{n}.jsonl", "classification"))
        for n in ("train", "eval")
    )
    assert train | held == content(load_examples(fit["data"]))
    assert not train & held


@pytest.mark.parametrize("kind", ["-pairs.tsv", "-scores.tsv"])
def test_other_forms_are_split_as_well(start, given, rows, kind):
    files = {"data": str(rows / f"train{kind}"), "eval": str(rows / f"dev{kind}")}
    pinned = start(given(**files))
    task = load_examples(files["data"]).task
    assert pinned.settled["task"] == task
    assert pinned.metric == ("pearson" if task == "regression" else "accuracy")
    assert pinned.labels == (0 if task == "regression" else 2)


def test_what_every_run_shares_names_no_rows(start):
    pinned = start()
    assert pinned.shared == {
        "model": pinned.given["model"],
        "epochs": 1.0,
        "batch_size": 8,
        "device": "cpu",
        "task": "classification",
        "metric": "accuracy",
        "dtype": "float32",
    }


def test_it_comes_back_as_it_was_begun(start):
    pinned = start(compared={"ranks": "1,2", "seeds": 2})
    assert read_pinned(pinned.folder) == pinned
    assert start({}, {}) == pinned  # nothing need be given again


def test_it_may_grow_and_not_change(start, given):
    start(compared={"methods": "lora", "ranks": "1,2", "seeds": 2})
    grown = start({}, {"methods": "head", "ranks": "4", "seeds": 3})
    assert grown.config.methods == ["head", "lora"]
    assert (grown.config.ranks, grown.config.seeds) == ([1, 2, 4], 3)
    assert read_pinned(grown.folder) == grown
    with pytest.raises(UserError, match=r"--epochs was 1\.0 and is now 2\.0"):
        start(given(epochs=2))
    with pytest.raises(UserError, match=r"--max-length was None and is now 32"):
        start(given(max_length=32))
    with pytest.raises(UserError, match=r"--widen was 3 and is now 1"):
        start({}, {"widen": 1})
    assert read_pinned(grown.folder) == grown


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        ({"method": "lora"}, "'method' is set by the comparison itself"),
        ({"lr": 1e-3}, "'lr' is set by the comparison itself"),
        ({"epochs": -1}, "--epochs"),
        ({"model": None}, "--model"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(start, given, tmp_path, fit, words):
    with pytest.raises(UserError, match=words):
        start({k: v for k, v in given(**fit).items() if v is not None})
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_rows_is_told(start, given, tmp_path):
    lines = ["sentence\tlabel", "the one bad film\tbad"]
    lines += [f"a good film {'old ' * i}\tgood" for i in range(100)]
    (tmp_path / "rare.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(UserError, match=r"none of the \d+ rows of train is of class 'bad'"):
        start(given(data=str(tmp_path / "rare.tsv"), eval=str(tmp_path / "rare.tsv"), limit=4))


def test_other_folders_are_left_alone(start, given, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match="not empty, and holds no comparison"):
        start(out="mine")
    with pytest.raises(UserError, match="is a file"):
        start(out="mine/notes.txt")
    with pytest.raises(UserError, match="model"):
        start({}, out="nothing")


def test_rows_of_the_users_own_are_not_written_over(start, given, rows, tmp_path):
    mine = tmp_path / "project" / "data" / "train.jsonl"
    mine.parent.mkdir(parents=True)
    text = "".join(
        json.dumps({"sentence": line.split("\t")[0], "label": line.split("\t")[1], "id": i}) + "\n"
        for i, line in enumerate((rows / "train.tsv").read_text("utf-8").splitlines()[1:])
    )
    mine.write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl' is in the place of rows"):
        start({**given(), "data": str(mine)}, out="project")
    assert mine.read_text("utf-8") == text
    assert [p.name for p in mine.parent.iterdir()] == ["train.jsonl"]


def test_a_beginning_that_was_killed_is_begun_again(start):
    pinned = start()
    (pinned.folder / "compare.json").unlink()
    assert start() == pinned


def test_damage_is_told(start):
    pinned = start()
    path = pinned.folder / "compare.json"
    whole = path.read_text("utf-8")
    for text in ("{", "[]", whole.replace('"labels"', '"label"')):
        path.write_text(text, "utf-8")
        with pytest.raises(ArtifactError, match="damaged"):
            read_pinned(pinned.folder)
    path.write_text(json.dumps({**json.loads(whole), "format": 9}), "utf-8")
    with pytest.raises(ArtifactError, match="not a comparison that this version reads"):
        read_pinned(pinned.folder)
    with pytest.raises(UserError, match="holds no comparison"):
        read_pinned(Path("nowhere"))


def test_rows_that_are_lost_or_damaged_are_cut_again(start):
    pinned = start()
    before = {p.name: p.read_bytes() for p in (pinned.folder / "data").iterdir()}
    (pinned.folder / "data" / "eval.jsonl").write_text("{}\n", "utf-8")
    (pinned.folder / "data" / "search-train.jsonl").unlink()
    find_rows(pinned)
    assert {p.name: p.read_bytes() for p in (pinned.folder / "data").iterdir()} == before


def test_rows_may_move_and_must_be_the_same(start, given, rows, tmp_path):
    shutil.copy(rows / "train.tsv", tmp_path / "moved.tsv")
    fit = given(data=str(tmp_path / "moved.tsv"))
    pinned = start(fit)
    shutil.rmtree(pinned.folder / "data")
    (tmp_path / "moved.tsv").unlink()
    with pytest.raises(UserError, match=r"name their files as --data and --eval.*moved\.tsv"):
        find_rows(pinned)
    with pytest.raises(UserError, match=r"dev\.tsv give others \(train, search-train, search-eval"):
        start({"data": given()["eval"]}, {})
    back = start({"data": given()["data"]}, {})
    find_rows(back)
    assert back.parts == pinned.parts
    assert back.given["data"] == given()["data"]


def test_a_search_may_have_fewer_rows(start):
    parts = start(compared={"search_rows": 12}).parts
    assert parts["search-train"].rows == 12
    assert parts["search-eval"].rows == start(out="all").parts["search-eval"].rows


def test_an_option_that_is_none_is_named(start, given):
    with pytest.raises(UserError, match=r"'search_rate' is no option\. Did you mean 'search_ra"):
        start(given(search_rate=3))
