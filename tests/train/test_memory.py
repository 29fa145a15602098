"""Peak memory of a run, in processes that really hold so much."""

import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.train.memory import give_back, resident

CODE = """
import sys, torch
from rankwise.train.memory import PeakMemory
before, during = map(int, sys.argv[1:])
held = bytearray(before << 20)
for i in range(0, len(held), 4096): held[i] = 1
del held
watch = PeakMemory(torch.device("cpu"))
goes_on = PeakMemory(torch.device("cpu"), {"of": "process", "peak": 1 << 50})
held = bytearray(during << 20)
for i in range(0, len(held), 4096): held[i] = 1
found = watch.record()
print(found["of"], found["peak"] >> 20) if found else print("unknown", 0)
print(goes_on.record()["peak"] >> 20)
"""


def peaks(repository: Path, before: int, during: int) -> tuple[str, int, int]:
    words = [sys.executable, "-c", CODE, str(before), str(during)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={"PYTHONPATH": repository / "src"}
    )
    (held, peak), (earlier,) = (line.split() for line in done.stdout.splitlines())
    return held, int(peak), int(earlier)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_a_run_that_holds_more_than_ever_before_is_known(repository: Path) -> None:
    small = peaks(repository, 0, 100)
    large = peaks(repository, 0, 400)
    assert small[0] == large[0] == "process"
    assert 280 < large[1] - small[1] < 320
    assert small[2] == 1 << 30  # what was held before the run was resumed counts as well


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_a_run_below_an_earlier_peak_is_not_known(repository: Path) -> None:
    assert peaks(repository, 400, 50) == ("unknown", 0, 1 << 30)


@pytest.mark.skipif(sys.platform != "linux", reason="the system hands the peak on")
def test_what_the_starting_process_held_does_not_count(repository: Path) -> None:
    code = (
        "held = b'1' * (600 << 20); import subprocess, sys; "
        "sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"
    )
    words = [sys.executable, "-c", code, CODE, "0", "50"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={"PYTHONPATH": repository / "src"}
    )
    held, peak = done.stdout.splitlines()[0].split()
    assert held == "process"
    assert int(peak) < 600


def test_what_is_held_now_grows_and_can_be_given_back() -> None:
    before = resident()
    if before is None:
        pytest.skip("the system does not say")
    held = [bytearray(1000) for _ in range(100_000)]
    assert resident() >= before + 80_000_000
    del held
    give_back()  # no more is promised than that it may be called
