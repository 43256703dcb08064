"""Checkpoints of a training: which of them are whole, and when one is made out of turn."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.errors import UserError
from trainer.files import force_to_disk

COMPLETE = "COMPLETE"  # written last into a checkpoint folder: one without it was cut off


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a training's folder, the newest last. Cut-off ones are passed over."""
    found = [mark.parent for mark in (directory / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(directory: Path, world_size: int) -> Path | None:
    """The newest complete checkpoint of a training's folder, or none: what rank 0 sees, on every rank.

    A shared folder may show a machine its files late, and ranks would go on together from different steps.

    Raises:
        UserError: the checkpoint was written by another number of processes, whose shards cannot be loaded; or is not
            there yet on this machine.
    """
    found = complete_checkpoints(directory)
    seen: list[Any] = [found[-1], len(list(found[-1].glob("rng_state*.pth")))] if found else [None, world_size]
    if dist.is_initialized():
        dist.broadcast_object_list(seen, src=0)
    newest, written_by = seen
    if newest and not (newest / COMPLETE).exists():
        raise UserError(f"{newest} is not yet on {gethostname()}, only on rank 0's machine; start again once it is")
    if written_by != world_size:
        raise UserError(
            f"{newest} was written by {written_by} process(es) and this run has {world_size}; "
            f"run with {written_by}, or delete {newest.parent} to start this training again"
        )
    return newest


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once every file of it is on disk: each machine sees to what its processes have written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _meet()
        if state.is_local_process_zero:
            force_to_disk(checkpoint)
        _meet()
        if state.is_world_process_zero:
            (checkpoint / COMPLETE).touch()


class SaveWhenAsked(TrainerCallback):
    """Saves a checkpoint when a file asks for it, at the next step that is logged, where ranks wait anyway.

    Args:
        path: of the file, which goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % args.logging_steps:
            return
        asked = torch.tensor(int(state.is_world_process_zero and self.path.exists()), device=args.device)
        if dist.is_initialized():
            dist.broadcast(asked, 0)  # a checkpoint is every rank's work, and they may not see the file at once
        if asked.item():
            control.should_save = True
            if state.is_world_process_zero:
                self.path.unlink(missing_ok=True)


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()
