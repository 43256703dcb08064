"""Counted work, compared with ``bench/baselines/work.json``: a change that adds work fails without a GPU.

Counted, not timed, so any machine gives the same numbers:

- matrix products of the portable backend, in units of F = 2 N V D flop over the N supervised rows;
- host synchronisations of the Triton backend between its launches (0 is what CUDA graphs need);
- peak bytes of tensors that either backend allocates beyond what it returns;
- the same at the sizes of real models, for the Triton backend, and its matrix products there;
- operators of PyTorch beside the launches of such a step, each of which is a small launch of its own;
- Triton launches of each step, and registers, spills and shared memory of every kernel, compiled for sm_90.

    python -m bench guard            # compare
    python -m bench guard --update   # a deliberate change: commit the new baseline with the reason for it
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
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
TRITON_STEPS: dict[str, dict[str, Any]] = {"train": {}, "recompute": {"recompute": True}}
# Whatever makes the host wait for a value of the device.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")


class _Synchronisations(TorchDispatchMode):
    """Counts the operators that read a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Counted:
    """A backend whose functions run under a counter. The counters see nothing of custom operators from outside."""

    def __init__(self, backend: Any, counter: Callable[[], Any]) -> None:
        self._backend, self._counter = backend, counter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)
        if name == "prepare_targets":  # PyTorch on a CPU, where it checks values; on a GPU one launch
            return function

        def counted(*args: Any) -> Any:
            with self._counter():
                return function(*args)

        return counted


@contextmanager
def _registered(backend: Any, counter: Callable[[], Any]) -> Iterator[str]:
    backends.register_backend("counted", _Counted(backend, counter))
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

            with _registered(portable, counting) as backend:
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
    peak = _Peak()
    with peak:
        result = step()
    del result
    return peak.bytes


class _Peak:
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


def count_launches() -> dict[str, dict[str, Any]]:
    """One training step of the Triton backend on sm_90: launches of each kernel, host synchronisations between them,
    and peak bytes of what its forward or its backward pass allocates, results included."""
    from cotbal_kernels import triton_backend

    launches: dict[str, dict[str, int]] = {}
    synchronisations: dict[str, int] = {}
    allocated: dict[str, int] = {}
    record = ahead_of_time.recorded
    for name, options in TRITON_STEPS.items():
        kept: list[list[ahead_of_time.Launch]] = []
        counter, peak = _Synchronisations(), _Peak()

        @contextmanager
        def both(counter: _Synchronisations = counter, peak: _Peak = peak) -> Iterator[None]:
            with peak, counter:
                yield

        @contextmanager
        def keeping(kept: list[list[ahead_of_time.Launch]] = kept) -> Iterator[list[ahead_of_time.Launch]]:
            with record() as found:
                kept.append(found)
                yield found

        register = backends.register_backend

        def counted(
            name: str,
            backend: Any,
            both: Callable[[], Any] = both,
            register: Callable[[str, Any], None] = register,
        ) -> None:
            register(name, _Counted(backend, both) if backend is triton_backend else backend)

        with (
            mock.patch.object(ahead_of_time, "recorded", keeping),
            mock.patch.object(backends, "register_backend", counted),
        ):
            ahead_of_time.training_launches(CAPABILITY, torch.bfloat16, [options])
        launches[name] = dict(sorted(Counter(launch.name for launch in kept[0]).items()))
        synchronisations[name] = sum(counter.found.values())
        allocated[name] = peak.bytes
    return {"launches": launches, "synchronisations": synchronisations, "triton_bytes": allocated}


def count_full_size() -> dict[str, dict[str, Any]]:
    """Steps of the Triton backend at real sizes: peak bytes beside inputs and gradients, and products of F."""
    extra: dict[str, int] = {}
    products: dict[str, float] = {}
    for name, step in full_size.STEPS.items():
        peak = _Peak()
        launches = full_size.run(step, lambda peak=peak: peak)  # type: ignore[misc]
        extra[name] = peak.bytes - full_size.gradient_bytes(step)
        products[name] = round(full_size.products(step, launches), 4)
    return {"full_size_bytes": extra, "full_size_products": products}


def count_operators() -> dict[str, int]:
    """Operators of PyTorch in a step of the Triton backend that write memory."""
    counts = {}
    for name, (need, options) in STEPS.items():
        operators = full_size.Operators()
        full_size.run(full_size.Step(M, V, D, need, options), lambda operators=operators: operators)  # type: ignore[misc]
        counts[name] = operators.count
    return counts


def count_resources(workers: int = 2) -> dict[str, dict[str, Any]]:
    """Registers per thread, spilled bytes and shared bytes of every kernel of a plain step, on sm_90."""
    number = len(ahead_of_time.training_launches(CAPABILITY, torch.bfloat16, ahead_of_time.PLAIN))
    # Not forked: threads of torch would leave locks behind that nobody opens.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        compiled = list(pool.map(_compile, range(number)))
    resources: dict[str, dict[str, Any]] = {}
    for name, used in sorted(compiled, key=lambda item: (item[0], sorted(item[1].items(), key=str))):
        unique = name if name not in resources else f"{name} #{sum(key.startswith(name) for key in resources) + 1}"
        resources[unique] = used
    return resources


def _compile(index: int) -> tuple[str, dict[str, Any]]:
    launch = ahead_of_time.training_launches(CAPABILITY, torch.bfloat16, ahead_of_time.PLAIN)[index]
    used = ahead_of_time.compile_launch(launch, CAPABILITY)
    return launch.name, {
        "registers": used.registers,
        "spills": used.spills,
        "shared": used.shared,
        "matrix_instructions": used.matrix_instructions,
    }


def count_work() -> dict[str, Any]:
    """Everything that the baseline holds. Takes about half a minute, nearly all of it compiling for sm_90."""
    import triton

    return {
        "products": count_products(),
        "workspace_bytes": count_workspace(),
        **count_launches(),
        **count_full_size(),
        "operators": count_operators(),
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

    Registers and shared memory depend on the compiler: with another triton than the baseline's they are left out.
    """
    problems: list[str] = []
    hints: list[str] = []
    sections = ["products", "workspace_bytes", "triton_bytes", "launches", "synchronisations"]
    sections += ["full_size_bytes", "full_size_products", "operators"]
    if baseline["triton"] == found["triton"]:
        sections.append(f"sm_{CAPABILITY}")
    else:
        hints.append(
            f"registers and shared memory not compared: the baseline is from triton {baseline['triton']}, "
            f"this is {found['triton']}"
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
