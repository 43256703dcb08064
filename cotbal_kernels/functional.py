"""The public loss functions. Everything here is Eq. 2 of the paper; the work is done by the ops.

    loss = sum_k scale_k S_k,      S_k = sum of the token losses of task k

The aggregation only decides scale_k, a small differentiable function of lambda, T_k and the normalizer. So
d loss / d lambda comes from plain autograd: (S_k - loss * T_k) / normalizer for Eq. 2 with its own
normalizer.
"""

# Shapes: M flattened positions, D hidden width, V vocabulary, K tasks, ... leading shape of the batch.

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import logits_ops, ops, task_ops, validation
from .backends import resolve_backend
from .interface import Targets, TokenLoss
from .per_task import spread_to_tokens
from .reference import reference_linear_task_cross_entropy, reference_task_cross_entropy
from .results import TaskLoss
from .sharded_head import Head, local_head, place_head
from .targets import check_values, make_targets
from .vocabulary_parallel import sharded_rows


def linear_task_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    task_ids: Tensor,
    task_weights: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    normalizer: Tensor | float | None = None,
    aggregation: str = "token",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    differentiable_tasks: bool = False,
    recompute: bool = False,
    grad_weight_out: Tensor | None = None,
    max_tokens: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    check: bool = False,
) -> TaskLoss:
    """Task-weighted cross-entropy of a linear head (Eq. 2 of CoTBal) without materialising the logits.

    Args:
        hidden: ``[..., D]``, bfloat16, float16 or float32, at least two dimensions. float64 is computed and
            returned in float64, for gradient checks (lambda and the normalizer stay float32).
        weight: ``[V, D]``, dtype of ``hidden``. Under autocast both are cast as ``F.linear`` would.
        labels: ``[...]`` integers in [0, V), or ``ignore_index`` where a position is not supervised.
        task_ids: ``[...]``, or ``[first dimension]`` for one task per sequence; integers in [0, K). Ids of
            unsupervised positions are never looked at.
        task_weights: ``[K]`` float32, lambda of Eq. 2, finite and >= 0. May require grad.
        bias: ``[V]`` or None.
        ignore_index: label of unsupervised positions.
        shift: position t predicts label t + 1 and takes its task id; the last position is unsupervised.
        normalizer: what the weighted sum is divided by; None means the normalizer of this call. Under data
            parallelism or gradient accumulation pass :func:`global_normalizer`, else Eq. 2 does not hold.
        aggregation: "token": sum_k lambda_k S_k / sum_k lambda_k T_k (Eq. 2). "task": the lambda-weighted
            mean of the task means S_k / T_k over the tasks present; its ``normalizer`` is ``[K]``, T_k * sum
            lambda. "sum": sum_k lambda_k S_k. "none": lambda times the loss of every position, ``[...]``,
            divided by ``normalizer`` if one is given.
        logit_scale: z becomes ``logit_scale * z``, bias included, before the soft cap: Cohere, Granite
            (1 / logits_scaling), Falcon-H1; a temperature T is ``logit_scale = 1 / T``.
        logit_softcap: z becomes ``softcap * tanh(z / softcap)`` (Gemma 2).
        label_smoothing: share of the target spread evenly over the vocabulary, as in ``F.cross_entropy``.
        z_loss: adds ``z_loss * lse^2`` to each token's loss (PaLM, section 5).
        differentiable_tasks: make ``task_loss`` differentiable too; backward then recomputes the logits (4F).
        recompute: take the gradients in the backward pass, from logits computed again (4F), instead of in the
            forward pass (3F): nothing as large as ``weight`` waits in between.
        grad_weight_out: ``[V, D]`` float32 or dtype of ``weight``: the backward pass adds the gradient of the
            weight to it, in float32 and with one rounding, and ``weight.grad`` stays as it is (trainers with
            main gradients). Implies ``recompute``. Not with "reference".
        max_tokens: an upper bound of the computed positions that the caller knows, say from the labels before
            they went to the GPU. Backends that cannot read the count on the device then do no work beyond it.
            With more positions than that the loss is NaN, or an error where values are checked.
        process_group: ranks that share the vocabulary (tensor parallelism): each holds a contiguous part of the
            rows of the head, in the order of the ranks; ``weight`` and ``bias`` are that part, [V_r, D] and
            [V_r], of any size. ``hidden``, ``labels`` (ids of the whole vocabulary), ``task_ids``,
            ``task_weights`` and what requires grad are the same on all of them, and so is everything that is
            returned, bit by bit. The gradient of ``hidden`` is the complete one: nothing is left to be reduced
            over the group; those of ``weight`` and ``bias`` are of the own part. A ``weight`` that is a DTensor
            with placements [Shard(0)] brings its group (one that FSDP has sharded over the batch is to be gathered
            first); ``hidden`` may be a DTensor with [Replicate()]. Cost and first call:
            :mod:`cotbal_kernels.vocabulary_parallel`. Not with "reference", and not inside a graph of
            ``torch.compile``.
        vocab_size: rows of the head from this one on are padding (at the end of the last parts, under a
            ``process_group``): no logits, zero gradients. None: there is no padding.
        backend: "auto", "triton", "cuda", "portable", or "reference" (float64, returns float64, no
            performance); COTBAL_BACKEND, any but "reference", takes the place of "auto".
        chunk_size: rows of logits that the workspace can hold; None: as many as fit its default bound.
        check: raise on bad labels, task ids or weights on a GPU too, which synchronises; so does
        COTBAL_CHECK=1.

    Returns:
        :class:`TaskLoss`. With every token ignored, or a normalizer of 0, the loss is 0 with zero gradients.

    Cost in products of 2*M*V*D flop over the computed rows: 3 with gradients for both, 2 with a frozen head
    or trunk, 1 without gradients. Ignored rows cost none, nor do rows of weight 0, unless ``task_weights``
    requires grad or ``differentiable_tasks`` is set. No second derivative, no forward mode, no transforms of
    ``torch.func``, one upstream gradient at a time.

    Raises:
        ValueError: an argument is wrong. Values out of range raise on a CPU; on a GPU they make the loss NaN.
    """
    if vocab_size is not None:
        validation.require_integer("vocab_size", vocab_size)
    head = local_head(Head(hidden, weight, bias, grad_weight_out, process_group, vocab_size))
    hidden = head.hidden
    validation.check_scores("hidden", hidden)
    validation.check_task_weights(task_weights, "hidden", hidden)
    validation.check_targets(labels, task_ids, leading=hidden.shape[:-1], like_name="hidden", like=hidden)
    token_loss: dict[str, Any] = {
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    validation.check_options(
        aggregation=aggregation,
        normalizer=normalizer,
        num_tasks=task_weights.shape[0],
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        **token_loss,
    )
    validation.check_flags(shift=shift, differentiable_tasks=differentiable_tasks, recompute=recompute, check=check)
    hidden, weight, bias = _autocast(hidden, head.weight, head.bias)
    validation.check_head(hidden, weight, bias, may_be_empty=head.group is not None)
    validation.check_gradient_buffer(head.grad_weight_out, weight)
    validation.check_max_tokens(max_tokens)
    if backend == "reference" and head.group is not None:
        raise ValueError("process_group must be None with backend='reference', which needs the whole head")
    if backend == "reference" and grad_weight_out is not None:
        raise ValueError("grad_weight_out must be None with backend='reference', whose gradients go to weight.grad")
    head, shard = place_head(head._replace(weight=weight, bias=bias))
    weight, bias, grad_weight_out = head.weight, head.bias, head.grad_weight_out
    if backend == "reference":
        check_values(labels, task_ids, task_weights, weight.shape[0], ignore_index, shift)
        return reference_linear_task_cross_entropy(
            hidden,
            weight,
            labels,
            task_ids,
            task_weights,
            bias=bias,
            ignore_index=ignore_index,
            shift=shift,
            normalizer=normalizer,
            aggregation=aggregation,
            **token_loss,
        )
    validation.check_not_transformed(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        task_ids=task_ids,
        task_weights=task_weights,
        normalizer=normalizer,
    )
    backend = resolve_backend(backend, hidden.device)
    all_rows = weight.shape[0] if shard is None else shard.vocab_size
    targets = make_targets(
        labels, task_ids, task_weights, all_rows, ignore_index, shift, differentiable_tasks, check, max_tokens, backend
    )
    hidden_MD = hidden.reshape(-1, hidden.shape[-1])
    spec = _token_loss(all_rows, **token_loss)
    where = (chunk_size or 0, backend)
    by_rows = aggregation == "none" or differentiable_tasks or recompute or grad_weight_out is not None
    if shard is None and not by_rows:  # gradients in the forward pass
        scale_K = _task_scale(task_weights, targets, normalizer, aggregation, backend)
        needs = (_needs_grad(hidden), _needs_grad(weight), bias is not None and _needs_grad(bias))
        loss, task_loss_K, task_correct_K, lse_M, *_ = ops.linear_task_ce(
            hidden_MD,
            weight,
            bias,
            targets.targets_M,
            targets.tasks_M,
            targets.rows_N,
            targets.num_rows,
            scale_K,
            needs,
            spec,
            *where,
        )
        return TaskLoss(loss, task_loss_K, targets.tokens_K, task_correct_K, lse_M.reshape(labels.shape))
    if shard is not None:
        rows, targets = sharded_rows(hidden_MD, weight, bias, targets, grad_weight_out, shard, spec, *where, check)
    else:
        rows = ops.linear_task_ce_rows(
            hidden_MD, weight, bias, targets.targets_M, targets.rows_N, targets.num_rows, grad_weight_out, spec, *where
        )
    return _aggregate_rows(
        rows, targets, task_weights, normalizer, aggregation, labels.shape, differentiable_tasks, backend
    )


def task_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    task_ids: Tensor,
    task_weights: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    normalizer: Tensor | float | None = None,
    aggregation: str = "token",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    differentiable_tasks: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
    check: bool = False,
) -> TaskLoss:
    """The loss of :func:`linear_task_cross_entropy` for ``logits [..., V]`` that already exist.

    Same arguments and edge cases. ``task_loss`` is differentiable at no extra cost if
    ``differentiable_tasks``. The backward pass reads the logits again and allocates nothing but their
    gradient and one chunk.

    Args:
        inplace_backward: write the gradient of the logits over the logits, half of the memory. After the backward pass
            they hold it, so anything else whose backward pass needs them, a second one of this loss too, is a
            ``RuntimeError`` of autograd. Logits without a memory of their own in rows (expanded, transposed) are
            left alone, as they are while a compiler traces, which plans memory itself.
    """
    validation.check_scores("logits", logits)
    validation.check_task_weights(task_weights, "logits", logits)
    validation.check_targets(labels, task_ids, leading=logits.shape[:-1], like_name="logits", like=logits)
    token_loss: dict[str, Any] = {
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    validation.check_options(
        aggregation=aggregation,
        normalizer=normalizer,
        num_tasks=task_weights.shape[0],
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        **token_loss,
    )
    validation.check_flags(
        shift=shift, differentiable_tasks=differentiable_tasks, inplace_backward=inplace_backward, check=check
    )
    if backend == "reference":
        check_values(labels, task_ids, task_weights, logits.shape[-1], ignore_index, shift)
        return reference_task_cross_entropy(
            logits,
            labels,
            task_ids,
            task_weights,
            ignore_index=ignore_index,
            shift=shift,
            normalizer=normalizer,
            aggregation=aggregation,
            **token_loss,
        )
    validation.check_not_transformed(
        logits=logits, labels=labels, task_ids=task_ids, task_weights=task_weights, normalizer=normalizer
    )
    backend = resolve_backend(backend, logits.device)
    vocab_size = logits.shape[-1]
    targets = make_targets(
        labels, task_ids, task_weights, vocab_size, ignore_index, shift, differentiable_tasks, check, None, backend
    )
    logits_MV = logits.reshape(-1, vocab_size)
    rows = logits_ops.task_ce_rows(
        logits_MV,
        targets.targets_M,
        _token_loss(vocab_size, **token_loss),
        chunk_size or 0,
        backend,
        inplace_backward and not torch.compiler.is_compiling() and _rows_apart(logits_MV),
    )
    return _aggregate_rows(
        rows, targets, task_weights, normalizer, aggregation, labels.shape, differentiable_tasks, backend
    )


def _task_scale(
    task_weights_K: Tensor, targets: Targets, normalizer: Tensor | float | None, aggregation: str, backend: str
) -> Tensor:
    """scale_k in ``loss = sum_k scale_k S_k``: lambda over the normalizer, 0 where the normalizer is 0."""
    if aggregation == "sum" or (aggregation == "none" and normalizer is None):
        return task_weights_K + targets.poison
    if normalizer is not None:
        normalizer = _as_tensor(normalizer, task_weights_K)
    per_task = aggregation == "task"
    scale_K, _ = task_ops.task_scales(task_weights_K, targets.tokens_K, targets.poison, normalizer, per_task, backend)
    return scale_K


def _as_tensor(number: Tensor | float, like: Tensor) -> Tensor:
    """A float32 tensor on the device of ``like``."""
    if isinstance(number, Tensor):
        return number.to(like.device, torch.float32)
    if torch.compiler.is_compiling():  # a number that fills a tensor would be a new graph each time it changes
        return number * torch.ones((), dtype=torch.float32, device=like.device)
    # Filled where it is used: a copy of a number to a GPU waits for the device, and no CUDA graph can capture it.
    return torch.full((), number, dtype=torch.float32, device=like.device)


def _aggregate_rows(
    rows: tuple[Tensor, Tensor, Tensor],
    targets: Targets,
    task_weights_K: Tensor,
    normalizer: Tensor | float | None,
    aggregation: str,
    shape: torch.Size,
    differentiable_tasks: bool,
    backend: str,
) -> TaskLoss:
    """The same result from the loss of every row, for plain autograd to differentiate."""
    loss_M, hit_M, stats_2M = rows
    tasks_M = targets.tasks_M
    task_loss_K, task_correct_K = task_ops.task_sums(loss_M, hit_M, tasks_M, task_weights_K.shape[0], backend)
    scale_K = _task_scale(task_weights_K, targets, normalizer, aggregation, backend)
    if aggregation == "none":
        loss = (spread_to_tokens(scale_K, tasks_M) * loss_M).reshape(shape)
    else:
        loss = (scale_K * task_loss_K).sum()
    task_loss_K = task_ops.apart(task_loss_K if differentiable_tasks else task_loss_K.detach())
    return TaskLoss(loss, task_loss_K, targets.tokens_K, task_correct_K, stats_2M.sum(0).reshape(shape))


def _token_loss(
    vocab_size: int, logit_scale: float, logit_softcap: float | None, label_smoothing: float, z_loss: float
) -> TokenLoss:
    return TokenLoss(logit_softcap or 0.0, label_smoothing, z_loss, logit_scale, label_smoothing / vocab_size)


def _rows_apart(logits_MV: Tensor) -> bool:
    """No element is in two places, and columns are neighbours."""
    rows, columns = logits_MV.shape
    return (columns <= 1 or logits_MV.stride(1) == 1) and (rows <= 1 or logits_MV.stride(0) >= columns)


def _needs_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast does for ``F.linear``: everything but float64 to the autocast dtype."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)
