"""A small base with an embedding, blocks, a look-alike name and a head, and an adapter of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.io.adapters import save_adapter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([self.fc(self.query(x)), x[..., :2]], dim=-1)


class Tiny(nn.Module):
    """Names on purpose: ``fc`` is the end of ``blocks.0.fc``."""

    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc(x))


IDS = torch.tensor([[1, 2, 3], [4, 19, 0]])


def randomise(model: nn.Module) -> None:
    """Give everything that trains numbers of its own, as training would."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()


@pytest.fixture
def ids() -> Tensor:
    return IDS


@pytest.fixture
def base() -> Callable[..., Tiny]:
    """Makes the base; the same weights for the same seed."""
    return Tiny


@pytest.fixture
def trained() -> Callable[..., nn.Module]:
    """Makes a base with a method on it whose parameters are not those of the start."""

    def make(method: rw.LoRA | rw.HeadOnly | rw.Full | None = None) -> nn.Module:
        model = Tiny()
        rw.attach(model, method or rw.LoRA(r=2, target_modules=["query"], head="train"))
        randomise(model)
        return model.eval()

    return make


@pytest.fixture
def saved(trained, tmp_path: Path) -> Path:
    """A sound adapter folder: query of both blocks, rank 2, alpha 4, and the head."""
    return save_adapter(trained(), tmp_path / "sound")


@pytest.fixture
def spoil(saved: Path) -> Callable[..., Path]:
    """Changes the sound folder: keys of its configuration (None removes), or its tensors."""

    def change(
        tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **config: object
    ) -> Path:
        path = saved / "adapter_config.json"
        whole = {**json.loads(path.read_text("utf-8")), **config}
        path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}), "utf-8")
        if tensors is not None:
            weights = saved / "adapter_model.safetensors"
            save_file(tensors(load_file(weights)), weights)
        return saved

    return change
