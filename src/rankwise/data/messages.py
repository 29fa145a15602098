"""Conversations as lists of role and content, from the ways files write them."""

from __future__ import annotations

from typing import Any

__all__ = ["Message", "read_messages", "text_problem", "turn"]

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}"""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
}


def text_problem(value: object) -> str:
    """What keeps ``value`` from being a text with words in it, or an empty string."""
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, not text"
    if not value.strip():
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return ""


def turn(question: str, context: str, answer: str | None) -> list[Message]:
    """One question, with its context below it if there is any, and one answer if there is one."""
    asked = f"{question}\n\n{context}" if context.strip() else question
    messages = [{"role": "user", "content": asked}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def read_messages(value: Any, require_answer: bool) -> tuple[list[Message], str]:
    """The messages of one row, and what is wrong with them or an empty string.

    Takes {"role", "content"} as OpenAI writes it, where content may be a list of text parts, and
    {"from", "value"} as ShareGPT does.
    """
    if value is None:
        return [], "is missing"
    if not isinstance(value, list):
        return [], f"is a {type(value).__name__}, not a list of messages"
    messages: list[Message] = []
    for n, item in enumerate(value, 1):
        message, problem = _message(item)
        if problem:
            return [], f"message {n} {problem}"
        messages.append(message)
    if not messages:
        return [], "has no messages"
    if require_answer and all(m["role"] != "assistant" for m in messages):
        return [], "has no assistant message, so there is nothing to learn"
    return messages, ""


def _message(item: Any) -> tuple[Message, str]:
    if not isinstance(item, dict):
        return {}, f'is a {type(item).__name__}, not {{"role": ..., "content": ...}}'
    role: Any = item.get("role", item.get("from"))
    content: Any = item.get("content", item.get("value"))
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            return {}, "holds more than text"
        content = "".join(p for p in parts if p)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        return {}, f"has the role {role!r}; known are {', '.join(_ROLES)}"
    problem = text_problem(content)
    if problem:
        return {}, f"'content' {problem}"
    return {"role": known, "content": str(content)}, ""
