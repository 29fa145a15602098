"""What is alive, counted by hand on a few tensors whose sizes are known."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rankwise.lab.estimate.live import Live, Part

KB = 1024


def total(live: Live) -> int:
    return live.peak.total


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    live = Live()
    with FakeTensorMode(), live:
        a = torch.empty(256)  # 1 kB
        views = [a.view(2, 128), a[:10], a.t()]
        assert total(live) == KB
        del a
        b = torch.empty(512)
        assert total(live) == 3 * KB
        del views
        c = torch.empty(256)  # in the place of a
        assert total(live) == 3 * KB
        del b, c
        live.begin()
        assert total(live) == 0
        _ = torch.empty(256) + torch.empty(256)
        assert total(live) == 3 * KB


def test_the_peak_of_a_backward_pass_is_what_it_holds_at_once() -> None:
    """y = exp(x), z = sum(y): y is kept for backward, whose one gradient is made beside it."""
    live = Live()
    with FakeTensorMode(), live:
        x = torch.empty(256, requires_grad=True)
        live.mark([x], Part.WEIGHTS)
        x.exp().sum().backward()
        assert x.grad is not None
        # x, y and the gradient, and the sum with its own gradient, of 4 bytes each
        assert total(live) <= 3 * KB + 8
        assert live.peak.parts[Part.WEIGHTS] == KB
        live.mark([x.grad], Part.GRADIENTS)
        live.begin()
        assert live.peak.parts[Part.GRADIENTS] == KB
        assert live.peak.parts[Part.ACTIVATIONS] == 0


def test_the_busiest_moment_of_activations_need_not_be_the_peak() -> None:
    live = Live()
    with FakeTensorMode(), live:
        a = torch.empty(512)
        del a
        live.phase = Part.LOGITS
        _ = torch.empty(1024)
    assert (live.peak.total, live.peak.busiest) == (4 * KB, 2 * KB)


def test_new_tensors_belong_to_the_phase() -> None:
    live = Live()
    with FakeTensorMode(), live:
        a = torch.empty(256)
        live.phase = Part.LOGITS
        b = a * 2
        assert live.peak.parts[Part.ACTIVATIONS] == live.peak.parts[Part.LOGITS] == b.nbytes == KB


def test_a_number_that_is_asked_for_is_one() -> None:
    with FakeTensorMode(), Live():
        assert torch.empty(()).item() == 1.0
        assert isinstance(torch.empty(()).item(), float)
        assert bool(torch.empty(3).any())
        assert torch.empty((), dtype=torch.int64).item() == 1
