"""What `rankwise estimate` says beside what `rankwise fit` really held, each in a fresh process.

    python benchmarks/estimate.py [--batch-size 8] [--max-length 128]

BERT-base, GPT-2 and a Llama of 162 million parameters, with random weights, for full fine-tuning,
LoRA on query and value, and the output layer alone. Frozen weights are not packed, as whether that
pays is measured anew each time. The table is printed as Markdown. It takes a quarter of an hour on
two cores, 5 GB of memory and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("BERT-base", "GPT-2", "Llama, 162 M")
METHODS = ("full", "lora", "head")
WORDS = ("a", "film", "of", "one", "house", "and", "its", "people")


def main() -> None:
    """Print the table, a row when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    asked = parser.parse_args()
    print("| model | method | estimated | measured | estimated / measured |")
    print("|---|---|--:|--:|--:|")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            build(name, Path(folder), asked.max_length)
            for method in METHODS:
                said, held = both(Path(folder), method, asked.batch_size, asked.max_length)
                sizes = f"{said / 1e9:.2f} GB | {held / 1e9:.2f} GB | {said / held:.2f}"
                print(f"| {name} | {method} | {sizes} |", flush=True)


def both(folder: Path, method: str, batch: int, length: int) -> tuple[int, int]:
    """The peak that is estimated and the one that a run held."""
    rows = str(next(folder.glob("rows.*")))
    size = ["--batch-size", str(batch), "--eval-batch-size", str(batch)]
    options = ["--method", method, "--dtype", "float32", "--pack", "no", *size]
    options += ["--max-length", str(length)]
    if method == "head" and rows.endswith(".txt"):
        options += ["--modules-to-save", "lm_head"]
    said = json.loads(run("estimate", str(folder), *options, "--json"))["peak"]
    with tempfile.TemporaryDirectory() as out:
        data = ["--data", rows, "--eval", rows, "--max-steps", "3", "--out", f"{out}/run"]
        run("fit", "--model", str(folder), *data, *options)
        manifest = json.loads(Path(out, "run", "manifest.json").read_text(encoding="utf-8"))
    return int(said), int(manifest["memory"]["peak"])


def run(*words: str) -> str:
    """What a command prints, in a process of its own."""
    command = [sys.executable, "-m", "rankwise", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def build(name: str, folder: Path, length: int) -> None:
    """A model folder with random weights, a tokenizer of a few words, and rows of full length."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    names = [*special.values(), *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token=names[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    config: Any
    if name == "BERT-base":
        model: Any = transformers.BertModel(transformers.BertConfig())
    elif name == "GPT-2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    else:
        config = transformers.LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
        )
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    text = " ".join(WORDS[n % len(WORDS)] for n in range(length + 8))
    if name == "BERT-base":
        lines = ["text\tlabel", *(f"{text}\t{n % 2}" for n in range(64))]
        (folder / "rows.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (folder / "rows.txt").write_text(f"{text}\n" * 64, encoding="utf-8")


if __name__ == "__main__":
    main()
