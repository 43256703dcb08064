"""Compiles the kernels for GPUs that are not there, and says what they would need.

    python -m cotbal_kernels.triton_kernels.ahead_of_time --capability 80 90 100

prints registers, spills and shared memory of every kernel that a training step launches, with the tiles that the
backend would choose on such a device. Nothing runs: the backend is called with launches recorded instead of
executed, so what is compiled is what would be launched.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, sass

CAPABILITIES = (80, 89, 90, 100)  # A100, RTX 4090 / L40, H100 / H200, B200
_POINTERS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}
SHOWN = (
    "WRITE",
    "HAS_BIAS",
    "HAS_SCALE",
    "HAS_SOFTCAP",
    "HAS_SMOOTHING",
    "PACKED",
    "ACCUMULATE",
    "USE_TMA",
    "IN_PLACE",
)
SHOWN_RESOURCES = (
    "registers",
    "instructions",
    "spills",
    "loop_spills",
    "narrow_stores",
    "shared",
    "matrix_instructions",
)


@dataclass(frozen=True)
class Launch:
    """One launch as the compiler sees it."""

    kernel: JITFunction
    signature: Mapping[str, str]  # type of every run-time argument
    constexprs: Mapping[str, Any]
    aligned: frozenset[str]  # arguments that are multiples of 16
    options: Mapping[str, int]
    integers: Mapping[str, int] = field(default_factory=dict)  # run-time arguments

    @property
    def name(self) -> str:
        shown = {"WRITE": ("", "exp", "packed", "gradient")}
        features = []
        for key in SHOWN:
            value = self.constexprs.get(key)
            if value:
                features.append(shown["WRITE"][value] if key == "WRITE" else _plain(key))
        name = self.kernel.__name__.removesuffix("_kernel")
        return f"{name} [{', '.join(features)}]" if features else name

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.kernel.__name__,
            tuple(sorted(self.signature.items())),
            tuple(sorted((name, repr(value)) for name, value in self.constexprs.items())),
            tuple(sorted(self.options.items())),
        )


@dataclass(frozen=True)
class Resources:
    """What one program (CTA) of a compiled kernel takes."""

    registers: int  # per thread
    spills: int  # bytes per thread that are stored to and loaded from local memory because registers ran out
    main_loops: int  # innermost loops with matrix instructions, or without any with most multiply-adds
    loop_spills: int  # of the spilled bytes those in main loops
    instructions: int  # of the whole kernel, loops once
    narrow_stores: int  # instructions that store one or two bytes of global memory; one is a single value
    stack: int  # bytes per thread of local memory, spills included
    shared: int  # bytes of shared memory per program
    matrix_instructions: str  # wgmma, tcgen05, mma or none


def _plain(key: str) -> str:
    return key.removeprefix("HAS_").removeprefix("USE_").replace("_", " ").lower()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record every Triton launch inside the ``with`` block instead of executing it."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


@contextmanager
def backend_on(limits: configs.DeviceLimits) -> Iterator[str]:
    """The name of a backend that launches what the Triton backend launches on a GPU with these limits.

    Its targets are those of the portable backend, since they decide shapes where launches are only recorded.
    """
    from .. import backends, portable, triton_backend

    def prepare_targets(*args: Any) -> Any:
        triton_backend.prepare_targets(*args)
        return portable.prepare_targets(*args)

    backend: Any = SimpleNamespace(**{**vars(triton_backend), "prepare_targets": prepare_targets})
    backends.register_backend("recorded", backend)
    try:
        with mock.patch.object(configs, "limits_of", return_value=limits):
            yield "recorded"
    finally:
        del backends.BACKENDS["recorded"]


def _describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Launch:
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    static = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    integers: dict[str, int] = {}
    aligned = set()
    for name, value in values.items():
        if name in static or value is None:
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _POINTERS[value.dtype]
            aligned.add(name)
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype]}[{block}]>"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            integers[name] = value
            if value % 16 == 0 and name not in general:
                aligned.add(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constexprs, frozenset(aligned), options, integers)


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile down to machine code for sm_``capability``; a kernel that does not compile raises."""
    names = launch.kernel.arg_names
    types = {name: launch.signature.get(name, "constexpr") for name in names}
    unknown = (launch.signature.keys() | launch.constexprs.keys()) - types.keys()
    missing = {name for name, kind in types.items() if kind == "constexpr"} - launch.constexprs.keys()
    if unknown or missing:
        raise ValueError(f"arguments of {launch.name}: unknown {sorted(unknown)}, without a value {sorted(missing)}")
    compiled = triton.compile(
        ASTSource(
            fn=launch.kernel,
            signature=types,
            constexprs=dict(launch.constexprs),
            attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in launch.aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(launch.options),
    )
    ptx = compiled.asm["ptx"]
    found = (name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx)
    return Resources(
        **sass.used_by(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        matrix_instructions=next(found, "none"),
    )


def training_launches(capability: int, dtype: torch.dtype, variants: list[dict[str, Any]]) -> list[Launch]:
    """Every distinct launch of training steps on a device of this capability, as the backend would make them.

    Each of ``variants`` holds keyword arguments of ``linear_task_cross_entropy``; a ``bias`` of True stands for one,
    and with ``logits`` of True they are those of ``task_cross_entropy``.
    """
    from .. import linear_task_cross_entropy, task_cross_entropy

    with backend_on(LIMITS[capability]) as backend, recorded() as launches:
        hidden = torch.zeros(256, 1024, dtype=dtype, requires_grad=True)
        weight = torch.zeros(4096, 1024, dtype=dtype, requires_grad=True)
        bias = torch.zeros(4096, dtype=dtype, requires_grad=True)
        labels, tasks = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
        for variant in variants:
            options = {name: value for name, value in variant.items() if name not in ("bias", "logits")}
            where = (labels, tasks, torch.ones(2))
            if variant.get("logits"):
                logits = torch.zeros(256, 4096, dtype=dtype, requires_grad=True)
                out = task_cross_entropy(logits, *where, backend=backend, **options)
            else:
                options["bias"] = bias if variant.get("bias") else None
                out = linear_task_cross_entropy(hidden, weight, *where, backend=backend, **options)
            out.loss.sum().backward()
    return list({launch.key: launch for launch in launches}.values())


# In the workspace as a whole, or in slices of half of the vocabulary.
WHOLE: dict[str, Any] = {}
SLICED = {"chunk_size": 128}
PLAIN: list[dict[str, Any]] = [WHOLE, SLICED, {"recompute": True}, {"logits": True}]
FEATURES: list[dict[str, Any]] = [
    *({"bias": True, "logit_softcap": 30.0, **slices} for slices in (WHOLE, SLICED)),
    *({"label_smoothing": 0.1, **slices} for slices in (WHOLE, SLICED)),
    {"bias": True, "logit_softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4},
    {"recompute": True, "bias": True, "logit_softcap": 30.0},
    *({"logit_scale": 0.0625, **slices} for slices in (WHOLE, SLICED)),
    {"recompute": True, "logit_scale": 0.0625},
    {"logits": True, "logit_softcap": 30.0, "label_smoothing": 0.1, "logit_scale": 0.0625},
]
# Shared memory of one block by compute capability (CUDA C++ Programming Guide, table of capabilities); how many
# multiprocessors there are changes nothing that is compiled.
LIMITS = {
    capability: configs.DeviceLimits(capability, shared, multiprocessors=3)
    for capability, shared in {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}.items()
}


def _compile_nth(job: tuple[int, torch.dtype, bool, int]) -> tuple[str, Resources]:
    capability, dtype, features, index = job
    launch = training_launches(capability, dtype, PLAIN + FEATURES * features)[index]
    return launch.name, compile_launch(launch, capability)


def resource_table(
    capabilities: list[int], dtype: torch.dtype, features: bool, workers: int = 2
) -> list[tuple[int, str, Resources]]:
    """Resources of every launch on every device, compiled in ``workers`` processes."""
    jobs = [
        (capability, dtype, features, index)
        for capability in capabilities
        for index in range(len(training_launches(capability, dtype, PLAIN + FEATURES * features)))
    ]
    # Not forked: threads of torch would leave locks behind that nobody opens.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = pool.map(_compile_nth, jobs)
        return [(job[0], *result) for job, result in zip(jobs, results, strict=True)]


def main() -> None:
    """Print the table as Markdown; exit 1 if a kernel spills in its main loop, or stores its results one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES), choices=sorted(LIMITS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--features", action="store_true", help="bias, scale, soft cap, smoothing and z-loss too")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    table = resource_table(args.capability, getattr(torch, args.dtype), args.features, args.workers)
    print(f"triton {triton.__version__}, {args.dtype}\n")
    columns = ["sm", "kernel", "registers", "instructions", "spilled bytes", "in main loops", "narrow stores"]
    columns += ["shared bytes", "matrix instructions"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for capability, name, used in table:
        row = (capability, name, *(getattr(used, field) for field in SHOWN_RESOURCES))
        print("| " + " | ".join(map(str, row)) + " |")
    sys.exit(any(used.loop_spills or used.narrow_stores > 1 for _, _, used in table))


if __name__ == "__main__":
    main()
