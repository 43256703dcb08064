"""One rank of test_huggingface_sharded.py: three optimizer steps of every set-up.

Raw loops with ``deepspeed.initialize`` and ``fully_shard``, in two
micro-batches a step, as a user without a Trainer writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from sharded_models import ACCUMULATION, KINDS, STEPS, load, sgd
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers.integrations import HfDeepSpeedConfig

from cotbal_kernels import global_normalizer
from cotbal_kernels.huggingface import apply_fused_loss
from trainer.launching import connect_on_cpu

ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")


def deepspeed_config(stage: int, micro_batch: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        # Threshold 0: every parameter is sharded, the head and the smallest bias too.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def windows(batch: dict[str, Tensor]) -> list[list[dict[str, Tensor]]]:
    """This rank's micro-batches of every step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs = {key: value for key, value in batch.items() if key != "task_weights"}
    steps = [{key: value.chunk(STEPS)[step] for key, value in inputs.items()} for step in range(STEPS)]
    return [
        [
            {key: value.chunk(world * ACCUMULATION)[index] for key, value in step.items()}
            for index in range(rank * ACCUMULATION, (rank + 1) * ACCUMULATION)
        ]
        for step in steps
    ]


def normalizer(window: list[dict[str, Tensor]], task_weights: Tensor) -> Tensor:
    labels, ids = ([part[key] for part in window] for key in ("labels", "loss_task_ids"))
    return global_normalizer(labels, ids, task_weights, shift=True)


def under_zero(folder: Path, kind: str, stage: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    micro_batch = len(batch["labels"]) // (STEPS * ACCUMULATION * dist.get_world_size())
    config = deepspeed_config(stage, micro_batch)
    keep_alive = HfDeepSpeedConfig(config) if stage == 3 else None
    model = load(folder, kind, torch.float32)
    del keep_alive
    apply_fused_loss(model, task_weights=batch["task_weights"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for window in windows(batch):
        denominator = normalizer(window, batch["task_weights"])
        for part in window:
            loss = engine(**part, num_items_in_batch=denominator).loss
            engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            engine.step()
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    found = {}
    for name, parameter in trained:
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    engine.destroy()
    return found


def under_fsdp(folder: Path, kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model: Any = load(folder, kind, torch.float32)
    apply_fused_loss(model, task_weights=batch["task_weights"])
    decoder: nn.Module = model.get_submodule("base_model.model.model" if kind != "full" and kind != "tied" else "model")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    if kind == "full":  # a head of its own, gathered by the hooks of its own call
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    for window in windows(batch):
        denominator = normalizer(window, batch["task_weights"])
        for part in window:
            (model(**part, num_items_in_batch=denominator).loss * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}


def on_rank(folder: Path, _: int, __: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Parameters after the three steps, by engine and kind; `folder` has the models and the batch."""
    connect_on_cpu()
    batch = torch.load(folder / "batch.pt")
    found = {}
    for kind in KINDS:
        for stage, name in enumerate(ZERO, start=1):
            found[name, kind] = under_zero(folder, kind, stage, batch)
        found["FSDP2", kind] = under_fsdp(folder, kind, batch)
    return found
