from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from convergence_reference import TOLERANCE, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted
from ptx_on_cpu import compute_capability

from cotbal_kernels import ConvergenceBalancer
from cotbal_kernels.convergence import VARIANTS
from cotbal_kernels.triton_kernels.ahead_of_time import CAPABILITIES, Launch, compile_launch, recorded
from cotbal_kernels.triton_kernels.convergence import ConvergenceKernel, convergence_step_kernel

Run = Callable[[], AbstractContextManager[None]]
# In Triton's interpreter, and compiled for a GPU.
RUNS: list[Run] = [interpreted, partial(compute_capability, 100), partial(compute_capability, 80)]
everywhere = pytest.mark.parametrize("run", RUNS, ids=["interpreter", "sm_100", "sm_80"])


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(num_tasks: int, **arguments: Any) -> tuple[ConvergenceBalancer, ConvergenceBalancer]:
    with interpreted():
        kernel = ConvergenceBalancer(num_tasks, **arguments, device="cpu", backend="triton")
    return kernel, ConvergenceBalancer(num_tasks, **arguments, device="cpu")


def assert_same_state(kernel: ConvergenceBalancer, portable: ConvergenceBalancer) -> None:
    expected = portable.state_dict()
    for name, value in kernel.state_dict().items():
        if name == "settings":
            continue
        if value.is_floating_point() and name not in ("initial", "ratios"):
            torch.testing.assert_close(value, expected[name], rtol=5e-7, atol=1e-12 if name != "weights" else 5e-7)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    seed=st.integers(0, 2**32 - 1),
    tasks=st.integers(1, 9),
    window=st.integers(2, 9),
    warmup=st.integers(0, 9),
    history=st.sampled_from([1, 5, 1000]),
    absent=st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=6, deadline=None)
@pytest.mark.filterwarnings("ignore:Eq. 7")
def test_kernel_equals_portable(
    variant: str, seed: int, tasks: int, window: int, warmup: int, history: int, absent: float
) -> None:
    kernel, portable = both(tasks, window=window, warmup=warmup, variant=variant, history=history)
    losses, present = sequence(seed, steps=14, tasks=tasks, held=0.3, absent=absent)
    for row, here in zip(losses, present, strict=True):
        given_present = None if here.all() else here
        with interpreted():
            weights = kernel.step(row, given_present)
        torch.testing.assert_close(weights, portable.step(row, given_present), **TOLERANCE)
    assert_same_state(kernel, portable)


@everywhere
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tasks", "window", "history"), [(5, 1500, 4100), (2, 1024, 2048), (129, 3, 7)])
def test_more_than_one_block(run: Run, variant: str, tasks: int, window: int, history: int) -> None:
    """Full rings of several blocks with a ragged last one, taken over from the state of a run begun elsewhere."""
    kernel, portable = both(tasks, window=window, warmup=2, variant=variant, history=history)
    generator = torch.Generator().manual_seed(0)
    state = portable.state_dict()
    rows = state["counts"].shape[0]
    start = 2 * window + history
    state["step"].fill_(start)
    state["counts"] += 2 * window + torch.randint(0, window, (rows,), generator=generator)
    newest = (state["counts"] - 1) % window
    # Slot s holds the step of its presence: the newest is the step before, every other one a step earlier.
    state["ratio_steps"] += start - 1 - (newest.unsqueeze(1) - torch.arange(window)) % window
    state["initial"] += 2.0
    for name in ("ratios", "slope_ring", "slopes", "peaks"):
        state[name] += torch.rand(state[name].shape, generator=generator) + 0.1
    for balancer in (kernel, portable):
        balancer.load_state_dict(state)
    for _ in range(2):
        losses = torch.rand(tasks, generator=generator)
        with run():
            weights = kernel.step(losses)
        torch.testing.assert_close(weights, portable.step(losses), **TOLERANCE)
        assert weights.std() > 0.01  # the comparison sees more than uniform weights
    assert_same_state(kernel, portable)


@everywhere
@pytest.mark.parametrize(
    ("variant", "dtype"), [("absolute", torch.float16), ("mftcoder", torch.bfloat16), ("absolute", torch.float64)]
)
def test_losses_of_any_dtype_and_stride(run: Run, variant: str, dtype: torch.dtype) -> None:
    kernel, portable = both(3, window=4, warmup=1, variant=variant)
    losses, present = sequence(seed=7, steps=8, tasks=6, held=0.2, absent=0.2)
    losses[2, 0], losses[3, 2], losses[0, 4] = float("nan"), 0.0, 0.0
    for row, here in zip(losses.to(dtype), present, strict=True):
        with run():
            weights = kernel.step(row[::2], here[::2])
        torch.testing.assert_close(weights, portable.step(row[::2], here[::2]), **TOLERANCE)


@everywhere
def test_a_task_without_a_slope_is_left_out_of_the_largest(run: Run) -> None:
    kernel, _ = both(3, window=4, warmup=0)
    for t in range(3):
        with run():
            kernel.step(torch.tensor([1.0 / (t + 1), 2.0, 1.0]), torch.tensor([True, t == 0, False]))
    assert kernel.state_dict()["peaks"][1] == kernel.slopes[0] < 0


@everywhere
def test_kernel_leaves_its_counter_ready_and_its_result_alone(run: Run) -> None:
    kernel, _ = both(3, window=4, warmup=0)
    losses, _ = sequence(seed=8, steps=4, tasks=3, held=0.0, absent=0.0)
    with run():
        returned = [kernel.step(row) for row in losses]
    copies = [weights.clone() for weights in returned]
    with run():
        kernel.step(losses[0])
    assert all(torch.equal(a, b) for a, b in zip(returned, copies, strict=True))
    assert isinstance(kernel._triton, ConvergenceKernel)
    assert int(kernel._triton.arrivals) == 0


def launch_on_a_gpu(tasks: int, window: int, variant: str) -> Launch:
    with interpreted():
        kernel = ConvergenceBalancer(tasks, window=window, warmup=4, variant=variant, device="meta", backend="triton")
    with recorded() as launches:
        kernel.step(torch.ones(tasks, device="meta"), torch.ones(tasks, dtype=torch.bool, device="meta"))
    return launches[0]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("variant", "tasks", "window"), [("absolute", 8, 50), ("printed", 1024, 10_000), ("mftcoder", 1024, 10_000)]
)
def test_compiles_without_spills(capability: int, variant: str, tasks: int, window: int) -> None:
    resources = compile_launch(launch_on_a_gpu(tasks, window, variant), capability)
    assert resources.spills == 0
    assert resources.stack == 0


def test_one_task_compiles_like_any_other_number() -> None:
    """An argument of 1 would be a constant, which the kernel does not compile with: no number is one."""
    general = {parameter.name for parameter in convergence_step_kernel.params if parameter.do_not_specialize}
    assert general == set(launch_on_a_gpu(1, 50, "absolute").integers)
