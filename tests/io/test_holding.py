"""Each thing that a format or a reader cannot hold is refused by it, with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rankwise.errors import UserError
from rankwise.io.holding import FORMATS, READERS, Form, Reader, demand, refusals
from rankwise.io.portable import Kernel, Portable, assemble
from rankwise.lowrank import Factors

PLAIN = {"q": Factors(torch.randn(2, 5), torch.randn(6, 2), 1.0)}
EXPERTS = {"q": Factors(torch.randn(3, 2, 5), torch.randn(3, 6, 2), 1.0)}
TARGETS: dict[str, Form | Reader] = {**FORMATS, **READERS}


def tied() -> Portable:
    adapter = assemble(PLAIN)
    return Portable(replace(adapter, method=replace(adapter.method, tied=True)))


THINGS = {
    "banks": Portable(assemble(EXPERTS)),
    "biases": Portable(assemble(PLAIN, biases={"q.bias": torch.ones(6)})),
    "convolutions": Portable(assemble(PLAIN), kernels={"q": Kernel((5, 1, 1))}),
    "embeddings": Portable(assemble(PLAIN), embeddings=frozenset({"q"})),
    "groups": Portable(assemble(PLAIN), kernels={"q": Kernel((5, 1, 1), 2)}),
    "kernels": Portable(assemble(PLAIN), kernels={"q": Kernel((1, 5, 1))}),
    "magnitudes": Portable(assemble(PLAIN, magnitudes={"q": torch.ones(6)})),
    "modules": Portable(assemble(PLAIN, modules=["head"])),
    "tied": tied(),
}
# What holds more than A and B of linear layers, by what we read in the sources of each.
HELD = {
    "peft": {"biases", "convolutions", "embeddings", "groups", "kernels", "magnitudes", "modules"},
    "loralib": {"convolutions", "embeddings", "groups", "modules"},
    "mlx": {"embeddings", "magnitudes", "tied"},  # tied only where the base is, see test_mlx.py
    "kohya": {"convolutions", "kernels", "magnitudes"},
    "diffusers": {"convolutions", "kernels", "magnitudes"},
    "gguf": {"embeddings"},
    "vllm": {"embeddings"},
    "sglang": {"embeddings"},
    "llama.cpp": {"embeddings"},
    "tgi": set[str](),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_plain_update_is_held_by_all(name: str):
    demand(Portable(assemble(PLAIN)), TARGETS[name])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("thing", THINGS)
def test_the_rest_is_held_or_refused_with_a_reason(name: str, thing: str):
    said = list(refusals(THINGS[thing], TARGETS[name]))
    if thing in HELD[name]:
        assert said == []
        return
    assert said
    with pytest.raises(UserError, match="cannot hold this adapter"):
        demand(THINGS[thing], TARGETS[name])
    assert all("rankwise.merge" in words or "rankwise.load_adapter" in words for words in said)


def test_vllm_takes_a_classification_head():
    for module, words in (("model.score", 0), ("classifier", 0), ("lm_head", 1)):
        portable = Portable(assemble(PLAIN, modules=[module]))
        assert len(list(refusals(portable, READERS["vllm"]))) == words


def test_all_reasons_are_told_at_once():
    adapter = assemble(PLAIN, modules=["a", "b", "c"], magnitudes={"q": torch.ones(6)})
    with pytest.raises(UserError, match=r"(?s)DoRA magnitudes \('q'\).*\('a' and 2 more\)"):
        demand(Portable(adapter), FORMATS["gguf"])
