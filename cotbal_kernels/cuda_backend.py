"""The CUDA backend: chunks of rows, library products, and the kernels of csrc/ in between.

For each chunk of C packed rows: gather C rows of the hidden states; logits = one library product, float32 out of
16-bit inputs; ``chunk_gradient`` turns the logits into their gradient in place (16-bit values at the front of each
float32 row); one more product gives dX. dW is one product over all rows: of the one chunk, or of each slice of the
vocabulary, for which the gradients of the logits wait (:mod:`.cuda_kernels.slices`). Nothing is read back to the
host: the number of chunks comes from the capacity ``rows_N.shape[0]``, and rows behind the last computed one have
zero hidden states and zero gradients.

Workspace: ``WORKSPACE_BYTES`` for the logits of a chunk, whatever M and V are (one row at least), and beside them its
hidden rows and its dX, 6 C D bytes in 16 bits, or the hidden states of all rows. There is no second dW in float32.

Numerics: products accumulate in float32; loss, softmax and p - 1 in float32; the gradient of the logits is rounded
once to the dtype of the inputs before the two products, as in every 16-bit training. float16 cannot hold gradients
divided by a million tokens: there they are lifted by a power of two, exactly, and the products lowered again.
float32 products follow ``torch.backends.cuda.matmul.allow_tf32``; float64 goes to the portable backend.
"""

# Shapes: M positions, N rows that may be computed, C rows of one chunk, D hidden width, V vocabulary, K tasks.

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import portable
from .cuda_kernels.gradients import LinearGradients, RowKernels, lift_for
from .cuda_kernels.head import Head, HeadKernels
from .cuda_kernels.library import ChunkRows, RowResults, load
from .cuda_kernels.library import unavailable_reason as unavailable_reason
from .cuda_kernels.products import LibraryProducts, Products
from .cuda_kernels.slices import Waiting
from .interface import LinearOutput, LinearProblem, Need, Targets, TokenLoss, saved_grad_dtypes
from .rows import at_rows
from .validation import check_capacity, check_target_values, checks_requested


class Kernels(HeadKernels, RowKernels, Protocol):
    """The launches the backend needs; :class:`.cuda_kernels.library.KernelLibrary` documents them."""

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]: ...

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None: ...

    def compact(
        self,
        labels_M: Tensor,
        task_ids_M: Tensor,
        task_weights_K: Tensor,
        vocab_size: int,
        ignore_index: int,
        skip_zero: bool,
        capacity: int,
    ) -> Targets: ...

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]: ...


