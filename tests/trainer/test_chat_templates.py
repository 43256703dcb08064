"""Kinds of chat templates that models are published with: what of a conversation is trained on, and what is asked.

The templates are short ones of the same kind; the reference is each template's own rendering of the whole conversation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.collator import Collator
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, padding_token
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.spec import EvaluationSet

ONE = Record("one", (), (Turn("How much is 2 plus one?", "It is 3."),), ())
TWO = Record("two", (), (Turn("How much is 2 plus one?", "It is 3."), Turn("What colour is it?", "red")), ())
BRIEF = "Be brief: one word."
# The same with a system message.
BRIEF_ONE, BRIEF_TWO = (replace(record, id=f"brief {record.id}", system=BRIEF) for record in (ONE, TWO))
# Code: blanks at the ends of a text are a part of it.
INDENTED = Record("code", (), (Turn("def one(x):\n", "    return x\n"), Turn("\n  go on:\n", "  red \n\n")), ())
# A record without images spells what stands for one elsewhere.
SVG = Record("svg", (), (Turn("What is <image> in SVG?", " <image> shows one:\n<image/>"),), (), "Of <image> only.")
RECORDS = (ONE, TWO, BRIEF_ONE, BRIEF_TWO, INDENTED, SVG)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>"]
ASK = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
SAY = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}"


@dataclass(frozen=True)
class Kind:
    """A template, and for one turn and for two: what of each answer is trained on (``A`` is the answer), and how the
    prompt for the last one ends."""

    template: str
    one: list[str]
    two: list[str]
    asks: str
    mark: str = "<|im_end|>"


KINDS = {
    "ChatML": Kind(
        f"{LOOP}{SAY}{{% endfor %}}{ASK}", ["A<|im_end|>\n"], ["A<|im_end|>\n"] * 2, "<|im_start|>assistant\n"
    ),
    # Qwen3: an empty thought opens the last answer, and is taken out once another follows.
    "thoughts in the last answer": Kind(
        f"{LOOP}{{% if m.role == 'assistant' and loop.last %}}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
        f"{{% else %}}{SAY}{{% endif %}}{{% endfor %}}{ASK}",
        ["<think>\n\n</think>\n\nA<|im_end|>\n"],
        ["A<|im_end|>\n"] * 2,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    # DeepSeek-R1's distilled models: a prompt begins a thought, a conversation has none.
    "thoughts in the prompt": Kind(
        f"{LOOP}{SAY}{{% endfor %}}{{{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}}}",
        ["A<|im_end|>\n"],
        ["A<|im_end|>\n"] * 2,
        "<|im_start|>assistant\n",
    ),
    # Phi-3: the end of the text behind the end of the last answer.
    "an end of the whole": Kind(
        f"{LOOP}{{{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}}}{{% endfor %}}"
        "{{ '<|assistant|>\n' if add_generation_prompt else '</s>' }}",
        ["A<|end|>\n"],
        ["A<|end|>\n"] * 2,
        "<|assistant|>\n",
        "<|end|>",
    ),
    # Command A: the header of a next answer whether asked for or not.
    "always a next answer": Kind(
        f"{LOOP}{SAY}{{% endfor %}}{{{{ '<|im_start|>assistant\n' if messages[-1].role == 'assistant' or "
        "add_generation_prompt }}",
        ["A<|im_end|>\n"],
        ["A<|im_end|>\n"] * 2,
        "<|im_start|>assistant\n",
    ),
    # gpt-oss: the last answer ends otherwise than those before.
    "an end of its own": Kind(
        f"{LOOP}{{{{ '<|im_start|>' + m.role + '\n' + m.content }}}}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|im_end|>' }}{% endfor %}" + ASK,
        ["A<|return|>"],
        ["A<|im_end|>", "A<|return|>"],
        "<|im_start|>assistant\n",
        "<|return|>",
    ),
    # Qwen1.5: the end is written once a message follows.
    "an end between messages": Kind(
        f"{LOOP}{{{{ '<|im_start|>' + m.role + '\n' + m.content }}}}"
        "{{ '<|im_end|>\n' if not loop.last or add_generation_prompt }}{% endfor %}" + ASK,
        ["A<|im_end|>"],
        ["A<|im_end|>\n", "A<|im_end|>"],
        "<|im_start|>assistant\n",
    ),
    # GLM-4: nothing but the next question's header ends an answer.
    "headers alone": Kind(
        f"{LOOP}{{{{ '<|' + m.role + '|>' + m.content }}}}{{% endfor %}}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        ["A<|im_end|>"],
        ["A<|user|>", "A<|im_end|>"],
        "<|assistant|>",
    ),
    # The same, where a prompt begins a thought.
    "headers alone, thoughts in the prompt": Kind(
        f"{LOOP}{{{{ '<|' + m.role + '|>' + m.content }}}}{{% endfor %}}"
        "{{ '<|assistant|><think>' if add_generation_prompt }}",
        ["A<|im_end|>"],
        ["A<|user|>", "A<|im_end|>"],
        "<|assistant|>",
    ),
    # LFM2: what is no string is written as JSON, so content is a string.
    "JSON of what is no string": Kind(
        LOOP
        + SAY.replace("m.content", "(m.content if m.content is string else m.content | tojson)")
        + "{% endfor %}"
        + ASK,
        ["A<|im_end|>\n"],
        ["A<|im_end|>\n"] * 2,
        "<|im_start|>assistant\n",
    ),
    "lists of parts": Kind(
        LOOP + SAY.replace("m.content", "m.content[0].text") + "{% endfor %}" + ASK,
        ["A<|im_end|>\n"],
        ["A<|im_end|>\n"] * 2,
        "<|im_start|>assistant\n",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def encoder(kind: Kind) -> ConversationEncoder:
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template = kind.template
    return ConversationEncoder(tokenizer, 500)


def stretches(encoder: ConversationEncoder, record: Record) -> list[str]:
    """Supervised tokens as text."""
    encoded = encoder.training_sample(record, Path)
    found: list[list[int]] = []
    for place, label in enumerate(encoded.labels):
        if label != IGNORE_INDEX:
            assert label == encoded.input_ids[place]
            if encoded.labels[place - 1] == IGNORE_INDEX:
                found.append([])
            found[-1].append(label)
    return [encoder.tokenizer.decode(ids) for ids in found]


def messages(kind: Kind, record: Record) -> list[dict[str, Any]]:
    turns = [("system", record.system)] if record.system else []
    turns += [item for turn in record.turns for item in (("user", turn.question), ("assistant", turn.answer))]
    parts = kind is KINDS["lists of parts"]
    return [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_answers_are_trained_on_with_their_end_marks(kind: Kind, encoder: ConversationEncoder, record: Record) -> None:
    wanted = kind.one if len(record.turns) == 1 else kind.two
    filled = [text.replace("A", turn.answer) for text, turn in zip(wanted, record.turns, strict=True)]
    assert stretches(encoder, record) == filled
    whole = encoder.tokenizer.apply_chat_template(messages(kind, record), tokenize=False)
    found = encoder.tokenizer.decode(encoder.training_sample(record, Path).input_ids)
    last = record.turns[-1].answer
    ends = whole.rindex(filled[-1]) + len(filled[-1]) if filled[-1] in whole else whole.rindex(last) + len(last)
    added = "" if filled[-1] in whole else "<|im_end|>"  # where the template has no end
    assert found == whole[:ends] + added


@pytest.mark.parametrize("name", ["ChatML", "thoughts in the last answer"])
def test_blanks_that_a_template_takes_off_an_answer_are_not_trained_on(name: str) -> None:
    """Qwen3's and Llama 3's."""
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template = KINDS[name].template.replace("m.content", "(m.content | trim)")
    encoder = ConversationEncoder(tokenizer, 500)
    answers = [turn.answer.strip() for turn in INDENTED.turns]
    wanted = [text.replace("A", answer) for text, answer in zip(KINDS[name].two, answers, strict=True)]
    assert stretches(encoder, INDENTED) == wanted
    whole = tokenizer.apply_chat_template(messages(KINDS[name], INDENTED), tokenize=False)
    assert tokenizer.decode(encoder.training_sample(INDENTED, Path).input_ids) == whole


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_a_prompt_is_what_stood_before_the_answer(kind: Kind, encoder: ConversationEncoder, record: Record) -> None:
    prompt = encoder.prompt(record, Path)
    encoded = encoder.training_sample(record, Path)
    length = len(prompt.input_ids)
    assert prompt.input_ids == encoded.input_ids[:length]
    assert encoder.tokenizer.decode(prompt.input_ids).endswith(kind.asks)
    assert encoder.tokenizer.decode(encoded.input_ids[length:]).startswith(record.turns[-1].answer)
    unanswered = replace(record, turns=(*record.turns[:-1], replace(record.turns[-1], answer="")))
    assert encoder.prompt(unanswered, Path).input_ids == prompt.input_ids


def test_generation_ends_where_answers_do(kind: Kind, encoder: ConversationEncoder) -> None:
    assert encoder.chat.end_marks == encoder.tokenizer.convert_tokens_to_ids([kind.mark])


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        # Gemma 2
        (
            LOOP + "{{ raise_exception('System role not supported') if m.role == 'system' }}",
            r"record 'brief two': the chat template cannot write .*System role not supported\); it may take no system",
        ),
        (
            "{% for m in messages if m.role != 'system' %}",
            r"record 'brief two': the chat template does not write the system message 'Be brief: one word\.'; put it ",
        ),
    ],
)
def test_a_system_message_is_never_lost(loop: str, message: str) -> None:
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template = f"{loop}{SAY}{{% endfor %}}{ASK}"
    encoder = ConversationEncoder(tokenizer, 500)
    assert encoder.training_sample(TWO, Path)
    for encode in (encoder.training_sample, encoder.prompt):
        with pytest.raises(UserError, match=message):
            encode(BRIEF_TWO, Path)


def test_a_system_message_may_stand_in_the_last_question() -> None:
    """Mistral 0.3."""
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}"
        f"{LOOP}{{{{ '<|im_start|>' + m.role + '\n' }}}}{{{{ system if m == asked[-1] }}}}"
        f"{{{{ m.content + '<|im_end|>\n' }}}}{{% endfor %}}{ASK}"
    )
    encoder = ConversationEncoder(tokenizer, 500)
    first, last = (turn.answer for turn in TWO.turns)
    assert stretches(encoder, BRIEF_TWO) == [f"{first}<|im_end|>\n", f"{last}<|im_end|>\n"]
    whole = tokenizer.apply_chat_template(messages(KINDS["ChatML"], BRIEF_TWO), tokenize=False)
    assert tokenizer.decode(encoder.training_sample(BRIEF_TWO, Path).input_ids) == whole
    assert f"user\n{BRIEF}\n\n{TWO.turns[1].question}" in whole


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    """Llama 3.2 writes today's, and where it is told none the one here; Mistral Small 3 always asks for today's."""
    template = (
        "{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') if NAMED else '26 Jul 2024' %}{% endif %}"
        "{{ 'Today Date: ' + date_string }}" + KINDS["ChatML"].template
    )
    found = []
    for named in ("strftime_now is defined", "false"):
        tokenizer = make_tokenizer(SPECIAL, {})
        tokenizer.chat_template = template.replace("NAMED", named)
        found.append(ConversationEncoder(tokenizer, 500).training_sample(TWO, Path).input_ids)
    assert found[0] == found[1]
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(found[0])


@pytest.mark.parametrize("begins", ["", "<s>"], ids=["no first token", "first token"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_a_text_model_has_the_tokens_of_apply_chat_template(begins: str, named: bool) -> None:
    """Its tokenizer puts ``<s>`` before a text, and before a conversation only what the template writes, whether the
    tokenizer calls it its first token or not."""
    tokenizer = make_tokenizer(SPECIAL, {}, bos="<s>")
    tokenizer.chat_template = begins + KINDS["ChatML"].template
    if not named:
        tokenizer.bos_token = None
    encoder = ConversationEncoder(tokenizer, 500)
    for record in RECORDS:
        said = messages(KINDS["ChatML"], record)
        whole = tokenizer.apply_chat_template(said, tokenize=True)["input_ids"]
        asked = tokenizer.apply_chat_template(said[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert encoder.training_sample(record, Path).input_ids == whole
        assert encoder.prompt(record, Path).input_ids == asked


def test_a_tokenizer_without_a_token_for_padding() -> None:
    """Llama 3, Mistral: losses and answers of a batch are those of its records one by one."""
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template, tokenizer.pad_token = KINDS["ChatML"].template, None
    encoder = ConversationEncoder(tokenizer, 500)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval()
    samples, prompts = zip(
        *((encoder.training_sample(record, Path), encoder.prompt(record, Path)) for record in RECORDS), strict=True
    )
    batch = Collator(padding_token(tokenizer), None)([{"encoded": one, "task_id": 0} for one in samples])
    del batch["loss_task_ids"]
    alone = [model(torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss for one in samples]
    summed = sum(loss * one.supervised for loss, one in zip(alone, samples, strict=True))
    assert model(**batch).loss.item() == pytest.approx(summed.item() / sum(one.supervised for one in samples), rel=1e-6)
    found = BatchScorer(model, tokenizer, 4)(EvaluationSet("x", (), Path(), ("exact_match",), 8), prompts)
    for result, prompt in zip(found.results, prompts, strict=True):
        out = model.generate(torch.tensor([prompt.input_ids]), max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True)
        assert result["prediction"] == answer


def test_a_tokenizer_without_an_end_of_text() -> None:
    """It is needed where the template ends answers with no special token, and where nothing else fills batches up."""
    tokenizer = make_tokenizer(SPECIAL, {})
    tokenizer.chat_template, tokenizer.eos_token = KINDS["ChatML"].template, None
    encoder = ConversationEncoder(tokenizer, 500)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoder.chat.end_marks, padding_token(tokenizer)) == ([end], tokenizer.convert_tokens_to_ids("<pad>"))
    assert encoder.training_sample(ONE, Path).labels.count(end) == 1
    tokenizer.chat_template = LOOP + "{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    with pytest.raises(
        UserError, match="the tokenizer has no token for the end of a text, so that nothing would end an"
    ):
        ConversationEncoder(tokenizer, 500).training_sample(ONE, Path)
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="the tokenizer has no token for the end of a text"):
        ConversationEncoder(tokenizer, 500)
