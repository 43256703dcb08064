"""Encoded conversations to batches: padding, blank images, task ids, and what a data set keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversations import IMAGE, IMAGES, PATCHES, TEXT, TURNS

from trainer.config import ModelConfig
from trainer.data.collator import Collator, MixtureDataset
from trainer.data.encoding import IGNORE_INDEX, ConversationEncoder
from trainer.data.records import Record
from trainer.models.loading import load_model, load_processor
from trainer.task_config import TaskConfig
from trainer.tasks import load_task


def test_layout(encoder: ConversationEncoder, tiny_tasks: list[TaskConfig]) -> None:
    records = [TEXT, IMAGES, TURNS, IMAGE]
    samples = [encoder.training_sample(record, tiny_tasks[0].image_root.joinpath) for record in records]
    batch = Collator(7, encoder.blank_image())(
        [{"encoded": sample, "task_id": task} for sample, task in zip(samples, (2, 0, 2, 1), strict=True)]
    )
    width = max(len(sample.input_ids) for sample in samples)
    for row, sample in enumerate(samples):
        padding = width - len(sample.input_ids)
        assert batch["input_ids"][row].tolist() == sample.input_ids + [7] * padding
        assert batch["labels"][row].tolist() == sample.labels + [IGNORE_INDEX] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(sample.input_ids) + [0] * padding
    assert batch["loss_task_ids"].tolist() == [2, 0, 2, 1]
    assert not batch["loss_task_ids"].is_floating_point()  # a float would be cast to bf16 on the way
    expected = [samples[1].image_inputs["pixel_values"], samples[3].image_inputs["pixel_values"]]
    assert torch.equal(batch["pixel_values"], torch.cat(expected))  # no blank image is added


@pytest.mark.parametrize("order", [(TEXT, TURNS), (TURNS, TEXT)], ids=["short first", "long first"])
def test_an_all_text_batch_gets_a_masked_blank_image(encoder: ConversationEncoder, order: tuple[Record, ...]) -> None:
    samples = [encoder.training_sample(record, Path) for record in order]
    items = [{"encoded": sample, "task_id": 0} for sample in samples]
    blank = encoder.blank_image()
    batch = Collator(0, blank)(items)
    first = len(samples[0].input_ids)
    assert batch["input_ids"].shape[1] == max(first + PATCHES, len(samples[1].input_ids))
    assert batch["input_ids"][0, first : first + PATCHES].tolist() == blank.input_ids
    assert torch.equal(batch["pixel_values"], blank.image_inputs["pixel_values"])
    for row, sample in enumerate(samples):
        assert batch["attention_mask"][row].sum() == len(sample.input_ids)
        assert (batch["labels"][row] != IGNORE_INDEX).sum() == sum(x != IGNORE_INDEX for x in sample.labels)
    assert "pixel_values" not in Collator(0, None)(items)


@pytest.mark.parametrize("kind", ["pixel_model", "feature_model"])
def test_the_blank_image_changes_no_loss_and_no_gradient(kind: str, request: pytest.FixtureRequest) -> None:
    """With it the projector has a gradient, of zeros; without it there is none, and ranks would wait for it."""
    path = str(request.getfixturevalue(kind))
    encoder = ConversationEncoder(load_processor(path), 200)
    items = [{"encoded": encoder.training_sample(record, Path), "task_id": 0} for record in (TEXT, TURNS)]
    results = []
    for blank in (encoder.blank_image(), None):
        model = load_model(path, ModelConfig(path=path), torch.float32)
        batch = Collator(encoder.tokenizer.pad_token_id, blank)(items)
        del batch["loss_task_ids"]
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (plain_loss, plain_gradients) = results
    # Only the length of the masked tail differs, so sums may be blocked differently: fp32 rounding near 1.
    assert loss == pytest.approx(plain_loss, abs=1e-6)
    projector = {name for name in gradients if "multi_modal_projector" in name}
    assert len(projector) == 4
    for name, gradient in gradients.items():
        assert gradient is not None, name
        if name in projector:
            assert not gradient.any()
            assert plain_gradients[name] is None
        else:
            torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-5, atol=1e-6)


def test_mixture_dataset(
    encoder: ConversationEncoder, tiny_tasks: list[TaskConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [load_task(config) for config in tiny_tasks]
    dataset = MixtureDataset(encoder, tasks, [tasks[0].train[:2], [], tasks[2].train[3:4]])
    assert [dataset[index]["task_id"] for index in range(len(dataset))] == [0, 0, 2]
    expected = [encoder.training_sample(tasks[k].train[n], tasks[k].image_path) for k, n in ((0, 0), (0, 1), (2, 3))]
    assert [dataset[index]["encoded"].input_ids for index in range(3)] == [sample.input_ids for sample in expected]
    assert dataset[2] is dataset[2]  # text is kept
    assert dataset[0] is not dataset[0]  # pixels are not: a data set of them would fill the memory
    once = MixtureDataset(encoder, tasks, [[], [], tasks[2].train[3:4]], again=False)
    assert once[0] is not once[0]
    assert once[0] == dataset[2]
    lengths = [len(encoder.training_sample(record, Path).input_ids) for record in tasks[2].train[:3]]
    monkeypatch.setattr("trainer.data.collator.MOST_KEPT_TOKENS", sum(lengths) - 1)
    dataset = MixtureDataset(encoder, tasks, [[], [], tasks[2].train[:3]])  # nor is text without end
    again = [dataset[index] is dataset[index] for index in range(3)]
    assert again == [True, True, False]
    assert [len(dataset[index]["encoded"].input_ids) for index in range(3)] == lengths
