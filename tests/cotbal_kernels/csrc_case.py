"""Shared by the tests of the kernels of csrc/: random rows in every layout, and their float64 results."""

import math
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import cpu_kernels
from cuda_on_cpu.as_ptx import ptx_kernels
from loss_problems import FP32
from torch import Tensor

from cotbal_kernels.cuda_kernels.build import find_nvcc
from cotbal_kernels.cuda_kernels.library import ChunkRows, KernelLibrary, RowResults
from cotbal_kernels.interface import TokenLoss

# Shapes: C rows of a chunk, M positions, V vocabulary, K tasks.

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]
PLAIN = TokenLoss()
SENTINEL = 77.0
NO_NVCC = "no nvcc: CUDA_HOME, PATH, /usr/local/cuda"


def everything(vocab: int, **changed: float) -> TokenLoss:
    """Every option; no scale is a power of two."""
    return TokenLoss(4.0, 0.1, 0.01, 0.7, 0.1 / vocab)._replace(**changed)


def oracle(logits_CV: Tensor, bias_V: Tensor | None, targets_C: Tensor, scale_C: Tensor, spec: TokenLoss):
    """Loss, largest logit, log of the sum, first argmax and gradient of every row in float64, by autograd."""
    raw = logits_CV.double().requires_grad_()
    z = spec.scale * (raw if bias_V is None else raw + bias_V.double())
    if spec.softcap:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    log_p = z.log_softmax(1)
    loss = -(1 - spec.smoothing) * log_p.gather(1, targets_C[:, None])[:, 0]
    if spec.smoothing:  # 0 times the -inf of a masked word is NaN
        loss = loss - spec.smoothing * log_p.mean(1)
    loss = loss + spec.z_loss * z.logsumexp(1) ** 2
    (gradient,) = torch.autograd.grad((loss * scale_C.double()).sum(), raw)
    largest = z.max(1).values
    return loss.detach(), largest.detach(), (z.logsumexp(1) - largest).detach(), z.argmax(1), gradient


def placed(rows: int, vocab: int, dtype: torch.dtype, *, misaligned: int, pad: int) -> tuple[Tensor, Tensor]:
    """A ``[rows, vocab]`` view with gaps behind its rows, some elements off a 16-byte boundary, and all around it."""
    whole = torch.full((32 + misaligned + rows * (vocab + pad) + 32,), SENTINEL, dtype=dtype)
    assert whole.data_ptr() % 64 == 0
    return whole, whole.as_strided((rows, vocab), (vocab + pad, 1), 32 + misaligned)


def outside_untouched(whole: Tensor, view: Tensor) -> bool:
    copy = whole.clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(SENTINEL)
    return bool((copy == SENTINEL).all())


class Case:
    """Rows of random logits of which some are positions: row r is position ``rows[r]``, the last two are none."""

    def __init__(self, vocab: int, in_dtype: torch.dtype, *, misaligned: int = 0, pad: int = 0, bias: bool = False):
        generator = torch.Generator().manual_seed(vocab)
        self.C, self.M, self.V = 5, 11, vocab
        self.rows_N = torch.tensor([99, 99, 9, 0, 4, self.M, self.M])  # the chunk starts at its third row
        self.num_rows = torch.tensor([5])
        self.positions = torch.tensor([9, 0, 4])
        self.targets_M = torch.randint(vocab, (self.M,), generator=generator)
        self.targets_M[0] = vocab - 1  # in the tail
        self.targets_M[4] = 0  # in the head
        self.tasks_M = torch.randint(3, (self.M,), generator=generator)
        self.scale_K = torch.tensor([0.7, 1.9, 0.02])
        values = 3 * torch.randn(self.C, vocab, generator=generator)
        values[0, self.targets_M[9]] = 12.0  # sure, and right
        values[3:] = math.nan
        self.whole, self.logits_CV = placed(self.C, vocab, in_dtype, misaligned=misaligned, pad=pad)
        self.logits_CV.copy_(values)
        self.bias_V = torch.randn(vocab, generator=generator) if bias else None
        self.results = RowResults(*(torch.full((self.M,), SENTINEL) for _ in range(3)), torch.full((self.M,), 77))

    def expected(self, spec: TokenLoss):
        scale_C = self.scale_K[self.tasks_M[self.positions]]
        return oracle(self.logits_CV[:3].clone(), self.bias_V, self.targets_M[self.positions], scale_C, spec)

    def where(self) -> ChunkRows:
        return ChunkRows(self.rows_N, self.num_rows, 2, self.targets_M, self.tasks_M, self.scale_K)

    def check_results(self, expected, dtype: torch.dtype) -> None:
        loss, largest, log_sum, argmax, _ = expected
        found = [result[self.positions] for result in self.results]
        for actual, wanted in zip(found[:3], (loss, largest, log_sum), strict=True):
            assert float((actual - wanted).abs().max()) <= FP32 * max(1.0, float(wanted.abs().max()))
        assert found[3].tolist() == (argmax == self.targets_M[self.positions]).long().tolist()
        others = [m for m in range(self.M) if m not in self.positions.tolist()]
        assert all(bool((result[others] == SENTINEL).all()) for result in self.results)  # nothing but the positions


def check_gradient(actual: Tensor, expected: Tensor) -> None:
    """One rounding of each element to its format, and FP32 of the largest for everything before it."""
    wanted, largest = expected.abs(), float(expected.abs().max())
    bound = torch.finfo(actual.dtype).eps / 2 * wanted + FP32 * largest
    if actual.dtype == F16:
        bound = bound + 2.0**-25  # subnormal
    assert bool(((actual[:3].double() - expected).abs() <= bound).all())
    assert bool((actual[3:] == 0).all())  # not NaN times 0


def in_front(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of the logits as a matrix of another dtype, rows at the same addresses."""
    ratio = logits_CV.element_size() // dtype.itemsize
    flat = torch.empty(0, dtype=dtype).set_(logits_CV.untyped_storage())
    return flat.as_strided(logits_CV.shape, (logits_CV.stride(0) * ratio, 1), logits_CV.storage_offset() * ratio)


class WithoutLaunches(KernelLibrary):
    """Checks its arguments, notes the launch, and does nothing."""

    def __init__(self, device_type: str) -> None:
        self.path, self.device_type = Path("none"), device_type
        self.launched: list[str] = []

    def _launch(self, name: str, on: Tensor, *arguments: object) -> None:
        self._require_device(on)
        self.launched.append(name)


@pytest.fixture(params=["host", "90a"], name="kernels")
def compiled(request: pytest.FixtureRequest) -> KernelLibrary:
    """Compiled by the host's compiler, and by nvcc."""
    if request.param == "host":
        return cpu_kernels()
    if find_nvcc() is None:
        pytest.skip(NO_NVCC)
    return ptx_kernels(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
