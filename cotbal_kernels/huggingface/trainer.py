"""Eq. 2 in ``transformers.Trainer``: the normaliser over the whole optimizer step, and per-task logs.

    class TaskWeightedTrainer(TaskWeightedTrainerMixin, Trainer): ...

    trainer = TaskWeightedTrainer(task_names=["vqa", "chat"], model=model, args=args, train_dataset=data)

transformers is not imported: the mixin overrides what ``Trainer`` (5.17 to 5.24) calls.
"""

# Shapes: B sequences, S positions, K tasks.

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import global_task_tokens
from ..per_task import task_normalizer
from .head import FusedLoss, Uncast, as_passed, no_task_ids
from .patching import TASK_FIELDS, carries_patched_forward, fused_loss, replaced_forward, set_task_weights, unwrapped
from .repeats import without_repeated_labels

_CHECKPOINT = "TaskWeights"  # name among what callbacks save in a checkpoint


class TaskWeightedTrainerMixin:
    """For a ``Trainer`` of a patched model, before ``Trainer`` among the bases.

    Batches have ``labels [B, S]`` and ``loss_task_ids`` (``[B]`` or ``[B, S]``; needed where K > 1). Gradients then
    equal those of one large batch, whatever the accumulation and the number of ranks, which the count of tokens that
    ``Trainer`` takes by itself gives for weights of 1 only. Samples that fill the last batch of several ranks up count
    once (:mod:`.repeats`).

    Logged beside the loss, over all ranks since the last log: ``task_loss/NAME`` (mean cross-entropy per token),
    ``task_tokens/NAME`` and ``task_weight/NAME``, and ``eval_task_loss/NAME``, ``eval_task_tokens/NAME`` with the
    metrics of an evaluation. Lambda that :func:`set_task_weights` changed on the way is saved with checkpoints; a
    training that continues has it again, unless its script patched the model with another one this time.

    Args:
        task_names: K names for the logs; the task ids if None.

    Raises:
        ValueError: the model is not patched, or an option of the trainer would bypass the loss.
    """

    def __init__(self, *args: Any, task_names: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        state = fused_loss(trainer.model)
        count = len(state.task_weights)
        self.task_names = [str(task) for task in range(count)] if task_names is None else list(task_names)
        if len(self.task_names) != count:
            raise ValueError(f"task_names must have K = {count} entries, got {len(self.task_names)}")
        if not carries_patched_forward(unwrapped(trainer.model)):
            raise ValueError(replaced_forward(unwrapped(trainer.model)))
        if trainer.args.use_liger_kernel and (trainer.args.liger_kernel_config or {}).get(
            "fused_linear_cross_entropy", True
        ):
            raise ValueError(
                "use_liger_kernel puts a loss without task weights in place of the fused one: leave it out, or set "
                "liger_kernel_config={'fused_linear_cross_entropy': False}"
            )
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise ValueError(
                "compute_loss_func and label_smoothing_factor bypass the fused loss: leave them out "
                "(apply_fused_loss has label_smoothing=)"
            )
        if trainer.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "preprocess_logits_for_metrics has no logits to work on, because the fused loss never makes them: "
                "compute_metrics gets (task_loss, task_tokens, task_correct) instead; for logits call the model "
                "without labels"
            )
        if state.options["aggregation"] == "sum":
            raise ValueError("aggregation='sum' has no normalizer: patch the model with 'token' or 'task'")
        if trainer.args.n_gpu > 1 or (trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices):
            raise ValueError(
                "the normalizer of Eq. 2 is global: start one process per GPU (torchrun), with "
                "average_tokens_across_devices=True"
            )
        if hasattr(trainer, "get_sp_size") and trainer.get_sp_size() > 1:
            raise ValueError(
                "sp_size of parallelism_config (DeepSpeed's sequence parallelism) takes a mean of ranks' losses over "
                "their tokens, whatever those weigh: leave it out, or write a loop with shift_targets_across_ranks"
            )
        if not trainer.model_accepts_loss_kwargs:
            raise ValueError("the trainer hands no normalizer to the model: patch the model before the trainer is made")
        self._first_weights = state.task_weights.tolist()
        self._router_share = 1.0
        self._task_sums = {
            training: torch.zeros(2, count, dtype=torch.float64, device=trainer.args.device)
            for training in (True, False)
        }

    def step_normalizer(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """The denominator over the batches of an optimizer step on all ranks; scalar, ``[K]`` for "task"."""
        state = fused_loss(self.model)  # type: ignore[attr-defined]
        weights_K = state.weights_on(self.args.device)  # type: ignore[attr-defined]
        shifted = "shift_labels" in batches[0]
        labels = [batch["shift_labels" if shifted else "labels"].to(weights_K.device) for batch in batches]
        task_ids = [self._task_ids(batch, some) for some, batch in zip(labels, batches, strict=True)]
        if not shifted and _has_virtual_tokens(self.model):  # type: ignore[attr-defined]
            labels = [F.pad(some, (1, 0), value=state.options["ignore_index"]) for some in labels]
            task_ids = [ids if ids.dim() == 1 else F.pad(ids, (1, 0)) for ids in task_ids]
        try:
            tokens_K = global_task_tokens(
                labels,
                task_ids,
                len(weights_K),
                ignore_index=state.options["ignore_index"],
                shift=not shifted,
            )
        except ValueError as error:
            error.args = (as_passed(error, shifted),)
            raise
        return task_normalizer(weights_K, tokens_K, state.options["aggregation"])

    def _task_ids(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        ids, count = batch.get("loss_task_ids"), len(self.task_names)
        if ids is None and count > 1:
            raise ValueError(no_task_ids(count, batch))
        if ids is not None and not isinstance(ids, Tensor):
            raise ValueError(f"loss_task_ids must be a tensor of integers, got {type(ids).__name__}")
        return labels.new_zeros(labels.shape[:1]) if ids is None else ids.to(labels.device)

    def logged_task_weights(self) -> Tensor:
        """Lambda ``[K]`` of the step that is logged."""
        return fused_loss(self.model).task_weights  # type: ignore[attr-defined]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """What ``Trainer`` hands to the model as ``num_items_in_batch``.

        It calls this once before every optimizer step and for every batch of an evaluation, and multiplies the loss
        by the number of processes, which undoes the averaging of gradients.
        """
        if not batch_samples or not {"labels", "shift_labels"} & set(batch_samples[0]):
            return None
        trainer: Any = self
        copies = math.prod(  # ranks with the same batch
            getattr(trainer, f"get_{kind}_size")() for kind in ("tp", "cp") if hasattr(trainer, f"get_{kind}_size")
        )
        normalizer = self.step_normalizer(batch_samples)
        # Losses are summed over micro-batches and ranks, and a router loss is a mean of one of them.
        self._router_share = copies / (len(batch_samples) * trainer.args.world_size)
        return normalizer / copies if copies > 1 else normalizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        # Lazily: the loader says of the batch that it yielded last whether it ends the epoch.
        batches = map(self._without_repeats, epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss is the mean over ranks: where ``Trainer`` gathers it, it cuts the last ranks off.

        Predictions are the sums per task alone: ``Trainer`` would gather features of images and router logits too.
        """
        inputs = self._without_repeats(inputs)
        state = fused_loss(model)
        state.task_sums = None
        share = self._router_share  # of the step, within which a callback may evaluate
        loss, sums, labels = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._router_share = share
        if state.task_sums is not None and isinstance(sums, tuple):
            sums = sums[-len(TASK_FIELDS) :]
        self._count(state, training=False)
        if loss is not None and dist.is_initialized() and dist.get_world_size() > 1:
            loss = loss / dist.get_world_size()
            dist.all_reduce(loss)
        return loss, sums, labels

    def _without_repeats(self, batch: Any) -> Any:
        trainer: Any = self
        loader = trainer.accelerator.gradient_state.active_dataloader
        return without_repeated_labels(batch, loader, fused_loss(trainer.model).options["ignore_index"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if isinstance(num_items_in_batch, Tensor):
            uncast: Any = Uncast(num_items_in_batch, self._router_share)  # FSDP2 would round it
            num_items_in_batch = uncast
        state = fused_loss(model)
        state.task_sums = None
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if model.training:  # evaluation may call the model without this
            self._count(state, training=True)
        return loss

    def _count(self, state: FusedLoss, training: bool) -> None:
        """Add what the last labelled pass summed up: not its outputs, which mixed precision may have rounded."""
        if state.task_sums is not None:
            self._task_sums[training] += torch.stack(state.task_sums)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        trainer.state.stateful_callbacks[_CHECKPOINT] = {
            "patched with": self._first_weights,
            "now": fused_loss(trainer.model).task_weights.tolist(),
        }
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_callback_state(self) -> None:
        trainer: Any = self
        saved = trainer.state.stateful_callbacks.pop(_CHECKPOINT, None)
        if saved and saved["patched with"] == self._first_weights:
            set_task_weights(trainer.model, saved["now"])
        super()._load_callback_state()  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the tasks that had tokens."""
        if "loss" in logs:
            totals = self._take_task_sums(True)
            weights = self.logged_task_weights().tolist()
            for name, total, tokens, weight in zip(self.task_names, *totals, weights, strict=True):
                if tokens:
                    logs |= {f"task_loss/{name}": total / tokens, f"task_tokens/{name}": tokens}
                    logs[f"task_weight/{name}"] = weight
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the means of the tasks that had tokens to the metrics, of ``evaluate`` and of ``predict``."""
        self._task_sums[False].zero_()
        trainer: Any = self
        gather = trainer.gather_function
        # The sums are K numbers per batch: cut to the number of samples in the last batches, they would lose tasks.
        trainer.gather_function = lambda data: (
            trainer.accelerator.gather(data) if isinstance(data, tuple) else gather(data)
        )
        out = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, total, tokens in zip(self.task_names, *self._take_task_sums(False), strict=True):
            if tokens:
                out.metrics[f"{prefix}_task_loss/{name}"] = total / tokens
                out.metrics[f"{prefix}_task_tokens/{name}"] = tokens
        return out

    def _take_task_sums(self, training: bool) -> list[list[float]]:
        """Sums of loss and tokens over all ranks since the last time, ``[2][K]``."""
        sums = self._task_sums[training].clone()
        self._task_sums[training].zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return sums.tolist()


def _has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts positions before a sequence, so that its first label is predicted too (prompt tuning)."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    return bool(getattr(config, "is_prompt_learning", False)) and kind != "PREFIX_TUNING"
