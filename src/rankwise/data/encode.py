"""Examples to token ids and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.data.examples import Examples
from rankwise.data.language import IGNORED, Sequences, open_prompts, sequences
from rankwise.errors import UserError, gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "encode", "encode_prompts", "padding_id"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of the rows of some examples; every list has one entry per kept row.

    Attributes:
        input_ids: token ids, at most ``max_length`` of them.
        lengths: ``len`` of each entry of ``input_ids``.
        kept: the row of the examples that each entry comes from; rows without any token to learn
            are left out.
        labels: class numbers, floats, or for a language model one target per token, equal to its
            own id (the model shifts them), or -100 where nothing is learned; None without labels.
        token_type_ids: which of two texts a token belongs to, where the tokenizer says so.
        truncated: how many rows were longer than ``max_length``.
        notes: sentences for the user.
    """

    input_ids: list[list[int]]
    lengths: list[int]
    kept: list[int]
    labels: list[int] | list[float] | list[list[int]] | None = None
    token_type_ids: list[list[int]] | None = None
    truncated: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its end token's, else 0.

    Which one matters little, because the attention mask is 0 and the label -100 there.
    """
    for name in ("pad_token_id", "eos_token_id"):
        value: Any = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    return 0


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Token ids and targets, each row cut at ``max_length`` tokens.

    Classification and regression: the tokenizer's own way with a text or a pair of texts, special
    tokens included; of a pair the longer text is cut first.

    Language model: see :func:`rankwise.data.language.sequences` for what is a target. The end of
    a long row is cut off, with the end token, so that no false end is learned.

    Raises:
        UserError: ``max_length`` leaves no room for text, a row has no tokens, or no row has a
            token to learn.
    """
    pair = examples.form == "pair"
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise UserError(
            f"max_length {max_length} leaves no room for text: this tokenizer adds {special} "
            f"special tokens to every row. Use {special + 1} or more."
        )
    if examples.task == "causal-lm":
        return _encode_language(examples, sequences(examples, tokenizer), max_length)
    return _encode_labelled(examples, tokenizer, max_length)


def _encode_labelled(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    texts, pairs = examples.texts, examples.pairs
    if texts is None:
        raise UserError(
            f"{examples.source}: {examples.task} needs a text or a pair of texts in each row; this "
            f"holds the form '{examples.form}'. Name the column with --text-column."
        )
    if not texts:
        return Encoded([], [], [], labels=examples.labels)
    batch = tokenizer(
        texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False
    )
    ids: list[list[int]] = batch["input_ids"]
    _require_tokens(examples, ids)
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]
    whole = _full_lengths(tokenizer, texts, pairs, full)
    return Encoded(
        input_ids=ids,
        lengths=[len(row) for row in ids],
        kept=list(range(len(ids))),
        labels=examples.labels,
        token_type_ids=batch.get("token_type_ids"),
        truncated=sum(n > max_length for n in whole),
        notes=_truncation_note(examples, whole, max_length),
    )


def _full_lengths(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    rows: Sequence[int],
) -> list[int]:
    """How long ``rows`` would be without a limit."""
    if not rows:
        return []
    second = None if pairs is None else [pairs[i] for i in rows]
    batch = tokenizer([texts[i] for i in rows], second, return_attention_mask=False, verbose=False)
    return [len(row) for row in batch["input_ids"]]


def _require_tokens(examples: Examples, ids: Sequence[Sequence[int]]) -> None:
    problems = [examples.name(i) for i, row in enumerate(ids) if not row]
    gather(UserError, "The tokenizer makes no token at all of these rows", problems)


def _truncation_note(examples: Examples, lengths: Sequence[int], limit: int) -> tuple[str, ...]:
    long = sum(n > limit for n in lengths)
    if not long:
        return ()
    note = (
        f"{examples.source}: {long} of {len(examples)} rows are longer than {limit} tokens (the "
        f"longest has {max(lengths)}) and are cut; --max-length sets the limit."
    )
    return (note,)


def _encode_language(examples: Examples, made: Sequences, max_length: int) -> Encoded:
    _require_tokens(examples, made.ids)
    lengths = [len(row) for row in made.ids]
    ids = [row[:max_length] for row in made.ids]
    labels = [row[:max_length] for row in made.labels]
    # The model predicts token t + 1 at t, so the first token is never a target.
    kept = [i for i, row in enumerate(labels) if any(t != IGNORED for t in row[1:])]
    dropped = sorted(set(range(len(ids))) - set(kept))
    if dropped and not kept:
        raise UserError(
            f"{examples.source}: no row has a token to learn within max_length {max_length} "
            f"(first: {examples.name(dropped[0])}, {lengths[dropped[0]]} tokens). Raise "
            "--max-length, shorten the prompts, or check which column is the completion."
        )
    notes = [*made.notes, *_truncation_note(examples, lengths, max_length)]
    if dropped:
        notes.append(
            f"{examples.source}: {len(dropped)} of {len(ids)} rows have no token to learn within "
            f"{max_length} tokens and are left out (first: {examples.name(dropped[0])})."
        )
    return Encoded(
        input_ids=[ids[i] for i in kept],
        lengths=[len(ids[i]) for i in kept],
        kept=kept,
        labels=[labels[i] for i in kept],
        truncated=sum(n > max_length for n in lengths),
        notes=tuple(notes),
    )


def encode_prompts(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """What generation starts from: prompts, conversations up to the last answer, or texts.

    The beginning of a long row is cut off, since the end is what is answered. No labels, and no
    row is left out. Pad on the left (:func:`rankwise.data.batches.collate`, ``side="left"``).

    Raises:
        UserError: ``max_length`` is below 1, or a row has no tokens.
    """
    if max_length < 1:
        raise UserError(f"max_length must be 1 or more, got {max_length}.")
    whole = open_prompts(examples, tokenizer)
    _require_tokens(examples, whole)
    lengths = [len(row) for row in whole]
    ids = [row[-max_length:] for row in whole]
    return Encoded(
        input_ids=ids,
        lengths=[len(row) for row in ids],
        kept=list(range(len(ids))),
        truncated=sum(n > max_length for n in lengths),
        notes=_truncation_note(examples, lengths, max_length),
    )
