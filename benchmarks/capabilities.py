"""Which kind of layer can do what: every cell of the table is run, then the table is printed.

`python benchmarks/capabilities.py > docs/capabilities.md`
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kinds import ROWS, Model, Row, an_input, new_base
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.attaching import updates_of
from rankwise.errors import UserError
from rankwise.layers import LoRALayer, Offset, rounds_inputs

__all__ = ["FEATURES", "ROWS", "Answer", "page", "run"]

YES = "yes"

HEAD = """\
# What can be done to which layer

Every cell was run: the layer was adapted and trained, and what came of it was compared with the
base, with a second way to the same numbers, and bit for bit where that is promised. A "no" is a
`UserError` that leaves the model as it was, "noted" a sentence in `attach(...).notes`; the words of
both stand below the table. For LoftQ a base that is not quantised was rounded to steps of 1/8;
"compile" is one graph (`fullgraph=True`), "autocast" is bfloat16 on a CPU.

`python benchmarks/capabilities.py` prints this page, and `tests/contract/test_capabilities.py`
compares it with what the code does.
"""


# --- what is done to them ------------------------------------------------------------------------


def _attach(row: Row, model: nn.Module, **options: Any) -> rw.Attachment:
    """Attach LoRA; a refusal must leave the model as it was."""
    asked = {"r": 2, "alpha": 4, "target_modules": [row.target], "head": "freeze", **row.options}
    before = [(n, id(m)) for n, m in model.named_modules()]
    tensors = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    try:
        return rw.attach(model, rw.LoRA(**(asked | options)))
    except UserError:
        _must([(n, id(m)) for n, m in model.named_modules()] == before, "refused, yet changed")
        _must(tensors == {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}, "...")
        raise


def _must(condition: bool, words: str) -> None:
    if not condition:
        raise AssertionError(words)


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).detach().clone()


def _near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


def _learns(row: Row, model: nn.Module, start: Tensor | None = None) -> None:
    """The adapted model starts as the base, learns what another update of its kind does, and only
    what is declared changes.
    """
    x = an_input(row)
    y0 = _outputs(new_base(row, tied=model.twin is not None), x) if start is None else start
    if start is None:
        _must(torch.equal(_outputs(model, x), y0), "step 0 is not the base")
    teacher = copy.deepcopy(model)
    _moved(teacher)
    goal = _outputs(teacher, x)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: _numbers(p) for n, p in model.named_parameters() if n not in trained}
    declared = {id(p) for u in updates_of(model).values() for p in u.trained()}
    _must({id(p) for p in trained.values()} == declared, "other parameters train than declared")
    optimizer = torch.optim.Adam(list(trained.values()), lr=0.02)
    model.train()
    losses: list[float] = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), goal)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    _must(losses[-1] < 0.9 * losses[0], "it does not learn")
    _must(all(bool(p.grad.any()) for p in trained.values() if p.grad is not None), "no gradient")
    _must(not _near(_outputs(model, x), y0), "no effect")
    now = dict(model.named_parameters())
    same = all(torch.equal(_numbers(now[n]), p) for n, p in frozen.items())
    _must(same, "a frozen parameter changed")


def _numbers(parameter: Tensor) -> Tensor:
    """A copy of what a parameter holds; of torchao's, what its numbers stand for."""
    plain = type(parameter) is nn.Parameter or parameter.dtype is not torch.float32
    return (parameter.detach() if plain else parameter.detach().dequantize()).clone()


def _moved(model: nn.Module, seed: int = 8) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates_of(model).values():
            for p in update.trained():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def train(row: Row) -> None:
    model = new_base(row)
    _attach(row, model)
    _learns(row, model)


def dropout(row: Row) -> str | None:
    model, x = new_base(row), an_input(row)
    record = _attach(row, model, dropout=0.5)
    noted = [note for note in record.notes if "dropout" in note]
    if noted:
        return noted[0]
    _moved(model)
    model.train()
    _must(not torch.equal(_outputs(model, x), _outputs(model, x)), "nothing is dropped")
    model.eval()
    _must(torch.equal(_outputs(model, x), _outputs(model, x)), "dropped in evaluation")
    return None


def dora(row: Row) -> None:
    model = new_base(row)
    _attach(row, model, dora=True)
    _learns(row, model)


def _started(init: Any) -> Callable[[Row], None]:
    def check(row: Row) -> None:
        model = new_base(row)
        _attach(row, model, init=init(row))
        _learns(row, model)

    return check


def _batches(row: Row) -> list[Tensor]:
    return [an_input(row, seed) for seed in (1, 2, 3)]


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    return F.mse_loss(y, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))


def loftq(row: Row) -> None:
    """Step 0 is nearer to the model before quantisation (here rounded to steps of 1/8)."""
    x = an_input(row)
    torch.manual_seed(3)
    original = Model(row.make()).requires_grad_(False).eval()
    model = new_base(row)
    if row.packed is None:
        coarse = model.get_parameter(row.weight)
        coarse.copy_((coarse * 8).round() / 8)
    wanted, coarse_outputs = _outputs(original, x), _outputs(model, x)
    _attach(row, model, init=rw.LoftQ(original), r=4)
    start = _outputs(model, x)
    _must((start - wanted).norm() < (coarse_outputs - wanted).norm(), "not nearer")
    _learns(row, model, start)


