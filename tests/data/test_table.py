"""Files of every format, whole and broken, as tables that know their lines."""

import csv
import gzip
import io
import json
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.table import format_of, read_table
from rankwise.errors import ArtifactError, EnvironmentFault, UserError

ROWS = [{"text": "good film", "label": "1"}, {"text": "bad film", "label": "0"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, kind: type[Exception] = UserError, **options: str) -> str:
    with pytest.raises(kind) as caught:
        read_table(path, **options)
    return str(caught.value)


# --- the formats ---------------------------------------------------------------------------------

CONTENTS = {
    "a.csv": "text,label\ngood film,1\nbad film,0\n",
    "b.csv": "text;label\ngood film;1\nbad film;0\n",
    "a.tsv": "text\tlabel\ngood film\t1\nbad film\t0\n",
    "a.tab": "text\tlabel\ngood film\t1\nbad film\t0",
    "a.jsonl": '{"text": "good film", "label": "1"}\n{"text": "bad film", "label": "0"}\n',
    "a.json": '[\n {"text": "good film", "label": "1"},\n {"text": "bad film", "label": "0"}\n]\n',
}


@pytest.mark.parametrize("name", CONTENTS)
def test_each_format_gives_the_same_rows(tmp_path, name):
    table = read_table(write(tmp_path, name, CONTENTS[name]))
    assert table.columns == ("text", "label")
    assert table.rows == ROWS
    first = 1 if name == "a.jsonl" else 2
    assert table.lines == [first, first + 1]
    assert table.name(1) == f"{tmp_path / name}:{first + 1}"
    assert len(table) == 2


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(
    "disguise",
    [
        pytest.param(lambda t: b"\xef\xbb\xbf" + t.encode(), id="byte-order-mark"),
        pytest.param(lambda t: t.replace("\n", "\r\n").encode(), id="CRLF"),
        pytest.param(lambda t: t.replace("\n", "\r").encode(), id="CR"),
        pytest.param(lambda t: t.encode("utf-16"), id="UTF-16"),
        pytest.param(lambda t: ("\ufeff" + t.replace("\n", "\r\n")).encode(), id="both"),
    ],
)
def test_a_mark_and_any_line_end_change_nothing(tmp_path, name, disguise):
    table = read_table(write(tmp_path, name, disguise(CONTENTS[name])))
    assert table.columns == ("text", "label")
    assert table.rows == ROWS


@pytest.mark.parametrize("name", CONTENTS)
def test_gzip_is_looked_through(tmp_path, name):
    packed = gzip.compress(CONTENTS[name].encode())
    assert read_table(write(tmp_path, f"{name}.gz", packed)).rows == ROWS


def test_parquet_rows_are_numbered(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["x y", "z"], "label": [1, 0]}), path)
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert table.rows == [{"text": "x y", "label": 1}, {"text": "z", "label": 0}]
    assert table.lines == [1, 2]


def test_plain_text_is_one_row_per_line_and_blank_lines_are_none(tmp_path):
    table = read_table(write(tmp_path, "a.txt", 'one line\n\n  \nanother\tline, "quoted"\n'))
    assert table.columns == ("text",)
    assert [row["text"] for row in table.rows] == ["one line", 'another\tline, "quoted"']
    assert table.lines == [1, 4]
    assert not table.named


def test_the_format_can_be_named_against_the_suffix(tmp_path):
    path = write(tmp_path, "multinli.txt", CONTENTS["a.tsv"])
    assert read_table(path, "tsv").rows == ROWS


def test_a_string_path_and_the_home_folder_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.csv", CONTENTS["a.csv"])
    table = read_table("~/a.csv")
    assert table.rows == ROWS
    assert table.path == "~/a.csv"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.CSV", "csv"), ("x.tsv.gz", "tsv"), ("x.gz", None), ("x", None), ("v1.2", None)],
)
def test_the_suffix_tells_the_format(name, expected):
    assert format_of(name) == expected


def test_quotes_in_tsv_are_text(tmp_path):
    table = read_table(write(tmp_path, "a.tsv", 'label\tsentence\n0\t"lone quote\n1\tan "end"\n'))
    assert [r["sentence"] for r in table.rows] == ['"lone quote', 'an "end"']


def test_a_quoted_csv_field_may_hold_line_ends_and_lines_are_still_right(tmp_path):
    content = 'text,label\n"two\nlines, ""quoted""",1\n\nplain "inner" quote,0\n'
    table = read_table(write(tmp_path, "a.csv", content))
    assert [r["text"] for r in table.rows] == ['two\nlines, "quoted"', 'plain "inner" quote']
    assert table.lines == [2, 5]


