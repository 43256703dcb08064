"""The machine that runs PTX, operation by operation, beside integers and fractions of Python, torch, and loops."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_case import WARP, run
from ptx_on_cpu import compute_capability
from triton.tools.tensor_descriptor import TensorDescriptor


def apply(operation: str, *inputs: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """One operation, ``operation`` with ``{}`` for result and operands, of every element of ``inputs``."""
    result = torch.zeros(WARP, dtype=out)
    names = {1: ("b8", "rs"), 2: ("b16", "rs"), 4: ("b32", "r"), 8: ("b64", "rd")}
    body, operands = [], []
    for index, tensor in enumerate([result, *inputs]):
        kind, register = names[tensor.element_size()]
        operands.append(f"%{register}{40 + index if register == 'rd' else index}")
        if index:
            body.append(f"ld.global.{kind} {operands[-1]}, [%rd{index}];")
    body.append(operation.format(*operands) + ";")
    body.append(f"st.global.{names[result.element_size()][0]} [%rd0], {operands[0]};")
    run("\n".join(body), result, *inputs)
    return result


# --- integers -----------------------------------------------------------------------------------------------------


def wrapped(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: (a * b) >> 32,
    "mul.hi.u32": lambda a, b: ((a % 2**32) * (b % 2**32)) >> 32,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "min.s32": min,
    "max.s32": max,
    "div.s32": lambda a, b: truncated(a, b) if b else 0,
    "rem.s32": lambda a, b: a - b * truncated(a, b) if b else 0,
    "shl.b32": lambda a, b: a << (b % 2**32) if 0 <= b < 32 else 0,
    "shr.s32": lambda a, b: a >> b if 0 <= b < 32 else (-1 if a < 0 else 0),
    "shr.u32": lambda a, b: (a % 2**32) >> b if 0 <= b < 32 else 0,
}
EDGES = [0, 1, -1, 2, 31, 32, 33, 2**31 - 1, -(2**31), 7, -7]


@pytest.mark.parametrize("operation", INTEGERS)
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_integers(operation: str, data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from(EDGES), st.integers(-(2**31), 2**31 - 1), st.integers(-40, 40))
    a, b = (data.draw(st.lists(numbers, min_size=WARP, max_size=WARP)) for _ in range(2))
    if operation.startswith(("div", "rem")):  # by zero there is no value
        b = [value or 3 for value in b]
    found = apply(f"{operation} {{}}, {{}}, {{}}", torch.tensor(a).int(), torch.tensor(b).int(), out=torch.int32)
    assert found.tolist() == [wrapped(INTEGERS[operation](x, y), 32) for x, y in zip(a, b, strict=True)]


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_wide_integers(data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from(EDGES), st.integers(-(2**31), 2**31 - 1))
    a, b = (data.draw(st.lists(numbers, min_size=WARP, max_size=WARP)) for _ in range(2))
    x, y, z = torch.tensor(a).int(), torch.tensor(b).int(), torch.tensor(b) * 2**31 + 5
    exact = [p * q + r for p, q, r in zip(a, b, z.tolist(), strict=True)]
    assert apply("mad.wide.s32 {}, {}, {}, {}", x, y, z, out=torch.int64).tolist() == [wrapped(n, 64) for n in exact]
    unsigned = [(p % 2**32) * (q % 2**32) for p, q in zip(a, b, strict=True)]
    assert apply("mul.wide.u32 {}, {}, {}", x, y, out=torch.int64).tolist() == [wrapped(n, 64) for n in unsigned]
    assert apply("cvt.s64.s32 {}, {}", x, out=torch.int64).tolist() == a
    assert apply("cvt.u64.u32 {}, {}", x, out=torch.int64).tolist() == [n % 2**32 for n in a]
    assert apply("cvt.u32.u64 {}, {}", z, out=torch.int32).tolist() == [wrapped(n, 32) for n in z.tolist()]
    low = [wrapped(n, 32) for n in a]
    assert apply("bfe.s32 {}, {}, 3, 5", x, out=torch.int32).tolist() == [wrapped(n >> 3, 5) for n in low]
    assert apply("bfe.u32 {}, {}, 3, 5", x, out=torch.int32).tolist() == [(n >> 3) % 32 for n in low]
    assert apply("popc.b32 {}, {}", x, out=torch.int32).tolist() == [(n % 2**32).bit_count() for n in a]
    assert apply("clz.b32 {}, {}", x, out=torch.int32).tolist() == [32 - (n % 2**32).bit_length() for n in a]
    inserted = [(q % 2**32) & ~(31 << 3) | (p % 32) << 3 for p, q in zip(a, b, strict=True)]
    assert apply("bfi.b32 {}, {}, {}, 3, 5", x, y, out=torch.int32).tolist() == [wrapped(n, 32) for n in inserted]
    pieces = [(p % 2**32).to_bytes(4, "little") + (q % 2**32).to_bytes(4, "little") for p, q in zip(a, b, strict=True)]
    chosen = [int.from_bytes(bytes(piece[at] for at in (2, 7, 0, 4)), "little", signed=True) for piece in pieces]
    assert apply("prmt.b32 {}, {}, {}, 0x4072U", x, y, out=torch.int32).tolist() == chosen


# --- floating-point numbers -----------------------------------------------------------------------------------------


def awkward(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 65504.0, 65520.0, 3.4e38, 6e-8])
    random = torch.randn(WARP - special.numel(), generator=generator) * torch.logspace(-9, 9, WARP - special.numel())
    return torch.cat([special, random])[torch.randperm(WARP, generator=generator)]


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_a_fused_multiplication_rounds_once(kind: str) -> None:
    dtype = {"f32": torch.float32, "f64": torch.float64}[kind]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(WARP, generator=generator, dtype=dtype) for _ in range(2))
    c = -(a * b) * (1 + torch.randn(WARP, generator=generator, dtype=dtype) * 1e-7)  # nearly cancels
    found = apply(f"fma.rn.{kind} {{}}, {{}}, {{}}, {{}}", a, b, c, out=dtype)
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        digits = {"f32": 24, "f64": 53}[kind]
        ulp = Fraction(2) ** (math.frexp(value)[1] - digits)
        # float64 goes through 64 digits, which leave up to 2^-65 of the product where it cancels.
        slack = 0 if kind == "f32" else abs(Fraction(x) * Fraction(y)) / 2**64
        assert abs(Fraction(value) - exact) <= ulp / 2 + slack


@pytest.mark.parametrize("seed", range(3))
def test_conversions(seed: int) -> None:
    x, y = awkward(seed), awkward(seed + 10)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        narrow = apply(f"cvt.rn.{name}.f32 {{}}, {{}}", x, out=torch.int16).view(dtype)
        torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        pairs = apply(f"cvt.rn.{name}x2.f32 {{}}, {{}}, {{}}", x, y, out=torch.int32).view(dtype).view(WARP, 2)
        torch.testing.assert_close(pairs, torch.stack([y, x], 1).to(dtype), rtol=0, atol=0, equal_nan=True)
        wide = apply(f"cvt.f32.{name} {{}}, {{}}", x.to(dtype).view(torch.int16), out=torch.float32)
        torch.testing.assert_close(wide, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    whole = torch.arange(-16, 16, dtype=torch.int32) * 123_456_789
    assert torch.equal(apply("cvt.rn.f32.s32 {}, {}", whole, out=torch.float32), whole.float())


def test_comparisons_and_extrema_with_nan() -> None:
    x, y = awkward(1), awkward(2)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))

    def holds(comparison: str) -> list[bool]:
        body = f"ld.global.b32 %r1, [%rd1]; ld.global.b32 %r2, [%rd2]; setp.{comparison}.f32 %p1, %r1, %r2;"
        body += " selp.b32 %r3, 1, 0, %p1; st.global.b32 [%rd0], %r3;"
        out = torch.zeros(WARP, dtype=torch.int32)
        run(body.replace("; ", ";\n"), out, x, y)
        return out.bool().tolist()

    assert holds("eq") == [a == b for a, b in pairs]
    assert holds("lt") == [a < b for a, b in pairs]
    assert holds("geu") == [not a < b for a, b in pairs]
    assert holds("neu") == [a != b for a, b in pairs]
    assert holds("ne") == [a < b or a > b for a, b in pairs]
    largest = apply("max.f32 {}, {}, {}", x, y, out=torch.float32)
    torch.testing.assert_close(largest, torch.fmax(x, y), rtol=0, atol=0, equal_nan=True)
    smallest = apply("min.NaN.f32 {}, {}, {}", x, y, out=torch.float32)
    torch.testing.assert_close(smallest, torch.minimum(x, y), rtol=0, atol=0, equal_nan=True)


# --- control flow and shared memory ---------------------------------------------------------------------------------


def test_threads_part_and_meet_again() -> None:
    """Every thread loops as often as its number says, then all of them exchange what they have."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """
