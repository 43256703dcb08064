"""Loading any transformers image-text-to-text model, or the built-in one, from a folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import trainer.models.efficientnet_lite  # noqa: F401  registers the built-in model's vision tower
from trainer.config import ModelConfig
from trainer.errors import UserError


def load_processor(path: str) -> Any:
    """The processor of a model folder or hub name.

    Raises:
        UserError: nothing loadable is there.
    """
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path '{path}': no processor could be loaded ({error})") from error


def load_model(path: str, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model with its weights in `dtype`, and the parameters that ``model.freeze`` names frozen.

    Raises:
        UserError: nothing loadable is there, or a ``freeze`` entry matches no parameter.
    """
    try:
        options = {} if config.attention is None else {"attn_implementation": config.attention}
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path '{path}': no image-text-to-text model could be loaded ({error})") from error
    for part in config.freeze:
        names = [name for name, _ in model.named_parameters() if part in name]
        if not names:
            raise UserError(f"model.freeze: no parameter of '{path}' has '{part}' in its name")
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)
    return model


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower if its features can be computed once and kept: frozen, and taking them in place of pixels."""
    for module in model.modules():
        if getattr(module, "accepts_features", False) and not any(p.requires_grad for p in module.parameters()):
            return module
    return None
