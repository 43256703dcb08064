"""Trainings and evaluations whose data sets the batches of two ranks do not divide.

Each case has its batch size for both ranks together, so that one process runs it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from hf_models import build
from test_huggingface_trainer import LAM, Record, WeightedTrainer, arguments, collate, parameters, records
from torch.utils.data import IterableDataset

from cotbal_kernels.huggingface import TaskWeightedTrainerMixin, apply_fused_loss


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Stream(IterableDataset[Record]):
    def __init__(self, samples: Sequence[Record]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Record]:
        return iter(self.samples)


class AnyOrder(TaskWeightedTrainerMixin, transformers.Trainer):
    """With the sampler of the arguments."""


def collate_wide(batch: Sequence[Record]) -> dict[str, torch.Tensor]:
    """All batches of one width: process 0 concatenates those that it dispatches."""
    out = collate(batch)
    return {
        name: torch.nn.functional.pad(value, (0, 14 - value.shape[1]), value=-100 * (name == "labels"))
        if value.dim() > 1
        else value
        for name, value in out.items()
    }


def collate_flat(batch: Sequence[Record]) -> dict[str, torch.Tensor]:
    """One row, as collators without padding make it."""
    names = ("input_ids", "labels")
    out = {name: torch.cat([sample[name] for sample in batch])[None] for name in names}
    return out | {
        "loss_task_ids": torch.cat([torch.full_like(sample["labels"], sample["loss_task_ids"]) for sample in batch])[
            None
        ],
        "position_ids": torch.cat([torch.arange(len(sample["labels"])) for sample in batch])[None],
    }


def trained(
    out: Path,
    samples: int,
    batch: int = 4,
    accumulation: int = 2,
    steps: int = 5,
    kind: type = WeightedTrainer,
    stream: bool = False,
    collator: Any = collate,
    resume: bool = False,
    model: str = "llama",
    **changes: Any,
) -> dict[str, Any]:
    """Parameters and logs of ``steps`` steps; ``batch`` samples of all ranks in a micro-batch."""
    own = batch if changes.get("accelerator_config", {}).get("split_batches") else batch // ranks()

    def trainer(folder: Path, **more: Any) -> Any:
        data: Any = records(samples)
        return kind(
            model=apply_fused_loss(build(model, **ROUTED if model == "mixtral" else {}), LAM),
            args=arguments(folder, own, accumulation, steps, **changes | more),
            train_dataset=Stream(data) if stream else data,
            data_collator=collator,
        )

    run = trainer(out, **{"save_strategy": "steps", "save_steps": 1} if resume else {})
    run.train()
    if resume:
        run = trainer(out)
        run.train(resume_from_checkpoint=str(out / f"checkpoint-{steps - 1}"))
    logs = [{key: log[key] for key in log if key.startswith("task_") or key == "loss"} for log in run.state.log_history]
    return {"parameters": parameters(run), "logs": logs[:steps]}


def evaluated(out: Path, samples: int, batch: int = 4, **changes: Any) -> dict[str, Any]:
    """Metrics of ``evaluate`` and of ``predict``, the sums per batch and the labels."""
    own = batch if changes.get("accelerator_config", {}).get("split_batches") else batch // ranks()
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        loss, tokens, correct = prediction.predictions
        seen["sums"] = torch.tensor([loss.sum(), tokens.sum(), correct.sum()])
        seen["labels"] = torch.tensor(prediction.label_ids)
        return {}

    trainer = WeightedTrainer(
        model=apply_fused_loss(build("llama"), LAM),
        args=arguments(out, 1, 1, per_device_eval_batch_size=own, **changes),
        eval_dataset=records(samples, seed=1),
        data_collator=collate_wide,
        compute_metrics=metrics,
    )
    found = trainer.evaluate() | trainer.predict(records(samples + 1, seed=2)).metrics
    timed = ("_runtime", "_per_second", "_time")
    return seen | {"metrics": {key: value for key, value in found.items() if not key.endswith(timed)}}


def refused(out: Path) -> str:
    try:
        trained(out, 13, steps=1, collator=collate_flat)
    except ValueError as error:
        return str(error)
    return "nothing"


ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
WORKERS = {"dataloader_num_workers": 1}
SPLIT = {"accelerator_config": {"split_batches": True}}
DISPATCH = {"accelerator_config": {"dispatch_batches": True}}
# 13 samples: in the last batch of an epoch one rank has a sample and a repeated one, the other repeats only. 15: the
# second rank repeats one. Two steps an epoch: the last one of each repeats.
EQUAL: dict[str, Callable[[Path], Any]] = {
    # Nothing is repeated: two ranks of two micro-batches of two are one batch of eight.
    "whole batches": lambda out: trained(out, 40, batch=4 * (3 - ranks()), accumulation=ranks()),
    # The same four micro-batches, whose router losses are averaged.
    "router loss": lambda out: trained(out, 40, batch=2 * ranks(), accumulation=4 // ranks(), model="mixtral"),
    "one sample left": lambda out: trained(out, 13),
    "three left": lambda out: trained(out, 15),
    "workers": lambda out: trained(out, 13, **WORKERS),
    "smaller than a batch": lambda out: trained(out, 1, steps=2),
    "split batches": lambda out: trained(out, 13, **SPLIT),
    "dispatched": lambda out: trained(out, 13, collator=collate_wide, **DISPATCH),
    "stream": lambda out: trained(out, 13, collator=collate_wide, stream=True),
    "resumed": lambda out: trained(out, 13, steps=4, resume=True),
    "drop last": lambda out: trained(out, 14, accumulation=3, dataloader_drop_last=True),
    # One sample in a row, on one process two rows: a row is repeated as a whole.
    "rows of one sample": lambda out: trained(out, 13, batch=2, collator=collate_flat if ranks() > 1 else collate),
}
EVALUATED: dict[str, Callable[[Path], Any]] = {
    "evaluated": lambda out: evaluated(out, 5),
    "evaluated in split batches": lambda out: evaluated(out, 5, **SPLIT),
    "evaluated, dispatched": lambda out: evaluated(out, 5, **DISPATCH),
}
# Orders that depend on the batch size of a process: the tokens of an epoch are what one process can say too.
EPOCHS: dict[str, Callable[[Path], Any]] = {
    "shuffled": lambda out: trained(out, 13, kind=AnyOrder, steps=2),
    "by length": lambda out: trained(out, 13, kind=AnyOrder, steps=2, train_sampling_strategy="group_by_length"),
}


def on_rank(out: Path, _: int, __: int) -> dict[str, Any]:
    cases = EQUAL | EVALUATED | EPOCHS | {"refused": refused}
    return {name: run(out / name) for name, run in cases.items()}
