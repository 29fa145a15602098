"""`rankwise trim` as a command: its promises, its table, and the change of the metric."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.cli.app import main
from rankwise.io.peft_alone import read_peft_alone

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], finished: Callable[[str], Path], tmp_path: Path
) -> Call:
    def run(*words: str | Path, adapter: Path | None = None) -> tuple[int, str, str]:
        source = adapter or finished("single")
        with pytest.raises(SystemExit) as caught:
            main(["trim", str(source), "--out", str(tmp_path / "cut"), *map(str, words)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--r", "1"), "the best of that rank"),
        (("--energy", "0.9"), "the largest σ² over all layers"),
        (("--max-error", "0.3"), "no adapter that keeps this is smaller"),
        (("--budget", "0.2k"), "no adapter within the budget is nearer"),
        (("--prefix", "1"), "as they were trained"),
    ],
)
def test_every_promise_writes_an_adapter(
    call: Call, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    code, out, err = call(*words)
    assert code == 0, err
    assert told in out
    found = read_peft_alone(tmp_path / "cut").factors
    counted = sum(f.count() for f in found.values())
    assert f"parameters became {counted:,}" in out
    assert out.splitlines()[-1] == f"adapter: {tmp_path / 'cut'}"
    if "--budget" in words:
        assert counted <= 200


def test_the_metric_of_a_run_is_measured_beside_the_error(call: Call, rows: Path) -> None:
    code, out, err = call("--energy", "0.9", "--data", rows / "dev.tsv")
    assert code == 0, err
    assert re.search(r"^measured on 21 rows: accuracy .* → .* noise\.$", out, flags=re.MULTILINE)


def test_another_adapter_needs_the_name_of_its_base(
    call: Call, finished: Callable[[str], Path], rows: Path, bert: Path
) -> None:
    adapter = finished("single") / "adapter"
    code, _, err = call("--r", "1", "--data", rows / "dev.tsv", adapter=adapter)
    assert code == 2
    assert "--model MODEL" in err
    code, out, err = call("--r", "1", "--data", rows / "dev.tsv", "--model", bert, adapter=adapter)
    assert code == 0, err
    assert "measured on 21 rows" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "got nothing"),
        (("--r", "1", "--energy", "0.9"), "got --r and --energy"),
        (("--budget", "many"), "--budget must be a number"),
        (("--budget", "3"), "the smallest has 64"),
        (("--energy", "1.5"), "above 0 and at most 1"),
        (("--r", "0"), "r must be a whole number"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    call: Call, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert told in err
    assert not (tmp_path / "cut").exists()
