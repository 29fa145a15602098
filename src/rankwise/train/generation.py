"""Text from a run's language model: how prompts are continued, and where the text ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rankwise.data.batches import BatchPlan, collate
from rankwise.data.encode import encode_prompts, padding_id
from rankwise.data.examples import Examples
from rankwise.train.reporter import Reporter
from rankwise.train.restore import Restored

__all__ = ["Generation", "end_tokens", "generate"]


@dataclass(frozen=True)
class Generation:
    """How a language model continues a prompt.

    Attributes:
        max_new_tokens: the longest continuation; at most half of what the model takes.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the drawing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def generate(
    run: Restored,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    how: Generation,
    watcher: Reporter,
) -> list[str]:
    """Continuations in row order; prompts are padded on the left, in batches of like length."""
    tokenizer: Any = run.base.tokenizer
    model: Any = run.base.model
    longest, most = run.base.longest, how.max_new_tokens
    if longest is not None and most > longest // 2:
        most = max(1, longest // 2)
        watcher.note(f"The model takes {longest} tokens in all; at most {most} are generated.")
    room = run.max_length if longest is None else min(run.max_length, longest - most)
    encoded = encode_prompts(examples, tokenizer, room)
    for note in encoded.notes:
        watcher.note(note)
    plan = BatchPlan(encoded.lengths, batch_size, shuffle=False)
    made: dict[int, str] = {}
    torch.manual_seed(how.seed)
    options: dict[str, Any] = {"do_sample": how.temperature > 0}
    ends = end_tokens(model, tokenizer, chat=examples.messages is not None)
    if ends:
        options["eos_token_id"] = ends
    if how.temperature > 0:
        options["temperature"] = how.temperature
    watcher.start("generating", len(encoded))
    for indices in plan.epoch(0):
        batch = collate(encoded, indices, padding_id(tokenizer), side="left")
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            tokens = model.generate(
                **{k: v.to(device) for k, v in batch.items() if k != "token_type_ids"},
                max_new_tokens=most,
                pad_token_id=padding_id(tokenizer),
                **options,
            )
        texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        made.update(zip(indices, texts, strict=True))
        watcher.advance(len(made), {})
    watcher.finish()
    return [made[i] for i in range(len(encoded))]


def end_tokens(model: Any, tokenizer: Any, *, chat: bool) -> list[int]:
    """The tokens that end a text: the model's own, the tokenizer's, and for chats the template's.

    A chat model often ends its turn with another token than the one that ends a document.
    """
    own: Any = model.generation_config.eos_token_id
    found = set(own if isinstance(own, list) else [own])
    found.add(tokenizer.eos_token_id)
    if chat and tokenizer.chat_template is not None:
        found.add(_closing_token(tokenizer))
    return sorted(int(token) for token in found if token is not None)


def _closing_token(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right behind an answer; None without one."""
    from jinja2 import TemplateError  # there, as the prompts were written by the template

    turn = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):
        return None  # a template for another kind of conversation
    behind = text.rpartition("Answer")[2].lstrip()
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    if not ids:
        return None
    added: Any = tokenizer.added_tokens_decoder.get(ids[0])
    special = ids[0] in tokenizer.all_special_ids or (added is not None and added.special)
    return ids[0] if special else None
