"""`rankwise combine`: the table of what is lost, worst first, and the exit code of each mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rankwise.cli.app import main
from rankwise.io.peft_alone import read_peft_alone, write_peft_alone
from rankwise.io.portable import Portable, assemble
from rankwise.lowrank import Factors

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Combine the adapters one and two of the test's folder into `out` there."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        folders = [str(tmp_path / name) for name in ("one", "two")]
        with pytest.raises(SystemExit) as caught:
            main(["combine", *folders, "--out", str(tmp_path / "out"), *map(str, words)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture(autouse=True)
def adapters(tmp_path: Path) -> list[dict[str, Factors]]:
    """Two adapters; on the layer ``same`` they are one update of rank 1, so nothing is lost."""
    A, B = torch.randn(1, 20), torch.randn(16, 1)
    made = [
        {
            "body.far": Factors(torch.randn(r, 20), torch.randn(16, r), 0.5),
            "body.same": Factors(A, B, float(r)),
        }
        for r in (3, 2)
    ]
    for name, factors in zip(("one", "two"), made, strict=True):
        write_peft_alone(Portable(assemble(factors)), tmp_path / name)
    return made


def found(tmp_path: Path) -> dict[str, torch.Tensor]:
    return {n: f.delta() for n, f in read_peft_alone(tmp_path / "out").factors.items()}


def rows(out: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[2:4]]


def test_the_weighted_sum_is_written_and_nothing_is_lost(
    call: Call, adapters: list[dict[str, Factors]], tmp_path: Path
) -> None:
    code, out, _ = call("--weights", "-1,0.5")
    assert code == 0
    for name, delta in found(tmp_path).items():
        wanted = -adapters[0][name].delta() + 0.5 * adapters[1][name].delta()
        torch.testing.assert_close(delta, wanted)
    assert [row[2:] for row in rows(out)] == [["0.0000 %", "0.0000 %"]] * 2
    assert out.splitlines()[-1] == f"adapter: {tmp_path / 'out'}"


def test_the_table_has_the_worst_layer_first_with_its_measured_error(
    call: Call, adapters: list[dict[str, Factors]], tmp_path: Path
) -> None:
    code, out, _ = call("--how", "svd", "--r", "1")
    assert code == 0
    deltas = found(tmp_path)
    wanted = adapters[0]["body.far"].delta() + adapters[1]["body.far"].delta()
    lost = 100 * ((wanted - deltas["body.far"]).norm() / wanted.norm()).item()
    (far, same) = rows(out)
    assert far[:2] == ["body.far", "1"]
    assert float(far[2].removesuffix(" %")) == pytest.approx(lost, abs=1e-3)
    assert same == ["body.same", "1", "0.0000 %", "0.0000 %"]
    assert "2 layers: " in out


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (("svd",), 3),
        (("svd", "--energy", "0.5"), None),
        (("ties", "--density", "0.2", "--r", "4"), 4),
        (("dare", "--seed", "3"), 3),
        (("dare-ties", "--r", "2"), 2),
        (("magnitude",), 3),
    ],
)
def test_every_way_is_written(
    call: Call, words: tuple[str, ...], rank: int | None, tmp_path: Path
) -> None:
    code, out, _ = call("--how", *words)
    assert code == 0
    assert "from the plain weighted sum." in out
    ranks = {f.r for f in read_peft_alone(tmp_path / "out").factors.values()}
    assert rank is None or max(ranks) == rank


def test_the_seed_decides_what_is_dropped(call: Call, tmp_path: Path) -> None:
    drawn: list[torch.Tensor] = []
    for seed in ("0", "1", "0"):
        assert call("--how", "dare", "--seed", seed)[0] == 0
        drawn.append(found(tmp_path)["body.far"])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--how", "tie"), "--how must be one of concatenate, svd, ties,"),
        (("--how", "ties", "--energy", "0.9"), "--energy does not go with --how ties."),
        (("--r", "4"), "--r does not go with --how concatenate."),
        (("--how", "svd", "--seed", "0"), "--seed does not go with --how svd."),
        (("--how", "ties", "--density", "1.5"), "density must be a number above 0"),
        (("--how", "svd", "--energy", "0"), "energy must be a number above 0"),
        (("--weights", "1,x"), "--weights must be numbers with commas between them"),
        (("--weights", "1"), "there are 1 weights for 2 adapters"),
        (("--weights", "1,nan"), "nan is not a finite number"),
        (("--head", "elsewhere"), "head names the adapter whose modules are kept"),
    ],
)
def test_mistakes_are_told(call: Call, words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()