def lora_fa(row: Row) -> None:
    model = new_base(row)
    _attach(row, model, freeze_A=True)
    before = {n: u.lora_A.detach().clone() for n, u in updates_of(model).items()}
    _learns(row, model)
    _must(all(torch.equal(updates_of(model)[n].lora_A, A) for n, A in before.items()), "A moved")


def bias(row: Row) -> None:
    model = new_base(row)
    _attach(row, model, bias="adapted")
    offsets = [u for u in updates_of(model).values() if isinstance(u, Offset)]
    _must(bool(offsets), "no bias trains")
    _learns(row, model)


def tied(row: Row) -> None:
    model, x = new_base(row, tied=True), an_input(row)
    _attach(row, model, tied=True)
    _learns(row, model)
    if isinstance(model.layer, LoRALayer) and rounds_inputs(model.layer.base_layer):
        return  # such a layer is not merged, tied or not
    merged = copy.deepcopy(model)
    rw.merge(merged, keep=False, probe=x)
    twin = row.weight.replace("layer", "twin", 1)
    one, other = merged.get_parameter(row.weight), merged.get_parameter(twin)
    _must(one.data_ptr() == other.data_ptr(), "merged apart")
    _must(_near(_outputs(merged, x), _outputs(model, x)), "merged otherwise")


def hotswap(row: Row) -> None:
    donor, model, x = new_base(row), new_base(row), an_input(row)
    _attach(row, donor, r=3, alpha=5)
    _moved(donor)
    _attach(row, model, slot=4)
    parts = {n: id(m) for n, m in model.named_modules()}
    rw.hotswap(model, rw.adapter_of(donor))
    _must({n: id(m) for n, m in model.named_modules()} == parts, "modules changed")
    _must(_near(_outputs(model, x), _outputs(donor, x)), "another function")


def merge(row: Row) -> None:
    model, x = new_base(row), an_input(row)
    _attach(row, model)
    _moved(model)
    y, base = _outputs(model, x), _outputs(new_base(row), x)
    _must(not _near(y, base), "no effect")
    _must(rw.merge(model, probe=x).passed, "no certificate")
    _must(_near(_outputs(model, x), y), "merged is another function")
    rw.unmerge(model)
    _must(torch.equal(_outputs(model, x), y), "unmerged in other bits")
    rw.detach(model)
    _must(torch.equal(_outputs(model, x), base), "detached in other bits")


def save(row: Row) -> None:
    model, again, x = new_base(row), new_base(row), an_input(row)
    _attach(row, model)
    _moved(model)
    with tempfile.TemporaryDirectory() as folder:
        rw.save_adapter(model, f"{folder}/adapter")
        rw.load_adapter(again, f"{folder}/adapter")
    _must(torch.equal(_outputs(again, x), _outputs(model, x)), "loaded in other bits")


def compiled(row: Row) -> None:
    model, x = new_base(row), an_input(row)
    _attach(row, model)
    _moved(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)
    _must(_near(_outputs(found, x), _outputs(model, x)), "compiled is another function")


def autocast(row: Row) -> None:
    model, x = new_base(row), an_input(row)
    _attach(row, model)
    with torch.autocast("cpu", torch.bfloat16):
        y0, start = _outputs(new_base(row), x), _outputs(model, x)
    _must(start.dtype == y0.dtype and torch.equal(start, y0), "step 0 is not the base")
    _moved(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    _must(y.dtype == y0.dtype, "another dtype")
    _must(_near(y.detach(), _outputs(model, x), 0.05), "far from float32")
    y.float().square().sum().backward()
    _must(all(p.grad is not None for p in model.parameters() if p.requires_grad), "no gradient")


FEATURES: dict[str, Callable[[Row], str | None]] = {
    "train": train,
    "dropout": dropout,
    "DoRA": dora,
    "Orthogonal": _started(lambda _: rw.Orthogonal()),
    "PiSSA": _started(lambda _: rw.PiSSA()),
    "OLoRA": _started(lambda _: rw.OLoRA()),
    "EVA": _started(lambda row: rw.EVA(_batches(row))),
    "LoRA-GA": _started(lambda row: rw.LoRAGA(_batches(row), loss=_loss)),
    "LoftQ": loftq,
    "LoRA-FA": lora_fa,
    "bias": bias,
    "tied": tied,
    "slot, hotswap": hotswap,
    "merge, unmerge": merge,
    "save, load": save,
    "compile": compiled,
    "autocast": autocast,
}


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came of a cell: yes, or no or noted with the words."""

    word: str
    reason: str = ""


def run(row: str, feature: str) -> Answer:
    """Run one cell; what goes wrong in another way than by a refusal is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' own
        try:
            note = FEATURES[feature](ROWS[row])
        except UserError as error:
            return Answer("no", " ".join(str(error).split()))
    return Answer("noted", note) if note else Answer(YES)


def page() -> str:
    """The whole page, every cell run."""
    reasons: dict[str, int] = {}
    lines = [
        "| | " + " | ".join(FEATURES) + " |",
        "|---" * (1 + len(FEATURES)) + "|",
    ]
    for row in ROWS:
        cells: list[str] = []
        for feature in FEATURES:
            answer = run(row, feature)
            number = reasons.setdefault(answer.reason, len(reasons) + 1) if answer.reason else None
            cells.append(answer.word if number is None else f"{answer.word} ({number})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([HEAD, *lines, "", *listed]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
