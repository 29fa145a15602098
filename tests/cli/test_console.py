"""Tables align, and progress as lines says how much time is left."""

from __future__ import annotations

import pytest

from rankwise.cli import console


def test_a_table_aligns_text_left_and_numbers_right() -> None:
    drawn = console.table(["layer", "r"], [["a.query", "8"], ["b", "16"]])
    assert drawn.splitlines() == [
        "layer     r",
        "-------  --",
        "a.query   8",
        "b        16",
    ]


def test_lines_are_shown_every_so_often_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 0.0, 5.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    lines = console.Lines()
    lines.start("training", 100)
    lines.advance(10, {"loss": 1.0})
    lines.advance(25, {"loss": 0.5})
    lines.finish()
    assert capsys.readouterr().err.splitlines() == ["training 25/100  loss 0.5  1:00 left"]


def test_where_there_is_no_terminal_there_are_lines() -> None:
    assert isinstance(console.make_reporter(), console.Lines)


def test_the_bar_shows_notes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    bar = console.Bar()
    bar.start("training", 2)
    bar.advance(1, {"loss": 0.25})
    bar.note("a [note] with brackets")
    bar.advance(2, {"loss": 0.125})
    bar.finish()
    told = capsys.readouterr().err
    assert "a [note] with brackets" in told
    assert "training" in told


def test_long_times_have_hours() -> None:
    assert console._clock(59.6) == "1:00"
    assert console._clock(3725) == "1:02:05"
