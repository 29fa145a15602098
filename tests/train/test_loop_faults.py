import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.train.loop import Loop

CPU = torch.device("cpu")
Make = Callable[..., Loop]


def trained(loop: Loop) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in loop.parameters.items()}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rel: float) -> None:
    """Equal but for ``rel`` of the largest number of each tensor."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        atol = rel * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


# -- what is not finite ---------------------------------------------------------------------------


def spoil(model: nn.Module, calls: set[int], how: str) -> None:
    """Make the loss, or only the gradient, NaN in these calls of training (from 1)."""
    count = [0]

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if not module.training:
            return
        count[0] += 1
        if count[0] in calls and how == "loss":
            output.logits = output.logits * math.nan
        elif count[0] in calls:
            output.logits.register_hook(lambda gradient: gradient * math.inf)

    model.register_forward_hook(hook)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(
    make: Make, look: Any, witness: Any, how: str
) -> None:
    loop = make(max_steps=6)
    spoil(loop.model, {2, 4, 5}, how)
    progress = loop.run()
    assert (progress.step, progress.skipped, progress.skipped_in_row) == (6, 3, 0)
    train = [r for r in look.log(loop.folder) if r["event"] == "train"]
    assert [r["skipped"] for r in train] == [0, 1, 1, 2, 3, 3]
    assert [r["loss"] is None for r in train] == [False, True, False, True, True, False]
    assert [r["grad_norm"] is None for r in train] == [False, True, False, True, True, False]
    assert witness.shown[-1][1]["skipped"] == 3
    assert all(p.isfinite().all() for p in loop.parameters.values())
    moments = [t for s in loop.optimizer.state.values() for t in s.values()]
    assert all(t.isfinite().all() for t in moments)
    assert {s["step"].item() for s in loop.optimizer.state.values()} == {3.0}


def test_a_skipped_step_changes_nothing(make: Make) -> None:
    """A run whose second step is skipped ends with the weights that it had after the first."""
    loop = make(max_steps=2)
    spoil(loop.model, {2}, "gradient")
    after_first: list[dict[str, torch.Tensor]] = []

    def remember(module: nn.Module, *_: Any) -> None:
        if module.training:
            after_first[:] = [trained(loop)]  # as the second step begins

    loop.model.register_forward_pre_hook(remember)
    before = trained(loop)
    loop.run()
    assert all(torch.equal(p, after_first[0][n]) for n, p in trained(loop).items())
    assert all(not torch.equal(p, before[n]) for n, p in trained(loop).items())


def test_the_run_ends_after_so_many_in_a_row(make: Make) -> None:
    loop = make(epochs=3, max_skipped=3)
    spoil(loop.model, {2, 3, 5, 6, 7}, "loss")
    with pytest.raises(
        UserError, match=r"step 7: .*not a finite number for 3 steps.*--lr"
    ) as caught:
        loop.run()
    assert caught.value.exit_code == 2
    assert loop.progress.step == 7


def test_a_run_of_which_no_step_was_finite_is_no_success(make: Make) -> None:
    loop = make(max_steps=3, max_skipped=10)
    spoil(loop.model, {1, 2, 3}, "loss")
    with pytest.raises(UserError, match="not a finite number for 3 steps"):
        loop.run()


# -- memory ---------------------------------------------------------------------------------------


def no_room(model: nn.Module, refuse: Callable[[int, int], bool]) -> list[int]:
    """Run out of memory at the end of the training passes where ``refuse(call, rows)``.

    Dropout has been drawn by then. Returns the sizes of the passes that ran.
    """
    sizes: list[int] = []
    count = [0]

    def hook(module: nn.Module, _: Any, batch: dict[str, Any], output: Any) -> None:
        if not module.training:
            return
        count[0] += 1
        if refuse(count[0], len(batch["input_ids"])):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch["input_ids"]))

    model.register_forward_hook(hook, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_pass_that_does_not_fit_is_halved_and_learns_the_same(
    make: Make, witness: Any, task: str
) -> None:
    whole, small = make(task, max_steps=4), make(task, max_steps=4)
    sizes = no_room(small.model, lambda _, rows: rows > 3)
    whole.run()
    progress = small.run()
    assert progress.micro_batch == 2
    assert set(sizes) == {2}
    close(trained(small), trained(whole), 1e-4)
    assert "Memory ran out at step 1: passes now hold 4 rows instead of 8" in witness.text
    assert "--batch-size 2 --accumulate 4" in witness.text


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_step_that_fails_half_way_starts_anew(make: Make, call: int) -> None:
    """Gradients of the passes before the failure are not counted twice."""
    shape = {"batch_size": 4, "accumulate": 2, "max_steps": 2, "group_by_length": False}
    whole, once = make(**shape), make(**shape)
    no_room(once.model, lambda n, _: n == call)
    whole.run()
    progress = once.run()
    assert progress.micro_batch == 2
    close(trained(once), trained(whole), 1e-4)


def test_a_failure_leaves_no_trace_in_the_generators(make: Make) -> None:
    """With dropout, a step that fell back to single rows is one that had them from the start."""
    straight, fallen = (make(max_steps=2, batch_size=2, dropout=0.1) for _ in range(2))
    straight.progress = replace(straight.progress, micro_batch=1)
    no_room(fallen.model, lambda _, rows: rows > 1)
    for loop in (straight, fallen):
        torch.manual_seed(3)
        loop.run()
    assert all(torch.equal(trained(straight)[n], p) for n, p in trained(fallen).items())


def test_a_single_row_that_does_not_fit_says_what_helps(make: Make) -> None:
    loop = make()
    no_room(loop.model, lambda *_: True)
    with pytest.raises(EnvironmentFault, match=r"--gradient-checkpointing.*--max-length") as caught:
        loop.run()
    assert caught.value.exit_code == 4


def test_other_errors_pass_through(make: Make) -> None:
    loop = make()

    def hook(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    loop.model.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        loop.run()


# -- going on -------------------------------------------------------------------------------------


def test_a_loop_goes_on_where_another_stopped(make: Make, look: Any) -> None:
    whole = make(epochs=2, dropout=0.1)
    torch.manual_seed(9)
    whole.run()
    part, rest = make(epochs=2, dropout=0.1), make(epochs=2, dropout=0.1)
    torch.manual_seed(9)
    stop_after(part, 7)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    rest.folder = part.folder
    rest.resume()
    assert rest.progress.step == 6  # the checkpoint at the end of the first epoch
    progress = rest.run()
    assert progress.step == 12
    assert all(torch.equal(trained(whole)[n], p) for n, p in trained(rest).items())
    assert look.log(rest.folder) == look.log(whole.folder)


def stop_after(loop: Loop, steps: int) -> None:
    count = [0]

    def hook(module: nn.Module, *_: Any) -> None:
        count[0] += module.training
        if count[0] > steps:
            raise KeyboardInterrupt

    loop.model.register_forward_pre_hook(hook)


def test_without_a_checkpoint_it_starts_at_the_start(make: Make, witness: Any) -> None:
    loop = make()
    (loop.folder / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    loop.resume()
    assert loop.progress.step == 0
    assert (loop.folder / "metrics.jsonl").read_text() == ""
    assert "No checkpoint was written; starting again from step 0." in witness.text


def test_a_log_that_lost_its_end_is_not_filled_with_zeros(make: Make) -> None:
    loop = make(epochs=1)
    loop.run()
    log = loop.folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:50])
    loop.resume()
    assert b"\0" not in log.read_bytes()


def test_damaged_checkpoints_alone_are_no_start(make: Make, look: Any) -> None:
    loop = make(epochs=1)
    loop.run()
    for folder in look.checkpoints(loop.folder):
        (folder / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot go on"):
        loop.resume()
