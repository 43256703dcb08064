"""What is worth a second look in a record that can be trained on: warnings of a check, no errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.data.records import Record

if TYPE_CHECKING:  # it brings transformers
    from trainer.data.chat import ChatTemplate


def oddities(record: Record, chat: ChatTemplate | None) -> Iterator[str]:
    """Sentences about a record.

    Args:
        chat: of the model that is trained; None leaves out what depends on it.
    """
    empty = [number for number, turn in enumerate(record.turns, 1) if not turn.answer.strip()]
    if empty:
        yield (
            f"of {len(record.turns)} answers, {', '.join(map(str, empty))} {'is' if len(empty) == 1 else 'are'} empty: "
            "the model learns to end at once"
        )
    if chat is not None:
        texts = [record.system, *(text for turn in record.turns for text in (turn.question, turn.answer))]
        found = {mark: None for text in texts for mark in chat.special_tokens_in(text)}
        if found:
            marks = ", ".join(f"'{mark}'" for mark in found)
            yield f"its text has {marks}, which the tokenizer takes for special tokens; spell it otherwise"
