"""Tiny transformers checkpoints with random weights, tiny files of rows, and runs on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.train.config import FitConfig, make_config

GOOD = ("good", "great", "warm", "bright", "fine")
BAD = ("bad", "dull", "cold", "dark", "poor")
PLAIN = ("the", "film", "was", "a", "story", "of", "one", "old", "house", "and", "its", "people")

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


TYPED = ["input_ids", "token_type_ids", "attention_mask"]


def word_tokenizer(
    cls: str, sep: str, pad: str, unknown: str, first: tuple[str, ...], **more: Any
) -> Any:
    """One token a word, a [CLS] in front and a [SEP] behind each text, as BERT has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*first, *GOOD, *BAD, *PLAIN]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, words.index(cls)), (sep, words.index(sep))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token=unknown,
        **more,
    )


def byte_tokenizer(end: str, **more: Any) -> Any:
    """One token a byte and an end token; no padding token, as with GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, end])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, **more)


def write(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT of two layers of 32, saved without a head, with its usual dropout of 0.1."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer = word_tokenizer("[CLS]", "[SEP]", "[PAD]", "[UNK]", special, model_input_names=TYPED)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return write(tmp_path_factory.mktemp("models") / "bert", BertModel(config), tokenizer)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa of one layer, whose 514 positions hold 512 tokens."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(2)
    special = ("<s>", "<pad>", "</s>", "<unk>")
    tokenizer = word_tokenizer("<s>", "</s>", "<pad>", "<unk>", special)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return write(tmp_path_factory.mktemp("models") / "roberta", RobertaModel(config), tokenizer)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 of two layers of 32: Conv1D layers, output tied to the embedding, no padding token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    tokenizer = byte_tokenizer("<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=96,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return write(tmp_path_factory.mktemp("models") / "gpt2", GPT2LMHeadModel(config), tokenizer)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama of two layers of 32: grouped keys, a chat template, token types it does not take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    tokenizer = byte_tokenizer("</s>", model_input_names=TYPED)
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return write(tmp_path_factory.mktemp("models") / "llama", LlamaForCausalLM(config), tokenizer)


@pytest.fixture
def half(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder in bfloat16."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    def make(folder: Path) -> Path:
        loader = AutoModel if folder.name in ("bert", "roberta") else AutoModelForCausalLM
        model = loader.from_pretrained(folder, dtype=torch.bfloat16)
        return write(tmp_path / "half", model, AutoTokenizer.from_pretrained(folder))

    return make


def sentence(draw: random.Random, mood: tuple[str, ...]) -> str:
    words: list[str] = draw.choices(PLAIN, k=draw.randint(2, 9))
    words.insert(draw.randrange(len(words) + 1), draw.choice(mood))
    return " ".join(words)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files of every form; the label is a word's mood, so it can be learned."""
    folder = tmp_path_factory.mktemp("rows")
    draw = random.Random(5)

    def labelled(count: int) -> list[tuple[str, int]]:
        return [(sentence(draw, (BAD, GOOD)[i % 2]), i % 2) for i in range(count)]

    def table(name: str, header: str, lines: list[str]) -> None:
        (folder / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")

    for name, count in (("train", 48), ("dev", 21)):
        table(f"{name}.tsv", "sentence\tlabel", [f"{t}\t{y}" for t, y in labelled(count)])
        pairs = [(labelled(2), i % 2) for i in range(count)]
        table(
            f"{name}-pairs.tsv",
            "sentence1\tsentence2\tlabel",
            [f"{p[0][0]}\t{p[y][0]}\t{('same', 'other')[y]}" for p, y in pairs],
        )
        table(
            f"{name}-scores.tsv",
            "sentence\tscore",
            [f"{t}\t{y + draw.random():.3f}" for t, y in labelled(count)],
        )
        texts = [t for t, _ in labelled(count)]
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        prompts = [
            {"prompt": t[:20] + ":", "completion": " " + t[-4 - i % 7 :]}
            for i, t in enumerate(texts)
        ]
        chats = [
            {
                "messages": [
                    {"role": "user", "content": t[:16]},
                    {"role": "assistant", "content": t[-8:]},
                ]
            }
            for t in texts
        ]
        for kind, made in (("prompts", prompts), ("chats", chats)):
            lines = [json.dumps(row) for row in made]
            (folder / f"{name}-{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def options(bert: Path, rows: Path) -> Callable[..., FitConfig]:
    """Make a config for a quick run: BERT on the labelled sentences where nothing else is said."""

    def make(out: Path, **more: Any) -> FitConfig:
        values: dict[str, Any] = {
            "model": str(bert),
            "data": str(rows / "train.tsv"),
            "eval": str(rows / "dev.tsv"),
            "out": str(out),
            "dtype": "float32",
            "device": "cpu",
            "r": 2,
            "epochs": 1,
            "batch_size": 8,
        }
        return make_config({k: v for k, v in (values | more).items() if v is not None}, "test")

    return make


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    options: Callable[..., FitConfig],
    gpt2: Path,
    llama: Path,
    rows: Path,
) -> Callable[[str], Path]:
    """The folder of a finished LoRA run, by its name; each is made once."""
    from rankwise.train.run import fit

    text = {"data": str(rows / "train.txt"), "eval": str(rows / "dev.txt"), "max_steps": 4}
    chats = {"data": str(rows / "train-chats.jsonl"), "eval": str(rows / "dev-chats.jsonl")}
    pairs = {"data": str(rows / "train-pairs.tsv"), "eval": str(rows / "dev-pairs.tsv")}
    scores = {"data": str(rows / "train-scores.tsv"), "eval": str(rows / "dev-scores.tsv")}
    prompts = {"data": str(rows / "train-prompts.jsonl"), "eval": str(rows / "dev-prompts.jsonl")}
    kinds: dict[str, dict[str, Any]] = {
        "single": {"epochs": 3, "lr": 0.01},
        "pair": pairs,
        "scores": {**scores, "task": "regression"},
        "gpt2": {"model": str(gpt2), **text},
        "prompts": {"model": str(gpt2), **prompts, "max_steps": 4},
        "llama": {"model": str(llama), **chats, "max_steps": 4},
        "tied": {"model": str(gpt2), **text, "target_modules": ["wte", "c_attn"]},
        "head": {"method": "head"},
        "full": {"method": "full"},
    }
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("runs") / kind
            made[kind] = fit(options(out, **kinds[kind])).folder
        return made[kind]

    return run


class Witness:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[tuple[int, dict[str, float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, done: int, values: Any) -> None:
        self.shown.append((done, dict(values)))

    def finish(self) -> None:
        pass

    @property
    def text(self) -> str:
        return "\n".join(self.notes)


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture(scope="session")
def look() -> SimpleNamespace:
    """Ways to look into a run folder."""
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found.update(load_file(file))
        return found

    def log(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        kept = ("seconds",)
        return [{k: v for k, v in json.loads(line).items() if k not in kept} for line in lines]

    def manifest(run: Path) -> dict[str, Any]:
        return json.loads((run / "manifest.json").read_text(encoding="utf-8"))

    def checkpoints(run: Path) -> list[Path]:
        return sorted((run / "checkpoints").iterdir())

    return SimpleNamespace(tensors=tensors, log=log, manifest=manifest, checkpoints=checkpoints)
