"""One training: a mixture, task weights and a pretrained model in; a fine-tuned model folder out.

Run under torchrun with the path of a :class:`TrainingSpec` in JSON, one process per device:

    torchrun --nproc_per_node 2 -m trainer.training SPEC.json

The loss is Eq. 2 of CoTBal with its sums over every supervised token of the optimizer step: all ranks and all
micro-batches of the accumulation window.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from transformers import TrainingArguments, set_seed

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.balancing.method import MethodContext
from trainer.balancing.registry import method_class, read_options
from trainer.config import RunConfig, TrainingConfig
from trainer.data.ahead import shared_memory_is_full
from trainer.data.collator import Collator, MixtureDataset
from trainer.data.encoding import ConversationEncoder, padding_token
from trainer.data.lengths import SampleLength, counter_of, measure_all, sample_length
from trainer.data.mixtures import Mixture, MixtureKind, select
from trainer.data.packing import PackedCollator, PackedDataset, pack
from trainer.data.records import Record, Records
from trainer.data.whole_batches import WholeBatches
from trainer.errors import NO_SPACE, UserError
from trainer.files import put_in_place, write_json
from trainer.launching import ERROR_FILE, HANGS, SAVE_FILE, connect_on_cpu, die_with_parent
from trainer.loop.callbacks import RunLog, StopWhenDiverged
from trainer.loop.checkpoints import CompleteCheckpoints, SaveWhenAsked, newest_checkpoint
from trainer.loop.packing_probe import PackingProbe
from trainer.loop.tracking import prepare_trackers
from trainer.loop.trainer import TaskWeightedTrainer
from trainer.loop.validation import ValidationBatches
from trainer.loop.weighting import Tasks, TaskWeighting
from trainer.models.features import FeatureStore
from trainer.models.loading import load_model, load_processor, stop_generation_at
from trainer.models.lora import add_lora, save_merged
from trainer.models.packable import finds_samples_in_one_row, refuse_unpackable, sample_positions
from trainer.tasks import Task, load_tasks


class TrainingSpec(BaseModel):
    """Everything one training process needs; written by the pipeline or by hand.

    Attributes:
        name: of the training, for logs.
        config: the run's resolved configuration, with its tasks spelled out.
        model_path: folder or hub name of the model to start from.
        mixture: kind and task of the :class:`Mixture`.
        method: name of the balancing method (`trainer.balancing.registry`).
        options: of the method.
        task_weights: for CoTBal, lambda of Eq. 2 by task name; tasks left out weigh 1.
        seed: of data order and random weights; None is the configuration's, which the mini subsets always follow.
        output_dir: gets ``model/``, ``log.jsonl``, ``weights.csv``, ``tensorboard/`` and, while it runs,
            ``checkpoints/``.
        features: folder of cached vision features, when the tower is frozen and takes them.
    """

    name: str
    config: RunConfig
    model_path: str
    mixture: MixtureKind
    mixture_task: str | None = None
    method: str = "ew"
    options: dict[str, Any] = {}
    task_weights: dict[str, float] = {}
    seed: int | None = None
    output_dir: Path
    features: Path | None = None

    @property
    def training_seed(self) -> int:
        return self.config.seed if self.seed is None else self.seed


def deepspeed_config(training: TrainingConfig) -> dict[str, Any]:
    """The DeepSpeed configuration; sizes are integers, since not every LMM config has a top-level hidden size."""
    host = {"device": "cpu", "pin_memory": True}
    offload = {"offload_optimizer": host} if training.offload != "none" else {}
    offload |= {"offload_param": host} if training.offload == "parameters" else {}
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,  # left out, DeepSpeed would clip at 1.0
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW runs on the host as well; DeepSpeed's own would be compiled on the user's machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": training.zero_stage,
            "overlap_comm": training.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_gather_16bit_weights_on_model_save": True,
            **offload,
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
        logging_nan_inf_filter=False,  # it would log 0 for a loss that is no number
        save_steps=training.save_steps,
        save_total_limit=2,
        save_only_model=False,
        seed=spec.training_seed,
        dataloader_num_workers=training.workers("cpu" if use_cpu else "cuda"),
        dataloader_pin_memory=not use_cpu,
        accelerator_config={"non_blocking": not use_cpu},  # else a copy waits for all that the GPU has to do before it
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to=training.report_to,
        run_name=f"{spec.config.output_dir.name}/{spec.name}",
        disable_tqdm=not sys.stderr.isatty(),
    )


def _checkpointing(enabled: bool) -> dict[str, Any]:
    """Activation checkpointing under the name that this version of transformers has for it."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}} if enabled else {}


