"""Numbers as a reader says them."""

import math

import pytest

from rankwise.lab import words


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (words.score("accuracy", 0.74049), "74.0 %"),
        (words.score("perplexity", 12.34567), "12.35"),
        (words.score("accuracy", math.nan), "none"),
        (words.amount("accuracy", 0.0123), "1.2 points"),
        (words.amount("accuracy", 0.0123, unit=False), "1.2"),
        (words.amount("f1", 0.01234), "0.0123"),
        (words.percent(76_808 / 22_713_216), "0.338 %"),
        (words.percent(1.0), "100 %"),
        (words.percent(22_716_296 / 22_713_216), "100 %"),
        (words.duration(31.24), "31.2 s"),
        (words.duration(119.94), "119.9 s"),
        (words.duration(120), "2 min 00 s"),
        (words.duration(7265), "2 h 01 min"),
        (words.duration(math.nan), "–"),
        (words.size(999), "999 B"),
        (words.size(310_000), "310 kB"),
        (words.size(999_700), "1 MB"),
        (words.size(90_866_684), "90.9 MB"),
        (words.count(1, "layer"), "1 layer"),
        (words.count(3, "layer"), "3 layers"),
        (words.spread([3, 1, 2]), "1 to 3"),
        (words.spread([3, 3]), "3"),
        (words.listed(["a"]), "a"),
        (words.listed(["a", "b", "c"]), "a, b and c"),
        (words.plain("text"), "text"),
        (words.plain({"b": None, "a": [1, "α"]}), '{"a": [1, "α"], "b": null}'),
        (words.brief(["a", "b"]), '["a", "b"]'),
        (words.brief([f"layer.{n}" for n in range(12)]), "12 of them, layer.0 to layer.11"),
        (words.round_count(1), "1"),
        (words.round_count(1e4), "10 k"),
        (words.round_count(1e6), "1 M"),
        (words.round_count(3e9), "3 G"),
    ],
)
def test_words(said, wanted):
    assert said == wanted
