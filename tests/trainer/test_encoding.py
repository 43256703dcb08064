"""Conversations to tokens: the answers and nothing else are supervised, and generation sees the training's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import IMAGE, IMAGES, PATCHES, TEXT, TURNS
from tokenizers import processors
from torch import Tensor

from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder, Encoded
from trainer.data.oddities import oddities
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.models.loading import load_processor
from trainer.task_config import TaskConfig
from trainer.tasks import load_task

CHANNELS = 6
# llava-hf/llava-1.5-7b-hf: roles in capitals, a blank after each text, no mark at an answer's end.
LLAVA_15 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
RECORDS = [TEXT, TURNS, IMAGE, IMAGES]


class Features:
    """Features that name their image: every entry is the number in the file's name."""

    one_by_one = True

    def of(self, paths: Sequence[Path]) -> list[Tensor]:
        return [torch.full((PATCHES, CHANNELS), float(path.stem.split("_")[-1])) for path in paths]

    def example(self) -> Tensor:
        return torch.ones(PATCHES, CHANNELS)


@pytest.fixture(scope="module")
def folder(tiny_tasks: list[TaskConfig]) -> Path:
    return tiny_tasks[0].image_root


def with_template(processor: Any, template: str, *, bos: bool = False) -> ConversationEncoder:
    """The pixel model's processor speaking another template; `bos` puts ``<s>`` before every text, as Llama's does."""
    processor.chat_template = template
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    return ConversationEncoder(processor, 200)


def supervised_texts(encoder: ConversationEncoder, encoded: Encoded) -> list[str]:
    """The supervised stretches as text; every supervised label is the token at its own place."""
    stretches: list[list[int]] = []
    before = IGNORE_INDEX
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [encoder.tokenizer.decode(stretch) for stretch in stretches]


def question(turn: Turn) -> str:
    return turn.question.replace("<image>", "").strip()


class TestSupervision:
    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
    def test_built_in_template(self, encoder: ConversationEncoder, folder: Path, record: Record) -> None:
        encoded = encoder.training_sample(record, folder.joinpath)
        assert supervised_texts(encoder, encoded) == [f" {turn.answer}</s>" for turn in record.turns]
        # The whole conversation written out by hand and tokenised in one go.
        image = "<image>" * PATCHES
        text = ""
        for turn in record.turns:
            first = image if turn.question.startswith("<image>") else ""
            last = image if turn.question.endswith("<image>") else ""
            text += f"<|user|>{first} {question(turn)}{last}<|assistant|> {turn.answer}</s>"
        assert encoded.input_ids == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoded.supervised == sum(label != IGNORE_INDEX for label in encoded.labels)
        assert not encoded.truncated

    @pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
    def test_a_template_without_an_end_mark_gets_one(
        self, processor: Any, folder: Path, record: Record, bos: bool
    ) -> None:
        encoder = with_template(processor, LLAVA_15, bos=bos)
        encoded = encoder.training_sample(record, folder.joinpath)
        assert supervised_texts(encoder, encoded) == [f" {turn.answer}</s>" for turn in record.turns]
        text = encoder.tokenizer.decode(encoded.input_ids).replace("<image>" * PATCHES, "<image>")
        image = {True: "<image>\n", False: ""}
        assert text == ("<s>" if bos else "") + " ".join(
            f"USER: {image['<image>' in turn.question]}{question(turn)} ASSISTANT: {turn.answer}</s>"
            for turn in record.turns
        )

    @pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
    def test_chatml_ends_by_itself(self, processor: Any, folder: Path, record: Record) -> None:
        """``<|im_end|>`` is not the tokenizer's EOS; no second end mark is added to it."""
        encoder = with_template(processor, CHATML)
        encoded = encoder.training_sample(record, folder.joinpath)
        assert supervised_texts(encoder, encoded) == [f"{turn.answer}<|im_end|>\n" for turn in record.turns]
        assert encoder.tokenizer.eos_token_id not in encoded.input_ids

    @pytest.mark.parametrize("record", [TEXT, IMAGE], ids=lambda record: record.id)
    def test_a_template_that_writes_the_first_token_itself(self, processor: Any, folder: Path, record: Record) -> None:
        encoder = with_template(processor, "{{ '<s>' }}" + CHATML, bos=True)
        for encoded in (encoder.training_sample(record, folder.joinpath), encoder.prompt(record, folder.joinpath)):
            first = encoder.tokenizer.convert_tokens_to_ids("<s>")
            assert encoded.input_ids[0] == first
            assert encoded.input_ids.count(first) == 1

    def test_a_system_message_stands_before_the_first_question(self, encoder: ConversationEncoder) -> None:
        record = replace(TURNS, system=" Be brief. ")
        plain, encoded = encoder.training_sample(TURNS, Path), encoder.training_sample(record, Path)
        before = encoder.tokenizer("<|user|>  Be brief. ", add_special_tokens=False)["input_ids"]
        assert encoded.input_ids == before + plain.input_ids
        assert encoded.labels == [IGNORE_INDEX] * len(before) + plain.labels
        assert encoder.prompt(record, Path).input_ids == before + encoder.prompt(TURNS, Path).input_ids

    def test_an_empty_answer_among_others(self, encoder: ConversationEncoder) -> None:
        record = Record("a", (), (Turn("One?", ""), Turn("Two?", "sure")), ())
        encoded = encoder.training_sample(record, Path)
        assert supervised_texts(encoder, encoded) == ["</s>", " sure</s>"]

    @pytest.mark.parametrize("template", ["", LLAVA_15, CHATML], ids=["built_in", "llava_15", "chatml"])
    @pytest.mark.parametrize("record", [TEXT, IMAGE], ids=lambda record: record.id)
    def test_generation_sees_the_prompt_of_training(
        self, processor: Any, folder: Path, record: Record, template: str
    ) -> None:
        encoder = with_template(processor, template or processor.chat_template, bos=bool(template))
        encoded = encoder.training_sample(record, folder.joinpath)
        prompt = encoder.prompt(record, folder.joinpath)
        length = len(prompt.input_ids)
        assert encoded.input_ids[:length] == prompt.input_ids
        assert encoded.labels == [IGNORE_INDEX] * length + encoded.input_ids[length:]
        assert prompt.labels == [IGNORE_INDEX] * length
        assert encoded.image_inputs.keys() == prompt.image_inputs.keys()
        for key, value in prompt.image_inputs.items():
            assert torch.equal(encoded.image_inputs[key], value)

    def test_a_prompt_has_the_turns_before_it(self, encoder: ConversationEncoder) -> None:
        prompt = encoder.prompt(TURNS, Path)
        assert encoder.tokenizer.decode(prompt.input_ids) == (
            "<|user|> How much?<|assistant|> It is 3.</s><|user|> Are you sure?<|assistant|>"
        )


