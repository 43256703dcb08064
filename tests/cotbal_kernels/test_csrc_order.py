"""The kernels of csrc/ with threads and warps in any order between barriers, and what they do by count."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from csrc_case import (
    BF16,
    F32,
    FORMATS,
    NO_NVCC,
    PLAIN,
    Case,
    check_gradient,
    everything,
    in_front,
    one_thread,  # noqa: F401 (a fixture)
    outside_untouched,
)
from cuda_on_cpu import (
    ASCENDING,
    DESCENDING,
    SHUFFLED,
    compile_for_cpu,
    cpu_kernels,
    find_compiler,
    schedule,
)
from cuda_on_cpu.as_ptx import PtxKernels, ptx_kernels

from cotbal_kernels.cuda_kernels.build import find_nvcc, source_directory
from cotbal_kernels.cuda_kernels.library import KernelLibrary
from cotbal_kernels.interface import TokenLoss

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")


@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(d)[6:] for d in f))
@pytest.mark.parametrize("kernel", ["chunk", "saved"])
@pytest.mark.parametrize("vocab", [5, 4099, 65531])  # the last is eight tiles, with barriers at 0, 2 and 6
def test_in_place(formats: tuple[torch.dtype, torch.dtype], kernel: str, vocab: int) -> None:
    """The gradient over the logits, 16-bit ones at the front of float32 rows, whatever order threads run in."""
    for misaligned in (0, 1) if vocab < 20000 else (1,):
        layout = {"misaligned": misaligned, "pad": 3}
        apart = Case(vocab, formats[0], **layout)
        expected, original = apart.expected(PLAIN), apart.logits_CV
        out_CV = torch.empty(apart.C, vocab, dtype=formats[1])
        cpu_kernels().chunk_gradient(original, out_CV, None, apart.where(), PLAIN, apart.results)
        stats_2M = torch.stack([apart.results.max_M, apart.results.log_sum_M])
        if kernel == "saved":
            cpu_kernels().saved_gradient(original, out_CV, None, apart.where(), PLAIN, stats_2M)
        check_gradient(out_CV, expected[-1])
        for order, seed in ((ASCENDING, 1), (DESCENDING, 1), (SHUFFLED, 1), (SHUFFLED, 2)):
            case = Case(vocab, formats[0], **layout)
            front = in_front(case.logits_CV, formats[1])
            with schedule(order, seed):
                if kernel == "chunk":
                    cpu_kernels().chunk_gradient(case.logits_CV, front, None, case.where(), PLAIN, case.results)
                else:
                    cpu_kernels().saved_gradient(case.logits_CV, front, None, case.where(), PLAIN, stats_2M)
            assert torch.equal(front, out_CV)  # bit by bit
            if formats[0] != formats[1]:  # the second half of every row is as it was
                half = (vocab + 1) // 2
                after, before = (logits[:, half:].nan_to_num(5) for logits in (case.logits_CV, original))
                assert torch.equal(after, before)
            assert outside_untouched(case.whole, case.logits_CV)


@pytest.mark.skipif(find_nvcc() is None, reason=NO_NVCC)
@pytest.mark.parametrize("formats", FORMATS, ids=lambda f: "-".join(str(d)[6:] for d in f))
def test_in_place_as_compiled(formats: tuple[torch.dtype, torch.dtype]) -> None:
    """No two threads meet at an element without a barrier between them: see ptx_on_cpu/races.py."""
    vocab, compiled = 65531, ptx_kernels("80")
    apart = Case(vocab, formats[0], misaligned=1, pad=3)
    out_CV = torch.empty(apart.C, vocab, dtype=formats[1])
    compiled.chunk_gradient(apart.logits_CV, out_CV, None, apart.where(), PLAIN, apart.results)
    check_gradient(out_CV, apart.expected(PLAIN)[-1])
    case = Case(vocab, formats[0], misaligned=1, pad=3)
    front = in_front(case.logits_CV, formats[1])
    compiled.chunk_gradient(case.logits_CV, front, None, case.where(), PLAIN, case.results)
    assert torch.equal(front, out_CV)
    assert outside_untouched(case.whole, case.logits_CV)


@pytest.fixture(scope="module")
def without_barriers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc/ that lacks the barriers before its stores from the third tile on."""
    source = tmp_path_factory.mktemp("broken") / "csrc"
    shutil.copytree(source_directory(), source)
    header = source / "logit_row.cuh"
    barrier = "if (kOthers && barrier_before_stores(t)) __syncthreads();"
    text = header.read_text()
    assert text.count(barrier) == 1
    header.write_text(text.replace(barrier, "if (t < 2 && barrier_before_stores(t)) __syncthreads();"))
    return source