def test_a_long_csv_field_is_no_fault_and_the_limit_is_put_back(tmp_path):
    before = csv.field_size_limit()
    table = read_table(write(tmp_path, "a.csv", "text\n" + "word " * 50_000 + "\n"))
    assert len(table.rows[0]["text"]) == 250_000
    assert csv.field_size_limit() == before


def test_many_columns_as_in_mnli(tmp_path):
    columns = ["index", "promptID", "genre", *(f"parse{i}" for i in range(20)), "gold_label"]
    row = [f"( {c} )" for c in columns]
    table = read_table(write(tmp_path, "m.tsv", "\t".join(columns) + "\n" + "\t".join(row) + "\n"))
    assert table.columns == tuple(columns)
    assert table.rows == [dict(zip(columns, row, strict=True))]


def test_json_columns_are_the_union_in_order_of_appearance(tmp_path):
    content = '{"b": 1}\n\n{"a": 2, "b": null}\n'
    table = read_table(write(tmp_path, "a.jsonl", content))
    assert table.columns == ("b", "a")
    assert table.lines == [1, 3]


def test_json_strings_may_hold_unusual_line_ends(tmp_path):
    content = json.dumps({"text": "a\u2028b\u0085c\u001c"}, ensure_ascii=False) + "\n"
    table = read_table(write(tmp_path, "a.jsonl", content))
    assert table.rows == [{"text": "a\u2028b\u0085c\u001c"}]


def test_a_json_list_knows_the_line_of_each_object(tmp_path):
    content = '\n[{"a": 1}, {"a": 2},\n\n {"a":\n 3}\n,{"a": 4}]'
    table = read_table(write(tmp_path, "a.json", content))
    assert [r["a"] for r in table.rows] == [1, 2, 3, 4]
    assert table.lines == [2, 2, 4, 6]


