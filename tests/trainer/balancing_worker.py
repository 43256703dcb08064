"""Run under torchrun by test_balancing_loop.py: methods on this rank's share of the tiny training, under ZeRO-3.

torchrun --nproc_per_node 2 tests/trainer/balancing_worker.py MODEL_DIR OUTPUT_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from tiny_training import MOVING, OVER_RANKS, make_trainer

from trainer.launching import connect_on_cpu
from trainer.training import newest_checkpoint

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


def main() -> None:
    model_dir, output = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    connect_on_cpu()
    rank = torch.distributed.get_rank()
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
    torch.save((found, str(checkpoint)), output / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Threads of native libraries can abort an ordinary exit ("terminate called without an active exception").
    os._exit(0)


if __name__ == "__main__":
    main()
