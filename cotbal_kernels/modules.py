"""The loss functions as modules that hold the task weights and the options."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import validation
from .backends import check_backend_name
from .functional import linear_task_cross_entropy, task_cross_entropy
from .results import TaskLoss


class _TaskWeighted(nn.Module):
    """Holds lambda as a float32 buffer that follows the device of the module but never its dtype."""

    task_weights: Tensor

    def __init__(
        self,
        task_weights: Tensor,
        *,
        ignore_index: int = -100,
        shift: bool = False,
        aggregation: str = "token",
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        differentiable_tasks: bool = False,
        backend: str = "auto",
        chunk_size: int | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        validation.check_task_weights(task_weights, "task_weights", task_weights)
        if task_weights.requires_grad:
            raise ValueError(
                "task_weights must not require grad: a module keeps a copy that gets no gradient. Call "
                "linear_task_cross_entropy or task_cross_entropy, or pass task_weights.detach()"
            )
        validation.check_options(
            aggregation=aggregation,
            normalizer=None,
            num_tasks=task_weights.shape[0],
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            chunk_size=chunk_size,
            ignore_index=ignore_index,
        )
        validation.check_flags(shift=shift, differentiable_tasks=differentiable_tasks, check=check)
        check_backend_name(backend)
        self.register_buffer("task_weights", task_weights.clone())
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "shift": shift,
            "aggregation": aggregation,
            "logit_scale": logit_scale,
            "logit_softcap": logit_softcap,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "differentiable_tasks": differentiable_tasks,
            "backend": backend,
            "chunk_size": chunk_size,
            "check": check,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_TaskWeighted":
        # model.to(bfloat16), .half() and DeepSpeed cast every floating buffer; lambda 2.01 would be 2.016.
        exact = self.task_weights
        super()._apply(fn, recurse)
        moved = self.task_weights
        self.task_weights = moved.float() if exact.is_meta else exact.to(moved.device)
        return self

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"num_tasks={self.task_weights.shape[0]}, {shown}"


class LinearTaskCrossEntropy(_TaskWeighted):
    """:func:`linear_task_cross_entropy` with lambda and the options fixed.

    Args:
        task_weights: ``[K]`` float32, kept as a float32 buffer in the state dict, without gradient. Assign in place
            (``module.task_weights.copy_(new)``) to change them during training.

    The other options are those of the function. What belongs to one call is an argument of ``forward``, the head's
    weight too, which stays a parameter of the model. A lambda that learns needs the function.
    """

    def __init__(self, task_weights: Tensor, *, recompute: bool = False, **options: Any) -> None:
        super().__init__(task_weights, **options)
        validation.check_flags(recompute=recompute)
        self.options["recompute"] = recompute

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        task_ids: Tensor,
        *,
        bias: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        grad_weight_out: Tensor | None = None,
        max_tokens: int | None = None,
        process_group: ProcessGroup | None = None,
        vocab_size: int | None = None,
    ) -> TaskLoss:
        """Shapes as in :func:`linear_task_cross_entropy`."""
        return linear_task_cross_entropy(
            hidden,
            weight,
            labels,
            task_ids,
            self.task_weights,
            bias=bias,
            normalizer=normalizer,
            grad_weight_out=grad_weight_out,
            max_tokens=max_tokens,
            process_group=process_group,
            vocab_size=vocab_size,
            **self.options,
        )


class TaskCrossEntropy(_TaskWeighted):
    """:func:`task_cross_entropy` with lambda and the options fixed, as :class:`LinearTaskCrossEntropy`."""

    def __init__(self, task_weights: Tensor, *, inplace_backward: bool = False, **options: Any) -> None:
        super().__init__(task_weights, **options)
        validation.check_flags(inplace_backward=inplace_backward)
        self.options["inplace_backward"] = inplace_backward

    def forward(
        self, logits: Tensor, labels: Tensor, task_ids: Tensor, *, normalizer: Tensor | float | None = None
    ) -> TaskLoss:
        """Shapes as in :func:`task_cross_entropy`."""
        return task_cross_entropy(logits, labels, task_ids, self.task_weights, normalizer=normalizer, **self.options)