CELL = st.text(st.characters(exclude_characters="\0\r", codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(CELL.filter(str.strip), CELL), min_size=1, max_size=8))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("text", "other"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", file.getvalue())
    assert [(r["text"], r["other"]) for r in read_table(path).rows] == rows


@given(st.lists(st.dictionaries(CELL, st.none() | CELL | st.integers()), min_size=1, max_size=8))
def test_what_the_json_module_writes_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("json")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_table(write(folder, "a.jsonl", lines)).rows == rows
    assert read_table(write(folder, "a.json", json.dumps(rows, indent=2))).rows == rows


@given(st.binary(max_size=60), st.sampled_from(["csv", "tsv", "jsonl", "text"]))
def test_any_bytes_are_read_or_refused_with_the_file_s_name(tmp_path_factory, content, kind):
    path = write(tmp_path_factory.mktemp("any"), "a.bin", content)
    message = ""
    try:
        table = read_table(path, kind)
    except UserError as error:
        message = str(error)
    else:
        assert len(table.rows) == len(table.lines) > 0
    assert message == "" or str(path) in message


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "  \r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_an_empty_file(tmp_path, name, content):
    assert f"{tmp_path / name} is empty" in refused(write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_only_a_header(tmp_path, name):
    content = CONTENTS[name].partition("\n")[0]
    message = refused(write(tmp_path, name, content))
    assert "a header (text, label) and no rows" in message


def test_an_empty_json_list_and_an_empty_parquet_file(tmp_path):
    assert "no rows" in refused(write(tmp_path, "a.json", "[ ]"))
    pyarrow.parquet.write_table(
        pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    assert "no rows" in refused(tmp_path / "a.parquet")


def test_bad_json_in_line_7(tmp_path):
    lines = ['{"text": "x"}'] * 10
    lines[6] = '{"text": "x"'
    message = refused(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert f"{tmp_path / 'a.jsonl'}:7: not valid JSON" in message
    assert "one object per line" in message


def test_every_bad_json_line_is_named(tmp_path):
    lines = [
        '{"text": "x"}',
        "[1]",
        "{",
        '"words"',
        "3",
        "null",
        "true",
        '{"n": ' + "9" * 5000 + "}",
    ]
    message = refused(write(tmp_path, "a.jsonl", "\n".join(lines)))
    found = ["a list", "not valid JSON", "a string", "a number", "null", "a boolean", "not usable"]
    for line, word in enumerate(found, 2):
        assert any(f":{line}: " in m and word in m for m in message.split("\n")), (line, word)


def test_json_nested_too_deeply(tmp_path):
    message = refused(write(tmp_path, "a.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"))
    assert ":1: not usable JSON: nested too deeply" in message


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('[{"a": 1}\n {"a": 2}]', 2, "expected ',' or the closing ']', found '{'"),
        ('[{"a": 1},\n\n', 3, "not valid JSON"),
        ('[{"a": 1}', 1, "found the end"),
        ('[{"a": 1}]\n[]', 1, "more after the list"),
        ('[{"a": 1},\n2]', 2, "expected an object"),
        ('{\n "a": 1\n}', 1, "not valid JSON"),
    ],
)
def test_a_broken_json_list_names_the_line(tmp_path, content, line, words):
    message = refused(write(tmp_path, "a.json", content))
    assert f"a.json:{line}: " in message
    assert words in message


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t")])
def test_rows_with_too_many_or_too_few_fields_are_all_named(tmp_path, name, sep):
    lines = ["a|b|c", "1|2|3", "1|2", "1|2|3|4", "", "1|2|3", "1"]
    message = refused(write(tmp_path, name, "\n".join(lines).replace("|", sep)))
    assert "as many fields as the header, 3" in message
    assert f"{name}:3: 2 fields" in message
    assert f"{name}:4: 4 fields" in message
    assert f"{name}:7: 1 fields" in message
    assert f"{name}:6:" not in message


@pytest.mark.parametrize(
    ("body", "line"), [('ok,1\n"never closed,1\nx,0\n', 3), ('"a" b,1\n', 2), ('x,1\n"a"b\n', 3)]
)
def test_csv_quotes_that_do_not_close(tmp_path, body, line):
    message = refused(write(tmp_path, "a.csv", "text,label\n" + body))
    assert f"a.csv:{line}: the quotes of this row do not close properly" in message


def test_columns_without_a_name_or_with_the_same(tmp_path):
    message = refused(write(tmp_path, "a.csv", "text,,text\na,b,c\n"))
    assert "a.csv:1: the first line must name the columns" in message
    assert "column 2 has no name" in message
    assert "two columns are named 'text'" in message


def test_a_file_without_a_header_is_recognised(tmp_path):
    message = refused(write(tmp_path, "cola.tsv", "gj04\t1\t\tOur friends won't buy it.\n"))
    assert "looks like data" in message


def test_nul_bytes(tmp_path):
    message = refused(write(tmp_path, "a.tsv", b"text\tlabel\nx\t1\ny\0z\t0\nq\0\t1\n"))
    assert "a.tsv:3: a NUL byte (2 in the file)" in message


def test_bytes_that_are_no_text(tmp_path):
    message = refused(write(tmp_path, "a.csv", b"text,label\nfine,1\ncaf\xe9,0\n"))
    assert "a.csv:3: byte 0xe9 is not UTF-8 text" in message
    assert "iconv" in message


def test_half_a_utf_16_character(tmp_path):
    assert "UTF-16" in refused(write(tmp_path, "a.csv", "text\nx y".encode("utf-16")[:-1]))


def test_a_folder_instead_of_a_file(tmp_path):
    write(tmp_path, "train.csv", CONTENTS["a.csv"])
    message = refused(tmp_path)
    assert "is a folder" in message
    assert "train.csv" in message


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    write(tmp_path, "train.tsv", CONTENTS["a.tsv"])
    assert "Did you mean 'train.tsv'?" in refused(tmp_path / "trian.tsv")
    assert "does not exist" in refused(tmp_path / "nowhere" / "train.tsv")


def test_unknown_suffix_and_unknown_format(tmp_path):
    message = refused(write(tmp_path, "a.dat", "x"))
    assert ".tsv" in message
    assert "Did you mean 'csv' or 'tsv'?" in refused(tmp_path / "a.dat", file_format="csvv")


@pytest.mark.parametrize(
    "damage",
    [b"", b"plain words", gzip.compress(b"text\nx\n" * 99, mtime=0)[:-9]],
    ids=["empty", "text", "cut"],
)
def test_a_damaged_gzip_file(tmp_path, damage):
    message = refused(write(tmp_path, "a.csv.gz", damage), ArtifactError if damage else UserError)
    assert "gzip" in message or "empty" in message


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1", string.printable.encode()], ids=["empty", "magic", "text"]
)
def test_a_damaged_parquet_file(tmp_path, damage):
    message = refused(write(tmp_path, "a.parquet", damage), ArtifactError)
    assert "cannot be read as Parquet" in message


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    message = refused(write(tmp_path, "a.parquet", b"PAR1"), EnvironmentFault)
    assert 'pip install "rankwise[parquet]"' in message


def test_a_file_that_may_not_be_opened(tmp_path):
    loop = tmp_path / "a.csv"
    loop.symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(loop)
    with pytest.raises((UserError, EnvironmentFault)) as caught:
        read_table(loop)
    assert str(loop) in str(caught.value)


def test_sst2_is_read_whole(shared):
    train = read_table(shared / "data/sst2/train.tsv")
    assert train.columns == ("label", "sentence")
    assert len(train) == 67_349
    assert train.lines == list(range(2, 67_351))
    assert {row["label"] for row in train.rows} == {"0", "1"}
