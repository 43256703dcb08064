"""What is worth a second look in a record that can be trained on: warnings of a check, no errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.data.records import IMAGE_PLACEHOLDER, Record

if TYPE_CHECKING:  # it brings transformers
    from trainer.data.chat import ChatTemplate


def oddities(record: Record, chat: ChatTemplate | None) -> dict[str, str]:
    """Sentences about a record by kind: of a kind the first will do, and how many records there are like it.

    Args:
        chat: of the model that is trained; None leaves out what depends on it.
    """
    found: dict[str, str] = {}
    empty = [number for number, turn in enumerate(record.turns, 1) if not turn.answer.strip()]
    if empty:
        found["empty answer"] = (
            f"of {len(record.turns)} answers, {', '.join(map(str, empty))} {'is' if len(empty) == 1 else 'are'} empty: "
            "the model learns to end at once"
        )
    if chat is not None:
        texts = [record.system, *(text for turn in record.turns for text in (turn.question, turn.answer))]
        marks = {mark: None for text in texts for mark in chat.special_tokens_in(text)}
        if marks:
            listed = ", ".join(f"'{mark}'" for mark in marks)
            found["special token"] = (
                f"its text has {listed}, which the tokenizer takes for special tokens; spell it otherwise"
            )
        if chat.reads_images and not record.images and any(IMAGE_PLACEHOLDER in text for text in texts):
            found["placeholder"] = f"its text has '{IMAGE_PLACEHOLDER}', which stays text, since its 'images' is empty"
    return found
