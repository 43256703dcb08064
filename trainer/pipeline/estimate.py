"""What a run would need: memory, disk and time, from the model's configuration alone (``cotbal run --dry-run``).

Parameters are counted on the meta device, so nothing is downloaded or allocated. Everything else is arithmetic with
the assumptions written beside it; no number here was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import BUILT_IN, ModelConfig, RunConfig
from trainer.errors import UserError
from trainer.models.images import vision_input
from trainer.models.loading import empty_model, load_config
from trainer.models.lora import adapted_layers, whole_parameters
from trainer.pipeline.planned_data import PlannedData
from trainer.units import byte_size, duration

# Peak of dense bfloat16 products in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0,
    "RTX 4090": 165.0, "RTX 3090": 71.0, "A10": 125.0, "L4": 121.0,
}  # fmt: skip
ASSUMED_GPU = "A100"  # the papers', where no GPU is here and none is given
LOSS_WORKSPACE = 512 * 2**20  # bytes, bound of the fused loss
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 keeps gathered at once (its stage3_max_live_parameters)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and the shapes that activations depend on."""

    total: int  # of the model that is loaded
    trained: int  # that get gradients and optimizer states; with LoRA the updates alone
    vision: int  # of the image encoder
    vision_trained: int
    patch: int  # numbers in a patch of an image, which is a token of the image encoder; 0 for a text model
    hidden: int
    layers: int
    intermediate: int
    key_value: int  # width of keys
    vocabulary: int
    head_trained: bool

    @property
    def language(self) -> int:
        """Parameters that every token passes through."""
        return self.total - self.vision


def model_size(config: Any, options: ModelConfig) -> ModelSize:
    """Counts a model without its weights.

    Args:
        config: the transformers configuration.
        options: what is frozen, and LoRA.

    Raises:
        UserError: ``freeze`` or LoRA names nothing in the model.
    """
    model = empty_model(config, options)
    named = dict(model.named_parameters())  # a tied head counts once
    vision = [name for name in named if "vision" in name or "visual" in name]
    trained = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)
    head = model.get_output_embeddings()
    head_trained = head.weight.requires_grad and options.lora is None
    vision_trained = sum(named[name].numel() for name in vision if named[name].requires_grad)
    if options.lora is not None:
        layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in adapted_layers(model, options)}
        rank = options.lora.rank
        updates = {name: rank * (layer.in_features + layer.out_features) for name, layer in layers.items()}
        updates |= {name: parameter.numel() for name, parameter in whole_parameters(model, options).items()}
        trained = sum(updates.values())
        vision_trained = sum(count for name, count in updates.items() if "vision" in name or "visual" in name)
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        total=sum(parameter.numel() for parameter in named.values()),
        trained=trained,
        vision=sum(named[name].numel() for name in vision),
        vision_trained=vision_trained,
        patch=vision_input(config).patch,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        key_value=size * (getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=head.weight.shape[0],
        head_trained=head_trained,
    )


def memory_per_gpu(size: ModelSize, config: RunConfig) -> dict[str, float]:
    """Bytes on one GPU by purpose, at the longest batch; what the allocator and the driver keep comes on top."""
    training, gpus = config.training, config.launch.ranks
    stage = training.zero_stage
    number = _number(config)
    added = size.trained if config.model.lora is not None else 0  # beside the model's own parameters
    tokens = training.batch_size * config.model.max_length
    layer = 8 * size.hidden + 2 * size.key_value + 4 * size.intermediate  # numbers a token leaves, with a gated MLP
    kept = size.layers * layer
    if training.gradient_checkpointing:
        kept = size.layers * size.hidden + layer
    memory = {
        "parameters": (size.total + added) * number / (gpus if stage == 3 else 1),
        "gradients": size.trained * number / (gpus if stage >= 2 else 1),
        "optimizer states": size.trained * _states(config) / (gpus if stage >= 1 else 1),
        "activations": float(tokens * kept * number),
        "loss at most": LOSS_WORKSPACE
        + float(tokens * size.hidden * number)
        + (size.vocabulary * size.hidden * number if size.head_trained else 0),
    }
    if stage == 3:
        memory["gathered by ZeRO-3"] = float(min(size.total, LIVE_PARAMETERS) * number)
    if training.offload != "none":
        del memory["optimizer states"]
        if stage >= 2:  # a shard's gradients go to the host as soon as they are reduced
            del memory["gradients"]
    if training.offload == "parameters":
        del memory["parameters"]
    return memory


def memory_of_host(size: ModelSize, config: RunConfig) -> dict[str, float]:
    """Bytes by purpose that ``training.offload`` takes of one machine, for a training's processes on it."""
    training = config.training
    memory = {"optimizer states": 12.0 * size.trained, "gradients": 4.0 * size.trained}  # float32
    if training.offload == "parameters":
        memory["parameters"] = float(_number(config) * size.total)
    if training.offload == "none":
        return {}
    return {purpose: size / config.launch.nodes_per_training for purpose, size in memory.items()}


def space_on_disk(size: ModelSize, config: RunConfig, trainings: int) -> dict[str, float]:
    """Bytes in the run's folder by purpose: the model of every training, and checkpoints of those that run at once.

    A checkpoint has the model as transformers saves it, DeepSpeed's copy of it (under ZeRO-3 of frozen parameters
    alone), and the optimizer states; with LoRA nothing of what is frozen. Two are kept, and the next one is written
    before the older goes.
    """
    number, states = _number(config), _states(config)
    if config.model.lora is not None:
        checkpoint = (2 * number + states) * size.trained
    else:
        copied = size.total - size.trained if config.training.zero_stage == 3 else size.total
        checkpoint = number * (size.total + copied) + states * size.trained
    checkpoints = 3 * min(config.launch.slots, trainings)
    return {
        f"{trainings} models": float(trainings * number * size.total),
        f"{checkpoints} checkpoints": float(checkpoints * checkpoint),
    }


