"""The demo's data, checked against Python's own idea of its docstrings."""

import inspect
import json
import platform
import shutil
import sysconfig
import textwrap
import warnings
from collections import Counter

import pytest

from rankwise.data import pydocs
from rankwise.data.examples import Examples
from rankwise.data.pydocs import TOPICS, docstrings
from rankwise.data.splits import leakage
from rankwise.errors import EnvironmentFault, UserError


@pytest.fixture(scope="module")
def both() -> tuple[Examples, Examples]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return docstrings()


def test_there_are_thousands_and_every_topic_has_its_share(both):
    train, held = both
    assert len(train) + len(held) > 4000
    assert len(held) == (len(train) + len(held)) // 5
    assert train.label_names == held.label_names == tuple(sorted(TOPICS))
    counts = Counter(train.labels)
    assert all(counts[i] > len(train) / 40 for i in range(len(TOPICS)))


def test_texts_are_clean_and_none_occurs_twice(both):
    train, held = both
    texts = train.texts + held.texts
    assert all(20 <= len(t) <= 200 and t == " ".join(t.split()) for t in texts)
    assert len({t.casefold() for t in texts}) == len(texts)
    assert leakage(train, held).count == 0


@pytest.mark.parametrize(
    ("thing", "topic"),
    [
        (shutil.copyfileobj, "files"),
        (textwrap.dedent, "text"),
        (json.JSONEncoder.iterencode, "text"),
        (inspect.getdoc, "language"),
        (warnings.formatwarning, "testing"),
        (platform.python_compiler, "language"),
    ],
)
def test_a_docstring_that_python_shows_has_its_topic(both, thing, topic):
    train, held = both
    first = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    labels = dict(zip(train.texts + held.texts, train.labels + held.labels, strict=True))
    assert train.label_names[labels[first]] == topic


def test_the_seed_sets_the_rows_and_the_version_is_told(both):
    again = docstrings()
    assert again == both
    assert again[0].fingerprint == both[0].fingerprint
    other = docstrings(seed=1)
    assert other[1].texts != both[1].texts
    assert sorted(other[0].texts + other[1].texts) == sorted(both[0].texts + both[1].texts)
    assert platform.python_version() in both[0].notes[0]
    assert platform.python_version() in both[0].source


def test_a_smaller_demo_has_as_many_rows_as_asked():
    train, held = docstrings(0, 300, 100)
    assert (len(train), len(held)) == (300, 100)
    assert docstrings(0, 500, 100)[1] == held  # more training rows leave the held-out ones alone


@pytest.mark.parametrize("rows", [(0, 10), (10, 0), (10**6, 10), (10, 10**6)])
def test_rows_that_there_are_not(rows):
    with pytest.raises(UserError, match="docstrings to share out"):
        docstrings(0, *rows)


LIBRARY = {
    "json/__init__.py": '''
        class A:
            """A class in a package, text."""
            def f(self):
                """  A method   with
                spaces.

                Second paragraph."""
        if True:
            try:
                pass
            except ValueError:
                async def g():
                    """Inside a branch of a branch."""
        def h():
            """Too short."""
        def i():
            """In two topics, so left out."""
        ''',
    "json/tests/test_x.py": 'def f():\n    """A test of the library itself."""\n',
    "queue.py": 'def f():\n    """in two topics, SO left out."""\n    "\\d"\n',
    "heapq.py": "def broken(:\n",
    "statistics.py": "# coding: latin-1\ndef f():\n    '''Caf\u00e9 in another encoding.'''\n",
    "random.py": "x = '\0'\n",
    "unlisted.py": 'def f():\n    """A module of no topic at all."""\n',
}


def test_files_are_read_as_text_and_broken_ones_skipped(tmp_path, monkeypatch):
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(textwrap.dedent(text).encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pydocs._collect.__wrapped__()
    assert sorted(found) == [
        ("A class in a package, text.", "text"),
        ("A method with spaces.", "text"),
        ("Café in another encoding.", "numbers"),
        ("Inside a branch of a branch.", "text"),
    ]


def test_a_python_without_source_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(EnvironmentFault, match="give a file with --data"):
        pydocs._collect.__wrapped__()
