"""Which models can train on packed sequences: those whose samples meet nowhere but in attention.

Decided from the configuration and the model's class, before any weight is loaded; ``PackingProbe`` looks at the loaded
model once more when a training starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from trainer.data.encoding import Encoded
from trainer.errors import UserError
from trainer.models.loading import load_config, model_class, reads_images

# Models with positions in several dimensions that take another row of them, which tells samples apart.
_FOUR_ROWS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "ernie4_5_vl_moe", "glm4v", "qwen3_vl_moe"}
# Attention that transformers confines to a sample when positions start again.
_CONFINED = {"full_attention", "sliding_attention"}
_PER_TOKEN_INPUTS = {
    "token_type_ids": "its image tokens attend in both directions",
    "mm_token_type_ids": "its image tokens have positions or attention of their own",
    "cross_attention_mask": "it attends to images outside the sequence",
}


def refuse_unpackable(path: str) -> None:
    """Refuses ``training.packing`` for a model on which it would not be exact.

    Raises:
        UserError: names the model type and the reason.
    """
    config = load_config(path)
    reason = unpackable_because(config)
    if reason:
        raise UserError(
            f"training.packing: a model of type '{config.model_type}' cannot be packed exactly, because {reason}; "
            "turn packing off for it"
        )


def unpackable_because(config: Any) -> str | None:
    """Why samples in one sequence would influence each other in a model with this configuration; None if nothing."""
    chosen = model_class(config)
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    layers = set(getattr(text, "layer_types", None) or ()) - _CONFINED
    if "chunked_attention" in layers:  # Llama 4
        return "its attention is cut into chunks at places of the sequence"
    if chosen._is_stateful or layers:
        named = f" ({', '.join(sorted(layers))})" if layers else ""
        return f"it has layers that carry a state from token to token{named}"
    told = config.model_type in _FOUR_ROWS
    if _has_key(getattr(text, "rope_parameters", None), "mrope_section") and not told:
        return "its positions have several dimensions (mrope)"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None):
        return "its attention is not causal"
    if getattr(text, "alibi", False):
        return "its attention depends on distances in the sequence (alibi)"
    parameters = inspect.signature(chosen.forward).parameters
    for name, reason in _PER_TOKEN_INPUTS.items():
        if name in parameters and reads_images(config) and not told:  # of a text model they are optional segments
            return reason
    if "position_ids" not in parameters:
        return "it takes no position_ids"
    if not chosen._supports_attention_backend:
        return "its attention does not use transformers' common masks"
    return None


def sample_positions(config: Any) -> Callable[[Encoded], Tensor] | None:
    """What gives the positions of one sample's tokens, ``[3, tokens]`` of time, height and width, for models with
    positions in several dimensions; None for others.

    It is the model's own rule, which needs no weights.
    """
    if config.model_type not in _FOUR_ROWS:
        return None
    rule: Any = MODEL_MAPPING[type(config)]
    model = rule.__new__(rule)
    nn.Module.__init__(model)
    model.config = config

    def positions(sample: Encoded) -> Tensor:
        if not sample.image_inputs:
            return torch.arange(len(sample.input_ids)).expand(3, -1)
        types = {name: torch.tensor([own]) for name, own in sample.token_types.items()}
        grid = sample.image_inputs["image_grid_thw"]
        found, _ = model.get_rope_index(torch.tensor([sample.input_ids]), image_grid_thw=grid, **types)
        return found[:, 0]

    return positions


def finds_samples_in_one_row(model: Any) -> bool:
    """Whether the model's attention tells samples apart by positions only in a batch of one row: flash attention."""
    return "flash" in (model.config.get_text_config()._attn_implementation or "")


def _has_key(parameters: Any, key: str) -> bool:
    """Whether a mapping, or one inside it (one for each type of layer), has the key."""
    if not isinstance(parameters, dict):
        return False
    return key in parameters or any(_has_key(value, key) for value in parameters.values())
