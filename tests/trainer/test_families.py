"""Training and evaluation on families of LMMs that differ in what an image is: tiles, positions, masks, types.

The reference is each model's own processor on the whole conversation, and the unpatched model on one sample at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import CHATML, FAMILIES, SIDE, make, make_image_processor, make_tokenizer
from PIL import Image

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.config import ModelConfig
from trainer.data.collator import Collator
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder
from trainer.data.lengths import ImageLengths, token_counter
from trainer.data.packing import PackedCollator
from trainer.data.records import Record, Turn
from trainer.errors import UserError
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.spec import EvaluationSet
from trainer.models.images import vision_input
from trainer.models.loading import embedded_tokens, load_model, sees_images_both_ways
from trainer.models.packable import sample_positions, unpackable_because

SIZES = {"a": (60, 40), "b": (200, 50), "c": (48, 130)}  # of the images in pixels
WIDE = Record("wide", ("a",), (Turn("<image>\nWhat colour is it?", "red"),), ())
LONG = Record("long", ("b",), (Turn("<image>\nWhat is it?", "A long answer"), Turn("How much is it?", "It is 3.")), ())
TEXT = Record("text", (), (Turn("How much is 2 plus one?", "It is 3."), Turn("What colour is it?", "green")), ())
TWO = Record("two", ("c", "a"), (Turn("<image>\n<image>\nWhat colour is it?", "A red answer"),), ())
APART = Record("apart", ("a", "c"), (Turn("<image>\nWhat is it?", "green"), Turn("<image>\nWhat is it?", "red")), ())
RECORDS = [WIDE, LONG, TEXT, TWO, APART]


@dataclass
class Family:
    name: str
    model: Any
    processor: Any
    folder: Path

    @property
    def records(self) -> list[Record]:
        """OneVision's processor makes less of an image among others, and takes them in one turn only."""
        return [record for record in RECORDS if self.name != "llava_onevision" or record is not APART]

    @property
    def encoder(self) -> ConversationEncoder:
        return ConversationEncoder(self.processor, 4096, vocabulary=embedded_tokens(self.model.config))

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def messages(self, record: Record) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for turn in record.turns:
            images = [{"type": "image"}] * turn.question.count("<image>")
            question = {"type": "text", "text": turn.question.replace("<image>", "").strip()}
            found.append({"role": "user", "content": [*images, question]})
            found.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return found

    def processed(self, record: Record, prompt: bool = False) -> dict[str, torch.Tensor]:
        """What the processor makes of the whole conversation, or of all before its last answer."""
        messages = self.messages(record)[: -1 if prompt else None]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        pictures = [Image.open(self.image(name)) for name in record.images]
        bos = self.processor.tokenizer.bos_token
        out = self.processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        return {name: value.double() if value.is_floating_point() else value for name, value in out.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, folder: Path) -> Family:
    return Family(request.param, *make(request.param), folder)


