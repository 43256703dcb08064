"""Task-weighted fused cross-entropy (Eq. 2 of CoTBal) for language and multimodal model training."""

from .convergence import ConvergenceBalancer
from .distributed import global_normalizer, global_task_tokens, shift_targets_across_ranks
from .functional import linear_task_cross_entropy, task_cross_entropy
from .modules import LinearTaskCrossEntropy, TaskCrossEntropy
from .results import TaskLoss

__all__ = [
    "ConvergenceBalancer",
    "LinearTaskCrossEntropy",
    "TaskCrossEntropy",
    "TaskLoss",
    "global_normalizer",
    "global_task_tokens",
    "linear_task_cross_entropy",
    "shift_targets_across_ranks",
    "task_cross_entropy",
]
