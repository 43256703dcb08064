"""What no op can do, said by name: second derivatives, and many upstream gradients at once."""

import torch
from torch import Tensor


def refuse_double_backward(op: str) -> None:
    """Raise where a backward pass is to be differentiated again."""
    # Autograd runs a backward formula with gradients enabled only under create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: create_graph=True is not supported")


def refuse_batched_backward(op: str, grad: Tensor) -> None:
    """Raise where a backward pass that writes into memory of its own is to run for many upstream gradients at once."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            f"{op} takes one upstream gradient: is_grads_batched=True and torch.vmap are not supported; "
            "call torch.autograd.grad for each"
        )
