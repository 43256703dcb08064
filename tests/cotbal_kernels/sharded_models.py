"""Models and optimizer of test_huggingface_sharded.py, for the test and for its worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

STEPS, ACCUMULATION = 3, 2
VOCABULARY, ROWS, LENGTH = 97, 24, 11
# What is trained: everything; everything with one matrix for embeddings and head; adapters of the trunk under a
# frozen head; adapters of trunk and head; adapters of the trunk and a whole copy of the head.
KINDS = ("full", "tied", "lora", "lora_head", "saved_head")


def save_models(folder: Path) -> None:
    """One folder for each way to have a head: untied and tied."""
    for name, tied in (("untied", False), ("tied", True)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)


def load(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """The model of a kind as a user loads it, adapters included."""
    model = AutoModelForCausalLM.from_pretrained(folder / ("tied" if kind == "tied" else "untied"), dtype=dtype)
    if kind in ("full", "tied"):
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj", *(["lm_head"] if kind == "lora_head" else [])]
    saved = ["lm_head"] if kind == "saved_head" else None
    torch.manual_seed(1)
    # Not the usual start at zero, which would leave one of the two matrices without a gradient.
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    return get_peft_model(model, config).to(dtype)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Linear in the gradients, unlike Adam: errors stay as small as they are."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
