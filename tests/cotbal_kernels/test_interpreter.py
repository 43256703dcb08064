"""What the kernels' tests rest on: bfloat16 in the interpreter beside PyTorch's, and the checks of every launch."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import interpreted

BF16 = torch.bfloat16


@triton.jit
def round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a_MK = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b_KN = tl.load(b_ptr + n[None, :] * K + k[:, None])  # a transposed view, as the kernels of the head load theirs
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a_MK, b_KN))


@triton.jit
def sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x + x)


def awkward_values() -> torch.Tensor:
    """Ties, carries into the exponent, overflow, subnormals, infinities, and ordinary values of every size."""
    special = [
        1.99999,
        -1.99999,
        1 + 2**-8,
        1 + 3 * 2**-8,
        3.4e38,
        -3.4e38,
        1e-40,
        0.0,
        -0.0,
        float("inf"),
        float("nan"),
    ]
    random = torch.randn(512 - len(special), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(special), random * torch.logspace(-30, 30, random.numel())])


def test_rounding_is_to_nearest_even() -> None:
    values, out = awkward_values(), torch.empty(512, dtype=BF16)
    with interpreted():
        round_kernel[(1,)](values, out, SIZE=512)
    torch.testing.assert_close(out, values.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_widening_is_exact() -> None:
    values, out = awkward_values().to(BF16), torch.empty(512)
    with interpreted():
        round_kernel[(1,)](values, out, SIZE=512)
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)


def test_products_accumulate_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    a_MK, b_NK = (torch.randn(rows, 64, generator=generator).to(BF16) for rows in (16, 32))
    out_MN = torch.empty(16, 32)
    with interpreted():
        product_kernel[(1,)](a_MK, b_NK, out_MN, M=16, N=32, K=64)
    # 64 float32 additions of terms around 1: far below the 2^-9 of a result that was rounded to bfloat16.
    torch.testing.assert_close(out_MN.double(), a_MK.double() @ b_NK.double().T, rtol=0, atol=64 * 2**-24 * 32)


def test_arithmetic_that_numpy_cannot_do_is_an_error() -> None:
    values = torch.ones(16, dtype=BF16)
    with interpreted(), pytest.raises(Exception, match="widen them to float32"):
        sum_kernel[(1,)](values, torch.empty_like(values), SIZE=16)


@triton.jit
def reversed_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Every program loads its block and stores it at the other end."""
    row, rows, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, SIZE)
    tl.store(out_ptr + (rows - 1 - row) * SIZE + at, tl.load(x_ptr + row * SIZE + at))


@triton.jit
def count_kernel(count_ptr, last_ptr, WITH_LAST: tl.constexpr):
    before = tl.atomic_add(count_ptr, 1, sem="relaxed")
    if WITH_LAST:
        tl.store(last_ptr, before)


def test_programs_that_need_an_order_are_found() -> None:
    values, out = torch.arange(48.0), torch.empty(48)
    with interpreted():
        reversed_kernel[(3,)](values, out, SIZE=16)
        assert out.tolist() == values.view(3, 16).flip(0).flatten().tolist()
        with pytest.raises(Exception, match="reversed_kernel: a program loads what another one stores"):
            reversed_kernel[(3,)](values, values, SIZE=16)
        reversed_kernel[(1,)](values, values, SIZE=16)  # a program may load what it stores itself


def test_programs_that_store_to_the_same_place_are_found() -> None:
    count, last = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreted():
        count_kernel[(5,)](count, last, WITH_LAST=False)
        assert count.item() == 5
        with pytest.raises(Exception, match="several programs store"):
            count_kernel[(5,)](count, last, WITH_LAST=True)
        with pytest.raises(Exception, match="several programs store"):
            count_kernel[(5,)](count, count, WITH_LAST=True)  # beside an atomic operation


@pytest.mark.parametrize("lost", ["loaded", "stored"])
def test_access_outside_of_all_tensors_is_found(lost: str) -> None:
    values = torch.arange(48.0)
    short = values.clone().untyped_storage()
    short.resize_(4 * 47)
    tensor = torch.empty(0).set_(short)
    inputs, kind = ((tensor, values), "load from") if lost == "loaded" else ((values, tensor), "store to")
    with interpreted(), pytest.raises(Exception, match=f"reversed_kernel: {kind} memory outside"):
        reversed_kernel[(3,)](*inputs, SIZE=16)
