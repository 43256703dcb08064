"""Eq. 2 is global: k micro-batches x r ranks give the gradient of one big batch, under every ZeRO stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from zero_worker import on_rank

pytestmark = pytest.mark.slow
VOCABULARY, IMAGE_TOKEN, PATCHES, WIDTH, ROWS = 97, 96, 4, 12, 8
# fp32 with sums in another order: a few units of 2^-24 on gradients of magnitude up to about 1.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    directory = tmp_path_factory.mktemp("model")
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def batches() -> dict[str, dict[str, torch.Tensor]]:
    """Eight samples of three tasks, unevenly spread, some without a supervised token.

    "uneven": the second quarter, with two ranks and two micro-batches a micro-batch, contributes nothing.
    "ignored rank": nor does the second half, a whole rank of two.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCABULARY - 1, (ROWS, WIDTH), generator=generator)
    input_ids[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    labels = input_ids.clone()
    for row, supervised in enumerate((6, 2, 0, 0, 1, 5, 3, 6)):
        labels[row, : WIDTH - supervised] = -100
    uneven = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator),
        "labels": labels,
        "loss_task_ids": torch.tensor([0, 0, 2, 1, 1, 0, 2, 2]),
        "task_weights": torch.tensor([0.5, 1.75, 0.75]),
    }
    fewer = labels.clone()
    fewer[ROWS // 2 :] = -100
    return {"uneven": uneven, "ignored rank": uneven | {"labels": fewer}}


def oracle(model_dir: Path, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Eq. 2 written out on the unpatched model in float64."""
    model = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float64)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, pixel_values=batch["pixel_values"].double()).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    entropy = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    weight = batch["task_weights"].double()[batch["loss_task_ids"]][:, None] * (targets != -100)
    ((weight * entropy).sum() / weight.sum()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_and_ranks_give_the_single_batch_gradient(
    ranks: int, model_dir: Path, batches: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    results = run_on_ranks(partial(on_rank, str(model_dir), batches), ranks, tmp_path)[0]
    # Compiled for a minute, and for inference only.
    assert "deepspeed_shm_comm" not in (tmp_path / "0.log").read_text()
    expected = {which: oracle(model_dir, batch) for which, batch in batches.items()}
    assert set(results) == {(which, stage, k) for which in batches for stage in (0, 1, 2, 3) for k in (1, 2)}
    for (which, stage, k), found in results.items():
        assert set(found) == set(expected[which])
        for name, gradient in expected[which].items():
            error = (found[name].double() - gradient).abs().max().item()
            assert error < TOLERANCE, f"{which}, ZeRO-{stage}, k={k}, r={ranks}: {name} is off by {error:.2e}"
