"""The fused loss inside a transformers model, without changing how the model is called.

    apply_fused_loss(model, task_weights=lam)
    out = model(**batch, labels=labels, loss_task_ids=ids)

The loss runs inside the ``__call__`` of the head module, where ZeRO-3 and FSDP have gathered its weight
(``head.py``), and takes the place of ``model.loss_function`` in the model's own forward (``patching.py``), so
whatever the model does around its loss stays as it is. Neither transformers nor DeepSpeed is imported, and PEFT only
where a head comes from it. See docs/swap_in.md.
"""

from .head import FusedHead, FusedLinear, FusedLoss
from .patching import apply_fused_loss, fused_loss, remove_fused_loss, set_task_weights
from .trainer import TaskWeightedTrainerMixin

__all__ = [
    "FusedHead",
    "FusedLinear",
    "FusedLoss",
    "TaskWeightedTrainerMixin",
    "apply_fused_loss",
    "fused_loss",
    "remove_fused_loss",
    "set_task_weights",
]
