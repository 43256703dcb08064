"""Counted work is that of ``bench/baselines/work.json``; and the comparison notices more of everything."""

import copy
from typing import Any

import pytest
import torch

from bench import full_size, guard
from cotbal_kernels import portable, triton_backend
from cotbal_kernels.triton_kernels import head


@pytest.fixture(scope="module")
def work() -> dict[str, Any]:
    return guard.count_work()


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    return guard.read_baseline()


def test_no_work_was_added(work: dict[str, Any], baseline: dict[str, Any]) -> None:
    problems, hints = guard.compare(baseline, work)
    print("\n".join(hints))
    assert not problems, "\n".join(problems)


def test_products_are_those_of_the_algorithm(work: dict[str, Any]) -> None:
    """1 F for the loss, 1 for each gradient, 1 more to compute the logits again; ignored rows cost none."""
    expected = {"loss": 1, "train": 3, "frozen_head": 2, "frozen_trunk": 2, "recompute": 4, "none": 4}
    assert work["products"] == {name: {"100%": count, "12%": count} for name, count in expected.items()}


def test_nothing_waits_for_the_host(work: dict[str, Any]) -> None:
    assert work["synchronisations"] == dict.fromkeys(guard.STEPS, 0)


def test_workspace_is_bounded_by_the_chunk(work: dict[str, Any]) -> None:
    """Loss alone: one chunk of logits, the probabilities of a block of it (at most as large), and per-row results."""
    chunk = 4 * guard.CHUNK * guard.V
    assert chunk < work["workspace_bytes"]["loss"] < 2 * chunk + 4 * guard.CHUNK * guard.D + 100 * guard.M
    # dW and dX beside it, in float32; dW and dX twice where autograd copies them.
    gradients = 4 * (guard.V + guard.M) * guard.D
    assert work["workspace_bytes"]["train"] < work["workspace_bytes"]["loss"] + 2 * gradients
    assert work["workspace_bytes"]["train"] < 4 * guard.M * guard.V  # less than the logits alone


def test_triton_stays_within_its_bound_at_real_sizes(work: dict[str, Any]) -> None:
    """Beside inputs and gradients, everything together: 512 MiB, at N Vp b = 2.1 GB of logits and more."""
    for name, step in full_size.STEPS.items():
        if "chunk_size" not in step.options:
            assert work["full_size_bytes"][name] <= head.WORKSPACE_BYTES == 512 * 2**20, name
    assert work["full_size_bytes"]["loss"] < 192 * 2**20  # packed rows, and a quarter for statistics


def test_triton_computes_again_what_has_no_place(work: dict[str, Any]) -> None:
    """Of 8192 rows 5376 wait in dW's memory (4/3 of D = 4096, less what slices of whole tiles leave), 1152 more in the
    workspace; of a bound of 1966 all.
    """
    products = work["full_size_products"]
    assert products["train"] == round(4 - (5376 + 1152) / 8192, 4)
    assert products["train"] / 3 < 1.12  # the target beside three products
    assert products["train, few"] == products["train, 12%"] == products["train, 2816 rows of workspace"] == 3
    assert work["full_size_bytes"]["train, 2816 rows of workspace"] < 0.85 * 2**30
    assert products["recompute"] == 4
    assert products["frozen head"] == 2


def test_peak_is_of_what_lives_at_the_same_time() -> None:
    def step() -> torch.Tensor:
        first = torch.ones(1000, dtype=torch.float32)
        second = first + 1  # 8000 bytes
        del first
        third = second + 1  # and 8000 again: the first is gone
        return second + third  # 12000

    assert guard._peak_bytes(step) == 12000


def test_peak_of_a_step_is_the_same_every_time() -> None:
    """Gradients of the step before are not released within the next one."""
    step = guard._step((True, True), guard.SUPERVISED["100%"], "portable", {"aggregation": "none"})
    step()
    assert len({guard._peak_bytes(step) for _ in range(3)}) == 1


def more(table: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(table)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("products", "train", "12%"), 8.33, "products, train 12%: 3.0 -> 8.33"),
        (("workspace_bytes", "loss"), 10**9, "workspace_bytes, loss: "),
        (("launches", "train", "extra kernel"), 1, "launches, train extra kernel: nothing -> 1"),
        (("synchronisations", "train"), 1, "synchronisations, train: 0 -> 1"),
        (("sm_90", "row_losses", "registers"), 256, "sm_90, row_losses registers: "),
        (("sm_90", "row_losses", "spills"), 8, "sm_90, row_losses spills: 0 -> 8"),
        (("sm_90", "row_losses", "matrix_instructions"), "mma", "matrix_instructions: none -> mma"),
    ],
)
def test_more_work_is_named_with_the_way_out(
    baseline: dict[str, Any], path: tuple[str, ...], value: Any, message: str
) -> None:
    problems, _ = guard.compare(baseline, more(baseline, *path, value=value))
    assert len(problems) == 2
    assert message in problems[0]
    assert "python -m bench guard --update" in problems[1]


def test_less_work_passes_with_a_hint(baseline: dict[str, Any]) -> None:
    problems, hints = guard.compare(more(baseline, "products", "train", "100%", value=4.0), baseline)
    assert problems == []
    assert hints[0] == "less than the baseline: products, train 100%: 4.0 -> 3.0"


def test_another_compiler_leaves_out_what_it_decides(baseline: dict[str, Any]) -> None:
    other = more(more(baseline, "sm_90", "row_losses", "registers", value=255), "triton", value="0.0")
    problems, hints = guard.compare(baseline, other)
    assert problems == []
    assert "registers, instructions and shared memory not compared" in hints[0]


def test_a_product_added_in_the_backend_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard is for: here the logits are computed twice."""
    project = portable._project

    def twice(*args: Any) -> torch.Tensor:
        project(*args)
        return project(*args)

    monkeypatch.setattr(portable, "_project", twice)
    assert guard.count_products()["train"] == {"100%": 4.0, "12%": 4.0}


def test_a_synchronisation_in_the_backend_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = triton_backend.task_sums

    def reading(*args: Any) -> Any:
        args[0].sum().item()
        args[1].nonzero()
        return sums(*args)

    monkeypatch.setattr(triton_backend, "task_sums", reading)
    beside = full_size.Operators()
    full_size.run(full_size.Step(40, 80, 64), beside)
    assert beside.synchronising == 2