def task_weighting(
    spec: TrainingSpec,
    tasks: list[Task],
    encoder: ConversationEncoder,
    collator: Collator,
    args: TrainingArguments,
) -> TaskWeighting:
    """The spec's balancing method with everything it asks for."""
    balanced = [not task.config.auxiliary for task in tasks]
    chosen = method_class(spec.method)
    validation = None
    options = spec.config.balancing.validation
    if chosen.needs.validation:
        held_out = [task.validation if own else Records() for task, own in zip(tasks, balanced, strict=True)]
        if spec.config.training.overlong == "drop":
            counter = counter_of(encoder)
            held_out = [
                Records(r for r in found if not sample_length(counter, r, task.image_path, "drop").dropped)
                for task, found in zip(tasks, held_out, strict=True)
            ]
        samples = MixtureDataset(encoder, tasks, held_out)
        starts = [sum(map(len, held_out[:k])) for k, own in enumerate(balanced) if own]
        validation = ValidationBatches(
            [len(held_out[k]) for k, own in enumerate(balanced) if own],
            lambda task, record: samples[starts[task] + record],
            collator,
            per_task=options.samples_per_task,
            batch_size=spec.config.training.batch_size,
            seed=spec.training_seed,
            rank=args.process_index,
            world=args.world_size,
            ahead=args.dataloader_num_workers > 0,
            pinned=args.dataloader_pin_memory,
        )
    own_tasks = [task.name for task, own in zip(tasks, balanced, strict=True) if own]
    context = MethodContext(
        num_tasks=sum(balanced),
        device=args.device,
        seed=spec.training_seed,
        validation_batches=validation.batches_per_pass if validation else 0,
        fixed_weights=torch.tensor([spec.task_weights.get(name, 1.0) for name in own_tasks]),
    )
    return TaskWeighting(
        chosen(context, read_options(spec.method, spec.options)),
        Tasks([task.name for task in tasks], balanced),
        validation,
        options.interval,
        spec.output_dir / "weights.csv",
    )


def training_samples(
    spec: TrainingSpec,
    encoder: ConversationEncoder,
    tasks: list[Task],
    records: Sequence[Sequence[Record]],
    processes: int = 0,
) -> MixtureDataset | PackedDataset:
    """What the training iterates over: samples, or with packing sequences of them; the same on every rank.

    Where lengths matter they are measured first, by `processes` beside each rank, and ``samples.json`` says what they
    came to.

    Raises:
        UserError: a sample that cannot be used or is refused, or none is left.
    """
    training = spec.config.training
    # Processes that encode samples end with an epoch.
    dataset = MixtureDataset(encoder, tasks, records, again=training.epochs > 1 and not processes)
    if not training.packing and training.overlong == "truncate":
        return dataset
    counter = counter_of(encoder)

    def measure(index: int) -> SampleLength:
        task_id, record = dataset.record(index)
        try:
            return sample_length(counter, record, tasks[task_id].image_path, training.overlong)
        except UserError as error:
            raise UserError(f"task '{tasks[task_id].name}': {error}") from error

    lengths = measure_all(len(dataset), measure, processes)
    dataset.choose(index for index, length in enumerate(lengths) if not length.dropped)
    tokens = [length.tokens for length in lengths if not length.dropped]
    if not tokens:
        raise UserError(f"training {spec.name}: every sample is longer than {encoder.max_length} tokens; none is left")
    sequences = pack(tokens, encoder.max_length, spec.training_seed) if training.packing else None
    if int(os.environ.get("RANK", 0)) == 0:
        summary = {
            "samples": len(tokens),
            "tokens": sum(tokens),
            "supervised_tokens": sum(length.supervised for length in lengths),
            "cut": sum(length.cut for length in lengths),
            "dropped": len(lengths) - len(tokens),
            "sequences": len(sequences) if sequences else None,
        }
        write_json(spec.output_dir / "samples.json", summary)
        print(f"samples: {summary}", flush=True)
    return PackedDataset(dataset, sequences) if sequences else dataset