def is_right(broken: KernelLibrary) -> bool:
    case = Case(65531, F32)
    expected, front = case.expected(PLAIN), in_front(case.logits_CV, BF16)
    broken.chunk_gradient(case.logits_CV, front, None, case.where(), PLAIN, case.results)
    return float((front[:3].double() - expected[-1]).abs().max()) < 0.01


def test_a_missing_barrier_is_noticed(without_barriers: Path, tmp_path: Path) -> None:
    """The harness can fail: without barriers the same kernel gives another gradient."""
    compile_for_cpu(tmp_path / "kernels.so", without_barriers)
    broken = KernelLibrary(tmp_path / "kernels.so", device_type="cpu")
    right = []
    for order in (ASCENDING, DESCENDING):
        with schedule(order, kernels=broken):
            right.append(is_right(broken))
    assert not all(right)


def launch(kernels: KernelLibrary, name: str) -> None:
    """At a size that needs every barrier of the kernel."""
    positions = torch.arange(9000)
    if name == "compact":
        kernels.compact(positions % 20, positions % 3, torch.ones(3), 20, -1, True, 9000)
    elif name == "task_sums":
        kernels.task_sums(torch.ones(9000), positions % 2, positions % 3, 3)
    elif name == "task_scales":
        kernels.task_scales(torch.ones(3), torch.ones(3, dtype=torch.int64), torch.zeros(1), None, True)
    else:
        case = Case(16387, F32)  # two whole tiles, and a tail
        logits_CV, front, spec = case.logits_CV[:1], in_front(case.logits_CV, BF16)[:1], everything(case.V)
        if name == "chunk_gradient":
            kernels.chunk_gradient(logits_CV, front, None, case.where(), spec, case.results)
        else:
            kernels.saved_gradient(logits_CV, front, None, case.where(), spec, torch.zeros(2, case.M))


@pytest.mark.skipif(find_nvcc() is None, reason=NO_NVCC)
@pytest.mark.parametrize(
    ("name", "count"),
    [("chunk_gradient", 6), ("saved_gradient", 2), ("compact", 3), ("task_sums", 2), ("task_scales", 1)],
)
def test_every_barrier_is_needed(name: str, count: int) -> None:
    """Without any of them threads race, and the harness says so: it can fail, and no barrier takes time for nothing."""
    kernels = PtxKernels(ptx_kernels("80").path, ptx_kernels("80").ptx)
    launch(kernels, name)
    (block,) = kernels.blocks.values()
    assert len(block.barriers()) == count
    for at in block.barriers():
        with block.without_barrier(at), pytest.raises(AssertionError, match=f"{name}.*: no barrier between"):
            launch(kernels, name)


def test_a_barrier_that_cannot_complete_ends_the_launch(tmp_path: Path) -> None:
    """The other thing the harness must notice."""
    source = tmp_path / "api.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        "__global__ void half() { if (threadIdx.x < 16) __syncthreads(); else __shfl_xor_sync(~0u, 1, 1); }\n"
        'extern "C" int run() {\n'
        "    cudaLaunchConfig_t config = {};\n"
        "    config.blockDim = dim3(32);\n"
        "    return cudaLaunchKernelEx(&config, half);\n"
        "}\n"
    )
    compile_for_cpu(tmp_path / "half.so", tmp_path)
    assert ctypes.CDLL(str(tmp_path / "half.so")).run() == 719


@pytest.mark.skipif(find_nvcc() is None, reason=NO_NVCC)
@pytest.mark.parametrize(
    ("formats", "spec", "most"),
    [((BF16, BF16), PLAIN, 38), ((F32, BF16), PLAIN, 34), ((BF16, BF16), TokenLoss(softcap=30.0), 92)],
    ids=["bfloat16", "float32", "softcap"],
)
def test_operations_per_logit(formats: tuple[torch.dtype, torch.dtype], spec: TokenLoss, most: int) -> None:
    """Two sweeps of a long row, moves included: with more, arithmetic takes longer than the memory it hides behind."""
    compiled, case = ptx_kernels("90a"), Case(70001, formats[0])
    out_CV, before = torch.empty(case.C, case.V, dtype=formats[1]), compiled.issued
    compiled.chunk_gradient(case.logits_CV, out_CV, None, case.where(), spec, case.results)
    rows = len(case.positions)
    found = (compiled.issued - before) / (rows * case.V / 32)
    assert 0.5 * most < found <= most
