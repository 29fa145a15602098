"""Peak memory of a run, in a process that really holds so much."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise.train.memory import give_back, resident

HELD = (100, 400, 50)  # MB, by one run after another

# In a process of its own, as one that has lived for long may have held more, and may have much free
# memory that what is asked for goes into. The one that starts it holds 600 MB.
PARENT = """
import subprocess, sys
held = b"1" * (600 << 20)
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
CHILD = """
import json, sys, torch
from rankwise.train.memory import PeakMemory, give_back, resident
told = {"runs": []}
for size in json.loads(sys.argv[1]):
    watch = PeakMemory(torch.device("cpu"))
    goes_on = PeakMemory(torch.device("cpu"), {"of": "process", "peak": 1 << 50})
    held = bytearray(size << 20)
    for i in range(0, len(held), 4096): held[i] = 1
    told["runs"].append([watch.record(), goes_on.record()])
    del held
before = resident()
held = [bytearray(1000) for _ in range(100_000)]
told["grown"] = resident() - before
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(repository: Path) -> dict[str, Any]:
    """What runs in one process, each holding so much, recorded of themselves."""
    if resident() is None:
        pytest.skip("the system does not say")
    done = subprocess.run(
        [sys.executable, "-c", PARENT, CHILD, json.dumps(HELD)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": repository / "src"},
    )
    return json.loads(done.stdout)


def test_a_run_that_holds_more_than_ever_before_is_known(told: dict[str, Any]) -> None:
    small, large = (watch for watch, _ in told["runs"][:2])
    assert small["of"] == large["of"] == "process"
    assert 280 < (large["peak"] - small["peak"]) >> 20 < 320


def test_a_run_below_an_earlier_peak_is_not_known(told: dict[str, Any]) -> None:
    assert told["runs"][2][0] is None


def test_what_was_held_before_a_run_was_resumed_counts_as_well(told: dict[str, Any]) -> None:
    """Whether or not its own peak is known."""
    assert [goes_on for _, goes_on in told["runs"]] == [{"of": "process", "peak": 1 << 50}] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the system hands the peak on")
def test_what_the_starting_process_held_does_not_count(told: dict[str, Any]) -> None:
    assert told["runs"][0][0]["peak"] >> 20 < 600


def test_what_is_held_now_grows(told: dict[str, Any]) -> None:
    assert told["grown"] >= 80_000_000


def test_what_was_freed_can_be_given_back() -> None:
    give_back()  # no more is promised than that it may be called
