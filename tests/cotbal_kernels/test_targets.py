"""What every backend makes of labels, task ids and lambda: the rows to compute, and the scales of tasks."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cuda_on_cpu import SHUFFLED, WideningProducts, cpu_backend, find_compiler, schedule
from cuda_on_cpu.as_ptx import ptx_kernels
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotbal_kernels import portable
from cotbal_kernels.cuda_backend import CudaBackend
from cotbal_kernels.cuda_kernels.build import find_nvcc
from cotbal_kernels.interface import Backend


class Tried(NamedTuple):
    backend: Backend
    most: int  # positions: several blocks of the kernel


@pytest.fixture(scope="module", params=["portable", "triton", "csrc", "csrc as PTX"])
def tried(request: pytest.FixtureRequest) -> Tried:
    """Triton's kernels in its interpreter, in blocks of 32; those of csrc/ take 4096 positions at a time."""
    if request.param == "portable":
        return Tried(portable, 100)
    if request.param == "triton":
        pytest.importorskip("triton")
        from triton_on_cpu import INTERPRETED

        return Tried(INTERPRETED, 100)  # type: ignore[arg-type]
    if find_compiler() is None:
        pytest.skip("no C++ compiler: CXX, g++, c++")
    if request.param == "csrc":
        return Tried(cpu_backend(), 9000)
    if find_nvcc() is None:
        pytest.skip("no nvcc: CUDA_HOME, PATH, /usr/local/cuda")
    return Tried(CudaBackend(lambda device: ptx_kernels("90a"), WideningProducts()), 9000)


