"""What a backend is, and the registry through which the ops find one by name when they run."""

# Shapes: M flattened positions, D hidden width, V vocabulary, K tasks.

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import portable
from .portable import LinearOutput, TokenLoss

Need = Sequence[bool]  # gradients wanted of (hidden, weight, bias)
Spec = Sequence[float]  # the fields of TokenLoss


class Backend(Protocol):
    """What a backend provides; :mod:`cotbal_kernels.portable` documents each function."""

    def prepare_targets(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        check: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def linear_forward(
        self,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        tasks_M: Tensor,
        scale_K: Tensor,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
    ) -> LinearOutput: ...

    def linear_rows_forward(
        self,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        spec: TokenLoss,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def linear_rows_backward(
        self,
        grad_M: Tensor,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def logits_rows_forward(
        self, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def logits_rows_backward(
        self, grad_M: Tensor, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
    ) -> Tensor: ...

    def scale_gradient(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor: ...


BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend="name"`` available to the public functions; a module with those functions will do."""
    BACKENDS[name] = backend


def resolve_backend(name: str) -> str:
    """Return the name of a registered backend for ``name``, or raise ``ValueError`` naming those that exist.

    "auto" is "portable" as long as no GPU backend is part of the build. ("reference" never gets here.)
    """
    if name == "auto":
        return "portable"
    if name in BACKENDS:
        return name
    available = ", ".join(repr(known) for known in ("auto", "reference", *sorted(BACKENDS)))
    reason = "is not part of this build" if name in ("triton", "cuda") else "does not exist"
    raise ValueError(f"backend={name!r} {reason}; available backends: {available}")


register_backend("portable", portable)
