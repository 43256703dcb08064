"""Checks of arguments: a bad one raises ``ValueError`` naming the argument, what was expected and what came.

What can be seen without reading tensor values is checked here, on every device and under ``torch.compile``.
Checks of values run inside the ``prepare_targets`` op, because on a GPU they would synchronise with the host.
"""

# Shapes: M flattened positions, D hidden width, V vocabulary, K tasks, ... leading shape of the batch.

import math
import os

import torch
import torch.distributed as dist
from torch import Tensor

AGGREGATIONS = ("token", "task", "sum", "none")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checks_requested(check: bool) -> bool:
    """Whether to check values where that synchronises too (``check=True`` or COTBAL_CHECK=1)."""
    return check or os.environ.get("COTBAL_CHECK", "0") not in ("", "0")


def require_tensor(name: str, value: object) -> None:
    """Refuse anything that is not a dense tensor of this rank alone."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "placements") and hasattr(value, "device_mesh"):
        raise ValueError(f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor(), or to_local()")
    if value.is_nested or value.layout != torch.strided:
        got = f"a nested one; pass {name}.values()" if value.is_nested else f"{value.layout}; pass {name}.to_dense()"
        raise ValueError(f"{name} must be a dense tensor, got {got}")


def require_number(name: str, value: object) -> None:
    """Refuse anything that is not a Python number."""
    if isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a number, got a tensor, which would get no gradient; a learnable factor belongs on hidden"
        )
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")


def require_integer(name: str, value: object) -> None:
    """Refuse anything that is not a Python integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_flags(**flags: object) -> None:
    """Refuse anything that is not True or False: "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def require_member(name: str, group: object) -> None:
    """Refuse anything but a process group of this process, or None.

    What ``new_group`` returns elsewhere is a number, with which collectives warn and leave each rank with its own.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{name} must be a torch.distributed.ProcessGroup that the calling process is a member of (of a device "
            f"mesh: mesh.get_group()), got {group!r}"
        )


def _require_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {value.device}")


