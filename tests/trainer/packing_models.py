"""Tiny models and documents that the tests of packing share, with the loss of documents one by one as the oracle."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from trainer.data.encoding import IGNORE_INDEX, Encoded

VOCABULARY, IMAGE_TOKEN, PATCHES, SIDE = 61, 60, 4, 8
WEIGHTS = torch.tensor([0.35, 1.9, 0.0, 0.75])  # lambda of four tasks, one of them off
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


def llava(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
            patch_size=SIDE // 2, projection_dim=16,
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        attn_implementation=attention,
    )  # fmt: skip
    return _spread(LlavaForConditionalGeneration(config))


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return _spread(LlamaForCausalLM(LlamaConfig(**TEXT, attn_implementation=attention)))


def mistral(attention: str = "sdpa") -> MistralForCausalLM:
    """Attention in a sliding window shorter than the longest document."""
    torch.manual_seed(0)
    return _spread(MistralForCausalLM(MistralConfig(**TEXT, sliding_window=5, attn_implementation=attention)))


def mixtral(attention: str = "sdpa") -> MixtralForCausalLM:
    """Experts chosen token by token."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return _spread(MixtralForCausalLM(MixtralConfig(**TEXT, **experts, attn_implementation=attention)))


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    """Learnt absolute positions: where a document's positions start matters, whatever it attends to."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
                        attn_implementation=attention)  # fmt: skip
    return _spread(GPT2LMHeadModel(config))


def _spread(model: Any) -> Any:
    """Weights large enough that attention tells tokens apart: with the usual 0.02 a leak would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def documents(images: bool) -> list[tuple[Encoded, int]]:
    """Eight documents of 3 to 17 tokens and four tasks: one text only, one with two images, images first or inside.

    Their first tokens are supervised, which carries no loss alone, and would if they were predicted from a document
    before them.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 17, 6, 12, 3, 11, 8, 13]
    places: list[tuple[int, ...]] = [(0,), (2, 9), (), (3,), (), (7,), (1,), (5,)]
    tasks = [0, 1, 3, 0, 3, 2, 1, 1]
    made = []
    for length, starts, task in zip(lengths, places, tasks, strict=True):
        ids = torch.randint(2, IMAGE_TOKEN, (length,), generator=generator)
        supervised = torch.rand(length, generator=generator) < 0.6
        supervised[[0, -1]] = True
        inputs: dict[str, Tensor] = {}
        if images and starts:
            for start in starts:
                ids[start : start + PATCHES] = IMAGE_TOKEN
                supervised[start : start + PATCHES] = False
            inputs["pixel_values"] = torch.randn(len(starts), 3, SIDE, SIDE, generator=generator)
        labels = torch.where(supervised, ids, IGNORE_INDEX)
        made.append((Encoded(ids.tolist(), labels.tolist(), inputs), task))
    return made


def blank_image() -> Encoded:
    return Encoded([IMAGE_TOKEN] * PATCHES, [IGNORE_INDEX] * PATCHES, {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)})


def one_by_one(model: nn.Module, given: list[tuple[Encoded, int]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Eq. 2 written out over documents that never share a batch, in float64: loss, tokens per task, gradients."""
    model = copy.deepcopy(model).double()
    weights = WEIGHTS.double()
    total = torch.zeros((), dtype=torch.float64)
    tokens = torch.zeros(len(WEIGHTS), dtype=torch.int64)
    for encoded, task in given:
        inputs = {key: value.double() for key, value in encoded.image_inputs.items()}
        logits = model(input_ids=torch.tensor([encoded.input_ids]), use_cache=False, **inputs).logits[0, :-1]
        targets = torch.tensor(encoded.labels[1:])
        total = total + weights[task] * F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
        tokens[task] += int((targets != IGNORE_INDEX).sum())
    loss = total / (weights * tokens).sum()
    loss.backward()
    named = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return loss.detach(), tokens, gradients
