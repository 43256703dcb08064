"""Loading any transformers image-text-to-text or text model, or the built-in one, from a folder or a hub."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import trainer.models.efficientnet_lite  # noqa: F401  registers the built-in model's vision tower
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.files import refuse_pointers
from trainer.models.config import ImageConfig
from trainer.models.hub import model_folder
from trainer.models.images import pad_to_square, set_image_options
from trainer.models.weights import refuse_missing

# Settings of generation that only matter while sampling, and with several beams.
_OF_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")
_PROCESSOR_NEEDED = "the folder needs its tokenizer's and processor's files, as save_pretrained writes them"
_CONVERTED = "take the model in transformers' own format, which often has a name that ends in -hf"


def load_processor(path: str, images: ImageConfig | None = None, *, local_only: bool = False) -> Any:
    """The processor of a model; for a text model, its tokenizer.

    Args:
        path: as :func:`model_folder` takes it.
        images: ``model.images``. The folder of a trained model has it in its processor.
        local_only: take what is on this machine and ask no hub.

    Raises:
        UserError: nothing loadable is there, or its images cannot be treated so.
    """
    folder = model_folder(path, local_only=local_only)
    _refuse_folder(path, folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)  # else a terminal is asked
    except (OSError, ValueError, ImportError) as error:  # the last: torchvision, which many processors need
        told = " ".join(str(error).split())  # transformers lists what it tried, a line each
        own = [name for name in (_written(folder) or {}).get("architectures") or () if not hasattr(transformers, name)]
        remedy = f"{own[0]} is no class of transformers: {_CONVERTED}" if own else _PROCESSOR_NEEDED
        raise UserError(f"model.path '{path}': no processor could be loaded ({told}); {remedy}") from error
    if images and images.options:
        set_image_options(processor, images.options, path)
    if images and images.aspect_ratio == "pad":
        pad_to_square(processor, path)
    return processor


def load_config(path: str, *, local_only: bool = False) -> Any:
    """The configuration of a model, with arguments as of :func:`load_processor`.

    Raises:
        UserError: none is there, or transformers does not know the model.
    """
    folder = model_folder(path, local_only=local_only)
    _refuse_folder(path, folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path '{path}': no config.json could be loaded ({error})") from error


def _refuse_folder(path: str, folder: Path) -> None:
    """Refuses a folder that holds no model, but what others make one of."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    refuse_pointers(files)
    if any(file.name == "adapter_config.json" for file in files):
        raise UserError(
            f"model.path '{path}': it holds an adapter of PEFT, which is trained with its model; merge them "
            "(merge_and_unload, then save_pretrained of the model and of its processor) and give that folder"
        )
    kind = (_written(folder) or {}).get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:  # with code, transformers would ask at the terminal for a yes
        raise UserError(
            f"model.path '{path}': transformers {transformers.__version__} has no model of type '{kind}', and code "
            f"that comes with a model is not run here; {_CONVERTED}, or a newer transformers"
        )


def _written(folder: Path) -> dict[str, Any] | None:
    """What config.json says; None where there is none that can be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def positions(config: Any) -> int | None:
    """Tokens that a model with this configuration was made for; None where it does not say.

    What its RoPE is stretched by counts: folders with YaRN often keep the number of before.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if most is None or not rope.get("factor"):
        return most
    return max(most, int(rope["factor"] * (rope.get("original_max_position_embeddings") or most)))


def table_of_positions(config: Any) -> int | None:
    """The number of positions beyond which a model cannot be called at all, as GPT-2; None with RoPE and ALiBi."""
    return None if getattr(config.get_text_config(), "rope_parameters", None) else positions(config)


def embedded_tokens(config: Any) -> int | None:
    """The number of tokens that a model with this configuration has embeddings of; None where it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def reads_images(config: Any) -> bool:
    """Whether a model with this configuration takes images beside text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def model_class(config: Any) -> Any:
    """The class that a configuration is trained with.

    Raises:
        UserError: it is neither an image-text-to-text nor a causal language model.
    """
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            chosen = mapping[type(config)]
            return chosen[0] if isinstance(chosen, tuple) else chosen
    raise UserError(f"a model of type '{config.model_type}' is no image-text-to-text and no causal language model")