def check_not_transformed(**arguments: object) -> None:
    """Refuse tensors inside ``torch.func`` transforms, ``torch.vmap`` and forward-mode differentiation.

    The ops have a reverse-mode formula only: gradients and tangents would be missing without a word, or the error
    would be one of PyTorch's internals. A compiler traces with tensors of its own, of which none of this can be asked.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if torch._C._functorch.is_batchedtensor(tensor):
            raise ValueError(
                f"{name} must be a plain tensor, got one inside torch.vmap; the batch may have any number of leading "
                "dimensions, so pass it whole (aggregation='none' returns the loss of every position)"
            )
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            raise ValueError(
                f"{name} must be a plain tensor, got one inside a torch.func transform (grad, vjp, jvp, ...); use "
                "loss.backward() or torch.autograd.grad, or backend='reference', which is differentiable by any of them"
            )
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} must carry no tangent: there is no forward-mode derivative; use loss.backward() or "
                "torch.autograd.grad, or backend='reference'"
            )


def check_scores(name: str, value: Tensor) -> None:
    """Check hidden states or logits: floating point, at least one leading dimension."""
    require_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"{name} must be bfloat16, float16, float32 (or float64 for gradient checks), got {value.dtype}"
        )
    if value.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions [..., features], got {tuple(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature in its last dimension, got {tuple(value.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, may_be_empty: bool = False) -> None:
    """Check the head against the hidden states: ``weight [V, D]``, ``bias [V]``, one dtype, one device."""
    require_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] to match hidden, got {tuple(weight.shape)}")
    if weight.shape[0] == 0 and not may_be_empty:
        raise ValueError(f"weight must have at least one vocabulary row, got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden ({hidden.dtype}), got {weight.dtype}")
    _require_device("weight", weight, "hidden", hidden)
    if bias is not None:
        require_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}] to match weight, got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}")
        _require_device("bias", bias, "hidden", hidden)


def check_gradient_buffer(buffer: Tensor | None, weight: Tensor) -> None:
    """Check ``grad_weight_out``: ``[V, D]`` contiguous, float32 or the dtype of the weight, no gradient of its own."""
    if buffer is None:
        return
    require_tensor("grad_weight_out", buffer)
    if buffer.shape != weight.shape or not buffer.is_contiguous():
        raise ValueError(
            f"grad_weight_out must be contiguous {tuple(weight.shape)}, got {tuple(buffer.shape)} with strides "
            f"{buffer.stride()}"
        )
    if buffer.dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"grad_weight_out must be torch.float32 or {weight.dtype}, got {buffer.dtype}")
    if buffer.requires_grad:
        raise ValueError("grad_weight_out must not require grad: it is a buffer that gradients are added to")
    _require_device("grad_weight_out", buffer, "weight", weight)


def check_max_tokens(max_tokens: int | None) -> None:
    """Check the bound of computed positions."""
    if max_tokens is None:
        return
    require_integer("max_tokens", max_tokens)
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be None or a number of positions >= 0, got {max_tokens}")


def check_targets(labels: Tensor, task_ids: Tensor, *, leading: torch.Size, like_name: str, like: Tensor) -> None:
    """Check labels ``[...]`` and task ids ``[...]`` or ``[first dimension]``: integers, on one device."""
    require_tensor("labels", labels)
    if labels.shape != leading:
        raise ValueError(
            f"labels must be {tuple(leading)} to match {like_name} {tuple(like.shape)}, got {tuple(labels.shape)}"
        )
    _require_device("labels", labels, like_name, like)
    check_labels_and_tasks(labels, task_ids)


def check_labels_and_tasks(labels: Tensor, task_ids: Tensor) -> None:
    """The part of :func:`check_targets` that needs no scores."""
    for name, value in (("labels", labels), ("task_ids", task_ids)):
        require_tensor(name, value)
        if value.dtype not in _INTEGERS:
            raise ValueError(f"{name} must be integers (int64, int32, int16, int8 or uint8), got {value.dtype}")
    if labels.dim() == 0:
        raise ValueError("labels must have at least one dimension, got a scalar")
    if task_ids.shape != labels.shape and task_ids.shape != labels.shape[:1]:
        raise ValueError(
            f"task_ids must be {tuple(labels.shape)} (one per position) or {tuple(labels.shape[:1])} "
            f"(one per sequence), got {tuple(task_ids.shape)}"
        )
    _require_device("task_ids", task_ids, "labels", labels)


def check_task_weights(task_weights: Tensor, like_name: str, like: Tensor) -> None:
    """Check lambda: ``[K]`` with K >= 1, float32, same device."""
    require_tensor("task_weights", task_weights)
    if task_weights.dim() != 1 or task_weights.shape[0] == 0:
        raise ValueError(f"task_weights must be [K] with K >= 1, got {tuple(task_weights.shape)}")
    if task_weights.dtype != torch.float32:
        raise ValueError(f"task_weights must be float32 whatever the model's dtype, got {task_weights.dtype}")
    _require_device("task_weights", task_weights, like_name, like)


def check_options(
    *,
    aggregation: str,
    normalizer: Tensor | float | None,
    num_tasks: int,
    logit_softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int | None,
    ignore_index: int,
    logit_scale: float = 1.0,
) -> None:
    """Check the options shared by both public functions."""
    check_aggregation(aggregation, AGGREGATIONS)
    require_integer("ignore_index", ignore_index)
    require_number("logit_scale", logit_scale)
    require_number("label_smoothing", label_smoothing)
    require_number("z_loss", z_loss)
    if logit_softcap is not None:
        require_number("logit_softcap", logit_softcap)
    if chunk_size is not None:
        require_integer("chunk_size", chunk_size)
    if normalizer is not None:
        _check_normalizer(normalizer, aggregation, num_tasks)
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number > 0, got {logit_scale}")
    if logit_softcap is not None and not 1e-30 <= logit_softcap <= 1e30:  # kernels multiply by its reciprocal
        raise ValueError(f"logit_softcap must be None or a number from 1e-30 to 1e30, got {logit_softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or a positive number of rows, got {chunk_size}")


def check_aggregation(aggregation: str, allowed: tuple[str, ...]) -> None:
    """Refuse an aggregation that does not exist (here)."""
    if aggregation not in allowed:
        raise ValueError(f"aggregation must be one of {', '.join(map(repr, allowed))}, got {aggregation!r}")


def _check_normalizer(normalizer: Tensor | float, aggregation: str, num_tasks: int) -> None:
    if aggregation == "sum":
        raise ValueError("normalizer must be None with aggregation='sum', which divides by nothing")
    if isinstance(normalizer, Tensor):
        expected = (num_tasks,) if aggregation == "task" else ()
        if tuple(normalizer.shape) != expected:
            raise ValueError(
                f"normalizer must have shape {expected} with aggregation={aggregation!r}, got {tuple(normalizer.shape)}"
            )
        if normalizer.dtype not in (*_FLOATS, *_INTEGERS):
            raise ValueError(f"normalizer must be floating point or integers, got {normalizer.dtype}")
        _check_normalizer_values(normalizer)
        return
    if aggregation == "task":
        raise ValueError(
            "normalizer must be a [K] tensor of denominators T_k * sum(lambda) with aggregation='task' "
            f"(see global_normalizer), got {normalizer!r}"
        )
    if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)) or not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be None, a tensor or a finite number >= 0, got {normalizer!r}")


def _check_normalizer_values(normalizer: Tensor) -> None:
    """Where reading values waits for nothing: on a CPU, outside of graphs, of tensors that have values."""
    if torch.compiler.is_compiling() or normalizer.device.type != "cpu":
        return
    if type(normalizer) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(
        normalizer
    ):
        return
    if not bool((torch.isfinite(normalizer) & (normalizer >= 0)).all()):
        raise ValueError(f"normalizer must be finite and >= 0, got {normalizer.tolist()}")


def check_target_values(
    labels_M: Tensor, task_ids_M: Tensor, task_weights_K: Tensor, supervised_M: Tensor, vocab_size: int
) -> None:
    """Raise on the first supervised position whose label or task id is out of range, or on a bad lambda.

    Positions are named in flattened order and after the shift, as ``labels.flatten()[i]``. Reads values: on a
    GPU this synchronises with the host.
    """
    num_tasks = task_weights_K.shape[0]
    for name, values, size in (("labels", labels_M, vocab_size), ("task_ids", task_ids_M, num_tasks)):
        wrong = supervised_M & ((values < 0) | (values >= size))
        if bool(wrong.any()):
            position = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} must be in [0, {size}) where supervised, got {int(values[position])} at "
                f"flattened position {position} ({int(wrong.sum())} such positions)"
            )
    wrong_weight = ~(torch.isfinite(task_weights_K) & (task_weights_K >= 0))
    if bool(wrong_weight.any()):
        task = int(wrong_weight.nonzero()[0])
        raise ValueError(f"task_weights must be finite and >= 0, got {float(task_weights_K[task])} for task {task}")


def check_capacity(num_rows: Tensor, capacity: int) -> None:
    """Raise when there are more rows to compute than ``max_tokens`` allows; synchronises on a GPU."""
    if int(num_rows) > capacity:
        raise ValueError(
            f"max_tokens must be at least the number of supervised tokens, {int(num_rows)}, got {capacity}"
        )
