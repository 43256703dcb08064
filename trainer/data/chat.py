"""Conversations as a model's chat template writes them, in parts: what is asked, what is answered.

What a template writes is kept to the letter, so that a model sees in generation what it saw in training.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from trainer.data.records import IMAGE_PLACEHOLDER, Record, Turn
from trainer.errors import UserError

# What templates that write the date take for today, or trainings of one run would differ by the day they ran on. It is
# the one that Llama 3's templates write where they are told none.
TODAY = datetime(2024, 7, 26)


class Part(NamedTuple):
    """A stretch of a rendered conversation: of a prompt, what opens an answer, or an answer with its end mark."""

    text: str
    kind: Literal["prompt", "opening", "answer"]


def end_of_text(tokenizer: Any) -> int:
    """The token that ends an answer where the template writes no mark of its own.

    Raises:
        UserError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no token for the end of a text, so that nothing would end an answer, or fill batches up "
            "where there is no token for padding; set its eos_token, and save it to the model's folder"
        )
    return int(tokenizer.eos_token_id)


class ChatTemplate:
    """The chat template of a processor.

    Args:
        processor: a transformers processor (or tokenizer).
        image_token: what stands for an image in rendered text.

    Raises:
        UserError: it has none.
    """

    def __init__(self, processor: Any, image_token: str) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token = image_token
        self.reads_images = getattr(processor, "image_processor", None) is not None
        self._template = _template_of(processor, self.tokenizer)
        self._plain_text = not self.reads_images and not self._takes_parts()

    def parts(self, record: Record) -> list[Part]:
        """The rendered conversation in parts, up to the last answer: what is written behind it changes nothing before.

        Raises:
            UserError: the template leaves out a part of an answer or the system message, or answers cannot be told
                from the rest.
        """
        try:
            parts = self._appended(record) or self._marked(record)
        except (TypeError, TemplateError) as error:
            reason = "it may take no system message" if record.system.strip() else "it may be one for tools only"
            raise UserError(
                f"the chat template cannot write this conversation ({type(error).__name__}: {error}); {reason}"
            ) from error
        if not parts:
            raise UserError(
                "the chat template writes an answer otherwise than it is given, and a conversation's beginning "
                "differently once it goes on, so answers cannot be told from prompts; use a template that only appends"
            )
        asked = "".join(part.text for part in parts if part.kind != "answer")
        if "".join(record.system.split()) not in "".join(asked.split()):
            raise UserError(
                f"the chat template does not write the system message {record.system!r}; put it before the first "
                "question, or change the template"
            )
        answers = (part.text for part in parts if part.kind == "answer")
        for turn, text in zip(record.turns, answers, strict=True):
            if "".join(turn.answer.split()) not in "".join(text.split()):
                raise UserError(
                    f"of the answer {turn.answer!r} the chat template writes {text!r} only; leave out what it does, or "
                    "change the template"
                )
        return parts

    @cached_property
    def end_marks(self) -> list[int]:
        """Tokens that end an answer, where generation is to stop."""
        mark = self._mark.match(self._probe[1])
        ids = self.tokenizer(mark[0], add_special_tokens=False)["input_ids"] if mark else []
        return [token for token in ids if token in self.special_ids] or [end_of_text(self.tokenizer)]

    def _appended(self, record: Record) -> list[Part] | None:
        """By rendering up to each question and each answer; None if the template does not only append."""
        messages = self._messages(record)
        answers = range(len(messages) - 2 * len(record.turns) + 1, len(messages), 2)
        asked = self._render([messages[:place] for place in answers], add_generation_prompt=True)
        answered = self._render([messages[: place + 1] for place in answers], add_generation_prompt=False)
        parts: list[Part] = []
        done, after = "", self._probe[1]
        end = self._mark.match(after)
        more = after[end.end() :] if end else ""  # behind the end mark; nothing that a model has to write
        for turn, prompt, whole in zip(record.turns, asked, answered, strict=True):
            if not prompt.startswith(done) or not whole.startswith(prompt):
                return None
            between, answer = prompt[len(done) :], whole[len(prompt) :]
            if more and answer.endswith(after):
                whole, answer = whole.removesuffix(more), answer.removesuffix(more)
            if parts and not self.ends_turn(parts[-1].text):  # it may be written once a message follows
                mark = self._mark_before(between, turn.question)
                parts[-1] = Part(parts[-1].text + mark, "answer")
                between = between[len(mark) :]
            parts.append(Part(between, "prompt"))
            if self._opening and answer.startswith(self._opening):
                parts.append(Part(self._opening, "opening"))
                answer = answer[len(self._opening) :]
            if after.isspace() and answer.endswith(after):  # it stands between messages
                whole, answer = whole.removesuffix(after), answer.removesuffix(after)
            parts.append(Part(answer, "answer"))
            done = whole
        return parts

    def _marked(self, record: Record) -> list[Part] | None:
        """By rendering the whole with marks for answers; None if it is not the same with the answers in their place.

        Templates of reasoning models take thoughts out of earlier turns, or begin an answer otherwise than they ask.
        """
        turns = record.turns
        marks = [f"\ue000{number}\ue001" for number in range(len(turns))]
        marked = tuple(replace(turn, answer=mark) for turn, mark in zip(turns, marks, strict=True))
        both = [self._messages(some) for some in (record, replace(record, turns=marked))]
        whole, rest = self._render(both, add_generation_prompt=False)
        around: list[str] = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            around.append(before)
        texts = [re.escape(turn.answer.strip()) for turn in turns]
        answers = [rf"(\s*{text}\s*)" if text else r"(\s*)" for text in texts]  # templates may take blanks off the ends
        wanted = [re.escape(before) + answer for before, answer in zip(around, answers, strict=True)]
        written = re.fullmatch("".join(wanted) + re.escape(rest), whole)
        if written is None:
            return None
        parts = [Part(around[0], "prompt")]
        questions = [*(turn.question for turn in turns[1:]), ""]
        for answer, after, question in zip(written.groups(), [*around[1:], rest], questions, strict=True):
            mark = self._mark_before(after, question)
            parts += [Part(answer + mark, "answer"), Part(after[len(mark) :], "prompt")]
        return parts[:-1]

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """What the template writes between a prompt and its answer, and behind the answer."""
        messages = self._messages(Record("", (), (Turn("probe", "\ue000"),), ()))
        (asked,) = self._render([messages[:1]], add_generation_prompt=True)
        (whole,) = self._render([messages], add_generation_prompt=False)
        before, _, after = whole.partition("\ue000")
        return before[len(asked) :] if before.startswith(asked) else "", after

    @property
    def _opening(self) -> str:
        """What every answer begins with and a prompt lacks, such as an empty thought; blanks do not count."""
        return self._probe[0] if self._probe[0].strip() else ""

    @property
    def gap(self) -> str:
        """Blanks between a prompt and every answer, which the prompt lacks: a model writes them first."""
        return self._probe[0] if self._probe[0].isspace() else ""

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        """Special tokens but an image's, longer ones first."""
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids))
        return tuple(sorted((token for token in tokens if token and token != self.image_token), key=len, reverse=True))

    @cached_property
    def _mark(self) -> re.Pattern[str]:
        """A special token and the blanks around it."""
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, self._marks))})\s*" if self._marks else r"(?!)")

    def _mark_before(self, text: str, question: str) -> str:
        """The special token at the beginning of a text and the blanks around it, not the question's own; or nothing."""
        mark = self._mark.match(text)
        if mark is None:
            return ""
        said = question.lstrip()
        return mark[0].removesuffix(question[: -len(said)]) if said and text.startswith(said, mark.end()) else mark[0]

    def ends_turn(self, text: str) -> bool:
        """Whether a text ends in a special token (``<|im_end|>`` and its like), blanks after it aside."""
        return text.rstrip().endswith(self._marks)

    def special_tokens_in(self, text: str) -> list[str]:
        """Special tokens that a record's text spells; placeholders of images are none."""
        return self._special.findall(text.replace(IMAGE_PLACEHOLDER, " ")) if self._marks else []

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._marks)))

    def last_written(self, text: str) -> str:
        """What a tokenizer has to see before a continuation of `text`: the special token at its end, or a character."""
        if text.endswith(self._marks):
            return next(mark for mark in self._marks if text.endswith(mark))
        return text[-1:]

    def _messages(self, record: Record) -> list[dict[str, Any]]:
        """User and assistant messages in turn, behind a system message if there is one, as the template takes them."""
        texts = [("system", record.system)] if record.system.strip() else []
        texts += [item for turn in record.turns for item in (("user", turn.question), ("assistant", turn.answer))]
        if self._plain_text:
            return [{"role": role, "content": text} for role, text in texts]
        return [_message(role, text, bool(record.images)) for role, text in texts]

    def _takes_parts(self) -> bool:
        """Whether a text model's template reads content as a list of parts only; most take a string."""
        found = []
        for message in ({"role": "user", "content": "probe"}, _message("user", "probe", images=False)):
            try:
                found.append("probe" in self._render([[message]], add_generation_prompt=False)[0])
            except (TypeError, TemplateError):
                found.append(False)
        return found == [False, True]

    def _render(self, conversations: list[list[dict[str, Any]]], add_generation_prompt: bool) -> list[str]:
        # The compiled template itself: `apply_chat_template` copies every message first, which is most of its time.
        render = _compile_jinja_template(self._template).render
        special = self.tokenizer.special_tokens_map
        return [
            render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=TODAY.strftime,
                **special,
            )
            for messages in conversations
        ]

    @cached_property
    def special_ids(self) -> set[int]:
        """Those with a name, and those without one (Gemma's ``<end_of_turn>``)."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(token for token, content in added.items() if content.special)}


def _template_of(processor: Any, tokenizer: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError("the model's processor has no chat template; add chat_template.jinja to the model folder")
    return template


def _message(role: str, text: str, images: bool) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    texts = text.split(IMAGE_PLACEHOLDER) if images else [text]
    for index, part in enumerate(texts):
        if index:
            content.append({"type": "image"})
        own = part.strip() if len(texts) > 1 else part  # LLaVA's "<image>\n" is a picture and a question, no empty line
        if own:
            content.append({"type": "text", "text": own})
    return {"role": role, "content": content}