class CudaBackend:
    """:class:`~cotbal_kernels.interface.Backend` over kernels and products; it holds no state.

    Args:
        kernels: returns the launches for a device; called when an op runs, so that compiling csrc/ waits until then.
        products: the matrix products.
    """

    def __init__(self, kernels: Callable[[torch.device], Kernels], products: Products) -> None:
        self._kernels, self._products = kernels, products

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
        """One launch."""
        raises = checks_requested(check)
        if raises:
            check_target_values(labels_M, task_ids_M, task_weights_K, labels_M != ignore_index, vocab_size)
        vectors = (labels_M.contiguous(), task_ids_M.contiguous(), task_weights_K.contiguous())
        out = self._kernels(labels_M.device).compact(*vectors, vocab_size, ignore_index, skip_zero, capacity)
        if raises:
            check_capacity(out.num_rows, capacity)
        return out

    def task_scales(
        self, task_weights_K: Tensor, tokens_K: Tensor, poison: Tensor, normalizer: Tensor | None, per_task: bool
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        normalizer = normalizer if normalizer is None else normalizer.contiguous()
        kernels = self._kernels(task_weights_K.device)
        return kernels.task_scales(task_weights_K.contiguous(), tokens_K, poison, normalizer, per_task)

    def task_sums(self, loss_M: Tensor, hit_M: Tensor, tasks_M: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """One launch."""
        if loss_M.dtype == torch.float64:
            return portable.task_sums(loss_M, hit_M, tasks_M, num_tasks)
        return self._kernels(loss_M.device).task_sums(loss_M, hit_M, tasks_M, num_tasks)

    def linear_forward(
        self,
        problem: LinearProblem,
        tasks_M: Tensor,
        scale_K: Tensor,
        need: Need,
        spec: TokenLoss,
        chunk_size: int,
    ) -> LinearOutput:
        """Gradients in forward: 1F for the loss and 1F for each of dX and dW, over the capacity."""
        hidden_MD, targets_M = problem.hidden_MD, problem.targets_M
        if hidden_MD.dtype == torch.float64:
            return portable.linear_forward(problem, tasks_M, scale_K, need, spec, chunk_size)
        kernels = self._kernels(hidden_MD.device)
        results, stats_2M = _new_results(targets_M)
        lift = lift_for(scale_K, spec.scale) if hidden_MD.dtype == torch.float16 else None
        wanted_K = (scale_K if lift is None else scale_K * lift.up).contiguous() if any(need) else None
        head = Head(kernels, self._products, problem, spec, chunk_size, tasks_M, wanted_K)
        dtypes = saved_grad_dtypes(hidden_MD.dtype)
        gradients = LinearGradients(kernels, self._products, problem, need, dtypes, lift)
        storage = gradients.total_VD.view(-1).view(hidden_MD.dtype)
        plan = head.plan(storage.numel()) if need[1] else None
        waiting = None if plan is None else Waiting(plan, head.rows, storage, head.workspace_CV)
        for chunk in head.chunks(waiting):
            head.losses(chunk, results, any(need))
            gradients.add_rows(chunk.dlogits_CV, chunk.start)
            if waiting is None:
                gradients.add_weight(chunk.dlogits_CV, chunk.hidden_CD, begun=chunk.start > 0)
            else:
                waiting.take(chunk.dlogits_CV, chunk.start)
        if plan is not None:
            for part in head.slices(plan, waiting, stats_2M):
                gradients.add_weight(part.dlogits_NW, part.hidden_ND, part.first)
        task_loss_K, task_correct_K = kernels.task_sums(results.loss_M, results.hit_M, tasks_M, scale_K.shape[0])
        loss = (scale_K * task_loss_K).sum()
        return LinearOutput(loss, task_loss_K, task_correct_K, stats_2M.sum(0), *gradients.rounded())

    def linear_rows_forward(
        self,
        problem: LinearProblem,
        spec: TokenLoss,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """1F over the capacity."""
        hidden_MD = problem.hidden_MD
        if hidden_MD.dtype == torch.float64:
            return portable.linear_rows_forward(problem, spec, chunk_size)
        head = Head(self._kernels(hidden_MD.device), self._products, problem, spec, chunk_size)
        results, stats_2M = _new_results(problem.targets_M)
        for chunk in head.chunks():
            head.losses(chunk, results, False)
        return results.loss_M, results.hit_M, stats_2M

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
        """1F to compute the logits again, 1F for each of dX and dW, over the capacity."""
        hidden_MD = problem.hidden_MD
        if hidden_MD.dtype == torch.float64:
            return portable.linear_rows_backward(
                problem, grad_M, stats_2M, grad_weight_out, need, spec, chunk_size, grad_hidden_dtype
            )
        grad_M = grad_M.to(torch.float32)
        lift = None
        if hidden_MD.dtype == torch.float16:
            # What arrives at a position that is not computed is never looked at, here neither.
            lift = lift_for(at_rows(grad_M, problem.rows_N), spec.scale)
        scale_M = (grad_M if lift is None else grad_M * lift.up).contiguous()
        kernels, stats_2M = self._kernels(hidden_MD.device), stats_2M.contiguous()
        head = Head(kernels, self._products, problem, spec, chunk_size, None, scale_M)
        dtypes = (grad_hidden_dtype, hidden_MD.dtype, hidden_MD.dtype)
        gradients = LinearGradients(kernels, self._products, problem, need, dtypes, lift, grad_weight_out)
        plan = head.plan(0) if need[1] else None
        if plan is not None:
            for part in head.slices(plan, None, stats_2M):
                gradients.add_slice(part.dlogits_NW, part.first)
                gradients.add_weight(part.dlogits_NW, part.hidden_ND, part.first)
            return gradients.rounded()
        for chunk in head.chunks():
            head.saved(chunk, stats_2M)
            gradients.add_rows(chunk.dlogits_CV, chunk.start)
            gradients.add_weight(chunk.dlogits_CV, chunk.hidden_CD, begun=chunk.start > 0)
        return gradients.rounded()

    def logits_rows_forward(
        self, logits_MV: Tensor, targets_M: Tensor, spec: TokenLoss, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One launch over all positions: the logits are read once and not changed."""
        if logits_MV.dtype == torch.float64:
            return portable.logits_rows_forward(logits_MV, targets_M, spec, chunk_size)
        results, stats_2M = _new_results(targets_M)
        where = ChunkRows(None, None, 0, targets_M, None, None)
        kernels = self._kernels(logits_MV.device)
        kernels.chunk_gradient(_rows_of_neighbours(logits_MV), None, None, where, spec, results)
        return results.loss_M, results.hit_M, stats_2M

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
        """One launch over all positions: the logits are read once more."""
        if logits_MV.dtype == torch.float64:
            portable.logits_rows_backward(grad_M, logits_MV, targets_M, stats_2M, spec, chunk_size, out_MV)
            return
        where = ChunkRows(None, None, 0, targets_M, None, grad_M.to(torch.float32).contiguous())
        logits_MV = _rows_of_neighbours(logits_MV)
        kernels = self._kernels(logits_MV.device)
        kernels.saved_gradient(logits_MV, out_MV, None, where, spec, stats_2M.contiguous())

    def scale_gradient(self, grad: Tensor, factor: Tensor, out: Tensor) -> None:
        """One pass, none in place where the factor is 1."""
        if torch.float64 in (grad.dtype, out.dtype):
            portable.scale_gradient(grad, factor, out)
        else:
            self._kernels(grad.device).scale_gradient(grad, factor.to(torch.float32), out)


def _new_results(targets_M: Tensor) -> tuple[RowResults, Tensor]:
    """Results, 0 where a position is not computed, and the statistics among them as ``[2, M]``."""
    stats_2M = targets_M.new_zeros((2, targets_M.shape[0]), dtype=torch.float32)
    loss_M = targets_M.new_zeros(targets_M.shape, dtype=torch.float32)
    return RowResults(loss_M, stats_2M[0], stats_2M[1], torch.zeros_like(targets_M)), stats_2M


def _rows_of_neighbours(logits_MV: Tensor) -> Tensor:
    """Any row stride is fine, any other column stride is a copy."""
    return logits_MV if logits_MV.stride(1) == 1 else logits_MV.contiguous()


# What the registry knows as "cuda" is this module.
BACKEND = CudaBackend(load, LibraryProducts())
prepare_targets = BACKEND.prepare_targets
task_scales = BACKEND.task_scales
task_sums = BACKEND.task_sums
linear_forward = BACKEND.linear_forward
linear_rows_forward = BACKEND.linear_rows_forward
linear_rows_backward = BACKEND.linear_rows_backward
logits_rows_forward = BACKEND.logits_rows_forward
logits_rows_backward = BACKEND.logits_rows_backward
scale_gradient = BACKEND.scale_gradient