def train(spec: TrainingSpec) -> None:
    """Runs one training to its end, from its newest complete checkpoint when there is one."""
    use_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if use_cpu:
        connect_on_cpu()  # before any model is built
    prepare_trackers(spec.config.training.report_to, spec.config.output_dir.name, spec.output_dir)
    args = training_arguments(spec, use_cpu)  # before the model: ZeRO-3 shards it as it is loaded
    set_seed(spec.training_seed)

    assert not isinstance(spec.config.tasks, str), "the pipeline spells the tasks out"
    needed = ("train", "validation") if method_class(spec.method).needs.validation else ("train",)
    tasks = list(load_tasks(spec.config.tasks, needed))
    mixture = Mixture(spec.mixture, spec.mixture_task)
    records = [
        select(task.train, mixture.share(task.name, spec.config.cotbal.mini_ratio), spec.config.seed, task.name)
        for task in tasks
    ]

    processor = load_processor(spec.model_path, spec.config.model.images)
    features = FeatureStore(spec.features) if spec.features else None
    encoder = ConversationEncoder(processor, spec.config.model.max_length, features)
    # Every record is looked at where none has an image.
    images = encoder.reads_images and any(record.images for task in tasks for record in task.train)
    collator = Collator(padding_token(encoder.tokenizer), encoder.blank_image() if images else None)
    if spec.config.training.packing:
        refuse_unpackable(spec.model_path)
    dataset = training_samples(spec, encoder, tasks, records, args.dataloader_num_workers)

    end_marks = encoder.chat.end_marks
    # What DeepSpeed trains, and makes its float32 master copies of: float32 would be rounded to it, the same bits come
    # out, and every process would take twice the memory of the host and more until then.
    dtype = torch.bfloat16 if spec.config.training.precision == "bf16" else torch.float32
    model = load_model(spec.model_path, spec.config.model, dtype)
    settings: Any = model.config
    use_cache = vars(settings).get("use_cache")
    weighting = task_weighting(spec, tasks, encoder, collator, args)
    # "task_sum" differs from "task" in the normaliser only, and that comes from outside.
    aggregation = "token" if weighting.method.options.aggregation == "token" else "task"
    apply_fused_loss(model, num_tasks=len(tasks), aggregation=aggregation)
    packer = None
    if isinstance(dataset, PackedDataset):
        one_row, positions = finds_samples_in_one_row(model), sample_positions(model.config)
        packer = PackedCollator(collator.pad_token_id, collator.blank_image, one_row, positions)
    lora = spec.config.model.lora
    if lora is not None:
        model = add_lora(model, spec.config.model)

    several = args.world_size > 1  # one process may have a smaller last batch
    trainer = TaskWeightedTrainer(
        weighting=weighting,
        learning_rates=spec.config.training.learning_rates,
        model=model,
        args=args,
        train_dataset=WholeBatches(dataset, args.world_size * spec.config.training.batch_size if several else 1),
        data_collator=packer or collator,
        processing_class=processor,
        callbacks=[
            RunLog(spec.output_dir / "log.jsonl", weighting.tasks.names),
            StopWhenDiverged(),
            SaveWhenAsked(spec.output_dir / SAVE_FILE),
            CompleteCheckpoints(),
        ],
    )
    if packer and isinstance(dataset, PackedDataset):
        trainer.add_callback(PackingProbe(trainer, packer, dataset))
    if not trainer.is_deepspeed_enabled:
        raise RuntimeError("DeepSpeed is off although it was configured; unset ACCELERATE_* environment variables")
    checkpoint = newest_checkpoint(spec.output_dir, args.world_size)
    if checkpoint:
        weighting.load(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    if use_cache is None:  # Trainer turned it off, which is no matter of the model that comes out
        vars(settings).pop("use_cache", None)
    else:
        settings.use_cache = use_cache
    partial = spec.output_dir / "model.partial"
    if lora is None:
        trainer.save_model(str(partial))
    else:
        save_merged(trainer.model, spec.model_path, spec.config, partial)
    if trainer.is_world_process_zero():
        processor.save_pretrained(partial)
        stop_generation_at(partial, end_marks)
        put_in_place(partial, spec.output_dir / "model")  # before the checkpoints go
        shutil.rmtree(spec.output_dir / "checkpoints", ignore_errors=True)


def explain(error: Exception, output: Path) -> str:
    """How a training says why it ended: a sentence where the user can do something about it, else the traceback."""
    if isinstance(error, UserError):  # from a process that encodes samples, it comes behind that one's traceback
        return str(error).rpartition(f"{type(error).__name__}: ")[2].rstrip()
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "out of GPU memory; lower training.batch_size and raise training.gradient_accumulation_steps by as much, "
            "which keeps what is done, or see gradient_checkpointing, zero_stage, offload and model.lora in "
            "docs/configuration.md; `cotbal run CONFIG.yaml --dry-run` estimates what each takes"
        )
    if "out of shared memory" in str(error):  # a process that encodes samples had a bus error, and torch guesses why
        return str(shared_memory_is_full())
    if "Timed out waiting" in str(error):  # gloo; NCCL ends the process itself
        return (
            f"{HANGS}, or its machine or the network does: others have waited for it for too long; look for its last "
            "words in the output, then the same command goes on from the newest checkpoint"
        )
    for code in NO_SPACE:
        if os.strerror(code) in str(error):  # safetensors has no error with a number
            return f"{output}: {os.strerror(code)}; make room, and the same command goes on from the newest checkpoint"
    return "".join(traceback.format_exception(error))


def main() -> None:
    """Entry point of the training process."""
    die_with_parent()
    spec = TrainingSpec.model_validate_json(Path(sys.argv[1]).read_text())
    try:
        train(spec)
    except Exception as error:
        with suppress(FileExistsError), (spec.output_dir / ERROR_FILE).open("x") as file:
            file.write(
                explain(error, spec.output_dir)
            )  # torchrun's own last words would bury it, and what other ranks say follows from the first
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Everything is written. Threads of native libraries can abort an ordinary exit ("terminate called without an active
    # exception"), and a training that has succeeded would be reported as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
