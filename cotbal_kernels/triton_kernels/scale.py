"""What waited for the backward pass, times the upstream gradient: 2 n elements moved, none in place where it is 1."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(
    grad_ptr,  # [size]
    factor_ptr,  # [] float32
    out_ptr,  # [size], or grad itself
    size,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = grad * factor`` in float32, rounded once. Few programs, since most often there is nothing to do."""
    factor = tl.load(factor_ptr)
    if IN_PLACE:  # noqa: SIM102 (the outer one is decided by the compiler)
        if factor == 1.0:
            return
    block = tl.full((), BLOCK, tl.int64)  # a head can have more than 2^31 weights
    for index in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at_B = index * block + tl.arange(0, BLOCK)
        grad_B = tl.load(grad_ptr + at_B, mask=at_B < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + at_B, (grad_B * factor).to(out_ptr.dtype.element_ty), mask=at_B < size)