def alone(family: Family, record: Record, labels: list[int]) -> tuple[float, int]:
    """The unpatched model's summed cross-entropy of one sample, and its supervised tokens."""
    with torch.no_grad():
        logits = family.model(**family.processed(record)).logits[0, :-1]
    targets = torch.tensor(labels)[1:]
    sums = F.cross_entropy(logits.double(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return sums.item(), int((targets != IGNORE_INDEX).sum())


def test_a_sample_is_what_the_processor_makes_of_it(family: Family) -> None:
    for record in family.records:
        encoded = family.encoder.training_sample(record, family.image)
        assert encoded.input_ids == family.processed(record)["input_ids"][0].tolist(), record.id
        answers = family.processor.tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
        for mark in ("<|im_end|>", "<end_of_turn>", "\n", "</s>"):
            answers = answers.replace(mark, " ")
        assert answers.split() == " ".join(turn.answer for turn in record.turns).split()


def test_the_mark_that_ends_an_answer_is_known(family: Family) -> None:
    """Gemma's is special without a name; a template without one would be ended by the tokenizer's own."""
    mark = "<end_of_turn>" if family.name == "gemma3" else "<|im_end|>"
    assert family.encoder.chat.end_marks == family.processor.tokenizer.convert_tokens_to_ids([mark])


def test_a_batch_has_the_loss_of_its_samples_one_by_one(family: Family) -> None:
    """Images of different sizes and numbers, and none; last, text alone, which gets a blank image without effect."""
    encoder = family.encoder
    encoded = {record.id: encoder.training_sample(record, family.image) for record in family.records}
    expected = {record.id: alone(family, record, encoded[record.id].labels) for record in family.records}
    collate = Collator(encoder.tokenizer.pad_token_id, encoder.blank_image())
    model, _ = make(family.name)
    apply_fused_loss(model, num_tasks=1)
    for names in ([record.id for record in family.records], ["wide", "text"], ["text"]):
        batch = collate([{"encoded": encoded[name], "task_id": 0} for name in names])
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        model.zero_grad()
        found = model(**inputs)
        sums, tokens = zip(*(expected[name] for name in names), strict=True)
        # Positions and norms are float32 inside of some models.
        assert found.loss.item() == pytest.approx(sum(sums) / sum(tokens), rel=1e-6), names
        found.loss.backward()
        seen = sum(
            p.grad.abs().sum().item() for name, p in model.named_parameters() if "vis" in name and p.grad is not None
        )
        assert (seen == 0) == (names == ["text"])


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_packed_samples_have_the_loss_that_they_have_alone(family: Family, flat: bool) -> None:
    """Several images in a sequence, of several sizes; a sequence of text alone; padding."""
    if unpackable_because(family.model.config):
        pytest.skip(f"{family.name} cannot be packed")
    encoder = family.encoder
    encoded = [encoder.training_sample(record, family.image) for record in family.records]
    expected = [alone(family, record, one.labels) for record, one in zip(family.records, encoded, strict=True)]
    positions = sample_positions(family.model.config)
    collate = PackedCollator(encoder.tokenizer.pad_token_id, encoder.blank_image(), flat, positions)
    model, _ = make(family.name)
    apply_fused_loss(model, num_tasks=len(encoded))
    samples = [{"encoded": one, "task_id": number} for number, one in enumerate(encoded)]
    for rows in ([samples[1:], samples[:1]], [samples[2:3]]):
        batch = collate(rows)
        inputs = {name: value.double() if name.startswith("pixel_values") else value for name, value in batch.items()}
        with torch.no_grad():
            found = model(**inputs)
        for number in {sample["task_id"] for row in rows for sample in row}:
            sums, tokens = expected[number]
            assert found.task_tokens[number] == tokens
            assert found.task_loss[number].item() == pytest.approx(sums, rel=1e-6), family.records[number].id


def test_answers_in_a_batch_are_those_of_one_prompt_at_a_time(family: Family) -> None:
    chosen = EvaluationSet("x", (), family.folder, ("exact_match",), max_new_tokens=8)
    prompts = [family.encoder.prompt(record, family.image) for record in family.records]
    scorer = BatchScorer(family.model, family.processor.tokenizer, 8)
    found = [result["prediction"] for result in scorer(chosen, prompts).results]
    expected = []
    for record in family.records:
        inputs = family.processed(record, prompt=True)
        out = family.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = family.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(text)
    assert found == expected
    assert len(set(expected)) > 2  # there is something to confuse


def test_losses_of_given_answers(family: Family) -> None:
    chosen = EvaluationSet("x", (), family.folder, ("perplexity",), max_new_tokens=8)
    encoder, (model, _) = family.encoder, make(family.name)
    encoded = [encoder.training_sample(record, family.image) for record in family.records]
    found = BatchScorer(model, family.processor.tokenizer, 8)(chosen, encoded).results
    for result, record, one in zip(found, family.records, encoded, strict=True):
        sums, tokens = alone(family, record, one.labels)
        assert (result["loss_sum"], result["tokens"]) == (pytest.approx(sums, rel=1e-6), tokens)


def test_tokens_are_counted_without_decoding_an_image(family: Family, tmp_path: Path) -> None:
    for name, size in SIZES.items():  # the same headers, other contents
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    counter = token_counter(family.processor, 4096)
    for record in family.records:
        counted = counter.training_sample(record, replace(family, folder=tmp_path).image)
        encoded = family.encoder.training_sample(record, family.image)
        assert (len(counted.input_ids), counted.supervised) == (len(encoded.input_ids), encoded.supervised), record.id


def test_tokens_need_an_embedding_but_for_an_images(family: Family) -> None:
    """As many as the largest token of a record needs, and one less; an image's own never meets the table."""
    ids = family.encoder.training_sample(TWO, family.image).input_ids
    tokenizer = family.processor.tokenizer
    image = tokenizer.convert_tokens_to_ids(family.processor.image_token)
    largest = max(token for token in ids if token != image)
    enough = ConversationEncoder(family.processor, 4096, vocabulary=largest + 1)
    assert enough.training_sample(TWO, family.image).input_ids == ids
    spelt = tokenizer.convert_ids_to_tokens(largest)
    with pytest.raises(UserError) as caught:
        ConversationEncoder(family.processor, 4096, vocabulary=largest).training_sample(TWO, family.image)
    wanted = f"record '{TWO.id}': the tokenizer gives '{spelt}' ({largest}), and the model has embeddings of {largest} "
    assert str(caught.value).startswith(wanted)


def test_patches_of_images_are_counted_for_the_dry_run(family: Family) -> None:
    """As many as the model's own patch embedding makes of them, tiles and sizes included."""
    embeddings = [
        module for name, module in family.model.named_modules()
        if (isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) and module.kernel_size == module.stride)
        or (isinstance(module, torch.nn.Linear) and name.endswith("patch_embed.proj"))
    ]  # fmt: skip
    assert len(embeddings) == 1
    seen: list[int] = []
    handle = embeddings[0].register_forward_hook(
        lambda module, args, out: seen.append(out.numel() // module.weight.shape[0])
    )
    images = token_counter(family.processor, 4096).features
    assert isinstance(images, ImageLengths)
    patch = vision_input(family.model.config).patch
    try:
        for record in (WIDE, LONG, TWO):
            seen.clear()
            alone(family, record, family.encoder.training_sample(record, family.image).labels)
            assert images.values([family.image(name) for name in record.images]) == sum(seen) * patch, record.id
    finally:
        handle.remove()


def test_images_that_see_both_ways_are_refused_flash_attention(family: Family, tmp_path: Path) -> None:
    """It takes no masks, and would be causal without a word."""
    family.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = family.model(**family.processed(WIDE), output_attentions=True)
    family.model.set_attn_implementation("sdpa")
    ahead = any(bool(layer.triu(1).any()) for layer in out.attentions)
    assert ahead == (family.name == "gemma3")
    assert sees_images_both_ways(family.model.config) == ahead
    family.model.config.save_pretrained(tmp_path)
    options = ModelConfig(path=str(tmp_path), attention="flash_attention_2", freeze=[])
    # Others are refused as well: flash attention is not installed.
    message = r"model\.attention: with flash attention the image tokens of .* 'gemma3'" if ahead else "could be loaded"
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path), options, torch.float32)


def test_images_that_count_less_among_others_stand_in_one_turn(folder: Path) -> None:
    """The check before a training says so too."""
    processor = make("llava_onevision")[1]
    message = r"record 'apart' has images in several turns, .*; put all of them into the first question"
    for encoder in (ConversationEncoder(processor, 4096), token_counter(processor, 4096)):
        with pytest.raises(UserError, match=message):
            encoder.training_sample(APART, lambda name: folder / f"{name}.png")


def test_a_model_that_marks_its_prompts_is_refused() -> None:
    """PaliGemma, whose attention on a prompt is not that of training on causal tokens."""
    images = make_image_processor("siglip", "SiglipImageProcessorPil", size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    text = make_tokenizer([], {"image_token": "<image>"}, bos="<bos>")
    processor = transformers.PaliGemmaProcessor(images, text, chat_template=CHATML)
    with pytest.raises(UserError, match=r"models with a PaliGemmaProcessor: its prompts attend in both directions"):
        token_counter(processor, 128)