class TestErrors:
    def test_answers_that_cannot_be_told_from_prompts(self, processor: Any) -> None:
        changed = CHATML.replace("part['text']", "part['text'] | upper")
        encoder = with_template(processor, "{{ messages | length }}" + changed)
        with pytest.raises(UserError, match=r"record 'text': the chat template writes an answer otherwise .* appends"):
            encoder.training_sample(TEXT, Path)

    def test_a_template_that_cannot_write_a_conversation(self, processor: Any) -> None:
        encoder = with_template(processor, "{% for tool in tools %}{% endfor %}" + CHATML)
        with pytest.raises(
            UserError, match=r"record 'text': the chat template cannot write .* \(TypeError: 'NoneType'"
        ):
            encoder.training_sample(TEXT, Path)

    def test_an_answer_that_loses_something(self, processor: Any) -> None:
        """DeepSeek-R1's template drops thoughts."""
        encoder = with_template(processor, CHATML.replace("part['text']", "part['text'].split('</think>')[-1]"))
        record = Record("a", (), (Turn("How much?", "<think>2 + 1</think>It is 3."),), ())
        with pytest.raises(UserError, match=r"record 'a': of the answer '<think>2 .* writes 'It is 3\..*' only"):
            encoder.training_sample(record, Path)

    def test_no_template(self, processor: Any) -> None:
        processor.chat_template = processor.tokenizer.chat_template = None
        with pytest.raises(UserError, match="no chat template"):
            ConversationEncoder(processor, 10)

    def test_a_template_that_writes_no_image_token(self, processor: Any, folder: Path) -> None:
        """Without a word, a model would be trained blind."""
        encoder = with_template(processor, CHATML.replace("<image>", "<picture>"))
        for encode in (encoder.training_sample, encoder.prompt):
            with pytest.raises(UserError, match=r"record 'image': .* 0 '<image>' for 1 image\(s\)"):
                encode(IMAGE, folder.joinpath)

    def test_a_text_that_spells_the_models_image_token(self, processor: Any) -> None:
        encoder = with_template(processor, CHATML.replace("<image>", "<pad>"))
        processor.image_token = "<pad>"
        with pytest.raises(UserError, match=r"record 'a': .* 1 '<pad>' for 0 image\(s\)"):
            encoder.training_sample(Record("a", (), (Turn("What is <pad>?", "no"),), ()), Path)
        record = Record("a", (), (Turn("<image>?", "an <image>"),), ())  # of another model
        assert [part.text.count("<image>") for part in encoder.chat.parts(record)] == [1, 1]
        assert oddities(record, encoder.chat) == {
            "placeholder": "its text has '<image>', which stays text, since its 'images' is empty"
        }
        assert not oddities(record, ConversationEncoder(processor.tokenizer, 200).chat)

    def test_truncation(self, processor: Any, folder: Path) -> None:
        whole = ConversationEncoder(processor, 200).training_sample(TURNS, folder.joinpath)
        starts = [index for index, label in enumerate(whole.labels) if label != IGNORE_INDEX]
        for length in range(starts[0] + 1, len(whole.input_ids) + 1):
            cut = ConversationEncoder(processor, length).training_sample(TURNS, folder.joinpath)
            assert (cut.input_ids, cut.labels) == (whole.input_ids[:length], whole.labels[:length])
            assert cut.truncated == (length < len(whole.input_ids))
            assert cut.supervised == sum(start < length for start in starts)
        with pytest.raises(UserError, match=rf"record 'turns': no supervised token within {starts[0]} tokens"):
            ConversationEncoder(processor, starts[0]).training_sample(TURNS, folder.joinpath)

    def test_images_that_do_not_fit(self, processor: Any, folder: Path) -> None:
        """An image cut in half would crash the model, so the second turn is not cut but refused."""
        encoder = ConversationEncoder(processor, 200)
        needed = len(encoder.prompt(IMAGES, folder.joinpath).input_ids)
        assert ConversationEncoder(processor, needed).training_sample(IMAGES, folder.joinpath).truncated
        message = rf"record 'images': its images .* need {needed} tokens, more than model\.max_length = {needed - 1}"
        with pytest.raises(UserError, match=message):
            ConversationEncoder(processor, needed - 1).training_sample(IMAGES, folder.joinpath)