def sees_images_both_ways(config: Any) -> bool:
    """Whether tokens of an image attend to those behind them too, as those of Gemma 3 and of some of Gemma 4."""
    chosen = model_class(config)
    told = "token_type_ids" in inspect.signature(chosen.forward).parameters
    own_masks = hasattr(chosen, "create_masks_for_generate")  # Gemma 3n is told too, and makes nothing of it
    named = getattr(config.get_text_config(), "use_bidirectional_attention", None) == "vision"  # Gemma 4
    return reads_images(config) and (named or (told and own_masks))


def refuse_attention(config: Any, options: ModelConfig) -> None:
    """Refuses ``model.attention`` where it would silently be another attention than the model's.

    Raises:
        UserError: flash attention, which takes no masks, of a model whose images need one.
    """
    if options.attention == "flash_attention_2" and sees_images_both_ways(config):
        raise UserError(
            f"model.attention: with flash attention the image tokens of a model of type '{config.model_type}' would no "
            "longer see those behind them, as they were trained to; choose sdpa or eager"
        )


def load_model(path: str, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model with its weights in `dtype`, and the parameters that ``model.freeze`` names frozen.

    Raises:
        UserError: nothing loadable is there, a ``freeze`` entry matches no parameter, or as :func:`refuse_attention`.
    """
    found = load_config(path)
    refuse_attention(found, config)
    images = reads_images(found)
    loader: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    folder = model_folder(path, weights=True)
    try:
        options = {} if config.attention is None else {"attn_implementation": config.attention}
        model, loaded = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.path '{path}': no model could be loaded ({error})") from error
    refuse_missing(path, loaded)
    freeze(model, config, path, images)
    _make_savable(model)
    return model


def _make_savable(model: Any) -> None:
    """Takes generation settings away that have no effect and that transformers loads but does not save, such as a
    temperature without sampling. Otherwise a training would end at its first checkpoint.

    What the model does by default stays: one that answers greedily does so when it is saved and loaded again.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        without_effect = [] if settings.do_sample is True else [*_OF_SAMPLING]
        without_effect += _OF_BEAMS if settings.num_beams in (None, 1) else ()
        without_effect += ["pad_token_id"] if (settings.pad_token_id or 0) < 0 else []
        for name in without_effect:
            setattr(settings, name, None)


def empty_model(config: Any, options: ModelConfig) -> Any:
    """The model without memory for its weights (on the meta device), frozen as ``options.freeze`` says."""
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    freeze(model, options, options.path, reads_images(config))
    return model


def freeze(model: nn.Module, config: ModelConfig, path: str, images: bool) -> None:
    """Freezes what ``model.freeze`` names. Its default names the vision tower, which a text model is excused for.

    Raises:
        UserError: an entry matches no parameter.
    """
    excused = () if images else ("vision_tower",)
    for part in config.freeze:
        names = [name for name, _ in model.named_parameters() if part in name]
        if not names and part not in excused:
            parts = dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in model.named_parameters())
            raise UserError(
                f"model.freeze: no parameter of '{path}' has '{part}' in its name; its parts are {', '.join(parts)}"
            )
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)


def stop_generation_at(folder: Path, tokens: Sequence[int]) -> None:
    """Adds tokens to those at which a saved model's generation ends.

    A base model ends at the end of a text; what it was trained on ends answers with a mark of the chat template.
    """
    config = GenerationConfig.from_pretrained(folder)
    ends = config.eos_token_id
    known = [ends] if isinstance(ends, int) else list(ends or [])
    new = [token for token in tokens if token not in known]
    if new:
        config.eos_token_id = [*known, *new]
        config.save_pretrained(folder)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower if its features can be computed once and kept: frozen, and taking them in place of pixels."""
    for module in model.modules():
        if getattr(module, "accepts_features", False) and not any(p.requires_grad for p in module.parameters()):
            return module
    return None
