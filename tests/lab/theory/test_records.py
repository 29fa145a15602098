"""Records on disk: what is written comes back, and what is damaged is told."""

import json

import pytest

from rankwise.errors import ArtifactError, UserError
from rankwise.lab.theory import Samples, Theory
from rankwise.lab.theory.records import read_record, write_record


@pytest.fixture
def written(tmp_path, made_record):
    write_record(tmp_path / "records.json", made_record)
    return tmp_path / "records.json"


def test_what_is_written_comes_back(written, made_record):
    assert read_record(written) == made_record


def test_what_was_measured_comes_back(tmp_path, measured_record):
    write_record(tmp_path / "again.json", measured_record)
    assert read_record(tmp_path / "again.json") == measured_record


def test_the_parts_of_an_error_are_those_of_its_draws():
    row = Samples(10, 2, 0.25, (0.5, 0.7), (0.4, 0.6))
    assert row.error == pytest.approx(0.6)
    assert row.standard_error == pytest.approx(0.1)
    assert row.of_estimation == pytest.approx(0.25)
    assert row.of_training == pytest.approx(0.1)


def damage(path, change):
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")
    return path


def test_a_file_that_is_missing_names_what_is_there(written):
    with pytest.raises(UserError, match=r"Did you mean 'records.json'"):
        read_record(written.with_name("record.json"))


def test_a_file_that_is_cut_is_damaged(written):
    written.write_text(written.read_text("utf-8")[:-40], "utf-8")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_record(written)


@pytest.mark.parametrize("text", ['{"kind": "other"}', "[]", "3"])
def test_a_file_of_something_else_is_refused(written, text):
    written.write_text(text, "utf-8")
    with pytest.raises(UserError, match="holds no records of `rankwise theory`"):
        read_record(written)


def test_a_file_of_another_format_is_refused(written):
    with pytest.raises(ArtifactError, match="of format 2, and this version reads 1"):
        read_record(damage(written, lambda tree: tree.update(format=2)))


def test_everything_that_is_wrong_is_listed(written):
    def change(tree):
        tree["seconds"] = True
        tree["bounds"][1]["error"] = "x"
        tree["samples"][0]["learned"] = [1, "y"]
        del tree["inputs"][0]["loss"]
        tree["scaling"] = None
        tree["code"] = 3
        tree["theory"]["extra"] = 1

    with pytest.raises(ArtifactError) as caught:
        read_record(damage(written, change))
    told = str(caught.value)
    for words in (
        "'theory' must hold outputs, inputs",
        "'seconds' must be a number, got True",
        "'bounds[1]' has wrong values for error.",
        "'inputs[0]' must hold r, loss",
        "'samples[0]' has wrong values for learned.",
        "'scaling' must be a list.",
        "'code' must be a table.",
    ):
        assert words in told


def test_sizes_that_make_no_sense_are_listed():
    with pytest.raises(UserError) as caught:
        Theory(outputs=3, steps=0, rows=(8,), noise=float("nan"), seed=-1)
    told = str(caught.value)
    for words in ("outputs must be 4", "steps must be 1", "noise must be 0", "seed must be 0"):
        assert words in told
    assert "rows must be numbers of 24 (the inputs) or more, got (8,)" in told


def test_the_call_that_makes_it_again_is_told():
    assert Theory().call() == "rankwise theory"
    assert Theory(steps=9, seed=2).call("a/b") == "rankwise theory --out a/b --steps 9 --seed 2"
    theory = Theory(inputs=6, rows=(8, 80), seed=3)
    told = theory.call("a/b")
    assert told.startswith("run_theory('a/b', theory=Theory(")
    assert eval(theory.call(), {"Theory": Theory, "run_theory": lambda theory: theory}) == theory
