"""Places for starts, made without the layers above, and a small net that has been looked at."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.inits import Place


def place(module: nn.Module, r: int = 4, name: str = "layer", **other: Any) -> Place:
    """The place of a whole module's weight, or of some of its rows."""
    stored = module.weight
    assert isinstance(stored, Tensor)
    turned = isinstance(module, (nn.Embedding, Conv1D))
    rows = other.get("rows")

    def weight() -> Tensor:
        matrix = stored.detach().mT if turned else stored.detach().flatten(1)
        return matrix if rows is None else matrix[list(rows) if isinstance(rows, tuple) else rows]

    meta = torch.empty_like(stored, device="meta")
    matrix = meta.mT if turned else meta.flatten(1)
    out = matrix.shape[0] if rows is None else torch.arange(matrix.shape[0])[rows,].numel()
    given: dict[str, Any] = {
        "name": name,
        "module": module,
        "weight": weight,
        "out_features": out,
        "in_features": matrix.shape[1],
        "r": r,
        "scale": 2.0,
        "dtype": torch.promote_types(stored.dtype, torch.float32),
        "device": stored.device,
        "lookup": isinstance(module, nn.Embedding),
    }
    return Place(**{**given, **other})


def bank(weight: Tensor, r: int = 4, **other: Any) -> Place:
    """The place of a bank of weights (E, out, in)."""
    given: dict[str, Any] = {
        "name": "experts.gate_up_proj",
        "module": nn.Module(),
        "weight": lambda: weight,
        "out_features": weight.shape[1],
        "in_features": weight.shape[2],
        "r": r,
        "scale": 2.0,
        "dtype": weight.dtype,
        "device": weight.device,
        "bank": weight.shape[0],
    }
    return Place(**{**given, **other})


class Net(nn.Module):
    """Ids (N, T) → class scores (N, 3): an embedding, three layers on one input, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.fused = Conv1D(24, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Tensor) -> Any:
        x = self.embed(input_ids)
        x = x + self.v(x) * torch.sigmoid(self.q(x) * self.k(x))
        a, b = self.fused(self.drop(x)).tanh().chunk(2, -1)
        x = self.norm((x + (a @ b.mT).softmax(-1) @ x).mean(1))
        scores = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return {"loss": loss, "logits": scores}


@pytest.fixture
def net() -> Net:
    """A net with running statistics and modes of its own, half of it frozen."""
    torch.manual_seed(5)
    made = Net()
    made(torch.randint(1, 30, (8, 5)))
    made.q.eval()
    for parameter in (*made.embed.parameters(), *made.k.parameters()):
        parameter.requires_grad_(False)
    made.v.weight.grad = torch.ones_like(made.v.weight)
    return made


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Three batches with padding and labels."""
    found: list[dict[str, Tensor]] = []
    for seed, rows in enumerate((12, 7, 16)):
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 30, (rows, 6), generator=made)
        length = torch.randint(2, 7, (rows, 1), generator=made)
        mask = torch.arange(6) < length
        labels = torch.randint(0, 3, (rows,), generator=made)
        found.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels})
    return found


@pytest.fixture(scope="session")
def place_of() -> Callable[..., Place]:
    return place


@pytest.fixture(scope="session")
def bank_of() -> Callable[..., Place]:
    return bank


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], Callable[[], None]]:
    """Take down all that a model is; the function that is given asserts that it still is that."""

    def take(model: nn.Module) -> Callable[[], None]:
        tensors = {
            name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()
        }
        parameters = [
            (p, p.requires_grad, None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ]
        modes = [(m, m.training) for m in model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        random = torch.get_rng_state()

        def check() -> None:
            now = model.state_dict(keep_vars=True)
            assert now.keys() == tensors.keys()
            for name, (tensor, copy, version) in tensors.items():
                assert now[name] is tensor
                assert torch.equal(tensor, copy)
                assert tensor._version == version
            for parameter, asks, grad in parameters:
                assert parameter.requires_grad == asks
                if grad is None:
                    assert parameter.grad is None
                else:
                    assert parameter.grad is not None
                    assert torch.equal(parameter.grad, grad)
            assert [(m, m.training) for m in model.modules()] == modes
            assert hooks == [
                len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
            ]
            assert torch.equal(torch.get_rng_state(), random)
            assert torch.backends.mha.get_fastpath_enabled()

        return check

    return take
