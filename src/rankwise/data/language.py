"""Token sequences for a language model, and which of their tokens it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.data.examples import Examples
from rankwise.data.messages import Message
from rankwise.errors import EnvironmentFault, UserError, gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Sequences", "open_prompts", "sequences"]

IGNORED = -100  # the label that torch's cross entropy skips

Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Sequences:
    """Uncut token ids and labels per row, and sentences for the user."""

    ids: list[list[int]]
    labels: list[list[int]]
    notes: tuple[str, ...] = ()


def sequences(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Token ids and labels of every row.

    - Plain text: every token is learned, and the end token after it.
    - Prompt and completion, joined as they are: the completion and the end token are learned. The
      prompt's tokens are those that the prompt has alone, as in generation, so no token reaches
      across the seam.
    - Messages: written by the tokenizer's chat template, or without one as
      "User: …", a blank line, "Assistant: …" and the end token, a blank line, and so on. The
      assistant's messages are learned, with the mark that ends them. Where a message begins and
      ends is found by rendering the conversation up to it, so the template needs no special marks.

    Raises:
        UserError: the chat template refuses a conversation; every such row is listed.
        EnvironmentFault: a chat template needs jinja2, which is not installed.
    """
    if examples.messages is not None:
        made = _chats(examples, examples.messages, tokenizer)
    elif examples.prompts is not None:
        made = _completions(examples, examples.prompts, tokenizer)
    else:
        ids = [_closed(row, tokenizer) for row in _tokens(tokenizer, examples.texts or [])]
        made = Sequences(ids, [list(row) for row in ids])
    if tokenizer.eos_token_id is not None:
        return made
    note = "The tokenizer has no end token, so the model does not learn where to stop."
    return Sequences(made.ids, made.labels, (*made.notes, note))