def _number(config: RunConfig) -> int:
    """Bytes of a parameter in training and on disk."""
    return 2 if config.training.precision == "bf16" else 4


def _states(config: RunConfig) -> int:
    """Bytes of AdamW's two moments, and of the float32 master copy that DeepSpeed keeps of what a ZeRO stage shards or
    bf16 rounds."""
    return 12 if config.training.zero_stage >= 1 or config.training.precision == "bf16" else 8


def training_flop(size: ModelSize, tokens: int, pixels: int) -> float:
    """Model FLOP of a training: 2 for a parameter and token forward, 2 for its inputs and 2 for itself backward.

    With everything trained that is 6 P a token. Frozen weights have no gradient, a frozen image encoder no backward
    pass. Products of attention scores, padding and recomputation are not counted.
    """
    backward = tokens * 2.0 * (size.language + size.trained - size.vision_trained)
    if size.patch and size.vision_trained:
        backward += pixels / size.patch * 2.0 * (size.vision + size.vision_trained)
    return forward_flop(size, tokens, pixels) + backward


def forward_flop(size: ModelSize, tokens: int, pixels: int) -> float:
    """Model FLOP of forward passes."""
    return 2.0 * tokens * size.language + (2.0 * pixels / size.patch * size.vision if size.patch else 0.0)


def peak_tflops() -> tuple[float, str]:
    """Peak TFLOP/s of this machine's GPU, or of an assumed one; and where the number is from."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, peak in PEAK_TFLOPS.items():
            if known in name:
                return peak, f"peak of {name}"
        return PEAK_TFLOPS[ASSUMED_GPU], f"{name} is not in the table: assumed, as of an {ASSUMED_GPU}"
    return PEAK_TFLOPS[ASSUMED_GPU], f"no GPU here: assumed, as of an {ASSUMED_GPU}"


def report(
    config: RunConfig, rows: Sequence[dict[str, Any]], data: PlannedData, tflops: float | None, mfu: float
) -> str:
    """Tokens, memory, disk and time of the planned trainings, as lines to print.

    Args:
        rows: of ``trainings.plan``, with sequences, tokens and pixels.
        tflops: peak of one GPU; None takes this machine's, or an assumed one.
        mfu: share of the peak that a training is assumed to reach, counting model FLOP.
    """
    packed = config.training.packing
    try:
        found = load_config(config.model.path, local_only=True)
    except UserError:
        found = None
    size = model_size(found, config.model) if found else None
    peak, source = peak_tflops() if tflops is None else (tflops, "--tflops")
    gpus = config.launch.ranks
    speed = gpus * peak * 1e12 * mfu
    width = max(28, *(len(row["training"]) + 1 for row in rows))
    unit = "sequences" if packed else "samples"
    lines = [f"{'training':<{width}}{unit:>10}{'tokens':>15}{'supervised':>14}{'time':>14}"]
    seconds = longest = 0.0
    for row in rows:
        time = "-"
        if size:
            flop = training_flop(size, row["tokens"], row["pixels"])
            own = (flop + forward_flop(size, row["forward_tokens"], row["forward_pixels"])) / speed
            seconds += own
            longest = max(longest, own)
            time = duration(own)
        numbers = f"{row['sequences']:>10,}{row['tokens']:>15,}{row['supervised']:>14,}{time:>14}"
        lines.append(f"{row['training']:<{width}}{numbers}")
    lines.append(f"tokens are {data.source}; all epochs")
    if not size and config.model.path == BUILT_IN:
        lines.append("time, memory and disk: not for the built-in model, which the run makes")
        return "\n".join(lines)
    if not size:
        lines.append(
            f"time, memory and disk: no config.json of '{config.model.path}' on this machine; `cotbal check` "
            "downloads a hub's, without the weights, or give a folder with --set model.path=FOLDER"
        )
        return "\n".join(lines)
    slots = config.launch.slots
    at_once = f", at least {duration(max(seconds / slots, longest))} with {slots} at once" if slots > 1 else ""
    added = any(row["forward_tokens"] for row in rows)
    more = ", 2 P a token of the forward passes that balancing methods add," if added else ""
    lines.append(
        f"time {duration(seconds)} for all trainings one after the other{at_once}, "
        f"GPU time {duration(seconds * gpus)}: an estimate, 4 P + 2 P trained FLOP a token{more} "
        f"on {gpus} GPU(s) of {peak:g} TFLOP/s ({source}), of which {mfu:.0%} are assumed to be reached (--mfu); "
        "padding and generation not counted"
    )
    lines.append(
        f"parameters {size.total:,}, trained {size.trained:,}"
        + (f", of the frozen image encoder {size.vision:,}" if size.vision and not size.vision_trained else "")
    )
    where = f"memory of one GPU at {config.training.batch_size} x {config.model.max_length} tokens"
    for place, memory in {
        where: memory_per_gpu(size, config),
        "memory of the host": memory_of_host(size, config),
        "disk at most": space_on_disk(size, config, len(rows)),
    }.items():
        if memory:
            parts = " + ".join(f"{name} {byte_size(value)}" for name, value in memory.items())
            lines.append(f"{place}: an estimate, {byte_size(sum(memory.values()))} = {parts}")
    return "\n".join(lines)