@settings(max_examples=15, deadline=None)
@given(
    share=st.floats(0, 1),
    run=st.sampled_from([1, 50]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    zeros=st.integers(0, 2),
    skip_zero=st.booleans(),
    bound=st.sampled_from([None, 0.0, 0.07, 0.6]),
    wrong=st.sampled_from([None, "label", "task", "weight"]),
    seed=st.integers(0, 1000),
)
def test_prepare_targets_is_numpy(
    tried: Tried,
    share: float,
    run: int,
    ignored: float,
    zeros: int,
    skip_zero: bool,
    bound: float | None,
    wrong: str | None,
    seed: int,
) -> None:
    """Stable order of the packed rows, counts, what fills the rest, and the poison; tasks in runs of positions."""
    rng = np.random.default_rng(seed)
    size = round(share * tried.most)
    labels = rng.integers(0, 20, size)
    labels[rng.random(size) < ignored] = -1
    tasks = rng.integers(0, 3, size)[np.arange(size) // run]
    weights = rng.random(3).astype(np.float32)
    weights[:zeros] = 0
    capacity = size if bound is None else round(bound * size)
    valid_tasks = tasks.copy()
    if wrong == "weight":
        weights[0] = rng.choice([np.inf, np.nan, -0.5])
    elif wrong is not None and size:
        at = rng.integers(0, size)
        (labels if wrong == "label" else tasks)[at] = rng.choice([20, -3]) if wrong == "label" else rng.choice([3, -2])
        labels[at] = labels[at] if wrong == "label" else 0
        valid_tasks = tasks.clip(0, 2)
    inputs = (torch.from_numpy(array.copy()) for array in (labels, tasks, weights))
    if tried.backend is portable and (wrong == "weight" or (wrong is not None and size)):
        with pytest.raises(
            ValueError, match=rf"{ {'label': 'labels', 'task': 'task_ids'}.get(wrong, 'task_weights') }"
        ):
            portable.prepare_targets(*inputs, 20, -1, skip_zero, False, capacity)
        return
    supervised = labels != -1
    computed = supervised & (weights[valid_tasks] != 0) if skip_zero else supervised
    rows = np.flatnonzero(computed)
    if tried.backend is portable and len(rows) > capacity:
        with pytest.raises(ValueError, match="max_tokens"):
            portable.prepare_targets(*inputs, 20, -1, skip_zero, False, capacity)
        return
    found = tried.backend.prepare_targets(*inputs, 20, -1, skip_zero, False, capacity)
    assert found.num_rows.tolist() == [len(rows)]
    assert found.rows_N.tolist() == [*rows[:capacity], *[size] * (capacity - len(rows[:capacity]))]
    assert found.targets_M.tolist() == np.where(computed, labels.clip(0, 19), -1).tolist()
    assert found.tasks_M.tolist() == valid_tasks.tolist()
    assert found.tokens_K.tolist() == np.bincount(valid_tasks[supervised], minlength=3).tolist()
    bad = len(rows) > capacity or wrong == "weight" or (wrong is not None and size > 0)
    assert bool(found.poison.isnan()) == bool(bad)
    assert bad or float(found.poison) == 0


@pytest.mark.parametrize("kind", ["host", "PTX"])
def test_threads_may_come_in_any_order(kind: str) -> None:
    """Three turns of the block, whose counts are in two memories by turns; more tasks than a block has threads."""
    if find_compiler() is None or (kind == "PTX" and find_nvcc() is None):
        pytest.skip("no compiler")
    rng = np.random.default_rng(0)
    labels, tasks = rng.integers(-1, 20, 8200), rng.integers(0, 1100, 8200)
    inputs = (*map(torch.from_numpy, (labels, tasks)), torch.ones(1100))
    for order in (1, 2) if kind == "host" else (None,):  # any other order shows as a race
        if order is None:
            found = ptx_kernels("90a").compact(*inputs, 20, -1, True, 8200)
        else:
            with schedule(SHUFFLED, order):
                found = cpu_backend().prepare_targets(*inputs, 20, -1, True, False, 8200)
        rows = np.flatnonzero(labels != -1)
        assert found.rows_N.tolist() == [*rows, *[8200] * (8200 - len(rows))]
        assert found.tokens_K.tolist() == np.bincount(tasks[rows], minlength=1100).tolist()
        assert float(found.poison) == 0


@settings(max_examples=20, deadline=None)
@given(
    num_tasks=st.sampled_from([1, 3, 300]),  # blocks of 256
    per_task=st.booleans(),
    own=st.booleans(),
    bad=st.sampled_from([None, "poison", -1.0, math.inf, math.nan]),
    seed=st.integers(0, 1000),
)
@example(num_tasks=3, per_task=False, own=False, bad="poison", seed=0)
@example(num_tasks=1, per_task=True, own=True, bad="poison", seed=2)  # no task at all: 0, but for the poison
def test_scales_of_tasks_are_numpy(
    tried: Tried, num_tasks: int, per_task: bool, own: bool, bad: Any, seed: int
) -> None:
    """Absent tasks and a normalizer of 0 among them; what is out of range is NaN, in its own task if it is per task."""
    rng = np.random.default_rng(seed)
    weights, tokens = rng.random(num_tasks).astype(np.float32), rng.integers(0, 4, num_tasks)
    given = rng.integers(0, 3, num_tasks if per_task else ()).astype(np.float32)
    if own:
        total = (weights.astype(np.float64) * (tokens > 0 if per_task else tokens)).sum()
        denominator = total * tokens if per_task else np.full(num_tasks, total)
    else:
        if isinstance(bad, float):
            np.atleast_1d(given)[...] = np.where(np.arange(given.size) == 0, bad, given)
        denominator = np.broadcast_to(given.astype(np.float64), num_tasks)
        denominator = np.where((denominator >= 0) & np.isfinite(denominator), denominator, math.nan)
    expected = np.divide(weights, denominator, out=np.zeros(num_tasks), where=denominator != 0)
    if bad == "poison":
        expected = np.where(denominator != 0, math.nan, 0) if not own else np.full(num_tasks, math.nan)
    poison = torch.tensor(math.nan if bad == "poison" else 0.0)
    arguments = (torch.from_numpy(weights), torch.from_numpy(tokens), poison)
    arguments += (None if own else torch.from_numpy(given), per_task)
    scale_K, denominator_K = tried.backend.task_scales(*arguments)
    np.testing.assert_allclose(scale_K.numpy(), expected, rtol=1e-6)
    if bad != "poison" or not own:
        np.testing.assert_allclose(denominator_K.numpy(), denominator, rtol=1e-6)