def open_prompts(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids that generation starts from, without an end token; nothing is cut."""
    if examples.messages is None:
        texts = examples.texts or [p for p, _ in examples.prompts or []]
        return [_open(row, tokenizer) for row in _tokens(tokenizer, texts)]
    render, special = _renderer(tokenizer)
    texts: list[str] = []
    problems: list[str] = []
    for i, messages in enumerate(examples.messages):
        answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        ends_open = not answers or answers[-1] < len(messages) - 1
        text, problem = _try(render, messages if ends_open else messages[: answers[-1]], True)
        texts.append(text)
        if problem:
            problems.append(f"{examples.name(i)}: {problem}")
    gather(UserError, "The chat template refuses these conversations", problems)
    return [_open(row, tokenizer) for row in _tokens(tokenizer, texts, special)]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True
) -> list[list[int]]:
    """Token ids of each text, in one batch."""
    if not texts:
        return []
    batch = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return [list(row) for row in batch["input_ids"]]


def _open(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``ids`` without an end token that the tokenizer may have added."""
    ends = ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``ids`` with exactly one end token, if there is such a token."""
    end: Any = tokenizer.eos_token_id
    return ids if end is None else [*_open(ids, tokenizer), int(end)]


def _completions(
    examples: Examples, prompts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Sequences:
    alone = [_open(row, tokenizer) for row in _tokens(tokenizer, [p for p, _ in prompts])]
    joined = [_open(row, tokenizer) for row in _tokens(tokenizer, [p + c for p, c in prompts])]
    crossed = [i for i, row in enumerate(joined) if row[: len(alone[i])] != alone[i]]
    apart = _tokens(tokenizer, [prompts[i][1] for i in crossed], special=False)
    for i, completion in zip(crossed, apart, strict=True):
        joined[i] = alone[i] + completion
    ids = [_closed(row, tokenizer) for row in joined]
    labels = [
        [IGNORED] * len(prompt) + row[len(prompt) :] for prompt, row in zip(alone, ids, strict=True)
    ]
    notes: list[str] = []
    if tokenizer.chat_template is not None:
        notes.append(
            f"{examples.source}: prompts are used as they are, without the model's chat template; "
            "a column of messages, or of questions and answers, would use it."
        )
    glued = [i for i, (p, c) in enumerate(prompts) if p[-1:].isalnum() and c[:1].isalnum()]
    if glued:
        notes.append(
            f"{examples.source}: in {len(glued)} of {len(prompts)} rows the completion follows the "
            f"prompt without a space (first: {examples.name(glued[0])}); they are joined as they "
            "are, so put the space or line end into the file if one belongs there."
        )
    return Sequences(ids, labels, tuple(notes))


def _renderer(tokenizer: PreTrainedTokenizerBase) -> tuple[Render, bool]:
    """How messages become text, and whether the tokenizer then adds its special tokens."""
    if tokenizer.chat_template is None:
        end = str(tokenizer.eos_token or "")
        return lambda messages, opening: _plain_chat(messages, opening, end), True

    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise EnvironmentFault(
            "The tokenizer's chat template needs jinja2, which is not installed. Install it with: "
            'pip install "rankwise[report]"'
        ) from error

    def render(messages: Sequence[Message], opening: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opening
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return str(text)

    return render, False


def _plain_chat(messages: Sequence[Message], opening: bool, end: str) -> str:
    """The format for tokenizers without a chat template; ``opening`` asks for an answer."""
    turns = [
        f"{m['role'].capitalize()}: {m['content']}{end if m['role'] == 'assistant' else ''}"
        for m in messages
    ]
    return "\n\n".join([*turns, "Assistant:"] if opening else turns)


def _try(render: Render, messages: Sequence[Message], opening: bool) -> tuple[str, str]:
    """The rendered text, and what the template objects to or an empty string."""
    try:
        return render(messages, opening), ""
    except (TypeError, ValueError, KeyError) as error:
        return "", str(error) or type(error).__name__


def _chats(
    examples: Examples, rows: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase
) -> Sequences:
    render, special = _renderer(tokenizer)
    texts: list[str] = []
    cuts: list[tuple[int, str, str]] = []  # (row, text before an answer, text up to its end)
    problems: list[str] = []
    asked = 0
    for i, messages in enumerate(rows):
        text, problem = _try(render, messages, False)
        if problem:
            problems.append(f"{examples.name(i)}: {problem}")
        texts.append(text)
        found = [] if problem else _answers(render, messages, text)
        cuts += [(i, before, upto) for before, upto in found]
        asked += sum(m["role"] == "assistant" for m in messages)
    gather(UserError, "The chat template refuses these conversations", problems)
    ids = _tokens(tokenizer, texts, special)
    labels = [[IGNORED] * len(row) for row in ids]
    starts = _tokens(tokenizer, [before for _, before, _ in cuts], special)
    ends = _tokens(tokenizer, [upto for _, _, upto in cuts], special)
    for (i, _, _), start, end in zip(cuts, starts, ends, strict=True):
        a, b = _shared(ids[i], start), _shared(ids[i], end)
        labels[i][a:b] = ids[i][a:b]
    notes: list[str] = []
    if tokenizer.chat_template is None:
        notes.append(
            "The tokenizer has no chat template; turns are written as 'User: ...' and "
            "'Assistant: ...', a blank line apart, each answer followed by the end token."
        )
    if len(cuts) < asked:
        notes.append(
            f"{examples.source}: {asked - len(cuts)} of {asked} answers are shown but not learned, "
            "because the chat template writes them differently within a longer conversation."
        )
    return Sequences(ids, labels, tuple(notes))


def _answers(render: Render, messages: Sequence[Message], text: str) -> list[tuple[str, str]]:
    """(text before, text up to the end of) each assistant message that can be told apart."""
    found: list[tuple[str, str]] = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, refused = _try(render, messages[:n], True)
        upto, refused_too = _try(render, messages[: n + 1], False)
        told_apart = upto.startswith(before) and text.startswith(upto) and upto != before
        if told_apart and not refused and not refused_too:
            found.append((before, upto))
    return found


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens ``a`` and ``b`` have in common from the start."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
