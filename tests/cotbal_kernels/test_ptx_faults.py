"""What the machine that runs PTX must refuse: accesses, races, waits."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ptx_case import WARP, run
from ptx_on_cpu import compute_capability

ARCHITECTURES = pytest.mark.parametrize("capability", [80, 90, 100])


@triton.jit
def shift_kernel(x_ptr, out_ptr, size, by, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + by, mask=at < size, other=0.0), mask=at < size)


@ARCHITECTURES
@pytest.mark.parametrize(("by", "size"), [(1, 256), (-1, 256), (0, 257)])
def test_access_outside_of_all_tensors_is_found(capability: int, by: int, size: int) -> None:
    x, out = torch.arange(256.0), torch.empty(256)
    with compute_capability(capability):
        shift_kernel[(2,)](x, out, 256, 0, BLOCK=128)
        assert torch.equal(x, out)
        with pytest.raises(AssertionError, match=r"test_ptx_faults.py:\d+.*(load from|store to) memory outside"):
            shift_kernel[(3,)](x, out, size, by, BLOCK=128)


@ARCHITECTURES
def test_blocks_that_need_an_order_are_found(capability: int) -> None:
    x = torch.arange(512.0)
    with compute_capability(capability), pytest.raises(AssertionError, match="loads what another one stores"):
        shift_kernel[(2,)](x, x, 256, 128, BLOCK=128)


def test_what_the_hardware_would_refuse() -> None:
    values = torch.zeros(WARP + 1)
    with pytest.raises(AssertionError, match="misaligned"):
        run("ld.global.v2.b32 {%r1, %r2}, [%rd0];", values)
    with pytest.raises(AssertionError, match="behind its end"):
        run("mov.b32 %r1, 64;\nst.shared.b32 [%r1], %r1;", values, shared=64)
    with pytest.raises(NotImplementedError, match="sin"):
        run("sin.approx.f32 %r1, %r1;", values)


WAIT = """
mov.b32 %r1, memory;
mov.u32 %r2, %tid.x;
setp.eq.s32 %p1, %r2, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
bar.sync 0;
ARRIVE
again:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;
@!%p2 bra again;
"""


def test_waiting_for_what_never_comes_is_found() -> None:
    out: Any = torch.zeros(WARP)
    run(WAIT.replace("ARRIVE", "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 0;"), out, shared=64)
    with pytest.raises(AssertionError, match="for ever"):
        run(WAIT.replace("ARRIVE", "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;"), out, shared=64)
    with pytest.raises(AssertionError, match="more threads arrive"):
        run(WAIT.replace("ARRIVE", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 0;"), out, shared=64)


# Each of 64 threads has a word of shared memory, [%r2], and one of a neighbour, [%r3]: of its own warp or the other.
EXCHANGE = """
mov.u32 %r1, %tid.x;
mov.b32 %r4, memory;
shl.b32 %r2, %r1, 2;
xor.b32 %r3, %r2, NEIGHBOUR;
add.s32 %r2, %r2, %r4;
add.s32 %r3, %r3, %r4;
setp.eq.s32 %p1, %r1, 0;
"""
STORE, LOAD, BARRIER = "st.shared.b32 [%r2], %r1;\n", "ld.shared.b32 %r5, [%r3];\n", "bar.sync 0;\n"
FIRST = "@%p1 st.shared.b32 [%r4], %r1;\n"


@pytest.mark.parametrize("neighbour", [4, 128], ids=["lane", "warp"])
@pytest.mark.parametrize(
    ("body", "raced"),
    [
        (STORE + LOAD, "load by thread 0 and store by thread {}"),
        (LOAD + STORE, "store by thread 0 and load by thread {}"),
        (STORE + BARRIER + LOAD, None),
        (STORE + BARRIER + LOAD + STORE, "store by thread 0 and load by thread {}"),
        (STORE + BARRIER + LOAD + BARRIER + STORE, None),
        (STORE + "ld.shared.b32 %r5, [%r2];\n" + STORE, None),  # its own
        (LOAD + LOAD, None),
        (FIRST + LOAD, "load by thread {} and store by thread 0"),
        (LOAD + FIRST, "store by thread 0 and load by thread {}"),
    ],
)
def test_races_in_shared_memory_are_found(neighbour: int, body: str, raced: str | None) -> None:
    """In either direction, between lanes of a warp too; one barrier orders what is before it and behind it."""
    source = EXCHANGE.replace("NEIGHBOUR", str(neighbour)) + body
    if raced is None:
        run(source, torch.zeros(64), threads=64, shared=256)
        return
    with pytest.raises(AssertionError, match=f"no barrier between {raced.format(neighbour // 4)}"):
        run(source, torch.zeros(64), threads=64, shared=256)


READ, WRITE = "ld.global.b32 %r5, [%rd90];\n", "@%p1 st.global.b32 [%rd90], %r5;\n"
COUNT = "atom.global.gpu.relaxed.add.u32 %r6, [%rd90], 1;\n"


@pytest.mark.parametrize(
    ("body", "raced"),
    [
        (READ + WRITE, "store by thread 0 and load by several threads"),
        (READ + BARRIER + WRITE, None),
        (COUNT + COUNT, None),
        (WRITE + READ, "load by thread 1 and store by thread 0"),
        (WRITE + COUNT, "atomic operation by thread 1 and store by thread 0"),
        (WRITE + BARRIER + COUNT + BARRIER + READ, None),
    ],
)
def test_races_in_global_memory_are_found(body: str, raced: str | None) -> None:
    source = "mov.u32 %r1, %tid.x;\nsetp.eq.s32 %p1, %r1, 0;\nmov.b32 %r5, 0;\n" + body
    if raced is None:
        run(source, torch.zeros(64), threads=64)
        return
    with pytest.raises(AssertionError, match=f"no barrier between {raced}"):
        run(source, torch.zeros(64), threads=64)


def test_stores_of_one_value_may_meet() -> None:
    """As reductions of Triton store what all lanes have; of different values one would win."""
    run("mov.b32 %r1, memory;\nst.shared.b32 [%r1], 7;", torch.zeros(WARP), shared=64)
    with pytest.raises(AssertionError, match="different values"):
        run("mov.b32 %r1, memory;\nmov.u32 %r2, %tid.x;\nst.shared.b32 [%r1], %r2;", torch.zeros(WARP), shared=64)