mov.u32 %r1, %tid.x;
mov.b32 %r2, 0;
mov.b32 %r3, 0;
setp.eq.s32 %p1, %r1, 5;
@%p1 bra $done;
$loop:
add.s32 %r2, %r2, %r3;
add.s32 %r3, %r3, 1;
setp.le.s32 %p2, %r3, %r1;
@%p2 bra $loop;
$done:
shl.b32 %r4, %r1, 2;
mov.b32 %r5, memory;
add.s32 %r4, %r4, %r5;
st.shared.b32 [%r4], %r2;
bar.sync 0;
xor.b32 %r6, %r4, 252;
ld.shared.b32 %r7, [%r6];
st.global.b32 [%rd0], %r7;
"""
    run(body, out, threads=64, shared=256)
    sums = [0 if number == 5 else number * (number + 1) // 2 for number in range(64)]
    assert out.tolist() == sums[::-1]


def test_lanes() -> None:
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.integers(-(2**31), 2**31, WARP, dtype=np.int64)).int()
    values = x.tolist()
    shuffled = {
        "bfly.b32 {}, {}, 5, 31, -1": [values[lane ^ 5] for lane in range(WARP)],
        "up.b32 {}, {}, 3, 0, -1": [values[lane - 3 if lane >= 3 else lane] for lane in range(WARP)],
        "down.b32 {}, {}, 3, 31, -1": [values[lane + 3 if lane < 29 else lane] for lane in range(WARP)],
        "idx.b32 {}, {}, 7, 31, -1": [values[7]] * WARP,
        # Segments of eight lanes.
        "bfly.b32 {}, {}, 12, 6175, -1": [
            values[lane ^ 12] if (lane ^ 12) <= (lane & 24 | 31 & ~24) else values[lane] for lane in range(WARP)
        ],
    }
    for operation, wanted in shuffled.items():
        assert apply(f"shfl.sync.{operation}", x, out=torch.int32).tolist() == wanted
    votes = sum((value > 0) << lane for lane, value in enumerate(values))
    ballot = "setp.gt.s32 %p1, {1}, 0;\nvote.sync.ballot.b32 {0}, %p1, -1"
    assert apply(ballot, x, out=torch.int32).tolist() == [wrapped(votes, 32)] * WARP
    assert apply("redux.sync.max.s32 {}, {}, -1", x, out=torch.int32).tolist() == [max(values)] * WARP
    y = awkward(3)
    assert float(y[y == y].max()) == math.inf
    largest = apply("redux.sync.max.f32 {}, {}, -1", torch.where(y > 3e38, math.nan, y), out=torch.float32)
    assert largest.tolist() == [float(y[y <= 3e38].max())] * WARP
    assert apply("redux.sync.add.s32 {}, {}, -1", x, out=torch.int32).tolist() == [wrapped(sum(values), 32)] * WARP


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_in_fragments(transposed: bool) -> None:
    """Row r of matrix i comes from thread 8 i + r; lane l gets elements 2 (l % 4) and the next of row l / 4."""
    elements = torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    out = torch.zeros(4 * WARP, dtype=torch.int32)
    trans = ".trans" if transposed else ""
    # Every thread brings its row into shared memory; rows of matrices are rotated by one.
    body = f"""
