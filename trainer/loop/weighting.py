"""One balancing method at work inside one training: what it asks for is measured, its weights are applied and kept.

Shapes: K tasks of the run in their order, N of them balanced.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cotbal_kernels import global_task_tokens
from cotbal_kernels.huggingface import set_task_weights
from cotbal_kernels.per_task import task_normalizer
from trainer.balancing.method import BalancingMethod, StepReport, TaskLosses
from trainer.balancing.registry import name_of
from trainer.errors import UserError
from trainer.files import write_whole
from trainer.loop.callbacks import diverged
from trainer.loop.measuring import HeadTap, forward_only, summed
from trainer.loop.validation import ValidationBatches

STATE_FILE = "balancing.pt"  # in every checkpoint
Batch = dict[str, Any]


@dataclass(frozen=True)
class Tasks:
    """The run's tasks; auxiliary ones weigh 1 and are unknown to the method."""

    names: list[str]
    balanced: list[bool]


class TaskWeighting(TrainerCallback):
    """Drives a method through a training and writes ``weights.csv``: the weights that every step used.

    Args:
        method: made for the balanced tasks, in the order of `tasks`.
        tasks: names of all tasks and which are balanced.
        validation: batches of held-out records, when the method asks for validation losses.
        interval: steps between two validations.
        csv_path: of ``weights.csv``.
    """

    def __init__(
        self,
        method: BalancingMethod,
        tasks: Tasks,
        validation: ValidationBatches | None,
        interval: int,
        csv_path: Path,
    ) -> None:
        self.method = method
        self.tasks = tasks
        self.weights = torch.ones(len(tasks.names), device=method.context.device)  # [K], of the current step
        # Numbers of the balanced ones: how many a mask takes would have to be read from the device.
        own = [k for k, balanced in enumerate(tasks.balanced) if balanced]
        self._balanced = torch.tensor(own, dtype=torch.int64, device=method.context.device)
        self._validation = validation
        self._interval = interval
        self._updates = 0
        self._sums = torch.zeros(2, len(tasks.names), dtype=torch.float64, device=method.context.device)
        self._validated = torch.zeros_like(self._sums)  # of the updates since the last line of the log
        self._window: Sequence[Batch] = ()
        self._micro_batch = 0
        self._norms: Tensor | None = None
        self._trajectory: list[tuple[int, Tensor]] = []
        self._csv_path = csv_path

    def attach(self, trainer: Trainer) -> None:
        """Binds the weighting to the trainer that calls it, whose model is patched."""
        self._trainer = trainer
        needs = self.method.needs
        taps = needs.gradient_norms or needs.validation_gradient_norms
        self._tap = HeadTap(trainer.model, len(self.tasks.names)) if taps else None

    # -- the step, in this order ---------------------------------------------------------------------------

    def begin_step(self, window: Sequence[Batch]) -> Tensor:
        """Fixes the weights of the coming step over `window` and returns its normaliser (scalar or ``[K]``)."""
        needs = self.method.needs
        losses = None
        if needs.losses_before:
            losses = self._of_balanced(forward_only(self._trainer, window, len(self.weights)))
        self.method.before_step(losses)
        self.weights = torch.ones_like(self.weights).index_copy_(0, self._balanced, self.method.weights)
        try:
            set_task_weights(cast(torch.nn.Module, self._trainer.model), self.weights)
        except ValueError as error:  # on a CPU; on a GPU the loss is no number, and the next line of the log tells
            raise diverged(f"the weights are {self.weights.tolist()}", self._trainer.state) from error
        self._trajectory.append((self._trainer.state.global_step + 1, self.weights))
        self._window = window
        self._micro_batch = 0
        self._sums.zero_()
        if needs.gradient_norms:
            assert self._tap is not None
            self._tap.open()
        return self._normalizer(window)

    def micro_batch(self, task_loss: Tensor, task_tokens: Tensor) -> None:
        """Takes the sums ``[K]`` of a micro-batch after its forward pass, before its backward pass."""
        self._sums += torch.stack([task_loss, task_tokens])
        self._micro_batch += 1
        if self.method.needs.gradient_norms and self._micro_batch == len(self._window):
            assert self._tap is not None
            self._norms = self._tap.norms()  # now: the backward pass that follows moves the weights

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        needs = self.method.needs
        if needs.losses:
            losses = self._of_balanced(summed(self._sums, self._norms))
            after = None
            if needs.losses_after:
                after = self._of_balanced(forward_only(self._trainer, self._window, len(self.weights)))
            self.method.after_step(StepReport(state.global_step, float(state.epoch or 0.0), losses, after))
        if needs.validation and state.global_step % self._interval == 0:
            self._validate()
        self._window, self._norms = (), None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._start_csv(state.global_step)
        if self.method.needs.validation and state.global_step == 0:
            if self.method.needs.initial:
                assert self._validation is not None
                initial = forward_only(self._trainer, self._validation.initial(), len(self.weights))
                self.method.started(self._of_balanced(initial))
            self._validate()

    def take_validation_losses(self) -> dict[str, float]:
        """Mean validation loss of each task over the updates since the last time; nothing of a task without any."""
        sums, self._validated = self._validated.tolist(), torch.zeros_like(self._validated)
        return {name: total / tokens for name, total, tokens in zip(self.tasks.names, *sums, strict=True) if tokens}

    # -- checkpoints and files -----------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush(state)
        if state.is_world_process_zero:
            assert args.output_dir is not None
            content = {
                "name": name_of(self.method),
                "method": self.method.state_dict(),
                "updates": self._updates,
            }
            torch.save(content, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def load(self, checkpoint: Path) -> None:
        """Continues from a checkpoint.

        Raises:
            UserError: the checkpoint has no state of a method, or that of another one.
        """
        path = checkpoint / STATE_FILE
        remedy = f"delete {checkpoint.parent} to start this training again"
        if not path.exists():
            raise UserError(f"{checkpoint} was written without the state of a balancing method; {remedy}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = content.get("name"), name_of(self.method)
        if theirs not in (None, ours):  # None: older versions did not write it
            raise UserError(f"{path} is of the method '{theirs}', not of '{ours}'; go on with that one, or {remedy}")
        try:
            self.method.load_state_dict(content["method"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} belongs to another method or other options ({error}); {remedy}") from error
        self._updates = content["updates"]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._flush(state)
        if self._validation is not None:
            self._validation.close()

    # -- parts ---------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        assert self._validation is not None
        needs, again = self.method.needs, None
        if needs.validation_again and self._updates:
            again = self._of_balanced(
                forward_only(self._trainer, self._validation(self._updates - 1), len(self.weights))
            )
        tap = self._tap if needs.validation_gradient_norms else None
        batches = self._validation(self._updates)
        losses = forward_only(self._trainer, batches, len(self.weights), tap)
        self._validated += torch.stack([losses.loss_sum, losses.tokens])
        self.method.validated(self._of_balanced(losses), again)
        self._updates += 1

    def _of_balanced(self, losses: TaskLosses) -> TaskLosses:
        norms = losses.gradient_norms
        return replace(
            losses,
            loss_sum=losses.loss_sum[self._balanced],
            tokens=losses.tokens[self._balanced],
            gradient_norms=None if norms is None else norms[self._balanced],
        )

    def _normalizer(self, window: Sequence[Batch]) -> Tensor:
        """What the window's weighted sums are divided by, over all ranks; see ``Aggregation``."""
        device = self.weights.device
        tokens_K = global_task_tokens(
            [batch["labels"].to(device) for batch in window],
            [batch["loss_task_ids"].to(device) for batch in window],
            len(self.weights),
            shift=True,
        )
        if self.method.options.aggregation == "task_sum":
            return tokens_K * self.weights.sum()
        return task_normalizer(self.weights, tokens_K, self.method.options.aggregation)

    def _start_csv(self, step: int) -> None:
        """Keeps the header and the steps up to `step`, the one that the training continues from.

        Of a row that a kill cut off, even the number of the step may be another one.
        """
        rows, columns = [], 1 + len(self.tasks.names)
        if self._csv_path.exists():
            with self._csv_path.open(newline="") as file:
                whole = [row for row in csv.reader(file) if len(row) == columns and row[0].isdigit()]
            rows = [row for row in whole if int(row[0]) <= step]
        kept = io.StringIO(newline="")
        csv.writer(kept).writerows([["step", *self.tasks.names], *rows])
        write_whole(self._csv_path, kept.getvalue())

    def _flush(self, state: TrainerState) -> None:
        """Writes the steps since the last time; until then their weights stay on the device."""
        if self._trajectory and state.is_world_process_zero:
            rows = torch.stack([weights for _, weights in self._trajectory]).tolist()
            with self._csv_path.open("a", newline="") as file:
                steps = [step for step, _ in self._trajectory]
                csv.writer(file).writerows([step, *row] for step, row in zip(steps, rows, strict=True))
        self._trajectory.clear()
