"""One training: a mixture, task weights and a pretrained model in; a fine-tuned model folder out.

Run under torchrun with the path of a :class:`TrainingSpec` in JSON, one process per device:

    torchrun --nproc_per_node 2 -m trainer.training SPEC.json

The loss is Eq. 2 of CoTBal with its sums over every supervised token of the optimizer step: all ranks and all
micro-batches of the accumulation window.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from cotbal_kernels import global_normalizer
from cotbal_kernels.huggingface import apply_fused_loss
from trainer.config import RunConfig, TrainingConfig
from trainer.data.collator import Collator, MixtureDataset
from trainer.data.encoding import ConversationEncoder
from trainer.data.mixtures import Mixture, select
from trainer.errors import UserError
from trainer.launching import ERROR_FILE, die_with_parent
from trainer.models.features import FeatureStore
from trainer.models.loading import load_model, load_processor
from trainer.tasks import load_task

COMPLETE = "COMPLETE"  # written last into a checkpoint folder: one without it was cut off


class TrainingSpec(BaseModel):
    """Everything one training process needs; written by the pipeline or by hand.

    Attributes:
        name: of the training, for logs.
        config: the run's resolved configuration, with its tasks spelled out.
        model_path: folder or hub name of the model to start from.
        mixture: kind and task of the :class:`Mixture`.
        task_weights: lambda of Eq. 2 by task name; tasks left out weigh 1.
        aggregation: ``token`` (Eq. 2) or ``task`` (TLA).
        output_dir: gets ``model/``, ``log.jsonl``, ``tensorboard/`` and, while it runs, ``checkpoints/``.
        features: folder of cached vision features, when the tower is frozen and takes them.
    """

    name: str
    config: RunConfig
    model_path: str
    mixture: Literal["mini", "plus", "single", "all"]
    mixture_task: str | None = None
    task_weights: dict[str, float] = {}
    aggregation: Literal["token", "task"] = "token"
    output_dir: Path
    features: Path | None = None


class TaskWeightedTrainer(Trainer):
    """``transformers.Trainer`` with the global normaliser of Eq. 2 and per-task logs."""

    def __init__(self, *, task_names: list[str], task_weights: Tensor, aggregation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task_names = task_names
        self.task_weights = task_weights.to(self.args.device)
        self.aggregation = aggregation
        count = len(task_names)
        self._task_loss = torch.zeros(count, dtype=torch.float64, device=self.args.device)
        self._task_tokens = torch.zeros(count, dtype=torch.float64, device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The denominator of Eq. 2 over the accumulation window and all ranks.

        ``Trainer`` hands it to the model as ``num_items_in_batch`` and multiplies the loss by the number of
        processes, which undoes the averaging of gradients.
        """
        if not batch_samples:
            return None
        return global_normalizer(
            [batch["labels"].to(device) for batch in batch_samples],
            [batch["loss_task_ids"].to(device) for batch in batch_samples],
            self.task_weights,
            shift=True,
            aggregation=self.aggregation,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._task_loss += outputs["task_loss"]
        self._task_tokens += outputs["task_tokens"]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds mean cross-entropy, tokens and weight per task since the last log, summed over ranks."""
        if "loss" in logs:
            sums = torch.stack([self._task_loss, self._task_tokens])
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(sums)
            weights = self.task_weights.tolist()
            for name, total, tokens, weight in zip(self.task_names, *sums.tolist(), weights, strict=True):
                if tokens:
                    logs |= {f"task_loss/{name}": total / tokens, f"task_tokens/{name}": tokens}
                    logs[f"task_weight/{name}"] = weight
            self._task_loss.zero_()
            self._task_tokens.zero_()
        super().log(logs, start_time)


class RunLog(TrainerCallback):
    """``log.jsonl``: one line per logged step, continued after a resume without a gap or a repeated step."""

    def __init__(self, path: Path, task_names: list[str]) -> None:
        self.path = path
        self.task_names = task_names
        self._started = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in map(_parsed, lines) if line and line["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line: dict[str, Any] = {"step": state.global_step, "steps": state.max_steps, "epoch": logs.get("epoch", 0.0)}
        line |= {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        line["seconds"] = time.monotonic() - self._started
        line["tasks"] = {
            name: {key: logs[f"task_{key}/{name}"] for key in ("loss", "tokens", "weight")}
            for name in self.task_names
            if f"task_loss/{name}" in logs
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every file of it is on disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            assert args.output_dir is not None
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def newest_checkpoint(directory: Path, world_size: int) -> Path | None:
    """The newest complete checkpoint, or none. Cut-off ones are passed over.

    Raises:
        UserError: the checkpoint was written by another number of processes, whose shards cannot be loaded.
    """
    found = [path for path in directory.glob("checkpoint-*") if (path / COMPLETE).exists()]
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.split("-")[1]))
    written_by = len(list(newest.glob("rng_state*.pth")))
    if written_by != world_size:
        raise UserError(
            f"{newest} was written by {written_by} process(es) and this run has {world_size}; "
            f"run with {written_by}, or delete {directory} to start this training again"
        )
    return newest


def deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """The DeepSpeed configuration; sizes are integers, since not every LMM config has a top-level hidden size."""
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,  # left out, DeepSpeed would clip at 1.0
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": training.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def training_arguments(spec: TrainingSpec, use_cpu: bool) -> TrainingArguments:
    """The spec in the terms of ``transformers``."""
    training = spec.config.training
    return TrainingArguments(
        output_dir=str(spec.output_dir / "checkpoints"),
        use_cpu=use_cpu,
        deepspeed=deepspeed_config(training),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_ratio,  # a float below 1 is a share of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        **_checkpointing(training.gradient_checkpointing),
        logging_steps=training.logging_steps,
        logging_first_step=True,
        save_steps=training.save_steps,
        save_total_limit=2,
        save_only_model=False,
        seed=spec.config.seed,
        dataloader_num_workers=training.dataloader_workers,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to=["tensorboard"],
        disable_tqdm=not sys.stderr.isatty(),
    )


def _checkpointing(enabled: bool) -> dict[str, Any]:
    """Activation checkpointing under the name that this version of transformers has for it."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}} if enabled else {}


def train(spec: TrainingSpec) -> None:
    """Runs one training to its end, from its newest complete checkpoint when there is one."""
    use_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if use_cpu:
        import deepspeed

        deepspeed.init_distributed("gloo")  # before any model is built
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(spec.output_dir / "tensorboard"))
    args = training_arguments(spec, use_cpu)  # before the model: ZeRO-3 shards it as it is loaded
    set_seed(spec.config.seed)

    assert not isinstance(spec.config.tasks, str), "the pipeline spells the tasks out"
    tasks = [load_task(config) for config in spec.config.tasks]
    mixture = Mixture(spec.mixture, spec.mixture_task)
    records = [
        select(task.train, mixture.share(task.name, spec.config.cotbal.mini_ratio), spec.config.seed, task.name)
        for task in tasks
    ]

    processor = load_processor(spec.model_path)
    features = FeatureStore(spec.features) if spec.features else None
    encoder = ConversationEncoder(processor, spec.config.model.max_length, features)
    collator = Collator(
        encoder.tokenizer.pad_token_id,
        encoder.blank_image() if any(record.images for task in tasks for record in task.train) else None,
    )

    model = load_model(spec.model_path, spec.config.model, torch.float32)
    task_weights = torch.tensor([spec.task_weights.get(task.name, 1.0) for task in tasks])
    apply_fused_loss(model, task_weights=task_weights, aggregation=spec.aggregation)

    names = [task.name for task in tasks]
    trainer = TaskWeightedTrainer(
        task_names=names,
        task_weights=task_weights,
        aggregation=spec.aggregation,
        model=model,
        args=args,
        train_dataset=MixtureDataset(encoder, tasks, records),
        data_collator=collator,
        processing_class=processor,
        callbacks=[RunLog(spec.output_dir / "log.jsonl", names), CompleteCheckpoints()],
    )
    if not trainer.is_deepspeed_enabled:
        raise RuntimeError("DeepSpeed is off although it was configured; unset ACCELERATE_* environment variables")
    checkpoint = newest_checkpoint(spec.output_dir / "checkpoints", args.world_size)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    partial = spec.output_dir / "model.partial"
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        processor.save_pretrained(partial)
        shutil.rmtree(spec.output_dir / "model", ignore_errors=True)
        partial.rename(spec.output_dir / "model")
        shutil.rmtree(spec.output_dir / "checkpoints", ignore_errors=True)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return None


def main() -> None:
    """Entry point of the training process."""
    die_with_parent()
    spec = TrainingSpec.model_validate_json(Path(sys.argv[1]).read_text())
    try:
        train(spec)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        (spec.output_dir / ERROR_FILE).write_text(text)  # torchrun's own last words would bury it
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
