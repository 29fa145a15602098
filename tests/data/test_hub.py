"""Names of datasets and names of files, and reading the Hub up to the network."""

import sys
from pathlib import Path

import pytest

from rankwise.data.examples import load_examples
from rankwise.data.hub import HubName, open_table, parse_hub_name, read_hub
from rankwise.errors import EnvironmentFault, UserError

# A stand-in for the package `datasets`, with the few names that are used of it.
STAND_IN = """
class ClassLabel:
    names = ["neg", "pos"]

class Value:
    pass

class Split(list):
    features = {"text": Value(), "label": ClassLabel()}
    column_names = ["text", "label"]

calls = []

class DatasetNotFoundError(FileNotFoundError):
    pass

def load_dataset(name, config, split, revision):
    calls.append((name, config, split, revision))
    if name == "absent":
        raise DatasetNotFoundError("Dataset 'absent' doesn't exist on the Hub.\\nMore.")
    if split == "middle":
        raise ValueError('Unknown split "middle". Should be one of ["train", "test"].')
    if name == "offline":
        raise ConnectionError("Couldn't reach 'offline' on the Hub (OfflineModeIsEnabled)")
    if name == "empty":
        return Split()
    rows = [("good", 1), ("bad", 0), ("unclear", -1)]
    return Split({"text": text, "label": label} for text, label in rows)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    yield __import__("datasets")
    sys.modules.pop("datasets", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imdb", HubName("imdb")),
        ("stanfordnlp/imdb", HubName("stanfordnlp/imdb")),
        ("nyu-mll/glue:sst2", HubName("nyu-mll/glue", "sst2")),
        ("nyu-mll/glue:sst2@validation", HubName("nyu-mll/glue", "sst2", "validation")),
        ("imdb@train[:10%]", HubName("imdb", None, "train[:10%]")),
        ("imdb.csv", None),
        ("data/imdb.jsonl.gz", None),
        ("./imdb", None),
        ("../imdb", None),
        ("~/imdb", None),
        ("/imdb", None),
        ("a/b/c", None),
        ("imdb@", None),
        ("two words", None),
        ("", None),
        (Path("imdb"), None),
    ],
)
def test_names_of_datasets_and_of_files(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_hub_name(text) == expected


def test_a_name_is_written_as_it_is_read():
    for text in ("imdb", "a/b:c", "a/b:c@test", "a@b"):
        assert str(parse_hub_name(text)) == text


def test_an_existing_file_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("imdb").write_text("text\tlabel\nx\t1\n")
    assert parse_hub_name("imdb") is None
    assert open_table("imdb", "tsv").rows == [{"text": "x", "label": "1"}]
    with pytest.raises(UserError, match="Cannot tell the format of imdb"):
        open_table("imdb")


def test_a_missing_file_is_no_dataset(tmp_path, monkeypatch, stand_in):
    monkeypatch.chdir(tmp_path)
    for name in ("trian.tsv", "./train", "a/b/c"):
        with pytest.raises(UserError, match=f"There is no file {name}"):
            open_table(name)
    with pytest.raises(UserError, match="There is no file imdb"):
        open_table("imdb", "tsv")
    assert stand_in.calls == []


def test_a_split_becomes_a_table_with_names_for_labels(stand_in):
    table = open_table("org/data:plain@test")
    assert stand_in.calls == [("org/data", "plain", "test", None)]
    assert (table.path, table.columns) == ("org/data:plain@test", ("text", "label"))
    assert [row["label"] for row in table.rows] == ["pos", "neg", "-"]
    assert table.lines == [1, 2, 3]


def test_examples_of_the_hub_leave_out_rows_without_a_label(stand_in):
    found = load_examples("org/data")
    assert (found.texts, found.labels) == (["good", "bad"], [1, 0])
    assert found.label_names == ("neg", "pos")
    assert found.name(0) == "org/data:1"
    assert "1 of 3 rows" in found.notes[0]


def test_a_revision_is_passed_on(stand_in):
    read_hub("org/data", "train", revision="abc")
    assert stand_in.calls == [("org/data", None, "train", "abc")]


def test_faults_of_the_user(stand_in):
    with pytest.raises(UserError, match=r"'absent' is no file .* doesn't exist on the Hub\."):
        open_table("absent")
    with pytest.raises(UserError, match='Unknown split "middle"'):
        open_table("imdb@middle")
    with pytest.raises(UserError, match="empty has no rows"):
        open_table("empty")


def test_faults_of_the_network(stand_in):
    with pytest.raises(EnvironmentFault, match=r"cannot be reached: .*HF_HUB_OFFLINE"):
        open_table("offline")


def test_without_an_address_it_fails_at_once(stand_in, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that never resolves
    with pytest.raises(EnvironmentFault, match=r"hub\.invalid has no address from here"):
        open_table("imdb")
    assert stand_in.calls == []
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:1")
    open_table("imdb")  # a proxy may know the address
    assert len(stand_in.calls) == 1


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault) as caught:
        open_table("imdb")
    assert "'imdb' is no file or folder here" in str(caught.value)
    assert 'pip install "rankwise[hub]"' in str(caught.value)


def test_the_real_package_reads_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "b", "label": 0}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = read_hub(str(folder), "train")
    assert table.rows == [{"text": "good", "label": 1}, {"text": "b", "label": 0}]
    with pytest.raises(UserError, match="Unknown split"):
        read_hub(str(folder), "nosuch")
    with pytest.raises(EnvironmentFault, match="cannot be reached"):
        read_hub("rankwise-no-such/dataset", "train")
