"""What the ops and the backends hand to each other: the tuples, the dtypes and the protocol of a backend."""

# Shapes: M flattened positions, N rows that may be computed (the capacity), D hidden width, V vocabulary,
# K tasks.

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Need = Sequence[bool]  # gradients wanted of (hidden, weight, bias)
Spec = Sequence[float]  # the fields of TokenLoss


class TokenLoss(NamedTuple):
    """The loss of one token: cross-entropy with options. The defaults mean plain cross-entropy.

    With z the logits after scale and soft cap, m the largest and l the sum of exp(z - m):
    ``log l - (1 - smoothing) (z_target - m) - even * sum(z - m) + z_loss (m + log l)^2``. A row that is computed
    with target -1 has no target among these logits (they are one shard of a vocabulary): the second term is
    missing, in its gradient too.
    """

    softcap: float = 0.0  # z -> softcap * tanh(z / softcap); 0 is none
    smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # coefficient of lse^2
    scale: float = 1.0  # z -> scale * z, bias included, before the soft cap
    even: float = 0.0  # smoothing / size of the whole vocabulary


class Targets(NamedTuple):
    """What ``prepare_targets`` makes of labels, task ids and task weights, without reading any value back."""

    targets_M: Tensor  # int64, -1 where a position is not computed
    tasks_M: Tensor  # int64 in [0, K)
    tokens_K: Tensor  # int64, supervised positions of each task, of weight 0 too
    poison: Tensor  # float32 scalar: 0, or NaN when a value is out of range or the capacity too small
    rows_N: Tensor  # int64: the computed positions in ascending order, then M
    num_rows: Tensor  # int64 [1]: how many of rows_N are positions

    @classmethod
    def empty(cls, labels_M: Tensor, task_weights_K: Tensor, capacity: int) -> "Targets":
        """Memory for them."""
        return cls(
            targets_M=torch.empty_like(labels_M, memory_format=torch.contiguous_format),
            tasks_M=torch.empty_like(labels_M, memory_format=torch.contiguous_format),
            tokens_K=labels_M.new_empty(task_weights_K.shape),
            poison=task_weights_K.new_empty(()),
            rows_N=labels_M.new_empty(capacity),
            num_rows=labels_M.new_empty(1),
        )


class LinearProblem(NamedTuple):
    """A linear head, the hidden states that it projects, and the rows of them whose loss is wanted."""

    hidden_MD: Tensor
    weight_VD: Tensor  # [V, D], dtype of hidden
    bias_V: Tensor | None
    targets_M: Tensor  # int64; -1: the row has no target among these logits
    rows_N: Tensor  # int64: positions to compute in ascending order, then M
    num_rows: Tensor  # int64 [1]: how many of rows_N are positions


class LinearOutput(NamedTuple):
    """What ``linear_forward`` returns; a gradient that was not asked for is an empty tensor."""

    loss: Tensor
    task_loss_K: Tensor
    task_correct_K: Tensor
    lse_M: Tensor
    grad_hidden_MD: Tensor
    grad_weight_VD: Tensor
    grad_bias_V: Tensor


def compute_capability(device: torch.device | None) -> tuple[int, int]:
    """That of a CUDA device; of None the highest among those that are visible."""
    devices = range(torch.cuda.device_count()) if device is None else [device]
    return max(torch.cuda.get_device_capability(one) for one in devices)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays float64, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_grad_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dtypes in which gradients of (hidden, weight, bias) taken in the forward pass wait for the backward pass.

    The upstream gradient, which only arrives there, multiplies what waits: so float32 means one rounding. The
    weight's waits in bfloat16, where float32 would cost another V x D; not in float16, where a gradient
    divided by 1e6 tokens underflows before the loss scale could lift it.
    """
    wide = compute_dtype(dtype)
    return wide, torch.bfloat16 if dtype == torch.bfloat16 else wide, wide


class Backend(Protocol):
    """What a backend provides; a module with these functions will do. Gradients are rounded once.

    ``stats_2M`` of the functions below is the largest logit of every computed row and the log of the sum of
    ``exp(z - largest)``, whose sum is the lse: the lse alone would cost ``exp(z - lse)`` its digits at 1e4.
    Both are 0 where a row is not computed, as are losses and hits.
    """

    def prepare_targets(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        check: bool,
        capacity: int,
    ) -> Targets:
        """Counts and the rows to compute: supervised ones, without tasks of weight 0 if ``skip_zero``."""
        ...

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ``scale_K`` of ``loss = sum_k scale_k S_k``, lambda over the normalizer, and that ``[K]``, float32.

        The scale is 0 where the normalizer is 0. Without a ``normalizer`` it is sum_k lambda_k T_k, with ``per_task``
        T_k * sum of lambda over the tasks present. One that is negative or not finite, and the poison, make NaN.
        """
        ...

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Losses and hits (int64) of every task, ``[K]``, in a fixed order."""
        ...

    def linear_forward(
        self,
        problem: LinearProblem,
        tasks_M: Tensor,
        scale_K: Tensor,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
    ) -> LinearOutput:
        """Loss ``sum_k scale_k S_k`` with the gradients that ``need`` asks for, in their saved dtypes."""
        ...

    def linear_rows_forward(
        self, problem: LinearProblem, spec: TokenLoss, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss_M, hit_M (int64, 0 or 1) and stats_2M."""
        ...

    def linear_rows_backward(
        self,
        problem: LinearProblem,
        grad_M: Tensor,
        stats_2M: Tensor,
        grad_weight_out: Tensor | None,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
        grad_hidden_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for any upstream gradient per row; the weight's is added to ``grad_weight_out`` if given.

        ``stats_2M`` may be those of a larger vocabulary than ``weight_VD`` is a shard of: probabilities are
        ``exp(z - stats[0] - stats[1])``. dX comes in ``grad_hidden_dtype``: float32 where ranks still sum it.
        """
        ...

    def logits_rows_forward(
        self, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``linear_rows_forward``, for logits that exist."""
        ...

    def logits_rows_backward(
        self,
        grad_M: Tensor,
        logits_MV: Tensor,
        targets_M: Tensor,
        stats_2M: Tensor,
        spec: TokenLoss,
        chunk_size: int,
        out_MV: Tensor,
    ) -> None:
        """Gradient of the logits into ``out_MV`` of their dtype, zero rows where not computed.

        ``out_MV`` may be ``logits_MV`` itself if its rows lie apart and columns are neighbours.
        """
        ...

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None:
        """``out = grad * factor``, the product in float32; both contiguous, ``factor`` a float32 or float64 scalar.

        ``out`` may be ``grad`` itself, and then costs nothing where the factor is 1.
        """
        ...
