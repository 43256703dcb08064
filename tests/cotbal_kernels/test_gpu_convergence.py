"""CoBa's balancer on a GPU: values, no host waits, CUDA graphs. Needs nothing that a GPU machine may lack."""

import pytest
import torch
from convergence_reference import TOLERANCE, sequence
from gpu_case import needs_gpu

from cotbal_kernels import ConvergenceBalancer
from cotbal_kernels.convergence import VARIANTS


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tasks", [1, 5])
def test_on_a_gpu_and_in_a_graph(tasks: int, variant: str) -> None:
    losses, present = sequence(seed=9, steps=40, tasks=tasks, held=0.2, absent=0.2)
    reference = ConvergenceBalancer(tasks, window=8, warmup=3, variant=variant, device="cpu")
    expected = [reference.step(row, here) for row, here in zip(losses, present, strict=True)]
    for backend in ("triton", "portable"):
        balancer = ConvergenceBalancer(tasks, window=8, warmup=3, variant=variant, device="cuda", backend=backend)
        row, here = losses[0].cuda(), present[0].cuda()
        balancer.step(row, here)  # compiles the kernel
        torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.step(row, here)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        fresh = ConvergenceBalancer(tasks, window=8, warmup=3, variant=variant, device="cuda", backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weights = fresh.step(row, here)
        for t in range(40):
            row.copy_(losses[t])
            here.copy_(present[t])
            graph.replay()
            torch.testing.assert_close(weights.cpu(), expected[t], **TOLERANCE)
            assert torch.equal(weights, fresh.weights)
