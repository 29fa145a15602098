import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.attaching import attach
from rankwise.data.encode import encode, padding_id
from rankwise.data.examples import load_examples
from rankwise.errors import ArtifactError, EnvironmentFault, UserError
from rankwise.methods.lora import LoRA
from rankwise.train.config import FitConfig
from rankwise.train.evaluate import Rows
from rankwise.train.loop import Loop
from rankwise.train.model import load_base, recompute_activations

CPU = torch.device("cpu")
Make = Callable[..., Loop]


@pytest.fixture
def make(
    tmp_path: Path, options: Callable[..., FitConfig], gpt2: Path, rows: Path, witness: Any
) -> Make:
    """A loop over the labelled sentences or the prompts, its model always the same at the start."""
    count = iter(range(100))

    def build(task: str = "classification", dropout: float = 0.0, **more: Any) -> Loop:
        out = tmp_path / f"run{next(count)}"
        out.mkdir()
        if task == "causal-lm":
            files = {
                n: str(rows / f"{f}-prompts.jsonl") for n, f in (("data", "train"), ("eval", "dev"))
            }
            more = {"model": str(gpt2), "task": task, **files, **more}
        config = options(out, **more)
        torch.manual_seed(0)
        train = load_examples(config.data, config.task)
        held = load_examples(str(config.eval), config.task, label_names=train.label_names or None)
        base = load_base(config.model, train.task, train.label_names)
        both = [
            Rows(encode(e, base.tokenizer, 64), e.task, padding_id(base.tokenizer), CPU)
            for e in (train, held)
        ]
        for module in base.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        attach(base.model, LoRA(r=2, dropout=dropout))
        with torch.no_grad():  # with B at zero, A would have no gradient in the first step
            for name, parameter in base.model.named_parameters():
                if name.endswith("lora_B"):
                    nn.init.normal_(parameter, std=0.1)
        metric = "accuracy" if train.task == "classification" else "perplexity"
        saved = [0]
        loop = Loop(
            base.model, both[0], both[1], config, metric, out, lambda: saved.append(1), witness
        )
        return loop

    return build


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
        recompute_activations(loop.model)  # type: ignore[arg-type]
    names = set(loop.parameters)
    assert {n.rpartition(".")[2] for n in names} == {"lora_A", "lora_B", "weight", "bias"}
    assert all("lora_" in n or n.startswith("classifier.") for n in names)
    bits, before = frozen_bits(loop.model), trained(loop)
    loop.run()
    assert frozen_bits(loop.model) == bits
    assert all(not torch.equal(before[n], p) for n, p in trained(loop).items())


def test_gradient_checkpointing_changes_no_number(make: Make) -> None:
    plain, saving = make(max_steps=3, dropout=0.1), make(max_steps=3, dropout=0.1)
    recompute_activations(saving.model)  # type: ignore[arg-type]
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
        def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
            seen.extend(indices)
            return whole(indices)

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
