"""Counted work, compared with ``bench/baselines/work.json``: a change that adds work fails without a GPU.

Counted, not timed, so any machine gives the same numbers:

- matrix products of the portable backend, in units of F = 2 N V D flop over the N supervised rows, and peak bytes of
  tensors that a step of it allocates;
- both for the Triton backend at the sizes of real models, bytes beside inputs and gradients;
- launches of its steps, operators of PyTorch beside them, each of which is a small launch of its own, and host
  synchronisations between them (0 is what CUDA graphs need);
- registers, instructions, spills and shared memory of every kernel, compiled for sm_90.

    python -m bench guard            # compare
    python -m bench guard --update   # a deliberate change: commit the new baseline with the reason for it
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import full_size
from cotbal_kernels import backends, linear_task_cross_entropy, portable
from cotbal_kernels.triton_kernels import ahead_of_time

BASELINE = Path(__file__).parent / "baselines" / "work.json"
CAPABILITY = 90
# Several chunks of rows and several blocks of the weight, none of them full.
M, D, V, CHUNK = 300, 80, 3000, 64
SUPERVISED = {"100%": 300, "12%": 36}
# gradients wanted of (hidden, weight), and options of the loss
STEPS: dict[str, tuple[tuple[bool, bool], dict[str, Any]]] = {
    "loss": ((False, False), {}),
    "train": ((True, True), {}),
    "frozen_head": ((True, False), {}),
    "frozen_trunk": ((False, True), {}),
    "recompute": ((True, True), {"recompute": True}),
    "none": ((True, True), {"aggregation": "none"}),
}


class _Counted:
    """The portable backend, its functions under a counter, which sees nothing of custom operators from outside."""

    def __init__(self, counter: Callable[[], Any]) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        function = getattr(portable, name)

        def counted(*args: Any) -> Any:
            with self._counter():
                return function(*args)

        return counted


@contextmanager
def _registered(counter: Callable[[], Any]) -> Iterator[str]:
    backends.register_backend("counted", _Counted(counter))
    try:
        yield "counted"
    finally:
        del backends.BACKENDS["counted"]


def _step(need: tuple[bool, bool], rows: int, backend: str, options: dict[str, Any]) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(M, D, generator=generator).requires_grad_(need[0])
    weight_VD = torch.randn(V, D, generator=generator).mul_(D**-0.5).requires_grad_(need[1])
    labels_M = torch.randint(0, V, (M,), generator=generator)
    labels_M[torch.randperm(M, generator=generator)[rows:]] = -100
    task_ids_M, task_weights_K = torch.arange(M) % 3, torch.tensor([0.5, 1.0, 1.5])

    def step() -> Tensor:
        out = linear_task_cross_entropy(
            hidden_MD, weight_VD, labels_M, task_ids_M, task_weights_K, backend=backend, chunk_size=CHUNK, **options
        )
        if any(need):
            out.loss.sum().backward()
        # Here and not before the next step, which would release what was allocated outside its profile.
        hidden_MD.grad = weight_VD.grad = None
        return out.loss

    return step


def count_products() -> dict[str, dict[str, float]]:
    """Products of F per step and share of supervised rows."""
    counts: dict[str, dict[str, float]] = {}
    for name, (need, options) in STEPS.items():
        counts[name] = {}
        for share, rows in SUPERVISED.items():
            # In place it is the same product, but torch does not count it.
            counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _flop_in_place})
            total = 0

            @contextmanager
            def counting(counter: FlopCounterMode = counter) -> Iterator[None]:
                nonlocal total
                with counter:
                    yield
                total += counter.get_total_flops()

            with _registered(counting) as backend:
                _step(need, rows, backend, options)()
            counts[name][share] = round(total / (2 * rows * V * D), 6)
    return counts


def _flop_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def count_workspace() -> dict[str, int]:
    """Peak bytes that a step of the portable backend has beyond its inputs, outputs included."""
    peaks = {}
    for name, (need, options) in STEPS.items():
        step = _step(need, SUPERVISED["100%"], "portable", options)
        step()
        peaks[name] = _peak_bytes(step)
    return peaks


def _peak_bytes(step: Callable[[], Any]) -> int:
    peak = Peak()
    with peak:
        result = step()
    del result
    return peak.bytes


class Peak:
    """Highest sum of the allocations and releases that the profiler sees within a ``with`` block; of several, the
    highest."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> None:
        gc.collect()  # what earlier steps left in cycles would be released within the block
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        now = 0
        profiler: Any = self._profile.profiler  # its types do not know the events of memory
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


