"""One rank of test_zero_gradients.py: gradients of one optimizer step under DeepSpeed.

A raw ``deepspeed.initialize`` loop, independent of the Trainer subclass: it checks the loss, not the plumbing.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForImageTextToText
from transformers.integrations import HfDeepSpeedConfig

from cotbal_kernels import global_normalizer
from cotbal_kernels.huggingface import apply_fused_loss
from trainer.launching import connect_on_cpu

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = (1, 2)


def gradients(model_dir: str, batch: dict[str, Any], stage: int, micro_batches: int) -> dict[str, torch.Tensor]:
    """Full gradients of every trainable parameter, one optimizer step over this rank's share of `batch`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = batch["input_ids"].shape[0]
    config = {
        "train_micro_batch_size_per_gpu": rows // (world * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    keep_alive = HfDeepSpeedConfig(config) if stage == 3 else None
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    del keep_alive
    apply_fused_loss(model, task_weights=batch["task_weights"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    inputs = {key: value for key, value in batch.items() if key != "task_weights"}
    parts = [{key: value.chunk(world * micro_batches)[index] for key, value in inputs.items()}
             for index in range(rank * micro_batches, (rank + 1) * micro_batches)]  # fmt: skip
    normalizer = global_normalizer(
        [part["labels"] for part in parts], [part["loss_task_ids"] for part in parts], batch["task_weights"], shift=True
    )
    found: dict[str, torch.Tensor] = {}
    for index, part in enumerate(parts):
        loss = engine(**part, num_items_in_batch=normalizer).loss
        engine.backward(loss * world, scale_wrt_gas=False)
        if index == micro_batches - 1:
            found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step()
    return found


def on_rank(
    model_dir: str, batches: dict[str, dict[str, torch.Tensor]], _: int, __: int
) -> dict[tuple[str, int, int], dict[str, torch.Tensor]]:
    """Gradients by name of the batch, stage and number of micro-batches."""
    connect_on_cpu()
    return {
        (name, stage, k): gradients(model_dir, batch, stage, k)
        for name, batch in batches.items()
        for stage in STAGES
        for k in MICRO_BATCHES
    }