mov.u32 %r1, %tid.x;
mad.wide.u32 %rd10, %r1, 16, %rd91;
ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd10];
shl.b32 %r6, %r1, 4;
mov.b32 %r7, memory;
add.s32 %r6, %r6, %r7;
st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}};
bar.sync 0;
add.s32 %r8, %r1, 1;
and.b32 %r8, %r8, 31;
shl.b32 %r8, %r8, 4;
add.s32 %r8, %r8, %r7;
ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
mad.wide.u32 %rd11, %r1, 16, %rd90;
st.global.v4.b32 [%rd11], {{%r10, %r11, %r12, %r13}};
"""
    run(body, out, elements, shared=512)
    rows = [elements.view(32, 8)[(row + 1) % 32].tolist() for row in range(32)]
    wanted = []
    for lane in range(WARP):
        for matrix in range(4):
            for column in (2 * (lane % 4), 2 * (lane % 4) + 1):
                row = lane // 4
                wanted.append(rows[8 * matrix + (column if transposed else row)][row if transposed else column])
    assert out.view(torch.int16).tolist() == wanted


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_products_of_a_warp(name: str, dtype: torch.dtype) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    generator = torch.Generator().manual_seed(0)
    a_MK, b_KN = (torch.randn(*size, generator=generator).to(dtype) for size in ((16, 16), (16, 8)))
    c_MN = torch.randn(16, 8, generator=generator)
    a, b, c = torch.zeros(WARP, 8, dtype=dtype), torch.zeros(WARP, 4, dtype=dtype), torch.zeros(WARP, 4)
    place = {}
    for lane in range(WARP):
        group, inside = lane >> 2, lane % 4
        for i in range(8):
            row = group if i % 4 < 2 else group + 8
            a[lane, i] = a_MK[row, inside * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            b[lane, i] = b_KN[inside * 2 + (i & 1) + (0 if i < 2 else 8), group]
            place[lane, i] = (group + (0 if i < 2 else 8), inside * 2 + (i & 1))
            c[lane, i] = c_MN[place[lane, i]]
    out = torch.zeros(WARP, 4)
    body = "\n".join(
        [
            "mov.u32 %r1, %tid.x;",
            *(f"mad.wide.u32 %rd{10 + at}, %r1, {size}, %rd{90 + at};" for at, size in enumerate((16, 16, 8, 16))),
            "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd11];",
            "ld.global.v2.b32 {%r14, %r15}, [%rd12];",
            "ld.global.v4.b32 {%r16, %r17, %r18, %r19}, [%rd13];",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r20, %r21, %r22, %r23}},"
            " {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r17, %r18, %r19};",
            "st.global.v4.b32 [%rd10], {%r20, %r21, %r22, %r23};",
        ]
    )
    run(body, out, a, b, c)
    wanted = a_MK.double() @ b_KN.double() + c_MN.double()
    found = torch.tensor([[out[lane, i] for i in range(4)] for lane in range(WARP)]).double()
    # 16 products and a sum in float32.
    expected = torch.tensor([[float(wanted[place[lane, i]]) for i in range(4)] for lane in range(WARP)]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=17 * 2**-24 * 8)


COPY = """
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 4;
mov.b32 %r3, memory;
add.s32 %r2, %r2, %r3;
mad.wide.u32 %rd10, %r1, 16, %rd91;
setp.lt.s32 %p1, %r1, 20;
selp.b32 %r4, 16, 0, %p1;
cp.async.cg.shared.global [%r2], [%rd10], 0x10, %r4;
cp.async.commit_group;
WAIT
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r2];
mad.wide.u32 %rd11, %r1, 16, %rd90;
st.global.v4.b32 [%rd11], {%r10, %r11, %r12, %r13};
cp.async.wait_group 0;
"""


def test_copies_arrive_when_waited_for() -> None:
    values, out = torch.randn(4 * WARP), torch.zeros(4 * WARP)
    run(COPY.replace("WAIT", "cp.async.wait_group 0;"), out, values, shared=512)
    assert torch.equal(out, torch.where(torch.arange(4 * WARP) < 80, values, 0))
    run(COPY.replace("WAIT", "cp.async.wait_group 1;"), out, values, shared=512)
    assert bool(out.isnan().all())


# --- kernels of Triton: tensor copies, wgmma and tcgen05 ----------------------------------------------------


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, rows, cols, depth,
    A_BY_ROWS: tl.constexpr, B_BY_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``a b`` of one tile from descriptors of matrices that lie as they are or transposed."""
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        a = a_ptr.load([0, start]) if A_BY_ROWS else a_ptr.load([start, 0]).T
        b = b_ptr.load([start, 0]) if B_BY_ROWS else b_ptr.load([0, start]).T
        acc = tl.dot(a, b, acc)
    m, n = tl.arange(0, M), tl.arange(0, N)
    keep = (m < rows)[:, None] & (n < cols)[None, :]
    tl.store(out_ptr + m[:, None] * cols + n[None, :], acc, mask=keep)


