"""Damage at random: whatever a folder holds, one of our errors comes out and the model is whole."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise as rw
from peft_models import lora, randomise
from rankwise.errors import RankwiseError
from rankwise.inits import PiSSA
from rankwise.io.adapters import load_adapter, save_adapter
from zoo import EVERYTHING, Zoo

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUNDS = 120
SPLIT = {"fused": rw.Split(("q_proj", "k_proj", "v_proj"))}
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(
        "",
        "x",
        "(",
        "*",
        "weight",
        "fused",
        "packed.q_proj",
        "\0",
        "a" * 5000,
        "é",
        "..",
        "[[",
        "NaN",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [1, 2],
        ["x", 3],
        {"a": {}},
        {"": 1},
        {"out": "tokens"},
        [2**70],
        ["tokens"],
    ),
    *("a{999999}", "(?:a|b", "(?P<x>.)(?P=x)", "tokens|mix", ".*", ["fused", "mix"], {"mix": 7}),
]


def make() -> Zoo:
    torch.manual_seed(1)
    return Zoo().eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with everything that a folder can hold."""
    names = [name for name in EVERYTHING if name != "fused"]
    methods = [
        lora(*names, "fused.k_proj", "fused.v_proj", split=SPLIT, tied=True, r=2),
        lora("mix", "packed.v_proj", "turn", dora=True, bias="adapted", init=PiSSA(), r=2),
        lora("keys", "values", bias="all", trainable_tokens={"tokens": [3, 1]}, r=2),
    ]
    folders: list[Path] = []
    for i, method in enumerate(methods):
        rw.attach(model := make(), method)
        randomise(model)
        folders.append(save_adapter(model, tmp_path_factory.mktemp("sound") / str(i)))
    return folders


def flip(path: Path, draw: random.Random) -> None:
    """Some bytes: more of them in the header, where they mean something."""
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.randint(1, 4)):
        end = draw.choice((8, header, len(content)))
        content[draw.randrange(end)] = draw.randrange(256)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    end = draw.randrange(len(content))
    path.write_bytes(draw.choice((content[:end], content + content[:end], content[end:])))


def damaged(value: Any, draw: random.Random) -> Any:
    """A JSON value with something in it exchanged for something else."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return copy.deepcopy(draw.choice(JUNK))
    if isinstance(value, dict):
        key = draw.choice(list(value))
        changed = {k: v for k, v in value.items() if k != key}
        if draw.random() < 0.7:
            name = draw.choice([str(j) for j in JUNK]) if draw.random() < 0.2 else key
            changed[name] = damaged(value[key], draw)
        return changed
    place = draw.randrange(len(value))
    return [*value[:place], damaged(value[place], draw), *value[place + draw.randint(0, 1) :]]


def header(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    whole = damaged(json.loads(content[8 : 8 + length]), draw)
    text = json.dumps(whole).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def metadata(path: Path, draw: random.Random) -> None:
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata())
    key = draw.choice(list(texts))
    texts[key] = json.dumps(damaged(json.loads(texts[key]), draw)) if key != "format" else "pt"
    save_file(load_file(path), path, texts)


def some_tensor(draw: random.Random, tensor: Tensor) -> Tensor:
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.to(draw.choice([torch.int64, torch.float16, torch.float64, torch.bool])),
        lambda t: t[None].contiguous(),
        lambda t: t.reshape(-1)[:0],
        lambda t: t.flatten(),
        lambda t: t.mT.contiguous() if t.ndim > 1 else t.reshape(-1)[:1],
        lambda t: t.sum(),
        lambda t: torch.cat([t, t]) if t.ndim else t,
        lambda t: t * float("nan") if t.is_floating_point() else t,
        lambda t: t + 1,
    ]
    return draw.choice(changes)(tensor).clone()


def tensors(path: Path, draw: random.Random) -> None:
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata())
    content = load_file(path)
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(content))
        tensor = content[key]
        if draw.random() < 0.5:
            del content[key]
            key = draw.choice((key + ".x", key[5:], key.replace("lora_A", "lora_B"), "y"))
        if draw.random() < 0.8:
            content[key] = some_tensor(draw, tensor)
    save_file(content, path, texts)


def config(path: Path, draw: random.Random) -> None:
    home = path.with_name(CONFIG)
    text = json.dumps(damaged(json.loads(home.read_text("utf-8")), draw))
    if draw.random() < 0.05:
        text = draw.choice(('{"a":' * 5000, "[" * 100_000, text[: len(text) // 2], "\ufeff" + text))
    home.write_text(text, "utf-8")


def foreign(path: Path, draw: random.Random) -> None:
    """A key that LoraConfig has, with any value."""
    home = path.with_name(CONFIG)
    keys = ("target_parameters", "trainable_token_indices", "use_dora", "bias", "rank_pattern",
            "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
            "exclude_modules", "ensure_weight_tying", "lora_bias", "peft_type", "target_modules",
            "init_lora_weights", "r", "lora_alpha")  # fmt: skip
    whole = json.loads(home.read_text("utf-8"))
    whole[draw.choice(keys)] = copy.deepcopy(draw.choice(JUNK))
    home.write_text(json.dumps(whole), "utf-8")


def pickled(path: Path, draw: random.Random) -> None:
    """The same tensors as a pickle, damaged."""
    home = path.with_suffix(".bin")
    torch.save(load_file(path), home)
    path.unlink()
    if draw.random() < 0.5:
        cut(home, draw)
    else:
        content = bytearray(home.read_bytes())
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(min(len(content), 3000))] = draw.randrange(256)
        home.write_bytes(content)


DAMAGE = (flip, cut, header, metadata, tensors, config, foreign, pickled)


def state(model: Zoo) -> list[object]:
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return [*kinds, *((n, p.data_ptr(), p._version) for n, p in model.named_parameters())]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what it finds in a pickle
@pytest.mark.parametrize("how", DAMAGE, ids=lambda how: how.__name__)
def test_nothing_but_our_errors_comes_out(sound: list[Path], tmp_path: Path, how):
    draw = random.Random(how.__name__)
    model = make()
    before = state(model)
    messages: list[str] = []
    for i in range(ROUNDS):
        source = draw.choice(sound)
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in (WEIGHTS, CONFIG):
            (folder / name).write_bytes((source / name).read_bytes())
        how(folder / WEIGHTS, draw)
        try:
            load_adapter(model, folder, allow_pickle=True)
        except RankwiseError as error:
            messages.append(str(error))
        else:
            rw.detach(model)
        assert state(model) == before
    assert len(messages) > ROUNDS // 4
    assert max(map(len, messages)) < 20_000
