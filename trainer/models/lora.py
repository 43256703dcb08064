"""LoRA through ``peft``: adapters for a training, merged into an ordinary model folder at its end."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import ModelConfig, RunConfig
from trainer.errors import UserError
from trainer.models.loading import load_model


def add_lora(model: nn.Module, config: ModelConfig) -> Any:
    """Freezes the model but for low-rank updates of the layers that ``model.lora`` names, and wraps it.

    Raises:
        UserError: an entry of ``target_modules`` or ``train_whole`` matches nothing.
    """
    import peft

    lora = config.lora
    assert lora is not None
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
            lora_dropout=lora.dropout,
            target_modules=adapted_layers(model, config),
        ),
    )
    for parameter in whole_parameters(model, config).values():
        parameter.requires_grad_(True)
    return adapted


def check_lora(model: nn.Module, config: ModelConfig) -> list[str]:
    """Checks what LoRA adapts in a model, with weights or without; returns the names of what is trained.

    Raises:
        UserError: as :func:`add_lora`.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs the package 'peft': pip install 'cotbal[trainer]'")
    updates = [f"{name}.lora_{side}" for name in adapted_layers(model, config) for side in "AB"]
    return [*updates, *whole_parameters(model, config)]


def whole_parameters(model: nn.Module, config: ModelConfig) -> dict[str, nn.Parameter]:
    """The parameters that ``model.lora.train_whole`` names.

    Raises:
        UserError: an entry matches none.
    """
    assert config.lora is not None
    found: dict[str, nn.Parameter] = {}
    for part in config.lora.train_whole:
        matching = {name: parameter for name, parameter in model.named_parameters() if part in name}
        if not matching:
            raise UserError(f"model.lora.train_whole: no parameter of the model has '{part}' in its name")
        found |= matching
    return found


def adapted_layers(model: nn.Module, config: ModelConfig) -> list[str]:
    """Names of the linear layers to adapt: by the last part of the name, frozen parts and the head left alone.

    Raises:
        UserError: an entry of ``target_modules`` matches no layer, or the head.
    """
    assert config.lora is not None
    head = model.get_output_embeddings()  # type: ignore[operator]  # a transformers model
    targets = dict.fromkeys(config.lora.target_modules)
    adaptable: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if module is head and last in targets:
            raise UserError(
                f"model.lora.target_modules: '{last}' is the model's head; to train it, name it in train_whole"
            )
        frozen = any(part in f"{name}.weight" for part in config.freeze)
        if isinstance(module, nn.Linear) and module is not head and not frozen:
            adaptable.setdefault(last, []).append(name)
    for target in targets:
        if target not in adaptable:
            raise UserError(
                f"model.lora.target_modules: no linear layer that is not frozen is named '{target}'; "
                f"there are: {', '.join(sorted(adaptable))}"
            )
    return [name for target in targets for name in adaptable[target]]


def save_merged(adapted: Any, path: str, config: RunConfig, directory: Path) -> None:
    """Writes the model with its updates merged in, as an ordinary model folder; every rank must call.

    The first rank loads the pretrained weights once more, whole and in float32, and merges there: one rounding, and
    nothing of the frozen model to gather, however ZeRO sharded it. It needs host memory for that (4 bytes a weight).

    Args:
        adapted: what :func:`add_lora` returned, trained.
        path: the model that the training started from.
        directory: the folder to write.
    """
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    values = {name: _whole(parameter) for name, parameter in trained.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        with _without_sharding():
            merged = add_lora(load_model(path, config.model, torch.float32), config.model)
        parameters = dict(merged.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        plain = merged.merge_and_unload()
        plain.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32).save_pretrained(directory)
    if dist.is_initialized():
        dist.barrier()


def _whole(parameter: nn.Parameter) -> Tensor:
    """A copy of the parameter on the host, gathered where ZeRO-3 sharded it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().to("cpu", torch.float32)
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", torch.float32, copy=True)


@contextlib.contextmanager
def _without_sharding() -> Iterator[None]:
    """Models are loaded whole inside, although the training process shards what it loads under ZeRO-3."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept
