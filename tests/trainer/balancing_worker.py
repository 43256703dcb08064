"""One of two ranks of test_balancing_loop.py: methods on its share of the tiny training, under ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from tiny_training import MOVING, OVER_RANKS, make_trainer

from trainer.launching import connect_on_cpu
from trainer.loop.checkpoints import newest_checkpoint

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 2**31,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 100_000,
        "stage3_param_persistence_threshold": 0,  # every parameter is sharded, the head too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def on_rank(model_dir: str, output: Path, rank: int, _: int) -> tuple[dict[str, Any], str]:
    """By method the weights of every step and the head after them; and the checkpoint to go on from."""
    connect_on_cpu()
    found = {}
    for name in OVER_RANKS:
        trainer = make_trainer(
            name, output / name, MOVING[name], model=model_dir, deepspeed=CONFIG, save_strategy="no", optim="sgd",
            learning_rate=0.5, max_steps=3,
        )  # fmt: skip
        assert trainer.is_deepspeed_enabled
        trajectory: list[torch.Tensor] = []
        begin = trainer.weighting.begin_step

        def noted(window: Any, begin: Any = begin, trainer: Any = trainer, trajectory: Any = trajectory) -> Any:
            normalizer = begin(window)
            trajectory.append(trainer.weighting.weights.clone())
            return normalizer

        trainer.weighting.begin_step = noted  # type: ignore[method-assign]
        trainer.train()
        head = trainer.model.lm_head.weight
        with deepspeed.zero.GatheredParameters([head]):
            found[name] = (torch.stack(trajectory), head.detach().clone())
    checkpoint = newest_checkpoint(output / f"seen by {rank}", world_size=2)  # of one folder, which rank 1 sees late
    return found, str(checkpoint)
