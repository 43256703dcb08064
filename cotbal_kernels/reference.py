"""Eq. 2 of the CoTBal paper spelled out in float64 PyTorch: materialised, slow, obviously right.

    L = sum_k lambda_k sum_{n in task k} CE(x_n) / sum_k lambda_k T_k                    (Eq. 2)

where T_k is the number of supervised tokens of task k. It shares nothing with the fused path, not even the
shift or the expansion of task ids, and every test compares with it. Autograd differentiates it as it stands.
"""

# Shapes: M flattened positions, N supervised positions, D hidden width, V vocabulary, K tasks.

import torch
from torch import Tensor

from .results import TaskLoss


def reference_linear_task_cross_entropy(
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
) -> TaskLoss:
    """Project to float64 logits, then :func:`reference_task_cross_entropy`."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    return reference_task_cross_entropy(
        logits,
        labels,
        task_ids,
        task_weights,
        ignore_index=ignore_index,
        shift=shift,
        normalizer=normalizer,
        aggregation=aggregation,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def reference_task_cross_entropy(
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
) -> TaskLoss:
    """The loss of ``logits [..., V]``; float64 throughout, ``loss`` and ``task_loss`` differentiable.

    Unlike the fused functions it computes tasks of weight zero too.
    """
    if task_ids.shape != labels.shape:  # one id per sequence
        task_ids = (torch.zeros_like(labels).movedim(0, -1) + task_ids).movedim(-1, 0)
    if shift:  # position t predicts label t + 1; the last one predicts nothing
        nothing = torch.full_like(labels[..., :1], ignore_index)
        labels = torch.cat([labels[..., 1:], nothing], dim=-1)
        task_ids = torch.cat([task_ids[..., 1:], torch.zeros_like(nothing).to(task_ids.dtype)], dim=-1)
    vocab_size, num_tasks = logits.shape[-1], task_weights.shape[0]
    logits_MV = logit_scale * logits.reshape(-1, vocab_size).double()
    if logit_softcap is not None:
        logits_MV = logit_softcap * torch.tanh(logits_MV / logit_softcap)
    supervised_M = (labels != ignore_index).reshape(-1)
    targets_N = labels.reshape(-1)[supervised_M].long()
    tasks_N = task_ids.reshape(-1)[supervised_M].long()
    lse_M = torch.logsumexp(logits_MV, dim=1)
    log_p_NV = logits_MV[supervised_M] - lse_M[supervised_M][:, None]

    # The loss of every supervised token.
    ce_N = -log_p_NV[torch.arange(len(targets_N)), targets_N]
    if label_smoothing:  # else a logit of -inf would make NaN of 0 * inf
        ce_N = (1 - label_smoothing) * ce_N + label_smoothing * -log_p_NV.mean(dim=1)
    ce_N = ce_N + z_loss * lse_M[supervised_M] ** 2

    # S_k and T_k, task by task.
    lam_K = task_weights.double()
    sum_K = torch.stack([ce_N[tasks_N == k].sum() for k in range(num_tasks)])
    count_K = torch.stack([(tasks_N == k).sum() for k in range(num_tasks)])
    correct_N = log_p_NV.argmax(dim=1) == targets_N
    correct_K = torch.stack([correct_N[tasks_N == k].sum() for k in range(num_tasks)])

    zero = logits_MV[:0].sum() + lam_K[:0].sum()  # attached to the graph, whatever the logits are
    if aggregation == "token":  # Eq. 2
        denominator = (lam_K * count_K).sum() if normalizer is None else normalizer
        loss = zero if bool(denominator == 0) else (lam_K * sum_K).sum() / denominator
    elif aggregation == "task":  # weighted mean of per-task means over the tasks present
        present = [k for k in range(num_tasks) if count_K[k] > 0]
        total = sum((lam_K[k] for k in present), start=zero)
        loss = zero
        for k in present:
            denominator_k = count_K[k] * total if normalizer is None else normalizer[k]  # type: ignore[index]
            if bool(denominator_k != 0):
                loss = loss + lam_K[k] * sum_K[k] / denominator_k
    elif aggregation == "sum":
        loss = (lam_K * sum_K).sum()
    else:  # "none": one value per position, 0 where not supervised
        loss_N = lam_K[tasks_N] * ce_N
        if normalizer is not None:
            loss_N = loss_N / normalizer if bool(normalizer != 0) else loss_N * 0
        loss_M = torch.zeros(len(supervised_M), dtype=torch.float64, device=logits.device) + zero
        loss = loss_M.masked_scatter(supervised_M, loss_N).reshape(labels.shape)
    lse = torch.where(supervised_M, lse_M, 0.0).reshape(labels.shape).detach()
    return TaskLoss(loss, sum_K, count_K, correct_K, lse)
