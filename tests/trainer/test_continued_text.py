"""Parts of a conversation have the tokens that the whole conversation has, so a model sees what it was pretrained on.

SentencePiece tokenizers begin a text with a blank: an answer tokenised alone would have one too many. The tokenizers
here are small ones of that kind; the reference is the whole conversation, tokenised in one go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder
from trainer.data.records import Record, Turn
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.spec import EvaluationSet
from trainer.models.loading import load_processor

TEXT = ["USER: How much is 2 plus one? ASSISTANT: It is 3. What colour is it? red [INST] [/INST] <| user assistant |>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PATCHES = 3

LOOP = "{% for m in messages %}"
LLAVA_15 = (  # of llava-hf/llava-1.5-7b-hf
    LOOP + "{{ m.role.upper() + ': ' }}{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt }}"
)
ZEPHYR = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt }}"
)
MISTRAL = (
    "{{ bos_token }}" + LOOP + "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
    "' ' + m.content + eos_token }}{% endfor %}"
)
PHI_3 = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt }}"
)
LLAVA_15_TEXT = LLAVA_15.replace("m.content if part", "[{'type': 'text', 'text': m.content}] if part")
HEADERS = "{% for m in messages %}{{ '<|end|>' + m.content }}{% endfor %}{{ '<|end|>' if add_generation_prompt }}"
TURNS = Record("turns", (), (Turn("How much is 2 plus one?", "It is 3."), Turn("What colour?", "red")), ())
IMAGES = Record(
    "images", ("a", "b"), (Turn("<image>\nHow much is it?", "3"), Turn("<image>\nWhat colour is it?", "red")), ()
)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`legacy`, as in Llama 2's file: a blank before a text and behind special tokens; `first`: before a text."""
    blank = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = blank
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False)
    )
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(trained))  # bytes are text, which decoding keeps
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_encoder(kind: str, template: str) -> ConversationEncoder:
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, 500)


def tokens(encoder: ConversationEncoder, ids: list[int]) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens(ids)


def supervised(encoder: ConversationEncoder, record: Record) -> list[str]:
    encoded = encoder.training_sample(record, Path)
    return tokens(encoder, [label for label in encoded.labels if label != IGNORE_INDEX])


KINDS = pytest.mark.parametrize("kind", ["legacy", "first"])


@KINDS
@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL, PHI_3], ids=["zephyr", "mistral", "phi_3"])
def test_the_whole_conversation_in_one_go(kind: str, template: str) -> None:
    encoder = make_encoder(kind, template)
    messages = [
        {"role": role, "content": text}
        for turn in TURNS.turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    whole = encoder.tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert encoder.training_sample(TURNS, Path).input_ids == whole
    asked = encoder.tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert encoder.prompt(TURNS, Path).input_ids == asked


@KINDS
def test_llava_15_is_trained_on_what_its_authors_trained_it_on(kind: str) -> None:
    """``ASSISTANT: red</s>``: a word and the end of the answer carry a loss, and nothing else."""
    encoder = make_encoder(kind, LLAVA_15_TEXT)
    text = "USER: How much is 2 plus one? ASSISTANT: It is 3.</s>USER: What colour? ASSISTANT: red</s>"
    ids = encoder.training_sample(TURNS, Path).input_ids
    whole = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    first_answer = ids.index(encoder.tokenizer.eos_token_id)
    assert ids[:first_answer] == whole[:first_answer]
    assert supervised(encoder, TURNS)[-2:] == ["▁red", "</s>"]
    assert supervised(encoder, TURNS)[0] == "▁It"


@KINDS
def test_an_answer_behind_a_newline_begins_without_a_blank(kind: str) -> None:
    found = supervised(make_encoder(kind, PHI_3), TURNS)
    assert "".join(found).replace("▁", " ").replace("<0x0A>", "\n").replace(" \n", "\n") == (
        "It is 3.<|end|>\nred<|end|>\n"
    )
    assert found.count("</s>") == 0  # a blank between the end mark and the newline is no missing end mark


class Says(torch.nn.Module):
    """Goes on after any prompt with the same tokens."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.said = torch.nn.Parameter(torch.tensor([ids], dtype=torch.float64), requires_grad=False)

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, self.said.long().expand(len(input_ids), -1)], 1)


@KINDS
@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL, PHI_3, LLAVA_15_TEXT, HEADERS])
@pytest.mark.parametrize("answer", ["red", "    red\n", " It\n  is 3."])
def test_a_prediction_is_the_answer_that_a_model_was_trained_on(kind: str, template: str, answer: str) -> None:
    """To the blank: decoders take one off the beginning of a text, and templates write one before answers."""
    encoder = make_encoder(kind, template)
    record = Record("code", (), (Turn("How much is it?", answer),), ())
    encoded = encoder.training_sample(record, Path)
    said = [label for label in encoded.labels if label != IGNORE_INDEX]
    said = said[: 1 + next(place for place, token in enumerate(said) if token in encoder.chat.end_marks)]
    scorer = BatchScorer(Says(said), encoder.tokenizer, 2, encoder.chat.gap)
    chosen = EvaluationSet("code", (), Path(), ("exact_match",), 8)
    found = scorer(chosen, [encoder.prompt(record, Path)] * 2).results
    assert [row["prediction"] for row in found] == [answer] * 2


class Features:
    """Of images, by number: what stands for them is of no matter here."""

    one_by_one = True

    def of(self, paths: Sequence[Path]) -> list[Tensor]:
        return [torch.zeros(PATCHES, 2) for _ in paths]

    def example(self) -> Tensor:
        return torch.zeros(PATCHES, 2)


@KINDS
@pytest.mark.parametrize("features", [Features(), None], ids=["features", "pixels"])
def test_images_in_later_turns(kind: str, features: Features | None, pixel_model: Path, tmp_path: Path) -> None:
    processor: Any = load_processor(str(pixel_model))
    processor.tokenizer = make_tokenizer(kind)
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = LLAVA_15
    for name in IMAGES.images:
        Image.new("RGB", (40, 40)).save(tmp_path / name, "png")
    encoder = ConversationEncoder(processor, 500, features)
    ids = encoder.training_sample(IMAGES, tmp_path.joinpath).input_ids
    image = "<image>" * (PATCHES if features else 4)
    blank = "" if kind == "legacy" else " "  # which the legacy kind writes behind a special token by itself
    text = f"USER: {image}\nHow much is it? ASSISTANT: 3</s>{blank}USER: {image}\nWhat colour is it? ASSISTANT: red</s>"
    assert tokens(encoder, ids) == tokens(encoder, encoder.tokenizer(text)["input_ids"])