def count_full_size() -> dict[str, dict[str, Any]]:
    """Steps of the Triton backend at real sizes: peak bytes beside inputs and gradients, and products of F."""
    extra: dict[str, int] = {}
    products: dict[str, float] = {}
    for name, step in full_size.STEPS.items():
        peak = Peak()
        launches = full_size.run(step, peak)
        extra[name] = peak.bytes - full_size.gradient_bytes(step)
        products[name] = round(full_size.products(step, launches), 4)
    return {"full_size_bytes": extra, "full_size_products": products}


def count_launches() -> dict[str, dict[str, Any]]:
    """Steps of the Triton backend: launches of each kernel, operators of PyTorch that write memory beside them, and
    host synchronisations."""
    launches: dict[str, dict[str, int]] = {}
    operators: dict[str, int] = {}
    synchronisations: dict[str, int] = {}
    for name, (need, options) in STEPS.items():
        beside = full_size.Operators()
        made = full_size.run(full_size.Step(M, V, D, need, options), beside)
        launches[name] = dict(Counter(launch.name for launch in made))
        operators[name], synchronisations[name] = beside.writing, beside.synchronising
    return {"launches": launches, "operators": operators, "synchronisations": synchronisations}


def count_resources() -> dict[str, dict[str, Any]]:
    """Registers per thread, instructions, spilled bytes and shared bytes of every kernel of a plain step, on sm_90."""
    resources: dict[str, dict[str, Any]] = {}
    for _, name, used in ahead_of_time.resource_table([CAPABILITY], torch.bfloat16, features=False):
        unique = name if name not in resources else f"{name} #{sum(key.startswith(name) for key in resources) + 1}"
        resources[unique] = {
            "registers": used.registers,
            "instructions": used.instructions,
            "spills": used.spills,
            "shared": used.shared,
            "matrix_instructions": used.matrix_instructions,
        }
    return resources


def count_work() -> dict[str, Any]:
    """Everything that the baseline holds. Takes about half a minute, nearly all of it compiling for sm_90."""
    import triton

    return {
        "products": count_products(),
        "workspace_bytes": count_workspace(),
        **count_launches(),
        **count_full_size(),
        "triton": triton.__version__,
        f"sm_{CAPABILITY}": count_resources(),
    }


def read_baseline() -> dict[str, Any]:
    if not BASELINE.exists():
        raise ValueError(f"{BASELINE} does not exist; `python -m bench guard --update` writes it")
    return dict(json.loads(BASELINE.read_text(encoding="utf-8")))


def update() -> Path:
    """Write the counted work as the new baseline."""
    BASELINE.parent.mkdir(exist_ok=True)
    BASELINE.write_text(json.dumps(count_work(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return BASELINE


def compare(baseline: dict[str, Any], found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What got worse, and what got better and could be kept by an update.

    Registers, instructions and shared memory depend on the compiler: with another triton than the baseline's they are
    left out.
    """
    problems: list[str] = []
    hints: list[str] = []
    sections = ["products", "workspace_bytes", "full_size_bytes", "full_size_products"]
    sections += ["launches", "operators", "synchronisations"]
    if baseline["triton"] == found["triton"]:
        sections.append(f"sm_{CAPABILITY}")
    else:
        hints.append(
            "registers, instructions and shared memory not compared: the baseline is from triton "
            f"{baseline['triton']}, this is {found['triton']}"
        )
    for section in sections:
        before, after = dict(_leaves(baseline.get(section, {}))), dict(_leaves(found[section]))
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key), after.get(key)
            if old == new:
                continue
            line = (
                f"{section}, {key}: {old if old is not None else 'nothing'} -> {new if new is not None else 'nothing'}"
            )
            if _worse(old, new):
                problems.append(line)
            else:
                hints.append(f"less than the baseline: {line}")
    if problems:
        problems.append(
            "More work than bench/baselines/work.json. If that is meant, run `python -m bench guard --update` and "
            "commit the file with the reason."
        )
    if any(hint.startswith("less") for hint in hints):
        hints.append("`python -m bench guard --update` keeps it.")
    return problems, hints


def _leaves(table: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(table, dict):
        yield prefix, table
        return
    for key, value in table.items():
        yield from _leaves(value, f"{prefix}{' ' if prefix else ''}{key}")


def _worse(old: Any, new: Any) -> bool:
    """More of anything is worse, and so is something new; other matrix instructions may be anything."""
    if new is None:
        return False
    if old is None:
        return new != 0
    if isinstance(new, str):
        return True
    return bool(new > old)
