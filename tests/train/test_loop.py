import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.train.evaluate import Rows
from rankwise.train.loop import Loop
from rankwise.train.model import checkpoint_blocks

CPU = torch.device("cpu")
Make = Callable[..., Loop]


def trained(loop: Loop) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in loop.parameters.items()}


def first_gradients(loop: Loop) -> dict[str, torch.Tensor]:
    """The gradients of a run of one step, as AdamW's first moment, 0.1 · g, remembers them."""
    return {n: loop.optimizer.state[p]["exp_avg"] / 0.1 for n, p in loop.parameters.items()}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rel: float) -> None:
    """Equal but for ``rel`` of the largest number of each tensor."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        atol = rel * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


def frozen_bits(model: nn.Module) -> str:
    tensors = [p.detach() for p in model.parameters() if not p.requires_grad]
    raw = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(raw).hexdigest()


# -- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("passes", [1, 2, 8])
def test_a_step_has_the_gradient_of_transformers_mean_loss(
    make: Make, task: str, passes: int
) -> None:
    """Whatever the passes, and with unequal numbers of target tokens in them."""
    shape = {"batch_size": 8 // passes, "accumulate": passes}
    loop = make(task, max_steps=1, group_by_length=False, max_grad_norm=1e9, **shape)
    model: Any = loop.model
    rows = [i for batch in loop.plan.epoch(0)[:passes] for i in batch]
    batch = loop.train_rows.batch(rows)
    counts = (batch["labels"] != -100).reshape(8, -1).sum(1)
    assert task == "classification" or len(set(counts.tolist())) > 1
    model.train()
    loss = model(**batch).loss
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in loop.parameters.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loop.run()
    close(first_gradients(loop), wanted, 2e-6)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_passes_that_are_added_up_train_like_one_large_batch(make: Make, task: str) -> None:
    at_once = make(task, batch_size=8, group_by_length=False, max_steps=5)
    in_parts = make(task, batch_size=2, accumulate=4, group_by_length=False, max_steps=5)
    before = trained(at_once)
    at_once.run()
    in_parts.run()
    close(trained(in_parts), trained(at_once), 1e-4)
    assert all(not torch.equal(before[n], p) for n, p in trained(at_once).items())


def test_gradients_are_clipped_to_the_norm(make: Make) -> None:
    free, clipped = (make(max_steps=1, max_grad_norm=n) for n in (1e9, 1e-2))
    free.run()
    clipped.run()
    norms = [
        math.sqrt(sum(g.square().sum().item() for g in first_gradients(loop).values()))
        for loop in (free, clipped)
    ]
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-2, rel=1e-3)
    scaled = {n: g * 1e-2 / norms[0] for n, g in first_gradients(free).items()}
    close(first_gradients(clipped), scaled, 1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_was_declared_changes(make: Make, checkpointing: bool) -> None:
    loop = make(max_steps=3, dropout=0.1)
    if checkpointing:
        checkpoint_blocks(loop.model)  # type: ignore[arg-type]
    names = set(loop.parameters)
    assert {n.rpartition(".")[2] for n in names} == {"lora_A", "lora_B", "weight", "bias"}
    assert all("lora_" in n or n.startswith("classifier.") for n in names)
    bits, before = frozen_bits(loop.model), trained(loop)
    loop.run()
    assert frozen_bits(loop.model) == bits
    assert all(not torch.equal(before[n], p) for n, p in trained(loop).items())


def test_gradient_checkpointing_changes_no_number(make: Make) -> None:
    plain, saving = make(max_steps=3, dropout=0.1), make(max_steps=3, dropout=0.1)
    checkpoint_blocks(saving.model)  # type: ignore[arg-type]
    for loop in (plain, saving):
        torch.manual_seed(5)
        loop.run()
    assert all(torch.equal(trained(plain)[n], p) for n, p in trained(saving).items())


def test_recomputing_changes_no_number(make: Make) -> None:
    plain, saving = make(max_steps=3, dropout=0.1), make(max_steps=3, dropout=0.1)
    assert rw.recompute_activations(saving.model).activations
    for loop in (plain, saving):
        torch.manual_seed(5)
        loop.run()
    assert all(torch.equal(trained(plain)[n], p) for n, p in trained(saving).items())


# -- the order of things --------------------------------------------------------------------------


def test_steps_evaluations_and_the_log(make: Make, look: Any) -> None:
    loop = make(epochs=1.5, eval_every=4)
    assert (loop.steps_per_epoch, loop.total) == (6, 9)
    progress = loop.run()
    log = look.log(loop.folder)
    assert [(r["event"], r["step"]) for r in log] == [
        *(("train", i) for i in (1, 2, 3, 4)),
        ("eval", 4),
        *(("train", i) for i in (5, 6, 7, 8)),
        ("eval", 8),
        ("train", 9),
        ("eval", 9),
    ]
    assert [r["epoch"] for r in log if r["step"] in (3, 9)] == [0.5, 1.5, 1.5]
    train = [r for r in log if r["event"] == "train"]
    assert all(r.keys() >= {"loss", "lr", "grad_norm", "skipped"} for r in train)
    assert [r["lr"] for r in train] == sorted([r["lr"] for r in train], reverse=True)
    evals = [r for r in log if r["event"] == "eval"]
    assert all(r.keys() >= {"accuracy", "f1", "matthews", "loss"} for r in evals)
    best = max(evals, key=lambda r: r["accuracy"])
    assert (progress.best_step, progress.best) == (best["step"], best["accuracy"])


def test_each_epoch_sees_every_row_once(make: Make) -> None:
    loop = make(epochs=2, batch_size=5, accumulate=3)
    seen: list[int] = []
    whole = loop.train_rows.batch

    class Watched(Rows):
        def batch(self, indices: list[int], *, targets: bool = False) -> dict[str, torch.Tensor]:
            seen.extend(indices)
            return whole(indices, targets=targets)

    rows = loop.train_rows
    loop.train_rows = Watched(rows.encoded, rows.task, rows.pad_id, rows.device)
    progress = loop.run()
    # 48 rows in passes of 5 are 10 passes; in steps of 3 passes, 4 steps
    assert progress.step == 8
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen[:48] != seen[48:]


def test_the_loss_falls(make: Make, look: Any) -> None:
    loop = make(epochs=8, lr=0.02)
    loop.run()
    losses = [r["loss"] for r in look.log(loop.folder) if r["event"] == "train"]
    assert sum(losses[-6:]) / 6 < 0.8 * sum(losses[:6]) / 6


def test_the_newest_checkpoints_are_kept(make: Make, look: Any) -> None:
    loop = make(epochs=4, keep_checkpoints=2)
    loop.run()
    assert [p.name for p in look.checkpoints(loop.folder)] == ["step-00000018", "step-00000024"]
