"""The garbage collector waits while an adapter is attached or loaded, and goes on afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import rankwise as rw
from rankwise.attaching.collector import uncollected


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that are collected while the test runs."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_nothing_is_collected_while_an_adapter_is_attached_or_loaded(
    collections: list[int], tmp_path: Path
) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    method = rw.LoRA(r=1, target_modules=[str(i) for i in range(200)])
    collections.clear()
    rw.attach(model, method)
    assert collections == []
    rw.save_adapter(model, tmp_path)
    rw.detach(model)
    collections.clear()
    rw.load_adapter(model, tmp_path)
    assert collections == []
    assert gc.isenabled()


def test_it_goes_on_after_a_failure_and_stays_off_where_it_was_off() -> None:
    @uncollected
    def fails() -> None:
        assert not gc.isenabled()
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        fails()
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="as asked"):
            fails()
        assert not gc.isenabled()
    finally:
        gc.enable()