@pytest.mark.parametrize("by_rows", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.bfloat16, tile) for tile in ((64, 64, 16), (128, 32, 32), (64, 128, 64), (128, 256, 64))]
    + [(torch.float16, (64, 128, 64))],
    ids=str,
)
@pytest.mark.parametrize("capability", [90, 100])
def test_products_of_descriptors(
    capability: int, dtype: torch.dtype, tile: tuple[int, int, int], by_rows: tuple[bool, bool]
) -> None:
    """Every swizzle, both orders of each side, zeros over the edges, pipelined."""
    (M, N, K), generator = tile, torch.Generator().manual_seed(0)
    rows, cols, depth = M - 3, N - 8, 3 * K + 8
    a, b = (
        torch.randn(rows, depth, generator=generator).to(dtype),
        torch.randn(depth, cols, generator=generator).to(dtype),
    )
    out = torch.empty(rows, cols)

    def descriptor(matrix: torch.Tensor, lies: bool, block: list[int]) -> TensorDescriptor:
        matrix = matrix if lies else matrix.T
        width = -(-matrix.shape[1] // 8) * 8  # rows on 16-byte boundaries
        padded = torch.full((matrix.shape[0], width), float("nan"), dtype=dtype)
        padded[:, : matrix.shape[1]] = matrix
        return TensorDescriptor(padded, list(matrix.shape), [width, 1], block if lies else block[::-1])

    a_map, b_map = descriptor(a, by_rows[0], [M, K]), descriptor(b, by_rows[1], [K, N])
    with compute_capability(capability):
        product_kernel[(1,)](
            a_map, b_map, out, rows, cols, depth, A_BY_ROWS=by_rows[0], B_BY_ROWS=by_rows[1], M=M, N=N, K=K,
            num_warps=8 if M * N > 128 * 128 else 4, num_stages=3,
        )  # fmt: skip
    wanted = a.double() @ b.double()
    # Up to 200 terms of size 1 in float32.
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=depth * 2**-24 * 16)
