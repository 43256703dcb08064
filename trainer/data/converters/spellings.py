"""The ways in which files write a chat, as one list of messages."""

from __future__ import annotations

from typing import Any

from trainer.data.converters.base import Rejected
from trainer.data.converters.chats import said
from trainer.data.converters.fields import as_object, get_list, shown
from trainer.errors import listed

# What asks, what stands on the lines below it, and what answers: Alpaca, Dolly, ms-swift.
_INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"), ("query", "", "response"))
# Pairs in a list: The Cauldron and FineVision, ms-swift.
_PAIRS = (("texts", "user", "assistant"), ("conversation", "human", "assistant"))
_READ = "'messages', 'conversations', 'instruction' and 'output', 'prompt' and 'completion', or 'query' and 'response'"


def messages_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record, each with ``role`` and ``content`` or with ``from`` and ``value``, in order.

    Raises:
        Rejected: it has none, or answers that the file's own trainer would not train on.
    """
    for key in ("messages", "conversations"):
        if raw.get(key) is not None:
            return [as_object(message) for message in get_list(raw, key)]
    for key, asks, answers in _PAIRS:
        if raw.get(key) is not None:
            pairs = [as_object(pair) for pair in get_list(raw, key)]
            return [message for pair in pairs for message in _turn(said(pair, asks), said(pair, answers))]
    for asks, more, answers in _INSTRUCTIONS:
        if raw.get(asks) is not None and raw.get(answers) is not None:
            texts = [said(raw, key) for key in (asks, more) if raw.get(key) is not None]
            return _history(raw) + _turn("\n".join(text for text in texts if text.strip()), said(raw, answers))
    if raw.get("prompt") is not None and raw.get("completion") is not None:
        return _prompt(raw) + _messages(raw, "completion", "assistant")
    raise Rejected("malformed", f"a chat is in {_READ}; the record has {listed([*raw]) or 'nothing'}")


def _turn(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _history(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier questions and answers, which are trained on as well."""
    turns: list[dict[str, Any]] = []
    for pair in get_list(raw, "history") if raw.get("history") is not None else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("malformed", f"'history' must be a list of [question, answer], got one of {shown(pair)}")
        turns += _turn(*pair)
    return turns


def _prompt(raw: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _messages(raw, "prompt", "user")
    if any(message.get("role") == "assistant" for message in messages):
        reason = "'prompt' has an answer, but every answer is trained on; a chat whose answers all are is 'messages'"
        raise Rejected("not trained on", reason)
    return messages


def _messages(raw: dict[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    """A text, which is one message, or a list of messages."""
    if isinstance(raw[key], list):
        return [as_object(message) for message in raw[key]]
    return [{"role": role, "content": said(raw, key)}]