class TestImages:
    def test_features_and_pixels_lay_out_the_same_tokens(
        self, feature_model: Path, tiny_tasks: list[TaskConfig]
    ) -> None:
        processor = load_processor(str(feature_model))
        pixels, features = ConversationEncoder(processor, 200), ConversationEncoder(processor, 200, Features())
        tasks = [load_task(config) for config in tiny_tasks]
        records = [*((record, task) for task in tasks for record in task.train), (IMAGES, tasks[0])]
        for record, task in records:
            image_path = task.image_path
            with_pixels, with_features = (one.training_sample(record, image_path) for one in (pixels, features))
            assert (with_pixels.input_ids, with_pixels.labels) == (with_features.input_ids, with_features.labels)
            assert pixels.prompt(record, image_path).input_ids == features.prompt(record, image_path).input_ids
            count = len(record.images)
            assert [tuple(v.shape) for v in with_pixels.image_inputs.values()] == [(count, 3, 64, 64)][:count]
        assert pixels.blank_image().input_ids == features.blank_image().input_ids

    @pytest.mark.parametrize("one_token", [True, False])
    def test_tokens_of_features_are_those_of_the_token_repeated_in_the_text(
        self, processor: Any, folder: Path, one_token: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But it is not in the text: tokenizers take long for hundreds. Only where they would make others of many is it
        repeated there."""
        encoder = ConversationEncoder(processor, 200, Features())
        if not one_token:
            monkeypatch.setattr(processor, "image_token", "colour")  # an ordinary word
        text = f"a {encoder.image_token}{encoder.image_token} b"
        repeated = text.replace(encoder.image_token, encoder.image_token * PATCHES)
        expected = processor.tokenizer(repeated, add_special_tokens=False)["input_ids"]
        seen: list[str] = []
        tokenize = type(processor.tokenizer).__call__

        def spied(tokenizer: Any, text: Any, **options: Any) -> Any:
            seen.append(text)
            return tokenize(tokenizer, text, **options)

        monkeypatch.setattr(type(processor.tokenizer), "__call__", spied)
        assert encoder._with_features(text, [torch.zeros(PATCHES, CHANNELS)] * 2).ids == expected
        assert (max(found.count(encoder.image_token) for found in seen) == 2) == one_token

    def test_features_come_in_the_order_of_the_images(self, processor: Any, folder: Path) -> None:
        encoded = ConversationEncoder(processor, 200, Features()).training_sample(IMAGES, folder.joinpath)
        found = encoded.image_inputs["pixel_values"]
        assert found.shape == (2, PATCHES, CHANNELS)
        assert found[:, 0, 0].tolist() == [1, 0]  # colour_train_1, box_train_0

    def test_pixels_are_the_image_processors(self, encoder: ConversationEncoder, folder: Path) -> None:
        """A square of one colour: every pixel is (colour / 255 - mean) / std of CLIP."""
        encoded = encoder.training_sample(IMAGE, folder.joinpath)
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        expected = (torch.tensor([220, 30, 30]) / 255 - mean) / std
        # Eight-bit input, single precision: a few units of 1e-7 times values below 3.
        torch.testing.assert_close(
            encoded.image_inputs["pixel_values"], expected[None, :, None, None].expand(1, 3, 64, 64), rtol=0, atol=2e-6
        )

    @pytest.mark.parametrize("features", [None, Features()], ids=["pixels", "features"])
    def test_blank_image(self, processor: Any, features: Features | None) -> None:
        blank = ConversationEncoder(processor, 200, features).blank_image()
        token = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert (blank.input_ids, blank.labels) == ([token] * PATCHES, [IGNORE_INDEX] * PATCHES)
        values = blank.image_inputs["pixel_values"]
        assert values.shape == ((1, 3, 64, 64) if features is None else (1, PATCHES, CHANNELS))
        assert len(values.flatten(2).unique(dim=2)[0, 0]) == 1 if features is None else not values.any()


def test_a_tokenizer_alone_will_do(processor: Any) -> None:
    """A text-only model has no processor."""
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    encoder = ConversationEncoder(tokenizer, 200)
    assert supervised_texts(encoder, encoder.training_sample(TURNS, Path)) == [" It is 3.</s>", " Yes, quite sure.</s>"]
